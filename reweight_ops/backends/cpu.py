"""The C++ backend: fp32, bf16 and fp16 logits on the CPU, every program whose rules are compiled in.

``_C`` takes raw addresses and checks nothing, so everything that could make it read or write out of bounds is checked here, once.
Threads follow ``torch.set_num_threads``. A row is swept twice for a loss, the second time from the cache.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..codegen.trace import trace_rule, trace_weight
from ..errors import BackendUnavailable, InvalidCall
from ..rules.base import RULES, WEIGHTS
from .base import COEFS, LOSS_ROWS, STATS, Backend, Head, Program, Request, RowInputs, rows_of

try:
    from .. import _C
except ImportError as error:
    raise BackendUnavailable(
        f"the compiled extension reweight_ops._C is missing or does not load ({error}); reinstall with a C++ compiler and REWEIGHT_OPS_BUILD=cpu."
    ) from error

_MAX_TERMS, _MAX_WEIGHTS = 4, 4
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@lru_cache(maxsize=256)
def _why_not(program: Program) -> str | None:
    if len(program.terms) > _MAX_TERMS or len(program.weights) > _MAX_WEIGHTS:
        return f"one pass evaluates at most {_MAX_TERMS} terms and {_MAX_WEIGHTS} weights"
    for what, names, registry, built in (
        ("rule", program.terms, RULES, _C.rules()),
        ("weight", tuple(name for name, _ in program.weights), WEIGHTS, _C.weights()),
    ):
        for name in names:
            if name not in built:
                return f"{what} {name!r} is not compiled in"
            if built[name] != len(registry[name].parameter_names()):
                return f"{what} {name!r} was compiled with other parameters: rebuild the extension"
    return None


def _unsupported_reason(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"logits are on {request.device}, this backend runs on the CPU"
    if request.dtype not in _DTYPES:
        return f"logits are {request.dtype}, expected fp32, bf16 or fp16"
    return None if request.program is None else _why_not(request.program)


@lru_cache(maxsize=256)
def _compile(program: Program) -> tuple[_C.Program, int, bool]:
    """The program for ``_C``, the length of its parameters, and whether it reads log_sum_p_sq."""
    reason = _why_not(program)
    if reason is not None:
        raise InvalidCall(f"token_loss_grad on the CPU: {reason}.")
    rules = [RULES[name] for name in program.terms]
    weights = [WEIGHTS[name] for name, _ in program.weights]
    length = 2 + sum(1 + len(r.parameter_names()) for r in rules) + sum(len(w.parameter_names()) for w in weights)
    read = frozenset().union(*(trace_rule(r).leaves for r in rules), *(trace_weight(w).leaves for w in weights))
    compiled = _C.Program(list(program.terms), [(name, scope == "all") for name, scope in program.weights])
    return compiled, length, "log_sum_p_sq" in read


def _strides(logits: Tensor) -> tuple[int, int, int]:
    rows = rows_of(logits)
    return rows.per_batch, rows.batch_stride, rows.row_stride


def _address(name: str, t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """``data_ptr()`` of a contiguous CPU tensor of exactly this shape and dtype; 0 for None."""
    if t is None:
        return 0
    if t.shape != shape or t.dtype != dtype or t.device.type != "cpu" or not t.is_contiguous():
        layout = "contiguous" if t.is_contiguous() else f"strides {t.stride()}"
        raise InvalidCall(f"{name} is {tuple(t.shape)} {t.dtype} {t.device} {layout}, expected {tuple(shape)} {dtype} cpu contiguous.")
    return t.data_ptr()


def _check_layout(name: str, t: Tensor) -> None:
    if t.dim() not in (2, 3) or t.device.type != "cpu" or t.dtype not in _DTYPES or t.layout != torch.strided:
        raise InvalidCall(f"{name} is {tuple(t.shape)} {t.dtype} {t.device}, expected [N, V] or [B, T, V], fp32, bf16 or fp16 on the CPU.")
    if t.stride(-1) != 1 and t.size(-1) > 1:
        raise InvalidCall(f"{name} has strides {t.stride()}: the last dimension must be contiguous.")


def _call(logits: Tensor, ids: Tensor, temperature: Tensor, head: Head) -> _C.Call:
    _check_layout("logits", logits)
    n, columns = logits.numel() // max(logits.size(-1), 1), logits.size(-1)
    if not 0 < head.vocab_size <= columns:
        raise InvalidCall(f"vocab_size is {head.vocab_size}, logits have {columns} columns.")
    per_row = temperature.numel() != 1
    return _C.Call(
        _DTYPES[logits.dtype], logits.data_ptr(), _strides(logits), n, columns, (head.vocab_size, head.vocab_start, head.total()), head.softcap,
        _address("ids", ids, (n,), torch.int64), _address("temperature", temperature.reshape(-1), (n,) if per_row else (1,)), per_row,
        torch.get_num_threads(),
    )  # fmt: skip


def _out_strides(logits: Tensor, out: Tensor) -> tuple[int, int, int]:
    _check_layout("out", out)
    if out.shape != logits.shape or out.dtype != logits.dtype:
        raise InvalidCall(f"out is {tuple(out.shape)} {out.dtype}, expected {tuple(logits.shape)} {logits.dtype} like the logits.")
    same = out.data_ptr() == logits.data_ptr() and out.stride() == logits.stride()
    if not same and out.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr() and _overlap(out, logits):
        raise InvalidCall("out overlaps the logits without being the same view of them.")
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise InvalidCall(f"out has strides {out.stride()}: rows would overwrite each other.")
    return _strides(out)


def _overlap(a: Tensor, b: Tensor) -> bool:
    def span(t: Tensor) -> tuple[int, int]:
        first = t.data_ptr()
        return first, first + (sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()

    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 < b1 and b0 < a1


def token_stats(logits: Tensor, ids: Tensor, temperature: Tensor, head: Head, stats: tuple[str, ...]) -> Tensor:
    call = _call(logits, ids, temperature, head)
    out = torch.empty(len(stats), ids.numel())
    where = dict(zip(stats, out.unbind(), strict=True))
    _C.token_stats(call, [where[name].data_ptr() if name in where else 0 for name in STATS])
    return out


def token_grad(
    logits: Tensor, ids: Tensor, temperature: Tensor, head: Head, stats: dict[str, Tensor], coefs: dict[str, Tensor | None], out: Tensor
) -> None:
    call, n = _call(logits, ids, temperature, head), (ids.numel(),)
    for name in ("logp", "lse", *(name for name in ("entropy", "log_sum_p_sq") if coefs.get(name) is not None)):
        if stats.get(name) is None:
            raise InvalidCall(f"token_grad: the statistic {name!r} is needed and missing.")
    known = [_address(name, stats.get(name), n) for name in COEFS]
    by = [_address(f"coefficient {name}", coefs.get(name), n) for name in COEFS]
    _C.token_grad(call, known, by, out.data_ptr(), _out_strides(logits, out))


def token_loss_grad(
    logits: Tensor, ids: Tensor, temperature: Tensor, head: Head, inputs: RowInputs, program: Program, params: Tensor, out: Tensor
) -> Tensor:
    compiled, length, reads_p_sq = _compile(program)
    call, n = _call(logits, ids, temperature, head), ids.numel()
    weights = inputs.weights
    shared = len(program.terms) == 1 or weights.stride(0) == 0  # one vector for all terms
    if weights.shape != (len(program.terms), n):
        raise InvalidCall(f"row weights are {tuple(weights.shape)}, expected {(len(program.terms), n)}.")
    rows = torch.empty(len(LOSS_ROWS), n)
    stored = (inputs.old_logp, inputs.adv, inputs.ref_logp, inputs.sampling_logp)
    _C.token_loss_grad(
        call, compiled, _address("params", params, (length,)), reads_p_sq,
        _address("row weights", weights[0] if shared else weights, (n,) if shared else weights.shape), 0 if shared else n,
        [_address(name, t, (n,)) for name, t in zip(("old_logp", "adv", "ref_logp", "sampling_logp"), stored, strict=True)],
        rows.data_ptr(), out.data_ptr(), _out_strides(logits, out),
    )  # fmt: skip
    return rows


BACKEND = Backend("cpu", _unsupported_reason, token_stats, token_grad, token_loss_grad)
