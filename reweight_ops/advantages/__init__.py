"""Advantage estimators: rewards in, advantages out, as pure functions on tensors.

``[B]`` rewards and groups of completions (:mod:`reweight_ops._core.rows.grouped` has
the convention) give ``[B]`` advantages. Token-level estimators take and give ``[B, T]``
with a ``completion_mask``. Both go straight into :func:`reweight_ops.policy_loss`. All
of them take fp32 or fp64 (16 bits are an error), are detached, and run on the inputs'
device without waiting for it. A NaN reward marks a completion without a score, which is
in no statistic and has advantage 0 (TRL's convention). A group of one, or of equal
rewards, has advantage 0 unless the docstring says otherwise.

    advantages = rw.advantages.grpo(rewards, group_size=8)
"""

from typing import TYPE_CHECKING

from .._core.catalogue.search import published_names
from .best_of_k import grpo_passk, maxrl, passk_training, psr_nsr
from .difficulty import difficulty_prior, grpo_lead, lens, mapo_mixed, ngrpo
from .optimal_baseline import otb, tir_otb
from .outcome import a_star_po, aapo, dr_grpo, gdpo, gpg, grpo, lite_ppo, opo, pvpo, qae, rloo
from .policy_statistics import canon, edge_grpo
from .segments import SpoSegments, gigpo, spo_chain, spo_segments, spo_tree
from .tokens import (
    Gae,
    decoupled_gae,
    discounted_returns,
    gae,
    hapo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    whiten,
)

__all__ = [
    "Gae",
    "SpoSegments",
    "a_star_po",
    "aapo",
    "canon",
    "decoupled_gae",
    "difficulty_prior",
    "discounted_returns",
    "dr_grpo",
    "edge_grpo",
    "gae",
    "gdpo",
    "gigpo",
    "gpg",
    "grpo",
    "grpo_lead",
    "grpo_passk",
    "hapo",
    "lens",
    "lite_ppo",
    "mapo_mixed",
    "maxrl",
    "ngrpo",
    "opo",
    "otb",
    "passk_training",
    "psr_nsr",
    "pvpo",
    "qae",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
    "spo_chain",
    "spo_segments",
    "spo_tree",
    "tir_otb",
    "whiten",
]

if not TYPE_CHECKING:  # which would take any name for one
    __getattr__ = published_names("advantage")
