"""``explain`` tells which plan and backend a call takes, and why not the others. It
runs nothing and accepts meta tensors.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from typing_extensions import ParamSpec

from ...errors import InvalidCall, UnsupportedRequest
from ..calls.dtensors import has_dtensors, localized
from ..calls.keywords import misnamed
from ..catalogue.signatures import written_out
from ..engine.plan import choose_plan, unsupported_reasons
from ..engine.run import Again, Call, run
from ..names import renamed_attribute
from ..ranges import ranged
from ..rows.ranks import announced
from .documented import documented

P = ParamSpec("P")
T = TypeVar("T")

#: The keywords that name processes which make a call together.
GROUPS = ("process_group", "sequence_group")

_NO_SEQUENCES = (
    "sequence_group is an argument of policy losses. An op without sequences needs none. For "
    "pairs, gather the log-probs of whole sequences for preference_loss_from_logps."
)

#: Maps a public op to the function that resolves its arguments to a call.
PREPARED: dict[Any, Callable[..., Call[Any] | Again[Any]]] = {}


def by_ranks(function: Callable[P, T]) -> Callable[P, T]:
    """Let several ranks make a call of the function together.

    DTensors become local tensors with their group. If one rank raises before the ranks
    meet, the others are told.
    """

    @functools.wraps(function)
    def op(*args: P.args, **keywords: P.kwargs) -> T:
        if not torch.compiler.is_compiling() and has_dtensors((*args, *keywords.values())):
            return op(**_local(function, args, keywords))  # type: ignore[call-arg]
        return _announced(function.__name__, functools.partial(function, *args, **keywords))

    return op


def _announced(name: str, call: functools.partial[T]) -> T:
    """Run a call. If it names groups and raises before the ranks of one have met, the
    other ranks are told.
    """
    args, keywords = call.args, call.keywords
    groups = {group: keywords[group] for group in GROUPS if keywords.get(group) is not None}
    if not groups or torch.compiler.is_compiling():
        return call()
    tensors = (x for x in (*args, *keywords.values()) if isinstance(x, torch.Tensor))
    device = next((x.device for x in tensors), torch.device("cpu"))
    with announced(name, groups, device):
        return call()


def _local(function: Callable[..., Any], args: Any, keywords: Any) -> dict[str, Any]:
    """Return a call's arguments with local tensors in the place of DTensors."""
    bound = inspect.signature(inspect.unwrap(function)).bind(*args, **keywords).arguments
    return localized(function.__name__, {**bound.pop("keywords", {}), **bound})


def public_op(prepare: Callable[P, Call[T] | Again[T]]) -> Callable[P, T]:
    """Return the op that runs the call which ``prepare`` resolves. :func:`explain`
    takes only the call.
    """

    prepare = ranged(prepare, words=False)

    @functools.wraps(prepare)
    def op(*args: P.args, **keywords: P.kwargs) -> T:
        if not torch.compiler.is_compiling() and has_dtensors((*args, *keywords.values())):
            return op(**_local(prepare, args, keywords))  # type: ignore[call-arg]
        alone = keywords.get("process_group") is None and keywords.get("sequence_group") is None
        if alone or torch.compiler.is_compiling():
            return run(resolve(*args, **keywords))
        return _announced(prepare.__name__, functools.partial(call, *args, **keywords))

    def call(*args: Any, **keywords: Any) -> T:
        return run(resolve(*args, **keywords))

    def resolve(*args: Any, **keywords: Any) -> Call[T] | Again[T]:
        try:
            return prepare(*args, **keywords)
        except TypeError as error:
            if keywords.get("sequence_group") is not None and "sequence_group" not in names:
                raise UnsupportedRequest(f"{prepare.__name__}: {_NO_SEQUENCES}") from None
            raise misnamed(prepare.__name__, signature, len(args), keywords) or error from None

    signature = inspect.signature(prepare)
    result = re.sub(r"^Call\[(.*?)\](?: \| Again\[.*\])?$", r"\1", str(signature.return_annotation))
    whole = written_out(prepare).replace(return_annotation=result)
    names = whole.parameters
    op.__signature__ = whole  # type: ignore[attr-defined]
    op.__doc__ = documented(prepare.__doc__, whole)
    PREPARED[op] = lambda *args, **keywords: (
        resolve(**_local(prepare, args, keywords))
        if has_dtensors((*args, *keywords.values()))
        else resolve(*args, **keywords)
    )
    return op


@dataclass(frozen=True)
class Explanation:
    """The plan and backend that a call would take, and why not the others.

    In one pass, and for two logits tensors, it also has the kernel, if the backend has
    several. ``top_k`` says how the likeliest ids are found, if the call asks for them:
    in the read of the statistics, or in one more.
    """

    plan: str
    backend: str
    one_pass_unsupported_reason: str | None
    backends: dict[str, str | None]
    kernel: str | None = None
    top_k: str | None = None

    def __getattr__(self, name: str) -> Any:
        return renamed_attribute(self, name)

    def __str__(self) -> str:
        lines = [
            f"plan: {self.plan}"
            + (
                f" (not one_pass: {self.one_pass_unsupported_reason})"
                if self.one_pass_unsupported_reason
                else ""
            ),
            f"backend: {self.backend}" + (f", kernel: {self.kernel}" if self.kernel else ""),
        ]
        if self.top_k:
            lines.append(f"top_k: {self.top_k}")
        return "\n".join(
            [
                *lines,
                *(
                    f"  {name}: {'available' if reason is None else reason}"
                    for name, reason in self.backends.items()
                ),
            ]
        )


def explain(
    op: Callable[..., Any], *args: Any, device: torch.device | str | None = None, **keywords: Any
) -> Explanation:
    """Explain what ``op(*args, **keywords)`` would do.

    Nothing runs, and no tensor is read.

    Args:
        op: a public op on logits, hidden states or log-probs.
        args: its own arguments; meta tensors are enough.
        device: the device to assume instead of the tensors'. For meta tensors the
            default is a GPU if there is one, else the CPU.
        keywords: its own keywords.

    Returns:
        An :class:`Explanation`: the plan, the backend, the kernel, and why not the
        others.

    Raises:
        InvalidCall: the first argument is not such an op; or whatever the call itself
            would raise.

    Example:
        >>> import torch, reweight_ops as rw
        >>> logits = torch.empty(2, 3, 8, device="meta", requires_grad=True)
        >>> ids = torch.empty(2, 3, dtype=torch.long, device="meta")
        >>> rw.explain(rw.policy_loss, logits, ids, 1.0, spec="gspo", device="cpu").plan
        'two_pass'
    """
    prepare = PREPARED.get(op)
    if prepare is None:
        names = ", ".join(sorted(f.__name__ for f in PREPARED))
        raise InvalidCall(
            f"explain: its first argument is {op!r}, expected one of {names}. Then come that "
            "function's own arguments."
        )
    call = prepare(*args, **keywords)
    if isinstance(call, Again):
        call = call.resolve()
    source, objective = call.source, call.objective
    info = source.info._replace(device=_device(source.info.device, device))
    choice = choose_plan(source, objective, call.plan, info)
    kernel = source.kernel(choice.backend, info.device, choice.plan)
    reasons = unsupported_reasons(info, choice, objective.program)
    return Explanation(
        choice.plan,
        choice.backend,
        choice.one_pass_unsupported_reason,
        reasons,
        kernel,
        source.search(choice.backend),
    )


def _device(own: torch.device, asked: torch.device | str | None) -> torch.device:
    if asked is not None:
        return torch.device(asked)
    if own.type == "meta":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return own
