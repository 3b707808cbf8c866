"""The linear head on a CPU: ``python -m bench.linear_head``. A clipped policy loss from hidden states with both gradients, beside the bare GEMMs.

Interleaved rounds after a correctness gate, for ours and the GEMMs; baselines run once, in the run that is judged. The ratio to the three bare
GEMMs is taken within a round, by the clock and by processor time; the second means more when others use the machine.
``python -m bench.linear_head --show`` prints the table of the last results. Liger is looked for on ``PYTHONPATH`` too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import reweight_ops as rw

from .measure import SAME_FUNCTION, Memory, foreign_load

RESULTS = Path(__file__).parent / "results" / "cpu-linear-head.json"
GATE_ROWS = 16
BARE, THERE = GEMMS = ("three bare GEMMs", "the same, into memory that is there")


@dataclass(frozen=True)
class HeadCase:
    rows: int
    hidden: int
    vocab: int
    dtype: str
    zero_advantages: bool = False  # 13 of 32 sequences

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.hidden}x{self.vocab} {self.dtype}{' 40% zero' if self.zero_advantages else ''}"

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * getattr(torch, self.dtype).itemsize

    @property
    def gradient_bytes(self) -> int:
        return (self.rows + self.vocab) * self.hidden * getattr(torch, self.dtype).itemsize


CASES = [
    HeadCase(rows, hidden, vocab, dtype, zero)
    for rows, hidden, vocab in ((256, 4096, 32000), (2048, 1024, 151936))
    for dtype in ("bfloat16", "float32")
    for zero in (False, True)
]


class HeadData:
    """``hidden [B, T, D]`` and ``weight [V, D]``, leaves that require grad; advantages per sequence."""

    def __init__(self, case: HeadCase) -> None:
        g = torch.Generator().manual_seed(0)
        dtype, shape = getattr(torch, case.dtype), (32, case.rows // 32)
        self.case = case
        self.hidden = torch.randn(*shape, case.hidden, generator=g).to(dtype).requires_grad_()
        self.weight = (torch.randn(case.vocab, case.hidden, generator=g) * (3 / case.hidden**0.5)).to(dtype).requires_grad_()
        self.ids = torch.randint(0, case.vocab, shape, generator=g)
        h, w = self.hidden.detach().flatten(0, 1), self.weight.detach()
        self.lse = torch.cat([torch.logsumexp(x @ w.t(), -1, keepdim=True).float()[:, 0] for x in h.split(128)])
        logp = (h.float() * w[self.ids.flatten()].float()).sum(-1) - self.lse
        self.old = (logp + 0.1 * torch.randn(len(h), generator=g)).view(shape)
        self.advantages = torch.randn(shape[0], generator=g)
        if case.zero_advantages:
            self.advantages[: round(0.4 * shape[0])] = 0

    def row_loss(self, logps: Tensor) -> Tensor:
        adv = self.advantages[:, None].expand(self.ids.shape).reshape(logps.shape).to(logps.dtype)
        ratio = torch.exp(logps - self.old.reshape(logps.shape).to(logps.dtype))
        return -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()

    def error(self, grads: tuple[Tensor, ...]) -> float:
        """The error of both gradients in a few rows, over what is allowed, against fp64."""
        h, w, ids, lse = self.hidden.detach().flatten(0, 1).double(), self.weight.detach(), self.ids.flatten(), self.lse.double()
        logps = ((h * w[ids].double()).sum(-1) - lse).requires_grad_()
        (coef,) = torch.autograd.grad(self.row_loss(logps), logps)
        some = coef.nonzero()[:GATE_ROWS, 0]

        def slopes(z: Tensor, rows: Any, columns: Tensor) -> Tensor:
            return coef[rows, None] * ((ids[rows, None] == columns).double() - torch.exp(z - lse[rows, None]))

        of_h = torch.zeros(len(some), h.size(1), dtype=torch.float64)
        for part in torch.arange(w.size(0)).split(8192):
            block = w[part].double()
            of_h += slopes(h[some] @ block.t(), some, part) @ block
        columns = ids[some].unique()
        of_w = slopes(h @ w[columns].double().t(), slice(None), columns).t() @ h
        pairs = ((grads[0].flatten(0, -2)[some], of_h), (grads[1][columns], of_w))
        return max(float((got.double() - truth).norm() / truth.norm() / SAME_FUNCTION) for got, truth in pairs)


Job = Callable[[], tuple[Tensor, ...]]


def _job(data: HeadData, loss: Callable[[], Tensor]) -> Job:
    return lambda: torch.autograd.grad(loss(), (data.hidden, data.weight))


def gemms(fresh: bool) -> Callable[[HeadData], Job]:
    """The three GEMMs alone; their results mean nothing. ``fresh``: into new memory, as whoever returns gradients must, else into memory
    that is there already."""

    def make(data: HeadData) -> Job:
        h, w = data.hidden.detach().flatten(0, 1), data.weight.detach()
        if fresh:

            def plain() -> tuple[Tensor, ...]:
                z = torch.mm(h, w.t())
                return torch.mm(z, w), torch.mm(z.t(), h)

            return plain
        z, dh, dw = h.new_zeros(h.size(0), w.size(0)), torch.zeros_like(h), torch.zeros_like(w)

        def job() -> tuple[Tensor, ...]:
            torch.mm(h, w.t(), out=z)
            return torch.mm(z, w, out=dh), torch.mm(z.t(), h, out=dw)

        return job

    return make


def ours(plan: str, **options: Any) -> Callable[[HeadData], Job]:
    def make(data: HeadData) -> Job:
        spec = rw.methods.ppo(0.2)
        keywords = {"spec": spec, "plan": plan, "old_per_token_logps": data.old, "backend": "cpu", **options}
        return _job(data, lambda: rw.linear_policy_loss(data.hidden, data.weight, data.ids, data.advantages, **keywords).loss)

    return make


def materialised(data: HeadData) -> Job:
    spec = rw.methods.ppo(0.2)
    options = {"spec": spec, "old_per_token_logps": data.old, "backend": "cpu", "consume_logits": True}
    return _job(data, lambda: rw.policy_loss(F.linear(data.hidden, data.weight), data.ids, data.advantages, **options).loss)


def eager(data: HeadData) -> Job:
    def loss() -> Tensor:
        logp_all = torch.log_softmax(F.linear(data.hidden, data.weight).float(), -1)
        return data.row_loss(logp_all.gather(-1, data.ids.unsqueeze(-1)).squeeze(-1))

    return _job(data, loss)


def trl(data: HeadData) -> Job:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

    def loss() -> Tensor:
        arguments = (data.hidden.flatten(0, 1), data.weight, None, data.ids.flatten(), 1.0, width, None, 1.0, ())
        return data.row_loss(ChunkedLogProbFunction.apply(*arguments)[0])

    return _job(data, loss)


def liger(data: HeadData) -> Job:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    chunk = max(32 * 256 // data.case.rows, 1)  # sequences: 256 rows, as ours
    of = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="bnpo", epsilon_low=0.2, epsilon_high=0.2, compiled=False, chunk_size=chunk
    )
    mask = torch.ones_like(data.ids)
    return _job(data, lambda: of(data.hidden, data.weight, data.ids, mask, data.advantages, old_per_token_logps=data.old)[0])


PROVIDERS: list[tuple[str, Callable[[HeadData], Job]]] = [
    (BARE, gemms(fresh=True)),
    (THERE, gemms(fresh=False)),
    ("linear one_pass", ours("one_pass")),
    ("linear two_pass", ours("two_pass")),
    ("F.linear, then policy_loss in place", materialised),
    ("eager", eager),
    ("TRL ChunkedLogProbFunction", trl),
    ("Liger chunked GRPO", liger),
]


@dataclass
class Run:
    ms: float
    cpu_ms: float
    result: Any
    growth: int = 0


def _timed(job: Job, memory: Memory | None) -> Run:
    found: list[Any] = []
    growth = 0
    start, busy = time.perf_counter(), time.process_time()
    if memory is None:
        found.append(job())
    else:
        growth = memory.growth(lambda: found.append(job()))
    return Run(1000 * (time.perf_counter() - start), 1000 * (time.process_time() - busy), found[0], growth)


def measure(case: HeadCase, options: argparse.Namespace) -> dict[str, Any]:
    """One case: gate, memory, then rounds."""
    data, memory = HeadData(case), Memory("cpu")
    jobs, entry = {}, {"case": asdict(case), "name": case.name, "logits_bytes": case.logits_bytes, "results": {}}
    for name, make in PROVIDERS:
        ours_alone = case.zero_advantages or options.only_ours
        if (ours_alone and name not in GEMMS and not name.startswith("linear")) or any(word in name for word in options.skip):
            continue
        row: dict[str, Any] = {"ms": [], "cpu_ms": []}
        entry["results"][name] = row
        is_gemms, is_ours = name in GEMMS, name.startswith("linear")
        try:
            job = make(data)
            first = _timed(job, memory)
        except ImportError as error:
            row["note"] = f"not importable: {error}"
            continue
        row["gate"] = None if is_gemms else data.error(first.result)
        if row["gate"] is not None and not row["gate"] <= 1:
            row["note"] = f"error {row['gate']:.2f} times what is allowed: not timed"
            continue
        if not is_gemms:
            row["extra_bytes"] = first.growth - case.gradient_bytes
        if is_gemms or is_ours:
            jobs[name] = job
        else:  # slow: the run that was judged is the one that counts
            row["ms"], row["cpu_ms"] = [first.ms], [first.cpu_ms]
        del first
    load = foreign_load()
    next(load)
    for _ in range(options.rounds):
        for name, job in jobs.items():
            run = _timed(job, None)
            entry["results"][name]["ms"].append(run.ms)
            entry["results"][name]["cpu_ms"].append(run.cpu_ms)
            del run
    entry["foreign_load"] = next(load)
    return entry


def _speed(bare: list[float], times: list[float]) -> float:
    """Of the bare GEMMs: within rounds where there are rounds."""
    return median(b / x for b, x in zip(bare, times, strict=True)) if len(times) == len(bare) else median(bare) / median(times)


def table(document: dict[str, Any]) -> None:
    console = Console(width=150)
    m = document["machine"]
    console.print(
        f"[bold]{m['processor']}[/], {m['threads']} threads, torch {m['torch']}, TRL {m['trl']}, commit {m['commit']}, {m['date']}"
    )
    for entry in document["cases"]:
        title = f"{entry['name']}: logits {entry['logits_bytes'] / 2**20:.0f} MiB; others used {entry['foreign_load']:.0%} of the processor"
        shown = Table(title=title, title_justify="left", title_style="bold")
        for head in (
            "",
            "ms (median)",
            "spread",
            "rounds",
            "speed of the bare GEMMs",
            "by CPU time",
            "extra MiB",
            "of the logits",
            "error/allowed",
        ):
            shown.add_column(head, justify="right" if head else "left")
        bare = entry["results"][BARE]
        for name, row in entry["results"].items():
            if not row["ms"]:
                shown.add_row(name, row["note"], style="dim")
                continue
            speeds = [_speed(bare[k], row[k]) for k in ("ms", "cpu_ms")]
            extra, gate = row.get("extra_bytes"), row["gate"]
            figures = [f"{median(row['ms']):.0f}", f"{min(row['ms']):.0f}-{max(row['ms']):.0f}", str(len(row["ms"]))]
            figures += [f"{x:.2f}" for x in speeds]
            figures += ["", ""] if extra is None else [f"{extra / 2**20:.0f}", f"{extra / entry['logits_bytes']:.2f}"]
            shown.add_row(name, *figures, "" if gate is None else f"{gate:.2f}", style="bold" if name.startswith("linear") else "")
        console.print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.linear_head", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's name must contain")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], help="words in names of providers to leave out")
    parser.add_argument("--only-ours", action="store_true", help="no baselines but the bare GEMMs")
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--show", action="store_true", help="print the table of --out and measure nothing")
    options = parser.parse_args()
    path = Path(options.out)
    known = json.loads(path.read_text()) if path.exists() else {"machine": {}, "cases": []}
    if not options.show:
        from .__main__ import machine

        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        document = {"machine": machine("cpu"), "cases": known["cases"]}
        for case in CASES:
            if all(word in case.name for word in options.only):
                entry = {**measure(case, options), "commit": document["machine"]["commit"]}
                document["cases"] = [c for c in document["cases"] if c["name"] != case.name] + [entry]
                path.write_text(json.dumps(document, indent=1) + "\n")
        known = document
    table(known)


if __name__ == "__main__":
    main()
