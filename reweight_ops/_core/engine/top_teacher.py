"""Divergences from a teacher with a few stored log-probs per row. The rest of the
vocabulary is one bucket, or left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calls.top_teacher import TopTeacher
from ..rows.groups import IGNORE_INDEX
from ..rows.numerics import log1mexp
from ..rows.rows import Rows
from .again import row_divergences
from .distillation import GENERALIZED_JSD, STATISTICS
from .linear.source import HiddenSource
from .picks import PICKED
from .source import PlainSource, SourceInfo
from .sources import LogitsSource


@dataclass(frozen=True)
class TopTeacherSource(PlainSource):
    """Divergences of the student ``p``, whose picks are the teacher's ids.

    They are those of :class:`~.sources.TwoLogitsSource`, and with ``beta`` the JSD.
    """

    p: LogitsSource | HiddenSource
    teacher: TopTeacher
    beta: float | None = None

    @property
    def rows(self) -> Rows:
        return self.p.rows

    @property
    def info(self) -> SourceInfo:
        return self.p.info._replace(
            one_pass=None,
            one_pass_unsupported_reason="there is no fused loss against stored log-probs of a "
            "few ids",
        )

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        ids, logps, tail = self.teacher
        picked = self.p.statistics((), backend)[PICKED]
        listed = (ids != IGNORE_INDEX) & self.rows.keep[:, None]
        log_p, log_q = (buckets(x, listed, tail) for x in (picked, logps))
        values = row_divergences(
            log_p,
            log_q,
            log_p == -torch.inf,
            log_q == -torch.inf,
            self.beta,
            whole=tail != "ignore",
        )
        found = dict(zip((*STATISTICS, GENERALIZED_JSD), values, strict=False))
        return {name: torch.where(self.rows.keep, value, 0) for name, value in found.items()}

    def close(self) -> None:
        self.p.close()


def buckets(logps: Tensor, listed: Tensor, tail: str) -> Tensor:
    """Return the log-probs ``[N, K]`` of the listed ids, ``-inf`` in the others.

    ``tail`` says what becomes of the rest of the vocabulary. It is one bucket, which
    makes ``[N, K + 1]``; or the list becomes a distribution of its own; or the rest is
    not in the sums.
    """
    inside = torch.where(listed, logps, -torch.inf)
    if tail == "ignore":
        return inside
    empty = ~(inside > -torch.inf).any(-1, keepdim=True) & ~inside.isnan().any(-1, keepdim=True)
    # If nothing is listed, a logsumexp would have a gradient of NaN.
    mass = torch.where(empty, 0, inside).logsumexp(-1, keepdim=True)
    if tail == "renormalize":
        return torch.where(empty, -torch.inf, inside - mass)
    return torch.cat([inside, torch.where(empty, 0, log1mexp(mass))], -1)
