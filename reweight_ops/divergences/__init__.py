"""Losses with a second logits tensor, or with another normaliser than the softmax.

Every loss is per token, of shape R, with a gradient to the logits.
"""

from typing import TYPE_CHECKING

from .._core.catalogue.search import published_names
from .._core.engine.distillation import DistillationLossOutput
from .._core.losses.distillation import distillation_loss, token_divergence
from .composites import (
    aldr,
    confidence_masked_kl,
    dhkd,
    kd,
    ldr,
    pld,
    stablemax,
    superhf,
    symmetric_cross_entropy,
)

__all__ = [
    "DistillationLossOutput",
    "aldr",
    "confidence_masked_kl",
    "dhkd",
    "distillation_loss",
    "kd",
    "ldr",
    "pld",
    "stablemax",
    "superhf",
    "symmetric_cross_entropy",
    "token_divergence",
]

if not TYPE_CHECKING:  # which would take any name for one
    __getattr__ = published_names("divergence")
