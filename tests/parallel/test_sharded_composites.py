"""Losses of reweight_ops.divergences over a vocabulary in shards: those made of fused
statistics are one process's, the others are refused.
"""

import pytest
import torch
from split_calls import differences
from test_vocabulary import normal

import reweight_ops as rw
from reweight_ops import divergences

N, V = 6, 37


def of_two(op, *ids, **fixed):
    return lambda t, **options: [
        op(t["logits"], t["other"].detach(), *(t[name] for name in ids), **fixed, **options)
    ]


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


def refused(ranks):
    z, ids, over = (
        torch.randn(2, 5),
        torch.tensor([0, 1]),
        dict(process_group=ranks.group(range(4))),
    )
    calls = {
        "pld": (rw.UnsupportedRequest, lambda: divergences.pld(z, z, ids, **over)),
        "dhkd": (rw.UnsupportedRequest, lambda: divergences.dhkd(z, z, **over)),
        "stablemax": (rw.UnsupportedRequest, lambda: divergences.stablemax(z, ids, **over)),
        "ldr": (rw.InvalidCall, lambda: divergences.ldr(z, ids, **over)),
    }
    for name, (error, call) in calls.items():
        with pytest.raises(error, match=rf"{name}: process_group.*(whole rows|pass V)"):
            call()
    return []


def test_formulas_of_whole_rows_are_refused(four):
    four.check(refused)
