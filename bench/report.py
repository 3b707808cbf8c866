"""Results for people: a table per case (rich) and one plot (matplotlib)."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

#: What a provider has to move at least: log-probs read the logits once, a loss in place reads and writes them, a new gradient is a copy.
LIMIT = {("logps", False): "read", ("loss", True): "update", ("loss", False): "copy"}


def _ratio(a: list[float], b: list[float]) -> float:
    """Median over rounds of a's time over b's: both were measured in the same round."""
    return median(x / y for x, y in zip(a, b, strict=True))


def rows_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of a case's results, per provider, from the JSON."""
    found = []
    timed = {r["provider"]: r for r in entry["results"] if r["ms"]}
    for r in entry["results"]:
        row = {"provider": r["provider"], "note": r["wrong"] or r["absent"], "ours": r["ours"]}
        if r["ms"]:
            limit = LIMIT[(entry["case"]["job"], r["in_place"])]
            row |= {
                "ms": median(r["ms"]),
                "of_limit": _ratio(entry["limits"][limit], r["ms"]),
                "limit": limit,
                "extra": None if r["extra_bytes"] is None else r["extra_bytes"] / entry["logits_bytes"],
                "gate": r["gate"],
            }
            for against in ("torch.compile", "chunked eager", "eager", "TRL"):
                if r["ours"] and against in timed:
                    row[against] = _ratio(timed[against]["ms"], r["ms"])
        found.append(row)
    return found


def print_tables(document: dict[str, Any], console: Console | None = None) -> None:
    console = console or Console()
    console = console if console.is_terminal else Console(width=150)
    m = document["machine"]
    pages = "huge pages" if m["huge_pages"] else "default pages"
    console.print(f"[bold]{m['processor']}[/], {m['threads']} threads, {pages}, torch {m['torch']}, commit {m['commit']}")
    for entry in document["cases"]:
        busy = f", [red]others used {entry['foreign_load']:.0%} of the processor[/]" if entry["foreign_load"] > 0.05 else ""
        speed = {k: entry["logits_bytes"] / median(v) / 1e6 for k, v in entry["limits"].items()}
        title = (
            f"{entry['name']}   {entry['logits_bytes'] / 2**20:.0f} MiB; GB/s of logits: "
            + ", ".join(f"{k} {v:.0f}" for k, v in speed.items())
            + busy
        )
        table = Table(title=title, title_justify="left", title_style="bold")
        for head in ("provider", "ms", "of the limit", "x compile", "x chunked", "x eager", "x TRL", "extra memory", "error/allowed"):
            table.add_column(head, justify="left" if head == "provider" else "right")
        absent: list[str] = []
        for row in rows_of(entry):
            if "ms" not in row:
                absent.append(f"  {row['provider']}: {row['note']}")
                continue
            times = [f"{row[k]:.2f}" if k in row else "" for k in ("torch.compile", "chunked eager", "eager", "TRL")]
            extra = "" if row["extra"] is None else f"{row['extra']:.2f}x"
            figures = [f"{row['ms']:.2f}", f"{row['of_limit']:.2f} ({row['limit']})", *times, extra, f"{row['gate']:.2f}"]
            table.add_row(row["provider"], *figures, style="bold" if row["ours"] else "")
        console.print(table)
        console.print("\n".join(absent), style="dim", highlight=False)


def plot(document: dict[str, Any], path: Path) -> None:
    """Time of each provider over the memory's limit, one panel per case."""
    import matplotlib

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
        axis.barh([r["provider"] for r in rows], [r["ms"] for r in rows], color=["#2a6f97" if r["ours"] else "#b0b0b0" for r in rows])
        axis.axvline(median(entry["limits"]["update"]), color="#c1121f", linewidth=1)
        axis.set_xscale("log")
        axis.set_title(entry["name"], fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("ms (red: read and write the logits once)", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
