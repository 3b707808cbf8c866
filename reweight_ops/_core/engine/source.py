"""What the engine asks of a source: where differentiable row statistics come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends.base import Primitive, RowInputs
from ..rows.rows import Rows

#: Adds metrics (sums) of the source, from the loss's derivatives by logp and entropy.
MoreMetrics = Callable[[tuple[Tensor, Tensor]], dict[str, Any]]


class SourceInfo(NamedTuple):
    """What a plan depends on of a source. Nothing has been computed.

    ``backend``: what the caller asked for; None for a source that needs none. ``statistics``: the primitives that
    its statistics take; ``one_pass``: the one that a fused loss takes, None if there is none;
    ``one_pass_unsupported_reason``: what of this call the fused loss has no gradient for.
    """

    device: torch.device
    dtype: torch.dtype
    needs_grad: bool
    backend: str | None
    statistics: tuple[Primitive, ...] = ()
    one_pass: Primitive | None = None
    other_dtype: torch.dtype | None = None
    one_pass_unsupported_reason: str | None = None


class PolicyWork(NamedTuple):
    """What a fused policy loss computes: a program, and what it reads per row."""

    inputs: RowInputs
    params: Tensor
    program: str


class DivergenceWork(NamedTuple):
    """What a fused divergence loss computes: ``Σ_i weights_i · Σ_k constants_k · stat_k(row i)``."""

    constants: Tensor
    weights: Tensor


class Source(Protocol):
    """A resolved source of a call."""

    @property
    def rows(self) -> Rows: ...

    @property
    def info(self) -> SourceInfo: ...

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        """The named row statistics, ``[N]`` each, differentiable to what the source is made of."""

    def one_pass(self, work: Any, backend: str) -> tuple[Tensor, Tensor]:
        """``(loss, table)``: the 0-d loss, whose gradient is formed already, and what the kernel returns per row."""

    def more_metrics(self, plan: str) -> MoreMetrics | None:
        """Metrics of the source beside those of the loss."""

    def kernel(self, backend: str, device: torch.device) -> str | None:
        """Which of a backend's several kernels the fused loss takes, and why."""

    def search(self, backend: str) -> str | None:
        """How the likeliest ids are found, if the call asks for some."""

    def version(self) -> int:
        """Of the memory that the call may overwrite."""

    def close(self) -> None:
        """The call is over."""


class PlainSource:
    """What a source answers that has no fused loss, no metrics and nothing to close."""

    def one_pass(self, work: Any, backend: str) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no fused loss")

    def more_metrics(self, plan: str) -> MoreMetrics | None:
        return None

    def kernel(self, backend: str, device: torch.device) -> str | None:
        return None

    def search(self, backend: str) -> str | None:
        return None

    def version(self) -> int:
        return 0

    def close(self) -> None:
        return
