"""The objective of an op that computes statistics and no loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from .plan import Choice
from .source import MoreMetrics, SourceInfo

T = TypeVar("T")


@dataclass(frozen=True)
class StatisticsObjective(Generic[T]):
    """An objective whose ``finish`` turns the statistics into the op's result."""

    reads: tuple[str, ...]
    finish: Callable[[dict[str, Tensor]], T]

    program = None

    def one_pass_unsupported_reason(self, info: SourceInfo, requested: bool) -> str:
        return "there is no loss to fuse: these are statistics"

    def work(self) -> Any:
        raise NotImplementedError("statistics take two passes")

    def from_statistics(
        self, statistics: dict[str, Tensor], choice: Choice, more: MoreMetrics | None
    ) -> T:
        return self.finish(statistics)

    def from_one_pass(
        self, loss: Tensor, table: Tensor, choice: Choice, more: MoreMetrics | None
    ) -> T:
        raise NotImplementedError("statistics take two passes")
