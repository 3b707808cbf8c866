"""Losses in stages: the table of statistics and the programs that read it, against the
formulas as PyTorch evaluates them.
"""

import dataclasses
import math

import pytest
import torch
from random_formulas import drawn_statistics
from stored_losses import same

import reweight_ops as rw
from reweight_ops._core.calls.specs import METHODS
from reweight_ops._core.calls.staged import Table
from reweight_ops._core.formula.base import WEIGHTS
from reweight_ops._core.formula.interpret import interpret_number
from reweight_ops._core.formula.program import evaluate_rows
from reweight_ops._core.formula.stages import staged
from reweight_ops._core.formula.trace import trace_weight
from reweight_ops.testing import make_batch

LENGTHS = (5, 0, 8, 3)


def packed(tensors, layout):
    """The same rows, packed without the padding, by offsets or in any order."""
    keep = tensors["completion_mask"].clone()
    keep[0, :2] = True  # a row stays masked
    flat = {
        name: t[keep][None] if t.shape[:2] == keep.shape else t
        for name, t in tensors.items()
        if isinstance(t, torch.Tensor)
    }
    owner = torch.arange(len(keep))[:, None].expand_as(keep)[keep][None]
    if layout == "offsets":
        return {
            **tensors,
            **flat,
            "cu_seqlens": torch.tensor([0, *keep.sum(-1).cumsum(0).tolist()]),
        }
    order = torch.randperm(owner.numel(), generator=torch.Generator().manual_seed(3))
    flat = {k: t[:, order] if t.shape[:2] == owner.shape else t for k, t in flat.items()}
    return {**tensors, **flat, "sequence_ids": owner[:, order], "num_sequences": len(keep)}


def batch_of(spec, layout="padded", dtype=torch.float32):
    batch = make_batch(spec, (len(LENGTHS), 8), 11, dtype=dtype)
    batch["completion_mask"] = torch.arange(8) < torch.tensor(LENGTHS)[:, None]
    batch["completion_mask"][0, 1] = False
    if spec.reads_groups:
        batch |= {"group_ids": torch.tensor([1, 0, 1, 2]), "num_groups": 3}
    return batch if layout == "padded" else packed(batch, layout)


def own_loss(weight):
    """A loss of one weight, which reads whatever the weight reads."""
    return rw.PolicyLossSpec(
        surrogate=rw.methods.reinforce().surrogate, weights=(weight,), name="own_loss"
    )


STAGED = [name for name in METHODS if METHODS[name].build().staged is not None]


def test_methods_are_staged():
    assert {"clip_cov", "fipo", "hapo", "m2po", "opsm", "top_entropy", "vespo"} <= set(STAGED)
    assert rw.methods.grpo().staged is None and rw.methods.gspo().staged is None


@pytest.mark.parametrize("layout", ["padded", "offsets", "ids"])
@pytest.mark.parametrize("name", STAGED)
def test_methods(name, layout):
    pytest.importorskip("reweight_ops._C", exc_type=ImportError)
    spec = METHODS[name].build()
    same(spec, batch_of(spec, layout))


READ_BATCH = [name for name, cls in WEIGHTS.items() if trace_weight(cls).uses_batch]


def evaluated(weight, batch):
    """A weight from its stages, and as PyTorch evaluates it, in fp64."""
    out = rw.policy_loss(**batch, spec=own_loss(weight), backend="reference", unused="ignore")
    call = out._call
    statistics = {"logp": out.per_token_logps.reshape(-1), "entropy": out.entropies.reshape(-1)}
    statistics["log_sum_p_sq"] = -0.7 * statistics["entropy"]  # any row does
    leaves = call.leaves(statistics)
    want = call._evaluate_weight(weight, statistics)
    leaves = {name: t.masked_fill(~call.rows.keep, math.nan) for name, t in leaves.items()}
    del leaves["log_ratio"]
    stages = staged([weight], (), given_ratio=False)
    table = Table(call.rows, stages, [weight], leaves, (-20.0, 20.0), evaluate_rows)
    params, filled = table.params((1.0, *stages.values[1:])), table.fill()
    (got,) = evaluate_rows(stages.program, params, leaves, filled, ("d_w0",))
    keep = call.rows.keep
    return got[keep], want.expand_as(got)[keep]


@pytest.mark.parametrize("layout", ["padded", "offsets", "ids"])
@pytest.mark.parametrize("name", READ_BATCH)
def test_every_weight_that_reads_the_batch(name, layout):
    weight = example(WEIGHTS[name])
    got, want = evaluated(weight, batch_of(own_loss(weight), layout, torch.float64))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert want.numel() > 10


def example(cls):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = {
        name: 0.3
        for name in cls.parameter_names()
        if fields[name].default is dataclasses.MISSING
        and fields[name].default_factory is dataclasses.MISSING
    }
    return cls(**given)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("layout", ["padded", "offsets", "ids"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_drawn_weights(seed, depth, layout):
    weight = drawn_statistics(100 * depth + seed, depth)()
    got, want = evaluated(weight, batch_of(own_loss(weight), layout, torch.float64))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.usefixtures("registry")
def test_operands_with_names_and_computed_numbers():
    @rw.weight
    class Named(rw.TokenWeight):
        share: float = 0.4

        def weight(self, xp, t, batch):
            decayed = batch.seq_cumsum(t.adv, decay=xp.exp(-xp.maximum(self.share, 0.1)))
            low = batch.quantile(decayed * t.adv, where=t.adv > 0, q=1 - self.share)
            return xp.where(decayed * t.adv < low, batch.top(-t.adv, 0.5, where=t.adv < 0), low)

    weight = Named()
    got, want = evaluated(weight, batch_of(own_loss(weight), "padded", torch.float64))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert len(want.unique()) > 2


@pytest.mark.parametrize(
    "text, values, want",
    [
        ("2 $0 $1 min:0:1", (3.0, 0.5), 0.5),
        ("2 $0 $1 max:0:1", (3.0, 0.5), 3.0),
        ("1 $0 neg:0 exp:1", (0.7,), math.exp(-0.7)),
        ("1 #1.0 $0 sub:0:1 clip:2:0:0", (0.3,), 1.0),
        ("1 #0.5 $0 lt:0:1 where:2:1:0", (0.7,), 0.7),
    ],
)
def test_a_formula_of_numbers(text, values, want):
    assert interpret_number(text, values, torch.float64) == pytest.approx(want, rel=1e-15)
    tensors = [torch.tensor(v, dtype=torch.float64) for v in values]
    assert interpret_number(text, tensors, torch.float64).item() == pytest.approx(want, rel=1e-15)
