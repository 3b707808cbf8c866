"""Recipes of losses and corrections for data that another policy wrote: a stale one, a
sampler of other numerics, or one that a teacher grades.
"""

from __future__ import annotations

from .._core.catalogue.recipes import Recipe
from .sources import EXAMPLE, GRPO, PAPER, SCRIPT, published

_CENTERED = "rw.advantages.dr_grpo(rewards, group_size=group_size)"
_SAMPLER = {"old_per_token_logps": "sampling_per_token_logps"}
_TEACHER = ("`ref_per_token_logps` are the teacher's, on the tokens that the policy sampled.",)
_MISMATCH = (
    "The sampler's log-probs are those of the distribution that it sampled from, after its "
    "temperature and truncation.",
)
_PROXIMAL = (
    "Pass the sampler's log-probs as the old ones. The ratio then has staleness and mismatch "
    "together.",
)

ALL = (
    Recipe(
        name="topr",
        entry="rw.methods.topr",
        advantages=_CENTERED,
        spec="rw.methods.topr()",
        rollout=(
            "The paper's rewards are 1 and -1, less a baseline that sets how much wrong "
            "responses count.",
        ),
    ),
    Recipe(
        name="dro",
        entry="rw.methods.dro",
        advantages=_CENTERED,
        spec="rw.methods.dro(beta=0.1)",
        settings=published(EXAMPLE, beta=0.1),
    ),
    Recipe(
        name="kimi_opmd",
        entry="rw.methods.kimi_opmd",
        advantages=_CENTERED,
        spec="rw.methods.kimi_opmd()",
        settings=published("ROLL's default", tau=0.1),
    ),
    Recipe(
        name="glm5",
        entry="rw.methods.glm5",
        advantages=GRPO,
        spec="rw.methods.glm5()",
        keywords=_SAMPLER,
        settings=published(EXAMPLE, epsilon_low=0.2, epsilon_high=0.2),
        rollout=_PROXIMAL,
    ),
    Recipe(
        name="prime_rl",
        entry="rw.methods.prime_rl",
        advantages=_CENTERED,
        spec="rw.methods.prime_rl()",
        keywords=_SAMPLER,
        settings=published(
            "prime-rl's default", mask="dppo", mask_low=0.2, mask_high=0.2, kl_tau=0.001
        ),
        rollout=_PROXIMAL,
    ),
    Recipe(
        name="two_sided_clip",
        entry="rw.methods.two_sided_clip",
        advantages=GRPO,
        spec="rw.methods.two_sided_clip(delta=4.0)",
        settings=published(EXAMPLE, delta=4, epsilon=0.2),
    ),
    Recipe(
        name="scale_rl",
        entry="rw.methods.scale_rl",
        advantages='rw.advantages.grpo(rewards, scale_rewards="batch", group_size=group_size)',
        spec="rw.methods.scale_rl(group_size=group_size)",
        settings=published("TRL's documentation", ratio_max=5, num_generations=16),
        rollout=(
            "Logits are in fp32. Prompts whose responses all have one reward are left out: "
            "`sample_weights.dynamic_sampling`.",
        ),
    ),
    Recipe(
        name="vapo",
        entry="rw.methods.vapo",
        advantages="rw.advantages.decoupled_gae(rewards, values, completion_mask).advantages",
        spec="rw.methods.vapo(correct=correct)",
        rollout=("The critic is pretrained, and its targets have λ = 1.",),
    ),
    Recipe(
        name="ctpo",
        entry="rw.methods.ctpo",
        advantages=GRPO,
        spec="rw.methods.ctpo()",
        settings=published(
            SCRIPT, log_clip_low=0.025, log_clip_high=0.05, log_clip_c=0.05, power=0.5
        ),
    ),
    Recipe(
        name="real",
        entry="rw.methods.real",
        advantages="2 * correct - 1",
        spec="rw.methods.real(group_size=group_size)",
        settings=published("ms-swift's default", tau=0.5, beta=0),
        rollout=("Only the sign of the advantages counts: they are the labels.",),
    ),
    Recipe(
        name="fipo_weight",
        entry="rw.weights.FutureInfluence",
        advantages=GRPO,
        spec="rw.methods.dapo().with_weight(rw.weights.FutureInfluence())",
        settings=published(
            "ms-swift's default", half_life=32, weight_min=1, weight_max=1.2, safety_ratio=4
        ),
    ),
    Recipe(
        name="tis",
        entry="rw.weights.TruncatedImportance",
        advantages=GRPO,
        spec="rw.methods.grpo().with_weight(rw.weights.TruncatedImportance(ratio_max=2.0))",
        settings=published("the post's runs", ratio_max=2),
        rollout=_MISMATCH,
    ),
    Recipe(
        name="icepop",
        entry="rw.weights.MaskedImportance",
        advantages=GRPO,
        spec="rw.methods.grpo().with_weight(rw.weights.MaskedImportance(ratio_min=0.5, "
        "ratio_max=2.0))",
        settings=published(EXAMPLE, ratio_min=0.5, ratio_max=2),
        rollout=_MISMATCH,
    ),
    Recipe(
        name="divergence_gate",
        entry="rw.weights.divergence_gate",
        advantages=GRPO,
        spec="rw.methods.ppo().with_weight(rw.weights.divergence_gate(threshold=0.01))"
        ".with_weight(rw.weights.TruncatedImportance(ratio_max=1e6))",
        settings=published(EXAMPLE, threshold=0.01),
        rollout=_MISMATCH,
    ),
    Recipe(
        name="trm",
        entry="rw.weights.trm",
        advantages=GRPO,
        spec="rw.methods.ppo().with_weight(rw.weights.trm(threshold=0.05))",
        keywords=_SAMPLER,
        settings=published(EXAMPLE, threshold=0.05),
        rollout=_PROXIMAL,
    ),
    Recipe(
        name="opsm",
        entry="rw.methods.opsm",
        advantages=GRPO,
        spec="rw.methods.opsm(threshold=0.5)",
        settings=published("TRL's documentation", threshold=0.5),
    ),
    Recipe(
        name="vespo",
        entry="rw.methods.vespo",
        advantages=GRPO,
        spec="rw.methods.vespo()",
        keywords=_SAMPLER,
        settings=published("TRL's default", k_pos=2, lambda_pos=3, k_neg=3, lambda_neg=2),
        rollout=_PROXIMAL,
    ),
    Recipe(
        name="gmpo",
        entry="rw.methods.gmpo",
        advantages=GRPO,
        spec="rw.methods.gmpo()",
        settings=published(SCRIPT, epsilon_low=0.4, epsilon_high=0.4),
    ),
    Recipe(
        name="tr_grpo",
        entry="rw.weights.TokenRegulation",
        advantages=GRPO,
        spec="rw.methods.grpo().with_weight(rw.weights.TokenRegulation(alpha=2.0, tau=1.0, "
        "mu=0.25, lower=0.5, upper=1.0))",
        settings=published(EXAMPLE, alpha=2, tau=1, mu=0.25, lower=0.5, upper=1),
    ),
    Recipe(
        name="stapo",
        entry="rw.weights.SpuriousTokens",
        advantages=GRPO,
        spec="rw.methods.dapo().with_weight(rw.weights.SpuriousTokens())"
        ".replace(reduction=rw.TokenMean(weight=rw.weights.SpuriousTokens()))",
        settings=published(
            f"{PAPER}, later versions",
            probability=0.002,
            entropy_quantile=0.75,
            epsilon_low=0.2,
            epsilon_high=0.28,
            num_generations=8,
            learning_rate="1e-6",
        ),
    ),
    Recipe(
        name="gtpo",
        entry="rw.weights.gtpo",
        advantages="rw.weights.gtpo(entropies, correct, completion_mask, group_size=group_size)",
        spec="rw.methods.dapo()",
    ),
    Recipe(
        name="rlsd",
        entry="rw.weights.SelfDistilledEvidence",
        advantages=GRPO,
        spec="rw.methods.grpo().with_weight(rw.weights.SelfDistilledEvidence())",
        settings=published("ms-swift's default", mixing=0.5, epsilon=0.2),
        rollout=("`ref_per_token_logps` are of the policy itself once it has seen the answer.",),
    ),
    Recipe(
        name="sdar",
        entry="rw.methods.sdar",
        advantages=GRPO,
        spec="rw.methods.sdar()",
        settings=published(
            "ms-swift, after the authors' code", coef="0.1 (0.01 for ALFWorld)", gate_beta=5
        ),
        rollout=_TEACHER,
    ),
    Recipe(
        name="opd",
        entry="rw.methods.opd",
        spec="rw.methods.opd()",
        keywords=_SAMPLER,
        rollout=_TEACHER,
    ),
    Recipe(
        name="iw_opd",
        entry="rw.methods.iw_opd",
        spec="rw.methods.iw_opd()",
        keywords=_SAMPLER,
        settings=published("TRL's default", gamma=1),
        rollout=_TEACHER,
    ),
    Recipe(
        name="f_distill",
        entry="rw.weights.f_distill",
        spec="rw.methods.opd().with_weight(rw.weights.f_distill())",
        keywords=_SAMPLER,
        rollout=_TEACHER,
    ),
    Recipe(
        name="adaptive_entropy",
        entry="rw.schedules.AdaptiveEntropy",
        setup={
            "control": "rw.schedules.AdaptiveEntropy()",
            "state": "control.init()",
            "coef": "state.coef",
        },
        advantages=GRPO,
        loss="rw.policy_loss(policy(batch), completion_ids, advantages, "
        "spec=rw.methods.dapo(entropy_coef=coef), "
        "completion_mask=completion_mask, old_per_token_logps=old_per_token_logps).loss",
        after={"state, coef": "control.update(state, entropies[completion_mask != 0].mean())"},
        settings=published(SCRIPT, target_entropy=0.2, step="1e-4", coef_max=0.005),
    ),
)
