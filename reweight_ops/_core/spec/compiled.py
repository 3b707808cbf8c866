"""The form of a spec for torch.compile.

A graph that builds a spec has its description in constants, and tensors for the numbers
that it takes as inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..rows.constants import as_tensor, varies


def set_default(spec: Any, field: str, make: Callable[[], Any]) -> None:
    """Set the object that None stands for in a field of a frozen record.

    torch.compile cannot follow a default that is itself an object.
    """
    if getattr(spec, field) is None:
        object.__setattr__(spec, field, make())


def describe(node: Any) -> Any:
    """Describe a part, a tuple of parts or a field's value in nested tuples of classes
    and constants.

    A formula is traced by running it on symbols. torch.compile cannot follow that. The
    result depends only on the kinds of the values.
    """
    if isinstance(node, Tensor):
        return "tensor", node.dim(), node.requires_grad
    if varies(node):
        return "tensor", 0, False
    if isinstance(node, tuple):
        return ("tuple", *[describe(x) for x in node])
    if node is None or isinstance(node, (bool, int, float, str)):
        return "constant", node
    if dataclasses.is_dataclass(node):
        return (
            "part",
            type(node),
            tuple([(f.name, describe(getattr(node, f.name))) for f in dataclasses.fields(node)]),
        )
    return "constant", None  # the caller's own function: nothing follows from it


def rebuild(description: Any) -> Any:
    """Rebuild what :func:`describe` described, with placeholders for its tensors."""
    kind, *rest = description
    if kind == "tensor":
        dimensions, requires_grad = rest
        return torch.empty(
            (0,) * dimensions, dtype=torch.float32, device="meta", requires_grad=requires_grad
        )
    if kind == "tuple":
        return tuple(rebuild(x) for x in rest)
    if kind == "constant":
        return rest[0]
    cls, fields = rest
    part = object.__new__(cls)
    for name, value in fields:
        object.__setattr__(part, name, rebuild(value))
    return part


def with_tensors(node: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a spec, or a part of one, with 0-d tensors for the numbers that a compiled
    graph takes as inputs.
    """
    if not _takes_inputs(node):
        return node
    if isinstance(node, tuple):
        return tuple([with_tensors(x, dtype, device) for x in node])
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        found = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
        return dataclasses.replace(
            node,
            **{
                name: with_tensors(x, dtype, device)
                for name, x in found.items()
                if _takes_inputs(x)
            },
        )
    return as_tensor(node, dtype, device)


def _takes_inputs(node: Any) -> bool:
    if not torch.compiler.is_compiling() or node is None or isinstance(node, (bool, int, str)):
        return False
    if isinstance(node, float):
        return varies(node)
    parts: tuple[Any, ...] = ()
    if isinstance(node, tuple):
        parts = node
    elif dataclasses.is_dataclass(node):
        parts = tuple([getattr(node, f.name) for f in dataclasses.fields(node)])
    found = False
    # a loop, because older versions of torch.compile cannot trace any() of this
    for part in parts:
        found = found or _takes_inputs(part)
    return found
