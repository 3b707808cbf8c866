"""Ablations: each variant changes one part of a method, in a training loop without a
trainer.

A tiny Qwen2 learns two-digit addition. Every variant runs over several seeds, in
minutes on a CPU.

* AR against Lopti, and the two together, in both orders of Lopti's updates
  (arXiv:2505.12929);
* QAE's quantile K (arXiv:2509.22611);
* the least weight that STEER gives a token (arXiv:2510.10150);
* HAPO's four parts (arXiv:2509.16591).

All variants start from the same warm-started model. They take the same number of
optimizer steps on the problems of their seed. The script prints a table and writes a
picture and the numbers. The task is a toy: a difference smaller than that between seeds
says nothing.

Run it with ``python examples/ablations.py`` (needs transformers, datasets, typer, rich,
matplotlib).
"""

from __future__ import annotations

import json
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

console = Console()
PAGE = Path(__file__).resolve().parents[1] / "docs" / "ablations.md"


def run(index: int, rollouts: int, seed: int, weights: str) -> tuple[list[float], list[float]]:
    """One run, with one thread."""
    # the tensors are small: two runs beside each other are faster than one on two cores
    torch.set_num_threads(1)
    from addition import loop, task, variants

    model = task.make_model(task.make_tokenizer())
    model.load_state_dict(torch.load(weights))
    return loop.train(variants.VARIANTS[index], model, rollouts, seed)


def processor_seconds() -> int:
    """Return the processor time of this process and of its finished children.

    Other processes of the machine do not lengthen it.
    """
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(sum(u.ru_utime + u.ru_stime for u in used))


def main(
    rollouts: Annotated[int, typer.Option(min=1, help="Of each run; two updates on each.")] = 30,
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each variant.")] = 4,
    warm_start: Annotated[int, typer.Option(min=1, help="Steps of the warm start.")] = 800,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at a time, one thread each.")
    ] = os.cpu_count() or 1,
    only: Annotated[
        str,
        typer.Option(help="Words of a variant's group, such as 'steer'; the baseline always runs."),
    ] = "",
    out: Annotated[Path, typer.Option(help="Where the picture and the numbers go.")] = Path(
        "demo_output"
    ),
    page: Annotated[
        bool,
        typer.Option(help="Train nothing: write docs/ablations.md from the committed numbers."),
    ] = False,
) -> None:
    """Train every variant over the seeds; print a table, write ablations.png and
    ablations.json.
    """
    from addition import ablation_report as report
    from addition import task, variants

    if page:
        PAGE.write_text(
            report.page(json.loads((PAGE.parent / "demo" / "ablations.json").read_text()))
        )
        return
    begin, machine = time.perf_counter(), report.machine()
    chosen = [
        i
        for i, v in enumerate(variants.VARIANTS)
        if v is variants.BASELINE or only.lower() in v.group.lower()
    ]
    if len(chosen) == 1:
        raise typer.BadParameter(
            f"no group has {only!r} in its name: "
            f"{', '.join(sorted({v.group for v in variants.VARIANTS}))}",
            param_hint="--only",
        )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = task.make_tokenizer()
    model = task.make_model(tokenizer)
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("warm start", total=warm_start)
        task.warm_start(model, tokenizer, warm_start, lambda: progress.advance(bar))
        weights = str(out / "ablations_start.pt")
        torch.save(model.state_dict(), weights)
        bar = progress.add_task("runs", total=len(chosen) * seeds)
        with (
            ThreadPoolExecutor(1)
            if jobs == 1
            else ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool
        ):
            futures = {
                (i, seed): pool.submit(run, i, rollouts, seed, weights)
                for seed in range(seeds)
                for i in chosen
            }
            for future in futures.values():
                future.add_done_callback(lambda _: progress.advance(bar))
            courses = {key: future.result() for key, future in futures.items()}
    Path(weights).unlink()
    numbers = {
        "machine": machine,
        "settings": {"rollouts": rollouts, "seeds": seeds, "warm_start": warm_start, "jobs": jobs},
        "variants": [
            report.of_variant(variants.VARIANTS[i], [courses[i, seed] for seed in range(seeds)])
            for i in chosen
        ],
        "seconds": round(time.perf_counter() - begin),
        "processor_seconds": processor_seconds(),
    }
    (out / "ablations.json").write_text(json.dumps(numbers, indent=1) + "\n")
    report.picture(numbers, out / "ablations.png")
    console.print(report.table(numbers))
    console.print(
        f"{out / 'ablations.png'} and {out / 'ablations.json'}; {numbers['seconds']} s in all."
    )


if __name__ == "__main__":
    typer.run(main)
