"""The demo's table and picture."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .cost import VOCAB, Cost
from .mechanism import QuartileShares
from .runs import PASSES, Agreement, Run

WINDOW = 5  # rollouts of the moving average
# Okabe and Ito's colours, which colour-blind readers can distinguish.
GREY, BLUE, ORANGE, GREEN = "#666666", "#0072B2", "#D55E00", "#009E73"
COLOURS = {"fused": BLUE, "fused + AR": ORANGE, "fused, Lopti": GREEN}


def smoothed(values: list[float]) -> list[float]:
    """Trailing moving average."""
    return [fmean(values[max(i - WINDOW + 1, 0) : i + 1]) for i in range(len(values))]


def _table(title: str, *headings: str) -> Table:
    table = Table(
        title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def agreement_table(found: list[Agreement]) -> Table:
    table = _table(
        "One rollout: the fused op compared to TRL's own loss",
        "update",
        "loss",
        "difference",
        "gradient, relative difference",
    )
    for a in found:
        policy = "on-policy" if a.update == 1 else "off-policy"
        table.add_row(
            f"{a.update} ({policy})",
            f"{a.loss:+.2e}",
            f"{a.loss_difference:.1e}",
            f"{a.gradient_difference:.1e}",
        )
    table.caption = (
        "On-policy the loss is 0 by construction: ratios are 1, and the advantages "
        "of a group sum to 0."
    )
    return table


def runs_table(runs: list[Run]) -> Table:
    table = _table(
        "Training runs", "run", "seed", "reward", "loss", "clipped", "entropy", "ms", "MiB"
    )
    for run in runs:
        reward, loss = run.series("reward"), run.series("loss")
        table.add_row(
            run.name,
            str(run.seed),
            f"{fmean(reward[:WINDOW]):.3f}→{fmean(reward[-WINDOW:]):.3f}",
            f"{fmean(loss[-10:]):+.4f}",
            f"{run.clip_fraction():.2%}",
            f"{run.series('entropy')[-1]:.3f}",
            f"{1000 * run.seconds_per_update:.0f}",
            f"{run.peak_bytes / 2**20:.0f}",
        )
    table.caption = (
        f"reward: first and last {WINDOW} rollouts; loss: last 10 updates; clipped: share of "
        "tokens, off-policy updates; ms: an update.\n"
        "MiB: peak of forward, loss and backward. Stock TRL's head has a buffer of 32768 "
        "columns for a vocabulary of any size, here 64: "
        "the numbers do not predict real models."
    )
    return table


def distance(a: Run, b: Run) -> float:
    """Mean distance between two smoothed reward curves."""
    return fmean(
        abs(x - y)
        for x, y in zip(smoothed(a.series("reward")), smoothed(b.series("reward")), strict=True)
    )


def cost_table(costs: list[Cost], rows: int) -> Table:
    table = _table(
        f"The loss alone on this machine: {rows} rows of {VOCAB} bf16 logits, forward and backward",
        "loss",
        "ms",
        "MiB besides the logits",
    )
    for c in costs:
        table.add_row(c.name, f"{c.milliseconds:.1f}", f"{c.extra_bytes / 2**20:.1f}")
    return table


def cost_panels(time: plt.Axes, memory: plt.Axes, costs: list[Cost]) -> None:
    """Draw the loss at a real vocabulary: milliseconds and MiB."""
    names = [c.name for c in costs][::-1]
    colours = [BLUE if "fused" in name else GREY for name in names]
    for axes, values, unit in (
        (time, [c.milliseconds for c in costs][::-1], "ms, forward and backward"),
        (memory, [c.extra_bytes / 2**20 for c in costs][::-1], "MiB besides the logits"),
    ):
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(
            bars, [f"{v:,.0f}" if v >= 10 else f"{v:.1f}" for v in values], fontsize=8, padding=2
        )
        axes.set(xlabel=unit)
        axes.margins(x=0.16)
        axes.spines[["top", "right"]].set_visible(False)
    time.set(title=f"The loss alone, {VOCAB} columns in bf16")
    memory.set(title="and the memory that it takes")


def picture(
    stock: list[Run], others: list[Run], shares: QuartileShares, costs: list[Cost], path: Path
) -> None:
    """Draw reward curves over the spread of the stock seeds, and the gradient's share
    by token probability.

    The lower row shows the cost of the loss.
    """
    lines = 2 if costs else 1
    figure, grid = plt.subplots(
        lines,
        2,
        figsize=(12, 4.6 + 2.6 * (lines - 1)),
        layout="constrained",
        width_ratios=(1.35, 1),
        height_ratios=(1, 0.5)[:lines],
        squeeze=False,
    )
    left, right = grid[0]
    if costs:
        cost_panels(*grid[1], costs)
    curves = list(zip(*(smoothed(run.series("reward")) for run in stock), strict=True))
    x = [PASSES * i for i in range(len(curves))]
    left.fill_between(
        x, [min(c) for c in curves], [max(c) for c in curves], color=GREY, alpha=0.25, linewidth=0
    )
    for i, run in enumerate(stock):
        label = f"stock TRL: {len(stock)} seeds and their range" if i == 0 else None
        left.plot(x, smoothed(run.series("reward")), color=GREY, linewidth=1, label=label)
    for run in others:
        style = (0, (4, 3)) if run.name == "fused" else "-"
        label = f"{run.name}, seed {run.seed}"
        left.plot(
            x,
            smoothed(run.series("reward")),
            linestyle=style,
            color=COLOURS[run.name],
            linewidth=1.8,
            label=label,
            zorder=3 if run.name == "fused" else 2,
        )
    left.set(
        xlabel="update",
        ylabel=f"reward: share of exact answers (mean of {WINDOW} rollouts)",
        title="TRL's GRPOTrainer on two-digit addition",
    )
    left.legend(frameon=False, loc="lower right")

    places = range(len(shares.plain))
    for offset, values, colour, label in (
        (-0.2, shares.plain, GREY, "plain"),
        (0.2, shares.reweighted, ORANGE, "reweighted: AR, α = 0.3"),
    ):
        bars = right.bar(
            [i + offset for i in places], [100 * v for v in values], 0.38, color=colour, label=label
        )
        right.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    lower = [0.0, *shares.upper[:-1]]
    right.set_xticks(
        list(places), [f"{a:.2g} to {b:.2g}" for a, b in zip(lower, shares.upper, strict=True)]
    )
    right.set(
        xlabel="probability of the token (quartiles)",
        ylabel="share of the logit-gradient norm (%)",
        title="Which tokens the gradient comes from",
    )
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
