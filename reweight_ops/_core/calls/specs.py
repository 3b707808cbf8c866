"""Resolution of a spec, given as it is or by its method's name."""

from __future__ import annotations

import inspect
from typing import Any

from ...errors import InvalidCall
from ..catalogue.registry import CATALOGUE, Entry
from ..catalogue.search import entry_of
from ..compiler import constant_result
from ..formula.base import Rule, TokenWeight
from ..ranges import ranged
from ..spec.pairs import PairSpec
from ..spec.parts import called
from ..spec.policy import PolicyLossSpec

#: The losses of the catalogue, as :class:`~reweight_ops._core.catalogue.registry.Entry`
#: by name.
METHODS = CATALOGUE["policy_loss"]


@ranged
def method(name: str, **options: Any) -> PolicyLossSpec:
    """Return the spec of the method of that name.

    ``method("dapo", epsilon_high=0.3)`` is ``methods.dapo(epsilon_high=0.3)``.
    """
    spec: PolicyLossSpec = entry_of(name, "policy_loss").function(**options)
    return spec


_PACKAGE = __name__.split(".")[0]

#: The specs of methods with all defaults, by name.
_named: dict[str, PolicyLossSpec] = {}


def _is_own(function: Any) -> bool:
    """Return whether a method belongs to the package.

    A method of the user's may be defined again, or a rule that it uses.
    """
    return function.__module__.startswith(f"{_PACKAGE}.")  # type: ignore[no-any-return]


def _need_defaults(op: str, entry: Entry, namespace: str) -> None:
    """Raise for a name whose method needs more arguments."""
    missing = [
        name for name, default in entry.defaults.items() if default is inspect.Parameter.empty
    ]
    if missing:
        call = f"rw.{namespace}.{entry.name}({', '.join(f'{name}=...' for name in missing)})"
        raise InvalidCall(
            f"{op}: {entry.name!r} has no default for {', '.join(missing)}: pass spec={call}."
        )


@constant_result
def _build(op: str, name: str) -> None:
    # The side effect is on purpose. torch.compile runs this while tracing, and then
    # reads the finished spec from the global above.
    entry = entry_of(name, "policy_loss")
    _need_defaults(op, entry, "methods")
    function = entry.function
    # A method of the user's may be defined again, or a rule that it uses.
    if name not in _named or not _is_own(function):
        _named[name] = function()


def named_spec(op: str, spec: Any) -> PolicyLossSpec:
    """A spec, by itself or by its method's name."""
    if isinstance(spec, str):
        if spec not in METHODS and spec in CATALOGUE["pair_loss"]:
            raise InvalidCall(
                f"{op}: {spec!r} is a loss of pairs: rw.preference_loss(..., spec={spec!r})."
            )
        _build(op, spec)
        return _named[spec]
    if not isinstance(spec, PolicyLossSpec):
        if isinstance(spec, PairSpec):
            raise InvalidCall(f"{op}: spec is a PairSpec, which rw.preference_loss takes.")
        part = ""
        if isinstance(spec, Rule):
            part = " Of a rule it is rw.PolicyLossSpec(surrogate=...)."
        elif isinstance(spec, TokenWeight):
            part = " A weight belongs to a loss: rw.methods.grpo().with_weight(...)."
        raise InvalidCall(
            f"{op}: spec is {spec!r}, expected a PolicyLossSpec or the name of a "
            f"method.{called(spec)}{part}"
        )
    return spec


def lasting_spec(spec: Any) -> PolicyLossSpec | None:
    """Return a spec that :func:`named_spec` gives each time.

    It is None for the name of a method that may be redefined, and for a value that is
    not a spec.
    """
    if isinstance(spec, str):
        known, entry = _named.get(spec), METHODS.get(spec)
        return known if entry is not None and _is_own(entry.function) else None
    return spec if isinstance(spec, PolicyLossSpec) else None


def named_pair_spec(op: str, spec: Any) -> PairSpec:
    """A spec, by itself or by its method's name."""
    if isinstance(spec, str):
        if spec not in CATALOGUE["pair_loss"] and spec in METHODS:
            raise InvalidCall(
                f"{op}: {spec!r} is a loss of tokens: rw.policy_loss(..., spec={spec!r})."
            )
        entry = entry_of(spec, "pair_loss")
        _need_defaults(op, entry, "preference")
        built: PairSpec = entry.function()
        return built
    if not isinstance(spec, PairSpec):
        if isinstance(spec, PolicyLossSpec):
            raise InvalidCall(f"{op}: spec is a PolicyLossSpec, which rw.policy_loss takes.")
        raise InvalidCall(
            f"{op}: spec is {spec!r}, expected a PairSpec or the name of one.{called(spec)} The "
            f"names are: {', '.join(sorted(CATALOGUE['pair_loss']))}."
        )
    return spec
