"""``evaluate_rows`` on the CPU: a loss program on stored rows, interpreted in C++."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..formula.base import TOKEN_FIELDS
from ..formula.loss_program import ONE_PASS, Program, loss_graph
from ..formula.table import build_table
from .cpu_threads import threads
from .native_programs import Programs

_DTYPES = (torch.float32, torch.float64)


class _Loaded(NamedTuple):
    table: Any  # an object of the module's own class
    words: Tensor  # what it points at
    outputs: tuple[int, ...]
    reads: frozenset[str]
    rows: int  # of the table of row weights
    parameters: int


class RowsEvaluator:
    """The primitive ``evaluate_rows`` of
    :class:`~reweight_ops._core.backends.base.Backend`, by a module of kernels.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self._programs = Programs(module)
        self._loaded = lru_cache(maxsize=256)(self._load)

    def _load(self, program: Program, given_ratio: bool, outputs: tuple[str, ...]) -> _Loaded:
        graph = loss_graph(program, given_ratio)
        table = build_table(graph, outputs)
        if table.registers > self.module.max_registers:
            raise InvalidCall(
                f"evaluate_rows: the loss takes {table.registers} registers, at most "
                f"{self.module.max_registers} are supported."
            )
        words = torch.tensor(table.words(), dtype=torch.int64, device="cpu")
        return _Loaded(
            self._programs.load(table, words),
            words,
            table.outputs,
            graph.reads(outputs),
            table.rows,
            table.parameters,
        )

    def __call__(
        self,
        program: Program,
        params: Tensor,
        leaves: dict[str, Tensor],
        row_weights: Tensor,
        outputs: tuple[str, ...] = ONE_PASS,
        keep: Tensor | None = None,
        into: Tensor | None = None,
    ) -> Tensor:
        loaded = self._loaded(program, "log_ratio" in leaves, outputs)
        rows, n = loaded.rows, row_weights.size(-1)
        missing = sorted(x for x in loaded.reads if x in TOKEN_FIELDS and x not in leaves)
        if missing:
            raise InvalidCall(
                f"evaluate_rows: the loss reads {', '.join(missing)}, but the call did not give it."
            )
        if params.dtype not in _DTYPES:
            raise InvalidCall(f"evaluate_rows: params are {params.dtype}, expected fp32 or fp64.")
        shared = rows == 1 or row_weights.stride(0) == 0
        if row_weights.shape != (rows, n):
            raise InvalidCall(
                f"evaluate_rows: row weights are {tuple(row_weights.shape)}, expected {(rows, n)}."
            )
        weights = row_weights[0] if shared else row_weights

        def address(
            name: str, t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype = params.dtype
        ) -> int:
            if t is None:
                return 0
            if (
                t.shape != shape
                or t.dtype != dtype
                or t.device.type != "cpu"
                or not t.is_contiguous()
            ):
                raise InvalidCall(
                    f"evaluate_rows: {name} is {tuple(t.shape)} {t.dtype} {t.device} with "
                    f"strides {t.stride()}, "
                    f"expected {shape} {dtype} on the CPU, contiguous."
                )
            return t.data_ptr()

        shape = (len(outputs), n)
        out = torch.empty(shape, dtype=params.dtype, device="cpu") if into is None else into
        self.module.evaluate_rows(
            params.dtype == torch.float64,
            loaded.table,
            address("params", params, (loaded.parameters,)),
            [address(name, leaves.get(name), (n,)) for name in TOKEN_FIELDS],
            address("row weights", weights, tuple(weights.shape)),
            0 if shared else n,
            address("keep", keep, (n,), torch.bool),
            loaded.outputs,
            address("the result", out, shape),
            n,
            threads(),
        )
        return out
