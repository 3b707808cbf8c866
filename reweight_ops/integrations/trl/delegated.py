"""Which calls are left to TRL, and why."""

from __future__ import annotations

from typing import Any

#: The inputs of models that read more than text.
MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def token_unsupported_reason(compute_aux_loss: bool, multimodal: dict[str, Any]) -> str | None:
    """Return why TRL has to compute these log-probs, or None."""
    if compute_aux_loss:
        return "the MoE auxiliary loss"
    given = [name for name, value in multimodal.items() if value is not None]
    return f"multimodal inputs ({', '.join(given)})" if given else None


def loss_unsupported_reason(trainer: Any, inputs: dict[str, Any], own_spec: bool) -> str | None:
    """Return why TRL has to compute this loss, or None."""
    if trainer.aux_loss_enabled:
        return "the MoE auxiliary loss"
    given = [name for name in MULTIMODAL if inputs.get(name) is not None]
    if given:
        return f"multimodal inputs ({', '.join(given)})"
    if trainer.off_policy_mask_threshold is not None:
        return "off_policy_mask_threshold"
    if own_spec:
        return None
    if trainer.loss_type == "vespo":
        return "loss_type='vespo'"
    if trainer.use_adaptive_entropy:
        return "use_adaptive_entropy"
    if trainer.top_entropy_quantile < 1 and trainer.accelerator.num_processes > 1:
        return "top_entropy_quantile over several processes"
    return None
