"""The common part of the compiled backends: checked calls of a module of kernels.

The modules take raw addresses and check nothing, so everything that could make them
read or write out of bounds is checked here, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendUnavailable, InvalidCall
from ..formula.loss_program import Program
from .base import (
    DERIVATIVES,
    LOSS_ROWS,
    STATS,
    PackedRows,
    Request,
    RowAddresses,
    RowInputs,
    SoftmaxParams,
    rows_of,
)
from .native_programs import Compiled, Programs
from .scale import scale_in_torch, spans_of
from .sources import CSRC, source_hash

_MAX_COLUMNS = 2**31 - 2**20
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def checked(module: Any, part: str) -> Any:
    """Return the module, or raise if it was built from other sources than those beside
    the package.

    An installation from a wheel has no sources. There is a warning too: if other
    backends can serve the calls, the user would not see the error but only slow calls.
    """
    expected = source_hash(part)
    if expected is not None and getattr(module, "sources", None) != expected:
        choice = "REWEIGHT_OPS_BUILD=cuda " if part == "cuda" else ""
        said = (
            f"{module.__name__} was built from other sources; rebuild it with {choice}pip "
            f"install -e {CSRC.parent} --no-deps"
        )
        warnings.warn(f"{said} (until then slower backends serve its calls).", stacklevel=2)
        raise BackendUnavailable(said)
    return module


def dtype_unsupported_reason(request: Request) -> str | None:
    """Return why a compiled backend cannot take the dtypes of a request."""
    for name, dtype in (("logits", request.dtype), ("the other logits", request.other_dtype)):
        if dtype is not None and dtype not in DTYPES:
            return f"{name} are {dtype}, expected fp32, bf16 or fp16"
    return None


class Native:
    """The token primitives of :class:`~.base.Backend` on tensors of one device type,
    and the checks of every call of the module.

    ``place(device)`` gives the last arguments of the module's ``Call``.
    ``check(status)`` sees the status that every primitive returns.
    """

    def __init__(
        self,
        module: Any,
        device_type: str,
        place: Callable[[torch.device], dict[str, int]],
        check: Callable[[int], None],
    ) -> None:
        self.module, self.device_type, self._place, self.check = module, device_type, place, check
        self._programs = Programs(module)
        self.program_unsupported_reason = lru_cache(maxsize=256)(
            self._programs.program_unsupported_reason
        )
        # none is dropped: a captured CUDA graph reads the table's memory at each replay
        self.compiled = cache(self._compile)

    def _compile(self, program: Program, device: torch.device) -> Compiled:
        reason = self.program_unsupported_reason(program)
        if reason is not None:
            raise InvalidCall(f"token_loss_grad on {self.device_type}: {reason}.")
        return self._programs.compile(program, device)

    def address(
        self,
        name: str,
        t: Tensor | None,
        shape: tuple[int, ...],
        like: Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Return the ``data_ptr()`` of a contiguous tensor of exactly this shape and
        dtype on the device of ``like``, or 0 for None.
        """
        if t is None:
            return 0
        if t.shape != shape or t.dtype != dtype or t.device != like.device or not t.is_contiguous():
            layout = "contiguous" if t.is_contiguous() else f"strides {t.stride()}"
            raise InvalidCall(
                f"{name} is {tuple(t.shape)} {t.dtype} {t.device} {layout}, expected "
                f"{tuple(shape)} {dtype} {like.device} contiguous."
            )
        return t.data_ptr()

    def rows(self, names: tuple[str, ...], like: Tensor, n: int) -> tuple[Tensor, list[int]]:
        """Return new rows ``[len(names), n]`` for a primitive to fill, and the address
        of each.

        They are fp32, whatever PyTorch's default dtype is.
        """
        rows = torch.empty((len(names), n), dtype=torch.float32, device=like.device)
        self.address("a result", rows, (len(names), n), like)
        first, size = rows.data_ptr(), 4 * n
        return rows, [first + k * size for k in range(len(names))]

    def _temperature(self, temperature: Tensor, n: int, like: Tensor) -> tuple[int, bool]:
        """Return the address of the temperatures, and whether each row has its own."""
        per_row = temperature.numel() != 1
        # never a copy: its memory would have other contents before a kernel reads it
        flat = temperature.view(-1) if temperature.is_contiguous() else temperature
        return self.address("temperature", flat, (n,) if per_row else (1,), like), per_row

    def _check_layout(self, name: str, t: Tensor) -> None:
        if (
            t.dim() not in (2, 3)
            or t.device.type != self.device_type
            or t.dtype not in DTYPES
            or t.layout != torch.strided
        ):
            raise InvalidCall(
                f"{name} is {tuple(t.shape)} {t.dtype} {t.device}, expected [N, V] or [B, T, "
                f"V], fp32, bf16 or fp16 on {self.device_type}."
            )
        if t.stride(-1) != 1 and t.size(-1) > 1:
            raise InvalidCall(
                f"{name} has strides {t.stride()}: the last dimension must be contiguous."
            )
        if t.size(-1) > _MAX_COLUMNS:
            raise InvalidCall(
                f"{name} has {t.size(-1)} columns, at most {_MAX_COLUMNS} are supported."
            )

    def call(self, logits: Tensor, ids: Tensor, temperature: Tensor, softmax: SoftmaxParams) -> Any:
        self._check_layout("logits", logits)
        n, columns = logits.numel() // max(logits.size(-1), 1), logits.size(-1)
        if not 0 < softmax.vocab_size <= columns:
            raise InvalidCall(f"vocab_size is {softmax.vocab_size}, logits have {columns} columns.")
        return self.module.Call(
            DTYPES[logits.dtype],
            logits.data_ptr(),
            rows_of(logits),
            n,
            columns,
            (softmax.vocab_size, softmax.vocab_start, softmax.total()),
            softmax.softcap,
            self.address("ids", ids, (n,), logits, torch.int64),
            *self._temperature(temperature, n, logits),
            **self._place(logits.device),
        )

    def packed_call(self, rows: PackedRows) -> Any:
        """Return the call for packed rows. Their bounds are unchecked: they may be on a
        device, and nothing waits for it.
        """
        values, ids, temperature = rows.values, rows.ids, rows.temperature
        if values.dtype not in DTYPES or values.device.type != self.device_type:
            raise InvalidCall(
                f"values are {values.dtype} on {values.device}, expected fp32, bf16 or fp16 on "
                f"{self.device_type}."
            )
        n, entries = ids.numel(), max(values.numel(), 1)
        if entries > _MAX_COLUMNS:
            raise InvalidCall(
                f"{entries} ids are kept in total, at most {_MAX_COLUMNS} are supported: make "
                "several calls."
            )
        return self.module.Call(
            DTYPES[values.dtype],
            self.address("values", values, (values.numel(),), values, values.dtype),
            RowAddresses(1, 0, 0),
            n,
            max(entries // max(n, 1), 1),
            (entries, 0, entries),
            rows.softcap,
            self.address("ids", ids, (n,), values, torch.int64),
            *self._temperature(temperature, n, values),
            bounds=self.address("bounds", rows.bounds, (2, n), values, torch.int64),
            **self._place(values.device),
        )

    def out_rows(self, logits: Tensor, out: Tensor) -> RowAddresses:
        self._check_layout("out", out)
        if out.shape != logits.shape or out.dtype != logits.dtype or out.device != logits.device:
            raise InvalidCall(
                f"out is {tuple(out.shape)} {out.dtype} {out.device}, expected "
                f"{tuple(logits.shape)} {logits.dtype} {logits.device} like the logits."
            )
        if not out.numel():
            # no memory: every tensor without memory has the same address
            return rows_of(out)
        same = out.data_ptr() == logits.data_ptr() and out.stride() == logits.stride()
        if (
            not same
            and out.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
            and _overlap(out, logits)
        ):
            raise InvalidCall("out overlaps the logits without being the same view of them.")
        if any(
            size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)
        ):
            raise InvalidCall(f"out has strides {out.stride()}: rows would overwrite each other.")
        return rows_of(out)

    def token_stats(
        self,
        logits: Tensor,
        ids: Tensor,
        temperature: Tensor,
        softmax: SoftmaxParams,
        stats: tuple[str, ...],
    ) -> Tensor:
        return self._stats(self.call(logits, ids, temperature, softmax), logits, ids.numel(), stats)

    def packed_stats(self, rows: PackedRows, stats: tuple[str, ...]) -> Tensor:
        return self._stats(self.packed_call(rows), rows.values, rows.ids.numel(), stats)

    def top_stats(
        self,
        logits: Tensor,
        ids: Tensor,
        temperature: Tensor,
        softmax: SoftmaxParams,
        stats: tuple[str, ...],
        top: int,
    ) -> tuple[Tensor, Tensor]:
        most = min(self.module.most_top, softmax.vocab_size)
        if not 0 < top <= most:
            raise InvalidCall(f"top_stats: top is {top}, expected 1 to {most}.")
        found = ids.new_empty(ids.numel(), top)
        call = self.call(logits, ids, temperature, softmax)
        out, addresses = self.rows(stats, logits, ids.numel())
        where = dict(zip(stats, addresses, strict=True))
        to = self.address("ids", found, (ids.numel(), top), ids, torch.int64)
        self.check(self.module.top_stats(call, [where.get(name, 0) for name in STATS], top, to))
        return out, found

    def _stats(self, call: Any, like: Tensor, n: int, stats: tuple[str, ...]) -> Tensor:
        out, addresses = self.rows(stats, like, n)
        where = dict(zip(stats, addresses, strict=True))
        self.check(self.module.token_stats(call, [where.get(name, 0) for name in STATS]))
        return out

    def token_grad(
        self,
        logits: Tensor,
        ids: Tensor,
        temperature: Tensor,
        softmax: SoftmaxParams,
        stats: dict[str, Tensor],
        derivatives: dict[str, Tensor | None],
        out: Tensor,
    ) -> None:
        call = self.call(logits, ids, temperature, softmax)
        known, by = self._known(logits, ids.numel(), stats, derivatives)
        self.check(
            self.module.token_grad(call, known, by, out.data_ptr(), self.out_rows(logits, out))
        )

    def packed_grad(
        self,
        rows: PackedRows,
        stats: dict[str, Tensor],
        derivatives: dict[str, Tensor | None],
        out: Tensor,
    ) -> None:
        call, values = self.packed_call(rows), rows.values
        known, by = self._known(values, rows.ids.numel(), stats, derivatives)
        to = self.address("out", out, tuple(values.shape), values, values.dtype)
        self.check(self.module.token_grad(call, known, by, to, RowAddresses(1, 0, 0)))

    def _known(
        self, like: Tensor, n: int, stats: dict[str, Tensor], derivatives: dict[str, Tensor | None]
    ) -> tuple[list[int], list[int]]:
        """Return the addresses of statistics and coefficients."""
        for name in (
            "logp",
            "lse",
            *(name for name in ("entropy", "log_sum_p_sq") if derivatives.get(name) is not None),
        ):
            if stats.get(name) is None:
                raise InvalidCall(f"token_grad: the statistic {name!r} is needed and missing.")
        known = [
            self.address(name, stats.get(name), (n,), like) for name in (*DERIVATIVES, "lse_low")
        ]
        return known, [
            self.address(f"coefficient {name}", derivatives.get(name), (n,), like)
            for name in DERIVATIVES
        ]

    def token_loss_grad(
        self,
        logits: Tensor,
        ids: Tensor,
        temperature: Tensor,
        softmax: SoftmaxParams,
        inputs: RowInputs,
        program: Program,
        params: Tensor,
        out: Tensor,
    ) -> Tensor:
        compiled, length, reads_p_sq, entropy_gradient, _ = self.compiled(program, logits.device)
        call, n = self.call(logits, ids, temperature, softmax), ids.numel()
        weights = inputs.row_weights
        # one vector for all terms
        shared = len(program.terms) == 1 or weights.stride(0) == 0
        if weights.shape != (len(program.terms), n):
            raise InvalidCall(
                f"row weights are {tuple(weights.shape)}, expected {(len(program.terms), n)}."
            )
        rows, (address, *_) = self.rows(LOSS_ROWS, logits, n)
        stored = (inputs.old_logp, inputs.adv, inputs.ref_logp, inputs.sampling_logp)
        status = self.module.token_loss_grad(
            call,
            compiled,
            self.address("params", params, (length,), logits),
            reads_p_sq,
            entropy_gradient,
            self.address(
                "row weights",
                weights[0] if shared else weights,
                (n,) if shared else weights.shape,
                logits,
            ),
            0 if shared else n,
            [
                self.address(name, t, (n,), logits)
                for name, t in zip(
                    ("old_logp", "adv", "ref_logp", "sampling_logp"), stored, strict=True
                )
            ],
            address,
            out.data_ptr(),
            self.out_rows(logits, out),
        )
        self.check(status)
        return rows

    def scale(self, grad: Tensor, factor: Tensor) -> None:
        spans = spans_of(grad)
        if spans is None or grad.dtype not in DTYPES:
            scale_in_torch(grad, factor)
            return
        factor = factor.detach().float()  # a copy must outlive the launch
        where = self.address("factor", factor, (), grad)
        self.check(
            self.module.scale(
                DTYPES[grad.dtype], grad.data_ptr(), *spans, where, **self._place(grad.device)
            )
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    def span(t: Tensor) -> tuple[int, int]:
        first = t.data_ptr()
        return first, first + (
            sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
        ) * t.element_size()

    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 < b1 and b0 < a1
