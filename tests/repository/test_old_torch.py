"""What PyTorch 2.10 and 2.11 do not compile, and later ones do: CI has one version, so
here the sources are read for it.
"""

import ast

from paths import ROOT

TREES = {
    path.relative_to(ROOT): ast.parse(path.read_text())
    for path in sorted((ROOT / "reweight_ops").rglob("*.py"))
}

#: Never in a graph: what it is made for runs outside of torch.compile.
UNTRACED = {"RowLayout"}


def nodes(kind):
    return [
        (f"{path}:{node.lineno}", node)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, kind)
    ]


def decorators(function):
    return [ast.unparse(each) for each in getattr(function, "decorator_list", ())]


def test_records_have_methods_and_no_properties():
    records = [
        (at, c)
        for at, c in nodes(ast.ClassDef)
        if "NamedTuple" in map(ast.unparse, c.bases) and c.name not in UNTRACED
    ]
    assert len(records) > 20
    assert not [
        f"{at} {c.name}.{f.name}"
        for at, c in records
        for f in c.body
        if "property" in decorators(f)
    ]


def test_no_function_reads_its_locals():
    assert not [
        at
        for at, call in nodes(ast.Call)
        if isinstance(call.func, ast.Name) and call.func.id == "locals"
    ]


def test_no_forward_is_decorated_by_a_context():
    """``@torch.no_grad()`` closes over a bound method."""
    assert not [
        at
        for at, f in nodes(ast.FunctionDef)
        if f.name in ("forward", "backward") and any("grad()" in d for d in decorators(f))
    ]


def test_nothing_is_copied_by_the_copy_module():
    """A trainer's own settings are, outside of any graph."""
    assert not [
        at
        for at, call in nodes(ast.Call)
        if ast.unparse(call.func) == "copy.copy" and "integrations" not in at
    ]
