"""``patch_trl(heads=True)`` against stock TRL: every trainer that has its head from
``add_fused_lm_head``, on the same batch. Offline, CPU.
"""

import collections
import functools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")

import trl
import trl.trainer.utils
from datasets import Dataset
from test_trl_head import FAMILIES, family
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl_common import TINY, make_tokenizer

import reweight_ops as rw
from reweight_ops.integrations.trl import patch_trl

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

COMMON = {
    "per_device_train_batch_size": 4, "max_steps": 1, "seed": 1, "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": [],
    "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
SUM = [(f"{a} + {b} =", f"{a + b}", f"{a} {b} {b}") for a in range(3, 8) for b in range(2, 9)]


def model(seed=0):
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**TINY))


def on_policy(cls, config, **more):
    def build(out, **settings):
        own = {"num_generations": 2, "max_completion_length": 12, "temperature": 0.9, "beta": 0.0}
        args = config(output_dir=out, **(COMMON | own | more | settings))
        data = Dataset.from_list([{"prompt": p} for p, _, _ in SUM])
        rewards = [lambda completions, **_: [float(len(set(c))) for c in completions]]
        return cls(
            model=model(),
            reward_funcs=rewards,
            args=args,
            train_dataset=data,
            processing_class=make_tokenizer(),
        )

    return build


def preference(cls, config, rows, **more):
    def build(out, **settings):
        args = config(output_dir=out, **(COMMON | {"max_length": 24} | more | settings))
        return cls(
            model=model(),
            ref_model=model(seed=1),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
        )

    return build


def sft(out, **settings):
    args = trl.SFTConfig(output_dir=out, **(COMMON | {"max_length": 24} | settings))
    rows = Dataset.from_list([{"prompt": p, "completion": c} for p, c, _ in SUM])
    return trl.SFTTrainer(
        model=model(), args=args, train_dataset=rows, processing_class=make_tokenizer()
    )


PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in SUM]
LABELLED = [
    {"prompt": p, "completion": c, "label": good}
    for p, a, b in SUM
    for c, good in ((a, True), (b, False))
]
TRAINERS = {
    "GRPO": on_policy(trl.GRPOTrainer, trl.GRPOConfig, entropy_coef=0.01),
    "RLOO": on_policy(trl.RLOOTrainer, trl.RLOOConfig),
    "DPO": preference(trl.DPOTrainer, trl.DPOConfig, PAIRS),
    "DPO, WPO weights": preference(trl.DPOTrainer, trl.DPOConfig, PAIRS, use_weighting=True),
    "KTO": preference(trl.KTOTrainer, trl.KTOConfig, LABELLED),
    "SFT": sft,
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A trainer by name, built once, and one batch as its loss takes it."""

    @functools.lru_cache
    def trainer_and_batch(name):
        trainer = TRAINERS[name](str(tmp_path_factory.mktemp("trainer")))
        trainer.current_gradient_accumulation_steps = 1  # set by the training loop only
        trainer.model.train()
        return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))

    return trainer_and_batch


def loss_of(trainer, batch):
    """Loss, flat gradient of all parameters and the metrics logged by one call."""
    trainer._metrics["train"].clear()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    # a running total
    metrics = {
        name: values[-1]
        for name, values in trainer._metrics["train"].items()
        if name != "num_tokens"
    }
    return loss.item(), grads, metrics


def assert_same(stock, ours):
    assert ours[0] == pytest.approx(stock[0], rel=1e-6, abs=1e-6)
    assert stock[1].norm() > 1e-3
    assert (ours[1] - stock[1]).norm() <= 1e-6 * stock[1].norm()
    assert ours[2] == pytest.approx(stock[2], rel=1e-5, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer(build, name):
    trainer, batch = build(name)
    stock = loss_of(trainer, batch)
    with patch_trl(heads=True) as patch:
        ours = loss_of(trainer, batch)
    assert_same(stock, ours)
    assert patch.delegated_calls == {} and patch.fused_calls["linear_token_stats"] >= 1
    calls = dict(patch.fused_calls)
    # TRL's again
    assert loss_of(trainer, batch)[0] == stock[0] and patch.fused_calls == calls


def async_loss(model):
    """``AsyncGRPOTrainer.compute_loss`` on two packed completions; its constructor
    wants a vLLM server.
    """
    # TRL 1.15's needs aiohttp
    module = pytest.importorskip("trl.experimental.async_grpo", exc_type=ImportError)
    g = torch.Generator().manual_seed(0)
    T = 20
    label = torch.randint(3, TINY["vocab_size"], (1, T), generator=g)
    label[:, :4] = label[:, 10:13] = -100
    index = (label[0] != -100).nonzero()[None, :, 0]
    n = index.size(1)
    inputs = {
        "attention_mask": torch.ones(1, T, dtype=torch.long), "token_index": index,
        "input_ids": torch.randint(3, TINY["vocab_size"], (1, T), generator=g), "shift_labels": label,
        "position_ids": torch.cat([torch.arange(10), torch.arange(T - 10)])[None], "segment_id": (index >= 10).long(),
        "old_log_probs": -5.7 + 0.4 * torch.randn(1, n, generator=g), "advantages": torch.randn(1, n, generator=g),
        "tree_kv_index": torch.arange(T)[None], "tree_cu_seqlens_q": torch.tensor([[0, 10, T]]), "tree_cu_seqlens_k": torch.tensor([[0, 10, T]]),
        "tree_max_seqlens": torch.tensor([[10, 10]]), "global_n_tokens": torch.tensor([float(n)]), "global_n_forward_tokens": torch.tensor([float(T)]), "mean_seq_len": torch.tensor([10.0]),
    }  # fmt: skip
    accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x
    )
    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        accelerator=accelerator,
        current_gradient_accumulation_steps=1,
        model=model,
        _metrics={"train": collections.defaultdict(list)},
        _step_forward_tokens=0,
        _step_trained_tokens=0,
        _step_seq_len_weighted=0,
        _step_samples=0,
        _step_forward_s=0,
    )
    trainer.compute_loss = lambda model, batch: module.AsyncGRPOTrainer.compute_loss(
        trainer, model, batch
    )
    return trainer, inputs


def test_async_grpo():
    policy = model()
    trl.trainer.utils.add_fused_lm_head(policy, temperature=0.8, outputs=("log_probs", "entropy"))
    trainer, inputs = async_loss(policy.train())
    stock = loss_of(trainer, inputs)
    with patch_trl(heads=True) as patch:
        assert_same(stock, loss_of(trainer, inputs))
    assert patch.fused_calls == {"linear_token_stats": 1}


@pytest.mark.parametrize("masked", ["some", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_and_masks(name, masked):
    """Scale, soft cap, bias and tied weights; a micro-batch without a label gives a
    differentiable zero.
    """
    kind, config = FAMILIES[name]
    policy = family(kind, **config).train()
    trl.trainer.utils.add_fused_lm_head(policy, temperature=0.7, outputs=("log_probs", "entropy"))
    ids = torch.randint(3, TINY["vocab_size"], (3, 14), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    if masked == "all":
        labels[:] = -100

    def run():
        policy.zero_grad()
        out = policy(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.log_probs.sum() + 0.3 * out.entropy.square().sum()).backward()
        return (
            out.log_probs.detach(),
            out.entropy.detach(),
            torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]),
        )

    stock = run()
    with patch_trl(heads=True):
        ours = run()
    assert (stock[2].norm() > 1e-3) == (masked == "some")
    for a, b in zip(stock, ours, strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()


def test_positions_without_a_label_are_not_projected():
    policy = model()
    trl.trainer.utils.add_fused_lm_head(policy)
    labels = torch.full((2, 9), -100)
    labels[0, 4], labels[1, 7] = 5, 6
    with patch_trl(heads=True) as patch:
        seen = []
        apply = patch._undo[0][0].value.apply
        trl.trainer.utils._ChunkedLogProbFunction.apply = lambda hidden, *rest: (
            seen.append(len(hidden)) or apply(hidden, *rest)
        )
        policy(input_ids=torch.ones(2, 9, dtype=torch.long), labels=labels, fused_lm_head=True)
    assert seen == [2]


def test_autocast_and_a_head_in_another_dtype():
    """bf16 under autocast, and bf16 hidden states beside an fp32 head: the dtype of the
    projection is TRL's.
    """
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 300, (40,), generator=g)
    fp32 = torch.randn(40, 16, generator=g)
    weight = torch.randn(300, 16, generator=g).mul_(0.3).requires_grad_()
    for hidden, autocast in ((fp32.bfloat16(), False), (fp32, True)):
        hidden = hidden.detach().requires_grad_()
        results = []
        for patched in (False, True):
            patch = patch_trl(heads=True) if patched else None
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = trl.trainer.utils._ChunkedLogProbFunction.apply(
                    hidden, weight, None, targets, 0.9, 64, None, 1.0, ("log_probs",)
                )[0]
            results.append((found, *torch.autograd.grad(found.square().sum(), (hidden, weight))))
            if patch is not None:
                patch.undo()
        for a, b in zip(*results, strict=True):
            # bf16: eps is 0.8 %
            assert a.dtype == b.dtype and (a - b).norm() <= 2e-2 * a.norm()


@pytest.mark.parametrize("change", ["ds_id", "outputs"])
def test_what_is_left_to_trl_is_counted(change):
    weight = torch.randn(30, 8)
    outputs = ("log_probs", "a_new_one") if change == "outputs" else ("log_probs",)
    if change == "ds_id":
        weight.ds_id = 3
    call = (
        torch.randn(4, 8),
        weight,
        None,
        torch.tensor([1, 2, 3, 4]),
        1.0,
        16,
        None,
        1.0,
        outputs,
    )
    stock = trl.trainer.utils._ChunkedLogProbFunction.apply(*call)
    with patch_trl(heads=True) as patch, pytest.warns(UserWarning, match="leaves this to TRL"):
        ours = trl.trainer.utils._ChunkedLogProbFunction.apply(*call)
    assert (
        torch.equal(stock[0], ours[0])
        and sum(patch.delegated_calls.values()) == 1
        and patch.fused_calls == {}
    )


def test_heads_takes_no_option_of_grpo_and_is_undone():
    original = trl.trainer.utils._ChunkedLogProbFunction
    with pytest.raises(
        rw.InvalidCall, match="heads=True does not read spec, lm_head, which are GRPO's"
    ):
        patch_trl(heads=True, spec="dapo", lm_head="linear")
    with patch_trl(heads=True):
        with pytest.raises(rw.InvalidCall, match="patched already"):
            patch_trl(heads=True)
        with patch_trl(fuse_loss=True):  # independent of the head
            assert trl.trainer.utils._ChunkedLogProbFunction is not original
    assert trl.trainer.utils._ChunkedLogProbFunction is original


def test_a_moved_head_is_refused(monkeypatch):
    class Moved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            return hidden

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Moved)
    with pytest.raises(
        rw.BackendUnavailable, match=r"_ChunkedLogProbFunction\.forward has the signature"
    ):
        patch_trl(heads=True)
