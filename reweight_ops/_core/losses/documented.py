"""The text of ``help`` for a public op.

It is the op's own docstring, and every keyword, result and error that it shares with
other ops. Each of these is described once.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap

#: The keywords of several ops. An op whose docstring names one says more about it
#: there.
KEYWORDS = {
    "logits": "``R + (V,)``, fp16, bf16, fp32 or fp64.",
    "other_logits": "The second tensor, or :class:`TopKLogps`; the same rows, detached.",
    "teacher_logits": "The teacher's logits, or :class:`TopKLogps`; the same rows, detached.",
    "hidden": "``R + (D,)``, the hidden states before the head.",
    "lm_head_weight": "``[V, D]``.",
    "other": "A :class:`HiddenLogits`, :class:`TopKLogps`, or logits; detached.",
    "teacher": "A :class:`HiddenLogits`, :class:`TopKLogps`, or logits; detached.",
    "per_token_logps": "R, fp32 or fp64, in the graph.",
    "advantages": "One per row or per sequence, or a number; None for specs that do not read them.",
    "completion_ids": "R, int32 or int64; -100 marks an ignored row.",
    "completion_mask": "R, any dtype; 0 marks an ignored row.",
    "return_entropy": "Also return the entropies.",
    "stats": "Names of :class:`TokenStats`.",
    "selected_ids": "``R + (K,)`` or ``[K]``, the ids of ``selected_logps``; -100 is padding.",
    "top_k": "The number of likeliest ids in ``topk_logps`` and ``topk_ids``.",
    "spec": "A spec, or the name of a method without required arguments.",
    "plan": "``auto``, ``one_pass`` (the gradient is computed in forward) or ``two_pass``.",
    "differentiable_outputs": "Put log-probs and entropies of the result into the graph "
    "(two_pass).",
    "kind": "The divergence; see :func:`token_divergence`.",
    "beta": "The mixture of ``generalized_jsd``, in (0, 1); default 0.5.",
    "other_temperature": "The temperature of the second distribution; default: the first one's.",
    "other_softcap": "The soft cap of the second logits; default: none.",
    "teacher_temperature": "The temperature of the teacher's distribution; default: the student's.",
    "teacher_softcap": "The soft cap of the teacher's logits; default: none.",
    "entropies": "R, the entropies of the log-probs' distributions, for specs that read them.",
    "log_sum_p_sq": "R, log Σp², for specs that read it.",
    "temperature": "A positive number, a 0-d tensor, or one number per row.",
    "softcap": "The cap of a tanh soft cap on the raw logits, a number; None disables it.",
    "vocab_size": "The number of columns of the softmax, if the head is padded beyond them.",
    "drop_last": "Logits have one more position than ids.",
    "consume_logits": "Write the gradient over the logits.",
    "process_group": "The ranks that share the columns of one vocabulary (``docs/scaling.md``).",
    "sequence_group": "The ranks that share the rows of the same sequences (``docs/scaling.md``).",
    "sampling_mask": "The ids that a sampler kept of each row, a :class:`SamplingMask` or bool "
    "``R + (V,)``. Distributions are over these ids.",
    "entropy_over": "With a mask, entropies are over the ``kept`` ids or the whole ``vocabulary``.",
    "backend": "``auto``, or ``cuda``, ``triton``, ``cpu``, ``reference``, which then never "
    "falls back.",
    "denominator_mask": "R; the rows that count in denominators. Default: the valid rows. A "
    "packed row of no sequence never counts.",
    "cu_seqlens": "``[S + 1]`` offsets of packed sequences.",
    "sequence_ids": "The sequence of each row, in ``[0, num_sequences)``; instead of offsets.",
    "num_sequences": "The number of sequences, an int; memory grows with it, also of empty ones.",
    "segment_ids": "Runs inside a sequence, for ``SegmentRatio``.",
    "group_ids": "``[S]``, the prompt of each sequence, in ``[0, num_groups)``.",
    "num_groups": "The number of prompts, an int; memory grows with it, also of empty ones.",
    "old_per_token_logps": "R, log-probs of the old policy; None means on-policy: the ratio is 1.",
    "ref_per_token_logps": "R, log-probs of the reference model.",
    "sampling_per_token_logps": "R, log-probs of the sampler.",
    "importance_sampling_ratio": "A detached factor of the surrogate, already clipped.",
    "token_weights": "A factor of the surrogate, one per row.",
    "num_items_in_batch": "The final divisor of this call's sum of tokens.",
    "num_sequences_in_batch": "The final divisor of this call's sum of sequences.",
    "loss_scale": "Multiplies loss and gradient, before any rounding.",
    "validate": "Check ids, offsets and indices on a GPU too. The call then waits for the GPU.",
    "differentiable_inputs": "Give gradients to old, reference and sampling log-probs that "
    "require them.",
    "unused": "An argument that the spec does not read is an ``error``, or ``ignore`` drops it.",
    "lm_head_bias": "``[V]``.",
    "logit_scale": "A positive factor of the logits, before the soft cap.",
    "logits_dtype": "The dtype of a chunk's logits; default: that of hidden.",
    "accumulate_dtype": "The dtype in which the weight's gradient is summed over chunks.",
    "chunk_rows": "The number of rows of logits at a time.",
    "memory_budget": "The number of bytes of logits that may exist at a time.",
    "lora": "``Lora(a, b, scale)``, a low-rank term of the head.",
    "row_index": "``[M]`` int64, flat positions of the rows to compute.",
    "compact_rows": "Drop ignored rows, and rows without a coefficient, from the GEMMs.",
    "pairs": "``halves`` (all chosen, then all rejected) or ``interleaved``.",
    "ref_sequence_logps": "``[S]``, log-probs of the reference, summed as the spec's score sums "
    "them.",
    "old_sequence_logps": "``[S]``, log-probs of the policy that sampled the pairs.",
    "ref_logits": "Logits of the reference, for a spec that reads KL(π_ref‖π).",
    "per_token_kl": "R, KL(π_ref‖π); may require grad.",
    "reward_mask": "R, a token mask of non-negative values; may require grad.",
    "kl_mask": "R, a token mask of the KL, non-negative; may require grad.",
    "reward_margins": "``[P]``, margins of a reward model.",
    "judge_margins": "``[P]``, margins of a judge.",
    "consistency": "``[P]``, the consistency of two judges.",
    "chosen_values": "``[P]``, the value of the chosen answer's state.",
    "rejected_values": "``[P]``, the value of the rejected answer's state.",
    "noise": "``[P + 1]`` standard normal draws.",
    "num_pairs_in_batch": "The final divisor of this call's sum of pairs.",
}
#: The same keywords where an op refuses them.
_FROM_HIDDEN = dict.fromkeys(
    ("drop_last", "consume_logits"), "Refused: only an op that takes logits has a use for it."
)
_OF_TWO = {
    "sampling_mask": "Refused: a divergence compares two distributions over the whole vocabulary.",
    "entropy_over": "Refused, as ``sampling_mask`` is.",
}
_RETURNS = {
    "PolicyLossOutput": "A :class:`PolicyLossOutput`: ``loss``, log-probs, entropies and more per "
    "token, ``metrics``, and the ``plan`` and ``backend`` that ran.",
    "PreferenceLossOutput": "A :class:`PreferenceLossOutput`: ``loss``, scores per pair, "
    "``metrics``, and the ``backend`` that ran.",
    "DistillationLossOutput": "A :class:`DistillationLossOutput`: ``loss``, the divergence of "
    "each token, and the ``plan`` and ``backend`` that ran.",
    "TokenStats": "A :class:`TokenStats` with what ``stats`` names.",
    "Tensor | tuple[Tensor, Tensor]": "``logps`` of shape R, or ``(logps, entropies)``.",
    "Tensor": "R in fp32 (fp64 for fp64 inputs).",
}
_SHAPE = (
    "R is the shape of the rows: ``(B, T)``, or ``(N,)`` if packed. V is the size of the\n"
    "    vocabulary, D the width of the hidden states, S the number of sequences, P that of\n"
    "    pairs. A loss is 0-d, and what it returns per token is R."
)
#: What an op computes, and how without more memory than it needs.
_REFERENCES = {
    "logits": "Milakov and Gimelshein 2018, Online normalizer calculation for softmax, "
    "arXiv:1805.02867.",
    "linear": "Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary Language Models, "
    "arXiv:2411.09009.",
    "policy": "Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347; "
    "the spec's own.",
    "preference": "Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290; the "
    "spec's own.",
    "distillation": "Hinton et al. 2015, Distilling the Knowledge in a Neural Network, "
    "arXiv:1503.02531.",
    "divergence": "Agarwal et al. 2023, On-Policy Distillation of Language Models, "
    "arXiv:2306.13649.",
}
_RAISES = {
    "InvalidCall": "a shape, dtype, number or id that does not fit, or an argument without effect.",
    "UnsupportedRequest, BackendUnavailable": "no backend, or not the named one, can run this.",
    "TypeError": "an unknown keyword.",
}
_WIDTH = 88


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty else f", default {parameter.default!r}"


def _references(signature: inspect.Signature) -> list[str]:
    """The papers of what an op with these parameters computes."""
    given = signature.parameters
    marks = {
        "logits": "logits" in given,
        "linear": "lm_head_weight" in given,
        "policy": "advantages" in given,
        "preference": "pairs" in given,
        "distillation": "teacher" in given or "teacher_logits" in given,
        "divergence": "kind" in given,
    }
    return [_REFERENCES[name] for name, holds in marks.items() if holds]


def _section(text: str, heading: str) -> tuple[str, str]:
    """Return a docstring without one of its sections, and the section's lines."""
    found = re.search(rf"(?m)^{heading}\n((?:    .*\n?)+)\n*", text)
    return (text, "") if found is None else (text[: found.start()] + text[found.end() :], found[1])


@functools.cache  # ops share most of their lines
def _wrapped(line: str, indent: int = 4) -> str:
    return textwrap.fill(
        line,
        _WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (2 * indent),
        break_long_words=False,
        break_on_hyphens=False,
    )


def entries_of(lines: str) -> dict[str, str]:
    """Return what a section says of each of its names. A name that is only said to be
    as in another op is left out.
    """
    entries = re.findall(r"(?m)^    (\S.*(?:\n     +.*)*)", lines)
    parted = (" ".join(entry.split()).partition(": ") for entry in entries)
    return {name: said for name, _, said in parted if not said.startswith("as in ")}


def documented(doc: str | None, signature: inspect.Signature) -> str:
    """Return the docstring with all sections that an op has.

    ``Args`` has every parameter in the order of the signature: what the op says of it,
    or else what all ops say.
    """
    text, _, ranges = inspect.cleandoc(doc or "").partition("\n\nRanges: ")
    text, code, example = text.partition("\n>>> ")
    prose, own = _section(f"{text.rstrip()}\n", "Args:")
    prose, returns = _section(prose, "Returns:")
    prose, raises = _section(prose, "Raises:")
    given = signature.parameters
    said = KEYWORDS | (_OF_TWO if "kind" in given else {})
    said |= ({} if "logits" in given else _FROM_HIDDEN) | entries_of(own)
    args = [
        _wrapped(f"{name} ({p.annotation}{_default(p)}): {said[name][0].upper()}{said[name][1:]}")
        for name, p in given.items()
    ]
    errors = [_wrapped(f"{name}: {when}") for name, when in (_RAISES | entries_of(raises)).items()]
    result = returns.rstrip() or _wrapped(_RETURNS[signature.return_annotation]).replace(
        "\n    ", "\n"
    )
    sections = [
        prose.rstrip(),
        "\n".join(["Args:", *args]),
        textwrap.fill(f"Ranges: {ranges}", _WIDTH, subsequent_indent=" " * 4) if ranges else "",
        f"Returns:\n{result}",
        "\n".join(["Raises:", *errors]),
        f"Shape:\n    {_SHAPE}",
        textwrap.indent(f"Example:\n{code.lstrip()}{example}", " " * 4)[4:],
        "\n".join(["References:", *map(_wrapped, _references(signature))]),
    ]
    return "\n\n".join(section for section in sections if section)
