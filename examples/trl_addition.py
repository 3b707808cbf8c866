"""TRL's GRPOTrainer on this package's ops: a tiny Qwen2 learns two-digit addition.

It starts from random weights and runs offline, in minutes on a laptop.

1. Warm start on noisy answers.
2. One rollout: loss and gradient of the fused op equal TRL's own.
3. Training: the reward curve of the fused run compared to the spread of stock TRL's
   seeds.
4. The same trainer with advantage reweighting and with Lopti (arXiv:2505.12929), and
   the effect of reweighting on the gradient.
5. The loss alone at a real vocabulary: time and memory on this machine, compared to
   eager PyTorch and torch.compile.

The task is a toy, and the example claims no gain in reward from reweighting. Run it
with ``python examples/trl_addition.py`` (needs trl, typer, rich, matplotlib).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

TOLERANCE = 1e-6
#: These are set before TRL is imported. The last one silences the profiler that
#: measures memory.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "KINETO_LOG_LEVEL": "99"}
console = Console()


def main(
    steps: Annotated[int, typer.Option(min=2, help="Updates of each run, two per rollout.")] = 80,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of stock TRL.")] = 3,
    warm_start: Annotated[int, typer.Option(min=1, help="Steps of the warm start.")] = 800,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads; a model this small gains little from more.")
    ] = 1,
    lm_head: Annotated[
        str,
        typer.Option(
            help="Head of the fused trainers: 'linear' never builds logits, 'logits' does."
        ),
    ] = "logits",
    cost_rows: Annotated[
        int,
        typer.Option(min=0, help="Rows of the loss at a real vocabulary; 0 leaves that part out."),
    ] = 128,
    out: Annotated[Path, typer.Option(help="Folder of the picture and the numbers.")] = Path(
        "demo_output"
    ),
) -> None:
    """Train stock TRL, the fused op, advantage reweighting and Lopti on two-digit
    addition; write a picture and the numbers.
    """
    begin = time.perf_counter()
    os.environ.update(ENVIRONMENT)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    with console.status("Importing TRL"):
        logging.disable(logging.WARNING)
        from addition import cost, mechanism, report, runs, task

    tokenizer = task.make_tokenizer()
    model = task.make_model(tokenizer)
    console.print(
        f"Qwen2 with {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{len(task.TOKENS)} tokens in a head of {task.VOCAB_SIZE}."
    )
    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def counter(name: str, total: int):
            bar = progress.add_task(name, total=total)
            return lambda: progress.advance(bar)

        task.warm_start(model, tokenizer, warm_start, counter("warm start", warm_start))

        def trainer_of(kind: runs.Kind, seed: int = 0):
            return runs.make_trainer(
                kind, model, tokenizer, steps, seed, str(out / "trainer"), lm_head
            )

        agreement = runs.compare(trainer_of(runs.STOCK), trainer_of(runs.FUSED))
        peaks = {
            kind.name: runs.peak_memory(trainer_of(kind))
            for kind in (runs.STOCK, runs.FUSED, runs.REWEIGHTED, runs.LOPTI)
        }
        stock, others, recorded = [], [], []
        plan = [(runs.STOCK, seed) for seed in range(seeds)] + [
            (kind, 0) for kind in (runs.FUSED, runs.REWEIGHTED, runs.LOPTI)
        ]
        for kind, seed in plan:
            trainer = trainer_of(kind, seed)
            run = runs.train(
                kind, trainer, counter(f"{kind.name}, seed {seed}", steps), peaks[kind.name]
            )
            (stock if kind is runs.STOCK else others).append(run)
            recorded += getattr(trainer, "recorded", [])

    console.print(report.agreement_table(agreement), report.runs_table(stock + others))
    shares = mechanism.quartile_shares(recorded)
    fused = others[0]
    apart = report.distance(fused, stock[0])
    console.print(
        f"Reward curves: fused and stock of the same seed are {apart:.4f} apart on average", end=""
    )
    if seeds > 1:
        spread = fmean(report.distance(a, b) for a, b in combinations(stock, 2))
        console.print(f"; two stock seeds {spread:.4f}.")
    else:
        console.print(".")
    console.print(
        f"Calls of the fused run here: {fused.fused_calls}; left to TRL: "
        f"{fused.delegated_calls or 'none'}."
    )
    console.print(
        f"Gradient norm of the least likely quarter of the tokens: {shares.plain[0]:.1%} plain, "
        f"{shares.reweighted[0]:.1%} reweighted."
    )
    costs = []
    if cost_rows:
        torch.set_num_threads(os.cpu_count() or 1)
        with console.status(f"The loss alone, {cost_rows} rows of {cost.VOCAB} logits"):
            costs = cost.measure(cost_rows)
        console.print(report.cost_table(costs, cost_rows))
    report.picture(stock, others, shares, costs, out / "trl_addition.png")
    numbers = {
        "versions": {"torch": torch.__version__, "trl": __import__("trl").__version__},
        "agreement": [asdict(a) for a in agreement],
        "gradient_share_by_probability_quartile": shares._asdict(),
        "cost": {
            "rows": cost_rows,
            "vocabulary": cost.VOCAB,
            "dtype": "bfloat16",
            "found": [c._asdict() for c in costs],
        },
        "runs": [asdict(run) for run in stock + others],
    }
    (out / "trl_addition.json").write_text(json.dumps(numbers, indent=1))
    console.print(
        f"{out / 'trl_addition.png'} and {out / 'trl_addition.json'}; "
        f"{time.perf_counter() - begin:.0f} s in all."
    )
    if any(max(a.loss_difference, a.gradient_difference) > TOLERANCE for a in agreement):
        console.print(f"[bold red]The fused op differs from TRL by more than {TOLERANCE:g}.")
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
