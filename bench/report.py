"""Printed results: one table per case (one line without rich) and one plot (none
without matplotlib).
"""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

#: The timed limits that make up the minimum work of a provider. Log-probs read the
#: logits once. A loss in place reads and writes them. A new gradient is a copy. If a
#: gradient waits for its upstream gradient, the limits add up.
LIMIT = {
    ("logps", False): ("read",),
    ("loss", True): ("update",),
    ("loss", False): ("copy",),
    ("grad", True): ("update",),
    ("grad", False): ("copy",),
    ("logps+grad", True): ("read", "update"),
    ("logps+grad", False): ("read", "copy"),
    ("kl", False): ("read", "read"),
    ("kl+grad", False): ("read", "read", "read", "copy"),
    ("kl+grad", True): ("read", "read", "read", "copy"),
    ("distill", False): ("read", "copy"),
    ("distill", True): ("read", "copy"),
    ("picked", False): ("read", "copy"),
    ("kept", False): ("read",),
    ("linear stats", False): ("gemms",),
    ("linear", False): ("gemms",),
    ("linear ce", False): ("gemms",),
    **{(f"linear distill {kind}", False): ("gemms",) for kind in ("forward", "reverse", "jsd")},
}


def _ratio(a: list[float], b: list[float]) -> float:
    """Median over rounds of a's time divided by b's, both from the same round.

    If one of them is slow and ran once, it is the ratio of the medians.
    """
    return (
        median(x / y for x, y in zip(a, b, strict=True))
        if len(a) == len(b)
        else median(a) / median(b)
    )


def _sum_of(names: tuple[str, ...]) -> str:
    return "+".join(
        f"{n} {name}" if (n := names.count(name)) > 1 else name for name in dict.fromkeys(names)
    )


def rows_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The numbers of a case's results, per provider, from the JSON."""
    found = []
    timed = {r["provider"]: r for r in entry["results"] if r["ms"]}
    for r in entry["results"]:
        row = {
            "provider": r["provider"],
            "note": r["wrong"] or r.get("failed") or r["absent"],
            "ours": r["ours"],
        }
        if r["ms"]:
            names = LIMIT[(entry["case"]["job"], r["in_place"] and entry["case"]["job"] != "logps")]
            limit = [sum(ms) for ms in zip(*(entry["limits"][name] for name in names), strict=True)]
            extra = (
                None
                if r["extra_bytes"] is None
                else (r["extra_bytes"] - entry.get("gradient_bytes", 0)) / entry["logits_bytes"]
            )
            row |= {
                "ms": median(r["ms"]),
                "of_limit": _ratio(limit, r["ms"]),
                "limit": _sum_of(names),
                "extra": extra,
                "gate": r["gate"],
            }
            row["once"] = len(r["ms"]) < len(limit)
            row["against"] = {
                name: _ratio(t["ms"], r["ms"])
                for name, t in timed.items()
                if r["ours"] and not t["ours"]
            }
        found.append(row)
    return found


def _speeds(entry: dict[str, Any]) -> str:
    """The limits of a case as speeds: GB/s read plus written, or TFLOP/s."""
    ms = {name: median(times) for name, times in entry["limits"].items()}
    if "gemms" in ms:
        speed = entry["least_flops"] / ms["gemms"] / 1e9
        return f"GEMMs {speed:.{0 if speed >= 10 else 2}f} TFLOP/s"
    return ", ".join(
        f"{name} {entry['logits_bytes'] * (1 if name == 'read' else 2) / t / 1e6:.0f} GB/s"
        for name, t in ms.items()
    )


def _cell(best: dict[str, Any] | None) -> str:
    if best is None:
        return "-"
    extra = "" if best["extra"] is None else f"+{best['extra']:.2f}x"
    return f"{best['ms']:8.3f}  {best['of_limit']:.2f}  {extra}"


def summary(document: dict[str, Any]) -> list[str]:
    """A short line per case. It has the limit, the fastest of each backend (ms and
    share of the limit), and the best baseline.
    """
    backends = list(
        dict.fromkeys(
            r["provider"].split()[0] for e in document["cases"] for r in e["results"] if r["ours"]
        )
    )
    heads = [f"{b} ms, of limit, +memory" for b in backends]
    lines = [
        f"{'case':<37}{'limit':<15}" + "".join(f"{h:<28}" for h in heads) + "best of the others"
    ]
    for entry in document["cases"]:
        rows = sorted((r for r in rows_of(entry) if "ms" in r), key=lambda r: r["ms"])
        speeds = _speeds(entry).split(", ")
        name = entry["name"].replace("float32", "fp32").replace("bfloat16", "bf16")
        line = f"{name:<37}{speeds[-1]:<15}"
        for backend in backends:
            best = next(
                (r for r in rows if r["ours"] and r["provider"].split()[0] == backend), None
            )
            line += f"{_cell(best):<28}"
        lines.append(
            line
            + "".join(
                f"{r['provider']} {r['ms']:.3f}" for r in [r for r in rows if not r["ours"]][:1]
            )
        )
        lines += [
            f"  {r['provider']}: {r['wrong'] or r.get('failed')}"[:150]
            for r in entry["results"]
            if r["wrong"] or (r["ours"] and r.get("failed"))
        ]
    return lines + [f"not reached: {name}" for name in document.get("not_reached", [])]


def result_file(name: str) -> Path:
    """The path of a result file, an argument of the command."""
    try:
        document = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise ArgumentTypeError(f"{name} cannot be read: {error}") from None
    if not isinstance(document, dict) or not {"machine", "cases"} <= document.keys():
        raise ArgumentTypeError(f"{name} is no result file of this command.")
    return Path(name)


def print_tables(document: dict[str, Any], console: Console | None = None) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join(summary(document)))
        return
    console = console or Console()
    console = console if console.is_terminal else Console(width=150)
    m = document["machine"]
    pages = "huge pages" if m["huge_pages"] else "default pages"
    console.print(
        f"[bold]{m['processor']}[/], {m['threads']} threads, {pages}, torch {m['torch']}, "
        f"commit {m['commit']}"
    )
    for entry in document["cases"]:
        busy = (
            f", [red]others used {entry['foreign_load']:.0%} of the processor[/]"
            if entry.get("foreign_load", 0) > 0.05
            else ""
        )
        title = (
            f"{entry['name']}   {entry['logits_bytes'] / 2**20:.0f} MiB of logits; "
            f"{_speeds(entry)}{busy}"
        )
        table = Table(title=title, title_justify="left", title_style="bold")
        others = [r["provider"] for r in entry["results"] if r["ms"] and not r["ours"]]
        for head in (
            "provider",
            "ms",
            "of the limit",
            *(f"x {name}" for name in others),
            "extra memory",
            "error/allowed",
        ):
            table.add_column(head, justify="left" if head == "provider" else "right")
        absent: list[str] = []
        for row in rows_of(entry):
            if "ms" not in row:
                absent.append(f"  {row['provider']}: {row['note']}")
                continue
            times = [f"{row['against'][k]:.2f}" if k in row["against"] else "" for k in others]
            extra = (
                ""
                if row["extra"] is None
                else f"{row['extra'] * entry['logits_bytes'] / 2**20:.0f} MiB {row['extra']:.2f}x"
            )
            ms = f"{row['ms']:.2f}{' once' if row['once'] else ''}"
            figures = [
                ms,
                f"{row['of_limit']:.2f} ({row['limit']})",
                *times,
                extra,
                f"{row['gate']:.2f}",
            ]
            table.add_row(row["provider"], *figures, style="bold" if row["ours"] else "")
        console.print(table)
        console.print("\n".join(absent), style="dim", highlight=False)


def plot(document: dict[str, Any], path: Path) -> None:
    """Plot each provider's time divided by the memory's limit, one panel per case."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = [e for e in document["cases"] if e["case"]["job"] == "loss"]
    if not entries:
        return
    columns = min(3, len(entries))
    lines = -(-len(entries) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(entries) :]:
        axis.axis("off")
    for axis, entry in zip(axes.flat, entries, strict=False):
        rows = [r for r in rows_of(entry) if "ms" in r][::-1]
        axis.barh(
            [r["provider"] for r in rows],
            [r["ms"] for r in rows],
            color=["#2a6f97" if r["ours"] else "#b0b0b0" for r in rows],
        )
        axis.axvline(median(entry["limits"]["update"]), color="#c1121f", linewidth=1)
        axis.set_xscale("log")
        axis.set_title(entry["name"], fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("ms (red: read and write the logits once)", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
