"""One logits tensor in Triton: the launches of the token primitives."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_kernels import kernels, triton
from ...triton_kernels.config import Config, Launch, config_for
from ...triton_kernels.top_ids import top_stats_kernel
from ..formula.loss_program import Program, loss_graph
from . import triton_launch
from .base import DERIVATIVES, LOSS_ROWS, STATS, RowInputs, SoftmaxParams, rows_of
from .triton_cache import program_function


class _Call:
    """The common arguments of the launches of one call."""

    def __init__(
        self, logits: Tensor, temperature: Tensor, softmax: SoftmaxParams, out: Tensor | None = None
    ) -> None:
        self.where = rows_of(logits)
        self.rows = logits.numel() // logits.size(-1)
        self.wave = triton_launch.wave(logits.device)
        self.config: Config = config_for(
            softmax.vocab_size, logits.element_size(), softmax.softcap != float("inf")
        )
        self.segments = -(-softmax.vocab_size // self.config.segment)
        self.split = triton_launch.is_split(self.rows, self.segments, logits.device)
        self.softcap = 1.0 if softmax.softcap == float("inf") else softmax.softcap
        self.tile = {
            "CAP": softmax.softcap != float("inf"),
            "SLOTS": self.config.slots,
            "VECTORS": self.config.vectors,
            "E": self.config.vector,
        }
        self.align = triton_launch.alignment(logits)
        if out is not None:
            self.peel = triton_launch.alignment(out) < 16
            alike = triton_launch.begin_alike(logits, out)
            self.grad_align = 16 if alike else logits.element_size()
        self.t_stride = 0 if temperature.numel() == 1 else 1
        self.emulate = triton_launch.interpreted() and logits.dtype == torch.bfloat16
        self.device = (
            torch.device("cuda", logits.device.index or 0)
            if logits.device.type == "cuda"
            else logits.device
        )

    def partial(
        self, logits: Tensor, ids: Tensor, temperature: Tensor, softmax: SoftmaxParams, merge: bool
    ) -> Tensor | None:
        """Return the slots of the segments and the logits of the targets if the rows
        are split.

        With ``merge``, return the states of the rows too.
        """
        if not self.split:
            return None
        size = 4 * self.config.slots * self.segments + 5
        partial = torch.empty((self.rows, size), dtype=torch.float32, device=logits.device)
        args = (
            logits,
            ids,
            temperature,
            partial,
            self.t_stride,
            *self.where,
            softmax.vocab_size,
            self.softcap,
            softmax.vocab_start,
            softmax.total(),
        )
        meta = {
            "SEGMENT": self.config.segment,
            **self.tile,
            "ALIGN": self.align,
            "shape": self.config.stats.alone(),
            "wave": self.wave,
        }
        policy = "evict_last" if merge else "evict_first"
        triton_launch.launch(
            kernels.partial_kernel,
            self.rows * self.segments,
            *args,
            **meta,
            AHEAD=self.config.stats.ahead,
            POLICY=policy,
        )
        if merge:
            triton_launch.launch(kernels.merge_kernel, self.rows, *args, **meta)
        return partial

    def shape(self, launch: Launch) -> Launch:
        return launch if self.align == 16 else launch.shifting()

    def grid(self, out: Tensor) -> int:
        """Return how many programs write a gradient."""
        return self.rows * (-(-out.size(-1) // self.config.segment) if self.split else 1)


def token_stats(
    logits: Tensor, ids: Tensor, temperature: Tensor, softmax: SoftmaxParams, stats: tuple[str, ...]
) -> Tensor:
    out = torch.empty((len(stats), ids.numel()), dtype=torch.float32, device=logits.device)
    if not ids.numel():
        return out
    assert set(stats) <= set(STATS)
    call = _Call(logits, temperature, softmax)
    partial = call.partial(logits, ids, temperature, softmax, merge=False)
    triton_launch.launch(
        kernels.stats_kernel,
        call.rows,
        logits,
        ids,
        temperature,
        out if partial is None else partial,
        out,
        call.rows,
        call.t_stride,
        *call.where,
        softmax.vocab_size,
        call.softcap,
        softmax.vocab_start,
        softmax.total(),
        STATS=tuple(stats.index(name) if name in stats else -1 for name in STATS),
        SPLIT=call.split,
        SEGMENT=call.config.segment,
        **call.tile,
        ALIGN=call.align,
        AHEAD=call.shape(call.config.stats).ahead,
        shape=call.shape(call.config.stats),
        wave=call.wave,
    )
    return out


#: The most ids that :func:`top_stats` finds: no shape has fewer slots.
MOST_TOP = 128


def top_stats(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    softmax: SoftmaxParams,
    stats: tuple[str, ...],
    top: int,
) -> tuple[Tensor, Tensor]:
    """One program per row, also of few long rows."""
    assert set(stats) <= set(STATS) and 0 < top <= min(MOST_TOP, softmax.vocab_size)
    n = ids.numel()
    out = torch.empty((len(stats), n), dtype=torch.float32, device=logits.device)
    found = ids.new_empty(n, top)
    if not n:
        return out, found
    call = _Call(logits, temperature, softmax)
    room = max(256, triton.next_power_of_2(5 * top))
    triton_launch.launch(
        top_stats_kernel,
        call.rows,
        logits,
        ids,
        temperature,
        ids.new_empty(n, room),
        out,
        found,
        call.rows,
        top,
        call.t_stride,
        *call.where,
        softmax.vocab_size,
        call.softcap,
        softmax.vocab_start,
        softmax.total(),
        STATS=tuple(stats.index(name) if name in stats else -1 for name in STATS),
        SEGMENT=call.config.segment,
        **call.tile,
        ALIGN=call.align,
        ROOM=room,
        shape=Launch(max(call.config.stats.threads, call.config.slots), 128),
        wave=call.wave,
    )
    return out, found


def token_grad(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    softmax: SoftmaxParams,
    stats: dict[str, Tensor],
    derivatives: dict[str, Tensor | None],
    out: Tensor,
) -> None:
    n = ids.numel()
    if not n:
        return
    call = _Call(logits, temperature, softmax, out)
    by = [derivatives.get(name) for name in DERIVATIVES]
    nothing = stats["logp"]  # a placeholder for what no program reads
    to = rows_of(out)
    triton_launch.launch(
        kernels.gradient_kernel,
        call.grid(out),
        logits,
        out,
        ids,
        temperature,
        stats["logp"],
        stats["lse"],
        stats.get("lse_low", nothing),
        stats.get("entropy", nothing),
        stats.get("log_sum_p_sq", nothing),
        *(nothing if c is None else c for c in by),
        call.t_stride,
        *call.where,
        to.batch_stride,
        to.row_stride,
        softmax.vocab_size,
        out.size(-1),
        call.softcap,
        softmax.vocab_start,
        softmax.total(),
        GIVEN=tuple(c is not None for c in by),
        LOW="lse_low" in stats,
        SPLIT=call.split,
        CHUNK=call.config.segment,
        **call.tile | {"SLOTS": call.config.grad.threads, "VECTORS": call.config.grad_vectors},
        ALIGN=call.align,
        GRAD_ALIGN=call.grad_align,
        PEEL=call.peel,
        EMULATE=call.emulate,
        shape=call.config.grad if call.grad_align == 16 else call.config.grad.shifting(),
        wave=call.wave,
    )


def token_loss_grad(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor,
    softmax: SoftmaxParams,
    inputs: RowInputs,
    program: Program,
    params: Tensor,
    out: Tensor,
) -> Tensor:
    n = ids.numel()
    rows = torch.empty((len(LOSS_ROWS), n), dtype=torch.float32, device=logits.device)
    if not n:
        return rows
    call = _Call(logits, temperature, softmax, out)
    graph = loss_graph(program)
    # vectors that are cut out of two take registers in either sweep
    whole = call.align == call.grad_align == 16
    one_pass = call.config.one_pass if whole else call.config.one_pass.shifting()
    partial = call.partial(logits, ids, temperature, softmax, merge=True)
    to, entropy, p_sq = rows_of(out), graph.moves("entropy"), graph.moves("log_sum_p_sq")
    given = [
        rows if x is None else x
        for x in (inputs.old_logp, inputs.adv, inputs.ref_logp, inputs.sampling_logp)
    ]
    triton_launch.launch(
        kernels.loss_grad_kernel,
        call.grid(out),
        logits,
        out,
        ids,
        temperature,
        inputs.row_weights,
        *given,
        params,
        rows if partial is None else partial,
        rows,
        n,
        call.t_stride,
        inputs.row_weights.stride(0),
        int(inputs.old_logp is not None),
        *call.where,
        to.batch_stride,
        to.row_stride,
        softmax.vocab_size,
        out.size(-1),
        call.softcap,
        softmax.vocab_start,
        softmax.total(),
        PROGRAM=program_function(program),
        ENTROPY=entropy,
        P_SQ=p_sq,
        READS_P_SQ=p_sq or "log_sum_p_sq" in graph.reads(),
        SPLIT=call.split,
        CHUNK=call.config.segment,
        SEGMENT=call.config.segment,
        **call.tile,
        ALIGN=call.align,
        AHEAD=one_pass.ahead,
        GRAD_ALIGN=call.grad_align,
        PEEL=call.peel,
        EMULATE=call.emulate,
        shape=call.config.one_pass.alone() if call.split else one_pass,
        wave=call.wave,
    )
    return rows
