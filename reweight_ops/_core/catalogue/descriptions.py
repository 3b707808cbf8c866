"""What ``help`` says of an argument: one table for all that take one of that name, one
for each kind of entry, and one for each class or function of its own meaning.

B completions, T tokens of each.
"""

DESCRIPTIONS: dict[str, dict[str, str]] = {
    # whoever takes an argument of that name
    "": {
        "advantages": "``[B]`` or ``[B, T]``.",
        "against": "The denominator of the ratio: ``old`` or ``ref``.",
        "amplify": "0-d, the weight of surprising tokens.",
        "anchor_ids": "``[B]``, the state in which each step was taken.",
        "answers": "``[B, K]``, nonzero where an option was chosen.",
        "backend": "``auto``, or the name of one, which then never falls back.",
        "backends": "Why each other backend would not be taken; None if it could be.",
        "bias": "``[V]``, or whether there is one.",
        "certainty": "How the formula was found: ``verified``, ``secondary`` or ``derived``.",
        "class_counts": "``[K]``, the number of samples of each class.",
        "clip_ratio_c": "The bound of the dual clip, for negative advantages.",
        "completion_ids": "``[B, T]``, int32 or int64.",
        "completion_mask": "``[B, T]``; 0 marks an ignored token.",
        "consume_logits": "Write the gradient over the logits.",
        "correct": "``[B]``, nonzero where a completion is right.",
        "damp": "0-d, the weight of the others.",
        "detach": "Whether no gradient flows through the weight.",
        "device": "Where tensors are made.",
        "drop_last": "Logits have one more position than rows.",
        "dtype": "The dtype of the tensors.",
        "entropies": "One per token, of the policy that sampled; default: the current ones.",
        "entropy_coef": "The coefficient of the entropy bonus.",
        "entropy_over": "Only with ``sampling_mask``.",
        "episode_ids": "``[B]``, each step's episode.",
        "episode_rewards": "``[E]``, one per episode.",
        "epsilon_high": "The ratio's upper bound is 1 plus this.",
        "epsilon_low": "The ratio's lower bound is 1 minus this.",
        "example": "Values for arguments without a default.",
        "f_divergence_type": "TRL's option of that name.",
        "format_rewards": "``[B]``, for the format of a completion.",
        "full_name": "The name as the paper prints it.",
        "gradient": "``sequence``, or ``token`` for a gradient by each token's own ratio.",
        "gradients": "``[K, P]``, one flat gradient per objective.",
        "greedy_rewards": "``[B]``, the reward of the greedy completion of the same prompt.",
        "group_ids": "``[B]``, each completion's group, in ``[0, num_groups)``; instead of "
        "``group_size``.",
        "group_size": "The number of completions in a group; they are consecutive.",
        "groups": "The sequence of each row.",
        "importance_sampling_level": "TRL's option of that name: ``token`` or ``sequence``.",
        "importance_sampling_ratio": "``[B, T]``, each token's ratio to the sampler; None means 1.",
        "inputs": "The caller's inputs per pair, ``[P]``, by name.",
        "keep": "Bool: 1 where there is a valid row.",
        "kind": "One of the kinds above.",
        "kl_estimator": "``k1`` or ``k3``.",
        "kl_loss_type": "verl's option of that name.",
        "layout": "``halves`` or ``interleaved``.",
        "lengths": "``[B]``, the number of tokens of each completion.",
        "log_sum_p_sq": "``[B, T]``, the logarithm of the sum of squared probabilities "
        "(``token_stats``).",
        "logits": "``R + (V,)``.",
        "lora": "A :class:`Lora` on the head; None: no adapter.",
        "loss_mode": "verl's option of that name.",
        "loss_type": "TRL's option of that name, or several.",
        "losses": "``[B]``, one per sample.",
        "mask": "``[B, T]``; 0 marks an ignored token.",
        "max_logps": "``[B, T]``, the log-prob of each position's likeliest token.",
        "name": "The name that messages, metrics and the catalogue have.",
        "num_groups": "The number of groups, an int; memory grows with it, also of empty ones.",
        "old_logps": "``[B, T]``, log-probs of the policy that sampled.",
        "old_per_token_logps": "``[B, T]``, log-probs of the policy that sampled.",
        "one_pass_unsupported_reason": "Why one pass is not possible; None if it is.",
        "options": "Hyper-parameters of the method.",
        "other_softcap": "The soft cap of the second logits; default: none.",
        "other_temperature": "The temperature of the second distribution; default: the first "
        "one's.",
        "outcome_rewards": "``[B]``, for the answer.",
        "parents": "``[N]``, each node's parent; -1 for a root.",
        "per_token_logps": "``[B, T]``, log-probs of the policy.",
        "plan": "``one_pass`` or ``two_pass``.",
        "previous_rewards": "``[B]``, the rewards of the step before.",
        "process_group": "The ranks that share the columns of one vocabulary. If it is refused, "
        "the message says why.",
        "ref_logps": "``[P]``, the sums under the reference model.",
        "ref_per_token_logps": "``[B, T]``, log-probs of the reference model.",
        "reference_rewards": "``[B]``, rewards of the reference model's completions.",
        "rewards": "``[B]``, one per completion, or ``[B, T]``, one per token, as the formula "
        "says; NaN means no score.",
        "sampling_mask": "Refused, because a divergence compares two whole distributions.",
        "scale_rewards": "Whether, or by which spread, differences of rewards are divided.",
        "scope": "The terms of the loss that it multiplies: ``surrogate`` or ``all``.",
        "scores": "``[P]``, before β.",
        "sequences": "The sequences of the call.",
        "settings": "Keywords of the function of the same task, for every call.",
        "singleton": "The advantage of a group of one: ``zero`` or ``reward``.",
        "size": "The number of sequences in a pair or list.",
        "softcap": "The cap of a tanh soft cap on the raw logits; None disables it.",
        "source_counts": "``[K]``, the number of samples of each source.",
        "source_ids": "``[B]``, the source of each sample.",
        "spec": "A spec, or the name of a method without required arguments.",
        "step_returns": "``[B]``, the return of each step.",
        "teacher_logits": "``R + (V,)``, detached.",
        "temperature": "A positive number, or a tensor as the formula says.",
        "text": "What is looked for.",
        "thinking_rewards": "``[B]``, for the reasoning.",
        "values": "The value of each position, from a critic or a tree.",
        "vocab_size": "The number of columns of the softmax, if the head is padded beyond them.",
        "zero_tail": "Whether the baseline is 0 where only the longest response of a group "
        "remains.",
    },
    "policy_loss": {
        "beta": "The coefficient of the KL to the reference model.",
    },
    "pair_loss": {
        "beta": "The factor of a score in its implicit reward.",
    },
    "advantage": {
        "epsilon": "What is added to a divisor, so that it is not 0.",
    },
    "DistillationLossOutput": {
        "loss": "0-d, with a gradient.",
        "per_token_divergence": "R, the divergence of each row, without weights.",
        "forward_kl": "R, KL(teacher‖student).",
        "reverse_kl": "R, KL(student‖teacher).",
        "entropies": "R, of the student.",
        "teacher_entropies": "R, of the teacher.",
        "backend": "The backend that was taken.",
        "plan": "The plan that was taken: ``one_pass`` or ``two_pass``.",
    },
    "Explanation": {
        "backend": "The backend that the call would take.",
        "plan": "The plan that the call would take: ``one_pass`` or ``two_pass``.",
        "kernel": "The backend's kernel, if it has several; else None.",
        "top_k": "How the likeliest ids are found, if the call asks for them; else None.",
    },
    "FromFunction": {
        "fn": "The reducer, linear in its first argument.",
    },
    "GeometricMeanRatio": {
        "epsilon_high": "The upper bound of a token's log-ratio where ``A > 0``.",
        "epsilon_low": "The lower bound of a token's log-ratio elsewhere is minus this.",
    },
    "GroupContrast": {
        "preference": "What ω comes from: ``length`` or ``advantages``.",
    },
    "HiddenLogits": {
        "hidden": "``R + (D,)``, the hidden states before the head.",
        "lm_head_weight": "``[V, D]``.",
        "lm_head_bias": "``[V]``; None: no bias.",
        "logit_scale": "The factor of all logits.",
        "logits_dtype": "The dtype of the logits; None: as in :func:`linear_token_logps`.",
    },
    "Lora": {
        "a": "``[r, D]``, the factor beside the hidden states.",
        "b": "``[V, r]``, the factor beside the logits.",
        "scale": "The factor of the product; PEFT's ``lora_alpha / r``.",
    },
    "Metrics": {
        "names": "The names of the M metrics.",
        "sums": "``[M, 2]``, numerators and denominators.",
        "values": "``[M]``, the quotients; None: they are divided when the first is read.",
    },
    "PairSpec": {
        "terms": "The losses of a pair and their coefficients.",
        "beta": "The factor of a score in its implicit reward.",
        "score": "How tokens become a sequence's score; None: ``LogRatio()``.",
        "weights": "The detached weights of a pair, which are multiplied.",
        "tokens": "Which tokens are read: ``completion`` or ``from_first_difference``.",
    },
    "Penalty": {
        "rule": "The formula of the penalty.",
        "reduction": "The row weights of this term; None: those of the spec.",
    },
    "PolicyLossOutput": {
        "teacher": "The divergences from the teacher, if the loss has such a term.",
        "loss": "0-d, with a gradient.",
        "per_token_logps": "R, the log-prob of each id.",
        "entropies": "R; None where the call does not compute them.",
        "backend": "The backend that was taken.",
        "plan": "The plan that was taken: ``one_pass`` or ``two_pass``.",
    },
    "PolicyLossSpec": {
        "surrogate": "The rule that reads the advantages; its coefficient is 1.",
        "penalties": "Further terms, each with its coefficient.",
        "ratio": "What the log-ratio of a row is; None: ``TokenRatio()``.",
        "weights": "The token weights, which are multiplied.",
        "reduction": "How rows become one loss; None: ``TokenMean()``.",
    },
    "PreferenceLossOutput": {
        "loss": "0-d, with a gradient.",
        "per_pair_loss": "``[P]``, the weighted terms; 0 in ignored pairs.",
        "weights": "``[P]``; None: the spec has no weights.",
        "chosen_rewards": "``[P]``, the implicit rewards of the chosen sequences.",
        "rejected_rewards": "``[P]``, the implicit rewards of the rejected sequences.",
        "chosen_logps": "``[P]``, the log-probs of the chosen sequences.",
        "rejected_logps": "``[P]``, the log-probs of the rejected sequences.",
        "per_token_logps": "R, the log-prob of each id.",
        "metrics": "A :class:`Metrics` with TRL's names.",
        "backend": "The backend that was taken.",
    },
    "Rule": {
        "args": "Hyper-parameters in the order of the rule's fields.",
        "keywords": "Hyper-parameters by name.",
    },
    "TokenWeight": {
        "args": "Hyper-parameters in the order of the weight's fields.",
        "keywords": "Hyper-parameters by name.",
    },
    "Recipe": {
        "name": "The name by which :func:`recipe` finds it.",
        "entry": "The call of the entry that the recipe is about. Its paper is the recipe's.",
        "spec": "The spec of the loss with its weights. Several specs follow one another, and "
        "each is a full update over the batch.",
        "schedule": "The values that change from step to step.",
        "rewards": "The transform of the rewards.",
        "advantages": "The advantage estimator.",
        "sample_weights": "One weight or choice per sample.",
        "loss": "The loss, if it is not :func:`reweight_ops.policy_loss` of that spec.",
        "keywords": "The further keywords of the loss.",
        "setup": "Assignments before the loop, for objects with a state.",
        "after": "Assignments at the end of the loop, for objects with a state.",
        "settings": "Hyper-parameters as published.",
        "rollout": "The steps at rollout, and other steps that are left to the caller.",
    },
    "SamplingMask": {
        "token_ids": "``[M]``, the kept ids of all rows, one row after another.",
        "offsets": "``[N + 1]``, where each row's ids start, and M at the end.",
    },
    "SequenceMean": {
        "per": "The number of a sequence: ``token_mean``, ``token_sum`` or ``constant``.",
        "count": "The sequences that the mean divides by: ``all`` or ``nonempty``.",
        "weight": "The token weight that selects the tokens; None: all.",
    },
    "TokenMean": {
        "weight": "The token weight that selects the tokens; None: all.",
    },
    "Teacher": {
        "logits": "The teacher's, as :class:`HiddenLogits` or ``R + (V,)``.",
        "coef": "The coefficient of the term.",
        "kind": "The divergence, as in :func:`token_divergence`.",
        "beta": "The mixture's weight, as in :func:`token_divergence`.",
        "temperature": "The teacher's; None: the policy's.",
        "softcap": "The teacher's soft cap; None: none.",
    },
    "TokenStats": {
        "logps": "R, the log-prob of the id.",
        "entropies": "R, in nats.",
        "lse": "R, the log-sum-exp of the scaled logits.",
        "log_sum_p_sq": "R, the logarithm of the sum of squared probabilities.",
        "max_logp": "R, the log-prob of the likeliest token.",
        "is_top1": "R, bool: the id is a likeliest token.",
        "log1m_p": "R, ``log(1 - p)`` of the id.",
        "mean_logits": "R, the mean of the scaled logits over the vocabulary.",
        "selected_logps": "``R + (K,)``, the log-probs of ``selected_ids``.",
        "topk_logps": "``R + (k,)``, the log-probs of ``topk_ids``.",
        "topk_ids": "``R + (k,)``, the likeliest ids, likeliest first.",
    },
    "TopKLogps": {
        "token_ids": "``R + (K,)``, the listed ids; -100 is padding.",
        "logps": "``R + (K,)``, their log-probs; -inf is padding.",
        "tail": "What becomes of the rest: ``bucket``, ``renormalize`` or ``ignore``.",
    },
    "advantages.Gae": {
        "advantages": "``[B, T]``, for the policy.",
        "returns": "``[B, T]``, the targets of the critic.",
    },
    "advantages.SpoSegments": {
        "segment_ids": "``[B, T]`` int64, the segment of each token.",
        "cuts": "``[B]`` int64, the number of cuts of each row.",
    },
    "advantages.whiten": {
        "x": "``[B, T]``, the values.",
    },
    "methods.published": {
        "arxiv": "The paper's arXiv id, or ``unknown``.",
        "paper": "The paper's title; None: ``titles.py`` has it.",
        "kind": "One of ``KINDS``; None: that of the module.",
        "level": "What one decision of the method is about: token, sequence, ...",
        "plan": "The plan that the method takes, if it is not found by itself.",
    },
    "methods.trl": {
        "beta": "The coefficient of the KL to the reference model.",
        "vllm_importance_sampling_mode": "TRL's option of that name; None: no correction.",
        "unused": "``error``, or ``ignore`` for options that the loss type does not read.",
    },
    "methods.verl": {
        "loss_agg_mode": "verl's option of that name.",
        "rollout_loss_type": "``ppo_clip`` or ``reinforce``.",
        "rollout_is": "``token`` or ``sequence``; None: no importance weight.",
        "unused": "``error``, or ``ignore`` for options that the mode does not read.",
    },
    "objectives.LagrangeState": {
        "multipliers": "``[K]``, before squashing.",
        "momentum": "``[K]``, of the multipliers' ascent.",
    },
    "objectives.RecapState": {
        "history": "``[2·window, K]``, the losses, latest last.",
        "seen": "0-d int64, the number of updates.",
    },
    "preference.ChosenNll": {
        "per": "The mean or sum: ``batch``, ``sequence`` or ``sum``.",
    },
    "preference.LogRatio": {
        "divergence": "TRL's name of the f-divergence.",
    },
    "preference.MaskNorm": {
        "mask": "The name of the mask's input.",
    },
    "preference.PairTerm": {
        "loss": "The loss of a pair.",
    },
    "preference.Pairs": {
        "beta": "The factor of a score in its implicit reward.",
        "sides": "The chosen and the rejected sequences; of lists, one side a rank.",
        "keep": "``[P]``, False for an ignored pair.",
    },
    "preference.Sequences": {
        "tokens": "Vectors ``[N]`` by name, 0 in ignored rows.",
        "given": "Sums ``[S]`` that the caller already had, by name.",
    },
    "preference.Side": {
        "logps": "``[P]``, summed as the score sums the tokens.",
        "sums": "``[P]``, the plain sums.",
        "lengths": "``[P]``, the number of tokens.",
        "old_logps": "``[P]``, the sums under the policy that sampled.",
    },
    "preference.from_first_difference": {
        "pairs": "``halves`` or ``interleaved``.",
    },
    "preference.mapo_masks": {
        "activations": "Tensors ``[B, T, D]``, of layers or hooks.",
    },
    "preference.rank_consistency": {
        "rewards": "``[N, G]``, of the G responses of each prompt.",
        "previous_rewards": "``[N, G]``, the rewards of the step before.",
    },
    "preference.trl": {
        "beta": "The factor of a score in its implicit reward.",
        "loss_weights": "The coefficient of each loss type; None: 1 each.",
    },
    "rewards.weighted_sum": {
        "weights": "``[K]``; None: 1 each.",
    },
    "schedules.AdaptiveEntropyState": {
        "coef": "0-d, before the target's gate.",
    },
    "schedules.BetaDpoState": {
        "gap_mean": "0-d, the running mean of the pairs' gaps.",
    },
    "schedules.D3sBudget": {
        "num_samples": "The number of samples to keep.",
        "token_fraction": "The fraction of their tokens to keep.",
    },
    "schedules.ReliftState": {
        "buffered": "The number of prompts that wait for the SFT step.",
    },
    "schedules.all_failed": {
        "rewards": "``[B]``, one per completion.",
        "groups": "``group_size``, or ``group_ids`` with ``num_groups``.",
    },
    "schedules.lopti_updates": {
        "mini_batches": "The mini-batches of one batch of rollouts.",
    },
    "weights.BatchStatistics": {
        "rows": "The rows of the call.",
    },
    "weights.StareState": {
        "gate": "0-d, 1 while the gate is open, else 0.",
    },
    "weights.stare_update": {
        "state": "The state before the update.",
        "entropy": "0-d, the batch's mean entropy.",
    },
    "policy_loss/a_star_po": {
        "beta": "The factor of the log-ratio.",
    },
    "policy_loss/advantage_reweighting": {
        "mode": "The form of the weight, by the name in the authors' code.",
        "probabilities": "Whose: ``old`` or ``current``.",
    },
    "policy_loss/awm": {
        "level": "What has a ratio: ``token`` or ``sequence``.",
    },
    "policy_loss/decoupled_ppo": {
        "mode": "What happens to a ratio above ``ratio_max``: ``truncate`` or ``mask``.",
    },
    "policy_loss/disco": {
        "score": "``log_likelihood`` or ``likelihood_ratio``.",
    },
    "policy_loss/dro": {
        "beta": "The strength of the quadratic term.",
    },
    "policy_loss/drpo": {
        "preference": "What ω comes from: ``length`` or ``advantages``.",
    },
    "policy_loss/gmpo": {
        "epsilon_high": "The upper bound of a token's log-ratio where ``A > 0``.",
        "epsilon_low": "The lower bound of a token's log-ratio elsewhere is minus this.",
    },
    "policy_loss/hapo": {
        "beta": "The strength of the redistribution.",
    },
    "policy_loss/kimi_opmd": {
        "level": "What has a log-ratio: ``sequence`` or ``token``.",
    },
    "policy_loss/kto": {
        "beta": "The factor of the log-ratio.",
    },
    "policy_loss/lopti": {
        "half": "The tokens of this update: ``low`` or ``high``.",
        "split": "What η is: a ``probability``, or a ``quantile`` of them.",
    },
    "policy_loss/npo": {
        "beta": "The factor of the log-ratio.",
        "level": "What has a log-ratio: ``sequence`` or ``batch``.",
    },
    "policy_loss/opsm": {
        "against": "What the drift is from: ``old`` or ``sampler``.",
    },
    "policy_loss/prime_rl": {
        "mask": "``dppo`` or ``ipo``.",
    },
    "policy_loss/topr": {
        "level": "What has a ratio: ``sequence`` or ``token``.",
    },
    "token_weight/divergence_gate": {
        "divergence": "``binary_kl`` or ``tv``.",
        "level": "What is dropped as a whole: ``sequence`` or ``token``.",
    },
    "token_weight/f_distill": {
        "divergence": "``forward_kl`` or ``jensen_shannon``.",
    },
    "token_weight/hapo_redistribution": {
        "beta": "The strength of the redistribution.",
    },
    "token_weight/steer": {
        "mapping": "From ``|Ω|`` to the weight: ``exponential`` or ``linear``.",
        "omega": "The published form of Ω: ``code`` or ``exact``.",
    },
    "token_weight/trm": {
        "divergence": "``k3``, ``k2`` or ``tv``.",
    },
    "advantage/a_star_po": {
        "beta": "The temperature of the optimal value.",
    },
    "advantage/canon": {
        "beta": "The offset that favours one half.",
        "metric": "``[B]``, what splits the group.",
        "metric_kind": "``entropy`` or ``length``.",
    },
    "advantage/edge_grpo": {
        "entropy": "``[B]``, the mean over each completion's tokens.",
    },
    "advantage/gdpo": {
        "rewards": "``[B, K]``; NaN marks a reward that does not apply.",
        "weights": "``[K]``; None: 1 each.",
    },
    "advantage/gigpo": {
        "norm": "``mean``, or ``std`` to divide by the deviation.",
    },
    "advantage/lens": {
        "importance": "``length_normalized`` or ``raw``.",
    },
    "advantage/spo_chain": {
        "segments": "The result of :func:`spo_segments`.",
    },
    "advantage/spo_tree": {
        "values": "``[N]``, the value of each node.",
        "scale": "``none``, or ``std`` to divide by the siblings' deviation.",
    },
    "reward": {
        "rewards": "``[B, K]``, K rewards of each completion.",
    },
    "reward/harmonic_mean": {
        "weights": "``[K]``; None: equal.",
    },
    "reward/weighted_mean": {
        "weights": "``[K]``, not negative; None: equal.",
    },
    "reward/traac": {
        "median_lengths": "``[B]``, the median for each row's difficulty.",
    },
    "objective/constrained_rlhf": {
        "squash": "``sigmoid``, ``tanh`` or ``none``.",
    },
    "sample_weight/class_balanced": {
        "beta": "β of the effective number of samples.",
        "labels": "``[...]`` int, the class of each sample or token.",
    },
    "sample_weight/dynamic_loss_reweighting": {
        "strategy": "``linupper``, ``quadratic``, ``upper`` or ``extremes``.",
    },
    "sample_weight/focal": {
        "likelihoods": "How common each sample is, in [0, 1].",
    },
    "sample_weight/glow": {
        "beta": "The steepness of the sigmoid.",
        "previous_losses": "``[B]``, those of the last epoch; None: the first epoch.",
    },
    "sample_weight/kl_tilt": {
        "beta": "The coefficient of the KL, which divides the rewards.",
    },
    "sample_weight/raft": {
        "keep": "The number of completions that a group keeps.",
    },
    "sample_weight/selective_rehearsal": {
        "keep": "The number of examples that a cluster keeps.",
        "scores": "``[B]``, from the reward or advantage model.",
    },
    "sample_weight/source_weights": {
        "normalize": "``softmax`` or ``softplus``.",
        "source_logits": "``[S]``, learned, one per source.",
    },
    "sample_weight/trajectory_aw": {
        "returns": "``[B]``, one per trajectory.",
        "start_values": "``[B]``, V(s_0) of each trajectory.",
    },
    "sample_weight/trajectory_rw": {
        "returns": "``[B]``, one per trajectory.",
    },
    "pair_loss/apo": {
        "anchor": "``zero`` or ``down``.",
    },
    "pair_loss/dpo": {
        "divergence": "TRL's name of the f-divergence.",
    },
    "pair_loss/f_dpo": {
        "divergence": "TRL's name of the f-divergence.",
    },
    "pair_loss/mcts_dpo": {
        "loss": "``conservative``, ``sigmoid`` or ``ipo``.",
    },
    "pair_loss/rpo": {
        "form": "``cumulative`` or ``average``.",
    },
    "divergence/superhf": {
        "beta": "The coefficient of the KL.",
        "reference_logits": "``R + (V,)``, of the model before the training.",
    },
    "schedule/beta_dpo": {
        "beta": "β before it follows the gaps.",
    },
    "schedule/canon": {
        "order": "``intra_first`` or ``inter_first``.",
    },
    "schedule/drw": {
        "beta": "β from ``switch_epoch`` on.",
    },
    "schedule/hapo_temperature": {
        "entropies": "Of the next token, before any temperature.",
        "rollout_entropies": "``[B, T]``, of the last rollout, in nats.",
    },
    "schedule/lopti": {
        "order": "``low_first`` or ``high_first``.",
    },
    "schedule/tsa": {
        "curve": "``linear``, ``exp`` or ``log``.",
    },
}


def description(owner: str, name: str) -> str:
    """Return what the nearest table says of an argument; empty if none does.

    ``owner`` is ``kind/entry``, or the name of a part after ``rw.``.
    """
    nearest = (owner, owner.partition("/")[0], owner.rpartition(".")[2], "")
    for table in nearest:
        said = DESCRIPTIONS.get(table, {}).get(name)
        if said is not None:
            return said
    return ""
