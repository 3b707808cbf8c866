"""TRL before 1.15, as Axolotl and ms-swift have it: its real trainers, stock and under
``patch_logits_functions()``.

The tests of this file run where an old TRL is imported. Its wheel is fetched into a
folder and this file run with it by one slow test.
"""

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

from reweight_ops.integrations.logits import patch_logits_functions
from reweight_ops.integrations.trainers import TRAINERS

#: The versions, each with what its environment needs besides: the oldest runs on the
#: libraries of its time only.
ENVIRONMENTS = {
    "0.15.2": (
        "transformers==4.49.0", "huggingface_hub==0.29.3", "tokenizers==0.21.0", "datasets==3.3.2", "accelerate==1.4.0", "multiprocess==0.70.16",
        "dill==0.3.8", "xxhash", "aiohttp", "aiohappyeyeballs", "aiosignal", "attrs", "frozenlist", "multidict", "propcache", "yarl", "idna",
    ),
    "0.29.0": (),
    "1.9.0": (),
    "1.14.2": (),
}  # fmt: skip
#: TRL 0.15's RLOO has another call, and its SFT takes no log-probs.
NAMES = {"0.15.2": ("GRPO", "DPO")}
ALL_NAMES = ("GRPO", "RLOO", "DPO", "SFT")
VERSION = os.environ.get("REWEIGHT_OPS_OLD_TRL")
old = pytest.mark.skipif(
    VERSION is None, reason="runs with an old TRL: test_with_an_old_trl starts it"
)


@pytest.mark.slow
@pytest.mark.parametrize("version", ENVIRONMENTS)
def test_with_an_old_trl(version, tmp_path):
    pytest.importorskip("trl")
    fetch = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(tmp_path),
        f"trl=={version}",
        *ENVIRONMENTS[version],
    ]
    fetched = subprocess.run(fetch, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"no TRL {version} to be had: {fetched.stderr[-200:]}")
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "tests" / "integrations" / "trl")])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "REWEIGHT_OPS_OLD_TRL": version,
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-m",
        "not slow",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{len(NAMES.get(version, ALL_NAMES)) + 1} passed" in done.stdout


@pytest.mark.skipif(VERSION is not None, reason="says nothing of an old TRL")
def test_the_old_versions_that_are_named_are_those_that_run():
    assert [v for v in TRAINERS["TRL by logits"].tested if v not in TRAINERS["TRL"].tested] == list(
        ENVIRONMENTS
    )


def build(name, out):
    """A tiny trainer of that name and a batch as its loss takes it."""
    import trl
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl_common import TINY, make_tokenizer

    def model(seed=0):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(Qwen2Config(**TINY))

    common = {
        "output_dir": out, "per_device_train_batch_size": 4, "max_steps": 2, "seed": 1, "gradient_checkpointing": False, "bf16": False,
        "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    sums = [(f"{a} + {b} =", f"{a + b}", f"{a} {b} {b}") for a in range(3, 8) for b in range(2, 9)]
    if name == "SFT":
        rows = Dataset.from_list([{"prompt": p, "completion": c} for p, c, _ in sums])
        args = trl.SFTConfig(**common, max_length=24, loss_type="dft")
        return trl.SFTTrainer(
            model=model(), args=args, train_dataset=rows, processing_class=make_tokenizer()
        )
    if name == "DPO":
        rows = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in sums])
        args = trl.DPOConfig(**common, max_length=24)
        return trl.DPOTrainer(
            model=model(),
            ref_model=model(1),
            args=args,
            train_dataset=rows,
            processing_class=make_tokenizer(),
        )
    kind = {"GRPO": (trl.GRPOTrainer, trl.GRPOConfig), "RLOO": (trl.RLOOTrainer, trl.RLOOConfig)}[
        name
    ]
    args = kind[1](**common, num_generations=2, max_completion_length=12, temperature=0.9, beta=0.0)
    rewards = [lambda completions, **_: [float(len(set(c))) for c in completions]]
    rows = Dataset.from_list([{"prompt": p} for p, _, _ in sums])
    return kind[0](
        model=model(),
        reward_funcs=rewards,
        args=args,
        train_dataset=rows,
        processing_class=make_tokenizer(),
    )


def metrics_kept(trainer):
    """Those of training; TRL 0.15's GRPO has no others, and its DPO keeps them under
    another name.
    """
    found = trainer._metrics if hasattr(trainer, "_metrics") else trainer._stored_metrics
    return found if VERSION == "0.15.2" and hasattr(trainer, "_metrics") else found["train"]


def loss_of(trainer, batch):
    metrics = metrics_kept(trainer)
    metrics.clear()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return (
        loss.item(),
        grads,
        {name: values[-1] for name, values in metrics.items() if name != "num_tokens"},
    )


@old
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES.get(VERSION, ALL_NAMES))
def test_every_trainer(name, tmp_path):
    """Loss 1e-6, all gradients 1e-6 relative, metrics 1e-5; then two real steps under
    the patch.
    """
    trainer = build(name, str(tmp_path))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    stock = loss_of(trainer, batch)
    with patch_logits_functions() as patch:
        ours = loss_of(trainer, batch)
        assert ours[0] == pytest.approx(stock[0], rel=1e-6, abs=1e-6)
        assert stock[1].norm() > 1e-3 and (ours[1] - stock[1]).norm() <= 1e-6 * stock[1].norm()
        assert ours[2] == pytest.approx(stock[2], rel=1e-5, abs=1e-5, nan_ok=True)
        assert sum(patch.fused_calls.values()) >= 1 and patch.delegated_calls == {}
        trainer.train()
    assert patch.delegated_calls == {}
    assert not torch.equal(loss_of(trainer, batch)[1], stock[1]), "it was trained"


@old
def test_the_version_is_the_one_that_was_asked_for():
    import trl

    assert trl.__version__ == VERSION == importlib.metadata.version("trl")
