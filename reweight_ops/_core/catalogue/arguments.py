"""The ``Args`` of an entry, from its signature: type, default, range, and a
description.

The description of an argument that many entries take is written once, here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..ranges import Kind, Range

#: B completions, T tokens of each.
SHARED = {
    "advantages": "``[B]`` or ``[B, T]``.",
    "backend": "``auto``, or the name of one, which then never falls back.",
    "consume_logits": "Write the gradient over the logits.",
    "drop_last": "Logits have one more position than rows.",
    "kind": "One of the kinds above.",
    "kl_estimator": "``k1`` or ``k3``.",
    "process_group": "The ranks that share the columns of one vocabulary. If it is refused, the "
    "message says why.",
    "singleton": "The advantage of a group of one: ``zero`` or ``reward``.",
    "other_softcap": "The soft cap of the second logits; default: none.",
    "other_temperature": "The temperature of the second distribution; default: the first one's.",
    "softcap": "The cap of a tanh soft cap on the raw logits; None disables it.",
    "temperature": "A positive number, or a tensor as the formula says.",
    "sampling_mask": "Refused, because a divergence compares two whole distributions.",
    "entropy_over": "Only with ``sampling_mask``.",
    "against": "The denominator of the ratio: ``old`` or ``ref``.",
    "amplify": "0-d, the weight of surprising tokens.",
    "damp": "0-d, the weight of the others.",
    "backends": "Why each other backend would not be taken; None if it could be.",
    "beta": "The factor of a score in its implicit reward.",
    "bias": "``[V]``, or whether there is one.",
    "device": "Where tensors are made.",
    "dtype": "The dtype of the tensors.",
    "full_name": "The name as the paper prints it.",
    "certainty": "How the formula was found: ``verified``, ``secondary`` or ``derived``.",
    "example": "Values for arguments without a default.",
    "gradient": "``sequence``, or ``token`` for a gradient by each token's own ratio.",
    "gradients": "``[K, P]``, one flat gradient per objective.",
    "f_divergence_type": "TRL's option of that name.",
    "groups": "The sequence of each row.",
    "importance_sampling_level": "TRL's option of that name: ``token`` or ``sequence``.",
    "inputs": "The caller's inputs per pair, ``[P]``, by name.",
    "keep": "Bool: 1 where there is a valid row.",
    "kl_loss_type": "verl's option of that name.",
    "layout": "``halves`` or ``interleaved``.",
    "lora": "A :class:`Lora` on the head; None: no adapter.",
    "loss_mode": "verl's option of that name.",
    "loss_type": "TRL's option of that name, or several.",
    "name": "The name that messages, metrics and the catalogue have.",
    "one_pass_unsupported_reason": "Why one pass is not possible; None if it is.",
    "options": "Hyper-parameters of the method.",
    "plan": "``one_pass`` or ``two_pass``.",
    "ref_logps": "``[P]``, the sums under the reference model.",
    "scores": "``[P]``, before β.",
    "sequences": "The sequences of the call.",
    "settings": "Keywords of the function of the same task, for every call.",
    "size": "The number of sequences in a pair or list.",
    "spec": "A spec, or the name of a method without required arguments.",
    "teacher": "The sum of the divergence from the teacher, for metrics.",
    "text": "What is looked for.",
    "answers": "``[B, K]``, nonzero where an option was chosen.",
    "class_counts": "``[K]``, the number of samples of each class.",
    "importance_sampling_ratio": "``[B, T]``, each token's ratio to the sampler; None means 1.",
    "log_sum_p_sq": "``[B, T]``, the logarithm of the sum of squared probabilities "
    "(``token_stats``).",
    "scale_rewards": "Whether, or by which spread, differences of rewards are divided.",
    "source_counts": "``[K]``, the number of samples of each source.",
    "zero_tail": "Whether the baseline is 0 where only the longest response of a group remains.",
    "vocab_size": "The number of columns of the softmax, if the head is padded beyond them.",
    "anchor_ids": "``[B]``, the state in which each step was taken.",
    "completion_ids": "``[B, T]``, int32 or int64.",
    "completion_mask": "``[B, T]``; 0 marks an ignored token.",
    "correct": "``[B]``, nonzero where a completion is right.",
    "detach": "Whether no gradient flows through the weight.",
    "entropies": "One per token, of the policy that sampled; default: the current ones.",
    "episode_ids": "``[B]``, each step's episode.",
    "episode_rewards": "``[E]``, one per episode.",
    "format_rewards": "``[B]``, for the format of a completion.",
    "greedy_rewards": "``[B]``, the reward of the greedy completion of the same prompt.",
    "group_ids": "``[B]``, each completion's group, in ``[0, num_groups)``; instead of "
    "``group_size``.",
    "group_size": "The number of completions in a group; they are consecutive.",
    "lengths": "``[B]``, the number of tokens of each completion.",
    "logits": "``R + (V,)``.",
    "losses": "``[B]``, one per sample.",
    "mask": "``[B, T]``; 0 marks an ignored token.",
    "max_logps": "``[B, T]``, the log-prob of each position's likeliest token.",
    "num_groups": "The number of groups, an int.",
    "old_logps": "``[B, T]``, log-probs of the policy that sampled.",
    "old_per_token_logps": "``[B, T]``, log-probs of the policy that sampled.",
    "outcome_rewards": "``[B]``, for the answer.",
    "parents": "``[N]``, each node's parent; -1 for a root.",
    "per_token_logps": "``[B, T]``, log-probs of the policy.",
    "previous_rewards": "``[B]``, the rewards of the step before.",
    "ref_per_token_logps": "``[B, T]``, log-probs of the reference model.",
    "reference_rewards": "``[B]``, rewards of the reference model's completions.",
    "rewards": "``[B]``, one per completion, or ``[B, T]``, one per token, as the formula says; "
    "NaN means no score.",
    "scope": "The terms of the loss that it multiplies: ``surrogate`` or ``all``.",
    "source_ids": "``[B]``, the source of each sample.",
    "step_returns": "``[B]``, the return of each step.",
    "teacher_logits": "``R + (V,)``, detached.",
    "thinking_rewards": "``[B]``, for the reasoning.",
    "values": "The value of each position, from a critic or a tree.",
}


def _ranges(function: Callable[..., Any]) -> dict[str, Range]:
    """Return the ranges that say what a parameter is. A type alone does not."""
    found = getattr(function, "__ranges__", {})
    return {name: allowed for name, allowed in found.items() if not isinstance(allowed, Kind)}


def missing_arguments(function: Callable[..., Any]) -> list[str]:
    """Return the parameters that neither the docstring nor :data:`SHARED` describes."""
    doc, ranges = inspect.getdoc(function) or "", _ranges(function)
    prose = doc.partition("\nArgs:\n")[0]
    return [
        name
        for name in inspect.signature(function).parameters
        if not name.startswith("_")
        and name not in SHARED
        and name not in ranges
        and name not in prose
    ]


def with_arguments(function: Callable[..., Any], fields: bool = False) -> str:
    """Return the docstring with every parameter.

    With ``fields`` they are what a record holds: what its docstring says of a name goes
    before what :data:`SHARED` says.
    """
    text, ranges = inspect.cleandoc(function.__doc__ or ""), _ranges(function)
    lines = []
    for name, p in inspect.signature(function).parameters.items():
        if name.startswith("_"):
            continue
        # those of a named tuple are ForwardRef("Tensor")
        kind = (
            ""
            if p.annotation is p.empty
            else getattr(p.annotation, "__forward_arg__", str(p.annotation))
        )
        default = "" if p.default is p.empty else f"default {p.default!r}"
        about = ", ".join(part for part in (kind, default) if part)
        shared = "" if fields and f"``{name}``" in text else SHARED.get(name, "")
        said = shared or (f"{ranges[name]}." if name in ranges else "See above.")
        lines.append(f"    {name}{f' ({about})' if about else ''}: {said}")
    if not lines or "\nArgs:" in text:
        return text
    return "\n".join([text, "", "Args:", *lines])
