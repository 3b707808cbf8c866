"""The metrics of a loss in TRL's log."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._core.engine.output import PolicyLossOutput

#: The loss's metrics in TRL's log.
METRICS = (
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_max",
    "cispo_clip_ratio",
)


def log(trainer: Any, mode: str, out: PolicyLossOutput) -> None:
    """Log TRL's metrics of the loss, over all processes."""
    metrics = out.metrics if trainer.accelerator.num_processes == 1 else out.metrics.all_reduce()
    values = metrics.as_floats()
    for name in METRICS:
        if name in values:
            trainer._metrics[mode][name].append(values[name])


def log_bonus(trainer: Any, mode: str, policy: Tensor) -> None:
    """Log what TRL also logs with an entropy bonus: the loss without it, and its
    coefficient.
    """
    trainer._metrics[mode]["policy_loss"].append(
        trainer.accelerator.gather(policy.detach()).nanmean().item()
    )
    if mode == "train" and trainer.accelerator.sync_gradients:
        trainer._metrics[mode]["entropy_coef"].append(trainer.entropy_coef)
