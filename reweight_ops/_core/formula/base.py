"""What a token rule and a token weight are: frozen dataclasses whose one method is a formula, and their registry.

A formula is written against a small array namespace ``xp`` (:mod:`reweight_ops._core.formula.namespace` is the torch one), so the
same text is the reference (torch, differentiated by autograd) and, traced by :mod:`reweight_ops.codegen`, the C++, CUDA and
Triton code of every kernel. Rules see one token at a time: never batches, masks, temperature or reductions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, overload

from typing_extensions import dataclass_transform

from ...errors import InvalidCall
from ..ranges import Unread, ranged

#: What a formula may read of its token. ``old_logp`` is a leaf of its own: at sequence level it is not ``logp - log_ratio``.
TOKEN_FIELDS = ("logp", "old_logp", "log_ratio", "ref_logp", "sampling_logp", "adv", "entropy", "log_sum_p_sq")

#: The fields that only the current policy's logits can tell, through which a gradient flows to them; every other one is stored with the batch.
DIFFERENTIABLE_FIELDS = ("logp", "log_ratio", "entropy", "log_sum_p_sq")

RULES: dict[str, type[Rule]] = {}
WEIGHTS: dict[str, type[TokenWeight]] = {}


def _undecorated(self: Any, *args: Any, **keywords: Any) -> None:
    """In the place of the ``__init__`` that the decorator makes."""
    kind = "weight" if isinstance(self, TokenWeight) else "rule"
    raise InvalidCall(f"{type(self).__name__} is not registered yet: write @rw.{kind} above its class.")


class Formula(Unread):
    """What rules and weights share: a name, and numeric fields that are its hyper-parameters."""

    name: ClassVar[str]
    #: Fields that choose how a formula is used instead of being a number in it; never passed to a kernel.
    SETTINGS: ClassVar[tuple[str, ...]] = ()

    _parameter_names: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__init__" not in vars(cls):
            cls.__init__ = _undecorated  # type: ignore[method-assign]

    @classmethod
    def parameter_names(cls) -> tuple[str, ...]:
        """The hyper-parameters, in field order: the order in which kernels receive them."""
        return cls._parameter_names

    def parameters(self) -> dict[str, Any]:
        """Hyper-parameter name to value: a number, a 0-d tensor (a schedule), a per-row tensor, or a formula (a :class:`TokenWeight`)."""
        return {name: getattr(self, name) for name in self.parameter_names()}


class Rule(Formula):
    """A term of the loss. ``kind`` is ``"surrogate"``, ``"penalty"`` (reads no advantage), or ``"any"``: may stand as either."""

    kind: ClassVar[str] = "surrogate"

    def loss(self, xp: Any, t: Any) -> Any:
        """The token's loss; ``t`` has the attributes :data:`TOKEN_FIELDS`."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss(self, xp, t)")

    def clipped(self, xp: Any, t: Any) -> tuple[Any, Any] | None:
        """Which tokens are clipped (below, above), for the clip metrics only; None if the rule does not clip."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenWeight(Formula):
    """A multiplier of loss terms, one number a token.

    ``scope="surrogate"`` multiplies the surrogate only, ``"all"`` every term. ``detach=True``: no gradient through the weight.
    A weight multiplies the *term*, not the advantage, and a zero weight selects zero (never ``0 * inf``).
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("scope", "detach")

    scope: str = "surrogate"
    detach: bool = True

    def __post_init__(self) -> None:
        if self.scope not in ("surrogate", "all"):
            raise InvalidCall(f"{type(self).__name__}: scope is {self.scope!r}, expected 'surrogate' or 'all'.")

    def weight(self, xp: Any, t: Any, batch: Any) -> Any:
        """The weight of the token ``t``; ``batch`` gives means, quantiles, ... over this call's valid rows."""
        raise NotImplementedError(f"{type(self).__name__} defines no weight(self, xp, t, batch)")


_T = TypeVar("_T")


def _register(registry: dict[str, Any], cls: type, name: str | None, base: type) -> type:
    if not issubclass(cls, base):
        raise InvalidCall(f"{cls.__name__} must derive from {base.__name__}.")
    cls.name = name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()  # type: ignore[attr-defined]
    if not re.fullmatch(r"[a-z][a-z0-9_]*", cls.name):  # type: ignore[attr-defined]
        raise InvalidCall(f"{cls.name!r} is no name: it becomes a C++ and a Triton function, so use lower_snake_case.")  # type: ignore[attr-defined]
    if vars(cls).get("__init__") is _undecorated:
        del cls.__init__
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    known = registry.get(cls.name)  # type: ignore[attr-defined]
    cls._parameter_names = tuple(f.name for f in dataclasses.fields(cls) if f.name not in cls.SETTINGS)  # type: ignore[attr-defined, arg-type]
    # Running a notebook cell twice replaces the class; two modules with one name would silently change each other's results.
    if known is not None and known.__module__ != cls.__module__:
        raise InvalidCall(f"the name {cls.name!r} is taken by {known.__module__}.{known.__qualname__}; choose another.")  # type: ignore[attr-defined]
    cls = ranged(cls, plain=True)
    registry[cls.name] = cls  # type: ignore[attr-defined]
    return cls


@overload
def rule(name: type[_T]) -> type[_T]: ...
@overload
def rule(name: str | None = None, *, kind: str = "surrogate") -> Callable[[type[_T]], type[_T]]: ...
@dataclass_transform(kw_only_default=True, frozen_default=True)
def rule(name: str | type | None = None, *, kind: str = "surrogate") -> Any:
    """Class decorator: make a frozen keyword-only dataclass of a :class:`Rule` and register it by name."""
    if isinstance(name, type):
        return rule()(name)
    if kind not in ("surrogate", "penalty", "any"):
        raise InvalidCall(f"rule: kind is {kind!r}, expected 'surrogate', 'penalty' or 'any'.")

    def decorate(cls: type) -> type:
        cls.kind = kind  # type: ignore[attr-defined]
        return _register(RULES, cls, name, Rule)

    return decorate


@overload
def weight(name: type[_T]) -> type[_T]: ...
@overload
def weight(name: str | None = None) -> Callable[[type[_T]], type[_T]]: ...
@dataclass_transform(kw_only_default=True, frozen_default=True)
def weight(name: str | type | None = None) -> Any:
    """Class decorator: make a frozen keyword-only dataclass of a :class:`TokenWeight` and register it by name."""
    if isinstance(name, type):
        return weight()(name)
    return lambda cls: _register(WEIGHTS, cls, name, TokenWeight)
