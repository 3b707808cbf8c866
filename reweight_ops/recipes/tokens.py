"""Recipes of papers that weight, mask or clip tokens."""

from __future__ import annotations

from .._core.catalogue.recipes import Recipe
from .sources import EXAMPLE, GRPO, PAPER, SCRIPT, VERL, published

_LOGIC = f"{SCRIPT} (K&K logic puzzles)"
_AR = published(
    _LOGIC,
    epsilon_low=0.2,
    epsilon_high=0.24,
    clip_ratio_c=10,
    beta="0.001 (k3)",
    num_generations=8,
    temperature=0.7,
    learning_rate="1e-6",
)
_TWO_UPDATES = (
    "Train on all mini-batches with the first spec, then on all of them with the second; the "
    "old log-probs stay those of the rollout.",
)
_MISMATCH = (
    "The sampler's log-probs are those of the distribution that it sampled from, after its "
    "temperature and truncation.",
)

ALL = (
    Recipe(
        name="ar_lopti",
        entry="rw.schedules.lopti",
        advantages=GRPO,
        spec="rw.schedules.lopti(eta=0.5, alpha=0.3, epsilon_high=0.24, clip_ratio_c=10.0, "
        "beta=0.001)",
        settings=(*published(_LOGIC, alpha=0.3, eta=0.5), *_AR),
        rollout=_TWO_UPDATES,
    ),
    Recipe(
        name="lopti",
        entry="rw.schedules.lopti",
        advantages=GRPO,
        spec="rw.schedules.lopti(eta=0.4, epsilon_high=0.24, clip_ratio_c=10.0, beta=0.001)",
        settings=(*published(_LOGIC, eta=0.4), *_AR),
        rollout=_TWO_UPDATES,
    ),
    Recipe(
        name="advantage_reweighting",
        entry="rw.methods.advantage_reweighting",
        advantages=GRPO,
        spec="rw.methods.advantage_reweighting(alpha=0.2, epsilon_high=0.24, clip_ratio_c=10.0, "
        "beta=0.001)",
        settings=(
            *published(_LOGIC, alpha=0.2),
            *published(f"{PAPER} (mathematics)", alpha=0.1),
            *_AR,
        ),
    ),
    Recipe(
        name="hapo",
        entry="rw.methods.hapo",
        advantages="rw.advantages.hapo(rewards, lengths, group_size=group_size)",
        spec="rw.methods.hapo(entropies=entropies)",
        settings=(
            *published(
                PAPER,
                epsilon_low=0.2,
                epsilon_high=0.28,
                alpha=1,
                beta=1,
                pivot=0.8,
                temperature_step=0.1,
            ),
            *published(SCRIPT, epsilon_high=0.2, clip_ratio_c=10, temperature_step=0.05),
        ),
        rollout=(
            "The sampling temperature adapts to each token's entropy: "
            "`rw.schedules.hapo_temperature(entropies, rollout_entropies, completion_mask, "
            "tau=0.1)`, with τ the temperature step.",
        ),
    ),
    Recipe(
        name="steer",
        entry="rw.weights.steer",
        advantages=GRPO,
        spec="rw.methods.dual_clip_ppo(epsilon_low=0.2, epsilon_high=0.28, clip_ratio_c=10.0)"
        ".with_weight(rw.weights.steer(entropies=entropies))",
        settings=published(
            SCRIPT,
            epsilon_low=0.2,
            epsilon_high=0.28,
            clip_ratio_c=10,
            w_min=0.8,
            w_max="1.2 (linear)",
            beta=0,
        ),
    ),
    Recipe(
        name="stare",
        entry="rw.weights.SurprisalReweighting",
        advantages=GRPO,
        spec="rw.methods.dual_clip_ppo().with_weight(rw.weights.SurprisalReweighting())",
        settings=published(
            PAPER, fraction=0.1, amplify=1.1, damp="1 (O1) or 0.9 (C2)", target_entropy=0.3
        ),
        rollout=(
            "The target-entropy gate keeps a state: `rw.weights.stare_update` makes the weight "
            "of the next step.",
        ),
    ),
    Recipe(
        name="capo",
        entry="rw.schedules.capo",
        advantages=GRPO,
        spec="rw.methods.grpo()",
        keywords={
            "completion_mask": "rw.schedules.capo(advantages, completion_mask, step=step, "
            "switch_step=total_steps // 5)",
            "denominator_mask": "completion_mask",
        },
        settings=published(PAPER, switch_step="10 to 30 % of the training"),
        rollout=(
            "It combines with any advantage estimator and any loss. The paper tries several.",
        ),
    ),
    Recipe(
        name="d3s",
        entry="rw.sample_weights.d3s",
        schedule="rw.schedules.d3s(step / total_steps, num_samples=(4, 8), token_fraction=(0.2, "
        "1.0))",
        advantages=GRPO,
        sample_weights="rw.sample_weights.d3s(advantages, num_samples=schedule.num_samples)",
        spec="rw.methods.grpo().with_weight(rw.weights.DualLevelDownSampling("
        "fraction=schedule.token_fraction, entropies=entropies))",
        keywords={"completion_mask": "completion_mask * sample_weights[:, None]"},
        settings=published(EXAMPLE, num_samples="(4, 8)", token_fraction="(0.2, 1.0)"),
        rollout=(
            "The budget of samples is for this call: scale it with the number of completions.",
        ),
    ),
    Recipe(
        name="dapo",
        entry="rw.sample_weights.dynamic_sampling",
        advantages=GRPO,
        sample_weights="rw.sample_weights.dynamic_sampling(correct, group_size=group_size)",
        spec="rw.methods.dapo()",
        keywords={"completion_mask": "completion_mask * sample_weights[:, None]"},
        settings=published(
            f"{SCRIPT} (verl's recipe, Qwen2.5-32B)",
            epsilon_low=0.2,
            epsilon_high=0.28,
            beta=0,
            num_generations=16,
            temperature=1,
            learning_rate="1e-6",
            overlong_buffer="4096 tokens of 20480, penalty 1",
        ),
        rollout=(
            "Prompts are sampled again, at most 10 times, until the batch is full. Here the "
            "prompts that are left out are only missing from the loss.",
            "Soft overlong punishment is part of the rewards: from 0 to -1 over the last 4096 "
            "tokens of the budget. `correct` does not include it.",
        ),
    ),
    Recipe(
        name="tw_grpo",
        entry="rw.weights.tw_grpo",
        rewards="rw.rewards.soft_multi_choice(chosen_options, right_options) + rewards",
        advantages=GRPO,
        spec="rw.methods.dapo()",
        loss="rw.policy_loss(policy(batch), completion_ids, advantages, spec=spec, "
        "completion_mask=completion_mask, "
        "old_per_token_logps=old_per_token_logps, "
        "token_weights=rw.weights.tw_grpo(policy(batch), completion_mask, max_weight=1.7, "
        "group_size=group_size)).loss",
        settings=published(
            SCRIPT,
            max_weight=1.7,
            epsilon_low=0.2,
            epsilon_high=0.28,
            beta=0,
            num_generations=8,
            temperature=0.9,
            learning_rate="1e-6",
            max_grad_norm=20,
        ),
        rollout=(
            "`rewards` are the format rewards, which are added. Questions with one right option "
            "are first inverted into questions with several.",
            "The ratio is always 1 in the authors' code, which makes one update per rollout.",
            "The weights come from the same logits as the loss: keep `policy(batch)` rather than "
            "compute it twice.",
        ),
    ),
    Recipe(
        name="clip_cov",
        entry="rw.methods.clip_cov",
        advantages=GRPO,
        spec="rw.methods.clip_cov()",
        settings=published(
            VERL, fraction=0.0002, lower=1, upper=5, epsilon_low=0.2, epsilon_high=0.2
        ),
    ),
    Recipe(
        name="kl_cov",
        entry="rw.methods.kl_cov",
        advantages=GRPO,
        spec="rw.methods.kl_cov()",
        settings=published(VERL, fraction=0.0002, kl_coef=1),
    ),
    Recipe(
        name="dppo_tv",
        entry="rw.methods.dppo_tv",
        advantages=GRPO,
        spec="rw.methods.dppo_tv()",
        settings=published(VERL, divergence_low=0.2, divergence_high=0.2, ratio_max=20),
    ),
    Recipe(
        name="dppo_kl",
        entry="rw.methods.dppo_kl",
        advantages=GRPO,
        spec="rw.methods.dppo_kl()",
        settings=published(VERL, divergence_low=0.2, divergence_high=0.2, ratio_max=20),
    ),
    Recipe(
        name="gspo",
        entry="rw.methods.gspo",
        advantages=GRPO,
        spec="rw.methods.gspo()",
        settings=published(f"{PAPER}, section 5.1", epsilon_low=0.0003, epsilon_high=0.0004),
    ),
    Recipe(
        name="gspo_token",
        entry="rw.methods.gspo_token",
        advantages=GRPO,
        spec="rw.methods.gspo_token()",
        settings=published(f"{PAPER}, section 5.1", epsilon_low=0.0003, epsilon_high=0.0004),
    ),
    Recipe(
        name="sequence_tis",
        entry="rw.weights.SequenceTruncatedImportance",
        advantages=GRPO,
        spec="rw.methods.grpo().with_weight(rw.weights.SequenceTruncatedImportance(ratio_max=3.0))",
        settings=published("TRL's default", ratio_max=3),
        rollout=_MISMATCH,
    ),
    Recipe(
        name="mis",
        entry="rw.weights.SequenceMaskedImportance",
        advantages=GRPO,
        spec="rw.methods.grpo().with_weight(rw.weights.SequenceMaskedImportance(ratio_max=3.0))",
        settings=published("TRL's default", ratio_max=3),
        rollout=_MISMATCH,
    ),
    Recipe(
        name="geometric_mask",
        entry="rw.weights.GeometricSequenceMask",
        advantages=GRPO,
        spec="rw.methods.grpo().with_weight(rw.weights.GeometricSequenceMask(ratio_min=0.9, "
        "ratio_max=1.1))",
        settings=published(EXAMPLE, ratio_min=0.9, ratio_max=1.1),
        rollout=_MISMATCH,
    ),
    Recipe(
        name="m2po",
        entry="rw.methods.m2po",
        advantages=GRPO,
        spec="rw.methods.m2po()",
        settings=published(SCRIPT, budget=0.04, least_low=0.3, least_high=0.5),
    ),
    Recipe(
        name="m2_mask",
        entry="rw.weights.SecondMomentMask",
        advantages=GRPO,
        spec="rw.methods.decoupled_ppo().with_weight(rw.weights.SecondMomentMask())",
        settings=published("the paper's budget", threshold=0.04),
        rollout=(
            "`old_per_token_logps` are the proximal policy's, `sampling_per_token_logps` those "
            "of the policy that wrote the tokens.",
        ),
    ),
    Recipe(
        name="fipo",
        entry="rw.methods.fipo",
        advantages=GRPO,
        spec="rw.methods.fipo()",
        settings=published(
            "ms-swift's default", half_life=32, weight_min=1, weight_max=1.2, safety_ratio=4
        ),
    ),
)
