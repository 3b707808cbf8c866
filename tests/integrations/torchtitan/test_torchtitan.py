"""torchtitan's RL loss by one call of the op, against a transcription of its
``DAPOLoss``. CPU.

``BaseLoss`` and ``DAPOLoss`` are transcribed from pytorch/torchtitan at b5bcd76c:
``torchtitan/components/loss.py``, ``config/configurable.py`` and
``experiments/rl/losses/dapo.py``.
"""

import dataclasses
import importlib
import sys
import types
from abc import ABC, abstractmethod
from typing import ClassVar

import pytest
import torch
from paths import ROOT
from torch.nn import functional as F

import reweight_ops as rw


class Configurable:
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar = None

        def build(self, **runtime):
            return self._owner(config=dataclasses.replace(self), **runtime)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        config = cls.__dict__.get("Config")
        # torchtitan checks that it is a keyword-only dataclass with slots
        if config is not None:
            assert dataclasses.is_dataclass(config) and "__slots__" in config.__dict__
            assert all(f.kw_only for f in dataclasses.fields(config))
            config._owner = cls


class BaseLoss(ABC, Configurable):
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass

    @abstractmethod
    def __init__(self, config, *, compile_config=None): ...


def dapo_loss(
    logits, labels, valid=None, *, generator_logprobs, advantages, loss_mask, low=0.2, high=0.28
):
    logits = logits.float()
    logps = -F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    with torch.no_grad():
        entropy = torch.logsumexp(logits, -1) - (torch.softmax(logits, -1) * logits).sum(-1)
    mask = loss_mask & torch.isfinite(generator_logprobs)
    raw = torch.where(mask, logps - generator_logprobs, torch.zeros_like(logps))
    ratio = torch.exp(torch.clamp(raw, -10.0, 10.0))
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    total = max(valid, 1) if valid is not None else 1
    loss = (-torch.min(ratio * advantages, clipped * advantages) * mask).sum() / total
    drift = raw.detach()
    return loss, {
        "loss/mean": loss.detach(),
        "loss/ratio_mean": (ratio.detach() * mask).sum() / total,
        "bit_wise/logprob_diff/mean": drift.sum() / total,
        "bit_wise/ratio_tokens_different/mean": ((drift.abs() > 1e-6) * mask).sum() / total,
        "bit_wise/logprob_diff/max": drift.abs().max(),
        "trainer/entropy/mean": (entropy * mask).sum() / total,
    }


@pytest.fixture(scope="module")
def titan():
    with pytest.MonkeyPatch.context() as patch:
        loss = types.ModuleType("torchtitan.components.loss")
        loss.BaseLoss = BaseLoss
        spmd = types.ModuleType("torchtitan.distributed.spmd_types")
        spmd.spmd_mesh_size = lambda axis: 1
        for name, module in (
            ("torchtitan", types.ModuleType("torchtitan")),
            ("torchtitan.components", types.ModuleType("c")),
            (loss.__name__, loss),
            ("torchtitan.distributed", types.ModuleType("d")),
            (spmd.__name__, spmd),
        ):
            patch.setitem(sys.modules, name, module)
        from reweight_ops.integrations import torchtitan
    return torchtitan


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 33, generator=g).requires_grad_()
    labels = torch.randint(33, (40,), generator=g)
    with torch.no_grad():
        old = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0] + 0.4 * torch.randn(
            40, generator=g
        )
    old[3] = float("nan")
    old[7] = -float("inf")
    labels[-4:] = -100
    mask = (torch.rand(40, generator=g) > 0.3) & (labels != -100)
    mask[3] = mask[7] = True
    return (logits, labels), {
        "generator_logprobs": old,
        "advantages": torch.randn(40, generator=g),
        "loss_mask": mask,
    }


def run(loss, inputs, *valid):
    positional, named = inputs
    value, metrics = loss(*positional, *valid, **named)
    return (
        value.detach(),
        torch.autograd.grad(value, positional[0])[0],
        {k: float(v) for k, v in metrics.items()},
    )


@pytest.mark.parametrize(
    "valid", [None, 57.0, torch.tensor(57.0)], ids=["alone", "number", "tensor"]
)
def test_dapo(titan, inputs, valid):
    theirs = run(dapo_loss, inputs, valid)
    ours = run(
        titan.PolicyLoss.Config(method="dapo", options={"epsilon_high": 0.28}).build(),
        inputs,
        valid,
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    assert theirs[1].norm() > 1e-3 and (ours[1] - theirs[1]).norm() <= 1e-6 * theirs[1].norm()
    for name, value in theirs[2].items():
        assert ours[2][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert ours[2]["loss/ratio_clipped_frac"] > 0


def test_chunks_add_up(titan, inputs):
    """``ChunkedLossWrapper`` calls the loss per chunk of tokens and adds."""
    (logits, labels), named = inputs
    loss = titan.PolicyLoss.Config(method="advantage_reweighting", options={"alpha": 0.3}).build(
        compile_config=None
    )
    whole = run(loss, inputs, 30.0)
    chunks = zip(*(t.split(16) for t in (labels, *named.values())), logits.split(16), strict=True)
    total = sum(
        loss(z, y, 30.0, **dict(zip(named, rest, strict=True)))[0] for y, *rest, z in chunks
    )
    torch.testing.assert_close(total.detach(), whole[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        torch.autograd.grad(total, logits)[0], whole[1], rtol=1e-5, atol=1e-8
    )


def test_one_pass(titan):
    """With its entropy metric the loss still takes one read of the logits."""
    spec = titan.PolicyLoss.Config().build().spec
    assert spec.one_pass_unsupported_reason is None and "entropy" in spec.requires


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gspo", {}, "it couples tokens"),
        ("grpo", {}, "its reduction is not a token mean"),
        ("grpo", {"beta": 0.1}, "it reads ref_logp"),
        ("sft", {}, "it does not read advantages"),
        ("top_entropy", {}, "it couples tokens"),
    ],
)
def test_refusals(titan, name, options, message):
    with pytest.raises(rw.UnsupportedRequest, match=f"torchtitan cannot train {name}: {message}"):
        titan.PolicyLoss.Config(method=name, options=options).build()


def test_vocabulary_shards_are_refused(titan, inputs, monkeypatch):
    """torchtitan's default backend hands over plain tensors, which do not say that they
    are a part.
    """
    monkeypatch.setattr(titan, "spmd_mesh_size", lambda axis: 2)
    with pytest.raises(
        rw.UnsupportedRequest, match="tensor parallelism of 2: the logits are a rank's part"
    ):
        run(titan.PolicyLoss.Config().build(), inputs)


def test_the_example(titan, inputs, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("torchtitan_loss")

    @dataclasses.dataclass(kw_only=True, slots=True)
    class ChunkedConfig:
        num_chunks: int
        loss_fn: object

    config = example.with_our_loss(ChunkedConfig(num_chunks=8, loss_fn=None))
    assert config.num_chunks == 8 and run(config.loss_fn.build(), inputs)[1].norm() > 1e-3
