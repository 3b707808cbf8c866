"""What ``help`` says of an entry of the catalogue beside its formula and arguments:
what it returns and raises, its shapes, an example.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from .examples import EXAMPLES

#: What the functions of a kind return. Of the other kinds the signature says it.
_RETURNS = {
    "policy_loss": "A :class:`~reweight_ops.PolicyLossSpec`, the ``spec`` of "
    ":func:`~reweight_ops.policy_loss` and its relatives.",
    "pair_loss": "A :class:`~reweight_ops.PairSpec`, the ``spec`` of "
    ":func:`~reweight_ops.preference_loss` and its relatives.",
}
_OF_CLASSES = {
    "token_weight": "A :class:`~reweight_ops.TokenWeight`, for ``spec.with_weight(...)``, or in "
    "the place of a hyper-parameter.",
    "objective": "An object without state of its own: ``init`` returns a state, ``update(state, "
    "...)`` the next one and the result.",
    "schedule": "An object without state of its own: ``init`` returns a state, ``update(state, "
    "...)`` the next one and the result.",
}
_SHAPES = {
    "policy_loss": "A hyper-parameter is a number, a 0-d tensor, or one a row: R, the shape of "
    "the ids. The loss is 0-d, its outputs per token are R.",
    "pair_loss": "A hyper-parameter is a number or a 0-d tensor. Rows make S sequences, and "
    "these the pairs; the loss is 0-d.",
    "token_weight": "One weight a token: R.",
}
#: What a part is for, and the shape of what it computes, by the name of its base class.
_OF_PARTS = {
    "TokenWeight": (_OF_CLASSES["token_weight"], _SHAPES["token_weight"]),
    "Rule": (
        "A term of a loss: a ``PolicyLossSpec``'s ``surrogate``, or a ``Penalty``'s ``rule``.",
        "One value a token: R.",
    ),
    "Ratio": ("A ``PolicyLossSpec``'s ``ratio``.", "One log-ratio a token: R."),
    "Reduction": (
        "A ``PolicyLossSpec``'s or a ``Penalty``'s ``reduction``.",
        "The terms of the rows, R, become one 0-d loss.",
    ),
    "PairLoss": ("A ``PairTerm``'s ``loss``.", "One value a pair: ``[P]``."),
    "PairWeight": ("One of a ``PairSpec``'s ``weights``.", "One weight a pair: ``[P]``."),
    "Score": (
        "A ``PairSpec``'s ``score``.",
        "Log-probs of the tokens, ``[N]``, become one score a sequence, ``[S]``.",
    ),
    "Module": (
        "A module. Its call returns what the function of the same task returns.",
        "hidden: ``R + (D,)``; ids: R.",
    ),
}
#: The shapes of what has no such base class.
PART_SHAPES = {
    "DistillationLossOutput": "loss: 0-d; the others: R",
    "Explanation": "No tensors",
    "HiddenLogits": "Logits of the shape ``R + (V,)``",
    "Lora": "a: ``[r, D]``; b: ``[V, r]``",
    "Metrics": "0-d values",
    "PairSpec": "P pairs give a 0-d loss",
    "Penalty": "R gives a 0-d term",
    "PolicyLossOutput": "loss: 0-d; the others: R",
    "PolicyLossSpec": "R gives a 0-d loss",
    "PreferenceLossOutput": "loss: 0-d; per pair: ``[P]``; ``per_token_logps``: R",
    "Recipe": "No tensors",
    "SamplingMask": "token_ids: the kept ids of all rows; offsets: ``[N + 1]``",
    "Teacher": "logits: ``R + (V,)``",
    "TokenStats": "R; ``selected_logps`` and ``topk_*``: ``R + (K,)``",
    "TopKLogps": "``R + (K,)``",
    "advantages.Gae": "``[B, T]``",
    "advantages.SpoSegments": "``[B, T]``",
    "advantages.discounted_returns": "Result: that of ``rewards``",
    "advantages.spo_segments": "Results: that of ``old_per_token_logps``",
    "advantages.whiten": "Result: that of ``x``",
    "explain": "Those of the op's arguments; no tensor is read",
    "find": "No tensors",
    "method": "No tensors",
    "methods.published": "No tensors",
    "methods.trl": _SHAPES["policy_loss"].rstrip("."),
    "methods.verl": _SHAPES["policy_loss"].rstrip("."),
    "objectives.LagrangeState": "``[K]``",
    "objectives.RecapState": "history: ``[2·window, K]``; seen: 0-d",
    "objectives.gradient_influences": "``[K, P]`` gives ``[K]``",
    "preference.PairTerm": "One value a pair: ``[P]``",
    "preference.Pairs": "``[P]``",
    "preference.Sequences": "Rows are ``[N]``, their sums ``[S]``",
    "preference.Side": "``[P]``",
    "preference.from_first_difference": "Result: R",
    "preference.kto_baseline": "Result: 0-d",
    "preference.mapo_masks": "Results: that of ``completion_mask``",
    "preference.rank_consistency": "``[N, G]`` gives ``[N]``",
    "preference.trl": _SHAPES["pair_loss"].rstrip("."),
    "recipe": "No tensors",
    "rewards.weighted_sum": "``[B, K]`` gives ``[B]``",
    "rule": _OF_PARTS["Rule"][1].rstrip("."),
    "schedules.AdaptiveEntropyState": "0-d",
    "schedules.BetaDpoState": "0-d",
    "schedules.D3sBudget": "Numbers, or 0-d",
    "schedules.ReliftState": "A number",
    "schedules.all_failed": "``[B]`` gives ``[num_groups]``",
    "schedules.lopti_updates": "No tensors",
    "weight": _SHAPES["token_weight"].rstrip("."),
    "weights.BatchStatistics": "``[N]`` gives 0-d, or ``[N]``",
    "weights.StareState": "0-d",
    "weights.confidence_mask": "Result: that of ``max_logps``",
    "weights.stare_state": "0-d",
    "weights.stare_update": "0-d",
}
#: A line of an example, under a heading or not.
_PROMPT = re.compile(r"(?m)^[ \t]*>>> +\S")
_RAISES = "A hyper-parameter outside its range, or tensors whose shapes do not fit each other."


def with_sections(function: Callable[..., Any], doc: str, kind: str, name: str) -> str:
    """The docstring and its further sections: those that it does not have itself."""
    shape, example = EXAMPLES.get(f"{kind}/{name}", ("", ""))
    if kind == "part":
        shape = PART_SHAPES.get(name, "")
    returned, part_shape = _part(function) if kind == "part" else ("", "")
    sections = {
        "Returns:": returned or _returned(function, kind),
        "Shape:": _SHAPES.get(kind)
        or part_shape
        or (
            f"{'' if kind == 'part' else 'Result: '}{shape}."
            if shape
            else "No tensor is returned, or one of the shape above."
        ),
        "Raises:": f"InvalidCall: {_RAISES}\nTypeError: A keyword that does not exist.",
        "Example:": example,
    }
    lines, has_example = doc.splitlines(), _PROMPT.search(doc) is not None
    for heading, text in sections.items():
        there = has_example if heading == "Example:" else heading in lines
        if text and not there and not (heading == "Raises:" and _is_record(function)):
            doc = "\n".join([doc, "", heading, *(f"    {line}" for line in text.splitlines())])
    return doc


def _is_record(value: Callable[..., Any]) -> bool:
    """Whether a class only holds what it is given, without a check."""
    return (
        inspect.isclass(value)
        and not getattr(value, "__ranges__", None)
        and not hasattr(value, "__post_init__")
    )


def _part(value: Callable[..., Any]) -> tuple[str, str]:
    """What a class of parts is for, and the shape of what it computes; nothing for
    other classes.
    """
    names = [base.__name__ for base in value.__mro__] if inspect.isclass(value) else []
    return next((_OF_PARTS[name] for name in names if name in _OF_PARTS), ("", ""))


def _returned(function: Callable[..., Any], kind: str) -> str:
    if inspect.isclass(function):
        return _OF_CLASSES.get(kind, "An object with the arguments as fields.")
    annotation = inspect.signature(function).return_annotation
    kinds = "" if annotation is inspect.Signature.empty else str(annotation).strip("'")
    return _RETURNS.get(kind) or (f"``{kinds}``, as the first line says." if kinds else "")
