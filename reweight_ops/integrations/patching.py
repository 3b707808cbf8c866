"""Changes to another library, all made here.

What is replaced is checked first, calls are counted, and every change can be undone.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BackendUnavailable, InvalidCall


class Counts:
    """Counts of the calls that ran here and of those left to the trainer's own code.
    ``total`` counts them too.

    Attributes:
        fused_calls: calls that ran here, by op.
        delegated_calls: calls that were left to the trainer, by reason. Each reason is
            reported once by a warning.
    """

    def __init__(self, library: str, total: Counts | None = None) -> None:
        self.library = library
        self.total = total
        self.fused_calls: Counter[str] = Counter()
        self.delegated_calls: Counter[str] = Counter()
        self._warned: set[str] = set()

    def ran(self, op: str) -> None:
        self.fused_calls[op] += 1
        if self.total is not None:
            self.total.ran(op)

    def left(self, reason: str) -> None:
        self.delegated_calls[reason] += 1
        if self.total is not None:
            self.total.delegated_calls[reason] += 1
        self.warn_once(
            f"reweight_ops leaves this to {self.library}: {reason}. delegated_calls counts it."
        )

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=5)

    def clear(self) -> None:
        """Forget all counts, and report every reason again."""
        for known in (self.fused_calls, self.delegated_calls, self._warned):
            known.clear()


@dataclass(frozen=True)
class Replacement:
    """``owner.name``, an attribute of a module or class, becomes ``value``.

    ``parameters`` are the leading parameters that the original must have. Every further
    one must be optional. None means that it is not a function. ``read_from`` is the
    function with that signature, if the attribute itself is not a function (a class
    with an ``apply``).
    """

    owner: Any
    name: str
    value: Any
    parameters: tuple[str, ...] | None = None
    read_from: str = ""

    @property
    def place(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


def check_signature(library: str, owner: Any, name: str, expected: tuple[str, ...]) -> None:
    """Raise :class:`BackendUnavailable` unless ``owner.name`` takes ``expected`` and
    then only optional parameters.

    ``name`` may be dotted. ``library`` is a name and a version for the message.
    """
    function = owner
    for part in name.split("."):
        function = getattr(function, part, None)
    parameters = [] if function is None else list(inspect.signature(function).parameters.values())
    rest = parameters[len(expected) :]
    if tuple(p.name for p in parameters[: len(expected)]) != expected or any(
        _required(p) for p in rest
    ):
        found = (
            "does not exist"
            if function is None
            else f"has the signature {inspect.signature(function)}"
        )
        raise BackendUnavailable(
            f"{library}: {owner.__name__}.{name} {found}, expected ({', '.join(expected)}, "
            "optional ...). "
            "`reweight-ops trainers` lists the versions that this integration was tested with."
        )


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


def source_digest(function: Callable[..., Any]) -> str:
    """Return a fingerprint of a function's source."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


#: The attributes that are replaced now, by owner and name.
_ACTIVE: dict[tuple[int, str], Patch] = {}


class Patch:
    """Replaced attributes of another library. ``undo()``, or leaving the ``with``
    block, restores them.

    ``counts`` has everything that ran under the patch.

    Raises:
        InvalidCall: one of the attributes is patched already.
        BackendUnavailable: an attribute does not exist, or is not what the replacement
            stands in for.
    """

    def __init__(
        self, library: str, replacements: Sequence[Replacement], counts: Counts | None = None
    ) -> None:
        self.counts = counts or Counts(library)
        for each in replacements:
            if (id(each.owner), each.name) in _ACTIVE:
                raise InvalidCall(f"{each.place} is patched already; undo that patch first.")
            if not hasattr(each.owner, each.name):
                raise BackendUnavailable(f"{library}: {each.place} does not exist.")
            if each.parameters is not None:
                check_signature(
                    library,
                    each.owner,
                    f"{each.name}.{each.read_from}".rstrip("."),
                    each.parameters,
                )
        self._undo: list[tuple[Replacement, bool, Any]] = []
        for each in replacements:
            own = each.name in vars(each.owner)
            self._undo.append((each, own, vars(each.owner)[each.name] if own else None))
            setattr(each.owner, each.name, each.value)
            _ACTIVE[id(each.owner), each.name] = self

    @property
    def fused_calls(self) -> Counter[str]:
        return self.counts.fused_calls

    @property
    def delegated_calls(self) -> Counter[str]:
        return self.counts.delegated_calls

    def undo(self) -> None:
        """Restore the attributes. A second call does nothing. An attribute that was
        replaced again in the meantime stays as it is, with a warning.
        """
        while self._undo:
            each, own, original = self._undo.pop()
            del _ACTIVE[id(each.owner), each.name]
            if vars(each.owner).get(each.name) is not each.value:
                warnings.warn(
                    f"{each.place} was replaced again after this patch, and is left as it is.",
                    stacklevel=2,
                )
            elif own:
                setattr(each.owner, each.name, original)
            else:
                delattr(each.owner, each.name)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()
