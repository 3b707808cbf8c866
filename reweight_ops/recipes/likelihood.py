"""Recipes without rewards: likelihood, unlearning, pairs, and distributions of a
teacher.
"""

from __future__ import annotations

from .._core.catalogue.recipes import Recipe
from .sources import EXAMPLE, PAPER, SCRIPT, published

_PAIRS = (
    "rw.preference_loss(policy(batch), completion_ids, spec=spec, "
    "completion_mask=completion_mask{}).loss"
)
_REFERENCE = ", ref_per_token_logps=ref_per_token_logps"
_HALVES = ("A batch has all chosen completions, then all rejected ones.",)
_MEAN = (
    "rw.divergences.ldr(policy(batch), completion_ids, "
    "completion_mask=completion_mask{}).sum() / completion_mask.sum()"
)

ALL = (
    Recipe(name="sft", entry="rw.methods.sft", spec="rw.methods.sft()"),
    Recipe(
        name="comp_sum",
        entry="rw.methods.comp_sum",
        spec="rw.methods.comp_sum(tau=1.5)",
        settings=published(EXAMPLE, tau=1.5),
    ),
    Recipe(name="mae", entry="rw.methods.mae", spec="rw.methods.mae()"),
    Recipe(
        name="ldam_drw",
        entry="rw.methods.ldam",
        schedule="rw.schedules.drw(step, switch_epoch=total_steps * 4 // 5, beta=0.9999)",
        sample_weights="rw.sample_weights.class_balanced(completion_ids, class_counts, "
        "beta=schedule)",
        loss="rw.policy_loss(policy(batch), completion_ids, None, "
        "spec=rw.methods.ldam(margin=0.5 * (class_counts.min() / class_counts[completion_ids]) "
        "** 0.25)"
        ".replace(reduction=rw.TokenMean(weight=rw.weights.Precomputed(values=sample_weights))), "
        "completion_mask=completion_mask).loss",
        settings=published(
            SCRIPT, max_margin=0.5, scale=30, beta=0.9999, switch_epoch="160 of 200"
        ),
        rollout=(
            "A class is a token. Margins are 0.5 for the rarest, and fall with the fourth root "
            "of the count.",
            "The authors' logits are cosines, times a scale of 30 after the margin: "
            "`temperature=1/30` with margins times 30.",
        ),
    ),
    Recipe(
        name="dft",
        entry="rw.methods.dft",
        spec="rw.methods.dft()",
        settings=published("TRL's documentation", learning_rate="5e-5"),
    ),
    Recipe(
        name="dynamic_loss_reweighting",
        entry="rw.sample_weights.dynamic_loss_reweighting",
        schedule="rw.schedules.dynamic_loss_reweighting(step, temperature=0.4)",
        sample_weights="rw.sample_weights.dynamic_loss_reweighting("
        "-(old_per_token_logps * completion_mask).sum(-1) / lengths, temperature=schedule)",
        spec="rw.methods.sft()",
        settings=published(SCRIPT, strategy="linupper", temperature="0.4 or 1", burn_in_steps=1000),
        rollout=(
            "`old_per_token_logps` are the model's before the step: the weights are of its "
            "losses on this batch, over all ranks.",
        ),
    ),
    Recipe(
        name="upweight",
        entry="rw.sample_weights.upweight",
        sample_weights="rw.sample_weights.upweight(source_ids, source_counts, temperature=3.3)",
        spec="rw.methods.sft()",
        settings=published(EXAMPLE, temperature=3.3),
        rollout=(
            "Samples are drawn uniformly. For the cooldown, lower the temperature during training.",
        ),
    ),
    Recipe(
        name="kl_dro",
        entry="rw.sample_weights.kl_dro",
        sample_weights="rw.sample_weights.kl_dro(-(old_per_token_logps * "
        "completion_mask).sum(-1) / lengths, temperature=1.0)",
        spec="rw.methods.sft()",
        settings=published(EXAMPLE, temperature=1),
        rollout=("`old_per_token_logps` are the model's before the step.",),
    ),
    Recipe(
        name="kd",
        entry="rw.divergences.kd",
        loss="rw.divergences.kd(policy(batch), teacher_logits, completion_ids, alpha=0.5, "
        "kd_temperature=2.0, completion_mask=completion_mask).sum()"
        " / completion_mask.sum()",
        settings=published(
            f"{PAPER}, section 4.1 (speech)",
            alpha='0.5 ("a relative weight", of the labels)',
            kd_temperature="1, 2, 5 and 10 tried; 2 here",
        ),
        rollout=("`teacher_logits` need no gradient.",),
    ),
    Recipe(
        name="superhf",
        entry="rw.divergences.superhf",
        sample_weights="rw.sample_weights.raft(rewards, keep=1, group_size=group_size)[:, None] * "
        "completion_mask",
        loss="rw.divergences.superhf(policy(batch), teacher_logits, completion_ids, beta=0.35, "
        "completion_mask=sample_weights).sum() / sample_weights.sum()",
        settings=published(
            SCRIPT,
            superbatch_size="16 completions of a prompt",
            completion_filter_top_k=1,
            kl_coefficient=0.35,
            learning_rate="2e-5",
            temperature=1,
            top_p=0.95,
        ),
        rollout=(
            "`teacher_logits` come from the model before the training. They need no gradient.",
            "One gradient step per sampled batch: completions are then sampled again.",
        ),
    ),
    Recipe(
        name="gradient_ascent",
        entry="rw.methods.gradient_ascent",
        spec="rw.methods.gradient_ascent()",
        rollout=("A batch holds texts to forget. The loss is unbounded below: stop early.",),
    ),
    Recipe(
        name="grad_diff",
        entry="rw.methods.grad_diff",
        advantages="labels",
        spec="rw.methods.grad_diff(gamma=1.0)",
        settings=published(EXAMPLE, gamma=1),
        rollout=("A batch holds texts to forget and texts to retain.",),
    ),
    Recipe(
        name="dpo_gamma",
        entry="rw.preference.dpo_gamma",
        spec="rw.preference.dpo_gamma(gamma=0.5)",
        loss=_PAIRS.format(_REFERENCE),
        settings=(*published(PAPER, gamma="0 to 2"), *published(EXAMPLE, gamma=0.5)),
        rollout=_HALVES,
    ),
    Recipe(
        name="unlikelihood",
        entry="rw.preference.unlikelihood",
        spec="rw.preference.unlikelihood()",
        loss=_PAIRS.format(_REFERENCE),
        rollout=_HALVES,
    ),
    Recipe(
        name="no_sft_ratio_w_unlikelihood",
        entry="rw.preference.no_sft_ratio_w_unlikelihood",
        spec="rw.preference.no_sft_ratio_w_unlikelihood()",
        loss=_PAIRS.format(""),
        rollout=_HALVES,
    ),
    Recipe(
        name="uda",
        entry="rw.divergences.confidence_masked_kl",
        schedule="rw.schedules.tsa(step / total_steps, num_classes=vocab_size)",
        spec="rw.methods.sft().replace(reduction=rw.TokenMean(weight=rw.weights.TrainingSignalAnnealing(threshold=schedule)))",
        loss="rw.policy_loss(policy(batch), completion_ids, None, spec=spec, "
        "completion_mask=completion_mask).loss"
        " + rw.divergences.confidence_masked_kl(policy(augmented), teacher_logits, "
        "threshold=0.8, sharpening_temperature=0.4).mean()",
        settings=published(EXAMPLE, threshold=0.8, sharpening_temperature=0.4),
        rollout=(
            "`teacher_logits` are the policy's own, without gradient, on the texts before "
            "augmentation.",
        ),
    ),
    Recipe(
        name="ldr",
        entry="rw.divergences.ldr",
        loss=_MEAN.format(""),
        settings=published(SCRIPT, margin=0.1, lambda_="1 (10 to choose from)"),
        rollout=(
            "The authors rescale the logits first: softplus over its mean, or over the mean "
            "absolute value.",
        ),
    ),
    Recipe(
        name="aldr",
        entry="rw.divergences.aldr",
        loss=_MEAN.format(", lambda_=lambdas"),
        after={
            "batch.lambdas": "rw.divergences.aldr("
            "rw.token_logps(policy(batch), completion_ids, temperature=lambdas, "
            "return_entropy=True)[1], vocab_size, lambda0=1.0, alpha=2.0)"
        },
        settings=(*published(SCRIPT, alpha=2), *published(EXAMPLE, lambda0=1)),
        rollout=("Each example keeps its λ from epoch to epoch. λ starts at λ₀.",),
    ),
)
