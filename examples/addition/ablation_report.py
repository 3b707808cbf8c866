"""The results of ``ablations.py``: numbers, a table, a picture, and a page of the
documentation.
"""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

import reweight_ops

from .loop import Variant

LAST = 5  # rollouts that a run's final numbers are the mean of
GREY, BLUE = "#666666", "#0072B2"
HEADINGS = (
    "variant",
    "reward: mean of the seeds",
    "lowest and highest seed",
    "entropy",
    "lowest and highest seed",
)


def machine() -> dict[str, str | int]:
    """Return the machine, the versions and the commit of the numbers."""

    def git(*arguments: str) -> str:
        try:
            found = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
            )
        except OSError:
            return ""
        return found.stdout.strip()

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    return {
        "processor": next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
            platform.machine(),
        ),
        "cores": torch.multiprocessing.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "reweight_ops": reweight_ops.__version__,
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown")
        + (" (modified)" if git("status", "--porcelain", "-uno") else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def of_variant(
    variant: Variant, courses: Sequence[tuple[list[float], list[float]]]
) -> dict[str, Any]:
    """Return the means of the last rollouts, one for each seed, and the reward of every
    rollout.
    """
    rewards, entropies = zip(*courses, strict=True)
    return {
        "group": variant.group,
        "name": variant.name,
        "reward": [round(fmean(r[-LAST:]), 4) for r in rewards],
        "entropy": [round(fmean(e[-LAST:]), 4) for e in entropies],
        "rewards": [[round(x, 4) for x in r] for r in rewards],
    }


def cells(variant: dict[str, Any]) -> tuple[str, ...]:
    """Return a row under :data:`HEADINGS`."""

    def of(values: list[float]) -> tuple[str, str]:
        return f"{fmean(values):.3f}", f"{min(values):.3f} to {max(values):.3f}"

    return variant["name"], *of(variant["reward"]), *of(variant["entropy"])


def groups(numbers: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the variants by group. The group of the baseline comes first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for variant in numbers["variants"]:
        found.setdefault(variant["group"], []).append(variant)
    return found


def table(numbers: dict[str, Any]) -> Table:
    made = Table(
        title=f"Means of the last {LAST} rollouts, {numbers['settings']['seeds']} seeds",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, heading in enumerate(HEADINGS):
        made.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    for of in groups(numbers).values():
        for variant in of:
            made.add_row(*cells(variant), end_section=variant is of[-1])
    return made


def picture(numbers: dict[str, Any], path: Path) -> None:
    """Draw reward and entropy: a dot for each seed, and a bar at their mean.

    The band behind them is the range of the baseline's seeds.
    """
    variants = numbers["variants"]
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 0.6 + 0.32 * len(variants)), layout="constrained", sharey=True
    )
    labels = {
        "reward": "reward: share of exact answers",
        "entropy": "entropy of the sampled tokens in nats",
    }
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        base = variants[0][key]
        axis.axvspan(
            min(base),
            max(base),
            color=GREY,
            alpha=0.2,
            linewidth=0,
            label="range of the baseline's seeds",
        )
        for y, variant in enumerate(variants):
            axis.plot(
                variant[key],
                [y] * len(variant[key]),
                "o",
                color=BLUE,
                alpha=0.5,
                markersize=4,
                label=None if y else "a seed",
            )
            axis.plot(
                [fmean(variant[key])],
                [y],
                "|",
                color="black",
                markersize=12,
                label=None if y else "mean of the seeds",
            )
        for y, (a, b) in enumerate(pairwise(variants)):
            if a["group"] != b["group"]:
                axis.axhline(y + 0.5, color=GREY, linewidth=0.5)
        axis.set_xlabel(f"{label}\n(mean of the last {LAST} rollouts)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(variants)), [variant["name"] for variant in variants])
    axes[0].invert_yaxis()
    figure.legend(
        *axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper right", ncols=3
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def page(numbers: dict[str, Any]) -> str:
    """Return the text of docs/ablations.md."""
    settings, where = numbers["settings"], numbers["machine"]
    base = numbers["variants"][0]
    low, high = min(base["reward"]), max(base["reward"])
    outside = [
        v["name"]
        for v in numbers["variants"][1:]
        if max(v["reward"]) < low or min(v["reward"]) > high
    ]
    lines = [
        "# Ablations on a toy",
        "",
        "Generated from `docs/demo/ablations.json` by `python examples/ablations.py --page`; do "
        "not edit.",
        "",
        "`make ablations` changes one part of a method at a time. A Qwen2 of half a million "
        "parameters learns two-digit addition in an own loop:",
        "the same warm-started model, the same problems for a seed, two optimizer steps on each "
        "rollout of 32 prompts x 8 completions. Every variant",
        "is over the same dual clip (0.2, 0.28, c = 10) and, but for QAE and HAPO's average, "
        "GRPO's advantages.",
        "",
        f"Measured on {where['processor']}, {where['cores']} cores, PyTorch {where['torch']}, "
        f"commit {where['commit']}, {where['date'][:10]}: "
        f"{settings['seeds']} seeds, {settings['rollouts']} rollouts each, {settings['jobs']} "
        "runs at a time,",
        f"{numbers['processor_seconds']} s of processor time in all, {numbers['seconds']} s "
        "from start to end.",
        "Reward is the share of exact answers, entropy the mean of the sampled tokens in nats: "
        f"both over the last {LAST} rollouts of a run.",
        "",
        "![A dot a seed for every variant: reward and entropy, beside the range of the "
        "baseline's seeds](demo/ablations.png)",
        "",
    ]
    for group, of in groups(numbers).items():
        lines += [
            f"## {group[0].upper()}{group[1:]}",
            "",
            f"| {' | '.join(HEADINGS)} |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        lines += [f"| {' | '.join(cells(variant))} |" for variant in of]
        lines.append("")
    lines += [
        "## What this shows, and what not",
        "",
        f"The baseline's seeds are {low:.3f} to {high:.3f} in reward. "
        + (
            f"Every seed is outside of that range with: {'; '.join(outside)}."
            if outside
            else "No variant has every seed outside of that range: the rewards tell none of "
            "them apart from the baseline."
        ),
        f"{settings['seeds']} seeds of a toy whose completions are four tokens long say nothing "
        "about a language model: no method is claimed to be better.",
        "HAPO's average over tokens differs from GRPO's only where completions differ in "
        "length, which here few do.",
        "",
    ]
    return "\n".join(lines)
