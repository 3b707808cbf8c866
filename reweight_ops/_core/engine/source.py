"""The interface of a source, which gives differentiable row statistics."""

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
    """The facts about a source that a plan depends on. Nothing has been computed.

    ``backend`` is the one that the caller requested, None for a source that needs none.
    ``statistics`` has the primitives that its statistics take. ``one_pass`` is the
    primitive that a fused loss takes, None if there is none.
    ``one_pass_unsupported_reason`` tells which gradient of this call the fused loss
    lacks. ``evaluator`` is the backend whose row kernels evaluate a loss on statistics
    that need no backend, None for PyTorch.
    """

    device: torch.device
    dtype: torch.dtype
    needs_grad: bool
    backend: str | None
    statistics: tuple[Primitive, ...] = ()
    one_pass: Primitive | None = None
    other_dtype: torch.dtype | None = None
    one_pass_unsupported_reason: str | None = None
    evaluator: str | None = None


class PolicyWork(NamedTuple):
    """What a fused policy loss computes: a program and its per-row inputs."""

    inputs: RowInputs
    params: Tensor
    program: str


class DivergenceWork(NamedTuple):
    """What a fused divergence loss computes:
    ``Σ_i weights_i · Σ_k constants_k · stat_k(row i)``.
    """

    constants: Tensor
    weights: Tensor


class Source(Protocol):
    """A resolved source of a call."""

    @property
    def rows(self) -> Rows: ...

    @property
    def info(self) -> SourceInfo: ...

    def statistics(self, names: tuple[str, ...], backend: str) -> dict[str, Tensor]:
        """Return the named row statistics, ``[N]`` each, differentiable to the tensors
        of the source.
        """

    def one_pass(self, work: Any, backend: str) -> tuple[Tensor, Tensor]:
        """Return ``(loss, table)``: the 0-d loss, whose gradient exists already, and
        the kernel's per-row results.
        """

    def more_metrics(self, plan: str) -> MoreMetrics | None:
        """Return metrics of the source, apart from those of the loss."""

    def kernel(self, backend: str, device: torch.device, plan: str) -> str | None:
        """Return which of a backend's several kernels a plan takes, and why."""

    def search(self, backend: str) -> str | None:
        """How the likeliest ids are found, if the call asks for some."""

    def version(self) -> int:
        """Return the version of the memory that the call may overwrite."""

    def close(self) -> None:
        """Close the source after the call."""


class PlainSource:
    """A source without a fused loss, without metrics, and with nothing to close."""

    def one_pass(self, work: Any, backend: str) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no fused loss")

    def more_metrics(self, plan: str) -> MoreMetrics | None:
        return None

    def kernel(self, backend: str, device: torch.device, plan: str) -> str | None:
        return None

    def search(self, backend: str) -> str | None:
        return None

    def version(self) -> int:
        return 0

    def close(self) -> None:
        return
