"""The Triton backend: NVIDIA from Ampere on, AMD's data-center GPUs, and Triton's interpreter (which runs on the CPU, for tests).

Each verb is one launch, a program each row. A few long rows (fewer than twice the multiprocessors) are split over programs. Programs of
one launch can wait for each other only where the hardware promises to run them at once, so a split takes another launch where a program
needs what another one computes or writes over:

* ``token_stats``: slots of segments, then their merge. (The last program of a row could merge without waiting, if it knew that it is the
  last; but the counter for that has to be zeroed in each call, a launch as well, or shared by calls of other streams and graphs.)
* ``token_loss_grad``: slots of segments, their merge, then the rest. A merge may have to read columns again, so all of them are done before
  any program writes a gradient. Every program of a row evaluates the rule itself.
* ``token_grad``: one launch; in place another before it, which keeps the targets' logits. No program can know whether the target's column
  has been written already, and every program needs that logit: ``log p`` is ``x - x_y + logp`` where ``lse`` is large, because ``x - lse``
  is only as exact as an fp32 number of that size (1.5e-5 near 300).

There is no persistent grid: a row of a real vocabulary is hundreds of kilobytes, against which the start of its program is small.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from .base import COEFS, LOSS_ROWS, STATS, Backend, Head, Program, Request, RowInputs, rows_of

try:
    import triton
except ImportError as error:
    raise BackendUnavailable(f"Triton cannot be imported ({error}); pip install triton (Linux, or triton-windows).") from error

from ..codegen.triton import facts
from ..triton_kernels import kernels
from ..triton_kernels.config import Config, Launch, config_for
from .triton_programs import program_function

#: The oldest and the newest Triton that the tests were run with; ``make triton-versions`` runs them with each.
TESTED = ((3, 6), (3, 9))


def _warn_if_untested(version: str) -> None:
    """An older Triton may work, and may miscompile: once, when the backend is loaded. A newer one is what a newer PyTorch brings: no word."""
    numbers = tuple(int(x) for x in version.split(".")[:2])
    if numbers < TESTED[0]:
        oldest, newest = (".".join(map(str, v)) for v in TESTED)
        warnings.warn(
            f"reweight_ops: Triton {version} is older than any that its kernels were tested with ({oldest} to {newest}); "
            "`reweight-ops check --backend triton` tells whether it computes right here.",
            RuntimeWarning,
            stacklevel=2,
        )


_warn_if_untested(triton.__version__)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_STAT_ORDER = ("logp", "entropy", "lse", "log_sum_p_sq", "max_logp")
#: Rows up to which a row is split over programs: below this many programs per multiprocessor a device idles.
_ROWS_PER_PROCESSOR = 2


def interpreted() -> bool:
    """Whether the kernels were decorated for Triton's interpreter (``TRITON_INTERPRET=1`` when they were imported)."""
    return not isinstance(kernels.stats_kernel, triton.runtime.JITFunction)


def _unsupported_reason(request: Request) -> str | None:
    if request.dtype not in _DTYPES:
        return f"logits are {request.dtype}; the kernels take float16, bfloat16 and float32"
    if interpreted():
        return None if request.device.type == "cpu" else "TRITON_INTERPRET=1 is set: the kernels run on CPU tensors only"
    if request.device.type != "cuda":
        return f"logits are on {request.device.type}; Triton's kernels run on GPUs (set TRITON_INTERPRET=1 to run them on the CPU, slowly)"
    if torch.version.hip is None and torch.cuda.get_device_capability(request.device) < (8, 0):
        return "the GPU is older than Ampere (compute capability 8.0)"
    if torch.version.hip is not None and _wave(request.device) != 64:
        return "the GPU is none of AMD's data-center line (gfx90a, gfx942, gfx950)"
    return None


@functools.lru_cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def _wave(device: torch.device) -> int:
    return 32 if device.type != "cuda" or torch.version.hip is None else int(_properties(device).warp_size)


def _processors(device: torch.device) -> int:
    return int(_properties(device).multi_processor_count) if device.type == "cuda" else 1


def is_split(rows: int, segments: int, device: torch.device) -> bool:
    """Whether there are too few rows for a program each."""
    return segments > 1 and rows < _ROWS_PER_PROCESSOR * _processors(device)


def _launch(kernel: Any, programs: int, *args: Any, shape: Launch, wave: int = 32, **meta: Any) -> None:
    """The one place where anything is launched."""
    if interpreted():
        import numpy

        with numpy.errstate(all="ignore"):  # it warns of every 0 * inf in a branch that a select then drops
            kernel[(programs,)](*args, **meta)
    else:
        kernel[(programs,)](*args, **meta, **_options(shape, wave, torch.version.hip is not None))


def _options(shape: Launch, wave: int, hip: bool) -> dict[str, Any]:
    # Contraction off: kernels that share a sweep must round alike. Registers bounded, or ptxas spills for an occupancy nobody needs.
    return {"num_warps": shape.threads // wave, "enable_fp_fusion": False} | ({} if hip else {"maxnreg": shape.registers})


def _alignment(*tensors: Tensor) -> int:
    """Bytes to which every row of every tensor is aligned: 16, 4, or that of an element."""
    addresses = [a for t in tensors for a in (t.data_ptr(), *(s * t.element_size() for s in t.stride()[:-1]))]
    return next(n for n in (16, 4, 2) if n <= tensors[0].element_size() or all(a % n == 0 for a in addresses))


class _Call:
    """What the launches of one call have in common."""

    def __init__(self, logits: Tensor, temperature: Tensor, head: Head, out: Tensor | None = None) -> None:
        self.where = rows_of(logits)
        self.rows = logits.numel() // logits.size(-1)
        self.wave = _wave(logits.device)
        self.config: Config = config_for(head.vocab_size, logits.element_size(), head.softcap != float("inf"))
        self.segments = -(-head.vocab_size // self.config.segment)
        self.split = is_split(self.rows, self.segments, logits.device)
        self.softcap = 1.0 if head.softcap == float("inf") else head.softcap
        self.tile = {
            "CAP": head.softcap != float("inf"), "SLOTS": self.config.slots, "VECTORS": self.config.vectors, "E": self.config.vector
        }  # fmt: skip
        self.align = _alignment(logits, *([] if out is None else [out]))
        self.t_stride = 0 if temperature.numel() == 1 else 1
        self.emulate = interpreted() and logits.dtype == torch.bfloat16
        self.device = torch.device("cuda", logits.device.index or 0) if logits.device.type == "cuda" else logits.device

    def partial(self, logits: Tensor, ids: Tensor, temperature: Tensor, head: Head, merge: bool) -> Tensor | None:
        """The segments' slots and the targets' logits, if the rows are split; ``merge``: and the rows' states."""
        if not self.split:
            return None
        size = 4 * self.config.slots * self.segments + 5
        partial = torch.empty((self.rows, size), dtype=torch.float32, device=logits.device)
        args = (
            logits, ids, temperature, partial, self.t_stride, *self.where, head.vocab_size, self.softcap, head.vocab_start, head.total()
        )  # fmt: skip
        meta = {"SEGMENT": self.config.segment, **self.tile, "ALIGN": self.align, "shape": self.config.stats, "wave": self.wave}
        policy = "evict_last" if merge else "evict_first"
        _launch(kernels.partial_kernel, self.rows * self.segments, *args, **meta, AHEAD=self.config.stats.ahead, POLICY=policy)
        if merge:
            _launch(kernels.merge_kernel, self.rows, *args, **meta)
        return partial

    def programs(self, out: Tensor) -> int:
        """Programs that write a gradient."""
        return self.rows * (-(-out.size(-1) // self.config.segment) if self.split else 1)


def token_stats(logits: Tensor, ids: Tensor, temperature: Tensor, head: Head, stats: tuple[str, ...]) -> Tensor:
    out = torch.empty((len(stats), ids.numel()), dtype=torch.float32, device=logits.device)
    if not ids.numel():
        return out
    assert set(stats) <= set(STATS)
    call = _Call(logits, temperature, head)
    partial = call.partial(logits, ids, temperature, head, merge=False)
    _launch(
        kernels.stats_kernel, call.rows, logits, ids, temperature, out if partial is None else partial, out, call.rows,
        call.t_stride, *call.where, head.vocab_size, call.softcap, head.vocab_start, head.total(),
        STATS=tuple(stats.index(name) if name in stats else -1 for name in _STAT_ORDER), SPLIT=call.split, SEGMENT=call.config.segment,
        **call.tile, ALIGN=call.align, AHEAD=call.config.stats.ahead, shape=call.config.stats, wave=call.wave,
    )  # fmt: skip
    return out


def token_grad(
    logits: Tensor, ids: Tensor, temperature: Tensor, head: Head, stats: dict[str, Tensor], coefs: dict[str, Tensor | None], out: Tensor
) -> None:
    n = ids.numel()
    if not n:
        return
    call = _Call(logits, temperature, head, out)
    by = [coefs.get(name) for name in COEFS]
    nothing = stats["logp"]  # in the place of what no program reads
    kept = call.split and out.data_ptr() == logits.data_ptr()
    target = torch.empty(n, dtype=torch.float32, device=logits.device) if kept else nothing
    if kept:
        _launch(
            kernels.target_kernel, n, logits, ids, target, *call.where, head.vocab_size, head.vocab_start, head.total(),
            shape=Launch(call.wave, 64), wave=call.wave,
        )  # fmt: skip
    to = rows_of(out)
    _launch(
        kernels.gradient_kernel, call.programs(out), logits, out, ids, temperature, target, stats["logp"], stats["lse"],
        stats.get("entropy", nothing), stats.get("log_sum_p_sq", nothing), *(nothing if c is None else c for c in by), call.t_stride,
        *call.where, to.batch_stride, to.row_stride, head.vocab_size, out.size(-1), call.softcap, head.vocab_start, head.total(),
        BY=tuple(c is not None for c in by), KEPT=kept, SPLIT=call.split, CHUNK=call.config.segment,
        **call.tile | {"SLOTS": call.config.grad.threads, "VECTORS": call.config.grad_vectors}, ALIGN=call.align, EMULATE=call.emulate,
        shape=call.config.grad, wave=call.wave,
    )  # fmt: skip


def token_loss_grad(
    logits: Tensor, ids: Tensor, temperature: Tensor, head: Head, inputs: RowInputs, program: Program, params: Tensor, out: Tensor
) -> Tensor:
    n = ids.numel()
    rows = torch.empty((len(LOSS_ROWS), n), dtype=torch.float32, device=logits.device)
    if not n:
        return rows
    call = _Call(logits, temperature, head, out)
    known = facts(program)
    partial = call.partial(logits, ids, temperature, head, merge=True)
    to, entropy, p_sq = rows_of(out), "entropy" in known.moves, "log_sum_p_sq" in known.moves
    given = [rows if x is None else x for x in (inputs.old_logp, inputs.adv, inputs.ref_logp, inputs.sampling_logp)]
    _launch(
        kernels.loss_grad_kernel, call.programs(out), logits, out, ids, temperature, inputs.weights, *given, params,
        rows if partial is None else partial, rows, n, call.t_stride, inputs.weights.stride(0), int(inputs.old_logp is not None),
        *call.where, to.batch_stride, to.row_stride, head.vocab_size, out.size(-1), call.softcap, head.vocab_start, head.total(),
        PROGRAM=program_function(program), ENTROPY=entropy, P_SQ=p_sq, READS_P_SQ=p_sq or "log_sum_p_sq" in known.reads,
        SPLIT=call.split, CHUNK=call.config.segment, SEGMENT=call.config.segment, **call.tile, ALIGN=call.align,
        AHEAD=call.config.one_pass.ahead, EMULATE=call.emulate,
        shape=call.config.one_pass.alone() if call.split else call.config.one_pass, wave=call.wave,
    )  # fmt: skip
    return rows


BACKEND = Backend("triton", _unsupported_reason, token_stats, token_grad, token_loss_grad)
