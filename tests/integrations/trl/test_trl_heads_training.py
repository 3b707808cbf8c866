"""``Trainer.train()`` of every trainer that ``patch_trl(heads=True)`` serves: the
parameters after two steps, stock and patched. Offline, CPU.
"""

import queue

import numpy as np
import pytest
import torch

pytest.importorskip("trl", minversion="1.15")

from datasets import Dataset
from test_trl_distillation import by_name, distillation
from test_trl_heads import COMMON, TRAINERS, model
from trl_common import make_tokenizer

from reweight_ops.integrations.trl import patch_trl

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SGD = {
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
}


class Worker:
    """A rollout worker with a fixed queue, and the weights' way to an inference server
    that is not there.
    """

    def __init__(self):
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        rng = np.random.default_rng(0)
        for i in range(16):
            n = 6 + i % 5
            mask = (np.arange(n) >= 3).astype(np.int64)
            ids = np.where(np.arange(n) < 3, 5 + i // 4, rng.integers(3, 90, n))
            logps = np.where(mask, rng.normal(-5.7, 0.3, n), 0).astype(np.float32)
            advantage = (-1.5, -0.5, 0.5, 1.5)[i % 4]
            self.rollout_buffer.put_nowait(
                RolloutSample([], [], ids, mask, logps, advantage, 0, i // 4, {"reward": float(i)})
            )

    def nothing(self, *_, **__):
        return None

    start = stop = update_model_version = check_health = init_weight_transfer = pause = (
        send_weights
    ) = resume = destroy = nothing


def async_grpo(out, **more):
    # TRL 1.15's needs aiohttp
    module = pytest.importorskip("trl.experimental.async_grpo", exc_type=ImportError)
    model().save_pretrained(out)
    args = module.AsyncGRPOConfig(
        output_dir=out, **(COMMON | more), token_budget=0, num_generations=4
    )
    # it asks CUDA for the device's name
    module.async_grpo_trainer.get_peak_flops_per_device = lambda *_: None
    worker = Worker()
    rows = Dataset.from_list([{"prompt": "1 + 1 ="}])
    trainer = module.AsyncGRPOTrainer(
        model=out,
        args=args,
        train_dataset=rows,
        processing_class=make_tokenizer(),
        rollout_worker=worker,
        weight_transfer=worker,
    )
    # its tree attention is a kernel of GPUs
    trainer.model.set_attn_implementation("eager")
    return trainer


ALL = {**TRAINERS, "AsyncGRPO": async_grpo, "distillation": distillation}
OPS = {"distillation": "linear_token_divergence"}


def trained(build, out):
    """How far the parameters moved in two steps, and what was logged."""
    torch.manual_seed(7)
    trainer = build(out, **SGD)
    start = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).clone()
    trainer.train()
    timed = ("time", "per_second", "perf/", "tok_s", "grad_norm")
    log = [
        {k: v for k, v in entry.items() if not any(t in k for t in timed)}
        for entry in trainer.state.log_history
    ]
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - start, log


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=by_name) if n == "distillation" else n for n in ALL]
)
def test_two_steps_lead_to_the_same_parameters(name, tmp_path):
    """Data loader, generation, SGD: within 1e-5 of the way moved, and the same log."""
    stock, stock_log = trained(ALL[name], str(tmp_path / "stock"))
    with patch_trl(heads=True) as patch:
        ours, log = trained(ALL[name], str(tmp_path / "ours"))
    assert stock.norm() > 1e-2
    assert (ours - stock).norm() <= 1e-5 * stock.norm()
    assert len(log) == len(stock_log) == 3
    for theirs, mine in zip(stock_log, log, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-4, nan_ok=True)
    assert (
        patch.fused_calls[OPS.get(name, "linear_token_stats")] >= 2 and patch.delegated_calls == {}
    )
