"""``make gpu-kernels``: compile-time variants of the CUDA kernels, built side by side for this GPU and timed in turns, in about a minute.

python -m bench.gpu_kernels                                          the variants of bench/gpu_variants.py
python -m bench.gpu_kernels "direct=RING_DIRECT=1" "few=STATS_BLOCKS=2"   what is shipped, and these
python -m bench.gpu_kernels --dry-run                                on the CPU, emulated, in tiny shapes: shows that the script and the variants work

Every variant has to give the bits of what is shipped before it is timed. Kernels alone, bf16, as fractions of the memory's own speed, measured in the
same rounds: a read of the logits for statistics, an update in place for the rest. JSON goes to $OUT/gpu-kernels.json (default: gpu_output/).
"""

from __future__ import annotations

import argparse
import json
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

from reweight_ops._core.backends.base import RowInputs, SoftmaxParams
from reweight_ops._core.backends.native import Native
from reweight_ops._core.formula.loss_program import Program

from . import gpu_variants
from .device import FLUSH_BYTES, GPU_SHAPES, clock

#: The last one's rows do not start at multiples of 16 bytes.
SHAPES = (*GPU_SHAPES, (20480, 50257))
TINY_SHAPES = ((9, 1000), (5, 83000), (7, 1027))
CLAMP, CLIP = (-20.0, 20.0), (1.0, 0.2, 0.2, float("inf"))
PLAIN = Program.of(("clip",)), (*CLAMP, *CLIP)
ENTROPY = Program.of(("clip", "entropy_bonus")), (*CLAMP, *CLIP, 0.01)
GATE_ROWS = 600  # more than there are blocks at once


@dataclass
class Table:
    """What is timed of one shape: ``jobs`` by name, each on the logits as they are, and the limit that each is measured by."""

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
        lift = torch.rand(rows, 1, generator=g, device=device) * 20  # from rare targets to sure ones
        pristine.scatter_add_(1, ids[:, None], lift.to(torch.bfloat16))
        advantages = torch.randn(rows, generator=g, device=device)
        inputs = {terms: RowInputs(torch.full((terms, rows), 1 / rows, device=device), None, advantages) for terms in (1, 2)}
        flush = torch.empty(FLUSH_BYTES if device == "cuda" else 16, dtype=torch.uint8, device=device)
        return cls(torch.empty_like(pristine), pristine, flush, ids, inputs, {})

    def restore(self) -> None:
        self.logits.copy_(self.pristine)
        self.flush.zero_()

    def limits(self) -> dict[str, Callable[[], Any]]:
        return {"read": lambda: self.logits.view(torch.int16).max(), "update": lambda: self.logits.neg_()}

    def jobs(self, module: ModuleType, verbs: Native) -> dict[str, tuple[str, Callable[[], Any]]]:
        head, one = SoftmaxParams(self.logits.size(1)), torch.ones(1, device=self.logits.device)
        numbers = {program[0]: torch.tensor(program[1], device=self.logits.device) for program in (PLAIN, ENTROPY)}

        def one_pass(kernel: str, program: Program, out: Tensor) -> Tensor:
            module.set_kernel(kernel)
            return verbs.token_loss_grad(out, self.ids, one, head, self.inputs[len(program.terms)], program, numbers[program], out)

        def statistics(*names: str) -> Tensor:
            return verbs.token_stats(self.logits, self.ids, one, head, names)

        if not self.stats:
            names = ("logp", "lse", "lse_low")
            self.stats = dict(zip(names, statistics(*names), strict=True))
        coef = self.inputs[1].adv
        return {
            "one pass": ("update", lambda: one_pass("auto", PLAIN[0], self.logits)),
            "one pass +entropy": ("update", lambda: one_pass("auto", ENTROPY[0], self.logits)),
            "one pass, streaming": ("update", lambda: one_pass("streaming", PLAIN[0], self.logits)),
            "statistics": ("read", lambda: statistics("logp")),
            "statistics +entropy": ("read", lambda: statistics("logp", "entropy")),
            "gradient": (
                "update",
                lambda: verbs.token_grad(self.logits, self.ids, one, head, self.stats, {"logp": coef}, self.logits),
            ),
        }

    def outcome(self, job: Callable[[], Any], every: int) -> tuple[Tensor, Tensor]:
        """What a job returns, and some of the rows that it leaves."""
        self.restore()
        returned = job()
        rows = torch.stack(list(returned)) if isinstance(returned, tuple | list) else returned
        return rows if rows is not None else torch.zeros(0), self.logits[::every].clone()


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    kinds = {2: torch.int16, 4: torch.int32}
    return all(
        torch.equal(x.contiguous().view(kinds[x.itemsize]), y.contiguous().view(kinds[y.itemsize])) for x, y in zip(a, b, strict=True)
    )


def time_shape(rows: int, vocab: int, variants: dict[str, tuple[ModuleType, Native]], device: str, rounds: int) -> dict[str, Any]:
    """Every job of every variant once a round, in an order drawn anew, with the limits among them."""
    table = Table.make(rows, vocab, device)
    table.restore()
    jobs = {name: table.jobs(*variant) for name, variant in variants.items()}
    every = max(1, rows // GATE_ROWS)
    wrong: dict[str, str] = {}
    for job in jobs["shipped"]:
        want = table.outcome(jobs["shipped"][job][1], every)
        for name in variants:
            try:
                if not same_bits(table.outcome(jobs[name][job][1], every), want):
                    wrong[f"{name}: {job}"] = "other bits than what is shipped: not timed"
            except Exception as error:  # one that fails must not end the run
                wrong[f"{name}: {job}"] = f"{type(error).__name__}: {error}"
    timed = {f"{name}: {job}": run for name, found in jobs.items() for job, (_, run) in found.items() if f"{name}: {job}" not in wrong}
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
    """A line a variant and job, a column a shape: fraction of the limit."""
    lines = [" " * 40 + "".join(f"{s['rows']}x{s['vocab']}".rjust(14) for s in shapes)]
    for key in dict.fromkeys(key for s in shapes for key in (*s["fractions"], *s["wrong"])):
        cells = [f"{s['fractions'][key]:.3f}" if key in s["fractions"] else "wrong" if key in s["wrong"] else "-" for s in shapes]
        lines.append(key.ljust(40) + "".join(cell.rjust(14) for cell in cells))
    return lines


def emulated(variants: dict[str, str]) -> dict[str, tuple[ModuleType, Native]]:
    """For the dry run: the same sources and settings, run thread by thread on the CPU."""
    sys.path.insert(0, str(gpu_variants.ROOT / "tests/support"))
    from cuda_emulation.build import build, load

    made = {}
    for name, settings in variants.items():
        module = load(build(flags=("-O1", *gpu_variants.defines(settings)), dtypes=("bf16",)))
        made[name] = module, Native(module, "cpu", lambda device: {}, checked(module))
    return made


def checked(module: ModuleType) -> Callable[[int], None]:
    def check(status: int) -> None:
        if status:
            raise RuntimeError(f"status {status}, {module.error_string(status)}")

    return check


def compiled(variants: dict[str, str], folder: Path) -> dict[str, tuple[ModuleType, Native]]:
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    folder.mkdir(parents=True, exist_ok=True)

    def place(device: torch.device) -> dict[str, int]:
        return {"device": device.index or 0, "stream": torch.cuda.current_stream(device).cuda_stream}

    made = {}
    for name, path in gpu_variants.build(variants, arch, folder).items():
        module = gpu_variants.load(path)
        made[name] = module, Native(module, "cuda", place, checked(module))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", metavar="NAME=SETTINGS", help="instead of those of bench/gpu_variants.py")
    parser.add_argument("--out", default=os.environ.get("OUT") or str(gpu_variants.ROOT / "gpu_output"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60, help="shapes that would begin later are left out, and named")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, emulated, in tiny shapes")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    if not options.dry_run and not torch.cuda.is_available():
        print("no GPU. `python -m bench.gpu_kernels --dry-run` shows on the CPU that the script works.", file=sys.stderr)
        return 2
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    settings = gpu_variants.parse(options.variants) if options.variants else gpu_variants.VARIANTS
    folder = gpu_variants.ROOT / "build" / "variants"
    made = emulated(settings) if options.dry_run else compiled(settings, folder)
    built = time.monotonic() - began
    device = "cpu" if options.dry_run else "cuda"
    shapes, left_out = [], []
    for rows, vocab in TINY_SHAPES if options.dry_run else SHAPES:
        if not options.dry_run and time.monotonic() - began > options.seconds:
            left_out.append(f"{rows}x{vocab}")
            continue
        shapes.append(time_shape(rows, vocab, made, device, 1 if options.dry_run else options.rounds))
        torch.cuda.empty_cache()
    document = {
        "dry_run": options.dry_run,
        "device": "emulated" if options.dry_run else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "variants": settings,
        "build_seconds": built,
        "seconds": time.monotonic() - began,
        "left_out": left_out,
        "shapes": shapes,
    }
    (out / "gpu-kernels.json").write_text(json.dumps(document, indent=1) + "\n")
    wrong = {f"{s['rows']}x{s['vocab']}, {key}: {why}" for s in shapes for key, why in s["wrong"].items()}
    print(
        "\n".join(
            [
                *report(shapes),
                *sorted(wrong),
                *(f"left out: {name}" for name in left_out),
                f"built in {built:.0f} s; {out / 'gpu-kernels.json'}",
            ]
        )
    )
    return 1 if wrong or left_out else 0


if __name__ == "__main__":
    raise SystemExit(main())
