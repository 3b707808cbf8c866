"""Resolution of log-probs that the caller has computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..backends.select import row_primitives
from ..rows.constants import parameter_vector
from ..rows.resolve import resolve_rows
from ..rows.rows import Rows

#: Maps the public names of statistics to the leaves of a formula.
STATISTICS = {
    "per_token_logps": "logp",
    "entropies": "entropy",
    "log_sum_p_sq": "log_sum_p_sq",
}


def resolve_logps(
    op: str, per_token_logps: Any, tensors: dict[str, Any], validate: bool = False
) -> Rows:
    """Return the rows of fp32 or fp64 log-probs of shape R.

    ``tensors`` holds the other tensors of the call by their public names.
    """
    if not isinstance(per_token_logps, Tensor) or per_token_logps.dtype not in (
        torch.float32,
        torch.float64,
    ):
        got = (
            per_token_logps.dtype
            if isinstance(per_token_logps, Tensor)
            else type(per_token_logps).__name__
        )
        raise InvalidCall(
            f"{op}: per_token_logps is {got}, expected fp32 or fp64 log-probs (.float())."
        )
    named = {"per_token_logps": per_token_logps, **tensors}
    return resolve_rows(
        op,
        tuple(per_token_logps.shape),
        per_token_logps.device,
        per_token_logps.dtype,
        named,
        validate=validate,
        primitives=row_primitives(per_token_logps, "auto"),
    )


def check_statistics(rows: Rows, stored: Mapping[str, Any]) -> None:
    """Check statistics that the caller has computed, by their public names."""
    for name, value in stored.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise rows.error(f"{name} is {got}, expected a tensor of fp32 or fp64.")
        if value.device != rows.device:
            raise rows.error(f"{name} is on {value.device}, the rows are on {rows.device}.")
        if tuple(value.shape) != rows.shape:
            raise rows.error(f"{name} has shape {tuple(value.shape)}, expected {rows.shape}.")


class _Kept(torch.autograd.Function):
    """``x`` in the kept rows, else 0. So is its gradient.

    Autograd would fill a new zero on the device for each of the two.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, zero: Tensor) -> Tensor:
        ctx.save_for_backward(keep, zero)
        return torch.where(keep, x, zero)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        keep, zero = ctx.saved_tensors
        return torch.where(keep, upstream, zero), None, None


def flat_statistics(
    rows: Rows, stored: Mapping[str, Tensor | None], evaluator: str | None
) -> dict[str, Tensor]:
    """Return the statistics by leaf, ``[N]`` in the row dtype and 0 in ignored rows.

    ``evaluator`` is the backend whose row kernels take them, None for PyTorch.
    """

    def kept(x: Tensor) -> Tensor:
        if evaluator is None:
            return torch.where(rows.keep, x, 0)
        (zero,) = parameter_vector((0.0,), x.dtype, x.device)
        found: Tensor = _Kept.apply(x, rows.keep, zero)  # type: ignore[no-untyped-call]
        return found

    return {
        STATISTICS[name]: kept(value.reshape(-1).to(rows.dtype))
        for name, value in stored.items()
        if value is not None
    }
