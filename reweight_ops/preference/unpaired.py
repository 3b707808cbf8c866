"""The reference point of a batch, which unpaired preferences need beside
``methods.kto``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InvalidCall

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def kto_baseline(
    per_token_logps: Tensor,
    ref_per_token_logps: Tensor,
    completion_mask: Tensor,
    *,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """``z = max(0, mean_i log(π(y'_i|x_i)/π_ref(y'_i|x_i)))``, 0-d.

    This is KTO's estimate of the KL, from prompts with the responses to other prompts
    (eq. 6).

    It takes ``[B, T]`` log-probs of the policy and the reference on mismatched pairs,
    such as each prompt with the next one's response. Pass the result as
    ``methods.kto(kl=...)``. With ``process_group`` the mean is over all its ranks, as
    in TRL's trainer.

    >>> import torch, reweight_ops as rw
    >>> logps, ref = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -3.0]])
    >>> rw.preference.kto_baseline(logps, ref, torch.tensor([[1, 0]]))
    tensor(0.5000)
    """
    for name, x in (
        ("per_token_logps", per_token_logps),
        ("ref_per_token_logps", ref_per_token_logps),
    ):
        if x.dtype not in (torch.float32, torch.float64):
            raise InvalidCall(
                f"kto_baseline: {name} is {x.dtype}: log-probs in 16 bits lose the ratio; "
                "compute them with .float()."
            )
    if (
        per_token_logps.dim() != 2
        or not per_token_logps.shape == ref_per_token_logps.shape == completion_mask.shape
    ):
        shapes = [tuple(x.shape) for x in (per_token_logps, ref_per_token_logps, completion_mask)]
        raise InvalidCall(f"kto_baseline: shapes are {shapes}, expected [B, T] three times.")
    total = torch.where(completion_mask != 0, per_token_logps - ref_per_token_logps, 0).sum()
    mean = torch.stack([total, total.new_tensor(float(len(completion_mask)))])
    if process_group is not None:
        import torch.distributed as dist

        dist.all_reduce(mean, group=process_group)
    return (mean[0] / mean[1].clamp(min=1)).clamp(min=0)
