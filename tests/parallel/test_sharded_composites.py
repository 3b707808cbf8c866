"""Losses of reweight_ops.divergences over a vocabulary in shards equal one process."""

import math

import pytest
import torch
from split_calls import differences
from test_vocabulary import normal

import reweight_ops as rw
from reweight_ops import divergences
from reweight_ops._core.engine import chunked_rows

N, V = 6, 37


def of_two(op, *ids, **fixed):
    return lambda t, **options: [
        op(t["logits"], t["other"].detach(), *(t[name] for name in ids), **fixed, **options)
    ]


def of_one(op, *ids, **fixed):
    return lambda t, **options: [op(t["logits"], *(t[name] for name in ids), **fixed, **options)]


def ldr(t, **options):
    return [
        divergences.ldr(
            t["logits"], t["ids"], lambda_=0.7, margin=0.3, **{"vocab_size": V, **options}
        )
    ]


def composites(ranks, padding):
    g = torch.Generator().manual_seed(5)
    at, (group, _) = ranks.axes(4, 1)
    other = normal(g, N, V, scale=2.0).detach()
    other[:2] *= 20  # two rows of which the teacher is sure
    tensors = dict(
        logits=normal(g, N, V, scale=2.0), other=other, ids=torch.randint(V, (N,), generator=g)
    )
    calls = {
        "symmetric_cross_entropy": of_two(divergences.symmetric_cross_entropy),
        "confidence_masked_kl": of_two(
            divergences.confidence_masked_kl, threshold=0.8, sharpening_temperature=0.5
        ),
        "kd": of_two(divergences.kd, "ids", kd_temperature=2.0),
        "superhf": of_two(divergences.superhf, "ids"),
        "ldr": ldr,
        "pld": of_two(divergences.pld, "ids", teacher_temperature=0.5),
        "dhkd": of_two(divergences.dhkd, temperature=1.5, completion_mask=torch.arange(N) != 2),
        "stablemax": of_one(divergences.stablemax, "ids", softcap=3.0),
    }
    of_vocabulary, split = {"logits": -1, "other": -1}, (group, at[0], 4, padding)
    return [
        f"{name}: {e}"
        for name, call in calls.items()
        for e in differences(call, tensors, of_vocabulary, split)
    ]


@pytest.mark.parametrize("padding", [0, 30])
def test_those_made_of_fused_statistics_are_one_process(four, padding):
    four.check(composites, padding)


def odd(ranks, dtype):
    """Values and gradients are one process's of rows with -inf, of a row with a NaN and
    of one without a gradient. One shard has no columns, and each row is a chunk.
    """
    usual, chunked_rows.CHUNK_ELEMENTS = chunked_rows.CHUNK_ELEMENTS, 1
    try:
        return _odd(ranks, dtype)
    finally:  # the processes serve other tests too
        chunked_rows.CHUNK_ELEMENTS = usual


def _odd(ranks, dtype):
    group, at = ranks.group(range(4)), ranks.rank
    g = torch.Generator().manual_seed(6)
    z, t = (torch.randn(N, V, generator=g, dtype=dtype) for _ in range(2))
    ids = torch.tensor([3, 30, -100, 36, 0, 20])
    z[0, 5:25] = t[0, 5:30] = -math.inf
    z[4, 36] = math.nan
    own = [slice(0, 4), slice(4, 4), slice(4, 30), slice(30, V)][at]
    wrong = []
    for name, call in {
        "pld": lambda z, t, **over: divergences.pld(z, t, ids, **over),
        "dhkd": lambda z, t, **over: divergences.dhkd(z, t, completion_mask=ids != -100, **over),
        "stablemax": lambda z, t, **over: divergences.stablemax(z, ids, **over),
    }.items():
        whole, part = z.clone().requires_grad_(), z[:, own].clone().requires_grad_()
        want = call(whole, t)
        found = call(part, t[:, own].contiguous(), process_group=group)
        weights = torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=dtype)
        weights[3] = 0
        for loss in (want, found):
            loss.backward(weights)
        exact = dict(rtol=1e-5 if dtype == torch.float32 else 1e-12, equal_nan=True)
        for what, x, y in (("value", found, want), ("gradient", part.grad, whole.grad[:, own])):
            if not torch.allclose(x, y, atol=1e-6 if dtype == torch.float32 else 1e-12, **exact):
                wrong.append(f"{name}: {what} {x} of {y}")
    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formulas_of_odd_rows_are_one_process(four, dtype):
    four.check(odd, dtype)


def refused(ranks):
    over = dict(process_group=ranks.group(range(4)))
    z, ids = torch.randn(2, 5, requires_grad=True), torch.tensor([0, 1])
    with pytest.raises(rw.InvalidCall, match=r"ldr: process_group.*pass V"):
        divergences.ldr(z, ids, **over)
    for call in (
        lambda: divergences.pld(z, z.detach(), ids, **over).sum(),
        lambda: divergences.stablemax(z, ids, **over).sum(),
    ):
        with pytest.raises(rw.UnsupportedRequest, match=r"create_graph=True needs the whole"):
            torch.autograd.grad(call(), z, create_graph=True)
    with pytest.raises(rw.UnsupportedRequest, match=r"process_group: torch.func's transforms"):
        torch.func.grad(lambda z: divergences.stablemax(z, ids, **over).sum())(z.detach())
    return []


def test_what_needs_the_whole_vocabulary_is_refused(four):
    four.check(refused)
