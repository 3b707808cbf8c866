"""The stubs of the compiled extensions have the names of the extensions, with the
signatures of pybind11's docstrings.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest
from cuda_emulation import fixtures

import reweight_ops

NUMBERS = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
}
#: If nvcc did not build it, the emulated kernels have the same bindings except these.
EMULATED_ALONE = {"set_schedule", "set_device", "set_status", "last_error"}
NOT_EMULATED = {"sources", "runtime_version", "archs"}


def stub(name):
    """Members of a stub; an import is another stub's member."""
    body = ast.parse((Path(reweight_ops.__file__).parent / f"{name}.pyi").read_text()).body
    found = members(body)
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.level:
            names = {alias.name for alias in node.names}
            found |= {
                member: what
                for member, what in stub(node.module).items()
                if member.split(".")[0] in names
            }
    return found


def members(body, prefix=""):
    """Name to definition, of functions and methods; a variable's is its annotation."""
    found = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            found |= members(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            found[prefix + node.name] = node
        elif isinstance(node, ast.AnnAssign):
            found[prefix + node.target.id] = node.annotation
    return found


def built(module):
    """The members of an extension, from its docstrings."""
    found = {}
    for name, value in vars(module).items():
        if name.startswith("__"):
            continue
        if isinstance(value, type):
            found[f"{name}.__init__"] = definition(value.__init__.__doc__)
        else:
            found[name] = definition(value.__doc__) if callable(value) else value
    return found


def definition(doc):
    return ast.parse(f"def {doc.splitlines()[0]}: ...").body[0]


def written(annotation, sizes=None):
    """An annotation in the stub's form. A sequence of a fixed size is a tuple of that
    size, or any sequence.
    """
    text = ast.unparse(annotation).replace("collections.abc.", "")
    text = re.sub(r"\b(\w+\.)?_(C|cuda|cuda_emulated)\.", "", text)
    for long, short in NUMBERS.items():
        text = text.replace(long, short)
    text = re.sub(
        r"typing\.Annotated\[Sequence\[(\w+)\], 'FixedSize\((\d+)\)'\]",
        lambda m: f"tuple[{', '.join([m[1]] * int(m[2]))}]",
        text,
    )
    return {"dict": "dict[str, Any]"}.get(text, text)


def parameters(node):
    plain = [a for a in node.args.args if a.arg != "self"]
    defaults = [None] * (len(plain) - len(node.args.defaults)) + [
        ast.unparse(d) for d in node.args.defaults
    ]
    return [(a.arg, written(a.annotation), d) for a, d in zip(plain, defaults, strict=True)]


def agrees(ours, theirs):
    """``Sequence[int]`` in the stub stands for a tuple of any size."""
    return ours == theirs or (
        ours == "Sequence[int]" and re.fullmatch(r"tuple\[int(, int)*\]", theirs) is not None
    )


def disagreements(ours, theirs):
    """Disagreements between a stub's members and an extension's."""
    found = []
    for name in ours.keys() & theirs.keys():
        mine, other = ours[name], theirs[name]
        if not isinstance(other, ast.FunctionDef):
            if not isinstance(
                other, {"str": str, "int": int, "list[str]": list}[ast.unparse(mine)]
            ):
                found.append(
                    f"{name}: {ast.unparse(mine)}, and {type(other).__name__} in the extension"
                )
            continue
        if written(mine.returns) != written(other.returns):
            found.append(
                f"{name} returns {written(mine.returns)}, and {written(other.returns)} in the extension"
            )
        mine, other = parameters(mine), parameters(other)
        if [(p, default) for p, _, default in mine] != [(p, default) for p, _, default in other]:
            found.append(f"{name}: parameters {mine}, and {other} in the extension")
        else:
            found += [
                f"{name}, {p}: {a}, and {b} in the extension"
                for (p, a, _), (_, b, _) in zip(mine, other, strict=True)
                if not agrees(a, b)
            ]
    return found


def test_the_stub_of_the_cpu_kernels():
    theirs = built(pytest.importorskip("reweight_ops._C", exc_type=ImportError))
    assert set(stub("_C")) == set(theirs)
    assert disagreements(stub("_C"), theirs) == []


def test_the_stub_of_the_cuda_kernels():
    ours = stub("_cuda")
    try:
        theirs = built(importlib.import_module("reweight_ops._cuda"))
        assert set(ours) == set(theirs)
    except ImportError:
        theirs = built(fixtures.emulated()[0])
        assert set(ours) - NOT_EMULATED == set(theirs) - EMULATED_ALONE
        assert set(theirs) >= EMULATED_ALONE
    assert disagreements(ours, theirs) == []


def test_a_stub_that_differs_is_seen():
    theirs = built(pytest.importorskip("reweight_ops._C", exc_type=ImportError))
    for text, wrong in (
        ("def set_level(name: str) -> int: ...", "set_level returns int"),
        ("def set_level(level: str) -> None: ...", "set_level: parameters"),
        ("def set_level(name: int) -> None: ...", "set_level, name: int"),
    ):
        (found,) = disagreements(members(ast.parse(text).body), theirs)
        assert found.startswith(wrong)
