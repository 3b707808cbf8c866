"""Resolution of log-probs that the caller has computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..backends.select import row_primitives
from ..rows.resolve import resolve_rows
from ..rows.rows import Rows


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
