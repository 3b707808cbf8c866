"""The GEMMs of a chunked LM head.

They compute a chunk's logits into a reused buffer, and from their gradient those of
hidden states, weight, bias and LoRA. Only this module decides the dtypes, the number of
rows at a time, and the rows that are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...calls.hidden import ChunkSettings, LMHead
from ...rows.ranks import Sums
from ..memory import empty
from ..ops import op

#: Up to this many chunks, the gradient of a 16-bit weight is summed in its own dtype.
#: With more it is summed in fp32, because each chunk rounds the sum once.
CHUNKS_IN_WEIGHT_DTYPE = 8
#: Rows without a coefficient are dropped from the backward GEMMs if they are at least
#: this share of a chunk. A gather has a cost too.
_WORTH_DROPPING = 0.1
#: The number of bytes that move at once when a chunk is compacted. On a CPU they fit a
#: cache. On a GPU they are enough for its bandwidth.
_BLOCK = {"cpu": 4 << 20, "cuda": 64 << 20}
#: The number of rows of the weight at a time where a copy in a wider dtype is needed.
_SLICE = 8192


def _widens(operand: Tensor, out: torch.dtype) -> bool:
    """Return whether a GEMM of 16-bit operands can write ``out`` unrounded. It can on a
    GPU since torch 2.8.
    """
    return (
        operand.device.type == "cuda"
        and operand.dtype.itemsize == 2
        and out == torch.float32
        and hasattr(torch.ops.aten.mm, "dtype")
    )


def chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


class Chunk:
    """The logits of one chunk of ``size`` rows.

    If there are several chunks, the last one is padded. A GEMM with fewer rows may sum
    in another order, and a row's result must not depend on its position.
    """

    def __init__(self, size: int, head: LMHead, settings: ChunkSettings) -> None:
        self.head = head
        self.data = empty((size, head.weight.size(0)), settings.logits_dtype, head.weight.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of up to ``size`` rows, which are the first rows of the
        buffer.
        """
        weight, bias, a, b, scale = self.head
        h, out = padded(hidden, self.data.size(0)).to(weight.dtype), self.data
        if b is not None and torch.promote_types(b.dtype, out.dtype) != out.dtype:
            self._round_once(h)
            return out[: hidden.size(0)]
        if out.dtype != h.dtype:
            _mm_wider(h, weight, out)
            if bias is not None:
                out += bias
        elif bias is None:
            torch.mm(h, weight.t(), out=out)
        else:
            torch.addmm(bias, h, weight.t(), out=out)
        if a is not None and b is not None:
            out.addmm_((h.to(a.dtype) @ a.t()).to(out.dtype), b.t().to(out.dtype), alpha=scale)
        return out[: hidden.size(0)]

    def _round_once(self, h: Tensor) -> None:
        """Compute the logits of a head with wider LoRA factors.

        The sum of both terms is rounded once, some columns at a time.
        """
        weight, bias, a, b, scale = self.head
        assert a is not None and b is not None
        low_rank = scale * (h.to(a.dtype) @ a.t())
        for columns in chunks(0, weight.size(0), _SLICE):
            part = weight[columns]
            wide = empty((h.size(0), part.size(0)), b.dtype, h.device)
            _mm_wider(h, part, wide)
            if bias is not None:
                wide += bias[columns]
            self.data[:, columns] = wide.addmm_(low_rank, b[columns].t())


def padded(x: Tensor, rows: int) -> Tensor:
    """Return ``x`` with rows of zeros appended if it has fewer than ``rows``."""
    return x if x.size(0) == rows else torch.cat([x, x.new_zeros(rows - x.size(0), x.size(1))])


def _mm_wider(h: Tensor, weight: Tensor, out: Tensor) -> None:
    """Compute fp32 logits from 16-bit operands, which saves one rounding.

    On a GPU this runs at GEMM speed. Elsewhere it is in fp32, a slice of the weight at
    a time.
    """
    if _widens(h, out.dtype):
        wide_gemm_(out, h, weight.t(), False)
        return
    wide = h.to(out.dtype)
    for columns in chunks(0, weight.size(0), _SLICE):
        out[:, columns] = wide @ weight[columns].to(out.dtype).t()


class Gradients:
    """Accumulates the requested gradients of hidden, weight, bias and LoRA factors from
    chunks of logit gradients.

    A parameter's gradient is summed in its own dtype if that is fp32. This holds under
    autocast too: nothing is rounded to 16 bits on the way. Otherwise the dtype is
    ``accumulate_dtype`` says.
    """

    def __init__(
        self,
        hidden: Tensor,
        parameters: LMHead,
        head: LMHead,
        needs: tuple[bool, ...],
        chunk_count: int,
        settings: ChunkSettings,
    ) -> None:
        """Start with ``parameters`` as the caller has them and ``head`` in the dtype of
        the GEMMs.
        """
        self.head = head
        self.sources = (hidden, *parameters[:4])
        self.needs = [need and x is not None for need, x in zip(needs, self.sources, strict=True)]
        self.chunk_count, self.settings = chunk_count, settings
        compute = settings.compute_dtype
        self.hidden = empty(hidden.shape, compute, hidden.device).zero_() if self.needs[0] else None
        # a parameter's first chunk writes, the others add
        self.totals: list[Tensor | None] = [None] * 4
        running = (
            settings.shards is not None
            and self.hidden is not None
            and not torch.compiler.is_compiling()
        )
        self.over_ranks = (
            Sums(settings.shards.op, settings.shards.group)
            if running and settings.shards is not None
            else None
        )
        # the number of leading rows of hidden whose sum over ranks has begun
        self.summed = 0

    def add(
        self, rows: slice | Tensor, h: Tensor, chunk: Tensor, with_gradient: Tensor | None
    ) -> None:
        """Add the gradients of a chunk.

        ``chunk`` holds dL/dlogits of the rows (a run of all rows, or their positions),
        and padding. ``with_gradient`` has the ascending positions in the chunk of the
        only rows whose gradient is not 0. They are moved to its top, over the others.
        """
        self._add(rows, h, chunk, with_gradient)
        if self.over_ranks is not None and self.hidden is not None and isinstance(rows, slice):
            # The gradient of this chunk's hidden states is summed over the vocabulary's
            # shards while the next chunk is computed.
            self.over_ranks.start(self.hidden[rows])
            self.summed = rows.stop

    def _add(
        self, rows: slice | Tensor, h: Tensor, chunk: Tensor, with_gradient: Tensor | None
    ) -> None:
        weight, _, a, b, scale = self.head
        count = h.size(0)
        if with_gradient is not None:
            if not with_gradient.numel():
                return
            chunk, h = compacted(chunk, with_gradient), h[with_gradient]
            count = with_gradient.numel()
        h = _finite(h.to(weight.dtype))
        whole = chunk.to(weight.dtype)
        grad = whole[:count]
        if not count:
            return
        needs_weight, needs_bias, needs_a, needs_b = self.needs[1:]
        through = None if b is None else scale * _mm_mixed(grad, b)  # [m, r]
        if self.hidden is not None:
            in_place = isinstance(rows, slice) and with_gradient is None and count == whole.size(0)
            product = (
                torch.mm(whole, weight, out=self.hidden[rows])
                if in_place
                else torch.mm(whole, weight)[: grad.size(0)]
            )
            if through is not None and a is not None:
                product += through @ a
            if not in_place:
                self._place(rows, with_gradient, product)
        if needs_weight:
            self._accumulate(0, grad.t(), h)
        if needs_bias:
            total = grad.sum(0, dtype=self._dtype(1))
            self.totals[1] = total if self.totals[1] is None else self.totals[1].add_(total)
        if a is not None and through is not None:
            wide = h.to(a.dtype)
            if needs_a:
                self._accumulate(2, through.t(), wide)
            if needs_b:
                self._accumulate(3, grad.t(), scale * (wide @ a.t()))

    def _place(self, rows: slice | Tensor, with_gradient: Tensor | None, product: Tensor) -> None:
        assert self.hidden is not None
        if not isinstance(rows, slice):
            self.hidden.index_copy_(
                0, rows if with_gradient is None else rows[with_gradient], product
            )
        elif with_gradient is not None:
            self.hidden[rows].index_copy_(0, with_gradient, product)
        else:
            self.hidden[rows] = product

    def _dtype(self, which: int) -> torch.dtype:
        source = self.sources[which + 1]
        assert source is not None
        if source.dtype.itemsize >= 4 or self.settings.accumulate_dtype is not None:
            return self.settings.accumulate_dtype or source.dtype
        return torch.float32 if self.chunk_count > CHUNKS_IN_WEIGHT_DTYPE else source.dtype

    def _accumulate(self, which: int, left: Tensor, right: Tensor) -> None:
        dtype, total = self._dtype(which), self.totals[which]
        first = total is None
        if total is None:
            total = empty((left.size(0), right.size(1)), dtype, left.device)
            self.totals[which] = total
        if left.dtype != right.dtype:
            for part in chunks(0, left.size(0), _SLICE):
                product = left[part].to(right.dtype) @ right
                total[part] = product if first else total[part] + product
        elif dtype != left.dtype:
            wide_gemm_(total, left, right, not first)
        elif first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)

    def finish(self) -> tuple[Tensor | None, ...]:
        """Return the gradients in the inputs' dtypes: hidden, weight, bias, lora_a,
        lora_b.

        A gradient is zeros if no row had one. With a sharded vocabulary those of
        weight, bias and lora_b are this rank's, and the others are those of all ranks.
        """
        self._sum_over_ranks()
        results = [self.hidden, *self.totals]
        for i, (need, source) in enumerate(zip(self.needs, self.sources, strict=True)):
            found = results[i]
            if need and source is not None:
                results[i] = (
                    torch.zeros_like(source, memory_format=torch.contiguous_format)
                    if found is None
                    else found.to(source.dtype)
                )
        return tuple(results)

    def _sum_over_ranks(self) -> None:
        if self.over_ranks is None and self.settings.shards is not None and self.hidden is not None:
            # in a graph, all rows at once
            self.hidden = self.settings.shards.summed(self.hidden)
        if self.over_ranks is not None and self.hidden is not None:
            # rows that were picked, all at once
            self.over_ranks.start(self.hidden[self.summed :])
            self.over_ranks.finish()
        shards, lora_a = self.settings.shards, self.sources[3]
        if shards is None or lora_a is None or not self.needs[3]:
            return
        total = self.totals[2]
        if total is None:  # no row had a gradient here
            total = torch.zeros_like(
                lora_a, dtype=self._dtype(2), memory_format=torch.contiguous_format
            )
        self.totals[2] = shards.summed(total)


def _mm_mixed(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` in the dtype of ``right``.

    If ``left`` has another dtype, it takes a slice of the shared dimension at a time.
    """
    if left.dtype == right.dtype:
        return left @ right
    total = right.new_zeros(left.size(0), right.size(1))
    for part in chunks(0, right.size(0), _SLICE):
        total.addmm_(left[:, part].to(right.dtype), right[part])
    return total


def _finite(h: Tensor) -> Tensor:
    """Return hidden states for the GEMMs that sum over rows, with 0 for values that are
    not finite.

    An ignored row, or one without a coefficient, may hold any value, and ``0 · NaN``
    would become the gradient of every parameter. This hides no NaN: a row that counts
    has NaN logits there, and a gradient of NaN in every column.
    """
    return torch.nan_to_num(h, nan=0.0, posinf=0.0, neginf=0.0)


@op(lambda out, left, right, accumulate: None, mutates=("out",))
def wide_gemm_(out: Tensor, left: Tensor, right: Tensor, accumulate: bool) -> None:
    """Compute ``out = left @ right``, or ``out += left @ right``, in a dtype wider than
    that of the operands.

    This is an op, because inductor cannot lower ``addmm`` with ``out_dtype``.
    """
    if _widens(left, out.dtype):
        if accumulate:
            torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        else:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
        return
    # This device has no such GEMM. Each product is rounded once, and their sum is not
    # rounded.
    for part in chunks(0, left.size(0), _SLICE):
        product = left[part] @ right
        out[part] = out[part] + product if accumulate else product


def compacted(chunk: Tensor, with_gradient: Tensor) -> Tensor:
    """Move the rows ``with_gradient`` (ascending) of ``chunk`` to its top and return a
    view of them.

    A row only ever moves up. A block of rows may therefore overwrite the rows above the
    next block's sources, and no second chunk is needed.
    """
    row_bytes = max(chunk.size(1) * chunk.element_size(), 1)
    rows = max(_BLOCK.get(chunk.device.type, _BLOCK["cuda"]) // row_bytes, 1)
    spare = chunk.new_empty(min(rows, with_gradient.numel()), chunk.size(1))
    for i in range(0, with_gradient.numel(), rows):
        block = with_gradient[i : i + rows]
        moved = torch.index_select(chunk, 0, block, out=spare[: block.numel()])
        chunk[i : i + block.numel()] = moved
    return chunk[: with_gradient.numel()]


def rows_with_gradient(*derivatives: Tensor | None) -> Tensor | None:
    """Return the positions of the rows with a coefficient, or None if dropping the
    others is not worth its cost.
    """
    known = [(c != 0) if c.dim() == 1 else (c != 0).any(-1) for c in derivatives if c is not None]
    with_gradient = torch.stack(known).any(0)
    index = with_gradient.nonzero()[:, 0]
    return (
        index
        if with_gradient.numel() - index.numel() >= _fewest_to_drop(with_gradient.numel())
        else None
    )


def _fewest_to_drop(rows: int) -> float:
    return max(_WORTH_DROPPING * rows, 1)


def zero_gradient_rows_dropped(zero_gradient: Tensor, size: int) -> Tensor:
    """Return how many of the rows marked in ``zero_gradient`` ``[M]`` are dropped in
    chunks of ``size`` rows, by the rule of :func:`rows_with_gradient`.
    """
    parts = [zero_gradient[rows] for rows in chunks(0, zero_gradient.numel(), size)]
    dropped = [torch.where(x.sum() >= _fewest_to_drop(x.numel()), x.sum(), 0) for x in parts]
    return torch.stack(dropped).sum() if dropped else zero_gradient.sum()
