"""Every option of a method has an effect in every one of its modes, or is an error
there: found by trying all of them.
"""

import inspect
import re

import pytest

import reweight_ops as rw

EMPTY = inspect.Parameter.empty
METHODS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": function
    for module in (rw.methods, rw.preference)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if not name.startswith("_")
    and name != "method"
    and str(inspect.signature(function).return_annotation).endswith("Spec")
}
#: Defaults of other kinds are not varied: a schedule's tensor, a formula.
TRIED = {
    bool: (True, False),
    int: (2, 3),
    float: (0.37, 0.9, 2.0, 3.0),
    tuple: ((0.1, 0.6),),
    type(None): (2, 0.4, 3.0),
}
#: With an effect that is not in the spec: what it stands for is an argument of the
#: call.
ELSEWHERE = {"unused", "process_group"}


def test_the_methods_are_here():
    assert len(METHODS) > 70 and {"methods.trl", "methods.verl", "preference.trl"} <= set(METHODS)


def build(function, options):
    try:
        return function(**options)
    except (rw.InvalidCall, rw.UnsupportedRequest, TypeError) as error:
        return error


def words(function, needed, name):
    """The allowed words of an option, from the message that refuses another word."""
    refused = build(function, needed | {name: "?"})
    assert isinstance(refused, rw.InvalidCall), f"{name}='?' is accepted"
    return re.findall(r"[\w+-]+", str(refused).rpartition("expected")[2])


@pytest.mark.parametrize("name", METHODS)
def test_every_option_has_an_effect_or_is_an_error(name):
    function = METHODS[name]
    parameters = {
        n: p.default
        for n, p in inspect.signature(function).parameters.items()
        if n not in ELSEWHERE
    }
    needed = {n: 0.5 for n, default in parameters.items() if default is EMPTY}
    spelled = {
        n: words(function, needed, n)
        for n, default in parameters.items()
        if isinstance(default, str)
    }
    modes = [{}, *({n: word} for n in spelled for word in spelled[n] if word != parameters[n])]
    for mode in modes:
        plain = build(function, needed | mode)
        if isinstance(plain, Exception):
            continue
        for option, default in parameters.items():
            if option in mode:
                continue
            values = (
                spelled[option]
                if option in spelled
                else TRIED.get(float if default is EMPTY else type(default), ())
            )
            found = [
                build(function, needed | mode | {option: value})
                for value in values
                if value != default
            ]
            specs = [spec for spec in found if not isinstance(spec, Exception)]
            # Two values: one of them may be what None stands for.
            assert not specs or len(values) == 1 or any(spec != plain for spec in specs), (
                f"{name}: {option} has no effect with {mode}"
            )
