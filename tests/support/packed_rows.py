"""Checks of packed rows. They are those of rows of logits (contract.py) on packed rows,
and the check that rows do not affect each other.
"""

from __future__ import annotations

import math

import contract
import torch
from kernel_oracle import STATS

from reweight_ops._core.backends.base import DERIVATIVES, PackedRows, SoftmaxParams
from reweight_ops._core.formula.loss_program import STATISTICS
from reweight_ops._core.formula.program import evaluate_rows
from reweight_ops._core.rows.groups import IGNORE_INDEX

SENTINEL = 7.0


class AsLogits:
    """``token_stats`` and ``token_grad`` of rows ``[N, V]`` by a backend's
    ``packed_stats`` and ``packed_grad``.

    The rows lie in another order, with gaps.
    """

    def __init__(self, backend):
        self.backend = backend

    def _packed(self, z, ids, temperature, softmax):
        n, v = z.size(0), softmax.vocab_size
        gap = 3
        start = gap + (torch.arange(n) * 7 % n if n % 7 else torch.arange(n)) * (v + gap)
        values = torch.full((gap + n * (v + gap),), math.nan, dtype=z.dtype)
        at = start[:, None] + torch.arange(v)
        values[at] = z[:, :v]
        place = torch.where((ids >= 0) & (ids < v) | (ids == IGNORE_INDEX), ids, -1)
        return PackedRows(
            values, torch.stack([start, start + v]), place, temperature, softmax.softcap
        ), at

    def token_stats(self, z, ids, temperature, softmax, stats):
        return self.backend.packed_stats(self._packed(z, ids, temperature, softmax)[0], stats)

    def token_grad(self, z, ids, temperature, softmax, stats, derivatives, out):
        rows, at = self._packed(z, ids, temperature, softmax)
        packed = torch.full_like(rows.values, SENTINEL)
        self.backend.packed_grad(rows, stats, derivatives, packed)
        read = rows.ids >= 0
        untouched = torch.ones_like(packed, dtype=torch.bool)
        untouched[at[read]] = False
        assert (packed[untouched] == SENTINEL).all(), "written outside of the rows"
        out.zero_()
        out[:, : softmax.vocab_size] = torch.where(read[:, None], packed[at], 0)

    def token_loss_grad(self, z, ids, temperature, softmax, inputs, program, params, out):
        """Compute the statistics, the program on rows, and the gradient, like the
        engine.
        """
        names = ("logp", "entropy", "lse", "lse_low", "log_sum_p_sq")
        stats = dict(zip(names, self.token_stats(z, ids, temperature, softmax, names), strict=True))
        leaves = (
            {"old_logp": stats["logp"]}
            | {name: stats[name] for name in STATISTICS}
            | inputs.stored()
        )
        weighted, loss, *by = evaluate_rows(
            program, params, leaves, inputs.row_weights, keep=ids != IGNORE_INDEX
        )
        self.token_grad(
            z, ids, temperature, softmax, stats, dict(zip(STATISTICS, by, strict=True)), out
        )
        return torch.stack([stats["logp"], stats["entropy"], weighted, loss, *by[:2]])


def check_accuracy(backend, dtype, n, v, softmax, kind):
    contract.check_statistics_and_gradient(AsLogits(backend), dtype, n, v, softmax, kind)


def check_corners(backend, dtype):
    primitives = AsLogits(backend)
    for softcap in (math.inf, 5.0):
        for at in (0, 5):
            contract.check_a_bad_row(primitives, dtype, softcap, at)
        contract.check_minus_infinity(primitives, dtype, softcap)
    contract.check_a_masked_target(primitives)
    contract.check_zero_gradient_rows(primitives, dtype)


def check_sure_rows(backend):
    contract.check_a_sure_row(AsLogits(backend))
    contract.check_the_target_of_a_sure_row(AsLogits(backend))
    contract.check_signs_and_order(AsLogits(backend))


def check_each_row_alone(backend, dtype, longest=1900, many=False):
    """Check rows of many lengths. With ``many`` there are more rows than blocks.

    Each row has the bits of the same row of logits. An ignored row gives 0, one without
    a position gives NaN, and neither is read.
    """
    g = torch.Generator().manual_seed(longest)
    lengths = (
        [n for n in (1, 2, 3, 15, 16, 17, 64, 129, 511, 1025, longest) if n <= longest]
        + [longest] * (many and 9)
        + [5, 0, 4]
    )
    n, total = len(lengths), sum(lengths)
    values = (3 * torch.randn(total, generator=g)).to(dtype)
    stop = torch.tensor(lengths).cumsum(0)
    ids = (torch.rand(n, generator=g) * torch.tensor(lengths)).long()
    ids[-3:] = torch.tensor([IGNORE_INDEX, IGNORE_INDEX, -1])
    values[stop[-4] :] = math.nan
    bounds = torch.stack([stop - torch.tensor(lengths), stop])
    temperature = torch.linspace(0.5, 2, n)
    names = (*STATS, "lse_low")
    for softcap in (math.inf, 6.0):
        rows = PackedRows(values, bounds, ids, temperature, softcap)
        found = dict(zip(names, backend.packed_stats(rows, names), strict=True))
        derivatives = {name: torch.randn(n, generator=g) for name in DERIVATIVES}
        grad = torch.full_like(values, SENTINEL)
        backend.packed_grad(rows, found, derivatives, grad)
        for i in range(n - 3):
            z, softmax = (
                values[bounds[0, i] : bounds[1, i]][None].clone(),
                SoftmaxParams(lengths[i], softcap),
            )
            own, one = (
                contract.stats_of(
                    backend, z, ids[i : i + 1], names, softmax, temperature[i : i + 1]
                ),
                slice(i, i + 1),
            )
            for name in names:
                assert own[name].equal(found[name][one]), (
                    name,
                    lengths[i],
                    softcap,
                    own[name],
                    found[name][one],
                )
            by = {name: c[one].contiguous() for name, c in derivatives.items()}
            alone = contract.grad_of(backend, z, ids[one], own, by, softmax, temperature[one])
            assert alone[0].equal(grad[bounds[0, i] : bounds[1, i]]), (lengths[i], softcap)
        assert (grad[stop[-4] :] == SENTINEL).all()
        for name in names:
            assert found[name][-3:-1].tolist() == [0, 0] and found[name][-1].isnan()
    few = backend.packed_stats(
        PackedRows(values, bounds[:, :0].contiguous(), ids[:0], torch.ones(1), math.inf), names
    )
    assert few.shape == (len(names), 0)
