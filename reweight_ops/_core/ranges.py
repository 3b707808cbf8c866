"""The numbers that a hyper-parameter may be, written once, beside its default:
``epsilon_low: NonNegative[Number] = 0.2``.

:func:`ranged` reads these annotations of a function or a dataclass, checks the given
values, and adds the ranges to the docstring. It checks a Python number. It does not
read a tensor, or a formula that stands for a number (:class:`Unread`). Booleans,
strings and NaN are not numbers, and tensors of booleans or of complex numbers are not
either. What is annotated as ``bool``, ``str`` or a formula is checked by its type. In a
compiled function a value is checked while the function is compiled. A number that
torch.compile turned into an input has a guard: a value out of range compiles again, and
that compilation raises.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import types
from collections.abc import Iterable, Mapping
from numbers import Real as AnyReal
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar, Union, get_args, get_origin

import torch
from torch import Tensor

from ..errors import InvalidCall
from .compiler import constant_result, guard_scalar, has_static_value
from .names import unexpected

T = TypeVar("T")


class Unread:
    """The base of objects other than tensors that stand for a number."""

    # a formula's arithmetic is its subclass's; a type checker sees that there is one
    if TYPE_CHECKING:

        def _arithmetic(self, other: Any) -> Any: ...

        __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = (
            __rtruediv__
        ) = __pow__ = _arithmetic
        __lt__ = __le__ = __gt__ = __ge__ = _arithmetic

        def __neg__(self) -> Any: ...


def _has_numbers(tensor: Tensor) -> bool:
    return tensor.dtype is not torch.bool and not tensor.is_complex()


class Interval:
    """An interval in the usual notation, ``"[0, inf)"``. A square bracket at infinity
    includes it.

    With ``whole`` only integers are allowed. With ``fixed`` a tensor is not allowed in
    their place. The same holds for whole numbers, unless their annotated type allows
    one. ``words`` are allowed too. ``entries`` is the interval of the entries of a
    tuple. Without ``text`` only a tuple is allowed, or a word.
    """

    def __init__(
        self,
        text: str = "",
        *,
        whole: bool = False,
        fixed: bool = False,
        words: tuple[str, ...] = (),
        entries: str = "",
    ) -> None:
        self.text, self.whole, self.fixed, self.words = text, whole, fixed or whole, words
        self.entries = Interval(entries, whole=whole) if entries else None
        if text:
            low, high = (float(bound) for bound in text[1:-1].split(","))
            # The interval is stored as closed. An open end is the next number.
            self.low = math.nextafter(low, math.inf) if text[0] == "(" else low
            self.high = math.nextafter(high, -math.inf) if text[-1] == ")" else high

    def __str__(self) -> str:
        kinds = [f"a {'whole ' if self.whole else ''}number in {self.text}"] if self.text else []
        kinds += [repr(word) for word in self.words]
        if self.entries is not None:
            whole = "whole " if self.whole else ""
            kinds.append(f"a tuple of {whole}numbers in {self.entries.text}")
        return " or ".join(kinds)

    def has(self, value: Any) -> bool:
        """Return whether the value is in the interval."""
        kind = type(value)
        if kind is float or kind is int:  # nearly always
            return (
                bool(self.text)
                and self.low <= value <= self.high
                and (not self.whole if kind is float else abs(value) <= sys.float_info.max)
            )
        if isinstance(value, tuple):
            return self.entries is not None and all(self.entries.has(each) for each in value)
        if isinstance(value, str):
            return value in self.words
        if isinstance(value, Tensor):
            return bool(self.text) and _has_numbers(value)
        if isinstance(value, (torch.SymFloat, torch.SymInt, Unread)):
            return bool(self.text)
        if isinstance(value, bool) or not isinstance(value, AnyReal) or not self.text:
            return False
        number = float(value)  # a number of numpy's, or a fraction
        return self.low <= number <= self.high and (not self.whole or number.is_integer())


class Range:
    """An interval, and whether None or a tensor may replace its numbers."""

    def __init__(self, interval: Interval, optional: bool, tensor: bool) -> None:
        self.interval, self.optional, self.tensor = interval, optional, tensor

    def has(self, value: Any) -> bool:
        """Whether the value is allowed."""
        if value is None and self.optional:
            return True
        return self.interval.has(value) and (self.tensor or not isinstance(value, Tensor))

    def check(self, owner: str, name: str, value: Any) -> None:
        """Raise an error that says what is allowed."""
        if not self.has(value):
            of_no_numbers = isinstance(value, Tensor) and not _has_numbers(value)
            given = value.dtype if of_no_numbers else repr(value)
            raise InvalidCall(f"{owner}: {name} is {given}, expected {self}.")

    def __str__(self) -> str:
        return f"{self.interval}{' or None' if self.optional else ''}"


#: The range of a field of a user's rule or weight that is annotated only as ``float``.
PLAIN = Interval("[-inf, inf]")


class Flag(Range):
    """The range of an argument annotated as ``bool``. 1 is not allowed, and neither is
    a text, because any text would count as true.
    """

    def __init__(self, optional: bool) -> None:
        super().__init__(PLAIN, optional, False)

    def has(self, value: Any) -> bool:
        """Whether the value is allowed."""
        return type(value) is bool or (value is None and self.optional)

    def __str__(self) -> str:
        return f"True or False{' or None' if self.optional else ''}"


class Kind(Range):
    """The range of an argument that is no number: ``types`` are allowed, and ``words``
    say which.
    """

    def __init__(self, types: tuple[type, ...], words: str, optional: bool) -> None:
        super().__init__(PLAIN, optional, Tensor in types)
        self.types, self.words = types, words

    def has(self, value: Any) -> bool:
        """Whether the value is allowed."""
        if isinstance(value, Tensor):
            return Tensor in self.types and _has_numbers(value)
        return isinstance(value, self.types) or (value is None and self.optional)

    def __str__(self) -> str:
        return f"{self.words}{' or None' if self.optional else ''}"


#: What a hyper-parameter may be: a number, a 0-d tensor or one a row, or a formula (a
#: TokenWeight) that stands for one.
Number: TypeAlias = float | Tensor | Unread
#: What a keyword of an op may be: a number, or a tensor.
Scalar: TypeAlias = float | Tensor
#: One bound for both sides, or a lower and an upper one.
Bounds: TypeAlias = float | Tensor | Unread | tuple[float, float]

Real = Annotated[T, Interval("(-inf, inf)")]
NonNegative = Annotated[T, Interval("[0, inf)")]
NonNegativeOrInf = Annotated[T, Interval("[0, inf]")]
Positive = Annotated[T, Interval("(0, inf)")]
PositiveOrInf = Annotated[T, Interval("(0, inf]")]
#: Constants of a kernel and of a graph. A tensor may not replace them.
FixedPositiveOrInf = Annotated[T, Interval("(0, inf]", fixed=True)]
FixedOpenUnit = Annotated[T, Interval("(0, 1)", fixed=True)]
AtLeastOne = Annotated[T, Interval("[1, inf)")]
Unit = Annotated[T, Interval("[0, 1]")]
OpenUnit = Annotated[T, Interval("(0, 1)")]
Count = Annotated[T, Interval("[1, inf)", whole=True)]
CountOrZero = Annotated[T, Interval("[0, inf)", whole=True)]


@functools.lru_cache(maxsize=512)
def _compiled(annotation: str) -> types.CodeType:
    return compile(annotation, "<annotation>", "eval")


def _range(annotation: Any, module: str, optional: bool, plain: bool) -> Range | None:
    """Return the range in an annotation. With ``plain`` a bare ``float``
    has one too."""
    if isinstance(annotation, str):
        try:
            annotation = eval(_compiled(annotation), vars(sys.modules[module]))
        except (
            NameError,
            AttributeError,
        ):  # imported for type checkers only, or local to a function
            return None
    parts = (
        get_args(annotation)
        if get_origin(annotation) in (Union, types.UnionType)
        else (annotation,)
    )
    optional = optional or type(None) in parts
    for part in parts:
        found = [x for x in getattr(part, "__metadata__", ()) if isinstance(x, Interval)]
        if found:
            kind = get_args(part)[0]
            kinds = get_args(kind) or (kind,)
            return Range(
                found[0], optional, not found[0].fixed or Tensor in (*kinds, *parts) or Any in kinds
            )
    if bool in parts and {*parts} <= {bool, type(None)}:
        return Flag(optional)
    if str in parts and {*parts} <= {str, type(None)}:
        return Kind((str,), "a string", optional)
    formulas = [
        x for x in parts if inspect.isclass(x) and issubclass(x, Unread) and x is not Unread
    ]
    # A part that must be a formula is checked by its record, which says what was meant.
    if formulas and Tensor in parts and {*parts} <= {*formulas, Tensor, type(None)}:
        allowed: tuple[type, ...] = (*formulas, Tensor)
        names = " or ".join(f"a {x.__name__}" for x in reversed(allowed))
        return Kind(allowed, names, optional)
    return Range(PLAIN, optional, True) if plain and float in parts else None


def ranges_of(what: Any) -> dict[str, Range]:
    """Return the ranges by name of the parameters of a function or the fields of a
    dataclass.
    """
    return _ranges_of(what, inspect.signature(what).parameters)


def _ranges_of(
    what: Any, parameters: Mapping[str, inspect.Parameter], plain: bool = False
) -> dict[str, Range]:
    # With ``plain`` a bare ``float`` is any number.
    annotations: dict[str, tuple[Any, str]] = {}
    if inspect.isclass(what):
        for base in reversed(what.__mro__):
            annotations |= {
                name: (kind, base.__module__)
                for name, kind in inspect.get_annotations(base).items()
            }
    else:
        annotations = {
            name: (kind, what.__module__) for name, kind in inspect.get_annotations(what).items()
        }
    found = {}
    for name, parameter in parameters.items():
        if name in annotations and parameter.kind is not parameter.VAR_KEYWORD:
            allowed = _range(*annotations[name], parameter.default is None, plain)
            if allowed is not None:
                found[name] = allowed
                if parameter.default is not parameter.empty:
                    allowed.check(what.__name__, name, parameter.default)
    return found


def ranged(what: T, plain: bool = False, words: bool = True) -> T:
    """Check the hyper-parameters of a function's calls, or of a dataclass's instances,
    by their annotations.

    It is also a decorator. An op checks its words itself and has ``words=False``, so
    that a warm call with ``plan=...`` checks nothing here.
    """
    target: Any = what
    if "__ranges__" in vars(target):
        return what
    parameters = inspect.signature(target).parameters
    ranges = {
        name: allowed
        for name, allowed in _ranges_of(target, parameters, plain).items()
        if words or not isinstance(allowed, Kind)
    }
    said = {name: allowed for name, allowed in ranges.items() if allowed.interval is not PLAIN}
    target.__ranges__, target.__doc__ = ranges, described(target.__doc__, said)
    is_class = inspect.isclass(what)  # inspect.isclass(target) would narrow the type
    call = target.__init__ if is_class else target
    # A function that takes any keyword refuses unknown ones itself.
    target.__known__ = (
        None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else frozenset(parameters)
    )
    if not ranges and target.__known__ is None:
        return what
    positional = tuple(
        name
        for name, p in (inspect.signature(call).parameters if is_class else parameters).items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)
    )

    known, names = target.__known__, frozenset(ranges)
    by_position = not names.isdisjoint(positional)

    @functools.wraps(call)
    def checked(*args: Any, **keywords: Any) -> Any:
        if (
            (known is None or known.issuperset(keywords))
            and names.isdisjoint(keywords)
            and not (args and by_position)
        ):
            # nothing to check: a warm call of an op ends here
            return call(*args, **keywords)
        given = [*zip(positional, args, strict=False), *keywords.items()]
        if torch.compiler.is_compiling():
            _check_constants(
                target,
                tuple(keywords),
                tuple([(name, value) for name, value in given if is_constant(value)]),
            )
            check_inputs(target.__name__, target, given)
        else:
            _check(target, keywords, given)
        return call(*args, **keywords)

    if not is_class:
        return checked  # type: ignore[return-value]
    target.__init__ = checked
    return what


def _check(target: Any, keywords: Iterable[str], given: Iterable[tuple[str, Any]]) -> None:
    """Raise for a keyword that is none, and for a number that cannot be meant."""
    known, ranges = target.__known__, target.__ranges__
    if known is not None and not known.issuperset(keywords):
        raise unexpected(
            target.__name__, min(set(keywords) - known), inspect.signature(target).parameters
        )
    for name, value in given:
        if name in ranges:
            ranges[name].check(target.__name__, name, value)


@constant_result
def _check_constants(
    target: Any, keywords: tuple[str, ...], given: tuple[tuple[str, Any], ...]
) -> None:
    # torch.compile runs this and follows none of it: what it raises is the reason that
    # compilation ends with.
    _check(target, keywords, given)


def check_inputs(owner: str, target: Any, given: Iterable[tuple[str, Any]]) -> None:
    """Check the numbers that a compiled graph takes as inputs.

    torch.compile makes a guard of each comparison, without the value. It asks for the
    value only where the function raises.
    """
    for name, value in given:
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, (int, float)) and not has_static_value(each):
                low, high, whole = _bounds(target, name, isinstance(value, tuple))
                if (
                    (whole and isinstance(each, float))
                    or (low is not None and each < low)
                    or (high is not None and each > high)
                ):
                    _refuse(owner, target, name, guard_scalar(each))


@constant_result
def _bounds(target: Any, name: str, of_tuple: bool) -> tuple[float | None, float | None, bool]:
    """Return the finite bounds of an argument, or None for them, and
    whether only whole numbers lie between them."""
    allowed = target.__ranges__.get(name)
    interval = allowed and (allowed.interval.entries if of_tuple else allowed.interval)
    if interval is None or not interval.text:
        return None, None, False
    low, high = (
        None if abs(bound) >= sys.float_info.max else bound
        for bound in (interval.low, interval.high)
    )
    return low, high, interval.whole


@constant_result
def _refuse(owner: str, target: Any, name: str, value: float) -> None:
    raise InvalidCall(f"{owner}: {name} is {value!r}, expected {target.__ranges__[name]}.")


def is_constant(value: Any) -> bool:
    """Whether torch.compile knows the value while it compiles."""
    if isinstance(value, tuple):
        return all(is_constant(each) for each in value)
    if isinstance(value, (int, float)):
        return has_static_value(value)
    return value is None or isinstance(value, str)


def described(doc: str | None, ranges: dict[str, Range]) -> str | None:
    """Return a docstring with the ranges of its hyper-parameters."""
    if doc is None or not ranges:
        return doc
    return (
        f"{inspect.cleandoc(doc)}\n\nRanges: "
        f"{'; '.join(f'``{name}`` {allowed}' for name, allowed in ranges.items())}."
    )
