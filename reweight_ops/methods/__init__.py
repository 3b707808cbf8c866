"""The catalogue: a published method is one function that returns a spec. ``trl`` and ``verl`` speak those libraries' option names."""

from .clipping import cispo, dapo, dppo_tv, dr_grpo, dual_clip_ppo, gpg, grpo, ppo, reinforce, sapo
from .registry import METHODS, Method, method, published
from .reweighting import advantage_reweighting, lopti, top_entropy
from .sequence import gspo, gspo_token, luspo
from .trl import trl
from .verl import verl

__all__ = [
    "METHODS",
    "Method",
    "advantage_reweighting",
    "cispo",
    "dapo",
    "dppo_tv",
    "dr_grpo",
    "dual_clip_ppo",
    "gpg",
    "grpo",
    "gspo",
    "gspo_token",
    "lopti",
    "luspo",
    "method",
    "ppo",
    "published",
    "reinforce",
    "sapo",
    "top_entropy",
    "trl",
    "verl",
]
