"""Parameters that DeepSpeed's ZeRO-3 has partitioned.

Outside of the module that owns it, such a parameter is empty: its shape is ``(0,)``.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ...errors import InvalidCall

_WHAT_TO_DO = (
    "gather it for the forward and the backward of the call (with "
    "deepspeed.zero.GatheredParameters([...]):), or make the call "
    "inside of the forward of the module that owns it, whose hooks do"
)


def is_released(parameter: Tensor) -> bool:
    """Whether ZeRO-3 (which marks its parameters with a ``ds_id``) has this one in
    parts elsewhere.
    """
    return hasattr(parameter, "ds_id") and parameter.numel() == 0


def refuse_released(op: str, parameters: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raise for a parameter of a head that holds nothing here."""
    for name, x in parameters:
        if x is not None and is_released(x):
            shape = tuple(getattr(x, "ds_shape", ()))
            raise InvalidCall(
                f"{op}: {name} is a parameter that ZeRO-3 has released (of shape {shape}, here "
                f"empty): {_WHAT_TO_DO}."
            )


def partitioned(parameters: Iterable[Tensor | None]) -> list[Tensor]:
    """Those of a head that ZeRO-3 may release between forward and backward."""
    return [x for x in parameters if x is not None and hasattr(x, "ds_id")]


def refuse_released_since(op: str, parameters: Iterable[Tensor | None]) -> None:
    """Raise in backward for one that was there in forward: two passes read it again,
    and no gradient can be put beside what is empty.
    """
    if any(x is not None and is_released(x) for x in parameters):
        raise InvalidCall(
            f"{op}: ZeRO-3 has released a parameter of the head since forward: {_WHAT_TO_DO}."
        )
