"""Statistics, divergences and pair losses that can be drawn, by the package's
criterion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from criterion import assert_gradient, assert_values
from drawn_calls import BACKENDS, DTYPES, ROWS, fuzz, lengths, logits_of, mask_of
from hypothesis import reject
from hypothesis import strategies as st
from kernel_oracle import STATS, gradient, statistics

import reweight_ops as rw
from reweight_ops._core.catalogue.registry import CATALOGUE
from reweight_ops.testing.pairs import compare_divergence, compare_pairs, make_pairs

COMPILED = [b for b in BACKENDS if b != "triton"]
SHAPES = [(4, 3), (3, 9), (2, 33), (30, 1)]
PAIRS = {name: entry.build() for name, entry in sorted(CATALOGUE["pair_loss"].items())}
MASKS = ["none", "random", "ragged", "numbers", "empty"]


@dataclass(frozen=True)
class RowsCall:
    """Logits of some kinds, on a backend. ``what``: the kind of a divergence."""

    seed: int
    backend: str
    dtype: str
    shape: tuple[int, int]
    vocab: int
    kinds: tuple[str, ...]
    mask: str
    temperature: float
    softcap: float
    what: str

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def rows(self, g: torch.Generator, ids: torch.Tensor) -> torch.Tensor:
        which = torch.randint(0, len(self.kinds), self.shape, generator=g)
        parts = [
            logits_of(kind, self.shape, self.vocab, DTYPES[self.dtype], ids, g)
            for kind in self.kinds
        ]
        return torch.stack(parts).gather(
            0, which[None, ..., None].expand(1, *self.shape, self.vocab)
        )[0]


def rows_calls(backends: list[str], kinds: tuple[str, ...] = ROWS) -> st.SearchStrategy:
    return st.builds(
        RowsCall,
        st.integers(0, 2**16),
        st.sampled_from(backends),
        st.sampled_from(list(DTYPES)),
        st.sampled_from(SHAPES if "triton" not in backends else SHAPES[:1]),
        st.sampled_from([17, 5, 64, 129, 1000] if "triton" not in backends else [17, 33]),
        st.lists(st.sampled_from(kinds), min_size=1, max_size=3, unique=True).map(tuple),
        st.sampled_from(MASKS),
        st.sampled_from([1.0, 0.5, 1.7]),
        st.sampled_from([math.inf, 3.0, 30.0]),
        st.sampled_from(["forward_kl", "reverse_kl", "jeffreys"]),
    )


def statistics_meet_the_criterion(call: RowsCall):
    g = call.generator
    ids = torch.randint(0, call.vocab, call.shape, generator=g)
    z = call.rows(g, ids).requires_grad_()
    mask = (
        torch.ones(call.shape, dtype=torch.bool)
        if call.mask == "none"
        else mask_of(call.mask, call.shape, g)
    )
    names = {
        "logp": "logps",
        "entropy": "entropies",
        "lse": "lse",
        "log_sum_p_sq": "log_sum_p_sq",
        "max_logp": "max_logp",
    }
    found = rw.token_stats(
        z,
        ids,
        completion_mask=mask,
        stats=tuple(names.values()),
        temperature=call.temperature,
        softcap=None if math.isinf(call.softcap) else call.softcap,
        backend=call.backend,
    )
    up = {name: torch.randn(call.shape, generator=g) for name in ("logp", "entropy", "lse")}
    (grad,) = torch.autograd.grad(
        [getattr(found, names[name]) for name in up], z, list(up.values())
    )
    out = mask == 0
    assert not grad[out].any() and not any(
        getattr(found, name)[out].any() for name in names.values()
    )
    keep = ~out
    rows, kept = z.detach()[keep], ids[keep]
    t = torch.full((len(rows),), call.temperature)
    exact, single = (
        statistics(rows.to(dtype), kept, t.to(dtype), call.softcap)
        for dtype in (torch.float64, torch.float32)
    )
    # A softcap is a rounding of its own size, before any difference is taken.
    size = 0 if math.isinf(call.softcap) else call.softcap / call.temperature
    for name in STATS:
        assert_values(
            getattr(found, names[name])[keep].detach(),
            single[name],
            exact[name],
            name,
            1 + exact[name].abs() + size,
        )
    if not len(rows):
        return
    derivatives = {name: x[keep] for name, x in up.items()}
    truth = gradient(rows.double(), kept, t.double(), derivatives, call.softcap)
    base = gradient(rows.float(), kept, t, derivatives, call.softcap)
    slack = (1 + size) * sum(c.abs() for c in derivatives.values()) * 2 / t
    assert_gradient(grad[keep], base.to(z.dtype).double(), truth, slack, kept)


def divergences_meet_the_criterion(call: RowsCall):
    g = call.generator
    ids = torch.randint(0, call.vocab, call.shape, generator=g)
    policy = call.rows(g, ids)
    other = (
        policy.double() + 1.5 * torch.randn(policy.shape, generator=g, dtype=torch.float64)
    ).to(policy.dtype)
    mask = (
        torch.ones(call.shape, dtype=torch.bool)
        if call.mask == "none"
        else mask_of(call.mask, call.shape, g)
    )
    batch = {
        "logits": policy,
        "other_logits": other,
        "completion_ids": ids,
        "completion_mask": mask,
    }
    found = compare_divergence(call.what, batch, backend=call.backend, loss_scale=64.0)
    assert found.passed, found


@pytest.mark.parametrize("examples, repeatable", lengths(30, 4000))
def test_statistics(examples, repeatable):
    fuzz(statistics_meet_the_criterion, rows_calls(COMPILED), examples, repeatable)


@pytest.mark.parametrize("examples, repeatable", lengths(25, 3000))
def test_divergences(examples, repeatable):
    fuzz(
        divergences_meet_the_criterion,
        rows_calls(COMPILED, ("plain", "sure", "tiny", "equal")),
        examples,
        repeatable,
    )


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@pytest.mark.parametrize("examples, repeatable", lengths(1, 150))
def test_triton(examples, repeatable):
    fuzz(statistics_meet_the_criterion, rows_calls(["triton"]), examples, repeatable)


def pairs_meet_the_criterion(drawn: tuple[str, str, str, int, int, int]):
    name, backend, dtype, pairs, length, vocab = drawn
    spec = PAIRS[name]
    try:
        batch = make_pairs(spec, pairs, length, vocab, DTYPES[dtype])
    except rw.InvalidCall:  # a batch that would show little
        reject()
    found = compare_pairs(spec, batch, backend=backend, loss_scale=64.0)
    assert found.passed, found


@pytest.mark.parametrize("examples, repeatable", lengths(15, 1500))
def test_pairs(examples, repeatable):
    drawn = st.tuples(
        st.sampled_from(list(PAIRS)),
        st.sampled_from(COMPILED),
        st.sampled_from(list(DTYPES)),
        st.integers(2, 6),
        st.integers(4, 9),
        st.integers(9, 300),
    )
    fuzz(pairs_meet_the_criterion, drawn, examples, repeatable)
