"""The raw primitives, for benchmarks and for your own drivers.

They have no autograd, and no checks beyond those of the backend; see
:mod:`.backends.base`.
"""

from __future__ import annotations

from torch import Tensor

from ._core.backends.base import Request, RowInputs, SoftmaxParams
from ._core.backends.select import choose, load
from ._core.engine.memory import empty
from ._core.formula.loss_program import Program
from ._core.names import with_own_keywords

__all__ = ["Program", "RowInputs", "SoftmaxParams", "token_grad", "token_loss_grad", "token_stats"]


def _out(logits: Tensor, out: Tensor | None) -> Tensor:
    return empty(logits.shape, logits.dtype, logits.device) if out is None else out


@with_own_keywords
def token_stats(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    *,
    softmax: SoftmaxParams | None = None,
    stats: tuple[str, ...] = ("logp", "entropy"),
    backend: str = "auto",
) -> Tensor:
    """``[len(stats), N]``."""
    name = choose(Request("token_stats", logits.device, logits.dtype), backend)
    return load(name).token_stats(
        logits, ids, temperature, softmax or SoftmaxParams(logits.size(-1)), stats
    )


@with_own_keywords
def token_grad(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    stats: dict[str, Tensor],
    derivatives: dict[str, Tensor | None],
    *,
    softmax: SoftmaxParams | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Write ``dL/dlogits`` to ``out`` (in place with ``out=logits``), to the precision
    of fp32 if ``lse_low`` is among ``stats``.
    """
    name, out = (
        choose(Request("token_grad", logits.device, logits.dtype), backend),
        _out(logits, out),
    )
    load(name).token_grad(
        logits, ids, temperature, softmax or SoftmaxParams(logits.size(-1)), stats, derivatives, out
    )
    return out


@with_own_keywords
def token_loss_grad(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    inputs: RowInputs,
    program: Program,
    params: Tensor,
    *,
    softmax: SoftmaxParams | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``([len(LOSS_ROWS), N], dL/dlogits)``."""
    name, out = (
        choose(Request("token_loss_grad", logits.device, logits.dtype, program), backend),
        _out(logits, out),
    )
    return load(name).token_loss_grad(
        logits,
        ids,
        temperature,
        softmax or SoftmaxParams(logits.size(-1)),
        inputs,
        program,
        params,
        out,
    ), out
