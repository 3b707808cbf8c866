"""Checks of the arguments that say how rows form groups: offsets of sequences, and
every index.

Where values may be read (on a CPU, or with ``validate=True``), an invalid value is an
error that names the place. Elsewhere nothing waits for the device: a flag on the device
says whether all values are valid, and results that depend on them are NaN if not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..transforms import is_wrapped
from .groups import describe


def is_fake(t: Tensor) -> bool:
    return isinstance(t, torch._subclasses.FakeTensor)


def is_readable(t: Tensor) -> bool:
    """Return whether a value may be read.

    It may if that causes no wait for a device, no graph break, and no choice between
    the tensors of ``vmap``.
    """
    return (
        t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not is_fake(t)
        and not is_wrapped(t)
    )


class Structure:
    """The checks of one call. ``tensors`` are its arguments by their public names."""

    def __init__(self, op: str, tensors: dict[str, Any], validate: bool) -> None:
        self._op, self._tensors, self._validate = op, tensors, validate
        self._flag: Tensor | None = None

    def error(self, message: str) -> InvalidCall:
        return InvalidCall(f"{self._op}: {message} {describe(self._tensors)}")

    def tensor(self, name: str, value: Any, device: torch.device) -> None:
        """Check that an index argument is an int32 or int64 tensor on the device of the
        rows.
        """
        if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
            got = value.dtype if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise self.error(f"{name} must be int32 or int64, got {got}.")
        if value.device != device:
            raise self.error(f"{name} is on {value.device}, the rows are on {device}.")

    def count(self, name: str, value: Any) -> None:
        """Check that a number of groups is an int, so that nothing waits for a device.

        It has no upper bound. Groups may be empty: a rank of ``sequence_group`` has few
        rows of many sequences, and a micro-batch may keep the prompt ids of a data set.
        """
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool) or value < 0:
            raise self.error(f"{name} is {value!r}, expected an int of at least 0.")

    def offsets(self, name: str, cu: Tensor, rows: int) -> None:
        """Check that offsets begin at 0, never fall, and do not pass the last row."""
        if not self.reads(cu):
            self._and((cu[0] == 0) & (cu[-1] <= rows) & (cu[1:] >= cu[:-1]).all())
            return
        values = cu.tolist()
        if values[0] != 0:
            raise self.error(
                f"{name}[0] is {values[0]}, expected 0: rows before the first offset are in no "
                "sequence; mask ignored rows."
            )
        if values != sorted(values):
            at = next(i for i in range(1, len(values)) if values[i] < values[i - 1])
            raise self.error(
                f"{name}[{at}] is {values[at]}, less than {name}[{at - 1}] = {values[at - 1]}."
            )
        if values[-1] > rows:
            at = next(i for i, value in enumerate(values) if value > rows)
            raise self.error(f"{name}[{at}] is {values[at]}, but there are {rows} rows.")

    def indices(
        self, name: str, index: Tensor, count: int, total: str, where: Tensor | None = None
    ) -> None:
        """Check that indices (of the rows ``where``, or of all rows) lie in
        ``[0, count)``. ``total`` is the name of ``count``.
        """
        if not index.numel():
            return
        if self.reads(index):
            low, high = (int(bound) for bound in torch.aminmax(index))
            if low >= 0 and high < count:
                return  # the usual case takes one sweep
        bad = (index < 0) | (index >= count)
        if where is not None:
            bad = bad & where
        if not self.reads(index):
            self._and(~bad.any())
        elif bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            raise self.error(
                f"{name}[{row}] (flat) is {int(index[row])}, outside [0, {total} = {count}); an "
                "ignored row has completion_mask 0 or id -100."
            )

    def require(self, ok: Tensor) -> None:
        """Add a condition of the caller where nothing may be read."""
        self._and(ok)

    def trust(self, dtype: torch.dtype) -> Tensor | None:
        """Return None if everything was read.

        Otherwise return a term ``[]`` on the device: 0 if all values are valid, else
        NaN.
        """
        if self._flag is None:
            return None
        return torch.full((), torch.nan, dtype=dtype, device=self._flag.device).masked_fill(
            self._flag, 0.0
        )

    def reads(self, t: Tensor) -> bool:
        """Return whether the values of an index are checked on the host."""
        return t.device.type != "meta" and (self._validate or is_readable(t))

    def _and(self, ok: Tensor) -> None:
        self._flag = ok if self._flag is None else self._flag & ok
