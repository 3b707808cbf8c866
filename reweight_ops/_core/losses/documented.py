"""What ``help`` says of a public op: its own docstring, and every keyword, result and error that it shares with others, each described once."""

from __future__ import annotations

import inspect
import re

#: What a keyword of several ops is. An op whose docstring names one says more about it there.
KEYWORDS = {
    "logits": "``R + (V,)``, fp16, bf16, fp32 or fp64.",
    "other_logits": "The second tensor, the same rows, detached.",
    "teacher_logits": "The teacher's, the same rows, detached.",
    "hidden": "``R + (D,)``, the hidden states before the head.",
    "lm_head_weight": "``[V, D]``.",
    "other": "A :class:`HiddenLogits`, or logits; detached.",
    "teacher": "A :class:`HiddenLogits`, or logits; detached.",
    "per_token_logps": "R, fp32 or fp64, in the graph.",
    "advantages": "One a row or a sequence, or a number; None for specs that read none.",
    "completion_ids": "R, int32 or int64; -100: the row is out.",
    "completion_mask": "R, any dtype; a row is in iff not 0.",
    "return_entropy": "Also return the entropies.",
    "stats": "Names of :class:`TokenStats`.",
    "selected_ids": "``R + (K,)`` or ``[K]``, of ``selected_logps``; -100 is padding.",
    "top_k": "How many of the likeliest ids, of ``topk_logps`` and ``topk_ids``.",
    "spec": "A spec, or the name of a method without required arguments.",
    "plan": "``auto``, ``one_pass`` (the gradient is formed in forward) or ``two_pass``.",
    "differentiable_outputs": "Log-probs and entropies of the result are in the graph (two_pass).",
    "kind": "Which divergence; see :func:`token_divergence`.",
    "beta": "The mixture of ``generalized_jsd``, in (0, 1); default 0.5.",
    "other_temperature": "The temperature of the second distribution; default: the first one's.",
    "other_softcap": "The soft cap of the second logits; default: none.",
    "teacher_temperature": "The temperature of the teacher's distribution; default: the student's.",
    "teacher_softcap": "The soft cap of the teacher's logits; default: none.",
    "entropies": "R, of the log-probs' distributions; for specs that read them.",
    "log_sum_p_sq": "R, log Σp²; for specs that read it.",
    "temperature": "A positive number, a 0-d tensor, or one a row.",
    "softcap": "The cap of a tanh soft cap on the raw logits, a number; None for off.",
    "vocab_size": "Columns of the softmax where the head is padded beyond them.",
    "drop_last": "Logits have one position more than ids. Of ops that take logits.",
    "consume_logits": "Write the gradient over the logits. Of ops that take logits.",
    "process_group": "Of the ranks that have the columns of one vocabulary (``docs/scaling.md``).",
    "sequence_group": "Of the ranks that have the rows of the same sequences (``docs/scaling.md``).",
    "sampling_mask": "The ids that a sampler kept of each row, a :class:`SamplingMask` or bool ``R + (V,)``: distributions are over them.",
    "entropy_over": "With a mask: entropies over the ``kept`` ids, or the whole ``vocabulary``.",
    "backend": "``auto``, or ``cuda``, ``triton``, ``cpu``, ``reference``, which then never falls back.",
    "denominator_mask": "R; which rows count in denominators. Default: those that are in.",
    "cu_seqlens": "``[S + 1]`` offsets of packed sequences.",
    "sequence_ids": "Each row's sequence, in ``[0, num_sequences)``; instead of offsets.",
    "num_sequences": "How many sequences there are, an int.",
    "segment_ids": "Runs inside a sequence, for ``SegmentRatio``.",
    "group_ids": "``[S]``, each sequence's prompt, in ``[0, num_groups)``.",
    "num_groups": "How many prompts there are, an int.",
    "old_per_token_logps": "R, of the old policy; None: on-policy, the ratio is 1.",
    "ref_per_token_logps": "R, of the reference model.",
    "sampling_per_token_logps": "R, of the sampler.",
    "importance_sampling_ratio": "A detached factor of the surrogate, already clipped.",
    "token_weights": "A factor of the surrogate, a row.",
    "num_items_in_batch": "The final divisor of this call's sum of tokens.",
    "num_sequences_in_batch": "The final divisor of this call's sum of sequences.",
    "loss_scale": "Multiplies loss and gradient, before any rounding.",
    "validate": "Check ids, offsets and indices on a GPU too, which waits for it.",
    "differentiable_inputs": "Gradients to old, reference and sampling log-probs that require them.",
    "unused": "What a spec does not read is an ``error``, or ``ignore``.",
    "lm_head_bias": "``[V]``.",
    "logit_scale": "A positive factor of the logits, before the soft cap.",
    "logits_dtype": "The dtype of a chunk's logits; default: that of hidden.",
    "accumulate_dtype": "The dtype in which the weight's gradient is summed over chunks.",
    "chunk_rows": "Rows of logits at a time.",
    "memory_budget": "Bytes of logits that may exist at a time.",
    "lora": "``Lora(a, b, scale)``, a low-rank term of the head.",
    "row_index": "``[M]`` int64, flat positions of the rows to compute.",
    "compact_rows": "Drop ignored rows, and rows without a coefficient, from the GEMMs.",
    "pairs": "``halves`` (all chosen, then all rejected) or ``interleaved``.",
    "ref_sequence_logps": "``[S]``, summed as the spec's score sums them.",
    "old_sequence_logps": "``[S]``, of the policy that the pairs were sampled from.",
    "ref_logits": "Logits of the reference, for a spec that reads KL(π_ref‖π).",
    "per_token_kl": "R, KL(π_ref‖π); may require grad.",
    "reward_mask": "R, a token mask of non-negative values; may require grad.",
    "kl_mask": "R, likewise, of the KL.",
    "reward_margins": "``[P]``, of a reward model.",
    "judge_margins": "``[P]``, of a judge.",
    "consistency": "``[P]``, how consistent two judges are.",
    "chosen_values": "``[P]``, of the chosen answer's state.",
    "rejected_values": "``[P]``, of the rejected answer's state.",
    "noise": "``[P + 1]`` standard normal draws.",
    "num_pairs_in_batch": "The final divisor of this call's sum of pairs.",
}
_RAISES = """Raises:
    InvalidCall: a shape, dtype, number or id that does not fit, or an argument without effect.
    UnsupportedRequest, BackendUnavailable: nobody, or not the named backend, can run this.
    TypeError: an unknown keyword."""


def documented(doc: str | None, signature: inspect.Signature) -> str:
    """The docstring, with a line for every keyword that it does not name, and what it lacks of the sections that every op has."""
    text = inspect.cleandoc(doc or "")
    prose, examples, code = text.partition("\n>>> ")
    lines = [
        f"    {name} ({p.annotation}{'' if p.default is p.empty else f', default {p.default!r}'}): {KEYWORDS[name]}"
        for name, p in signature.parameters.items()
        if name in KEYWORDS and not re.search(rf"(?m)^ +(?:[\w, ]+, )?{name}(?:, [\w, ]+)?: ", prose)
    ]
    sections = ["\n".join(["Keyword Args:" if "Args:" in prose else "Args:", *lines])] if lines else []
    if "Returns:" not in prose:
        sections.append(f"Returns:\n    {signature.return_annotation}.")
    if "Raises:" not in prose:
        sections.append(_RAISES)
    return "\n\n".join([prose.rstrip(), *sections, *([f">>> {code}"] if examples else [])])
