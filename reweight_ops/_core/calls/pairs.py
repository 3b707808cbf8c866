"""Checks of the keywords of a pair loss against the needs of its spec."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rows.pairs import LAYOUTS
from ..rows.rows import Rows
from ..spec.pairs import PairSpec
from .keywords import PairOptions

#: The needs of parts. Any one of the keywords satisfies a need. ``order`` (consecutive
#: sequences) and ``log_sum_p_sq`` are handled elsewhere.
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
    """Check that everything the spec needs is given once, and nothing else."""
    name = f"the spec {spec.name!r}" if spec.name else "the spec"
    if options.pairs not in LAYOUTS:
        raise rows.error(
            f"pairs is {options.pairs!r}, expected 'halves' (all chosen, then all rejected) or "
            "'interleaved'."
        )
    sequences = rows.need_sequences("a pair loss")
    if sequences.count % spec.group_size:
        what = "pairs" if spec.group_size == 2 else f"lists of {spec.group_size}"
        raise rows.error(f"there are {sequences.count} sequences, which do not form {what}.")
    for need in sorted(spec.requires):
        given = [k for k in NEEDS.get(need, ()) if getattr(options, k) is not None]
        if need in NEEDS and len(given) != 1:
            keywords = " or ".join(NEEDS[need])
            raise rows.error(
                f"{name} needs {keywords}." if not given else f"pass {keywords}, not both."
            )
    read = {k for need in spec.requires for k in NEEDS.get(need, ())}
    for keyword in sorted({k for ks in NEEDS.values() for k in ks} - read):
        if getattr(options, keyword) is not None:
            raise rows.error(f"{name} does not read {keyword}; it would have no effect.")
    if "order" in spec.requires and options.sequence_ids is not None:
        raise rows.error(
            "ld_alpha counts positions, so sequences must be consecutive: pass [B, T] tensors "
            "or cu_seqlens."
        )


def token_inputs(rows: Rows, options: PairOptions) -> dict[str, Tensor]:
    """Return the stored token vectors ``[N]``, 0 in ignored rows."""
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
            found[key] = torch.where(
                rows.keep, rows.flatten_per_token(keyword, value, logps=stored), 0
            )
    return found


def sequence_inputs(rows: Rows, options: PairOptions) -> dict[str, Tensor]:
    """Return the stored sums ``[S]``."""
    count = rows.need_sequences("a pair loss").count
    return {
        key: _vector(rows, keyword, getattr(options, keyword), count, "sequence", stored=True)
        for key, keyword in (("ref_logp", "ref_sequence_logps"), ("old_logp", "old_sequence_logps"))
        if getattr(options, keyword) is not None
    }


def pair_inputs(rows: Rows, options: PairOptions, pairs: int) -> dict[str, Tensor]:
    """Return the caller's inputs per pair ``[P]`` (``noise``:
    ``[P + 1]``), detached."""
    found = {
        k: _vector(rows, k, getattr(options, k), pairs, "pair")
        for k in _PER_PAIR
        if getattr(options, k) is not None
    }
    if options.noise is not None:
        found["noise"] = _vector(rows, "noise", options.noise, pairs + 1, "pair, and one more")
    return {name: value.detach() for name, value in found.items()}


def _vector(
    rows: Rows, name: str, value: Any, count: int, what: str, stored: bool = False
) -> Tensor:
    if not isinstance(value, Tensor) or tuple(value.shape) not in ((count,), (count, 1)):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise rows.error(f"{name} has shape {got}, expected ({count},): one number a {what}.")
    if value.device != rows.device:
        raise rows.error(
            f"{name} is on {value.device}, the logits or log-probs are on {rows.device}."
        )
    if stored and value.dtype not in (torch.float32, torch.float64):
        raise rows.error(
            f"{name} is {value.dtype}: log-probs in 16 bits lose the ratio; compute them with "
            ".float()."
        )
    if stored and value.requires_grad:
        raise rows.error(
            f"{name} requires grad, but no gradient flows to stored log-probs: pass it detached."
        )
    return value.reshape(-1).to(rows.dtype)
