"""The chunked LM head: logits of a few rows at a time in one reused buffer, the kernels in place on it, and the GEMMs around them.

Two autograd Functions, as for logits: statistics (backward recomputes the chunk's logits) and the one-pass loss (three GEMMs in forward).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import library
from .errors import ReweightOpsError

#: Memory for one chunk of logits, and the fewest rows that still make an efficient GEMM (every chunk reads the weight again).
_BUDGET = {"cpu": 96 << 20, "cuda": 1 << 30}
_FEWEST_ROWS = 256
#: Up to this many chunks the weight's gradient is summed in its own dtype, beyond in fp32: each chunk rounds the sum once.
_CHUNKS_IN_WEIGHT_DTYPE = 8
#: Rows without a coefficient are dropped from the backward GEMMs if at least this share of a chunk is: a gather has its price too.
_WORTH_DROPPING = 0.1


class Settings(NamedTuple):
    """What a chunk needs besides tensors."""

    vocab_size: int
    softcap: float
    backend: str
    chunk_rows: int
    logits_dtype: torch.dtype
    drop_inert: bool


class Head(NamedTuple):
    """``logits = hidden @ weightᵀ + bias + lora_scale · (hidden @ lora_aᵀ) @ lora_bᵀ``."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, D]
    lora_b: Tensor | None  # [V, r]
    lora_scale: float


def default_chunk_rows(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows a chunk by the memory budget, a multiple of 64, at least 256 and at most all."""
    fit = _BUDGET.get(device.type, _BUDGET["cuda"]) // max(vocab * dtype.itemsize, 1) // 64 * 64
    return max(min(max(fit, _FEWEST_ROWS), rows), 1)


def _chunks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class _Buffer:
    """One chunk's logits, written by the head's GEMM."""

    def __init__(self, hidden: Tensor, head: Head, settings: Settings) -> None:
        self.head = head
        self.hidden = hidden
        size = min(settings.chunk_rows, hidden.size(0))
        self.data = torch.empty(size, head.weight.size(0), dtype=settings.logits_dtype, device=hidden.device)

    def logits(self, rows: slice) -> Tensor:
        h, out = self.hidden[rows], self.data[: rows.stop - rows.start]
        weight, bias, a, b, scale = self.head
        if out.dtype != h.dtype:
            _mm_wider(h, weight, out)
            if bias is not None:
                out += bias
        elif bias is None:
            torch.mm(h, weight.t(), out=out)
        else:
            torch.addmm(bias, h, weight.t(), out=out)
        if a is not None and b is not None:
            out.addmm_((h @ a.t()).to(out.dtype), b.t().to(out.dtype), alpha=scale)
        return out


def _mm_wider(h: Tensor, weight: Tensor, out: Tensor) -> None:
    """fp32 logits from 16-bit operands: one rounding less. On a GPU at GEMM speed; elsewhere in fp32, a slice of the weight at a time."""
    if h.device.type == "cuda":
        out.copy_(torch.mm(h, weight.t(), out_dtype=out.dtype))
        return
    wide = h.to(out.dtype)
    for columns in _chunks(weight.size(0), 8192):
        out[:, columns] = wide @ weight[columns].to(out.dtype).t()


class _Gradients:
    """Accumulates what is asked for: gradients of hidden, weight, bias and LoRA factors, from chunks of logit gradients."""

    def __init__(self, hidden: Tensor, head: Head, needs: tuple[bool, ...], chunks: int) -> None:
        self.hidden, self.head = hidden, head
        wide = torch.float32 if chunks > _CHUNKS_IN_WEIGHT_DTYPE and head.weight.dtype.itemsize < 4 else head.weight.dtype
        sources = (hidden, head.weight, head.bias, head.lora_a, head.lora_b)
        dtypes = (hidden.dtype, wide, wide, wide, wide)
        self.to = [
            torch.zeros(x.shape, dtype=dtype, device=x.device) if need and x is not None else None
            for x, dtype, need in zip(sources, dtypes, needs, strict=True)
        ]

    def add(self, rows: slice, grad: Tensor, live: Tensor | None) -> None:
        """``grad`` holds dL/dlogits of the rows; ``live``: only these of them are not 0 (positions in the chunk)."""
        dhidden, dweight, dbias, da, db = self.to
        weight, _, a, b, scale = self.head
        h = self.hidden[rows]
        if live is not None:
            h, grad = h[live], grad[live]
        if not grad.size(0):
            return
        grad = grad.to(weight.dtype)
        through = None if b is None else scale * (grad @ b)  # [m, r]
        if dhidden is not None:
            out = dhidden[rows]
            if live is None:
                torch.mm(grad, weight, out=out)
            else:
                out[live] = grad @ weight
            if through is not None and a is not None:
                extra = through @ a
                if live is None:
                    out += extra
                else:
                    out[live] += extra
        if dweight is not None:
            _accumulate(dweight, grad.t(), h)
        if dbias is not None:
            dbias += grad.sum(0, dtype=dbias.dtype)
        if a is not None and through is not None:
            if da is not None:
                _accumulate(da, through.t(), h)
            if db is not None:
                _accumulate(db, grad.t(), scale * (h @ a.t()))

    def finish(self) -> tuple[Tensor | None, ...]:
        """The gradients in the inputs' dtypes: hidden, weight, bias, lora_a, lora_b."""
        sources = (self.hidden, self.head.weight, self.head.bias, self.head.lora_a, self.head.lora_b)
        return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in zip(self.to, sources, strict=True))


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _live_rows(*coefs: Tensor | None) -> Tensor | None:
    """Positions of the rows with a coefficient, or None where dropping the others is not worth it."""
    known = [c != 0 for c in coefs if c is not None]
    live = torch.stack(known).any(0).nonzero()[:, 0]
    return live if live.numel() <= (1 - _WORTH_DROPPING) * known[0].numel() else None


def _per_row(t: Tensor, rows: slice) -> Tensor:
    return t if t.size(-1) == 1 else t[..., rows].contiguous()


class LinearStatistics(torch.autograd.Function):
    """Statistics ``[M]`` of the rows of the head's logits, differentiable to everything the head is made of."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
        lora_scale: float, ids: Tensor, temperature: Tensor, settings: Settings, stats: str,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        head = Head(weight, bias, lora_a, lora_b, lora_scale)
        buffer, parts = _Buffer(hidden, head, settings), []
        for rows in _chunks(hidden.size(0), settings.chunk_rows):
            z, t = buffer.logits(rows), _per_row(temperature, rows)
            parts.append(library.token_stats(z, ids[rows], t, settings.vocab_size, settings.softcap, False, stats, settings.backend))
        wide = torch.float64 if settings.logits_dtype == torch.float64 else torch.float32
        table = torch.cat(parts, 1) if parts else hidden.new_zeros(len(stats.split(",")), 0, dtype=wide)
        outputs = tuple(table.unbind())
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.names, ctx.lora_scale = settings, stats.split(","), lora_scale
        ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, ids, temperature, *outputs)
        ctx.mark_non_differentiable(*(t for name, t in zip(ctx.names, outputs, strict=True) if name == "max_logp"))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, lora_a, lora_b, ids, temperature, *stats = ctx.saved_tensors
        settings = ctx.settings
        by = {name: None if g is None else g.contiguous() for name, g in zip(ctx.names, grads, strict=True)}
        if all(g is None for g in by.values()):
            return (None,) * 10
        known = dict(zip(ctx.names, stats, strict=True))
        index = _live_rows(*by.values()) if settings.drop_inert else None
        if index is not None:
            # Rows without a coefficient are not even recomputed.
            hidden_all, hidden, ids = hidden, hidden[index], ids[index]
            temperature = temperature if temperature.size(-1) == 1 else temperature[index]
            known = {name: t[index] for name, t in known.items()}
            by = {name: None if g is None else g[index] for name, g in by.items()}
        head = Head(weight, bias, lora_a, lora_b, ctx.lora_scale)
        chunks = list(_chunks(hidden.size(0), settings.chunk_rows))
        gradients = _Gradients(hidden, head, ctx.needs_input_grad[:5], len(chunks))
        buffer = _Buffer(hidden, head, settings)
        for rows in chunks:
            z = buffer.logits(rows)
            row = {name: known[name][rows].contiguous() if name in known else None for name in ("logp", "lse", "entropy", "log_sum_p_sq")}
            upstream = [None if by.get(n) is None else by[n][rows].contiguous() for n in ("logp", "entropy", "lse", "log_sum_p_sq")]  # type: ignore[index]
            library.token_grad_(
                z, ids[rows], _per_row(temperature, rows), row["logp"], row["lse"], row["entropy"], row["log_sum_p_sq"], *upstream,
                settings.vocab_size, settings.softcap, False, settings.backend,
            )  # fmt: skip
            gradients.add(rows, z, None)
        dhidden, *rest = gradients.finish()
        if index is not None and dhidden is not None:
            dhidden = torch.zeros_like(hidden_all).index_copy_(0, index, dhidden)
        return (dhidden, *rest, None, None, None, None, None)


class LinearOnePassLoss(torch.autograd.Function):
    """``(loss, rows)`` with every gradient formed in forward, from one GEMM for the logits and two for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, lora_scale: float,
        ids: Tensor, temperature: Tensor, inputs: tuple[Tensor | None, ...], params: Tensor, program: str, settings: Settings,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        head = Head(weight, bias, lora_a, lora_b, lora_scale)
        chunks = list(_chunks(hidden.size(0), settings.chunk_rows))
        gradients = _Gradients(hidden, head, ctx.needs_input_grad[:5], len(chunks))
        buffer, parts = _Buffer(hidden, head, settings), []
        for rows in chunks:
            z = buffer.logits(rows)
            row_inputs = [None if t is None else t[..., rows].contiguous() for t in inputs]
            table = library.token_loss_grad_(
                z, ids[rows], _per_row(temperature, rows), *row_inputs, params, program,
                settings.vocab_size, settings.softcap, False, settings.backend,
            )  # fmt: skip
            parts.append(table)
            gradients.add(rows, z, _live_rows(table[4], table[5]) if settings.drop_inert else None)
        table = torch.cat(parts, 1) if parts else hidden.new_zeros(6, 0, dtype=params.dtype)
        results = gradients.finish()
        ctx.given = [g is not None for g in results]
        ctx.save_for_backward(*(g for g in results if g is not None))
        ctx.spent = False
        ctx.mark_non_differentiable(table)
        return table[2].sum(), table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _table: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling():
            if ctx.spent:
                raise ReweightOpsError(
                    "linear_policy_loss: a second backward through a one-pass loss. Its gradients were handed out by the first; "
                    'plan="two_pass" recomputes them and supports retain_graph=True.'
                )
            ctx.spent = True
        saved = iter(ctx.saved_tensors)
        results = [next(saved) if given else None for given in ctx.given]
        for g in results:
            if g is not None:
                library.scale(g, upstream)
        return (*results, *(None,) * 7)
