"""Every kernel, on small and awkward shapes, for compute-sanitizer to watch:
``compute-sanitizer --tool memcheck python tests/gpu/sanitize.py cuda``.

Tensors are made on the CPU, each in an allocation of its own size, so nearly every
launch seen is one of ours and no access past an end is hidden. ``--seconds``: no case
is begun after so many; what is left out is named, most important cases first.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
if sys.argv[2:3] == ["cpu"]:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

import reweight_ops as rw
from reweight_ops._core.backends.base import (
    DERIVATIVES,
    STATS,
    DivergenceInputs,
    RowInputs,
    SoftmaxParams,
)
from reweight_ops._core.backends.select import load
from reweight_ops._core.rows.groups import IGNORE_INDEX

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("backend")
parser.add_argument("device", nargs="?", default="cuda")
parser.add_argument("--seconds", type=float, default=float("inf"))
options = parser.parse_args()

SPEC = rw.methods.grpo(beta=0.04, entropy_coef=0.01).with_weight(rw.weights.AdvantageReweighting())
PROGRAM, PARAMS = SPEC.program, torch.tensor([float(v) for v in SPEC.parameter_values])
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
#: Whole 16-byte vectors of a row, by the blocks of the cluster that keeps it on chip
#: (csrc/cuda/slices.h).
CLUSTERS = {1: 100, 2: 6200, 4: 12300, 8: 24600}


def rows(n: int, v: int, dtype: torch.dtype, shift: int = 0) -> torch.Tensor:
    """[n, v] there, in rows that start ``shift`` elements after a multiple of 16 bytes;
    nothing lies behind the last column of the last row.
    """
    whole = -(-(v + shift) // 8) * 8
    flat = torch.randn((n - 1) * whole + shift + v, generator=torch.Generator().manual_seed(v)) * 3
    return flat.to(dtype).to(options.device).as_strided((n, v), (whole, 1), shift)


def out_like(z: torch.Tensor) -> torch.Tensor:
    """Rows that lie as those of ``z`` do, not initialized."""
    flat = torch.empty(z.untyped_storage().nbytes() // z.itemsize, dtype=z.dtype, device=z.device)
    return flat.as_strided(z.shape, z.stride(), z.storage_offset())


def kernel(name: str) -> None:
    """Of the CUDA backend's two for one pass: "ring" that cannot serve a call makes it
    fail.
    """
    if options.backend == "cuda":
        from reweight_ops import _cuda

        _cuda.set_kernel(name)


def one(
    n: int,
    v: int,
    dtype: torch.dtype,
    which: str = "auto",
    shift: int = 0,
    in_place: bool = False,
    softcap: float = float("inf"),
) -> None:
    """The three primitives. The last three columns are padding where there are more."""
    kernel(which)
    primitives, g, device = load(options.backend), torch.Generator().manual_seed(v), options.device
    z = rows(n, v, dtype, shift)
    softmax = SoftmaxParams(max(v - 3, 1), softcap)
    ids = torch.randint(0, softmax.vocab_size, (n,), generator=g)
    ids[0] = IGNORE_INDEX
    ids, one = ids.to(device), torch.ones(1).to(device)
    stats = primitives.token_stats(z, ids, one, softmax, STATS)
    values = [torch.randn(n, generator=g).to(device) for _ in range(4)]
    out = z if in_place else out_like(z)
    inputs = RowInputs(torch.ones(3, n).to(device), values[1], values[0], values[2])
    if which != "ring":
        scratch = z.clone() if in_place else out
        primitives.token_grad(
            z,
            ids,
            one,
            softmax,
            dict(zip(STATS, (s.clone() for s in stats), strict=True)),
            dict.fromkeys(DERIVATIVES, values[0]),
            scratch,
        )
    primitives.token_loss_grad(z, ids, one, softmax, inputs, PROGRAM, PARAMS.to(device), out)


def divergence(
    n: int,
    v: int,
    dtype: torch.dtype,
    other: torch.dtype,
    shifts: tuple[int, int] = (0, 0),
    softcap: float = float("inf"),
) -> None:
    """The three primitives on two logits tensors, in place too."""
    primitives, device = load(options.backend), options.device
    z, y = rows(n, v, dtype, shifts[0]), rows(n, v, other, shifts[1])
    ids = torch.arange(n)
    ids[0] = IGNORE_INDEX
    softmax, one = SoftmaxParams(max(v - 3, 1), softcap), torch.ones(1).to(device)
    two = DivergenceInputs(z, y, ids.to(device), one, one, softmax, softmax)
    constants, weights = torch.tensor([0.5, 0.7, -0.3]).to(device), torch.ones(n).to(device)
    derivatives = torch.ones(3, n).to(device)
    primitives.divergence_grad(two, primitives.divergence_stats(two), derivatives, out_like(z))
    primitives.divergence_loss_grad(two, constants, weights, out_like(z))
    primitives.divergence_loss_grad(two, constants, weights, z)


def on_rows(sequences: int, length: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Triton's kernels on rows, and on gradients; no other backend has such."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    from row_calls import STEPS, row_calls

    from reweight_ops._core.backends.triton_scale import scale

    calls = row_calls(sequences, length, options.device)
    for step in STEPS:
        yield f"{sequences} sequences of {length}: {step}", partial(next, calls)
    for shift in (0, 1):
        grad = rows(sequences, length, torch.bfloat16, shift)
        yield f"scaling, shift {shift}", partial(scale, grad, torch.ones(()).to(grad.device))


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    if options.device == "cpu":
        yield "primitives", partial(one, 2, 131, torch.float32)
        yield (
            "primitives, unaligned, in place",
            partial(one, 2, 131, torch.bfloat16, shift=1, in_place=True, softcap=20.0),
        )
        yield "two tensors", partial(divergence, 2, 131, torch.bfloat16, torch.float32)
        if options.backend == "triton":
            yield from on_rows(3, 37)
        return
    for dtype in DTYPES:
        for n, v in ((2, 1), (3, 131), (2, 4099)):
            for shift in (0, 1):
                yield (
                    f"streaming {n}x{v} {dtype}, shift {shift}",
                    partial(one, n, v, dtype, "streaming", shift),
                )
        yield (
            f"streaming {dtype}, in place",
            partial(one, 2, 40001, dtype, "streaming", 1, True, 20.0),
        )
    if options.backend == "cuda":
        for columns in (33003, 65549, 131101):
            yield (
                f"two tensors, rows split, {columns} columns",
                partial(divergence, 3, columns, torch.bfloat16, torch.float32, (1, 0)),
            )
        for blocks, vectors in CLUSTERS.items():
            for dtype in DTYPES:
                # whole vectors, a tail, padding
                v = vectors * (16 // dtype.itemsize) + 3 + 3
                yield f"ring of {blocks} blocks, {dtype}", partial(one, 3, v, dtype, "ring")
                yield (
                    f"ring of {blocks} blocks, {dtype}, in place",
                    partial(one, 3, v, dtype, "ring", 0, True, 20.0),
                )
    for dtype in DTYPES:
        for other in DTYPES:
            yield f"two tensors, {dtype} and {other}", partial(divergence, 3, 4099, dtype, other)
        yield (
            f"two tensors, {dtype}, unaligned",
            partial(divergence, 3, 4099, dtype, dtype, (1, 2), 20.0),
        )
        yield f"two tensors, {dtype}, one column", partial(divergence, 2, 1, dtype, dtype)
    if options.backend == "triton":
        yield from on_rows(3, 37)
    # More rows than blocks: whatever is used again in a block is.
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    yield "streaming, many rows", partial(one, 5 * processors, 1031, torch.bfloat16, "streaming")
    yield (
        "two tensors, many rows",
        partial(divergence, 5 * processors, 1031, torch.bfloat16, torch.float32),
    )
    if options.backend == "cuda":
        for blocks, vectors in CLUSTERS.items():
            count = 5 * processors // blocks
            yield (
                f"ring of {blocks} blocks, many rows",
                partial(
                    one, count, (vectors if blocks > 1 else 6000) * 8 + 6, torch.bfloat16, "ring"
                ),
            )


def main() -> None:
    began, left_out = time.monotonic(), []
    for name, run in cases():
        if time.monotonic() - began > options.seconds:
            left_out.append(name)
            continue
        run()
        if options.device == "cuda":
            torch.cuda.synchronize()
        print(f"{time.monotonic() - began:6.1f} s  {name}", flush=True)
    kernel("auto")
    print(
        "\n".join(
            [f"left out for lack of time: {name}" for name in left_out] + ["every launch returned"]
        )
    )


if __name__ == "__main__":
    main()
