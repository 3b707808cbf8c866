"""The keywords that ops share: HEAD (how logits become distributions) and DATA (everything per row), each with one default.

An unknown keyword is a TypeError that names the nearest known one, and what a TRL or verl name is called here.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from torch import Tensor, dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """The HEAD keywords of an op that takes logits."""

    temperature: Any = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    drop_last: bool = False
    consume_logits: bool = False
    process_group: Any = None
    backend: str = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The DATA keywords of a policy loss."""

    completion_mask: Any = None
    denominator_mask: Any = None
    cu_seqlens: Any = None
    sequence_ids: Any = None
    num_sequences: int | None = None
    segment_ids: Any = None
    group_ids: Any = None
    num_groups: int | None = None
    old_per_token_logps: Any = None
    ref_per_token_logps: Any = None
    sampling_per_token_logps: Any = None
    importance_sampling_ratio: Any = None
    token_weights: Any = None
    num_items_in_batch: Any = None
    num_sequences_in_batch: Any = None
    loss_scale: Any = 1.0
    validate: bool = False

    def named(self) -> dict[str, Any]:
        """By public name, for the resolver and its messages."""
        return {name: getattr(self, name) for name in _DATA}


class HeadKeywords(TypedDict, total=False):
    """HEAD for type checkers; the same names as :class:`HeadOptions` (a test holds them together)."""

    temperature: float | Tensor
    softcap: float | None
    vocab_size: int | None
    drop_last: bool
    consume_logits: bool
    process_group: ProcessGroup | None
    backend: str


class DataKeywords(TypedDict, total=False):
    """DATA for type checkers; the same names as :class:`DataOptions`."""

    completion_mask: Tensor | None
    denominator_mask: Tensor | None
    cu_seqlens: Tensor | None
    sequence_ids: Tensor | None
    num_sequences: int | None
    segment_ids: Tensor | None
    group_ids: Tensor | None
    num_groups: int | None
    old_per_token_logps: Tensor | float | None
    ref_per_token_logps: Tensor | float | None
    sampling_per_token_logps: Tensor | float | None
    importance_sampling_ratio: Tensor | float | None
    token_weights: Tensor | float | None
    num_items_in_batch: float | Tensor | None
    num_sequences_in_batch: float | Tensor | None
    loss_scale: float | Tensor
    validate: bool


class PolicyLossKeywords(HeadKeywords, DataKeywords, total=False):
    """HEAD and DATA."""


class LinearHeadKeywords(HeadKeywords, total=False):
    """HEAD and the keywords of a linear head."""

    lm_head_bias: Tensor | None
    logit_scale: float
    logits_dtype: dtype | None
    accumulate_dtype: dtype | None
    chunk_rows: int | None
    memory_budget: int | None
    lora: tuple[Tensor, Tensor, float] | None
    row_index: Tensor | None
    compact_rows: bool | None


class LinearKeywords(LinearHeadKeywords, DataKeywords, total=False):
    """HEAD, DATA and the keywords of a linear head."""


_HEAD = tuple(f.name for f in dataclasses.fields(HeadOptions))
_DATA = tuple(f.name for f in dataclasses.fields(DataOptions))

#: What users of TRL, verl, Liger and others may type, and what it is here.
ALIASES = {
    "epsilon": "spec=methods.grpo(epsilon_low=..., epsilon_high=...)",
    "epsilon_low": "spec=methods.grpo(epsilon_low=..., epsilon_high=...)",
    "epsilon_high": "spec=methods.grpo(epsilon_low=..., epsilon_high=...)",
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
    "response_mask": "completion_mask",
    "action_mask": "completion_mask",
    "loss_mask": "completion_mask",
    "attention_mask": "completion_mask",
    "labels": "completion_ids",
    "index": "completion_ids",
    "selected_token_ids": "completion_ids",
    "inplace": "consume_logits",
    "inplace_backward": "consume_logits",
    "loss_scale_factor": "loss_scale, or spec=methods.verl(loss_scale_factor=...)",
    "weights": "token_weights",
    "loss_weights": "token_weights",
    "final_logit_softcapping": "softcap",
}


def head_options(op: str, keywords: dict[str, Any], own: tuple[str, ...] = ()) -> HeadOptions:
    """The keywords as HEAD; anything else is a TypeError. ``own`` are the op's own keywords, for the message."""
    _check(op, keywords, _HEAD, own)
    return HeadOptions(**keywords)


def data_options(op: str, keywords: dict[str, Any], own: tuple[str, ...] = ()) -> DataOptions:
    """The keywords as DATA."""
    _check(op, keywords, _DATA, own)
    return DataOptions(**keywords)


def all_options(op: str, keywords: dict[str, Any], own: tuple[str, ...] = ()) -> tuple[HeadOptions, DataOptions]:
    """The keywords as HEAD and DATA."""
    _check(op, keywords, _HEAD + _DATA, own)
    head = {name: value for name, value in keywords.items() if name in _HEAD}
    return HeadOptions(**head), DataOptions(**{name: value for name, value in keywords.items() if name in _DATA})


def reject_unknown(op: str, keywords: dict[str, Any], known: tuple[str, ...]) -> None:
    """A TypeError for the first keyword that is none of ``known``."""
    _check(op, keywords, (), known)


def _check(op: str, keywords: dict[str, Any], known: tuple[str, ...], own: tuple[str, ...]) -> None:
    for name in keywords:
        if name not in known:
            _reject(op, name, known + own)


def _reject(op: str, name: str, known: tuple[str, ...]) -> NoReturn:
    hint = ""
    alias = ALIASES.get(name, "")
    if alias.split("=")[0].split(",")[0] in known:
        hint = f" Here it is {alias}."
    elif near := difflib.get_close_matches(name, known, n=1):
        hint = f" Did you mean {near[0]}?"
    raise TypeError(f"{op}() got an unexpected keyword argument {name!r}.{hint}")
