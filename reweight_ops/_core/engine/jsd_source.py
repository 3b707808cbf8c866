"""A source of the generalised JSD of two logits tensors, together with the divergences
that have kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rows.rows import Rows
from . import jsd_ops
from . import ops as library
from .again import generalized_jsd
from .autograd import OpOptions, Softmaxes, divergence_table, forbid_graph
from .chunked_rows import FormulaSource, refuse_consumed
from .distillation import GENERALIZED_JSD, STATISTICS
from .source import PlainSource, SourceInfo
from .sources import TwoLogitsSource


def jsd_rows(source: TwoLogitsSource, beta: float) -> FormulaSource:
    """Return the JSD of every row, in chunks, because it has no kernel."""
    return FormulaSource(
        source.both,
        lambda x, y: generalized_jsd(torch.log_softmax(x, -1), torch.log_softmax(y, -1), beta),
    )


@dataclass(frozen=True)
class JsdSource(PlainSource):
    """A source with a gradient by the JSD. The other divergences are values only."""

    divergences: TwoLogitsSource
    beta: float

    @property
    def rows(self) -> Rows:
        return self.divergences.rows

    @property
    def info(self) -> SourceInfo:
        return self.divergences.info._replace(
            one_pass=None,
            one_pass_unsupported_reason="the generalised JSD is a composite in chunks",
        )

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        if self.divergences.both.p.shard is not None:
            whole: dict[str, Tensor] = self._of_shards(backend)
            return whole
        with torch.no_grad():
            values = self.divergences.statistics(names, backend)
        return {
            **values,
            GENERALIZED_JSD: jsd_rows(self.divergences, self.beta).statistics(("value",), backend)[
                "value"
            ],
        }

    def _of_shards(self, backend: str) -> dict[str, Tensor]:
        refuse_consumed(self.divergences.both.p)
        *tensors, softmaxes, options = self.divergences.of_shards(
            (*STATISTICS, GENERALIZED_JSD, self.beta), backend
        )
        values = JsdOfShards.apply(*tensors, self.beta, softmaxes, options)  # type: ignore[no-untyped-call]
        return dict(zip((*STATISTICS, GENERALIZED_JSD), values, strict=True))


class JsdOfShards(torch.autograd.Function):
    """``(KL(q‖p), KL(p‖q), H(p), H(q), JSD)`` of a vocabulary in shards, the last
    differentiable with respect to the logits of p: a second sweep of each
    shard when both log-sum-exps are known, and a second exchange of ``8·N`` bytes a
    rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        other: Tensor,
        ids: Tensor,
        t: Tensor,
        t_other: Tensor,
        beta: float,
        softmaxes: Softmaxes,
        options: OpOptions,
    ) -> tuple[Tensor, ...]:
        tensors, shards = (logits, other, ids, t, t_other), options.shards
        assert shards is not None
        table = divergence_table(tensors, softmaxes, options)
        parts = library.called(
            jsd_ops.jsd_parts, *tensors, table[4:], beta, *softmaxes, options.drop_last
        )
        to_p, to_q = shards.gathered(parts).sum(0)
        ctx.set_materialize_grads(False)
        ctx.beta, ctx.softmaxes, ctx.options = beta, softmaxes, options
        ctx.save_for_backward(*tensors, torch.cat([table[4:], to_p[None]]))
        values = tuple(row.clone() for row in table[:4])
        ctx.mark_non_differentiable(*values)
        return (*values, beta * to_q + (1 - beta) * to_p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[-1] is None:
            return (None,) * 8
        forbid_graph(ctx.options.shards)
        *tensors, known = ctx.saved_tensors
        arguments = (*tensors, known, grads[-1], ctx.beta, *ctx.softmaxes, ctx.options.drop_last)
        return library.called(jsd_ops.jsd_parts_grad, *arguments), *(None,) * 7
