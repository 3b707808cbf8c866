"""What the documentation site does to its pages: it lists trainers and a namespace's
members, notebooks become pages, formulas MathML, and Sphinx roles plain code.

Formulas are LaTeX between dollars, or code that :mod:`site_formulas` can read: in the
catalogue all such code, in the reference what cannot be Python.
"""

import importlib
import inspect
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from site_formulas import latex

from reweight_ops.integrations.trainers import TRAINERS

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(<code[^>]*>)~?")
#: As pymdownx.arithmatex leaves them. Browsers draw MathML by themselves: no script is
#: fetched.
FORMULA = re.compile(
    r'<span class="arithmatex">\\\((.*?)\\\)</span>|<div class="arithmatex">\\\[(.*?)\\\]</div>',
    re.S,
)
CODE = re.compile(r"(?<!<pre>)(?<!</span>)<code>([^<]+)</code>")
NO_PYTHON = re.compile(r"[·²√ΣΠ½‖]")
EVERY = re.compile(r"^<!-- every: (\S+) -->$", re.M)
#: Namespaces whose members are registered, and so stand in no ``__all__``.
DYNAMIC = ("reweight_ops.methods",)


def members(name: str) -> str:
    """A directive for each public function and class of a namespace, where it is
    defined: what the namespace itself says, not what its text says.
    """
    module = importlib.import_module(name)
    if name == "reweight_ops.rules":
        return "\n\n".join(
            f"::: {r.__module__}.{r.__qualname__}"
            for r in module.RULES.values()
            if r.__module__.startswith("reweight_ops.")
        )
    public = {
        shown: getattr(module, shown)
        for shown in {*dir(module), *getattr(module, "__all__", ())}
        if not shown.startswith("_")
    }
    shown = getattr(module, "__all__", ()) if name not in DYNAMIC else public
    found = {
        f"{v.__module__}.{v.__qualname__}": n
        for n in shown
        if inspect.isfunction(v := public[n]) or inspect.isclass(v)
    }
    return "\n\n".join(f"::: {path}" for path, _ in sorted(found.items(), key=lambda pair: pair[1]))


def on_config(config: dict) -> dict:
    """The navigation's trainers are those of the registry, in its order."""
    (trainers,) = (part["Trainers"] for part in config["nav"] if "Trainers" in part)
    trainers[:] = [{t.name: t.page.removeprefix("docs/")} for t in TRAINERS.values()]
    return config


def on_files(files: Files, config: dict) -> Files:
    """A page for each notebook, of its cells."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = (
            cells(json.loads(notebook.content_string))
            + f"\n[The notebook itself]({Path(notebook.src_uri).name})\n"
        )
        files.append(
            File.generated(config, notebook.src_uri.replace(".ipynb", ".md"), content=page)
        )
    return files


def cells(notebook: dict) -> str:
    """As Markdown."""
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    return (
        "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in texts)
        + "\n"
    )


def on_page_markdown(markdown: str, **_: object) -> str:
    return EVERY.sub(lambda match: members(match[1]), markdown)


def on_page_content(html: str, page: Any, **_: object) -> str:
    def rendered(match: re.Match[str]) -> str:
        return convert(unescape(match[1] or match[2]), display="block" if match[2] else "inline")

    def read(match: re.Match[str]) -> str:
        text = unescape(match[1])
        formula = latex(text) if in_catalogue or NO_PYTHON.search(text) else None
        return match[0] if formula is None else convert(formula)

    html, in_catalogue = (
        FORMULA.sub(rendered, ROLE.sub(r"\1", html)),
        page.file.src_uri == "methods.md",
    )
    return (
        CODE.sub(read, html) if in_catalogue or page.file.src_uri.startswith("reference/") else html
    )
