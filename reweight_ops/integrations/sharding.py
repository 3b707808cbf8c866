"""Parameters that FSDP2 has sharded, outside of the forward that makes them whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from ..errors import UnsupportedRequest


def is_sharded(parameter: Any) -> bool:
    """Whether a parameter is a DTensor: FSDP2's own forward gives plain tensors."""
    return isinstance(parameter, DTensor)


def unsupported_reason(parameter: DTensor) -> str | None:
    """Why a sharded parameter cannot be made whole here, None if it can: every rank of its mesh must have data of its own."""
    if sum(not isinstance(placement, Replicate) for placement in parameter.placements) > 1:
        return "it is sharded over several dimensions of its mesh, of which one may be tensor parallelism"
    return None


def whole(parameter: Any, dtype: torch.dtype | None = None) -> Any:
    """The full tensor of a parameter that FSDP2 has sharded, in ``dtype``; any other as it is. Its gradient is the mean over the ranks, as FSDP2's own.

    Raises:
        UnsupportedRequest: the parameter is sharded in another way.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    reason = unsupported_reason(parameter)
    if reason is not None:
        raise UnsupportedRequest(f"a head cannot be made whole: {reason}.")
    mesh = parameter.device_mesh
    # Without its placements the gradient is taken for one that all ranks share, and none but a rank's own would be kept.
    full: Tensor = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())  # type: ignore[no-untyped-call]
    return full if dtype is None else full.to(dtype)
