"""Row kernels on more sequences, and on longer ones, than a program takes at a time (in
Triton's interpreter).
"""

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.rows.primitives import Masked, Runs, Weighing

pytest.importorskip("triton")
TRITON = select.unsupported_reason(
    "triton", select.Request("token_stats", torch.device("cpu"), torch.float32)
)
pytestmark = pytest.mark.skipif(TRITON is not None, reason=str(TRITON))

#: A block of sequences or of packed rows is 1024, one of metrics 256, and one of a run
#: at most 4096.
MANY = 1030


def masked(runs, mask=None, denominator=None):
    return select.load("triton").rows.mask(None, mask, denominator, runs, torch.device("cpu"))


def test_a_long_run():
    n = 4100
    mask, counted = torch.ones(2, n, dtype=torch.bool), torch.ones(2, n, dtype=torch.bool)
    mask[0, 5], counted[1, [7, 4098]] = False, False
    found = masked(Runs(2 * n, 2, n), mask, counted)
    assert found.lengths.tolist() == [[n - 1, n], [n, n - 2]]
    assert torch.equal(found.keep, mask.view(-1)) and torch.equal(found.counted, counted.view(-1))


def test_divisors_of_many_sequences():
    """The rows and the sequences of all blocks count."""
    mask = torch.arange(MANY) % 5 != 0
    found = Masked(None, mask, mask, mask.int().expand(2, -1).contiguous(), Runs(MANY, MANY, 1))
    weigh = select.load("triton").rows.weigh
    for divisor in ("rows", "sequences"):
        w = weigh(found, (Weighing(divisor),), 1.0, None)
        torch.testing.assert_close(w[0], mask / mask.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [None, 3, MANY - 2])
def test_offsets_of_many_sequences(bad):
    """Those of every block are checked."""
    offsets = torch.arange(MANY + 1)
    if bad is not None:
        offsets[bad] += 2
    found = masked(Runs(MANY, MANY, offsets=offsets))
    assert bool(found.trust.isnan()) == (bad is not None)
    if bad is None:
        assert torch.equal(found.runs.owner, torch.arange(MANY))
        assert (found.lengths == 1).all()


@pytest.mark.parametrize("bad", [None, 3, MANY - 2])
def test_owners_of_many_rows(bad):
    owner = torch.arange(MANY) % 2
    if bad is not None:
        owner[bad] = 2
    found = masked(Runs(MANY, 2, owner=owner), denominator=torch.arange(MANY) % 4 < 2)
    assert bool(found.trust.isnan()) == (bad is not None)
    if bad is None:
        assert torch.equal(found.runs.owner, owner)
        counted = (MANY // 2 + 1) // 2
        assert found.lengths.tolist() == [[MANY // 2] * 2, [counted] * 2]


def test_metrics_of_many_sequences(monkeypatch):
    n, g = 260, torch.Generator().manual_seed(0)
    logps, old = -torch.rand(2, n, 2, generator=g) - 0.5
    adv, mask = torch.randn(n, generator=g), torch.rand(n, 2, generator=g) < 0.8
    found = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("REWEIGHT_OPS_BACKEND", backend)
        out = rw.policy_loss_from_logps(
            logps, adv, spec="dapo", old_per_token_logps=old, completion_mask=mask
        )
        assert (out._call.rows.primitives is not None) == (backend == "triton")
        found.append(out.metrics.as_floats())
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
