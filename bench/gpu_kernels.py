"""``make gpu-kernels``: time compile-time variants of the CUDA kernels and launch
shapes of the Triton kernels.

They run in turns. The first variants take a minute: a build of 25 s and about 10 s for
each. Triton compiles its kernels ahead, on all cores (bench/ahead.py).

python -m bench.gpu_kernels                 the first variants of bench/gpu_variants.py
python -m bench.gpu_kernels --all           all of them, and those of
                                            bench/triton_shapes.py
python -m bench.gpu_kernels "direct=RING_DIRECT=1" "few=STATS_BLOCKS=2"
                                            the released defaults, and these
python -m bench.gpu_kernels "three=TRITON_SHAPES=three programs"
                                            the released defaults, and a table of
                                            triton_kernels/config.py
python -m bench.gpu_kernels --rows          Triton's kernels on rows alone, in all
                                            tables of triton_kernels/row_config.py:
                                            needs no build (bench/gpu_rows.py and
                                            bench/gpu_search.py)
python -m bench.gpu_kernels "wide=TRITON_ROWS=wide"
                                            the same, in the default table and this one
python -m bench.gpu_kernels --dry-run       on the CPU, emulated, in tiny shapes: shows
                                            that the script and the variants work

Before it is timed, a variant of the CUDA kernels must give the bits of the released
defaults, and a variant of the Triton kernels must pass the criterion of accuracy. Only
kernels are timed, in bf16, as fractions of the memory's own speed in the same rounds: a
read of the logits for statistics, an update in place for the rest. Then come
divergences of few rows, whole and split, and where Triton is timed, its own
(bench/gpu_divergence.py). The JSON goes to
$OUT/gpu-kernels.json (default: gpu_output/).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from reweight_ops._core.backends import select
from reweight_ops._core.backends.base import LOSS_ROWS, RowInputs, SoftmaxParams
from reweight_ops._core.backends.native import Native
from reweight_ops._core.backends.picked import top_ids
from reweight_ops._core.formula.loss_program import Program
from reweight_ops.testing.criterion import ERROR_FLOOR, gradient_errors, value_error

from . import ahead, gpu_divergence, gpu_rows, gpu_search, gpu_variants, triton_shapes
from .device import FLUSH_BYTES, GPU_SHAPES, clock

#: The rows of the last shape do not start at multiples of 16 bytes.
SHAPES = (*GPU_SHAPES, (20480, 50257))
TINY_SHAPES = ((9, 1000), (5, 83000), (7, 1027))
CLAMP, CLIP = (-20.0, 20.0), (1.0, 0.2, 0.2, float("inf"))
PLAIN = Program.of(("clip",)), (*CLAMP, *CLIP)
ENTROPY = Program.of(("clip", "entropy_bonus")), (*CLAMP, *CLIP, 0.01)
TOP = 20  # likeliest ids
SECONDS = 60  # of the first variants, with their build
GATE_ROWS = 600  # more rows than concurrent blocks

#: The kernels of a variant: a module of CUDA kernels and its primitives, or no module
#: and the primitives of another backend.
Kernels = tuple[ModuleType | None, Any]


@dataclass
class Table:
    """The jobs of one shape by name, each on fresh logits, and the limit of each."""

    logits: Tensor
    pristine: Tensor
    flush: Tensor
    ids: Tensor
    inputs: dict[int, RowInputs]
    stats: dict[str, Tensor]

    @classmethod
    def make(cls, rows: int, vocab: int, device: str) -> Table:
        g = torch.Generator(device).manual_seed(0)
        pristine = torch.empty(rows, vocab, dtype=torch.bfloat16, device=device)
        for part in pristine.split(512):
            part.copy_(torch.randn(part.shape, generator=g, device=device) * 3)
        ids = torch.randint(0, vocab, (rows,), generator=g, device=device)
        # from rare targets to sure ones
        lift = torch.rand(rows, 1, generator=g, device=device) * 20
        pristine.scatter_add_(1, ids[:, None], lift.to(torch.bfloat16))
        advantages = torch.randn(rows, generator=g, device=device)
        inputs = {
            terms: RowInputs(torch.full((terms, rows), 1 / rows, device=device), None, advantages)
            for terms in (1, 2)
        }
        flush = torch.empty(
            FLUSH_BYTES if device == "cuda" else 16, dtype=torch.uint8, device=device
        )
        return cls(torch.empty_like(pristine), pristine, flush, ids, inputs, {})

    def some(self, every: int, dtype: torch.dtype) -> Table:
        """The rows 0, every, 2·every, ... in another dtype."""
        pristine = self.pristine[::every].to(dtype)
        inputs = {
            terms: RowInputs(i.row_weights[:, ::every].to(dtype), None, i.adv[::every].to(dtype))
            for terms, i in self.inputs.items()
        }
        return Table(pristine.clone(), pristine, self.flush[:16], self.ids[::every], inputs, {})

    def restore(self) -> None:
        self.logits.copy_(self.pristine)
        self.flush.zero_()

    def limits(self) -> dict[str, Callable[[], Any]]:
        return {
            "read": lambda: self.logits.view(torch.int16).max(),
            "update": lambda: self.logits.neg_(),
        }

    def jobs(
        self, module: ModuleType | None, primitives: Any
    ) -> dict[str, tuple[str, Callable[[], Any]]]:
        of_rows = {
            "dtype": torch.promote_types(self.logits.dtype, torch.float32),
            "device": self.logits.device,
        }
        softmax, one = SoftmaxParams(self.logits.size(1)), torch.ones(1, **of_rows)
        numbers = {program[0]: torch.tensor(program[1], **of_rows) for program in (PLAIN, ENTROPY)}

        def one_pass(kernel: str, program: Program, out: Tensor) -> Tensor:
            if module is not None:
                module.set_kernel(kernel)
            return primitives.token_loss_grad(
                out,
                self.ids,
                one,
                softmax,
                self.inputs[len(program.terms)],
                program,
                numbers[program],
                out,
            )

        def statistics(*names: str) -> Tensor:
            return primitives.token_stats(self.logits, self.ids, one, softmax, names)

        def likeliest(one_read: bool) -> Tensor:
            """The statistics, and the logits of the likeliest ids, which have ties."""
            top = min(TOP, self.logits.size(1))
            if one_read and primitives.top_stats is not None:
                table, found = primitives.top_stats(
                    self.logits, self.ids, one, softmax, ("logp",), top
                )
            else:
                table = statistics("logp")
                found = top_ids(self.logits, self.ids, top, softmax)
            return torch.cat([table, self.logits.gather(1, found).t().to(table.dtype)])

        if not self.stats:
            names = ("logp", "lse", "lse_low")
            self.stats = dict(zip(names, statistics(*names), strict=True))
        d_logp = self.inputs[1].adv
        cuda_alone = {
            "one pass, streaming": ("update", lambda: one_pass("streaming", PLAIN[0], self.logits))
        }
        return {
            "one pass": ("update", lambda: one_pass("auto", PLAIN[0], self.logits)),
            "one pass +entropy": ("update", lambda: one_pass("auto", ENTROPY[0], self.logits)),
            **({} if module is None else cuda_alone),
            "statistics": ("read", lambda: statistics("logp")),
            "statistics +entropy": ("read", lambda: statistics("logp", "entropy")),
            "statistics +ids": ("read", lambda: likeliest(True)),
            "statistics, then ids": ("read", lambda: likeliest(False)),
            "gradient": (
                "update",
                lambda: primitives.token_grad(
                    self.logits, self.ids, one, softmax, self.stats, {"logp": d_logp}, self.logits
                ),
            ),
        }

    def outcome(self, job: Callable[[], Any], every: int) -> tuple[Tensor, Tensor]:
        """The result of a job, and some of the rows that it writes."""
        self.restore()
        returned = job()
        rows = torch.stack(list(returned)) if isinstance(returned, tuple | list) else returned
        return rows if rows is not None else torch.zeros(0), self.logits[::every].clone()


class Truth:
    """Reference results of the jobs on some rows of a table, in fp64 and fp32.

    They check kernels without a bitwise contract.
    """

    def __init__(self, table: Table, every: int) -> None:
        self.every = every
        self.is_target = torch.zeros_like(table.pristine[::every], dtype=torch.bool).scatter_(
            1, table.ids[::every, None], True
        )
        self.tables = [table.some(every, dtype) for dtype in (torch.float64, torch.float32)]
        self.jobs = [few.jobs(None, select.load("reference")) for few in self.tables]

    def error(self, job: str, got: tuple[Tensor, Tensor]) -> float:
        """Error of an outcome divided by the error that the criterion of accuracy
        allows; <= 1 passes.
        """
        exact, single = (
            few.outcome(jobs[job][1], 1) for few, jobs in zip(self.tables, self.jobs, strict=True)
        )
        errors = [
            value_error(row[:: self.every], *two)
            for row, *two in zip(got[0], single[0], exact[0], strict=True)
        ]
        if self.jobs[0][job][0] == "update":
            derivatives = (
                [exact[0][LOSS_ROWS.index(name)] for name in ("d_logp", "d_entropy")]
                if len(exact[0])
                else [self.tables[0].inputs[1].adv]
            )
            floor = ERROR_FLOOR * torch.stack(derivatives).abs().sum(0)
            parts, _ = gradient_errors(got[1], single[1], exact[1], floor[:, None], self.is_target)
            errors += [error for part in parts.values() for error in part]
        return float(torch.tensor(errors).max())  # a NaN stays


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    kinds = {2: torch.int16, 4: torch.int32}
    return all(
        torch.equal(x.contiguous().view(kinds[x.itemsize]), y.contiguous().view(kinds[y.itemsize]))
        for x, y in zip(a, b, strict=True)
    )


def fault(
    outcome: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], truth: Truth | None, job: str
) -> str | None:
    """Reason why a variant is not timed, or None.

    ``truth`` is given for a variant whose bits may differ.
    """
    if truth is None:
        return (
            None
            if same_bits(outcome, want)
            else "the bits differ from the released defaults: not timed"
        )
    error = truth.error(job, outcome)
    # NaN does not pass
    return None if error <= 1 else f"{error:.2f} of the error that is allowed: not timed"


def time_shape(
    rows: int, vocab: int, variants: dict[str, Kernels], device: str, rounds: int
) -> dict[str, Any]:
    """Time every job of every variant, and the limits, once per round in a random
    order.
    """
    table = Table.make(rows, vocab, device)
    table.restore()
    of_triton = [variant for variant in variants.values() if variant[0] is None]

    def on_meta() -> list[Callable[[], Any]]:
        same = [ahead.described(table).jobs(*variant) for variant in of_triton]
        return [job for found in same for _, job in found.values()]

    ahead.compile_ahead(on_meta, device)
    jobs = {name: table.jobs(*variant) for name, variant in variants.items()}
    for name in variants.keys() - {"shipped"}:
        del jobs[name]["statistics, then ids"]  # PyTorch's search takes most of it
    every = max(1, rows // GATE_ROWS)
    wrong: dict[str, str] = {}
    truth = Truth(table, every) if of_triton else None
    for job in jobs["shipped"]:
        want = table.outcome(jobs["shipped"][job][1], every)
        for name in variants:
            if job not in jobs[name]:
                continue
            try:
                why = fault(
                    table.outcome(jobs[name][job][1], every),
                    want,
                    truth if variants[name][0] is None else None,
                    job,
                )
                if why:
                    wrong[f"{name}: {job}"] = why
            except Exception as error:  # a variant that fails must not end the run
                wrong[f"{name}: {job}"] = f"{type(error).__name__}: {error}"
    del truth
    timed = {
        f"{name}: {job}": run
        for name, found in jobs.items()
        for job, (_, run) in found.items()
        if f"{name}: {job}" not in wrong
    }
    timed |= {f"limit: {name}": run for name, run in table.limits().items()}
    ms: dict[str, list[float]] = {key: [] for key in timed}
    for number in range(rounds):
        for key in random.Random(number).sample(sorted(timed), len(timed)):
            table.restore()
            ms[key].append(clock(device, timed[key])[0])
    fractions = {
        f"{name}: {job}": median(ms[f"limit: {limit}"]) / median(ms[f"{name}: {job}"])
        for name, found in jobs.items()
        for job, (limit, _) in found.items()
        if f"{name}: {job}" in ms
    }
    return {"rows": rows, "vocab": vocab, "ms": ms, "wrong": wrong, "fractions": fractions}


def report(shapes: list[dict[str, Any]]) -> list[str]:
    """One line per variant and job, and one column per shape, with the fraction of the
    limit.
    """
    lines = [" " * 40 + "".join(f"{s['rows']}x{s['vocab']}".rjust(14) for s in shapes)]
    for key in dict.fromkeys(key for s in shapes for key in (*s["fractions"], *s["wrong"])):
        cells = [
            f"{s['fractions'][key]:.3f}"
            if key in s["fractions"]
            else "wrong"
            if key in s["wrong"]
            else "-"
            for s in shapes
        ]
        lines.append(key.ljust(40) + "".join(cell.rjust(14) for cell in cells))
    return lines


def emulated(variants: dict[str, str]) -> dict[str, Kernels]:
    """Modules for the dry run: the same sources and settings, run thread by thread on
    the CPU.
    """
    sys.path.insert(0, str(gpu_variants.ROOT / "tests/support"))
    from cuda_emulation.build import build, load

    made: dict[str, Kernels] = {}
    for name, settings in variants.items():
        module = load(build(flags=("-O1", *gpu_variants.defines(settings)), dtypes=("bf16",)))
        made[name] = module, Native(module, "cpu", lambda device: {}, checked(module))
    return made


def checked(module: ModuleType) -> Callable[[int], None]:
    def check(status: int) -> None:
        if status:
            raise RuntimeError(f"status {status}, {module.error_string(status)}")

    return check


def compiled(variants: dict[str, str], folder: Path) -> dict[str, Kernels]:
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    folder.mkdir(parents=True, exist_ok=True)

    def place(device: torch.device) -> dict[str, int]:
        return {
            "device": device.index or 0,
            "stream": torch.cuda.current_stream(device).cuda_stream,
        }

    made: dict[str, Kernels] = {}
    for name, path in gpu_variants.build(variants, arch, folder).items():
        module = gpu_variants.load(path)
        made[name] = module, Native(module, "cuda", place, checked(module))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "variants",
        nargs="*",
        metavar="NAME=SETTINGS",
        help="run these instead of the first of bench/gpu_variants.py",
    )
    parser.add_argument("--all", action="store_true", help="run every variant, without a limit")
    parser.add_argument(
        "--rows", action="store_true", help="run the tables of the Triton kernels on rows instead"
    )
    parser.add_argument(
        "--out", default=os.environ.get("OUT") or str(gpu_variants.ROOT / "gpu_output")
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--seconds",
        type=float,
        help="leave out shapes that would start after this time, and name them (default: "
        f"{SECONDS} with the first variants, else no limit)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run on the CPU, emulated, in tiny shapes"
    )
    options = parser.parse_args(arguments)
    began = time.monotonic()
    if not options.dry_run and not torch.cuda.is_available():
        print(
            "no GPU. `python -m bench.gpu_kernels --dry-run` shows on the CPU that the script "
            "works.",
            file=sys.stderr,
        )
        return 2
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    every = gpu_variants.VARIANTS | triton_shapes.VARIANTS | gpu_rows.VARIANTS
    settings = (
        gpu_variants.parse(options.variants)
        if options.variants
        else gpu_rows.VARIANTS
        if options.rows
        else every
        if options.all
        else {name: every[name] for name in gpu_variants.FIRST}
    )
    tables_of_rows = gpu_rows.tables(settings)
    others = {name: text for name, text in settings.items() if name not in tables_of_rows}
    if tables_of_rows and others.keys() <= {"shipped"}:
        others = {}  # they are compared with the default table, which needs no build
    seconds = options.seconds
    if seconds is None:
        limited = not (options.all or options.rows or options.variants or options.dry_run)
        seconds = SECONDS if limited else math.inf
    tables = {name: triton_shapes.table_of(text) for name, text in others.items()}
    of_cuda = {name: text for name, text in others.items() if tables[name] is None}
    made: dict[str, Kernels] = (
        {}
        if not of_cuda
        else emulated(of_cuda)
        if options.dry_run
        else compiled(of_cuda, gpu_variants.ROOT / "build" / "variants")
    )
    made |= {
        name: (None, triton_shapes.TritonPrimitives(table))
        for name, table in tables.items()
        if table is not None
    }
    built = time.monotonic() - began
    files = {name: gpu_variants.files(text) for name, text in of_cuda.items()}
    of_one = {name: made[name] for name in made if files.get(name) != ("divergence",)}
    # The tables of launch shapes do not change Triton's kernel on two tensors.
    of_triton = [name for name, table in tables.items() if table is not None]
    with_two = [name for name in files if name == "shipped" or "divergence" in files[name]]
    of_two = {name: made[name] for name in (*with_two, *of_triton[:1])}
    device = "cpu" if options.dry_run else "cuda"
    rounds = 1 if options.dry_run else options.rounds
    shapes, pairs, of_rows, left_out = [], [], [], []

    def in_time(what: str) -> bool:
        if time.monotonic() - began <= seconds:
            return True
        left_out.append(what)
        return False

    shapes_of_one = TINY_SHAPES if options.dry_run else SHAPES
    for rows, vocab in shapes_of_one if of_one else ():
        if in_time(f"{rows}x{vocab}"):
            shapes.append(time_shape(rows, vocab, of_one, device, rounds))
            torch.cuda.empty_cache()
    few = gpu_divergence.TINY_SHAPES if options.dry_run else gpu_divergence.SHAPES
    for rows, vocab in few if of_two else ():
        if in_time(f"two tensors, {rows}x{vocab}"):
            pairs.append(gpu_divergence.time_pairs(rows, vocab, of_two, device, rounds))
    cut = gpu_rows.TINY_SHAPES if options.dry_run else gpu_rows.SHAPES
    for shape in cut if tables_of_rows else ():
        if in_time(shape.name):
            of_rows.append(gpu_rows.time_rows(shape, tables_of_rows, device, rounds))
    if tables_of_rows and in_time("rows, looked for"):
        of_rows.append(gpu_search.time_search(device, rounds, options.dry_run))
    document = {
        "dry_run": options.dry_run,
        "device": "emulated" if options.dry_run else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "variants": settings,
        "build_seconds": built,
        "seconds": time.monotonic() - began,
        "left_out": left_out,
        "shapes": shapes,
        "two_tensors": pairs,
        "rows": of_rows,
    }
    (out / "gpu-kernels.json").write_text(json.dumps(document, indent=1) + "\n")
    wrong = {
        f"{s['rows']}x{s['vocab']}, {key}: {why}"
        for s in (*shapes, *pairs)
        for key, why in s["wrong"].items()
    } | {f"{s['shape']}, {key}: {why}" for s in of_rows for key, why in s["wrong"].items()}
    print(
        "\n".join(
            [
                *(report(shapes) if shapes else []),
                *(report(pairs) if pairs else []),
                *gpu_rows.report(of_rows),
                *sorted(wrong),
                *(f"left out: {name}" for name in left_out),
                f"built in {built:.0f} s; {out / 'gpu-kernels.json'}",
            ]
        )
    )
    return 1 if wrong or left_out else 0


if __name__ == "__main__":
    raise SystemExit(main())
