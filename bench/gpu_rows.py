"""The Triton kernels on rows in ``make gpu-kernels``: the tables of sizes of
``triton_kernels/row_config.py`` as variants, in microseconds.

A variant's settings are ``TRITON_ROWS=`` and a table's name. It changes no other
kernel. A host takes longer to launch such a kernel than the kernel takes, so that a
CUDA graph launches each job many times, and its time is divided. The caches are warm,
and "launch" is a kernel that does next to nothing.

A table must give the bits of the default one. Only what adds rows may differ, by what
additions in another order can make of it: all numbers that are added have one sign.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import reweight_ops as rw
from reweight_ops._core.rows.groups import Groups
from reweight_ops._core.rows.primitives import (
    METRICS,
    Averaged,
    CoupledTerms,
    Coupling,
    Masked,
    Over,
    Runs,
    Weighing,
)
from reweight_ops.triton_kernels import row_config

from .device import clock

_SETTING = "TRITON_ROWS="

#: All tables. bench/NOTES.md has a prediction for each.
VARIANTS = {f"rows, {name}": _SETTING + name for name in row_config.VARIANTS}


class Shape(NamedTuple):
    """``rows`` rows in ``sequences`` sequences, of which one has ``longest``."""

    layout: Literal["padded", "offsets", "ids"]
    sequences: int
    rows: int
    longest: int

    @property
    def name(self) -> str:
        return f"{self.layout} {self.sequences} of {self.rows}, longest {self.longest}"

    def lengths(self) -> list[int]:
        """The longest sequence is the second one, and the others share the rest."""
        rest, others = self.rows - self.longest, self.sequences - 1
        spread = [(k + 1) * rest // others - k * rest // others for k in range(others)]
        return [spread[0], self.longest, *spread[1:]]


#: What a rank trains on at a time, padded and packed. The last ones share the compiled
#: kernels of those before them.
SHAPES = (
    Shape("padded", 64, 64 * 2048, 2048),
    Shape("offsets", 512, 131072, 1024),
    Shape("ids", 512, 131072, 1024),
    Shape("offsets", 512, 131072, 30000),
    Shape("offsets", 16, 8192, 1024),
)
TINY_SHAPES = (
    Shape("padded", 2, 3000, 1500),
    Shape("offsets", 3, 1400, 1300),
    Shape("ids", 2, 200, 150),
)
REPEATS = 32

GRPO = rw.methods.grpo()
#: The longest program of a method's parts: a clip, two penalties, two weights.
LONG = rw.methods.grpo(beta=0.04, entropy_coef=0.01).with_weight(rw.weights.AdvantageReweighting())

Job = Callable[[], list[Tensor]]


def table_of(settings: str) -> str | None:
    """Name of the table in a variant's settings, or None for other settings.

    Raises for an unknown table.
    """
    if not settings.startswith(_SETTING):
        return None
    name = settings.removeprefix(_SETTING)
    if name not in row_config.VARIANTS:
        known = sorted(row_config.VARIANTS)
        raise ValueError(f"setting {settings!r}: expected {_SETTING} and one of {known}")
    return name


def tables(settings: dict[str, str]) -> dict[str, str]:
    """The tables of those variants that are tables, by the names of the variants."""
    found = {name: table_of(text) for name, text in settings.items()}
    return {name: table for name, table in found.items() if table is not None}


@dataclass
class Data:
    """Rows of a shape, and the jobs on them."""

    shape: Shape
    masked: Masked
    ids: Tensor
    mask: Tensor
    runs: Runs
    rows: dict[str, Tensor]
    prompts: Tensor
    d_logp: Tensor

    @classmethod
    def make(cls, shape: Shape, device: str) -> Data:
        from reweight_ops._core.backends.triton_rows import PRIMITIVES

        g, n = torch.Generator().manual_seed(0), shape.rows
        names = ("drift", "ref", "adv", "entropy", "d_ratio", "factor", "d_logp", "d_entropy")
        rows = {name: torch.rand(n, generator=g) + 0.01 for name in names}
        rows["logp"] = -3 * torch.rand(n, generator=g)
        rows["old_logp"] = rows["logp"] + rows.pop("drift") / 2
        rows["ref_logp"] = rows["logp"] - rows.pop("ref") / 4
        rows = {name: t.to(device) for name, t in rows.items()}
        ids, mask = torch.randint(0, 151936, (n,), generator=g), torch.rand(n, generator=g) < 0.9
        lengths = torch.tensor(shape.lengths())
        if shape.layout == "padded":
            of = (shape.sequences, shape.longest)
            ids, mask, runs = ids.view(of), mask.view(of), Runs(n, *of)
        elif shape.layout == "offsets":
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(device)
            runs = Runs(n, shape.sequences, offsets=offsets)
        else:
            owner = torch.arange(shape.sequences).repeat_interleave(lengths)
            runs = Runs(n, shape.sequences, owner=owner.to(device))
        ids, mask = ids.to(device), mask.to(device)
        masked = PRIMITIVES.mask(ids, mask, None, runs, torch.device(device))
        prompts = torch.arange(shape.sequences, device=device) // 8
        return cls(shape, masked, ids, mask, runs, rows, prompts, torch.zeros(n, device=device))

    def jobs(self) -> dict[str, tuple[bool, Job]]:
        """The jobs by name, and whether they add rows."""
        from reweight_ops._core.backends import triton_rows as kernels

        rows, masked, device = self.rows, self.masked, self.ids.device
        logp, values = rows["logp"], rows["entropy"]
        weights = kernels.weigh(masked, (Weighing("rows"),) * 3, 1.0, None)
        ordered = torch.where(masked.keep, values, math.inf).sort().values
        count = -(-self.shape.sequences // 8)
        # sequences of both signs in each prompt
        sides = torch.where(self._owner() % 2 == 0, rows["adv"], -rows["adv"])
        losses = torch.where(masked.keep, values / self.shape.longest, 0).repeat(3, 1)
        decay = torch.tensor(0.95, device=device)

        @functools.cache
        def numbers(spec: rw.PolicyLossSpec) -> Tensor:
            return torch.tensor([float(x) for x in spec.parameter_values], device=device)

        def evaluated(spec: rw.PolicyLossSpec) -> Job:
            terms = weights[: len(spec.program.terms)]
            return lambda: [
                kernels.evaluate_rows(spec.program, numbers(spec), rows, terms, keep=masked.keep)
            ]

        def averaged(over: Over) -> Averaged:
            return Averaged(logp, rows["old_logp"], numbers(GRPO), over=over)

        def flowed(over: Over) -> Job:
            how = averaged(over)
            _, means = kernels.ratio(masked, how)

            def job() -> list[Tensor]:
                kernels.adjoint(masked, how, means, rows["d_ratio"], self.d_logp)
                return [self.d_logp]

            return job

        def resolved() -> list[Tensor]:
            adv = None  # of sequences; packed ones are spread after the masks
            if self.shape.layout == "padded":
                adv = rows["adv"][: self.shape.sequences, None].expand_as(self.ids)
            found = kernels.mask(self.ids, self.mask, None, self.runs, device, adv)
            assert found.ids is not None
            return [found.ids, found.keep, found.lengths, *([] if adv is None else [found.values])]

        def regrouped() -> list[Tensor]:
            found, index = kernels.regroup(masked, self.prompts, count)
            assert found.runs.owner is not None
            return [found.lengths, found.runs.owner, index]

        def monitored() -> list[Tensor]:
            assert LONG.monitor is not None
            return list(kernels.metrics(masked, LONG.monitor, numbers(LONG), rows, METRICS))

        kinds = (
            Coupling("contrast", (10.0, 1.0), Groups(count, index=self.prompts)),
            Coupling("hinge", (1000.0, 1e-4)),
        )
        of_terms = torch.tensor([1.0, 1.0, 10.0, 1.0, 1.0, 1000.0, 1e-4], device=device)

        def coupled() -> list[Tensor]:
            terms = CoupledTerms(kinds, of_terms, losses, weights[:2], sides, None)
            into = torch.empty(2, self.shape.rows, device=device)
            return [*kernels.couple(masked, terms, into), into]

        def ratio(over: Over) -> Job:
            return lambda: list(kernels.ratio(masked, averaged(over)))

        two = torch.stack([values, rows["factor"]])
        measured = kernels.measure(masked, two)
        means = Weighing("rows", weight=0), Weighing("sequences", True, weight=1)

        return {
            "mask": (False, resolved),
            "weights": (
                False,
                lambda: [kernels.weigh(masked, (Weighing("rows", True),), 1.0, rows["factor"])],
            ),
            "weights of two means": (True, lambda: [kernels.weigh(measured, means, 1.0, None)]),
            "evaluate, GRPO": (False, evaluated(GRPO)),
            "evaluate, long": (False, evaluated(LONG)),
            "ratio": (True, ratio("sequence")),
            "adjoint": (True, flowed("sequence")),
            "metrics": (True, monitored),
            "mean of sequences": (
                True,
                lambda: [kernels.total(masked, values, "mean", True)],
            ),
            "mean of the call": (True, lambda: [kernels.total(masked, values, "mean", False)]),
            "sum along": (True, lambda: [kernels.along(masked, values, 1.0, False)]),
            "decayed sum along": (True, lambda: [kernels.along(masked, values, decay, True)]),
            "ratio along": (True, ratio("prefix")),
            "adjoint along": (True, flowed("prefix")),
            "ratio of the call": (True, ratio("call")),
            "adjoint of the call": (True, flowed("call")),
            "contrast and hinge": (True, coupled),
            "quantile": (False, lambda: [kernels.quantile(masked, ordered, 0.3, False)]),
            "regroup": (False, regrouped),
            "measure": (True, lambda: [kernels.measure(masked, two).sums]),
        }

    def _owner(self) -> Tensor:
        """The sequence of each row."""
        if self.masked.runs.owner is not None:
            return self.masked.runs.owner
        return torch.arange(self.shape.rows, device=self.ids.device) // self.shape.longest

    def outcome(self, job: Job) -> list[Tensor]:
        self.d_logp.zero_()
        return [x.clone() for x in job()]


def allowed(shape: Shape, table: str) -> float:
    """The largest relative difference between a sum in a table and in the default one.

    A number passes at most as many additions and roundings as a lane makes, in a
    sequence and then over its sequences, and as a tree of 4096 lanes has levels.
    """
    tables = (row_config.VARIANTS[table], row_config.VARIANTS["default"])
    block = min(sizes.evaluated for sizes in tables)  # the smallest of each
    steps = -(-shape.longest // block) + -(-shape.sequences // block) + 2 * 12 + 4
    return 2 * steps * 2.0**-24


def fault(got: list[Tensor], want: list[Tensor], may_differ: float) -> str | None:
    """Reason why a table is not timed, or None.

    ``may_differ`` is the largest relative difference, 0 for equal bits.
    """
    for a, b in zip(got, want, strict=True):
        if a.dtype != torch.float32 or not may_differ:
            if not torch.equal(a, b):
                return "the bits differ from the default table: not timed"
            continue
        share = ((a.double() - b.double()).abs() / b.double().abs()).nan_to_num(nan=0.0)
        share = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, share)
        if a.isnan().ne(b.isnan()).any() or not share.max() <= may_differ:
            return f"a sum differs by {float(share.max()):.1e} of itself: not timed"
    return None


def timer(device: str, job: Job) -> Callable[[], float]:
    """A function that returns the microseconds of one run."""
    if device == "cpu":
        return lambda: clock(device, job)[0] * 1e3
    job()  # what is loaded at a first launch
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # not torch.cuda.graph, which collects garbage for each of hundreds of graphs
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        try:
            for _ in range(REPEATS):
                job()
        finally:
            graph.capture_end()
    return lambda: clock(device, graph.replay)[0] * 1e3 / REPEATS


def time_rows(shape: Shape, tables: dict[str, str], device: str, rounds: int) -> dict[str, Any]:
    """Time every job in every table, once per round in a random order.

    ``tables`` maps variants to tables. The default table always comes first.
    """
    data, one = Data.make(shape, device), torch.ones(1, device=device)
    jobs = data.jobs()
    want = {name: data.outcome(job) for name, (_, job) in jobs.items()}
    timers, wrong = {"limit: launch": timer(device, lambda: [one.neg_()])}, {}
    others = {variant: table for variant, table in tables.items() if table != "default"}
    for variant, table in ({"default": "default"} | others).items():
        sizes = row_config.VARIANTS[table]
        with row_config.using(sizes):
            for name, (adds, job) in jobs.items():
                try:
                    may_differ = allowed(shape, table) if adds else 0.0
                    why = fault(data.outcome(job), want[name], may_differ)
                    if why is None:
                        timers[f"{variant}: {name}"] = timer(device, job)
                except Exception as error:  # a variant that fails must not end the run
                    why = f"{type(error).__name__}: {error}"
                if why:
                    wrong[f"{variant}: {name}"] = why
    us: dict[str, list[float]] = {key: [] for key in timers}
    for number in range(rounds):
        for key in random.Random(number).sample(sorted(timers), len(timers)):
            us[key].append(timers[key]())
    return {"shape": shape.name, "us": us, "wrong": wrong}


def report(shapes: list[dict[str, Any]]) -> list[str]:
    """A table for each shape, in microseconds: a line per job, a column per variant."""
    lines = []
    for shape in shapes:
        middle = {key: median(us) for key, us in shape["us"].items()}
        keys = [key.partition(": ") for key in (*middle, *shape["wrong"])]
        names = list(dict.fromkeys(name for name, _, _ in keys if name != "limit"))
        launch = middle["limit: launch"]
        lines.append(
            f"{shape['shape']}, us (a launch: {launch:.1f})".ljust(60)
            + "".join(name.removeprefix("rows, ").rjust(12) for name in names)
        )
        for job in dict.fromkeys(job for name, _, job in keys if name != "limit"):
            cells = [middle.get(f"{name}: {job}") for name in names]
            lines.append(
                job.ljust(60)
                + "".join(("wrong" if x is None else f"{x:.1f}").rjust(12) for x in cells)
            )
    return lines
