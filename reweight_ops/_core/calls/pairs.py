"""The keywords of a pair loss, and which of them a spec needs."""

from __future__ import annotations

import dataclasses
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..rows.pairs import LAYOUTS
from ..rows.rows import Rows
from ..spec.pairs import PairSpec


class PairKeywords(TypedDict, total=False):
    """For type checkers; the same names as :class:`PairOptions` (a test holds them together)."""

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
class PairOptions:
    """The keywords of a pair loss beside HEAD, each with its default."""

    completion_mask: Any = None
    cu_seqlens: Any = None
    sequence_ids: Any = None
    num_sequences: int | None = None
    pairs: str = "halves"
    ref_per_token_logps: Any = None
    ref_sequence_logps: Any = None
    old_per_token_logps: Any = None
    old_sequence_logps: Any = None
    ref_logits: Any = None
    per_token_kl: Any = None
    reward_mask: Any = None
    kl_mask: Any = None
    reward_margins: Any = None
    judge_margins: Any = None
    consistency: Any = None
    chosen_values: Any = None
    rejected_values: Any = None
    noise: Any = None
    num_pairs_in_batch: Any = None
    loss_scale: Any = 1.0
    validate: bool = False

    def named(self) -> dict[str, Any]:
        """By public name, for the resolver and its messages."""
        return {name: getattr(self, name) for name in OPTION_NAMES}


OPTION_NAMES = tuple(f.name for f in dataclasses.fields(PairOptions))

#: What a part may need: any one of these keywords. ``order`` (sequences one after the other) and ``log_sum_p_sq`` are seen to elsewhere.
NEEDS = {
    "ref": ("ref_per_token_logps", "ref_sequence_logps"),
    "ref_tokens": ("ref_per_token_logps",),
    "old": ("old_per_token_logps", "old_sequence_logps"),
    "kl": ("ref_logits", "per_token_kl"),
    **{
        name: (name,)
        for name in (
            "reward_mask",
            "kl_mask",
            "reward_margins",
            "judge_margins",
            "consistency",
            "chosen_values",
            "rejected_values",
            "noise",
        )
    },
}
_PER_PAIR = ("reward_margins", "judge_margins", "consistency", "chosen_values", "rejected_values")


def check_inputs(rows: Rows, spec: PairSpec, options: PairOptions) -> None:
    """Everything the spec needs is there, once, and nothing else is."""
    name = f"the spec {spec.name!r}" if spec.name else "the spec"
    if options.pairs not in LAYOUTS:
        raise rows.error(f"pairs is {options.pairs!r}, expected 'halves' (all chosen, then all rejected) or 'interleaved'.")
    sequences = rows.need_sequences("a pair loss")
    if sequences.count % spec.group_size:
        what = "pairs" if spec.group_size == 2 else f"lists of {spec.group_size}"
        raise rows.error(f"there are {sequences.count} sequences, which form no {what}.")
    for need in sorted(spec.requires):
        given = [k for k in NEEDS.get(need, ()) if getattr(options, k) is not None]
        if need in NEEDS and len(given) != 1:
            keywords = " or ".join(NEEDS[need])
            raise rows.error(f"{name} needs {keywords}." if not given else f"pass {keywords}, not both.")
    read = {k for need in spec.requires for k in NEEDS.get(need, ())}
    for keyword in sorted({k for ks in NEEDS.values() for k in ks} - read):
        if getattr(options, keyword) is not None:
            raise rows.error(f"{name} does not read {keyword}; it would have no effect.")
    if "order" in spec.requires and options.sequence_ids is not None:
        raise rows.error("ld_alpha counts positions, so sequences must lie one after the other: pass [B, T] tensors or cu_seqlens.")


def token_inputs(rows: Rows, options: PairOptions) -> dict[str, Tensor]:
    """The stored token vectors ``[N]``, 0 where a row is out."""
    found = {}
    for key, keyword, stored in (
        ("ref_logp", "ref_per_token_logps", True),
        ("old_logp", "old_per_token_logps", True),
        ("kl", "per_token_kl", False),
        ("reward_mask", "reward_mask", False),
        ("kl_mask", "kl_mask", False),
    ):
        value = getattr(options, keyword)
        if value is not None:
            if not isinstance(value, Tensor) or value.numel() != rows.count:
                raise rows.error(f"{keyword} must be a tensor {rows.shape}, one number a token.")
            found[key] = torch.where(rows.keep, rows.per_row(keyword, value, logps=stored), 0)
    return found


def sequence_inputs(rows: Rows, options: PairOptions) -> dict[str, Tensor]:
    """The stored sums ``[S]``."""
    count = rows.need_sequences("a pair loss").count
    return {
        key: _vector(rows, keyword, getattr(options, keyword), count, "sequence", stored=True)
        for key, keyword in (("ref_logp", "ref_sequence_logps"), ("old_logp", "old_sequence_logps"))
        if getattr(options, keyword) is not None
    }


def pair_inputs(rows: Rows, options: PairOptions, pairs: int) -> dict[str, Tensor]:
    """The caller's inputs per pair ``[P]`` (``noise``: ``[P + 1]``), detached."""
    found = {k: _vector(rows, k, getattr(options, k), pairs, "pair") for k in _PER_PAIR if getattr(options, k) is not None}
    if options.noise is not None:
        found["noise"] = _vector(rows, "noise", options.noise, pairs + 1, "pair, and one more")
    return {name: value.detach() for name, value in found.items()}


def _vector(rows: Rows, name: str, value: Any, count: int, what: str, stored: bool = False) -> Tensor:
    if not isinstance(value, Tensor) or tuple(value.shape) not in ((count,), (count, 1)):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise rows.error(f"{name} has shape {got}, expected ({count},): one number a {what}.")
    if value.device != rows.device:
        raise rows.error(f"{name} is on {value.device}, the logits or log-probs are on {rows.device}.")
    if stored and value.dtype not in (torch.float32, torch.float64):
        raise rows.error(f"{name} is {value.dtype}: log-probs in 16 bits lose the ratio; compute them with .float().")
    if stored and value.requires_grad:
        raise rows.error(f"{name} requires grad, but no gradient flows to stored log-probs: pass it detached.")
    return value.reshape(-1).to(rows.dtype)
