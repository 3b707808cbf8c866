"""The stub of the compiled extension against the extension: the same names, with the signatures that pybind11 writes into their docstrings."""

import ast
import re
from pathlib import Path

import pytest

import reweight_ops

_C = pytest.importorskip("reweight_ops._C", exc_type=ImportError)

STUB = ast.parse((Path(reweight_ops.__file__).parent / "_C.pyi").read_text())
NUMBERS = {"typing.SupportsInt | typing.SupportsIndex": "int", "typing.SupportsFloat | typing.SupportsIndex": "float"}


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


def built():
    """The same of the extension, from its docstrings."""
    found = {}
    for name, value in vars(_C).items():
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
    """An annotation as the stub writes it. A sequence of a fixed size is a tuple of that size, or any sequence."""
    text = ast.unparse(annotation).replace("reweight_ops._C.", "").replace("collections.abc.", "")
    for long, short in NUMBERS.items():
        text = text.replace(long, short)
    text = re.sub(
        r"typing\.Annotated\[Sequence\[(\w+)\], 'FixedSize\((\d+)\)'\]", lambda m: f"tuple[{', '.join([m[1]] * int(m[2]))}]", text
    )
    return {"dict": "dict[str, Any]"}.get(text, text)


def parameters(node):
    plain = [a for a in node.args.args if a.arg != "self"]
    defaults = [None] * (len(plain) - len(node.args.defaults)) + [ast.unparse(d) for d in node.args.defaults]
    return [(a.arg, written(a.annotation), d) for a, d in zip(plain, defaults, strict=True)]


def agrees(ours, theirs):
    """``Sequence[int]`` in the stub stands for a tuple of any size."""
    return ours == theirs or (ours == "Sequence[int]" and re.fullmatch(r"tuple\[int(, int)*\]", theirs) is not None)


def test_the_same_names():
    assert set(members(STUB.body)) == set(built())


@pytest.mark.parametrize("name", sorted(built()))
def test_signature(name):
    ours, theirs = members(STUB.body)[name], built()[name]
    if not isinstance(theirs, ast.FunctionDef):
        assert isinstance(theirs, {"str": str, "list[str]": list}[ast.unparse(ours)])
        return
    assert written(ours.returns) == written(theirs.returns)
    ours, theirs = parameters(ours), parameters(theirs)
    assert [(name, default) for name, _, default in ours] == [(name, default) for name, _, default in theirs]
    wrong = [(name, a, b) for (name, a, _), (_, b, _) in zip(ours, theirs, strict=True) if not agrees(a, b)]
    assert not wrong, "in the stub, and in the extension"
