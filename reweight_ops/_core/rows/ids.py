"""The check of a call's token ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from .groups import IGNORE_INDEX, describe
from .structure import is_readable


def check_ids(
    op: str,
    ids: Tensor,
    vocab_total: int,
    validate: bool,
    tensors: dict[str, Any],
    bounds: tuple[int, int] | None = None,
) -> None:
    """Raise for an id outside of ``[0, vocab_total)``, where ids may be read.

    ``ids`` are ``[N]``, IGNORE_INDEX in an ignored row. ``bounds`` are their least and
    greatest, if known.
    """
    if bounds is not None and bounds[0] >= 0 and bounds[1] < vocab_total:
        return
    if not (validate or is_readable(ids)) or ids.device.type == "meta" or not ids.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low >= 0 and high < vocab_total:
        return  # the usual case takes one sweep
    bad = ((ids < 0) & (ids != IGNORE_INDEX)) | (ids >= vocab_total)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise InvalidCall(
            f"{op}: completion_ids[{row}] (flat) is {int(ids[row])}, expected 0 to "
            f"{vocab_total - 1}, or {IGNORE_INDEX} for an ignored row. {describe(tensors)}"
        )
