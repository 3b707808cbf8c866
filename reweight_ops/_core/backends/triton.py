"""The Triton backend: NVIDIA GPUs from Ampere on, AMD's data-center GPUs, and Triton's
interpreter (which runs on the CPU, for tests).

Each primitive is one launch with one program per row. If there are few long rows (fewer
than twice the multiprocessors), a row is split over several programs. Programs of one
launch may wait for each other only if the hardware guarantees that they run at the same
time. A split therefore takes another launch where a program needs a result of another
program, or writes over its input:

* ``token_stats``: slots of segments, then their merge. (The last program of a row could
  merge without waiting, if it knew that it is the last. But the counter for that would
  have to be zeroed in each call, which is also a launch, or shared by calls of other
  streams and graphs.)
* ``token_loss_grad``: slots of segments, their merge, then the rest. A merge may have
  to read columns again, so all merges are done before any program writes a gradient.
  Every program of a row evaluates the rule itself.
* ``token_grad``: one launch. The programs of a row share only the two numbers of a
  log-sum-exp.

There is no persistent grid. A row of a real vocabulary is hundreds of kilobytes, and
the start of its program costs little against that.

``scale`` is a persistent grid, because the usual factor is 1. A few hundred programs
then read it and end.
"""

from __future__ import annotations

import torch

from . import triton_divergence as divergence
from . import triton_launch, triton_rows, triton_scale
from . import triton_packed as packed
from . import triton_token as token
from .base import Backend, Request, gpu_unsupported_reason

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reason(request: Request) -> str | None:
    for dtype in (request.dtype, request.other_dtype):
        if dtype is not None and dtype not in _DTYPES:
            return f"logits are {dtype}; the kernels take float16, bfloat16 and float32"
    if triton_launch.interpreted():
        return (
            None
            if request.device.type == "cpu"
            else "TRITON_INTERPRET=1 is set: the kernels run on CPU tensors only"
        )
    if request.device.type != "cuda":
        return (
            f"logits are on {request.device.type}; Triton's kernels run on GPUs (set "
            "TRITON_INTERPRET=1 to run them on the CPU, slowly)"
        )
    if (reason := gpu_unsupported_reason(request.device)) is not None:
        return reason
    if torch.version.hip is None and torch.cuda.get_device_capability(request.device) < (8, 0):
        return "the GPU is older than Ampere (compute capability 8.0)"
    if torch.version.hip is not None and triton_launch.wave(request.device) != 64:
        return "the GPU is not of AMD's data-center line (gfx90a, gfx942, gfx950)"
    return None


BACKEND = Backend(
    name="triton",
    unsupported_reason=unsupported_reason,
    token_stats=token.token_stats,
    top_stats=token.top_stats,
    most_top=token.MOST_TOP,
    token_grad=token.token_grad,
    token_loss_grad=token.token_loss_grad,
    divergence_stats=divergence.divergence_stats,
    divergence_grad=divergence.divergence_grad,
    divergence_loss_grad=divergence.divergence_loss_grad,
    packed_stats=packed.packed_stats,
    packed_grad=packed.packed_grad,
    scale=triton_scale.scale,
    evaluate_rows=triton_rows.evaluate_rows,
    rows=triton_rows.PRIMITIVES,
)
