"""What torch.compile must know of a function or a number, without its import.

``torch.compiler.assume_constant_result`` and ``torch.compiler.disable`` import
``torch._dynamo``, and symbolic numbers import sympy. Both take longer than the rest of
this package's import, and a process that compiles nothing needs neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._C._dynamo import eval_frame

if TYPE_CHECKING:  # whoever compiles has imported it
    import torch.fx.experimental.symbolic_shapes

T = TypeVar("T", bound=Callable[..., Any])


def constant_result(function: T) -> T:
    """Let torch.compile run the function while it compiles, and follow none of it.

    What it returns is a constant of the graph. This is a decorator.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def never_compiled(function: T) -> T:
    """Let torch.compile leave the function as it is, and all that it calls.

    A graph has the op whose body it is.
    """
    try:
        skip = eval_frame._FrameExecStrategy(
            eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP
        )
        eval_frame.set_code_exec_strategy(function.__code__, skip)
    except AttributeError:  # these names are private, and a later PyTorch may have others
        disabled: T = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled
    return function


def has_static_value(number: Any) -> bool:
    """Return whether torch.compile knows the number while it compiles. Nobody else may
    ask.
    """
    return torch.fx.experimental.symbolic_shapes.has_static_value(number)


def guard_scalar(number: Any) -> Any:
    """Return the number that torch.compile took as an input, and guard on it."""
    return torch.fx.experimental.symbolic_shapes.guard_scalar(number)
