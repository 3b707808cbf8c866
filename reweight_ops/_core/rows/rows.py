"""A call's rows: which of them are valid, how they form sequences, and per-row
arguments as ``[N]``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall, UnsupportedRequest
from ..detached import plain
from ..ranges import check_inputs
from .across import Across
from .constants import ConstantRows, as_tensor, varies
from .groups import Groups, describe
from .ids import check_ids
from .primitives import Masked, RowPrimitives
from .structure import is_readable

#: The reason why nothing runs along a sequence that several ranks have.
NO_ORDER = (
    "runs along a sequence, and no rank knows which tokens of other ranks come before its own. "
    "Gather the log-probs of whole sequences for policy_loss_from_logps."
)


@dataclass(frozen=True)
class Rows:
    """The rows of a call: shape R, masks and groups. Everything per row is flat,
    ``[N]``.
    """

    op: str
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype  # dtype of the row arithmetic: fp32, or fp64 for fp64 logits
    keep: Tensor  # [N] bool: rows in the loss
    denominator: Tensor  # [N] bool: rows that count in denominators
    sequences: Groups | None
    segments: Groups | None
    tensors: dict[str, Any] = field(repr=False)
    ids: Tensor | None = None  # [N] int64, IGNORE_INDEX where not kept
    prompts: Groups | None = None  # groups of sequences: those of one prompt
    # the backend's primitives that found keep, denominator and ids
    primitives: RowPrimitives | None = None
    masked: Masked | None = None  # what they found
    # []: 0, or NaN where the device finds that sequences or groups are malformed and
    # nothing waits for it. Everything that depends on them is a sum with it.
    trust: Tensor | None = None
    across: Across | None = None  # ranks that have more tokens of the same sequences
    by_prompt: Masked | None = None  # the primitives' rows with a sequence for each prompt

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def error(self, message: str) -> InvalidCall:
        return InvalidCall(f"{self.op}: {message} {describe(self.tensors)}")

    def unsupported(self, message: str) -> UnsupportedRequest:
        return UnsupportedRequest(f"{self.op}: {message}")

    def without_inputs(self) -> Rows:
        """Return the same rows without the arguments of the call."""
        return (
            self
            if not self.tensors
            else Rows(
                self.op,
                self.shape,
                self.device,
                self.dtype,
                self.keep,
                self.denominator,
                self.sequences,
                self.segments,
                {},
                self.ids,
                self.prompts,
                self.primitives,
                self.masked,
                self.trust,
                self.across,
                self.by_prompt,
            )
        )

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of ``[N]`` as a 0-d tensor. It includes the rows of other
        ranks.
        """
        return x.sum() if self.across is None else self.across.sum(x.sum())

    def padded_length(self, sequences: Groups) -> int | Tensor:
        """Return the length of sequences that are runs of rows. That of sequences which
        several ranks have is the sum over the ranks.
        """
        length = sequences.length
        if self.across is None:
            return length
        return self.across.sum(torch.full((), length, dtype=self.dtype, device=self.device))

    def refuse_across(self, what: str, why: str) -> None:
        """Raise if several ranks have the sequences. ``what`` knows only the rows of
        one rank.
        """
        if self.across is not None:
            raise self.unsupported(f"sequence_group: {what} {why}")

    def check_divisor(self, name: str, value: Any) -> None:
        """Raise for a divisor of 0 if there are valid rows, where they may be read.

        Without a valid row a divisor of 0 is right, and the loss is 0.
        """
        if (
            is_readable(self.keep)
            and isinstance(value, (int, float))
            and value == 0
            and bool(self.keep.any())
        ):
            raise self.error(
                f"{name} is 0, but rows are valid: pass how many there are in the whole batch, "
                "or None for those of this call."
            )

    def check_ids(self, vocab_total: int) -> None:
        """Raise for an id outside of ``[0, vocab_total)``, where ids may be read.

        It is for a call that did not know the vocabulary when its rows were resolved.
        """
        assert self.ids is not None
        check_ids(self.op, self.ids, vocab_total, False, self.tensors)

    def trusted(self, loss: Tensor) -> Tensor:
        """Return the loss, or NaN if :attr:`trust` is NaN. This holds also if malformed
        offsets leave no valid row.
        """
        return loss if self.trust is None else loss + self.trust

    def also_trusted(self, trust: Tensor) -> Rows:
        """Return the same rows with a further :attr:`trust`."""
        both = trust if self.trust is None else self.trust + trust
        masked, by_prompt = (
            None if found is None else found._replace(trust=both)
            for found in (self.masked, self.by_prompt)
        )
        return dataclasses.replace(self, trust=both, masked=masked, by_prompt=by_prompt)

    def need_sequences(self, why: str) -> Groups:
        if self.sequences is None:
            raise self.error(
                f"{why} needs sequences: pass [B, T] tensors, or cu_seqlens, or sequence_ids "
                "with num_sequences."
            )
        return self.sequences

    def need_prompts(self, why: str, group_size: int | None = None) -> Groups:
        """Return the groups of sequences that share a prompt: the call's ``group_ids``,
        or runs of ``group_size`` sequences.
        """
        count = self.need_sequences(why).count
        if (group_size is None) == (self.prompts is None):
            raise self.error(f"{why} needs either a group_size, or group_ids [S] with num_groups.")
        if group_size is None:
            assert self.prompts is not None
            return self.prompts
        if count % group_size:
            raise self.error(
                f"{why}: {count} sequences are not a multiple of group_size = {group_size}."
            )
        return Groups(count // group_size, length=group_size)

    def unflatten(self, x: Tensor) -> Tensor:
        return x.view(self.shape)

    def flatten_per_token(
        self, name: str, value: Any, *, logps: bool = False, differentiable: bool = False
    ) -> Tensor:
        """Return a per-row argument as ``[N]`` in the row dtype.

        It may have the token shape or the sequence shape, or be a constant. Any other
        shape is an error. With ``logps`` the argument holds log-probs. They have no
        gradient unless they are ``differentiable``.
        """
        if not isinstance(value, Tensor):
            if varies(value):
                check_inputs(self.op, ConstantRows, ((name, value),))
                return as_tensor(value, self.dtype, self.device).expand(self.count).contiguous()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
                allowed = ConstantRows.__ranges__.get(name)
                if allowed is not None and not allowed.has(value):
                    raise self.error(f"{name} is {value}, expected {allowed}.")
                return torch.full((self.count,), float(value), dtype=self.dtype, device=self.device)
            got = "NaN" if isinstance(value, float) else f"a {type(value).__name__}"
            raise self.error(f"{name} is {got}, expected a tensor or a number.")
        value = plain(value)
        self._check(name, value, logps, differentiable)
        found = self._spread(name, value)
        if found.dtype != self.dtype:  # the rows and their dtype in one copy
            found = found.to(self.dtype, memory_format=torch.contiguous_format)
        flat = found.reshape(-1)
        if (
            not torch.compiler.is_compiling()
            and flat.is_inference()
            and not torch.is_inference_mode_enabled()
        ):
            flat = flat.clone()  # autograd refuses to save an inference tensor
        return flat.contiguous()

    def is_per_token(self, value: Tensor) -> bool:
        """Return whether a per-row argument has one value per token, which may differ
        inside a sequence.
        """
        short = (
            self.sequences is not None
            and self.sequences.index is None
            and self.sequences.length < 2
        )
        return value.dim() > 0 and not short and tuple(value.shape) in (self.shape, (self.count,))

    def _check(self, name: str, value: Tensor, logps: bool, differentiable: bool) -> None:
        if value.device != self.device:
            raise self.error(
                f"{name} is on {value.device}, the logits or log-probs are on {self.device}."
            )
        if value.dtype.is_complex:
            raise self.error(f"{name} is {value.dtype}, expected real numbers.")
        if logps and value.dtype not in (torch.float32, torch.float64):
            raise self.error(
                f"{name} is {value.dtype}: log-probs in 16 bits lose the ratio; compute them "
                "with .float()."
            )
        if logps and value.requires_grad and not differentiable:
            raise self.error(
                f"{name} requires grad, but no gradient flows to stored log-probs: pass it "
                "detached."
            )

    def _spread(self, name: str, value: Tensor) -> Tensor:
        """Return a per-row argument with one value for each row.

        It is ``[N]`` or has the shape of the rows.
        """
        shape, rows = tuple(value.shape), self.shape
        if value.dim() == 0:
            return value.expand(self.count)
        packed = self.sequences is not None and self.sequences.index is not None
        if shape == rows or (packed and shape == (self.count,)):
            return value
        if packed:
            assert self.sequences is not None
            if shape in ((self.sequences.count, 1), (self.sequences.count,)) and shape != (
                self.count,
            ):
                return self._spread_packed(value.reshape(-1))
            expected = f"({self.count},) per token, or ({self.sequences.count}, 1) per sequence"
        else:
            head = rows[:-1]
            if shape in (head, (*head, 1)):
                return value.reshape(*head, 1).expand(rows)
            expected = f"{rows} per token" + (
                f", or {head} or {(*head, 1)} per sequence" if head else ", or a number"
            )
        raise self.error(f"{name} has shape {shape}; the rows are {rows}, so expected {expected}.")

    def _spread_packed(self, value: Tensor) -> Tensor:
        assert self.sequences is not None
        if (
            self.primitives is not None
            and self.primitives.spread is not None
            and not value.requires_grad
        ):
            assert self.masked is not None
            return self.primitives.spread(self.masked, value)
        spread = self.sequences.spread(value)
        return spread if self.trust is None else spread + self.trust
