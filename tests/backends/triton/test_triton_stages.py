"""Losses in stages, coupled reductions and their metrics by Triton's row kernels (in
its interpreter).
"""

import math

import pytest
import torch
from stored_losses import LENGTHS, batch_of, same

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.calls.specs import METHODS

pytest.importorskip("triton")
TRITON = select.unsupported_reason(
    "triton", select.Request("token_stats", torch.device("cpu"), torch.float32)
)
pytestmark = pytest.mark.skipif(TRITON is not None, reason=str(TRITON))

SPECS = {name: METHODS[name].build() for name in METHODS}
NAMES = [
    name
    for name, spec in SPECS.items()
    if spec.staged is not None or spec.is_coupled or spec.ratio.level in ("batch", "prefix")
]


@pytest.mark.parametrize("name", NAMES)
def test_methods(name):
    same(SPECS[name], batch_of(SPECS[name]), backend="triton")


def test_metrics_read_hyper_parameters_of_rows():
    """The bounds of the clip differ from row to row, and so does what it clips."""
    bounds = torch.linspace(0.0, 0.6, len(LENGTHS) * 8).view(len(LENGTHS), 8)
    spec = rw.methods.grpo(beta=0.1).replace(
        **{"surrogate.epsilon_low": bounds, "surrogate.epsilon_high": rw.weights.Entropy()}
    )
    assert spec.monitor is not None and len(spec.monitor.rows) >= 1
    same(spec, batch_of(spec), backend="triton")


@pytest.mark.parametrize(
    "ratio",
    [rw.SequenceRatio(), rw.SequenceRatio(gradient="token"), rw.CumulativeRatio()],
    ids=["sequence", "own token", "prefix"],
)
def test_an_upstream_for_each_row(ratio):
    spec = rw.methods.grpo(beta=0.1).replace(reduction=rw.NoReduction(), ratio=ratio)
    upstream = torch.randn(len(LENGTHS), 8, generator=torch.Generator().manual_seed(1))
    same(spec, batch_of(spec), upstream, backend="triton")


@pytest.mark.parametrize("name", ["logits", "advantages"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(ratio=rw.BatchMeanRatio(negative_only=True)),
        dict(reduction=rw.GroupContrast(group_size=2)),
        dict(reduction=rw.GroupClassification(group_size=2)),
        dict(reduction=rw.HingeConstraint(bound=-3.0)),
    ],
    ids=repr,
)
def test_a_row_of_nan(changes, name):
    """It stands in a prompt of one side, and its advantage is positive."""
    spec = rw.methods.dapo().replace(**changes)
    batch = batch_of(spec)
    batch[name] = batch[name].clone()
    batch[name][4, 1] = math.nan
    same(spec, batch, backend="triton")
