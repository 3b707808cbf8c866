"""``docs/methods.md``: the catalogue as a table, from the registry."""

from __future__ import annotations

from ..formula.trace import trace_weight
from .entry_text import anchor, entry_text
from .left_out import LEFT_OUT
from .registry import CATALOGUE, CERTAINTIES, KINDS, Entry
from .tiers import TIERS

_HEAD = """\
# The catalogue

Generated from the registry by `python -m reweight_ops.codegen`; do not edit. `reweight-ops show
NAME` prints an entry's formula, its defaults and its differences from the paper.

Tiers:

{tiers}

Certainties:

{certainties}

An entry that is *derived* is not presented as its authors'. A *composite* is PyTorch code with
bounded memory. Entries without a plan work on rewards, log-probs or masks and never see logits.
PyTorch computes them on the device of their tensors.

In formulas, `p` is the probability of the token that was chosen, `logp` its log, `H` the entropy,
`r` the importance ratio, `A` the advantage (of advantages and rewards, `r` is the reward), `sg`
stops the gradient, `σ` is the sigmoid, `1[...]` is 1 where the condition holds, `y_w` the chosen
and `y_l` the rejected answer, `L` a length. Names in upright letters are arguments.
"""


def plan(entry: Entry) -> str:
    """Return how an entry reaches the logits."""
    if entry.plan is not None:
        return entry.plan
    if entry.kind == "policy_loss":
        return "one pass" if entry.build().one_pass_unsupported_reason is None else "two passes"
    if entry.kind == "token_weight":
        weight = entry.build()
        return (
            "two passes"
            if trace_weight(type(weight)).uses_batch or not weight.detach
            else "one pass"
        )
    return ""


def level(entry: Entry) -> str:
    """Return the level at which an entry acts: the given one, or that of a loss's
    ratio.
    """
    if entry.level is None and entry.kind == "policy_loss":
        return str(entry.build().ratio.level)
    return entry.level or ""


def by_tier(kind: str) -> list[Entry]:
    """Return the entries of a kind, core first, each tier by name."""
    order = list(TIERS)
    return sorted(CATALOGUE[kind].values(), key=lambda e: (order.index(e.tier), e.name))


def _line(entry: Entry) -> str:
    link = (
        f"[{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv})"
        if entry.arxiv != "unknown"
        else "unknown"
    )
    return (
        f"| [`{entry.name}`](#{anchor(entry)}) | {entry.full_name} | {link} | {level(entry)} "
        f"| {plan(entry)} | {entry.tier} | {entry.certainty} |"
    )


def _listed(meanings: dict[str, str]) -> str:
    return "\n".join(f"- *{name}*: {meaning}" for name, meaning in meanings.items())


def markdown() -> str:
    """The whole page."""
    parts = [_HEAD.format(tiers=_listed(TIERS), certainties=_listed(CERTAINTIES))]
    for kind, (module, meaning) in KINDS.items():
        if not CATALOGUE[kind]:
            continue
        rows = [_line(entry) for entry in by_tier(kind)]
        head = (
            "| name | full name | arXiv | level | plan | tier | certainty |\n| --- | --- | --- | "
            "--- | --- | --- | --- |"
        )
        parts.append(f"## `{module}`: {meaning}\n\n{head}\n" + "\n".join(rows) + "\n")
        parts += [entry_text(CATALOGUE[kind][name]) + "\n" for name in sorted(CATALOGUE[kind])]
    parts.append(
        "## Left out, and why\n\n"
        + "\n".join(f"- **{title}**: {reason}" for title, reason in LEFT_OUT.items())
        + "\n"
    )
    return "\n".join(parts)
