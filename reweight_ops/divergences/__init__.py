"""A second logits tensor, or another normaliser than the softmax's."""

from .ops import DistillationLossOutput, distillation_loss, token_divergence

__all__ = ["DistillationLossOutput", "distillation_loss", "token_divergence"]
