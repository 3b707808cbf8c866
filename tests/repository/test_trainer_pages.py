"""The Python of the trainers' pages, and of the README's TRL part, runs: with stand-ins
for trainers and for what a reader has, and with functions in
place of our hooks that take the arguments which the hooks take, and no others."""

import ast
import builtins
import re
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock, create_autospec

import pytest
from paths import ROOT

import reweight_ops as rw

PAGES = [
    p
    for p in (*sorted((ROOT / "docs/trainers").glob("*.md")), ROOT / "README.md")
    if "```python" in p.read_text()
]


def stand_in(name):
    found = MagicMock(name=name)
    for value in (found, found.return_value):
        value.__iter__.side_effect = lambda: iter([MagicMock() for _ in range(12)])
    return found


def ours(module, name):
    """What a hook's module defines by a name, with its signature and nothing in it: the
    trainers need not be there.
    """
    path = ROOT / module.replace(".", "/")
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    (found,) = (
        node
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name
    )
    if isinstance(found, ast.ClassDef):
        return constructor(found)
    return with_signature(found.args)


def constructor(found):
    made = [
        node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    ]
    # torchtitan's is made by the Config inside
    if not made or any(isinstance(node, ast.ClassDef) for node in found.body):
        return stand_in(found.name)
    made[0].args.args.pop(0)  # self
    return with_signature(made[0].args)


def with_signature(arguments):
    for argument in (
        *arguments.args,
        *arguments.kwonlyargs,
        *filter(None, (arguments.vararg, arguments.kwarg)),
    ):
        argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    function = eval(
        compile(
            ast.fix_missing_locations(ast.Expression(ast.Lambda(arguments, ast.Constant(None)))),
            "signature",
            "eval",
        )
    )
    return create_autospec(function, return_value=stand_in("result"))


def imported(name, *rest):
    """Ours by their signatures, Python's own as they are, anything else a stand-in."""
    names = rest[2] or () if len(rest) > 2 else ()
    if name.split(".")[0] in sys.stdlib_module_names:
        return builtins.__import__(name, *rest)
    if name.startswith("reweight_ops.integrations"):
        return SimpleNamespace(**{each: ours(name, each) for each in names})
    return rw if name == "reweight_ops" else stand_in(name)


#: What no block has without importing it.
OURS = {"rw"} | {
    node.name
    for path in (ROOT / "reweight_ops/integrations").rglob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
}


class Names(dict):
    def __missing__(self, name):
        if hasattr(builtins, name):
            raise KeyError(name)
        if name in OURS:
            raise NameError(f"the block does not import {name}, and a reader copies a block")
        return self.setdefault(name, stand_in(name))


def run(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    for block in (
        blocks
        if page.name != "README.md"
        else [block for block in blocks if "integrations" in block]
    ):
        names = {"__builtins__": {**vars(builtins), "__import__": imported}, "__name__": "page"}
        exec(compile(block, str(page), "exec"), names, Names())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
@pytest.mark.usefixtures("registry")
def test_python_of_a_page_runs(page):
    run(page)


@pytest.mark.parametrize(
    "line",
    [
        "from reweight_ops.integrations.verl import no_such_name",
        "from reweight_ops.integrations.verl import register\nregister(no_such=1)",
        "import reweight_ops as rw\nspec = rw.methods.dapo(no_such=1)",
        "spec = rw.methods.dapo()",
        "patch_loss(spec)",
    ],
)
def test_what_is_wrong_is_found(line, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"```python\n{line}\n```\n")
    with pytest.raises((ValueError, TypeError, NameError)):
        run(page)
