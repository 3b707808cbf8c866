"""Compile the Triton backend's launches for GPUs that are not available.

Run it in a process without TRITON_INTERPRET. A stand-in driver names the target.
Triton's ``warmup`` replaces the backend's own launch: it specializes on the same
arguments (dtypes, alignments, constants) and compiles, but launches nothing. The
measurements are therefore those of the code that a GPU would run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

assert os.environ.get("TRITON_INTERPRET") != "1", (
    "this module compiles: start it without TRITON_INTERPRET"
)

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from reweight_ops._core.backends import triton_launch, triton_packed, triton_rows, triton_scale  # noqa: E402
from reweight_ops._core.backends import triton_token as backend  # noqa: E402
from reweight_ops._core.backends.base import (  # noqa: E402
    DERIVATIVES,
    STATS,
    PackedRows,
    RowInputs,
    SoftmaxParams,
)
from reweight_ops._core.formula.base import RULES  # noqa: E402
from reweight_ops._core.formula.loss_program import Program  # noqa: E402
from reweight_ops._core.formula.monitor import Monitor  # noqa: E402
from reweight_ops._core.rows.groups import Groups  # noqa: E402
from reweight_ops._core.rows.primitives import (  # noqa: E402
    Averaged,
    CoupledTerms,
    Coupling,
    Masked,
    Runs,
    Weighing,
)
from reweight_ops.triton_kernels import row_config  # noqa: E402
from reweight_ops.triton_kernels.config import VARIANTS, Config, Launch  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}


class PretendedDriver:
    """The parts of a driver that ``warmup`` needs. Each target is a separate device, so
    that compilations are kept apart.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.name)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]


@dataclass
class Compiled:
    """A compiled kernel: registers, bytes of stack (NVIDIA) or scratch (AMD), 16-byte
    loads and stores, and products of the number of programs in 32 bits.
    """

    target: str
    kernel: str
    dtype: str
    registers: int
    spilled: int
    wide_loads: int
    wide_stores: int
    shared: int
    narrow: int = 0


def narrow_products(kernel) -> int:
    """Return how often 32 bits are to hold a multiple of the number of programs."""
    text = kernel.asm["ttir"]
    counts = re.findall(r"(%\w+) = tt\.get_num_programs", text)
    products = re.findall(r"arith\.muli (%\w+), (%\w+) : i32", text)
    return sum(any(x in counts for x in factors) for factors in products)


def inspect(target: str, name: str, dtype: str, kernel) -> Compiled:
    if TARGETS[target].backend == "hip":
        text = kernel.asm["amdgcn"]

        def number(key: str) -> int:
            return int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))

        # A scalar register spills into a lane of a vector register, not to memory.
        spilled = number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")
        loads, stores = (
            len(re.findall(rf"(?:global|buffer)_{kind}_(?:dwordx4|b128)", text))
            for kind in ("load", "store")
        )
        return Compiled(
            target,
            name,
            dtype,
            number("vgpr_count"),
            spilled,
            loads,
            stores,
            kernel.metadata.shared,
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        out = subprocess.run(
            [str(tool) if tool.exists() else "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    # LOCAL stays 0 when registers spill, but STACK does not
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", out.stdout).groups()
    ptx = kernel.asm["ptx"]
    loads, stores = (len(re.findall(rf"{kind}\.global\S*\.v4\.b32", ptx)) for kind in ("ld", "st"))
    return Compiled(
        target, name, dtype, int(registers), int(stack), loads, stores, kernel.metadata.shared
    )


class Recorder:
    """Replaces ``triton_launch.launch``: compiles for ``target`` and keeps the result
    of each specialization.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.kernels: dict[int, tuple[str, object]] = {}

    def __enter__(self):
        driver.set_active(PretendedDriver(self.target))
        self._launch, self._wave = triton_launch.launch, triton_launch.wave
        triton_launch.launch, triton_launch.wave = (
            self.launch,
            lambda device: TARGETS[self.target].warp_size,
        )
        return self

    def __exit__(self, *error):
        triton_launch.launch, triton_launch.wave = self._launch, self._wave

    def launch(self, kernel, grid, *args, shape, wave=32, **meta):
        compiled = kernel.warmup(
            *args,
            grid=(grid,),
            **meta,
            **triton_launch.options(shape, wave, TARGETS[self.target].backend == "hip"),
        )
        self.kernels[id(compiled)] = (kernel.fn.__name__, compiled)


PROGRAM = Program.of(("clip", "k3", "entropy_bonus"), (("advantage_reweighting", "surrogate"),))
PARAMS = torch.zeros(16)
MONITOR = Monitor.of([RULES["clip"], RULES["k3"]], PROGRAM.terms[:2])
#: The bounds of the clip are one for each row.
BOUNDS_OF_ROWS = ((3, 3), (4, 4))


def call_all(
    dtype: torch.dtype,
    vocab: int,
    rows: int = 4,
    softcap: float = float("inf"),
    program: Program = PROGRAM,
    out_vocab: int = 0,
) -> None:
    """Call every primitive once, on tensors that are described and never read.

    The gradient is in place, or has rows of ``out_vocab`` columns.
    """
    logits = torch.empty(rows, vocab, dtype=dtype)
    out = torch.empty(rows, out_vocab, dtype=dtype)[:, :vocab] if out_vocab else logits
    ids, temperature, softmax = (
        torch.zeros(rows, dtype=torch.int64),
        torch.ones(1),
        SoftmaxParams(vocab, softcap),
    )
    backend.token_stats(logits, ids, temperature, softmax, ("logp", "entropy", "lse", "lse_low"))
    stats = {
        name: torch.zeros(rows) for name in ("logp", "lse", "lse_low", "entropy", "log_sum_p_sq")
    }
    backend.token_grad(
        logits, ids, temperature, softmax, stats, dict.fromkeys(DERIVATIVES, stats["logp"]), out
    )
    inputs = RowInputs(torch.ones(len(program.terms), rows), *(stats["logp"] for _ in range(4)))
    backend.token_loss_grad(logits, ids, temperature, softmax, inputs, program, PARAMS, out)


def compile_all(
    target: str, dtypes=(torch.bfloat16, torch.float16, torch.float32), vocab: int = 151936, **more
) -> list[Compiled]:
    result = []
    for dtype in dtypes:
        with Recorder(target) as recorder:
            call_all(dtype, vocab, **more)
        result += [
            inspect(target, name, str(dtype)[6:], kernel)
            for name, kernel in recorder.kernels.values()
        ]
    return result


def split_and_capped(target: str) -> list[Compiled]:
    """Compile variants that the plain call does not launch: a softcap, split rows with
    it, and unaligned split rows.
    """
    whole = compile_all(target, (torch.bfloat16,), softcap=30.0)
    triton_launch.processors = lambda device: 10**6
    try:
        return (
            whole
            + compile_all(target, (torch.bfloat16,), softcap=30.0)
            + compile_all(target, (torch.float32,), vocab=50257)
        )
    finally:
        triton_launch.processors = lambda device: 1


def unaligned(target: str) -> list[Compiled]:
    """Compile whole rows that start anywhere, and their gradients over them and
    elsewhere.
    """
    return [
        *compile_all(target, (torch.bfloat16,), vocab=50257),
        *[
            k
            for k in compile_all(target, (torch.bfloat16,), vocab=50257, out_vocab=50258)
            if k.kernel != "stats_kernel"
        ],
    ]


def every_shape(target: str) -> list[Compiled]:
    """Compile whole rows for every line of the tables of shapes, with a rule that has
    an entropy gradient.
    """
    result = []
    for name, table in VARIANTS.items():
        os.environ["REWEIGHT_OPS_TRITON_SHAPES"] = name
        for limit, _ in table:
            for dtype in (torch.bfloat16, torch.float32):
                result += compile_all(
                    target, (dtype,), vocab=min(limit, 1 << 20) // dtype.itemsize // 8 * 8
                )
    return result


def loops(kernel) -> list[list[str]]:
    """The instructions of each innermost loop of a kernel (SASS)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        text = subprocess.run(
            [str(tool) if tool.exists() else "nvdisasm", "-c", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(lines)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction.group(1))
    ends = [
        (labels.get(m.group(1), len(lines)), i)
        for i, x in enumerate(lines)
        if (m := re.search(r"BRA\S*.*`\((\.L_\w+)\)", x))
    ]
    back = [(a, b) for a, b in ends if a <= b]
    return [
        lines[a : b + 1]
        for a, b in back
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in back)
    ]


def whole_tile_loops(target: str) -> list[dict]:
    """Counts of the default shape's loops over whole tiles, in bf16 and with an entropy
    gradient.

    They are the logits of an iteration, its instructions, and the number of
    instructions before each 16-byte load and before the first exponential.
    """
    result = []
    with Recorder(target) as recorder:
        call_all(torch.bfloat16, 151936)
    for name, kernel in recorder.kernels.values():
        for loop in loops(kernel):
            loads = [
                i
                for i, x in enumerate(loop)
                if "LDG" in x and ".128" in x and not x.startswith("@")
            ]
            exponentials = [i for i, x in enumerate(loop) if "MUFU.EX2" in x]
            if loads and exponentials:
                writes = any("STG" in x and ".128" in x for x in loop)
                result.append(
                    {
                        "kernel": name,
                        "sweep": "gradient" if writes else "statistics",
                        "logits": 8 * len(loads),
                        "instructions": len(loop),
                        "loads": loads,
                        "first_exponential": exponentials[0],
                    }
                )
    return result


def count_compilations(target: str = "sm_90") -> dict[str, int]:
    """Count compilations of each kernel over calls that differ in everything that must
    not matter.

    Dtype, program and alignment are fixed.
    """
    program = Program.of(("clip", "k3"))
    with Recorder(target) as recorder:
        for rows, length, temperature, beta, softcap in (
            (4, 8, 1.0, 0.1, 20.0),
            (1, 1, 0.7, 0.0, 30.0),
            (33, 16, 2.0, 1.0, 21.5),
            (1, 17, 1.0, 0.1, 1.0),
        ):
            for vocab in (32000, 32768, 31000 // 8 * 8):
                n = rows * length
                for logits in (
                    torch.empty(rows, length, vocab, dtype=torch.bfloat16),
                    torch.empty(rows, length + 1, vocab, dtype=torch.bfloat16)[:, :-1],
                ):
                    ids, softmax = torch.zeros(n, dtype=torch.int64), SoftmaxParams(vocab, softcap)
                    for t in (torch.full((1,), temperature), torch.full((n,), temperature)):
                        spare = torch.zeros(3 * n + 1)
                        # Rows of a tensor start anywhere: their alignment must not
                        # cause a compilation either.
                        inputs = RowInputs(
                            torch.ones(2, n), spare[1 : n + 1], spare[:n], spare[n : 2 * n], None
                        )
                        params = torch.tensor([-20.0, 20.0, 1.0, 0.2, beta, 9.0, beta, 20.0, 10.0])
                        backend.token_loss_grad(
                            logits, ids, t, softmax, inputs, program, params, logits
                        )
                        backend.token_loss_grad(
                            logits,
                            ids,
                            t,
                            softmax,
                            inputs._replace(old_logp=None),
                            program,
                            params,
                            logits,
                        )
                        backend.token_stats(logits, ids, t, softmax, ("logp", "entropy"))
                        stats = {
                            "logp": spare[1 : n + 1],
                            "lse": spare[:n],
                            "lse_low": spare[1 : n + 1],
                        }
                        backend.token_grad(
                            logits, ids, t, softmax, stats, {"logp": spare[:n]}, logits
                        )
    names = [name for name, _ in recorder.kernels.values()]
    return {name: names.count(name) for name in sorted(set(names))}


def scales(target: str, dtypes=(torch.bfloat16, torch.float16, torch.float32)) -> list[Compiled]:
    """Compile scaling: once per dtype for gradients without gaps, and once for others.

    Sizes, strides and addresses must not matter.
    """
    result = []
    for dtype in dtypes:
        with Recorder(target) as recorder:
            for shape in ((4, 32000), (1, 3, 31991)):
                memory = torch.empty((*shape[:-2], shape[-2] * 2, shape[-1] + 16), dtype=dtype)
                for grad in (
                    torch.empty(shape, dtype=dtype),
                    memory[..., ::2, :-16],
                    memory[..., 1::2, 3:-13],
                ):
                    triton_scale.scale(grad, torch.ones(()))
        result += [
            inspect(target, name, str(dtype)[6:], kernel)
            for name, kernel in recorder.kernels.values()
        ]
    return result


def packed_rows(
    target: str, dtypes=(torch.bfloat16, torch.float16, torch.float32)
) -> list[Compiled]:
    """Compile packed rows with all statistics and derivatives, and with a few.

    Each is compiled once, whatever the number and lengths of rows, and once more with a
    softcap.
    """
    result = []
    for dtype in dtypes:
        with Recorder(target) as recorder:
            for n, entries, softcap in (
                (4, 1000, float("inf")),
                (3, 77, float("inf")),
                (5, 100, 20.0),
                (2, 99, 30.0),
            ):
                bounds, ids, values = (
                    torch.zeros(2, n, dtype=torch.int64),
                    torch.zeros(n, dtype=torch.int64),
                    torch.zeros(entries, dtype=dtype),
                )
                rows, row = PackedRows(values, bounds, ids, torch.ones(1), softcap), torch.zeros(n)
                known = dict.fromkeys(("logp", "lse", "lse_low", "entropy", "log_sum_p_sq"), row)
                for names, by in ((("logp", "lse", "lse_low"), ("logp",)), (STATS, DERIVATIVES)):
                    triton_packed.packed_stats(rows, names)
                    triton_packed.packed_grad(
                        rows, known, dict.fromkeys(by, row), torch.zeros_like(values)
                    )
        result += [
            inspect(target, name, str(dtype)[6:], kernel)
            for name, kernel in recorder.kernels.values()
        ]
    return result


def top_ids(target: str, dtypes=(torch.bfloat16, torch.float16, torch.float32)) -> list[Compiled]:
    """Compile the search of the likeliest ids, once for each room.

    20 and 28 ids have one room, and 64 ids another. A softcap is compiled in bf16.
    """
    result = []
    for dtype, softcap in ((d, cap) for d in dtypes for cap in (float("inf"), 30.0)):
        if softcap < float("inf") and dtype != torch.bfloat16:
            continue
        with Recorder(target) as recorder:
            for n, vocab, top in (
                (4, 151936, 20),
                (3, 100008, 28),
                (2, 151936, 64),
                (5, 151936, 128),
            ):
                backend.top_stats(
                    torch.empty(n, vocab, dtype=dtype),
                    torch.zeros(n, dtype=torch.int64),
                    torch.ones(1),
                    SoftmaxParams(vocab, softcap),
                    STATS,
                    top,
                )
        result += [
            inspect(target, name, str(dtype)[6:], kernel)
            for name, kernel in recorder.kernels.values()
        ]
    return result


def row_kernels(target: str) -> list[Compiled]:
    """Compile the kernels on rows through the calls that launch them.

    Lengths and addresses must not cause another compilation.
    """
    with Recorder(target) as recorder:
        for sequences, length in ((4, 5000), (3, 3023)):  # the largest blocks
            n = sequences * length
            ids, rows = torch.zeros(sequences, length, dtype=torch.int64), torch.zeros(6, n)
            device, where = torch.device("cpu"), torch.zeros(n, dtype=torch.int32)
            runs = [
                Runs(n, sequences, length),
                Runs(n, sequences, offsets=where[: sequences + 1]),
                Runs(n, sequences, owner=where),
            ]
            flat = ids.view(-1)
            packed = [triton_rows.mask(flat, flat, flat.bool(), r, device) for r in runs[1:]]
            triton_rows.spread(packed[0], rows[0, :sequences])
            masked = triton_rows.mask(ids, ids, ids.bool(), runs[0], device)
            for weighing in (
                Weighing("rows"),
                Weighing("sequences", True),
                Weighing(3.0, False, 5.0),
                Weighing(torch.ones(()), True),
            ):
                weights = triton_rows.weigh(masked, weighing, torch.ones(()), rows[0], 2)
                triton_rows.weigh(packed[0], weighing, torch.ones(()), rows[0], 2)
            groups = torch.zeros(sequences + 1, dtype=torch.int64)
            by_prompt = [
                triton_rows.regroup(masked, groups[1:], 5)[0],
                triton_rows.regroup(packed[0], where[:sequences], 1)[0],
            ]
            measured = [triton_rows.measure(found, rows[0]) for found in (*packed, masked)]
            for weighing in (Weighing("rows"), Weighing("sequences", True)):
                for found in (measured[0], measured[-1]):
                    triton_rows.weigh(found, weighing, torch.ones(()), rows[0], 2)
            for found in by_prompt:  # they are packed rows
                triton_rows.weigh(found, Weighing("sequences", True), torch.ones(()), rows[0], 2)
            for found in (*packed, masked):
                for adv in (None, rows[2]):
                    averaged = Averaged(rows[0], rows[1], PARAMS, adv=adv)
                    ratio, means = triton_rows.ratio(found, averaged)
                for statistic in ("sum", "mean", "max", "min"):
                    triton_rows.total(found, rows[0], statistic, True)
                triton_rows.total(found, 1.0, "sum", True, rows[5])
                for values, decay, reverse in (
                    (1.0, 1.0, False),
                    (rows[0], 1.0, True),
                    (rows[0], 0.9, False),
                    (rows[0], torch.ones(()), True),
                ):
                    triton_rows.along(found, values, decay, reverse)
                averaged = Averaged(rows[0], rows[1], PARAMS, over="prefix")
                found_along = triton_rows.ratio(found, averaged)
                triton_rows.adjoint(found, averaged, found_along[1], rows[2], rows[5])
            for by_deviation in (False, True):
                averaged = Averaged(rows[0], rows[1], PARAMS, by_deviation, over="call")
                _, centre = triton_rows.ratio(masked, averaged)
                triton_rows.adjoint(masked, averaged, centre, rows[2], rows[5])
            for values, statistic in (
                (rows[0], "sum"),
                (rows[0], "mean"),
                (rows[0], "max"),
                (rows[0], "min"),
                (1.0, "sum"),
            ):
                triton_rows.total(masked, values, statistic, False)
            for nearest in (False, True):
                triton_rows.quantile(masked, rows[0], 0.3, nearest)
            couple_rows((*packed, masked), groups[1:], rows)
            leaves = dict(
                zip(
                    ("logp", "old_logp", "adv", "entropy", "ref_logp", "sampling_logp"),
                    rows,
                    strict=True,
                )
            )
            table = triton_rows.evaluate_rows(
                PROGRAM, PARAMS, leaves, torch.cat([weights, weights[:1]]), keep=masked.keep
            )
            triton_rows.evaluate_rows(
                PROGRAM,
                PARAMS,
                leaves | {"log_ratio": ratio},
                torch.cat([weights, weights[:1]]),
                ("loss", "d_log_ratio"),
            )
            bounds_of_rows = torch.zeros(5, n)
            triton_rows.evaluate_rows(
                PROGRAM._replace(rows=BOUNDS_OF_ROWS),
                PARAMS,
                leaves,
                bounds_of_rows,
                ("own0", "d_w1"),
                masked.keep,
                torch.empty(2, n),
            )
            for found in (*packed, masked):
                for adv in (None, rows[2]):
                    averaged = Averaged(rows[0], rows[1], PARAMS, adv=adv)
                    triton_rows.adjoint(found, averaged, means, table[0], table[1])
            for monitor, found, known in (
                (MONITOR, masked, leaves),
                (
                    MONITOR._replace(rows=BOUNDS_OF_ROWS),
                    masked,
                    leaves | {"table": bounds_of_rows},
                ),
                *((MONITOR, found, leaves | {"log_ratio": ratio}) for found in (*packed, masked)),
            ):
                triton_rows.metrics(
                    found,
                    monitor,
                    PARAMS,
                    known,
                    ("entropy", "low", "largest ratio", "sequence region"),
                )
    return [
        replace(inspect(target, name, "float32", kernel), narrow=narrow_products(kernel))
        for name, kernel in recorder.kernels.values()
    ]


def couple_rows(found: Sequence[Masked], prompt_of: Tensor, rows: Tensor) -> None:
    """Launch the kernels of coupled reductions for terms of every kind, with prompts
    given in both ways, and for a hinge alone.
    """
    hinge, sequences = Coupling("hinge", (1.0, torch.ones(()))), len(prompt_of)
    for masked in found:
        for prompts in (Groups(1, sequences), Groups(5, index=prompt_of)):
            contrast = Coupling("contrast", (2.0, 3.0), prompts)
            for kinds, logp in (
                ((contrast, hinge, None), rows[5]),
                ((contrast, hinge, None), None),
                ((contrast._replace(prefers="length"), hinge, None), None),
                ((contrast._replace(prefers="advantages", hard=True), hinge, None), None),
                ((contrast._replace(kind="classification"), hinge, None), None),
                ((None, hinge), None),
            ):
                numbers, part = torch.ones(1 + 3 * len(kinds)), rows[: 1 + len(kinds)]
                terms = CoupledTerms(kinds, numbers, part, part, rows[4], logp)
                triton_rows.couple(masked, terms, torch.empty(2, rows.size(1)))


def row_tables(target: str) -> list[Compiled]:
    """Compile the kernels on rows in every table of sizes."""
    result = []
    for sizes in row_config.VARIANTS.values():
        with row_config.using(sizes):
            result += row_kernels(target)
    return result


def oversized(target: str) -> list[Compiled]:
    """Compile the negative control: its tiles are far too large for the registers."""
    threads, slots = (
        4 * TARGETS[target].warp_size,
        1 << (12 if TARGETS[target].backend == "hip" else 10),
    )
    launch = Launch(threads, 64)
    backend.config_for = lambda columns, itemsize, capped: Config(
        slots, 2, 8, 1 << 16, launch, launch, launch, 2
    )
    logits = torch.empty(4, 1 << 17, dtype=torch.bfloat16)
    with Recorder(target) as recorder:
        backend.token_stats(
            logits,
            torch.zeros(4, dtype=torch.int64),
            torch.ones(1),
            SoftmaxParams(1 << 17),
            ("logp", "entropy"),
        )
    return [inspect(target, name, "bfloat16", kernel) for name, kernel in recorder.kernels.values()]


if __name__ == "__main__":
    task, targets = sys.argv[1], sys.argv[2:] or list(TARGETS)
    if task == "loops":
        print(json.dumps([found for target in targets for found in whole_tile_loops(target)]))
    elif task == "count":
        print(json.dumps(count_compilations()))
    else:
        run = {
            "compile": compile_all,
            "variants": split_and_capped,
            "shapes": every_shape,
            "unaligned": unaligned,
            "oversized": oversized,
            "scales": scales,
            "rows": row_kernels,
            "row tables": row_tables,
            "packed": packed_rows,
            "top": top_ids,
        }[task]
        print(json.dumps([asdict(compiled) for target in targets for compiled in run(target)]))
