"""Completions in groups, one group per prompt: the resolver of group arguments, and
statistics of a group.

Every function on rewards takes ``[B]`` tensors and one of two arguments.
``group_size=G`` is an int: groups are runs of consecutive rows, and ``B`` is a multiple
of ``G``. ``group_ids`` is ``[B]`` with ints in ``[0, num_groups)``: groups may differ
in size and come in any order. It needs ``num_groups``, an int, so that nothing waits
for a GPU. An id outside of that range is an error on the CPU. On a GPU, and inside
``torch.compile``, its row is NaN.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from ...errors import InvalidCall
from .groups import Groups, describe
from .structure import is_readable


class GroupKeywords(TypedDict, total=False):
    """The keywords that say how rows form groups: ``group_size``, or ``group_ids`` with
    ``num_groups``.
    """

    group_size: int | None
    group_ids: Tensor | None
    num_groups: int | None


def require(op: str, ok: Tensor, message: str, x: Tensor) -> Tensor:
    """Return ``x`` if ``ok`` (bool, the shape of ``x``) holds everywhere.

    Otherwise raise on the CPU. On a GPU, return NaN where it does not hold.
    """
    if is_readable(ok):
        if not bool(ok.all()):
            raise InvalidCall(f"{op}: {message}")
        return x
    return torch.where(ok, x, torch.nan)


def is_correct(op: str, name: str, x: Tensor) -> Tensor:
    """Return where labels say correct: above 0.

    A label below 0 is an error on the CPU, because labels of -1 and 1 are easily taken
    for those of 0 and 1. On a GPU it says wrong.
    """
    message = (
        f"{name} has a number below 0: a correct answer is 1, a wrong one 0 "
        "(labels.clamp(min=0) makes these of -1 and 1)."
    )
    return require(op, ~(x < 0), message, x) > 0


#: The shape that an argument must have. A tensor stands for its shape and its device.
Like: TypeAlias = tuple[int, ...] | Tensor


def on_device(op: str, name: str, value: Tensor, like: Like | None) -> None:
    """Raise for a tensor on another device."""
    if isinstance(like, Tensor) and value.device != like.device:
        raise InvalidCall(f"{op}: {name} is on {value.device}, other tensors on {like.device}.")


def floats(op: str, name: str, value: Any, like: Like | None = None) -> Tensor:
    """Return a tensor argument, detached.

    fp32 and fp64 stay as they are. Integers and bools become fp32. 16-bit floats, wrong
    shapes and other devices are errors.
    """
    if not isinstance(value, Tensor):
        raise InvalidCall(f"{op}: {name} is a {type(value).__name__}, expected a tensor.")
    if value.dtype.is_complex:
        raise InvalidCall(f"{op}: {name} is {value.dtype}, expected real numbers.")
    if value.dtype in (torch.float16, torch.bfloat16):
        raise InvalidCall(
            f"{op}: {name} is {value.dtype}: statistics in 16 bits lose small differences; "
            "pass it as .float()."
        )
    shape = like if like is None or isinstance(like, tuple) else tuple(like.shape)
    if shape is not None and tuple(value.shape) != shape:
        raise InvalidCall(
            f"{op}: {name} has shape {tuple(value.shape)}, expected {shape}. "
            f"{describe({name: value})}"
        )
    on_device(op, name, value, like)
    x = value.detach()
    return x if x.is_floating_point() else x.float()


def like(op: str, name: str, value: Any, x: Tensor) -> Tensor:
    """Return a second tensor argument. It must have the shape and dtype of the first,
    ``x``.
    """
    return floats(op, name, value, x).to(x.dtype)


def where_valid(op: str, completion_mask: Any, like: Like | None = None) -> Tensor:
    """Return a mask of any dtype as bool, True where it is not 0."""
    if isinstance(completion_mask, Tensor):
        completion_mask = completion_mask != 0
    return floats(op, "completion_mask", completion_mask, like) != 0


class _CheckedGroups(Groups):
    """Groups that show a row of no group as NaN."""

    def spread(self, y: Tensor) -> Tensor:
        if self.index is None:
            return super().spread(y)
        return torch.cat([y, y.new_full((1,), torch.nan)])[self.index]


@dataclass(frozen=True)
class Grouped:
    """``values [B]`` in groups.

    A statistic is ``[B]`` too, and each row holds that of its group. Rows that are not
    ``scored`` (NaN rewards) are in no statistic.
    """

    op: str
    groups: Groups
    values: Tensor  # 0 where not scored
    scored: Tensor

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the scored rows of a group."""
        return self.groups.spread(self.groups.sum(torch.where(self.scored, x, 0)))

    @property
    def size(self) -> Tensor:
        """Return how many rows of the group are scored."""
        return self.sum(torch.ones_like(self.values))

    def max(self, x: Tensor) -> Tensor:
        """Return the maximum of a group. It is -inf for a group without a
        scored row."""
        x = torch.where(self.scored, x, -torch.inf)
        if self.groups.index is None:
            return self.groups.spread(x.view(self.groups.count, self.groups.length).amax(-1))
        start = x.new_full((self.groups.count + 1,), -torch.inf)
        return self.groups.spread(
            start.scatter_reduce(0, self.groups.index, x, "amax")[: self.groups.count]
        )

    def min(self, x: Tensor) -> Tensor:
        return -self.max(-x)

    def mean(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the mean of a group. It is 0 for an empty group.

        It is measured from the least value that counts, so that the mean of equal
        values is exactly that value.
        """
        w = torch.ones_like(x) if weights is None else weights
        least = self.min(x if weights is None else torch.where(w > 0, x, torch.inf))
        anchor = torch.where(least.isfinite(), least, torch.where(least.isnan(), least, 0))
        total = self.sum(w)
        return anchor + self.sum(w * (x - anchor)) / torch.where(total == 0, 1, total)

    def std(self, x: Tensor, correction: int = 1, weights: Tensor | None = None) -> Tensor:
        """Return the standard deviation of a group. It is 0 for a group of one.

        ``correction=1`` divides by ``n - 1`` (as ``torch.std``), and 0 by ``n``.
        """
        w = torch.ones_like(x) if weights is None else weights
        squares = self.sum(w * (x - self.mean(x, weights)) ** 2)
        return (squares / (self.sum(w) - correction).clamp(min=1)).sqrt()

    @property
    def centered(self) -> Tensor:
        """Return the values minus the mean of their group. It is exactly 0 where the
        values of a group are equal.
        """
        return self.values - self.mean(self.values)

    @property
    def index(self) -> Tensor:
        """Return ``[B]`` int64: the group of each row."""
        if self.groups.index is not None:
            return self.groups.index
        return torch.arange(len(self.values), device=self.values.device) // self.groups.length

    def order(self, key: Tensor) -> Tensor:
        """Return ``[B]`` int64: the rows sorted by group, then key, then row.

        Rows without a score are last in their group.
        """
        first = torch.where(self.scored, key, torch.nan).sort(stable=True).indices
        return first[self.index[first].sort(stable=True).indices]

    def rank(self, key: Tensor) -> Tensor:
        """Return ``[B]`` int64: the place of a row in its group by ascending key, from
        0.

        Ties are ordered by row. Rows without a score are last.
        """
        place = torch.empty_like(self.index).scatter_(
            0, self.order(key), torch.arange(len(key), device=key.device)
        )
        return place - self.start[self.index]

    @property
    def start(self) -> Tensor:
        """Return ``[count + 1]`` int64: where each group begins in :meth:`order`.

        The last entry is for rows of no group.
        """
        sizes = torch.zeros(self.groups.count + 1, dtype=torch.int64, device=self.index.device)
        sizes = sizes.index_put((self.index,), torch.ones_like(self.index), accumulate=True)
        return sizes.cumsum(0) - sizes

    def result(self, x: Tensor) -> Tensor:
        """Return the values with 0 for a row without a score."""
        return torch.where(self.scored, x, 0)

    def like(self, name: str, value: Any) -> Tensor:
        """Return another ``[B]`` argument."""
        return like(self.op, name, value, self.values)

    def mask(self, name: str, value: Any) -> Tensor:
        """Return another ``[B]`` argument as bool, True where it is not 0."""
        return self.like(name, value) != 0


def grouped(
    op: str, rewards: Any, keywords: Any, *, name: str = "rewards", whole: bool = False
) -> Grouped:
    """Resolve ``[B]`` rewards and :class:`GroupKeywords`.

    With ``whole``, all rows are one group if there are no keywords.
    """
    for key in keywords:
        if key not in GroupKeywords.__annotations__:
            near = difflib.get_close_matches(key, GroupKeywords.__annotations__, n=1)
            raise TypeError(
                f"{op}() got an unexpected keyword argument "
                f"{key!r}.{f' Did you mean {near[0]}?' if near else ''}"
            )
    x = floats(op, name, rewards)
    if x.dim() != 1:
        raise InvalidCall(
            f"{op}: {name} has shape {tuple(x.shape)}, expected (B,): one value per completion. "
            f"{describe({name: x})}"
        )
    size, ids, count = (keywords.get(k) for k in ("group_size", "group_ids", "num_groups"))
    if whole and size is None and ids is None and count is None:
        size = len(x)
    if (size is None) == (ids is None) or (ids is None) != (count is None):
        raise InvalidCall(f"{op}: pass group_size, or group_ids with num_groups, and not both.")
    scored = ~x.isnan()
    return Grouped(
        op,
        _equal(op, name, x, size) if ids is None else _listed(op, x, ids, count),
        torch.where(scored, x, 0),
        scored,
    )


def _equal(op: str, name: str, x: Tensor, size: Any) -> Groups:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1 or len(x) % size:
        if isinstance(size, int) and size == len(x) == 0:
            return Groups(0, 1)
        raise InvalidCall(
            f"{op}: group_size is {size!r}; it must be an int that divides the {len(x)} rows of "
            f"{name}."
        )
    return Groups(len(x) // size, size)


def whole_number(op: str, name: str, value: Any, least: int = 1) -> int:
    """Check a count. It is an int, so that nothing waits for a GPU."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool) or value < least:
        raise InvalidCall(
            f"{op}: {name} is {value!r}, expected "
            f"{'a positive int' if least == 1 else f'an int of at least {least}'}."
        )
    return value  # type: ignore[return-value]


def indices(
    op: str, name: str, ids: Any, like: Like | None, count: int, total: str, least: int = 0
) -> Tensor:
    """Return indices as int64.

    An index outside of ``[least, count)`` is an error on the CPU, and becomes ``count``
    elsewhere. ``total`` is the name of ``count`` in messages.
    """
    any_shape = like is None
    if like is None:
        like = tuple(ids.shape) if isinstance(ids, Tensor) else ()
    shape = like if isinstance(like, tuple) else tuple(like.shape)
    if (
        not isinstance(ids, Tensor)
        or ids.dtype not in (torch.int32, torch.int64)
        or tuple(ids.shape) != shape
    ):
        of_shape = "" if any_shape else f" of shape {shape}"
        raise InvalidCall(
            f"{op}: {name} must be an int32 or int64 tensor{of_shape}. {describe({name: ids})}"
        )
    on_device(op, name, ids, like)
    inside = (ids >= least) & (ids < count)
    if is_readable(ids) and not bool(inside.all()):
        at = (~inside).nonzero()[0].tolist()
        raise InvalidCall(
            f"{op}: {name}{at} is {ids[tuple(at)].item()}, outside [{least}, {total}={count})."
        )
    return torch.where(inside, ids, count).long()


def _listed(op: str, x: Tensor, ids: Any, count: Any) -> Groups:
    whole_number(op, "num_groups", count)
    return _CheckedGroups(count, index=indices(op, "group_ids", ids, x, count, "num_groups"))
