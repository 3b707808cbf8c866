"""slime's policy loss without parallelism, transcribed from THUDM/slime at 624b824a:
``slime/backends/megatron_utils/{loss,cp_utils}.py`` and
``slime/utils/ppo_utils.py``. Log-probs and entropies are of the response's tokens,
sample by sample.
"""

import torch


def reducer(response_lengths, loss_masks, denominators, per_token):
    """``get_sum_of_sample_mean``: each sample's sum over its rollout's tokens, or the
    plain sum.
    """

    def sum_of_sample_mean(x):
        parts = zip(x.split(response_lengths), loss_masks, denominators, strict=True)
        return sum(
            (xi * mi).sum() / (1 if per_token else torch.clamp_min(d, 1)) for xi, mi, d in parts
        )

    return sum_of_sample_mean


def policy_loss(args, batch, logits, reduce):
    logits = logits.squeeze(0) / args.rollout_temperature
    logps, entropies, end = [], [], 0
    for i, (tokens, total, response) in enumerate(
        zip(
            batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"], strict=True
        )
    ):
        end += total
        own = logits[end - response - 1 : end - 1]
        rows = own.log_softmax(-1)
        entropies.append(-(rows.exp() * rows).sum(-1))
        if args.rollout_top_p != 1.0:  # the keep mask is of the log-probs alone
            keep = torch.zeros_like(own, dtype=torch.bool)
            ids, offsets = (
                batch["rollout_top_p_token_ids"][i],
                batch["rollout_top_p_token_offsets"][i],
            )
            for r in range(response):
                keep[r, ids[offsets[r] : offsets[r + 1]].long()] = True
            rows = own.masked_fill(~keep, -torch.inf).log_softmax(-1)
        logps.append(rows.gather(-1, tokens[-response:, None])[:, 0])
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old = old or [x.detach() for x in logps]
    advantages, masks = torch.cat(batch["advantages"]), batch["loss_masks"]
    sequence_kl = [
        ((o - x) * m).sum() / torch.clamp_min(m.sum(), 1)
        for o, x, m in zip(old, logps, masks, strict=True)
    ]
    ppo_kl = torch.cat([k.expand_as(x) for k, x in zip(sequence_kl, logps, strict=True)])
    flat, before = torch.cat(logps), torch.cat(old)
    if args.advantage_estimator != "gspo":
        ppo_kl = before - flat
    ratio, high = (-ppo_kl).exp(), args.eps_clip_high
    if args.advantage_estimator == "cispo":
        kept = ratio.clamp(1 - args.eps_clip, 1 + high)
        pg, clipped = -kept.detach() * advantages * flat, (kept != ratio).float()
    else:
        one, two = -ratio * advantages, -ratio.clamp(1 - args.eps_clip, 1 + high) * advantages
        pg, clipped = torch.maximum(one, two), (two > one).float()
        if args.eps_clip_c is not None:
            pg = torch.where(advantages < 0, torch.min(-args.eps_clip_c * advantages, pg), pg)
    if args.use_opsm:
        masked = [
            (a < 0) & (k > args.opsm_delta)
            for a, k in zip(batch["advantages"], sequence_kl, strict=True)
        ]
        pg = pg * (1 - torch.cat(masked).float())
    if args.use_tis:
        weights = (torch.cat(batch["log_probs"]) - torch.cat(batch["rollout_log_probs"])).exp()
        pg = pg * weights.clamp(args.tis_clip_low, args.tis_clip)
    entropy = reduce(torch.cat(entropies))
    loss = reduce(pg) - args.entropy_coef * entropy
    metrics = {
        "pg_loss": reduce(pg),
        "entropy_loss": entropy,
        "pg_clipfrac": reduce(clipped),
        "ppo_kl": reduce(ppo_kl),
    }
    if args.use_kl_loss:
        d = flat - torch.cat(batch["ref_log_probs"])
        kl = {"k1": d, "k2": d**2 / 2}.get(args.kl_loss_type, (-d).exp() - 1 + d)
        if args.use_unbiased_kl:
            kl = torch.exp(flat - before) * kl
        if args.kl_loss_type == "low_var_kl":
            kl = kl.clamp(-10, 10)
        metrics["kl_loss"] = reduce(kl)
        loss = loss + args.kl_loss_coef * metrics["kl_loss"]
    metrics["train_rollout_logprob_abs_diff"] = reduce(
        (
            (flat if args.use_rollout_logprobs else before) - torch.cat(batch["rollout_log_probs"])
        ).abs()
    )
    return loss, {"loss": loss} | metrics
