"""Recipes of papers that combine several rewards, or weight a data set's samples."""

from __future__ import annotations

from .._core.catalogue.recipes import Recipe
from .sources import SCRIPT, published

_GAE = "rw.advantages.gae(rewards, values, completion_mask).advantages"
_ENSEMBLE = (
    "A column of `rewards_per_func` is a reward model of the ensemble.",
    "A KL penalty of 0.1 (adaptive: target 6, horizon 10000) is part of the rewards; rewards "
    "are clipped to ±10.",
)
_PPO = published(SCRIPT, epsilon=0.2, gamma=1, lam=0.95)

ALL = (
    Recipe(
        name="wco",
        entry="rw.rewards.wco",
        rewards="rw.rewards.wco(rewards_per_func)",
        advantages=_GAE,
        spec="rw.methods.ppo()",
        settings=_PPO,
        rollout=_ENSEMBLE,
    ),
    Recipe(
        name="uwo",
        entry="rw.rewards.uwo",
        rewards="rw.rewards.uwo(rewards_per_func, coef=0.1)",
        advantages=_GAE,
        spec="rw.methods.ppo()",
        settings=(*published(SCRIPT, coef="0.1 with PPO, 0.5 with best-of-n"), *_PPO),
        rollout=_ENSEMBLE,
    ),
    Recipe(
        name="weighted_mean",
        entry="rw.rewards.weighted_mean",
        rewards="rw.rewards.weighted_mean(rewards_per_func)",
        advantages=_GAE,
        spec="rw.methods.ppo()",
    ),
    Recipe(
        name="harmonic_mean",
        entry="rw.rewards.harmonic_mean",
        rewards="rw.rewards.harmonic_mean(rewards_per_func)",
        advantages=_GAE,
        spec="rw.methods.ppo()",
        rollout=("No reward is negative.",),
    ),
    Recipe(
        name="hypervolume_reward_weighting",
        entry="rw.objectives.HypervolumeRewardWeighting",
        setup={
            "weighting": "rw.objectives.HypervolumeRewardWeighting(reference=(0.0, 0.0))",
            "state, factor": "weighting.init(), 1.0",
        },
        rewards="factor * rewards",
        advantages="rw.advantages.rloo(rewards, group_size=group_size)",
        spec="rw.methods.reinforce()",
        after={"state, factor": "weighting.update(state, metrics)"},
        settings=published(SCRIPT, base=0.5, scale=1.5),
        rollout=(
            "`reference` has the validation metrics before training, and `metrics` those "
            "after the step.",
            "A factor of all rewards cancels in advantages that are divided by a standard "
            "deviation.",
        ),
    ),
    Recipe(
        name="gradient_reward_weighting",
        entry="rw.objectives.GradientRewardWeighting",
        setup={
            "weighting": "rw.objectives.GradientRewardWeighting()",
            "state": "weighting.init(2)",
            "weights": "state.exp()",
        },
        rewards="rewards_per_func @ weights",
        advantages="rw.advantages.grpo(rewards, group_size=group_size)",
        spec="rw.methods.grpo(epsilon_low=100.0, epsilon_high=100.0, beta=0.001)",
        after={
            "state, weights": "weighting.update(state, "
            "rw.objectives.gradient_influences(gradients))"
        },
        settings=published(
            SCRIPT,
            learning_rate="1e-6",
            regularization="1e-5",
            epsilon_low="100 (no clip)",
            beta="0.001 (k3)",
            num_generations=8,
        ),
        rollout=(
            "`gradients` cost a backward pass each; the authors take layers 10 to 25 of Qwen3-8B.",
        ),
    ),
    Recipe(
        name="trajectory_rw",
        entry="rw.sample_weights.trajectory_rw",
        sample_weights="rw.sample_weights.trajectory_rw(returns)",
        spec="rw.methods.sft()",
        settings=published(SCRIPT, temperature=0.1),
        rollout=(
            "Weights are over the data set: pass the returns of all trajectories, and use "
            "the weights of the batch.",
        ),
    ),
    Recipe(
        name="trajectory_aw",
        entry="rw.sample_weights.trajectory_aw",
        sample_weights="rw.sample_weights.trajectory_aw(returns, start_values)",
        spec="rw.methods.sft()",
        settings=published(SCRIPT, temperature=0.1),
        rollout=(
            "Weights are over the data set: pass the returns of all trajectories, and use "
            "the weights of the batch.",
        ),
    ),
)
