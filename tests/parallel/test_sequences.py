"""Sequences whose tokens several gloo ranks have: ratios, denominators, contrasts and batch statistics are those of one process."""

import contextlib

from split_calls import Split, errors_of

import reweight_ops as rw
from reweight_ops._core.formula.base import WEIGHTS

SURROGATE = rw.methods.grpo().surrogate

#: A spec for everything that is summed over a sequence or over the call's rows.
SPECS = {
    "token mean": rw.methods.dapo(),
    "sequence mean": rw.methods.grpo(),
    "sequence ratio": rw.methods.gspo(),
    "token gradient": rw.PolicyLossSpec(surrogate=SURROGATE, ratio=rw.SequenceRatio(gradient="token")),
    "geometric mean": rw.methods.gmpo(),
    "batch mean": rw.PolicyLossSpec(surrogate=SURROGATE, ratio=rw.BatchMeanRatio()),
    "centred": rw.PolicyLossSpec(surrogate=SURROGATE, ratio=rw.CenteredRatio(scale="std")),
    "contrast": rw.methods.disco(),
    "entropy": rw.methods.trl(entropy_coef=0.01),
}

#: Weights that read the batch. A draw is among positions in the order of ranks, so it is another one.
READ_BATCH = {
    name: weight
    for name, weight in WEIGHTS.items()
    if weight.__module__.startswith("reweight_ops") and {"batch"} & set(weight.weight.__code__.co_varnames[:4]) and name != "clip_cov"
}


def weighted():
    """A spec for every weight that reads the batch and has defaults."""
    for name, weight in READ_BATCH.items():
        with contextlib.suppress(TypeError):
            yield f"weight {name}", rw.PolicyLossSpec(surrogate=SURROGATE, weights=(weight(),))


SPECS |= dict(weighted())


def policy(ranks, cases):
    wrong = []
    for name, split, options in cases:
        wrong += [f"{name} {split}: {e}" for e in errors_of(SPECS[name], Split(**split).place(ranks), **options)]
    return wrong


LAYOUTS = [dict(sequence=4), dict(sequence=4, layout="zigzag"), dict(sequence=2, vocab=2)]


def test_every_loss_over_two_and_four_ranks(four):
    four.check(policy, [(name, split, {}) for name in SPECS for split in LAYOUTS])
