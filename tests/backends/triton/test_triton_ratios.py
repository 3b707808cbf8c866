"""The kernels of sequence ratios against autograd of PyTorch's formulas (in Triton's
interpreter).
"""

import itertools
import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.rows.resolve import resolve_rows
from reweight_ops.testing import make_batch
from reweight_ops.triton_kernels import row_config

pytest.importorskip("triton")
TRITON = select.unsupported_reason(
    "triton", select.Request("token_stats", torch.device("cpu"), torch.float32)
)
pytestmark = pytest.mark.skipif(TRITON is not None, reason=str(TRITON))

#: Three ways to cut twelve rows into sequences, and rows without. The packed ones have
#: an empty sequence and rows of none.
N, S = 12, 3
PLACES = {
    "equal": ((3, 4), {}),
    "offsets": ((1, N), {"cu_seqlens": torch.tensor([0, 6, 6, 10])}),
    "ids": ((1, N), {"sequence_ids": torch.tensor([[2, 0, 0, 2, 0, 0, 2, 2, 0, 2, -1, 5]]), "num_sequences": S}),
    "no sequences": ((N,), {}),
}  # fmt: skip
WITH_SEQUENCES = ("equal", "offsets", "ids")
#: Drifts on both sides of their bounds of 0.25 and 0.5, exactly at them, and not
#: finite. Numbers of few bits make the ties exact.
DRIFTS = torch.tensor([0.75, 0.5, 0.25, -0.25, -0.5, 0.125, 0.5, -0.25, 0.75, -0.75, 0.25, 0.125])


def rows_of(place, mask=None):
    shape, where = PLACES[place]
    mask = torch.ones(N) if mask is None else mask
    if "sequence_ids" in where:
        mask = mask * (torch.arange(N) < 10)
    tensors = {"completion_mask": mask.view(shape), **where}
    return resolve_rows("op", shape, torch.device("cpu"), torch.float32, tensors, primitives=select.load("triton").rows)  # fmt: skip


def by_kernels(rows, ratio, logp, old, adv, d_ratio):
    params = torch.tensor(ratio.bounds())
    averaged = ratio.averaged(logp, old, adv, params)
    found, means = rows.primitives.ratio(rows.masked, averaged)
    d_logp = torch.full((N,), 3.0)
    rows.primitives.adjoint(rows.masked, averaged, means, d_ratio, d_logp)
    assert (d_logp[~rows.keep] == 3).all(), "an ignored row is not written"
    return torch.where(rows.keep, found, 0), torch.where(rows.keep, d_logp - 3, 0)


def by_autograd(rows, ratio, logp, old, adv, d_ratio):
    logp = logp.clone().requires_grad_()
    found = ratio.log_ratio(rows, logp, logp.detach() if old is None else old, adv)
    (grad,) = torch.autograd.grad(found, logp, d_ratio)
    return torch.where(rows.keep, found.detach(), 0), grad


OPTIONS = {
    "as published": {},
    "a sum": {"normalize": False},
    "tokens' own gradient": {"gradient": "token"},
    "a tight clamp": {"clamp": 0.0625},
    "unclamped, unclipped above": {"clamp": float("inf"), "epsilon_high": float("inf")},
    "a NaN below": {"epsilon_low": torch.tensor(float("nan"))},
    "tensors": {"epsilon_low": torch.tensor(0.25), "epsilon_high": torch.tensor(0.5).double()},
}


@pytest.mark.parametrize("sign", ["one sign", "a token's own"])
@pytest.mark.parametrize("place", WITH_SEQUENCES)
@pytest.mark.parametrize("name", OPTIONS)
def test_clipped_means(name, place, sign):
    ratio = rw.GeometricMeanRatio(**{"epsilon_low": 0.25, "epsilon_high": 0.5, **OPTIONS[name]})
    old = -torch.arange(N) / 8
    d_ratio = torch.arange(1.0, N + 1)
    for a, ignored in itertools.product((1.0, -1.0, 0.0, float("nan")), (False, True)):
        adv = torch.full((N,), a) if sign == "one sign" else torch.where(DRIFTS * a > 0.3, a, -a)
        mask = torch.ones(N)
        mask[1::3] = not ignored
        rows = rows_of(place, mask)
        # on-policy, the drifts are 0
        logp, before = (old, None) if a == 0 and ignored else (old + DRIFTS, old)
        upstream = torch.where(rows.keep, d_ratio, 0)
        got = by_kernels(rows, ratio, logp, before, adv, upstream)
        want = by_autograd(rows, ratio, logp, before, adv, upstream)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_tie_has_half_of_the_gradient():
    """As torch.minimum and torch.maximum have it."""
    ratio = rw.GeometricMeanRatio(epsilon_low=0.25, epsilon_high=0.5, normalize=False)
    rows, ones = rows_of("offsets"), torch.ones(N)
    upstream = rows.keep.float()
    _, up = by_kernels(rows, ratio, DRIFTS, torch.zeros(N), ones, upstream)
    assert up.tolist() == [0, 3, 6, 6, 6, 6, 2, 4, 0, 4, 0, 0]
    _, down = by_kernels(rows, ratio, DRIFTS, torch.zeros(N), -ones, upstream)
    assert down.tolist() == [6, 6, 6, 3, 0, 6, 4, 2, 4, 0, 0, 0]


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_drifts_that_are_not_finite(bad):
    ratio = rw.GeometricMeanRatio(epsilon_low=0.25, epsilon_high=0.5)
    rows, d_ratio = rows_of("equal"), torch.ones(N)
    logp = torch.where(torch.arange(N) == 5, bad, DRIFTS)
    for adv in (torch.ones(N), -torch.ones(N)):
        got = by_kernels(rows, ratio, logp, torch.zeros(N), adv, d_ratio)
        want = by_autograd(rows, ratio, logp, torch.zeros(N), adv, d_ratio)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_an_infinite_upstream():
    """A clipped row still has no gradient."""
    ratio = rw.GeometricMeanRatio(epsilon_low=0.25, epsilon_high=0.5)
    rows, d_ratio = rows_of("equal"), torch.full((N,), float("inf"))
    got = by_kernels(rows, ratio, DRIFTS, torch.zeros(N), torch.ones(N), d_ratio)
    want = by_autograd(rows, ratio, DRIFTS, torch.zeros(N), torch.ones(N), d_ratio)
    assert torch.equal(got[1], want[1]) and got[1].unique().tolist() == [0, float("inf")]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_mean_at_its_bound(sign):
    """It has the gradient of a mean between the bounds, as torch.clamp has it."""
    ratio, rows, d_ratio = rw.SequenceRatio(clamp=0.25), rows_of("equal"), torch.arange(1.0, N + 1)
    logp = torch.arange(N) // 4 * 0.125 * sign  # means of 0, an eighth and the bound
    got = by_kernels(rows, ratio, logp, torch.zeros(N), None, d_ratio)
    want = by_autograd(rows, ratio, logp, torch.zeros(N), None, d_ratio)
    assert got[0][-1] == 0.25 * sign and got[1][-1] == 10.5
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_a_sequence_of_ignored_rows():
    """Its mean is 0."""
    ratio, rows = rw.SequenceRatio(), rows_of("equal", (torch.arange(N) >= 4).float())
    averaged = ratio.averaged(DRIFTS, torch.zeros(N), None, torch.tensor(ratio.bounds()))
    found, means = rows.primitives.ratio(rows.masked, averaged)
    assert means[0] == 0 and (found[:4] == 0).all()
    assert means[1] != 0 != means[2]


@pytest.mark.parametrize("against", ["old", "ref"])
def test_gmpo(against):
    """The public call: its loss, gradient, second derivatives and metrics."""
    ratio = rw.GeometricMeanRatio(epsilon_low=0.1, epsilon_high=0.2, against=against)
    spec = rw.methods.gmpo(beta=0.05).replace(ratio=ratio)
    batch, found = make_batch(spec, (3, 5), 13), []
    batch["completion_mask"] = batch["completion_mask"].clone()
    batch["completion_mask"][-1] = 0
    for backend in ("triton", "reference"):
        z = batch["logits"].detach().clone().requires_grad_()
        data = {**batch, "logits": z}
        out = rw.policy_loss(**data, spec=spec, backend=backend, unused="ignore")
        (grad,) = torch.autograd.grad(out.loss, z, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), z)
        found.append((out.loss, grad, second, out.metrics.sums, out.ratio))
        averaged = out._call.averaged(out.per_token_logps, out._call.params)
        assert (averaged is not None) == (backend == "triton")
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-4, atol=1e-6, equal_nan=True)


#: Clamps of the sum up to each token. DRIFTS are exact sums of few bits, and reach 1.5
#: and 0.75 exactly.
CLAMPS = {
    "wide": 20.0,
    "at sums": (0.75, 1.5),
    "below only": (-math.inf, 1.25),
    "none": math.inf,
    "tensors": (torch.tensor(0.5), torch.tensor(1.375).double()),
}


@pytest.mark.parametrize("place", WITH_SEQUENCES)
@pytest.mark.parametrize("clamp", CLAMPS)
def test_sums_up_to_each_token(monkeypatch, clamp, place):
    """In blocks of four rows, on-policy too, and with log-probs that are not finite."""
    monkeypatch.setattr(row_config, "_current", row_config.RowConfig(scanned=4))
    ratio = rw.CumulativeRatio(clamp=CLAMPS[clamp])
    old, upstream = -torch.arange(N) / 8, torch.arange(1.0, N + 1)
    for masked, bad in itertools.product((False, True), (None, -math.inf, math.nan)):
        mask = torch.ones(N)
        mask[1::3] = not masked
        rows = rows_of(place, mask)
        logp = old + DRIFTS
        logp[[4, 6]] = logp[[4, 6]] if bad is None else bad
        for before in (old, None):
            d_ratio = torch.where(rows.keep, upstream, 0)
            got = by_kernels(rows, ratio, logp, before, None, d_ratio)
            want = by_autograd(rows, ratio, logp, before, None, d_ratio)
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    averaged = ratio.averaged(logp, old, None, torch.tensor(ratio.bounds()))
    torch.use_deterministic_algorithms(True)  # what nothing has written is NaN
    found, sums = rows.primitives.ratio(rows.masked, averaged)
    torch.use_deterministic_algorithms(False)
    low, high = ratio.bounds()
    assert not sums[~rows.keep].any()
    assert found[~rows.keep].eq(torch.zeros(()).clamp(float(low), float(high))).all()


def test_the_gradient_of_sums_at_their_bounds():
    """It is that of torch.clamp, which has one at its bounds."""
    rows, ratio = rows_of("equal"), rw.CumulativeRatio(clamp=(0.75, 1.5))
    found, by = by_kernels(rows, ratio, DRIFTS, torch.zeros(N), None, torch.ones(N))
    assert found.tolist() == [0.75, 1.25, 1.5, 1.25, *[0.75] * 4, 0.75, 0.75, 0.75, 0.75]
    assert by.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("against", ["old", "ref"])
@pytest.mark.parametrize("kind", [rw.CumulativeRatio, rw.CenteredRatio])
def test_a_clip_of_sums(kind, against):
    """The public call: its loss, gradient, second derivatives and metrics."""
    ratio = kind(clamp=0.5, against=against)
    spec = rw.methods.grpo(beta=0.05).replace(ratio=ratio)
    batch, found = make_batch(spec, (3, 5), 13), []
    batch["completion_mask"] = batch["completion_mask"].clone()
    batch["completion_mask"][-1] = 0
    for backend in ("triton", "reference"):
        z = batch["logits"].detach().clone().requires_grad_()
        out = rw.policy_loss(**{**batch, "logits": z}, spec=spec, backend=backend, unused="ignore")
        (grad,) = torch.autograd.grad(out.loss, z, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), z)
        found.append((out.loss, grad, second, out.metrics.sums, out.ratio))
        averaged = out._call.averaged(out.per_token_logps, out._call.params)
        assert (averaged is not None) == (backend == "triton")
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-4, atol=1e-6, equal_nan=True)


SCALES = {
    "one": {},
    "a scale": {"scale": 2.5},
    "tensors": {"scale": torch.tensor(0.5), "clamp": (torch.tensor(-0.5), torch.tensor(0.25))},
    "a deviation": {"scale": "std"},
    "a deviation, clamped": {"scale": "std", "clamp": 0.5},
    "unclamped": {"scale": "std", "clamp": math.inf},
    "a scale, unclamped": {"scale": 2.5, "clamp": math.inf},
}


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SCALES)
def test_centred_drifts(monkeypatch, name, place, offset):
    """In blocks of two rows, of which some are ignored, and far from 0, where squares
    about 0 would cancel.
    """
    monkeypatch.setattr(row_config, "_current", row_config.RowConfig(part=2))
    ratio = rw.CenteredRatio(**SCALES[name])
    mask, old, upstream = torch.ones(N), -torch.arange(N) / 8, torch.arange(1.0, N + 1)
    mask[[1, *range(4, 8)]] = 0
    rows = rows_of(place, mask)
    d_ratio = torch.where(rows.keep, upstream, 0)
    for values in (old + DRIFTS, old):
        got = by_kernels(rows, ratio, values + offset, old, None, d_ratio)
        want = by_autograd(rows, ratio, values + offset, old, None, d_ratio)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=3e-6, atol=3e-6, equal_nan=True)
    torch.use_deterministic_algorithms(True)  # what nothing has written is NaN
    on_policy = by_kernels(rows, ratio, old, None, None, d_ratio)[0]
    torch.use_deterministic_algorithms(False)
    assert not on_policy.any()
    nothing = rows_of(place, torch.zeros(N))
    averaged = ratio.averaged(old, old, None, torch.tensor(ratio.bounds()))
    assert not nothing.primitives.ratio(nothing.masked, averaged)[0].any()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", SCALES)
def test_centred_drifts_that_are_not_finite(name, bad):
    """An ignored one does not matter. With a kept one there is no mean."""
    ratio, old = rw.CenteredRatio(**SCALES[name]), -torch.arange(N) / 8
    mask = torch.ones(N)
    mask[0] = 0
    rows, upstream = rows_of("equal", mask), torch.arange(1.0, N + 1)
    d_ratio = torch.where(rows.keep, upstream, 0)
    for row in (0, 5):
        logp = old + DRIFTS
        logp[row] = bad
        got = by_kernels(rows, ratio, logp, old, None, d_ratio)
        want = by_autograd(rows, ratio, logp, old, None, d_ratio)
        assert got[0].isfinite().all() == (row == 0 or want[0].isfinite().all())
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=3e-6, atol=3e-6, equal_nan=True)


def test_the_gradient_of_centred_drifts_at_their_bounds():
    """It is that of torch.clamp, which has one at its bounds."""
    rows, ratio = rows_of("equal"), rw.CenteredRatio(clamp=(-0.5, 0.25))
    drifts = torch.tensor([0.25, -0.25, 0.5, -0.5, 0.75, -0.75, 0.375, -0.375] * 2)[:-4]
    found, by = by_kernels(rows, ratio, drifts, torch.zeros(N), None, torch.ones(N))
    assert found.tolist() == [
        0.25,
        -0.25,
        0.25,
        -0.5,
        0.25,
        -0.5,
        0.25,
        -0.375,
        0.25,
        -0.25,
        0.25,
        -0.5,
    ]
    assert by.tolist() == [1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("ratio", [rw.SequenceRatio(), rw.CumulativeRatio()])
def test_rows_without_sequences_are_refused(ratio, backend):
    """A reduction that needs none does not hide it."""
    spec = rw.methods.dapo().replace(ratio=ratio)
    with pytest.raises(rw.InvalidCall, match="Ratio needs sequences"):
        rw.policy_loss(
            torch.zeros(6, 5, requires_grad=True),
            torch.zeros(6, dtype=torch.long),
            1.0,
            spec=spec,
            backend=backend,
        )


def test_other_ratios_are_pytorchs():
    class Own(rw.SequenceRatio):
        """A ratio of a user, who changes what is averaged."""

    class Along(rw.CumulativeRatio):
        """The same of a sum."""

    class Centred(rw.CenteredRatio):
        """The same of a mean."""

    for ratio in (
        Own(),
        Along(),
        Centred(),
        rw.CenteredRatio(scale=torch.tensor(2.0, requires_grad=True)),
        rw.SegmentRatio(),
        rw.GeometricMeanRatio(epsilon_low=torch.rand(N)),
        rw.GeometricMeanRatio(epsilon_low=torch.tensor(0.25, requires_grad=True)),
    ):
        adv = torch.ones(N)
        assert ratio.averaged(DRIFTS, None, adv, torch.tensor(ratio.bounds())) is None
