"""Where the numbers of recipes come from, and the lines that several recipes share."""

from __future__ import annotations

from .._core.catalogue.recipes import Setting

SCRIPT = "the authors' script"
PAPER = "the paper"
VERL = "verl's default"
EXAMPLE = "an example: the paper states none"

#: GRPO's advantages, as trainers compute them.
GRPO = "rw.advantages.grpo(rewards, group_size=group_size)"


def published(source: str, **values: object) -> tuple[Setting, ...]:
    """Hyper-parameters that have one source."""
    return tuple(Setting(name, str(value), source) for name, value in values.items())
