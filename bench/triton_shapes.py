"""The Triton kernels with one table of launch shapes (``triton_kernels/config.py``), as
a variant.

It is timed with the variants of the CUDA kernels. Its settings are ``TRITON_SHAPES=``
and the table's name. Tables add in different orders, so that their error is checked and
not their bits.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from reweight_ops._core.backends import select
from reweight_ops.triton_kernels import config

_VARIABLE, _SETTING = "REWEIGHT_OPS_TRITON_SHAPES", "TRITON_SHAPES="

#: All tables. bench/NOTES.md has a prediction for each.
VARIANTS = {f"triton, {name}": _SETTING + name for name in config.VARIANTS}


def table_of(settings: str) -> str | None:
    """Name of the table in a variant's settings, or None for settings of the CUDA
    kernels.

    Raises for an unknown table.
    """
    if not settings.startswith(_SETTING):
        return None
    name = settings.removeprefix(_SETTING)
    if name not in config.VARIANTS:
        raise ValueError(
            f"setting {settings!r}: expected {_SETTING} and one of {sorted(config.VARIANTS)}"
        )
    return name


@dataclass(frozen=True)
class TritonPrimitives:
    """Primitives of the Triton backend with the launch shapes of a table."""

    table: str

    def token_stats(self, *args: Any) -> Any:
        return self._run("token_stats", args)

    def top_stats(self, *args: Any) -> Any:
        return self._run("top_stats", args)

    def token_grad(self, *args: Any) -> Any:
        return self._run("token_grad", args)

    def token_loss_grad(self, *args: Any) -> Any:
        return self._run("token_loss_grad", args)

    # These have one table.
    def divergence_stats(self, *args: Any) -> Any:
        return self._run("divergence_stats", args)

    def divergence_grad(self, *args: Any) -> Any:
        return self._run("divergence_grad", args)

    def divergence_loss_grad(self, *args: Any) -> Any:
        return self._run("divergence_loss_grad", args)

    def _run(self, primitive: str, args: tuple[Any, ...]) -> Any:
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = self.table
        try:
            return getattr(select.load("triton"), primitive)(*args)
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before
