"""An advantage estimator under the signature of verl's registry. This module does not
import verl.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._core.catalogue.registry import Entry
from ...errors import InvalidCall, UnsupportedRequest

#: What verl passes to an estimator, by the parameters of ours.
_GIVEN = frozenset({"rewards", "lengths", "completion_mask"})
#: Estimators that take one reward per token, and the discount of verl's configuration.
_OF_TOKENS = ("reinforce_plus_plus",)
_REASONS = {
    "gdpo": "it reads rewards one by one, and verl hands over their sum: verl's own is "
    "adv_estimator=gdpo",
    "remax": "it needs greedy_rewards, which verl samples for its own adv_estimator=remax only",
}
#: Settings of verl's algorithm configuration that its estimators read, with their
#: defaults.
_SETTINGS: dict[str, Any] = {"gamma": 1.0, "lam": 1.0, "norm_adv_by_std_in_grpo": True}


def _function(estimator: Callable[..., Any]) -> Callable[..., Any]:
    return estimator.func if isinstance(estimator, functools.partial) else estimator


def _open(estimator: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that a caller still gives, without those that a ``partial`` has
    given.
    """
    bound = estimator.keywords if isinstance(estimator, functools.partial) else {}
    return {n: p for n, p in inspect.signature(estimator).parameters.items() if n not in bound}


def unsupported_reason(estimator: Callable[..., Any]) -> str | None:
    """Why verl cannot call an estimator, None if it can."""
    reason = _REASONS.get(_function(estimator).__name__)
    if reason is not None:
        return reason
    needed = [
        n
        for n, p in _open(estimator).items()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    missing = [n for n in needed if n not in _GIVEN]
    if missing:
        return f"it needs {', '.join(missing)}, which verl does not pass to an estimator"
    return None


def entry_unsupported_reason(entry: Entry) -> str | None:
    """Why an estimator of the catalogue has no name in verl, None if it has one."""
    return unsupported_reason(entry.function)


def _check_settings(name: str, estimator: Callable[..., Any], config: Any) -> dict[str, Any]:
    """The keywords that verl's ``algorithm`` configuration sets; what would have no
    effect is an error.
    """
    open_ = _open(estimator)
    given, found = {n: config.get(n, default) for n, default in _SETTINGS.items()}, {}
    if _function(estimator).__name__ in _OF_TOKENS and "gamma" in open_:
        found["gamma"] = given.pop("gamma")
    if (
        _function(estimator).__name__ == "grpo"
        and "scale_rewards" in open_
        and not given.pop("norm_adv_by_std_in_grpo")
    ):
        found["scale_rewards"] = "none"
    ignored = [f"algorithm.{n}={v!r}" for n, v in given.items() if v != _SETTINGS[n]]
    if ignored:
        raise InvalidCall(
            f"{name} replaces verl's estimator, so {', '.join(ignored)} would have no effect: "
            "register one with these settings."
        )
    return found


def estimator_fn(name: str, estimator: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """An estimator of :mod:`reweight_ops.advantages`, or a ``functools.partial`` of
    one, as verl's registry calls it.

    A completion's reward is the sum of its tokens' (with verl's KL where that is in the
    rewards). Groups are verl's ``uid``. Both results are the advantages, ``[B, T]``, 0
    where ``response_mask`` is.

    Raises:
        UnsupportedRequest: verl does not hand over what the estimator needs; the reason
            is named.
    """
    reason = unsupported_reason(estimator)
    if reason is not None:
        raise UnsupportedRequest(f"verl cannot call {name}: {reason}.")
    open_ = _open(estimator)
    of_groups = "group_ids" in open_ or any(p.kind is p.VAR_KEYWORD for p in open_.values())

    def compute(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any = None,
        config: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        keep = response_mask.bool()
        of_tokens = _function(estimator).__name__ in _OF_TOKENS
        data: dict[str, Any] = {
            "rewards": token_level_rewards if of_tokens else token_level_rewards.sum(-1),
            "lengths": keep.sum(-1),
            "completion_mask": keep,
        }
        given = {n: data[n] for n in open_ if n in data} | (
            {} if config is None else _check_settings(name, estimator, config)
        )
        if of_groups:
            if index is None:
                raise InvalidCall(
                    f"{name} compares completions of a prompt, and the batch has no uid."
                )
            prompts: dict[Any, int] = {}
            place = [prompts.setdefault(uid, len(prompts)) for uid in index.tolist()]
            given |= {
                "group_ids": torch.tensor(place, device=response_mask.device),
                "num_groups": len(prompts),
            }
        advantages = estimator(**given)
        whole = advantages[:, None] if advantages.dim() == 1 else advantages
        spread = torch.where(keep, whole, 0)
        return spread, spread

    compute.estimator = estimator  # type: ignore[attr-defined]  # by which a second registration knows it
    return compute
