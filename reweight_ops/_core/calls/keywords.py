"""The keywords that ops share, in records.

There is one record for how logits become distributions, one for the per-row inputs of a
policy loss, and so on. Each keyword has one default. An unknown keyword is a TypeError
that names the nearest known one, or the name here of a TRL or verl name.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TypedDict

import torch
from torch import Tensor, dtype

from ...errors import InvalidCall
from ..catalogue.signatures import DEFAULTS
from ..compiler import constant_result
from ..ranges import (
    Count,
    FixedPositiveOrInf,
    Flag,
    Kind,
    NonNegative,
    Positive,
    Range,
    Scalar,
    check_inputs,
    described,
    is_constant,
    ranges_of,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Options:
    """The base of the records: frozen dataclasses of keywords, each with
    its default."""

    NAMES: ClassVar[tuple[str, ...]] = ()
    __ranges__: ClassVar[dict[str, Range]] = {}
    #: The switches of a record, and whether None is allowed for them.
    FLAGS: ClassVar[dict[str, bool]] = {}

    def named(self) -> dict[str, Any]:
        """Return the values by public name, for the resolver and its messages."""
        return {name: getattr(self, name) for name in self.NAMES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxOptions(Options):
    """How a row of logits becomes a distribution, and which backend computes it."""

    temperature: Positive[Scalar] = 1.0
    softcap: FixedPositiveOrInf[float] | None = None
    vocab_size: Count[int] | None = None
    drop_last: bool = False
    consume_logits: bool = False
    process_group: ProcessGroup | None = None
    sampling_mask: tuple[Tensor, Tensor] | Tensor | None = None
    entropy_over: str = "kept"
    backend: str = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyOptions(Options):
    """The inputs that a policy loss reads beside logits and advantages."""

    completion_mask: Tensor | None = None
    denominator_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    sequence_ids: Tensor | None = None
    num_sequences: int | None = None
    segment_ids: Tensor | None = None
    group_ids: Tensor | None = None
    num_groups: int | None = None
    sequence_group: ProcessGroup | None = None
    old_per_token_logps: Tensor | float | None = None
    ref_per_token_logps: Tensor | float | None = None
    sampling_per_token_logps: Tensor | float | None = None
    importance_sampling_ratio: Tensor | float | None = None
    token_weights: Tensor | float | None = None
    num_items_in_batch: NonNegative[Scalar] | None = None
    num_sequences_in_batch: NonNegative[Scalar] | None = None
    loss_scale: NonNegative[Scalar] = 1.0
    validate: bool = False
    unused: str = "error"
    differentiable_inputs: bool = False


class Lora(NamedTuple):
    """A low-rank term of the head: ``logits += scale · (hidden @ aᵀ) @ bᵀ``,
    ``a [r, D]``, ``b [V, r]``. ``W + scale·b·a`` is never built.

    The factors have the dtype of hidden, or both have a wider one (PEFT's fp32 beside a
    bf16 head). The term and its gradients are then computed in that dtype, and only the
    sum with the head's own logits is rounded. Autocast casts the factors as it casts
    the head.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0


class HiddenLogits(NamedTuple):
    """Logits that are never formed as a whole.

    They are ``logit_scale · (hidden @ lm_head_weightᵀ + lm_head_bias)``, plus a LoRA
    term before the scale.

    ``hidden`` is ``R + (D,)``, ``lm_head_weight`` is ``[V, D]``, and ``lm_head_bias``
    is ``[V]``. ``logits_dtype`` is the dtype of the logits, as in
    :func:`linear_token_logps`.
    """

    hidden: Tensor
    lm_head_weight: Tensor
    lm_head_bias: Tensor | None = None
    logit_scale: float = 1.0
    lora: Lora | None = None
    logits_dtype: dtype | None = None


class TopKLogps(NamedTuple):
    """A teacher's log-probs of K ids per row, as an inference server returns them and a
    trainer stores them.

    The rest of its vocabulary is unknown.

    ``token_ids`` is ``R + (K,)``, int32 or int64, without repeats in a row. ``logps``
    is ``R + (K,)``, fp32 or fp64, of the teacher's own softmax (its temperature
    included). An id of ``-100`` or a log-prob of ``-inf`` is padding, so lists may have
    different lengths. ``tail`` says what becomes of the rest. S_p and S_q are the
    listed mass of the student p and the teacher q:

    * ``"bucket"``: the remaining mass, 1 - S, is one more event of each (TRL's
      ``loss_add_tail=True``). Its logarithm is ``log(1 - exp(log S))`` with ``log S``
      at most half an ulp below 0, where it has no gradient (TRL: at most -1e-7).
    * ``"renormalize"``: both are divided by their S (TRL's ``loss_add_tail=False``).
    * ``"ignore"``: the sums are over the list only, and may be negative (verl's
      ``forward_kl_topk``, without its clamps).
    """

    token_ids: Tensor
    logps: Tensor
    tail: str = "bucket"


class Teacher(NamedTuple):
    """A full-vocabulary divergence from a second model as a term of a policy loss.

    The term is ``coef · Σ_i w_i · D(p_i, q_i)``, where w are the row weights of the
    spec's reduction.

    ``logits`` are the teacher's, as :class:`HiddenLogits` or ``R + (V,)``, detached.
    ``kind`` and ``beta`` are those of :func:`token_divergence`; reverse_kl is
    KL(policy‖teacher). ``temperature`` and ``softcap`` are the teacher's own. The
    defaults are the policy's temperature and no soft cap.
    """

    logits: HiddenLogits | Tensor
    coef: float | Tensor
    kind: str = "reverse_kl"
    beta: float | None = None
    temperature: float | Tensor | None = None
    softcap: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMHeadOptions(Options):
    """The LM head of an op that takes hidden states, and its chunks."""

    lm_head_bias: Tensor | None = None
    logit_scale: Positive[float] = 1.0
    logits_dtype: dtype | None = None
    accumulate_dtype: dtype | None = None
    chunk_rows: Count[int] | None = None
    memory_budget: Count[int] | None = None
    lora: Lora | None = None
    row_index: Tensor | None = None
    compact_rows: bool | None = None


class SoftmaxKeywords(TypedDict, total=False):
    """:class:`SoftmaxOptions` for type checkers (a test holds the names together)."""

    temperature: float | Tensor
    softcap: float | None
    vocab_size: int | None
    drop_last: bool
    consume_logits: bool
    process_group: ProcessGroup | None
    sampling_mask: tuple[Tensor, Tensor] | Tensor | None
    entropy_over: str
    backend: str


class TemperedKeywords(TypedDict, total=False):
    """:class:`SoftmaxKeywords` of a loss that says itself what the temperature is."""

    softcap: float | None
    vocab_size: int | None
    drop_last: bool
    consume_logits: bool
    process_group: ProcessGroup | None
    backend: str


class DivergenceKeywords(SoftmaxKeywords, total=False):
    """The keywords of a divergence of the second logits from the first."""

    completion_mask: Tensor | None
    other_temperature: float | Tensor | None
    other_softcap: float | None


class PolicyKeywords(TypedDict, total=False):
    """:class:`PolicyOptions` for type checkers."""

    completion_mask: Tensor | None
    denominator_mask: Tensor | None
    cu_seqlens: Tensor | None
    sequence_ids: Tensor | None
    num_sequences: int | None
    segment_ids: Tensor | None
    group_ids: Tensor | None
    num_groups: int | None
    sequence_group: ProcessGroup | None
    old_per_token_logps: Tensor | float | None
    ref_per_token_logps: Tensor | float | None
    sampling_per_token_logps: Tensor | float | None
    importance_sampling_ratio: Tensor | float | None
    token_weights: Tensor | float | None
    num_items_in_batch: float | Tensor | None
    num_sequences_in_batch: float | Tensor | None
    loss_scale: float | Tensor
    validate: bool
    unused: str
    differentiable_inputs: bool


class PolicyLossKeywords(SoftmaxKeywords, PolicyKeywords, total=False):
    """The keywords of :func:`~reweight_ops.policy_loss`."""


class LMHeadKeywords(SoftmaxKeywords, total=False):
    """:class:`SoftmaxOptions` and :class:`LMHeadOptions` for type checkers."""

    lm_head_bias: Tensor | None
    logit_scale: float
    logits_dtype: dtype | None
    accumulate_dtype: dtype | None
    chunk_rows: int | None
    memory_budget: int | None
    lora: tuple[Tensor, Tensor, float] | None
    row_index: Tensor | None
    compact_rows: bool | None


class LinearPolicyLossKeywords(LMHeadKeywords, PolicyKeywords, total=False):
    """The keywords of :func:`~reweight_ops.linear_policy_loss`."""


class PairKeywords(TypedDict, total=False):
    """:class:`PairOptions` for type checkers (a test holds the names together)."""

    completion_mask: Tensor | None
    cu_seqlens: Tensor | None
    sequence_ids: Tensor | None
    num_sequences: int | None
    pairs: str
    ref_per_token_logps: Tensor | None
    ref_sequence_logps: Tensor | None
    old_per_token_logps: Tensor | None
    old_sequence_logps: Tensor | None
    ref_logits: Tensor | None
    per_token_kl: Tensor | None
    reward_mask: Tensor | None
    kl_mask: Tensor | None
    reward_margins: Tensor | None
    judge_margins: Tensor | None
    consistency: Tensor | None
    chosen_values: Tensor | None
    rejected_values: Tensor | None
    noise: Tensor | None
    num_pairs_in_batch: float | Tensor | None
    loss_scale: float | Tensor
    validate: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions(Options):
    """The keywords of a pair loss beside the softmax's."""

    completion_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    sequence_ids: Tensor | None = None
    num_sequences: int | None = None
    pairs: str = "halves"
    ref_per_token_logps: Tensor | None = None
    ref_sequence_logps: Tensor | None = None
    old_per_token_logps: Tensor | None = None
    old_sequence_logps: Tensor | None = None
    ref_logits: Tensor | None = None
    per_token_kl: Tensor | None = None
    reward_mask: Tensor | None = None
    kl_mask: Tensor | None = None
    reward_margins: Tensor | None = None
    judge_margins: Tensor | None = None
    consistency: Tensor | None = None
    chosen_values: Tensor | None = None
    rejected_values: Tensor | None = None
    noise: Tensor | None = None
    num_pairs_in_batch: NonNegative[Scalar] | None = None
    loss_scale: NonNegative[Scalar] = 1.0
    validate: bool = False


#: Names that users of TRL, verl, Liger and other libraries may type, and the names
#: here.
ALIASES = {
    "epsilon": "spec=methods.grpo(epsilon_low=..., epsilon_high=...)",
    "epsilon_low": "spec=methods.grpo(epsilon_low=..., epsilon_high=...)",
    "epsilon_high": "spec=methods.grpo(epsilon_low=..., epsilon_high=...)",
    "eps": "spec=methods.grpo(epsilon_low=..., epsilon_high=...)",
    "clip_eps": "spec=methods.grpo(epsilon_low=..., epsilon_high=...)",
    "eps_clip": "spec=methods.grpo(epsilon_low=..., epsilon_high=...)",
    "cliprange": "spec=methods.grpo(epsilon_low=..., epsilon_high=...)",
    "eps_low": "spec=methods.grpo(epsilon_low=..., epsilon_high=...)",
    "eps_high": "spec=methods.grpo(epsilon_low=..., epsilon_high=...)",
    "clip_ratio": "spec=methods.verl(clip_ratio=...)",
    "clip_ratio_low": "spec=methods.verl(clip_ratio_low=...)",
    "clip_ratio_high": "spec=methods.verl(clip_ratio_high=...)",
    "clip_ratio_c": "spec=methods.verl(clip_ratio_c=...)",
    "delta": "spec=methods.grpo(delta=...)",
    "beta": "spec=methods.grpo(beta=...)",
    "kl_coef": "spec=methods.grpo(beta=...)",
    "loss_type": "spec=methods.trl(loss_type=...)",
    "loss_mode": "spec=methods.verl(loss_mode=...)",
    "loss_agg_mode": "spec=methods.verl(loss_agg_mode=...)",
    "importance_sampling_level": "spec=methods.trl(importance_sampling_level=...)",
    "max_completion_length": "spec=methods.trl(max_completion_length=...)",
    "entropy_coef": "spec=methods.trl(entropy_coef=...)",
    "old_log_prob": "old_per_token_logps",
    "old_log_probs": "old_per_token_logps",
    "old_logp": "old_per_token_logps",
    "old_logprobs": "old_per_token_logps",
    "prev_logprobs": "old_per_token_logps",
    "ref_log_prob": "ref_per_token_logps",
    "ref_logp": "ref_per_token_logps",
    "ref_logprobs": "ref_per_token_logps",
    "rollout_log_probs": "sampling_per_token_logps",
    "rollout_is_weights": "importance_sampling_ratio",
    "vllm_is_ratio": "importance_sampling_ratio",
    "is_ratio": "importance_sampling_ratio",
    "response_mask": "completion_mask",
    "action_mask": "completion_mask",
    "loss_mask": "completion_mask",
    "attention_mask": "completion_mask",
    "labels": "completion_ids",
    "input_ids": "completion_ids",
    "token_ids": "completion_ids",
    "targets": "completion_ids",
    "mask": "completion_mask",
    "hidden_states": "hidden",
    "lm_head": "lm_head_weight",
    "weight": "lm_head_weight",
    "bias": "lm_head_bias",
    "ignore_index": "completion_mask, or ids of -100",
    "rewards": "advantages, rw.advantages.grpo(rewards, ...)",
    "reduction": "spec=PolicyLossSpec(reduction=...)",
    "advantage": "advantages",
    "log_probs": "per_token_logps",
    "logprobs": "per_token_logps",
    "index": "completion_ids",
    "selected_token_ids": "completion_ids",
    "inplace": "consume_logits",
    "inplace_backward": "consume_logits",
    "loss_scale_factor": "loss_scale, or spec=methods.verl(loss_scale_factor=...)",
    "weights": "token_weights",
    "loss_weights": "token_weights",
    "final_logit_softcapping": "softcap",
}


for _record in (SoftmaxOptions, PolicyOptions, LMHeadOptions, PairOptions):
    _record.NAMES = tuple(f.name for f in dataclasses.fields(_record))
    _record.__ranges__ = {
        name: allowed
        for name, allowed in ranges_of(_record).items()
        if not isinstance(allowed, (Flag, Kind))
    }
    _record.FLAGS = {
        f.name: "None" in str(f.type)
        for f in dataclasses.fields(_record)
        if str(f.type).startswith("bool")
    }
    _record.__doc__ = described(_record.__doc__, _record.__ranges__)
    DEFAULTS.update({f.name: f.default for f in dataclasses.fields(_record)})


def parse(
    op: str, keywords: dict[str, Any], *records: type[Options], own: tuple[str, ...] = ()
) -> list[Any]:
    """Return one of each record from the keywords.

    A keyword of no record is a TypeError. ``own`` has the op's other keywords, for the
    message.
    """
    if torch.compiler.is_compiling():
        constants = tuple([(name, value) for name, value in keywords.items() if is_constant(value)])
        _check_constants(op, tuple(keywords), constants, records, own)
        for record in records:
            check_inputs(op, record, keywords.items())
    else:
        _check(op, keywords, keywords.items(), records, own)
    for record in records:
        for name, optional in record.FLAGS.items():
            if name in keywords:
                check_flag(op, name, keywords[name], optional)
    return [
        record(**{name: keywords[name] for name in record.NAMES if name in keywords})
        for record in records
    ]


def _check(
    op: str,
    names: Iterable[str],
    given: Iterable[tuple[str, Any]],
    records: tuple[type[Options], ...],
    own: tuple[str, ...],
) -> None:
    known = [name for record in records for name in record.NAMES]
    for name in names:
        if name not in known:
            _reject(op, name, (*known, *own))
    for record in records:
        for name, value in given:
            if name in record.__ranges__:
                record.__ranges__[name].check(op, name, value)


@constant_result
def _check_constants(
    op: str,
    names: tuple[str, ...],
    given: tuple[tuple[str, Any], ...],
    records: tuple[type[Options], ...],
    own: tuple[str, ...],
) -> None:
    # torch.compile runs this and follows none of it: what it raises is the reason that
    # compilation ends with.
    _check(op, names, given, records, own)


def check_flag(op: str, name: str, value: Any, optional: bool = False) -> None:
    """Raise for a value that is neither True nor False. Any text would
    count as true."""
    if type(value) is not bool and not (optional and value is None):
        raise InvalidCall(
            f"{op}: {name} is {value!r}, expected True or False{' or None' if optional else ''}."
        )


def _reject(op: str, name: str, known: tuple[str, ...]) -> NoReturn:
    hint = ""
    alias = ALIASES.get(name, "")
    if _target(alias) in (*known, *_positional(op)):
        hint = f" Here it is {alias}."
    elif near := difflib.get_close_matches(name, known, n=1):
        hint = f" Did you mean {near[0]}?"
    raise TypeError(f"{op}() got an unexpected keyword argument {name!r}.{hint}")


def _positional(op: str) -> tuple[str, ...]:
    """Return the arguments of an op that have a position."""
    first = "per_token_logps" if op.endswith("_from_logps") else "completion_ids"
    head = ("hidden", "lm_head_weight") if op.startswith("linear_") else ()
    return (first, *head, *(("advantages",) if "policy_loss" in op else ()))


def _target(alias: str) -> str:
    """Return the argument that an alias stands for."""
    return alias.split("=")[0].split(",")[0]


def misnamed(
    op: str, signature: inspect.Signature, given: int, keywords: Iterable[str]
) -> TypeError | None:
    """Return the error for an argument that is missing because the caller used another
    library's name.

    ``given`` is the number of positional arguments.
    """
    known = signature.parameters
    missing = {
        name
        for at, (name, p) in enumerate(known.items())
        if p.default is p.empty and (at >= given or p.kind is p.KEYWORD_ONLY)
    }
    for name in keywords:
        if name not in known and _target(ALIASES.get(name, "")) in missing.difference(keywords):
            return TypeError(
                f"{op}() got an unexpected keyword argument {name!r}. Here it is {ALIASES[name]}."
            )
    return None
