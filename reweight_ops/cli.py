"""``reweight-ops info | methods | find WORDS | show NAME | recipes | recipe NAME |
check | trainers | bench``.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import math
import platform
import sys
from typing import Any

import torch

from . import __version__
from ._core.backends.base import Request
from ._core.backends.built import why_missing
from ._core.backends.select import NAMES, load, unsupported_reason
from ._core.catalogue.lookup import recipe as lookup
from ._core.catalogue.papers import paper_of
from ._core.catalogue.recipes import RECIPES, recipes_of
from ._core.catalogue.registry import KINDS, Entry
from ._core.catalogue.search import exact
from ._core.catalogue.search import find as search
from ._core.catalogue.table import by_tier, level, plan
from ._core.catalogue.tiers import TIERS
from ._core.formula.base import Rule, TokenWeight
from ._core.formula.leaves import Leaves
from ._core.formula.namespace import TorchNamespace
from ._core.formula.trace import trace_weight
from ._core.spec.policy import PolicyLossSpec
from .errors import BackendUnavailable, ReweightOpsError
from .integrations.trainers import TRAINERS
from .testing.batches import LEAST_VOCAB
from .testing.checks import (
    DTYPES,
    Case,
    GoldenCase,
    Selection,
    cases,
    golden_cases,
    run_case,
    run_golden,
)

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit(
        f"reweight-ops needs its command-line extra ({error.name} is missing): pip install "
        "'reweight-ops[cli]'"
    ) from None

_ONLY_KINDS = f"Only these kinds: {', '.join(KINDS)}."

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Reweighted policy losses for LLM reinforcement learning, from logits.",
)
console = Console(width=None if sys.stdout.isatty() else 160)


def main() -> None:
    """Entry point of the ``reweight-ops`` command."""
    try:
        app()
    except ReweightOpsError as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise SystemExit(2) from None


def _say_version(asked: bool) -> None:
    if asked:
        print(f"reweight-ops {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_say_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


@app.command()
def info() -> None:
    """Print versions, the compiled extension, and which backends run on this machine,
    or why not.
    """
    table = Table(title="reweight-ops", show_header=False)
    table.add_row("reweight-ops", __version__)
    table.add_row(
        "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    table.add_row("GPU", gpu)
    for module in ("triton", "trl", "verl"):
        table.add_row(module, _version(module))
    for name, value in _build_info().items():
        table.add_row(f"extension: {name}", str(value))
    console.print(table)
    backends = Table("backend", "on", "status", title="backends")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in NAMES:
        reason = unsupported_reason(name, Request("token_stats", device, torch.bfloat16))
        backends.add_row(name, device.type, "[green]available[/]" if reason is None else reason)
    console.print(backends)


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _build_info() -> dict[str, Any]:
    try:
        extension = importlib.import_module(f"{__package__}._C")
    except ImportError as error:
        return {"status": f"missing ({why_missing('_C', error)})"}
    try:
        cuda = f"compiled for {importlib.import_module(f'{__package__}._cuda').archs()}"
    except ImportError as error:
        cuda = f"missing ({why_missing('_cuda', error)})"
    return {**extension.build_info(), "cuda": cuda}


@app.command()
def methods(
    kind: str = typer.Option(None, help=f"Only this kind: {', '.join(KINDS)}."),
    tier: str = typer.Option(None, help=f"Only this tier: {', '.join(TIERS)}."),
) -> None:
    """List the catalogue: every published method by name, the core ones first."""
    if kind is not None and kind not in KINDS:
        raise typer.BadParameter(f"no kind {kind!r}; the kinds are: {', '.join(KINDS)}.")
    if tier is not None and tier not in TIERS:
        raise typer.BadParameter(f"no tier {tier!r}; the tiers are: {', '.join(TIERS)}.")
    for one in KINDS if kind is None else (kind,):
        entries = [e for e in by_tier(one) if tier in (None, e.tier)]
        if not entries:
            continue
        table = Table(
            "name",
            "full name",
            "level",
            "plan",
            "arXiv",
            "tier",
            "certainty",
            title=f"{KINDS[one][0]}: {KINDS[one][1]}",
        )
        for e in entries:
            table.add_row(e.name, e.full_name, level(e), plan(e), e.arxiv, e.tier, e.certainty)
        console.print(table)


@app.command()
def find(
    words: list[str], kind: str = typer.Option(None, help=f"Only this kind: {', '.join(KINDS)}.")
) -> None:
    """Search by name, acronym, title, arXiv id or words. It prints what each hit is,
    how to write it, and what has matched. The exit code is 1 without a hit.
    """
    hits = search(" ".join(words), kind)
    for hit in hits:
        arxiv = "" if hit.arxiv == "unknown" else f", arXiv:{hit.arxiv}"
        console.print(
            f"[bold]{hit.call or 'left out'}[/]  {escape(hit.full_name)}\n    "
            f"{escape(hit.paper)}{arxiv} [dim]({hit.why})[/]",
            highlight=False,
        )
    if not hits:
        console.print(
            f"nothing matches {' '.join(words)!r}; reweight-ops methods lists everything",
            highlight=False,
        )
        raise typer.Exit(1)


@app.command()
def trainers() -> None:
    """List the trainers with an integration: what is installed here, whether that
    version was tested, and the hook to use.
    """
    table = Table("trainer", "installed", "standing", "tested with", "hook", "page")
    for t in TRAINERS.values():
        version = t.installed
        table.add_row(
            t.name,
            version or "no",
            t.standing(version) if version else "",
            ", ".join(t.tested) or t.commit,
            t.hook,
            t.page,
        )
    console.print(table)


@app.command()
def recipes() -> None:
    """List the recipes. A recipe is everything that one paper trains with, from rewards
    to the loss.
    """
    table = Table("name", "paper", "arXiv", "certainty", "uses")
    for r in RECIPES.values():
        table.add_row(
            r.name, r.paper, r.arxiv, r.certainty, ", ".join(entry.call for entry in r.entries)
        )
    console.print(table)


@app.command()
def recipe(name: str) -> None:
    """Print one recipe, by name, acronym, title or arXiv id: its published
    hyper-parameters, what is left to the caller, and a training loop.
    """
    r = lookup(name)
    console.print(
        f"{r.name}: {r.publication.source} ({r.certainty})\n",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if r.settings:
        table = Table("hyper-parameter", "value", "source")
        for setting in r.settings:
            table.add_row(*setting)
        console.print(table)
    for note in r.rollout:
        console.print(f"* {note}", highlight=False, markup=False)
    print(f"\n{r.to_own_loop()}")


@app.command()
def show(name: str) -> None:
    """Print an entry, by name, acronym, title or arXiv id: formula, paper, parameters.
    A loss also shows its spec, and its value and slope over the ratio. A method that
    the package leaves out shows the reason.
    """
    found = exact(name)
    if not found:
        hits = search(name)
        left_out = [hit for hit in hits if not hit.call]
        for hit in left_out:
            console.print(
                f"left out: {hit.paper}. {hit.full_name}.",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        if left_out:
            return
        near = [hit.call for hit in hits][:3]
        raise typer.BadParameter(
            f"no entry {name!r}.{' Did you mean ' + ' or '.join(near) + '?' if near else ''} "
            "reweight-ops methods lists all."
        )
    for entry, _ in found:
        _show(entry)


def _show(e: Entry) -> None:
    console.print(f"[bold]{e.call}[/]: {e.full_name}", highlight=False)
    console.print(
        f"{paper_of(e).source} ({e.tier}, {e.certainty})\n",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(e.formula + "\n", highlight=False, markup=False)
    if recipes_of([e]):
        console.print(
            "all that the paper trains with: reweight-ops recipe "
            f"{' | '.join(r.name for r in recipes_of([e]))}\n",
            highlight=False,
        )
    table = Table("parameter", "default", title="parameters")
    for parameter, value in e.defaults.items():
        table.add_row(parameter, "required" if value is inspect.Parameter.empty else str(value))
    console.print(table)
    if e.kind == "policy_loss":
        _show_spec(e.build())


def _show_spec(spec: PolicyLossSpec) -> None:
    rows = Table(show_header=False, title="spec")
    for f in dataclasses.fields(spec):
        rows.add_row(f.name, str(getattr(spec, f.name)))
    rows.add_row("reads", ", ".join(sorted(spec.requires)))
    rows.add_row(
        "plan",
        (spec.one_pass_unsupported_reason and f"two passes: {spec.one_pass_unsupported_reason}")
        or "one pass",
    )
    console.print(rows)
    if any(isinstance(value, TokenWeight) for value in spec.surrogate.parameters().values()):
        console.print("[dim]its slopes depend on the batch: a hyper-parameter is a formula[/]")
    else:
        alone = [
            w
            for w in spec.weights
            if not trace_weight(type(w)).uses_batch
            and not any(isinstance(v, TokenWeight) for v in w.parameters().values())
        ]
        console.print(_slopes(spec.surrogate, alone))
        for w in spec.weights:
            if w not in alone:
                console.print(
                    f"[dim]the weight {w.name} is not in this table: it depends on the batch[/]"
                )


def _slopes(surrogate: Rule, weights: list[TokenWeight]) -> Table:
    """Tabulate the surrogate of one token at a few ratios, times the weights that one
    token has.
    """
    xp = TorchNamespace(torch.float64)
    times = "".join(f" times {w.name}" for w in weights)
    title = f"surrogate{times} of one token with p = 0.5 (slope: by its log-prob)"
    table = Table("ratio", "loss, A = +1", "slope", "loss, A = -1", "slope", title=title)
    for ratio in (0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 4.0):
        cells = []
        for adv in (1.0, -1.0):
            logp = torch.tensor(
                math.log(0.5), dtype=torch.float64, device="cpu", requires_grad=True
            )
            old = logp.detach() - math.log(ratio)
            stored = {
                "old_logp": old,
                "ref_logp": old,
                "sampling_logp": old,
                "adv": torch.tensor(adv, dtype=torch.float64, device="cpu"),
            }
            # A weight that asks for the distribution sees two tokens of p = 0.5.
            spread = {"entropy": -logp.detach(), "log_sum_p_sq": logp.detach()}
            t = Leaves({"logp": logp, "log_ratio": logp - old, **spread, **stored})
            loss = surrogate.loss(xp, t)
            for w in weights:
                u = torch.as_tensor(w.weight(xp, t, None), dtype=logp.dtype)
                loss = torch.where(u == 0, 0, loss * (u.detach() if w.detach else u))
            (slope,) = torch.autograd.grad(loss, logp)
            cells += [f"{loss.item():+.4f}", f"{slope.item():+.4f}"]
        table.add_row(f"{ratio:g}", *cells)
    return table


@app.command()
def check(
    backend: list[str] = typer.Option(
        None, help="Only these backends (default: every one that runs here)."
    ),
    method: list[str] = typer.Option(None, help="Only the entries with these names."),
    kind: list[str] = typer.Option(None, help=_ONLY_KINDS),
    dtype: list[str] = typer.Option(list(DTYPES), help="Logits' dtypes."),
    vocab: int = typer.Option(4099, min=LEAST_VOCAB, help="Vocabulary size."),
) -> None:
    """Gradient-check every loss on every backend here against the fp64 reference, and
    the other entries by golden rows. The exit code is 1 on failure.
    """
    selection = Selection(backend or (), method or (), kind or (), dtype)
    losses, golden = cases(selection), golden_cases(selection)
    failed: list[str] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("checking", total=len(losses) + len(golden))
        tables = (
            Table(
                "backend",
                "kind",
                "method",
                "dtype",
                "plan",
                "loss",
                "log-prob",
                "entropy",
                "grad, target",
                "grad, rest",
                "",
                title="worst error / allowed",
            ),
            Table(
                "kind",
                "name",
                "dtype",
                "device",
                "rows",
                "worst error / allowed",
                "",
                title="golden rows",
            ),
        )
        for case in losses:
            progress.update(task, description=f"{case.backend} {case.method}")
            _check_row(tables[0], case, vocab, failed)
            progress.advance(task)
        for row in golden:
            progress.update(task, description=f"{row.kind} {row.name}")
            _golden_row(tables[1], row, failed)
            progress.advance(task)
    for table in tables:
        if table.row_count:
            console.print(table)
    for line in failed:
        console.print(f"[red]failed[/] {line}", highlight=False)
    for name in NAMES:
        if losses and not any(case.backend == name for case in losses):
            console.print(f"[dim]{name}: not checked: {_absent(name)}[/]", highlight=False)
    total = len(losses) + len(golden)
    console.print(f"{total - len(failed)} passed, {len(failed)} failed")
    raise typer.Exit(1 if failed or not total else 0)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Measure the kernels on this machine against other libraries
    (``reweight-ops bench --help``).
    """
    importlib.import_module(f"{__package__}.bench.__main__").main(
        context.args, "reweight-ops bench"
    )


def _check_row(table: Table, case: Case, vocab: int, failed: list[str]) -> None:
    label = (
        case.backend,
        case.kind,
        " ".join(filter(None, (case.method, case.direction))),
        case.dtype,
    )
    try:
        c = run_case(case, vocab)
    except ReweightOpsError as error:
        failed.append(f"{' '.join(label)}: {error}")
        return
    errors = (
        c.loss,
        c.logps,
        c.entropies,
        max(c.grad_target, c.grad_target_rms),
        max(c.grad_rest, c.grad_rest_rms),
    )
    table.add_row(
        *label,
        c.plan,
        *(f"{e:.2f}" for e in errors),
        "[green]ok[/]" if c.passed else "[red]FAIL[/]",
    )
    if not c.passed:
        failed.append(f"{' '.join(label)}: {c.worst}")


def _golden_row(table: Table, case: GoldenCase, failed: list[str]) -> None:
    label = (case.kind, case.name, case.dtype, case.device)
    try:
        error = run_golden(case)
    except ReweightOpsError as problem:
        failed.append(f"{' '.join(label)}: {problem}")
        return
    table.add_row(
        *label,
        str(len(case.rows)),
        f"{error:.2f}",
        "[green]ok[/]" if error <= 1 else "[red]FAIL[/]",
    )
    if not error <= 1:
        failed.append(f"{' '.join(label)}: {error:.3g} times the allowed error")


def _absent(name: str) -> str:
    try:
        load(name)
    except BackendUnavailable as error:
        return str(error)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return (
        unsupported_reason(name, Request("token_stats", device, torch.float32)) or "not asked for"
    )


if __name__ == "__main__":  # ``python -m reweight_ops.cli`` is the command too
    main()
