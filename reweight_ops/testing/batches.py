"""Batches that exercise a loss: their logits, masks and ratios are meaningful. Each
batch also exists in fp64.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from .._core.spec.policy import PolicyLossSpec
from .._core.spec.ratio import SegmentRatio
from ..errors import InvalidCall

#: With fewer columns every target is likely.
LEAST_VOCAB = 3


def make_batch(
    spec: PolicyLossSpec,
    shape: tuple[int, ...] = (4, 16),
    vocab: int = 257,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    on_policy: bool = False,
) -> dict[str, Any]:
    """Keyword arguments for ``policy_loss(**batch, spec=spec)`` that exercise the spec.

    The logits have outliers, and the targets have real mass. The mask is ragged. The
    log-ratios lie on both sides of any clip. The logits are a non-leaf slice of a
    larger tensor and require grad. The call raises :class:`~reweight_ops.InvalidCall`
    where so few columns or rows cannot have all that.

    >>> import reweight_ops as rw
    >>> batch = make_batch(rw.methods.grpo())
    >>> rw.policy_loss(**batch, spec="grpo").plan in ("one_pass", "two_pass")
    True
    """
    g = torch.Generator().manual_seed(seed)
    row = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64, device="cpu")

    ids = torch.randint(0, vocab, shape, generator=g, device="cpu")
    z = normal(*shape, vocab) * 2

    def uniform(size: tuple[int, ...]) -> Tensor:
        return torch.rand(size, generator=g, dtype=torch.float32, device="cpu")

    # Without these outliers every p is about 1/V.
    z += 8.0 * (uniform(z.shape) < 4 / vocab)
    lift = uniform(shape) * 12
    # The targets range from rare to nearly certain.
    z.scatter_add_(-1, ids[..., None], lift.to(z.dtype)[..., None])
    buffer = torch.zeros(*shape[:-1], shape[-1] + 1, vocab + 3, dtype=dtype, device="cpu")
    buffer[..., :-1, :vocab] = z.to(dtype)
    leaf = buffer.to(device).requires_grad_()
    logits = (leaf * 1)[..., :-1, :vocab]
    logp = torch.log_softmax(logits.detach().double().cpu(), -1).gather(-1, ids[..., None])[..., 0]

    lengths = torch.randint(1, shape[-1] + 1, shape[:-1], generator=g, device="cpu")
    mask = torch.arange(shape[-1], device="cpu") < lengths[..., None]
    mask[..., 0] = True
    batch: dict[str, Any] = {
        "logits": logits,
        "completion_ids": ids.to(device),
        "advantages": normal(*shape).to(device, row) if "adv" in spec.requires else None,
        "completion_mask": mask.to(device),
    }
    # It is drawn always, so that what is drawn after it does not depend on the spec.
    old = (logp + 0.4 * normal(*shape)).clamp(max=-1e-4).to(device, row)
    reads_old = "old_logp" in spec.requires or (
        "log_ratio" in spec.requires and spec.ratio.against == "old"
    )
    if reads_old and not on_policy:
        batch["old_per_token_logps"] = old
    if "ref_logp" in spec.requires:
        batch["ref_per_token_logps"] = (
            (logp + 0.5 * normal(*shape)).clamp(max=-1e-4).to(device, row)
        )
    if "sampling_logp" in spec.requires:
        batch["sampling_per_token_logps"] = (
            (logp + 0.5 * normal(*shape)).clamp(max=-1e-4).to(device, row)
        )
    if any(r.reads_groups for r in spec.reductions):
        sequences = math.prod(shape[:-1])
        batch["group_ids"], batch["num_groups"] = (
            (torch.arange(sequences, device="cpu") * 2 // sequences).to(device),
            2,
        )
        # both labels in both groups
        sign = (1.0 - 2.0 * (torch.arange(sequences, dtype=torch.float64, device="cpu") % 2)).view(
            *shape[:-1], 1
        )
        batch["advantages"] = (normal(*shape).abs() * sign).to(device, row)
    if spec.ratio.one_advantage:
        batch["advantages"] = batch["advantages"][..., :1]
    if isinstance(spec.ratio, SegmentRatio):
        batch["segment_ids"] = (
            (torch.arange(shape[-1], device="cpu") // 3).expand(shape).contiguous().to(device)
        )
    _assert_meaningful(spec, batch, logp)
    return batch


def _assert_meaningful(spec: PolicyLossSpec, batch: dict[str, Any], logp: Tensor) -> None:
    p = logp.exp()
    if not ((p > 0.5).any() and (p < 0.05).any()):
        shape = f"{tuple(logp.shape)} rows of {batch['logits'].shape[-1]} columns"
        raise InvalidCall(
            f"make_batch: of {shape} no target is likely, or none is unlikely; take more rows, "
            f"or at least {LEAST_VOCAB} columns."
        )
    if "old_per_token_logps" in batch and logp.numel() >= 32:
        ratio = (logp - batch["old_per_token_logps"].double().cpu()).exp()
        if not ((ratio > 1.3).any() and (ratio < 0.7).any()):
            raise InvalidCall(
                f"make_batch: of {tuple(logp.shape)} rows the ratios lie on one side of 1; take "
                "more rows, or another seed."
            )


def double_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its floating-point tensors in fp64."""
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in batch.items()
    }


def double_spec(spec: PolicyLossSpec) -> PolicyLossSpec:
    """The spec with its tensors in fp64. Its constants are exact in fp64 already."""

    def double(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.double() if x.is_floating_point() else x
        if isinstance(x, tuple):
            return tuple(double(y) for y in x)
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return dataclasses.replace(
                x, **{f.name: double(getattr(x, f.name)) for f in dataclasses.fields(x)}
            )
        return x

    result: PolicyLossSpec = double(spec)
    return result


def make_sampling_mask(batch: dict[str, Any], share: float = 0.3, seed: int = 0) -> Tensor:
    """A bool mask ``R + (V,)`` for the batch.

    Every row keeps its id and ``share`` of the other ids. The first row keeps none of
    the others, and the last row keeps all.
    """
    ids, vocab = batch["completion_ids"], batch["logits"].size(-1)
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand((ids.numel(), vocab), generator=g, dtype=torch.float32, device="cpu") < share
    kept[0], kept[-1] = False, True
    return (
        kept.view(*ids.shape, vocab).to(ids.device).scatter(-1, ids.clamp(min=0)[..., None], True)
    )
