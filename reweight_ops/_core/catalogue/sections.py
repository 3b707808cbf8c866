"""What ``help`` says of an entry of the catalogue beside its formula and arguments:
what it returns and raises, its shapes, an example.
"""

from __future__ import annotations

import inspect
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
_RAISES = "A hyper-parameter outside its range, or tensors whose shapes do not fit each other."


def with_sections(function: Callable[..., Any], doc: str, kind: str, name: str) -> str:
    """The docstring and its further sections: those that it does not have itself."""
    shape, example = EXAMPLES.get(f"{kind}/{name}", ("", ""))
    sections = {
        "Returns:": _returned(function, kind),
        "Shape:": _SHAPES.get(kind)
        or (f"Result: {shape}." if shape else "No tensor is returned, or one of the shape above."),
        "Raises:": f"InvalidCall: {_RAISES}\nTypeError: A keyword that does not exist.",
        "Example:": example,
    }
    for heading, text in sections.items():
        lines = doc.splitlines()
        there = (
            any(line.strip().startswith(">>> ") for line in lines)
            if heading == "Example:"
            else heading in lines
        )
        if text and not there:
            doc = "\n".join([doc, "", heading, *(f"    {line}" for line in text.splitlines())])
    return doc


def _returned(function: Callable[..., Any], kind: str) -> str:
    if inspect.isclass(function):
        return _OF_CLASSES.get(kind, "An object with the arguments as fields.")
    annotation = inspect.signature(function).return_annotation
    kinds = "" if annotation is inspect.Signature.empty else str(annotation).strip("'")
    return _RETURNS.get(kind) or (f"``{kinds}``, as the first line says." if kinds else "")
