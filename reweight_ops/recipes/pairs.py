"""Recipes of preferences: pairs, triples, and single responses that were
liked or not."""

from __future__ import annotations

from .._core.catalogue.recipes import Recipe, Setting
from .sources import EXAMPLE, PAPER, published

_LOSS = (
    "rw.preference_loss(policy(batch), completion_ids, spec={}, "
    "completion_mask=completion_mask{}).loss"
)
_REFERENCE = ", ref_per_token_logps=ref_per_token_logps"
_HALVES = ("A batch has all chosen completions, then all rejected ones.",)


def _pairs(
    name: str, arguments: str = "", reference: bool = True, settings: tuple[Setting, ...] = ()
) -> Recipe:
    """The recipe of a preference loss of pairs, by the name of its entry."""
    return Recipe(
        name=name,
        entry=f"rw.preference.{name}",
        spec=f"rw.preference.{name}({arguments})",
        loss=_LOSS.format("spec", _REFERENCE if reference else ""),
        settings=settings,
        rollout=_HALVES,
    )


ALL = (
    _pairs("dpo", settings=published(f"{PAPER}, appendix B", beta=0.1)),
    _pairs("f_dpo"),
    _pairs("ld_dpo", "ld_alpha=0.5", settings=published(EXAMPLE, ld_alpha=0.5)),
    _pairs("aot"),
    _pairs("irpo"),
    _pairs("mpo"),
    _pairs("alpha_po", "alpha=0.25", reference=False, settings=published(EXAMPLE, alpha=0.25)),
    Recipe(
        name="tpo",
        entry="rw.preference.tpo",
        spec="rw.preference.tpo()",
        loss=_LOSS.format("spec", ""),
        rollout=(
            "A batch has all chosen completions, then all rejected ones, then all gold ones.",
        ),
    ),
    Recipe(
        name="beta_dpo",
        entry="rw.schedules.BetaDpo",
        setup={"control": "rw.schedules.BetaDpo(beta=0.1, a=0.6)", "state": "control.init()"},
        schedule="control.update(state, -((old_per_token_logps - ref_per_token_logps) * "
        "completion_mask).sum(-1).view(2, -1).diff(dim=0)[0])",
        loss=_LOSS.format("rw.preference.dpo(beta=schedule[1])", _REFERENCE),
        after={"state": "schedule[0]"},
        settings=published("the authors' command", a=0.6),
        rollout=(
            *_HALVES,
            "`old_per_token_logps` are the policy's before the step, on the same pairs.",
        ),
    ),
    Recipe(
        name="kto",
        entry="rw.methods.kto",
        advantages="2 * correct - 1",
        spec="rw.methods.kto()",
        rollout=(
            "`correct` says whether a response was liked.",
            "`kl=rw.preference.kto_baseline(...)` of each prompt with another prompt's response "
            "is the paper's baseline.",
        ),
    ),
)
