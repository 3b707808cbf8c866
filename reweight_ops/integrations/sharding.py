"""Parameters that FSDP2 has sharded, outside of the forward that gathers them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from ..errors import UnsupportedRequest


def is_sharded(parameter: Any) -> bool:
    """Return whether a parameter is a DTensor. FSDP2's own forward gives
    plain tensors."""
    return isinstance(parameter, DTensor)


def unsupported_reason(parameter: DTensor) -> str | None:
    """Return why a sharded parameter cannot be gathered here, or None if it can. Every
    rank of its mesh must have its own data.
    """
    if sum(not isinstance(placement, Replicate) for placement in parameter.placements) > 1:
        return (
            "it is sharded over several dimensions of its mesh, of which one may be tensor "
            "parallelism"
        )
    return None


def whole(parameter: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the full tensor of a parameter that FSDP2 has sharded, in ``dtype``, and
    any other parameter unchanged.

    Its gradient is the mean over the ranks, as FSDP2's own is.

    Raises:
        UnsupportedRequest: the parameter is sharded in another way.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    reason = unsupported_reason(parameter)
    if reason is not None:
        raise UnsupportedRequest(f"a head cannot be made whole: {reason}.")
    mesh = parameter.device_mesh
    # Without its placements the gradient would count as one that all ranks share, and
    # only a rank's own would be kept.
    full: Tensor = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())  # type: ignore[no-untyped-call]
    return full if dtype is None else full.to(dtype)
