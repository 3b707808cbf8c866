"""The base classes of token rules and token weights, and their registries.

A rule or a weight is a frozen dataclass. Its one method is a formula over a small array
namespace ``xp``.
:mod:`reweight_ops._core.formula.namespace` is the torch one. The same text is therefore
the reference, which autograd differentiates, and the C++, CUDA and Triton code of every
kernel, which :mod:`reweight_ops.codegen` traces from it. A rule sees one token at a
time: it never sees a batch, a mask, a temperature or a reduction.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, overload

from typing_extensions import dataclass_transform

from ...errors import InvalidCall
from ..ranges import Unread, ranged

#: The fields of a token that a formula may read. ``old_logp`` is a leaf of its own,
#: because at sequence level it is not ``logp - log_ratio``.
TOKEN_FIELDS = (
    "logp",
    "old_logp",
    "log_ratio",
    "ref_logp",
    "sampling_logp",
    "adv",
    "entropy",
    "log_sum_p_sq",
)

#: The fields that depend on the current policy's logits, through which a gradient flows
#: to them. Every other field is stored with the batch.
DIFFERENTIABLE_FIELDS = ("logp", "log_ratio", "entropy", "log_sum_p_sq")

RULES: dict[str, type[Rule]] = {}
WEIGHTS: dict[str, type[TokenWeight]] = {}


def _undecorated(self: Any, *args: Any, **keywords: Any) -> None:
    """Stand in for the ``__init__`` that the decorator makes."""
    kind = "weight" if isinstance(self, TokenWeight) else "rule"
    raise InvalidCall(
        f"{type(self).__name__} is not registered yet: write @rw.{kind} above its class."
    )


class Formula(Unread):
    """The common base of rules and weights: a name, and numeric fields, the
    hyper-parameters.
    """

    name: ClassVar[str]
    #: Fields that choose how a formula is used. They are not numbers in it, and no
    #: kernel receives them.
    SETTINGS: ClassVar[tuple[str, ...]] = ()

    _parameter_names: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__init__" not in vars(cls):
            cls.__init__ = _undecorated  # type: ignore[method-assign]

    @classmethod
    def parameter_names(cls) -> tuple[str, ...]:
        """Return the names of the hyper-parameters in field order, the order in which
        kernels receive them.
        """
        return cls._parameter_names

    def parameters(self) -> dict[str, Any]:
        """Return a dict from the name of each hyper-parameter to its value.

        A value is a number, a 0-d tensor (a schedule), a per-row tensor, or a formula
        (a :class:`TokenWeight`).
        """
        return {name: getattr(self, name) for name in self.parameter_names()}


class Rule(Formula):
    """A term of the loss.

    ``kind`` is ``"surrogate"``, ``"penalty"`` (it reads no advantage) or ``"any"`` (it
    may stand as either).
    """

    kind: ClassVar[str] = "surrogate"

    def loss(self, xp: Any, t: Any) -> Any:
        """Return the token's loss. ``t`` has the attributes :data:`TOKEN_FIELDS`."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss(self, xp, t)")

    def clipped(self, xp: Any, t: Any) -> tuple[Any, Any] | None:
        """Return which tokens are clipped, as (below, above), or None if the rule does
        not clip.

        Only the clip metrics use it.
        """
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenWeight(Formula):
    """A factor of loss terms, one number per token.

    ``scope="surrogate"`` multiplies the surrogate only, and ``scope="all"`` multiplies
    every term. With ``detach=True`` no gradient flows through the weight. A weight
    multiplies the *term*, not the advantage. A zero weight selects zero
    (never ``0 * inf``).
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ("scope", "detach")

    scope: str = "surrogate"
    detach: bool = True

    def __post_init__(self) -> None:
        if self.scope not in ("surrogate", "all"):
            raise InvalidCall(
                f"{type(self).__name__}: scope is {self.scope!r}, expected 'surrogate' or 'all'."
            )

    def weight(self, xp: Any, t: Any, batch: Any) -> Any:
        """Return the weight of the token ``t``.

        ``batch`` gives means, quantiles and other statistics over the valid rows of the
        call.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no weight(self, xp, t, batch)")


_T = TypeVar("_T")


def _register(registry: dict[str, Any], cls: Any, name: str | None, base: type) -> type:
    if not issubclass(cls, base):
        raise InvalidCall(f"{cls.__name__} must derive from {base.__name__}.")
    cls.name = name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", cls.name):
        raise InvalidCall(
            f"{cls.name!r} is not a valid name: it becomes a C++ and a Triton function, so use "
            "lower_snake_case."
        )
    if vars(cls).get("__init__") is _undecorated:
        del cls.__init__
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    known = registry.get(cls.name)
    cls._parameter_names = tuple(
        f.name for f in dataclasses.fields(cls) if f.name not in cls.SETTINGS
    )
    # Running a notebook cell twice replaces the class. Two modules with the same name
    # would silently change each other's results.
    if known is not None and known.__module__ != cls.__module__:
        raise InvalidCall(
            f"the name {cls.name!r} is taken by {known.__module__}.{known.__qualname__}; choose "
            "another."
        )
    cls = ranged(cls, plain=True)
    registry[cls.name] = cls
    registered: type = cls
    return registered


@overload
def rule(name: type[_T]) -> type[_T]: ...
@overload
def rule(name: str | None = None, *, kind: str = "surrogate") -> Callable[[type[_T]], type[_T]]: ...
@dataclass_transform(kw_only_default=True, frozen_default=True)
def rule(name: str | type | None = None, *, kind: str = "surrogate") -> Any:
    """Make a frozen keyword-only dataclass of a :class:`Rule` and register it by name.

    This is a class decorator.

    Args:
        name: the name in messages and in the catalogue; default: the class's own in
            snake_case.
        kind: the terms that it may be: ``surrogate``, ``penalty`` or ``any``.

    Returns:
        The class, or a decorator if it is called with options.

    Raises:
        InvalidCall: another module's rule has the name, or the class is no rule.

    >>> import reweight_ops as rw
    >>> @rw.rule
    ... class Squared(rw.Rule):
    ...     def loss(self, xp, t):
    ...         return -t.adv * t.logp * t.logp
    >>> rw.PolicyLossSpec(surrogate=Squared(), name="squared").surrogate.name
    'squared'
    """
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
    """Make a frozen keyword-only dataclass of a :class:`TokenWeight` and register it by
    name.

    This is a class decorator.

    Args:
        name: the name in messages and in the catalogue; default: the class's own in
            snake_case.

    Returns:
        The class, or a decorator if it is called with a name.

    Raises:
        InvalidCall: another module's weight has the name, or the class is no weight.

    >>> import reweight_ops as rw
    >>> @rw.weight
    ... class Likely(rw.TokenWeight):
    ...     def weight(self, xp, t, batch):
    ...         return xp.exp(t.logp)
    >>> rw.methods.grpo().with_weight(Likely()).weights[0].name
    'likely'
    """
    if isinstance(name, type):
        return weight()(name)
    return lambda cls: _register(WEIGHTS, cls, name, TokenWeight)
