"""A policy loss with a term that keeps the policy near a teacher: one
objective of two."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..backends.base import LOSS_ROWS
from .distillation import DistillationObjective
from .output import PolicyLossOutput
from .plan import Choice
from .policy import PolicyObjective
from .source import DivergenceWork, MoreMetrics, PolicyWork, SourceInfo

#: The prefix of the statistics that are divergences from a teacher.
TEACHER = "teacher "


class TaughtWork(NamedTuple):
    """What the fused loss computes."""

    policy: PolicyWork
    teacher: DivergenceWork


@dataclass(frozen=True)
class TaughtObjective:
    """The objective ``policy + teacher``. The weights of the teacher's loss include its
    coefficient.
    """

    policy: PolicyObjective
    teacher: DistillationObjective

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.policy.reads, *(TEACHER + name for name in self.teacher.reads))

    @property
    def program(self) -> str | None:
        return self.policy.program

    def one_pass_unsupported_reason(self, info: SourceInfo, requested: bool) -> str | None:
        return self.policy.one_pass_unsupported_reason(info, requested)

    def work(self) -> TaughtWork:
        return TaughtWork(self.policy.work(), self.teacher.work())

    def from_one_pass(
        self, loss: Tensor, table: Tensor, choice: Choice, more: MoreMetrics | None
    ) -> PolicyLossOutput:
        taught = self.teacher.from_one_pass(loss, table[len(LOSS_ROWS) :], choice, None)
        out = self.policy.from_one_pass(taught.loss, table[: len(LOSS_ROWS)], choice, more)
        return dataclasses.replace(out, teacher=taught)

    def from_statistics(
        self, statistics: dict[str, Tensor], choice: Choice, more: MoreMetrics | None
    ) -> PolicyLossOutput:
        known = {
            name.removeprefix(TEACHER): value
            for name, value in statistics.items()
            if name.startswith(TEACHER)
        }
        own = {name: value for name, value in statistics.items() if not name.startswith(TEACHER)}
        taught = self.teacher.from_statistics(known, choice, None)
        out = self.policy.from_statistics(own, choice, more)
        return dataclasses.replace(
            out, loss=out.loss + self.policy.call.rows.trusted(taught.loss), teacher=taught
        )
