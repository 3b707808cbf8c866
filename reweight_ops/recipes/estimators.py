"""Recipes of advantage estimators: each with the loss that it goes with."""

from __future__ import annotations

from .._core.catalogue.recipes import Recipe
from .sources import EXAMPLE, PAPER, SCRIPT, VERL, published

_CRITIC = ("The critic is trained beside the policy, on the returns of the same call: `.returns`.",)
_SPO_LOSS = (
    "rw.methods.ppo().replace(reduction=rw.TokenMean(weight=rw.weights.spo_probability_mask()))"
)
_OTB = "rewards, completion_mask, old_per_token_logps, log_sum_p_sq, group_size=group_size"
_WHOLE = "rw.methods.reinforce().replace(reduction=rw.SequenceMean(per='token_sum'))"

ALL = (
    Recipe(
        name="grpo",
        entry="rw.advantages.grpo",
        advantages="rw.advantages.grpo(rewards, group_size=group_size)",
        spec="rw.methods.grpo(beta=0.04)",
        settings=(
            *published(PAPER, beta=0.04),
            *published("TRL's default", epsilon_low=0.2, epsilon_high=0.2),
        ),
    ),
    Recipe(
        name="dr_grpo",
        entry="rw.advantages.dr_grpo",
        advantages="rw.advantages.dr_grpo(rewards, group_size=group_size)",
        spec="rw.methods.dr_grpo()",
        settings=published("TRL's default", epsilon_low=0.2, epsilon_high=0.2),
        rollout=("`horizon` is the generation budget; without it, the padded length.",),
    ),
    Recipe(
        name="gdpo",
        entry="rw.advantages.gdpo",
        advantages="rw.advantages.gdpo(rewards_per_func, group_size=group_size)",
        spec="rw.methods.grpo()",
        rollout=("A reward that does not apply to a completion is NaN.",),
    ),
    Recipe(
        name="rloo",
        entry="rw.advantages.rloo",
        advantages="rw.advantages.rloo(rewards, group_size=group_size)",
        spec=_WHOLE,
        rollout=(
            "A whole completion is one action. In the paper the KL to the reference is part of "
            "the reward.",
        ),
    ),
    Recipe(
        name="opo",
        entry="rw.advantages.opo",
        advantages="rw.advantages.opo(rewards, lengths, group_size=group_size)",
        spec="rw.methods.reinforce()",
        rollout=("It is strictly on-policy: one update per rollout.",),
    ),
    Recipe(
        name="aapo",
        entry="rw.advantages.aapo",
        advantages="rw.advantages.aapo(rewards, reference_rewards, group_size=group_size)",
        spec="rw.methods.reinforce()",
        settings=published(SCRIPT, clip_low=0.2, clip_high=0.28, scale_rewards=False),
        rollout=(
            "`reference_rewards` are `[B]`: the reward of a completion by the reference model, "
            "paired with each row.",
        ),
    ),
    Recipe(
        name="pvpo",
        entry="rw.advantages.pvpo",
        advantages="rw.advantages.pvpo(rewards, reference_rewards, group_size=group_size)",
        spec="rw.methods.grpo()",
        rollout=(
            "`reference_rewards` are `[num_groups, M]`: rewards of completions that the "
            "reference policy sampled before training.",
            "Prompts with accuracy 1 are dropped. Groups with accuracy 0 get one true trajectory.",
            "The coefficient of its KL penalty was not found. It is 0 here.",
        ),
    ),
    Recipe(
        name="qae",
        entry="rw.advantages.qae",
        advantages="rw.advantages.qae(rewards, quantile=0.4, group_size=group_size)",
        spec="rw.methods.dapo()",
        settings=(
            *published(PAPER, quantile="0.4; 0.6 where entropy collapses"),
            *published("DAPO, which is the rest of the method", epsilon_low=0.2, epsilon_high=0.28),
        ),
    ),
    Recipe(
        name="grpo_lead",
        entry="rw.advantages.grpo_lead",
        rewards="rw.rewards.grpo_lead_length(correct, lengths, group_size=group_size)",
        advantages="rw.advantages.grpo_lead(rewards, group_size=group_size)",
        spec="rw.methods.ppo()",
        settings=published(
            SCRIPT,
            alpha=0.05,
            wrong_reward=-1,
            min_length=4000,
            low=0.4,
            high=1.5,
            midpoint=0.75,
            steepness=10,
            epsilon=0.2,
            beta=0,
        ),
    ),
    Recipe(
        name="mapo_mixed",
        entry="rw.advantages.mapo_mixed",
        advantages="rw.advantages.mapo_mixed(rewards, correct, group_size=group_size)",
        spec="rw.methods.grpo(beta=0.01)",
        settings=published("EasyR1's default; the authors' code derives from EasyR1", beta=0.01),
    ),
    Recipe(
        name="difficulty_prior",
        entry="rw.advantages.difficulty_prior",
        advantages="rw.advantages.difficulty_prior(rewards, correct, slope=1.0, "
        "group_size=group_size)",
        spec="rw.methods.grpo()",
        settings=published(EXAMPLE, slope=1),
        rollout=(
            "Prompts are kept only where the share of correct completions is from 0.1 to 0.87.",
        ),
    ),
    Recipe(
        name="ngrpo",
        entry="rw.advantages.ngrpo",
        advantages="rw.advantages.ngrpo(rewards, group_size=group_size)",
        spec="rw.methods.ngrpo()",
        settings=published(
            SCRIPT,
            max_reward=1,
            num_virtual=1,
            epsilon_neg=0.16,
            epsilon_pos=0.24,
            num_generations=8,
            beta=0,
        ),
        rollout=("Groups whose completions are all correct are left out.",),
    ),
    Recipe(
        name="lens",
        entry="rw.advantages.lens",
        advantages="rw.advantages.lens(correct, old_per_token_logps, completion_mask, "
        "group_size=group_size)",
        spec="rw.methods.grpo()",
        settings=published(PAPER, negative_weight=0.25, num_generations=16, temperature=1, beta=0),
    ),
    Recipe(
        name="canon",
        entry="rw.advantages.canon",
        advantages="rw.advantages.canon(rewards, mean_entropies, group_size=group_size)",
        spec="rw.methods.dr_grpo(epsilon_high=0.28)",
        settings=published(
            SCRIPT,
            inter_weight=1,
            alpha="1; 0.9 by length",
            beta=0,
            epsilon_low=0.2,
            epsilon_high=0.28,
        ),
        rollout=(
            "`metric_kind='length'` with `lengths` compares lengths instead of entropies. "
            "`inter_weight=rewards.mean()` is First-Intra-Later-Inter.",
        ),
    ),
    Recipe(
        name="canon_scheduled",
        entry="rw.schedules.canon",
        schedule='rw.schedules.canon(step, order="intra_first")',
        advantages="rw.advantages.canon(rewards, mean_entropies, inter_weight=schedule, "
        "group_size=group_size)",
        spec="rw.methods.dr_grpo(epsilon_high=0.28)",
        settings=published(
            SCRIPT,
            total_steps=150,
            warmup_steps=30,
            cycles=3,
            lowest=0.4,
            epsilon_low=0.2,
            epsilon_high=0.28,
        ),
        rollout=(
            "The schedule is cosine, First-Intra-Later-Inter. `order='inter_first'` is "
            "First-Inter-Later-Intra.",
        ),
    ),
    Recipe(
        name="edge_grpo",
        entry="rw.advantages.edge_grpo",
        advantages="rw.advantages.edge_grpo(rewards, mean_entropies, group_size=group_size)",
        spec="rw.methods.ppo()",
        settings=published(SCRIPT, epsilon=0.2, beta=0),
        rollout=(
            "Guided error correction rewrites some wrong completions before they are scored.",
        ),
    ),
    Recipe(
        name="spo_chain",
        entry="rw.advantages.spo_chain",
        advantages="rw.advantages.spo_chain(values, rewards, segments, completion_mask)",
        spec=_SPO_LOSS,
        settings=published(SCRIPT, threshold=0.9, interval=5, rollouts_per_cut=9, epsilon=0.2),
        rollout=(
            "`values` are Monte Carlo: the mean reward of 9 rollouts from every cut of `segments`.",
        ),
    ),
    Recipe(
        name="spo_tree",
        entry="rw.advantages.spo_tree",
        advantages="rw.advantages.spo_tree(values, parents)",
        spec=_SPO_LOSS,
        settings=published(SCRIPT, threshold=0.9, branches="6-6-6", segment_length=30, epsilon=0.2),
        rollout=(
            "Rows are the tree's nodes: segments of 30 tokens. `values` are `[B]`, the mean of "
            "the children's. Rows of advantage 0 are dropped.",
        ),
    ),
    Recipe(
        name="gigpo",
        entry="rw.advantages.gigpo",
        advantages="rw.advantages.gigpo(episode_rewards, step_returns, episode_ids, anchor_ids, "
        "num_anchors=num_anchors, group_size=group_size)",
        spec="rw.methods.ppo()",
        settings=published(PAPER, step_weight=1, gamma=0.95),
        rollout=("Rows are an agent's steps; `group_size` counts the episodes of one prompt.",),
    ),
    Recipe(
        name="gae",
        entry="rw.advantages.gae",
        advantages="rw.advantages.gae(rewards, values, completion_mask).advantages",
        spec="rw.methods.ppo()",
        settings=published(
            "the customary values for language models", gamma=1, lam=0.95, epsilon=0.2
        ),
        rollout=_CRITIC,
    ),
    Recipe(
        name="decoupled_gae",
        entry="rw.advantages.decoupled_gae",
        advantages="rw.advantages.decoupled_gae(rewards, values, completion_mask).advantages",
        spec="rw.methods.ppo()",
        settings=published(PAPER, lam_actor=0.95, lam_critic=1, gamma=1),
        rollout=(
            *_CRITIC,
            "The critic is trained beforehand on completions of the fixed policy, with λ = 1.",
        ),
    ),
    Recipe(
        name="reinforce_plus_plus",
        entry="rw.advantages.reinforce_plus_plus",
        advantages="rw.advantages.reinforce_plus_plus(rewards, completion_mask)",
        spec="rw.methods.ppo()",
        rollout=(
            "The KL penalty is part of the token rewards `[B, T]`: `-β·(logp - ref_logp)`, and "
            "the reward at the last token.",
        ),
    ),
    Recipe(
        name="reinforce_plus_plus_baseline",
        entry="rw.advantages.reinforce_plus_plus_baseline",
        advantages="rw.advantages.reinforce_plus_plus_baseline(rewards, completion_mask, "
        "group_size=group_size)",
        spec="rw.methods.ppo()",
    ),
    Recipe(
        name="remax",
        entry="rw.advantages.remax",
        advantages="rw.advantages.remax(rewards, greedy_rewards, completion_mask)",
        spec="rw.methods.reinforce()",
        settings=(
            *published(f"{PAPER}, algorithm 1", gamma=1),
            *published(SCRIPT, reward_clip=5, gamma=0.99, kl_coef=0.05),
        ),
        rollout=("Every prompt also has one greedy completion.",),
    ),
    Recipe(
        name="lite_ppo",
        entry="rw.advantages.lite_ppo",
        advantages="rw.advantages.lite_ppo(rewards, group_size=group_size)",
        spec="rw.methods.ppo()",
        rollout=(
            "Both of its tricks are here: the standard deviation of the batch, and the token mean.",
        ),
    ),
    Recipe(
        name="gpg",
        entry="rw.advantages.gpg",
        advantages="rw.advantages.gpg(rewards, group_size=group_size)",
        spec="rw.methods.gpg()",
        settings=published(VERL, f_norm=1),
        rollout=(
            "The paper drops groups of equal rewards. It is strictly on-policy: one update per "
            "rollout.",
        ),
    ),
    Recipe(
        name="a_star_po",
        entry="rw.advantages.a_star_po",
        advantages="rw.advantages.a_star_po(rewards, reference_rewards, group_size=group_size)",
        spec="rw.methods.a_star_po()",
        settings=(
            *published("TRL's default (`beta1`, of the advantages)", beta=0.5),
            *published("TRL's default (`beta2`, of the loss)", beta=0.001),
        ),
        rollout=(
            "`reference_rewards` are `[num_groups, M]`: rewards of completions that the "
            "reference policy sampled before training.",
            "Prompts that the reference never solves are left out.",
        ),
    ),
    Recipe(
        name="grpo_passk",
        entry="rw.advantages.grpo_passk",
        advantages="rw.advantages.grpo_passk(rewards, group_size=group_size)",
        spec="rw.methods.ppo()",
        settings=published(VERL, epsilon=0.2),
        rollout=("k is the size of the group.",),
    ),
    Recipe(
        name="passk_training",
        entry="rw.advantages.passk_training",
        advantages="rw.advantages.passk_training(correct, k=2, group_size=group_size)",
        spec="rw.methods.ppo()",
        settings=published("an example", k=2),
        rollout=("Groups have more than k completions: in a group of k every advantage is 0.",),
    ),
    Recipe(
        name="psr_nsr",
        entry="rw.advantages.psr_nsr",
        advantages="rw.advantages.psr_nsr(correct, positive_weight=0.1)",
        spec="rw.methods.ppo(entropy_coef=0.001)",
        settings=published(
            SCRIPT,
            positive_weight="0.1 (W-REINFORCE)",
            epsilon=0.2,
            entropy_coef=0.001,
            kl_coef=0,
            num_generations=8,
            temperature=1,
            learning_rate="1e-6",
            batch="1024 prompts, 256 an update",
        ),
        rollout=("NSR is `positive_weight=0`; PSR is `positive_weight=1, negative_weight=0`.",),
    ),
    Recipe(
        name="maxrl",
        entry="rw.advantages.maxrl",
        advantages="rw.advantages.maxrl(rewards, group_size=group_size)",
        spec="rw.methods.ppo()",
        rollout=("Rewards are 0 or 1.",),
    ),
    Recipe(
        name="otb",
        entry="rw.advantages.otb",
        advantages=f"rw.advantages.otb({_OTB})",
        spec="rw.methods.ppo()",
        settings=published(VERL, epsilon=0.2),
    ),
    Recipe(
        name="tir_otb",
        entry="rw.advantages.tir_otb",
        advantages=f"rw.advantages.tir_otb({_OTB})",
        spec="rw.methods.ppo()",
        settings=published(VERL, epsilon=0.2),
        rollout=("Tokens that a tool wrote are masked.",),
    ),
)
