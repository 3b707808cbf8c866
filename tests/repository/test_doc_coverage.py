"""The content of ``help`` on the public surface; a failure names what is missing."""

import doctest
import inspect
import re

import pytest

import reweight_ops as rw
from reweight_ops._core.calls.keywords import (
    LMHeadOptions,
    PairOptions,
    PolicyOptions,
    SoftmaxOptions,
)
from reweight_ops._core.catalogue.descriptions import DESCRIPTIONS
from reweight_ops._core.catalogue.registry import CATALOGUE
from reweight_ops._core.catalogue.surface import parts
from reweight_ops._core.losses import documented, explain

OPS = {op.__name__: op for op in explain.PREPARED}
ENTRIES = {
    f"{kind}/{name}": entry
    for kind, entries in CATALOGUE.items()
    for name, entry in entries.items()
}
NAMESPACES = (
    rw.advantages,
    rw.divergences,
    rw.methods,
    rw.objectives,
    rw.preference,
    rw.rewards,
    rw.sample_weights,
    rw.schedules,
    rw.weights,
)
VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def public():
    found = {f"rw.{name}": getattr(rw, name) for name in rw.__all__}
    for module in NAMESPACES:
        found |= {
            f"rw.{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name)
            for name in module.__all__
        }
    return {
        name: value
        for name, value in found.items()
        if inspect.isclass(value) or inspect.isfunction(value)
    }


PUBLIC = public()


def test_the_surface_is_here():
    assert len(OPS) == 14 and len(PUBLIC) > 200 and len(ENTRIES) > 140


def test_every_function_and_class_says_what_it_is():
    without = [
        name
        for name, value in PUBLIC.items()
        if not (value.__doc__ or "").strip() or value.__doc__.startswith(f"{value.__name__}(")
    ]
    assert not without, without


@pytest.mark.parametrize("name", OPS)
def test_a_signature_lists_every_keyword_with_its_type_and_default(name):
    parameters = inspect.signature(OPS[name]).parameters.values()
    assert not [p.name for p in parameters if p.kind in VARIADIC], (
        "keywords that are not written out"
    )
    assert not [
        p.name for p in parameters if p.annotation is p.empty or "Any" in str(p.annotation)
    ], "keywords without a type"
    assert not [
        p.name
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name != "spec"
    ], "keywords without a default"


#: Parameters that hold anything: values for an example, a hook of a result, and an op
#: with its own arguments.
UNTYPED = {"rw.methods.published(example)", "rw.PolicyLossOutput(_more)", "rw.explain(op)"}


def test_parameters_have_named_types():
    """Fields of dataclasses included. ``tests/support/typed_calls.py`` says what mypy
    makes of them.
    """
    found = {**PUBLIC, **{name: entry.function for name, entry in ENTRIES.items()}}
    without = [
        f"{name}({p.name})"
        for name, value in found.items()
        if value.__module__.startswith("reweight_ops.") and not issubclass_of_exception(value)
        for p in inspect.signature(value).parameters.values()
        if p.kind not in VARIADIC
        and (p.annotation is p.empty or re.search(r"\bAny\b", str(p.annotation)))
    ]
    assert set(without) == UNTYPED


def issubclass_of_exception(value):
    return inspect.isclass(value) and issubclass(value, Exception)


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_refers_to_its_paper(name):
    entry = ENTRIES[name]
    references = inspect.getdoc(entry.function).partition("References:\n")[2]
    assert entry.paper in references
    assert (
        entry.arxiv == "unknown"
        or f"arXiv:{entry.arxiv}, https://arxiv.org/abs/{entry.arxiv}" in references
    )
    named = [line for line in references.splitlines() if "arXiv:" in line]
    assert len(named) == len(set(named))


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_has_every_section(name):
    doc = inspect.getdoc(ENTRIES[name].function)
    headings = [
        "Returns:",
        "Shape:",
        "Raises:",
        "References:",
        *(["Args:"] if inspect.signature(ENTRIES[name].function).parameters else []),
    ]
    missing = [heading for heading in headings if heading not in map(str.strip, doc.splitlines())]
    if ">>> " not in doc:
        missing.append("Example:")
    assert not missing, missing


#: What a formula or a loss of the user's is given, and what is only derived from.
NOT_MADE_BY_HAND = {
    "Rule",
    "TokenWeight",
    "Ratio",
    "Reduction",
    "Recipe",
    "preference.Pairs",
    "preference.Sequences",
    "weights.BatchStatistics",
    "methods.published",
}
PARTS = {name: value for module in (rw, *NAMESPACES) for name, value in parts(module, OPS.values())}


def sections(doc):
    return {line.strip() for line in doc.splitlines()}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_has_every_section(name):
    value = PARTS[name]
    doc = inspect.getdoc(value)
    wanted = ["Returns:", "Shape:"]
    parameters = [p for p in inspect.signature(value).parameters if not p.startswith("_")]
    if parameters:
        wanted.append("Args:")
    if inspect.isfunction(value) or getattr(value, "__ranges__", None):
        wanted.append("Raises:")
    missing = [heading for heading in wanted if heading not in sections(doc)]
    if ">>> " not in doc and name not in NOT_MADE_BY_HAND:
        missing.append("Example:")
    assert not missing, missing


def test_all_parts_are_seen():
    """Every public class or function is an op, an entry, an exception, or a part."""
    known = {id(x) for x in (*OPS.values(), *PARTS.values())}
    known |= {id(entry.function) for entry in ENTRIES.values()}
    assert len(PARTS) > 120
    assert not [
        name
        for name, value in PUBLIC.items()
        if id(value) not in known and not issubclass_of_exception(value)
    ]


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_every_section(name):
    doc = inspect.getdoc(OPS[name])
    wanted = ["Args:", "Returns:", "Raises:", "Shape:", "Example:", "References:"]
    headings = [line for line in doc.splitlines() if re.fullmatch(r"[A-Z][\w ]*:", line)]
    assert headings == wanted
    assert ">>> " in doc


def test_the_examples_of_ops_and_entries_run():
    """``doctest.testmod`` does not see what a decorator of another module returns."""
    runner = doctest.DocTestRunner(
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False
    )
    functions = {
        **OPS,
        **PARTS,
        **{name: entry.function for name, entry in ENTRIES.items()},
    }
    for name, function in functions.items():
        test = doctest.DocTestParser().get_doctest(inspect.getdoc(function), {}, name, None, None)
        runner.run(test, clear_globs=True)
    found = runner.summarize(verbose=False)
    assert found.attempted > 700 and not found.failed


@pytest.mark.parametrize("name", OPS)
def test_an_op_explains_every_keyword_once_in_order_with_its_type(name):
    args = inspect.getdoc(OPS[name]).partition("Args:\n")[2].partition("\n\n")[0]
    shown = re.findall(r"(?m)^    (\w+) \((.+)", args)
    parameters = inspect.signature(OPS[name]).parameters
    assert [name for name, _ in shown] == list(parameters)
    assert not [name for name, about in shown if not about.startswith(parameters[name].annotation)]


def test_the_docstrings_of_ops_know_every_keyword_that_they_share():
    keywords = {
        name
        for record in (SoftmaxOptions, PolicyOptions, LMHeadOptions, PairOptions)
        for name in record.NAMES
    }
    assert not keywords - documented.KEYWORDS.keys()


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_explains_every_parameter_once_in_order(name):
    function = ENTRIES[name].function
    args = inspect.getdoc(function).partition("Args:\n")[2].partition("\n\n")[0]
    assert re.findall(r"(?m)^    (\w+)(?: \(|:)", args) == list(
        inspect.signature(function).parameters
    )


#: ``name, name (type, default): text``, or several arguments with a word between.
ITEM = r"[\w*.]+(?:(?:, (?:or )?| or | with )[\w*.]+)*(?: \(.*\))?: ?.*|[\w, ]+,"
ITEM_SECTIONS = ("Args:", "Keyword Args:", "Raises:")


def test_each_item_of_a_section_starts_with_its_name():
    """A continuation that is not indented is an argument without a name to whoever
    reads sections: editors and the site.
    """
    wrong = []
    for name, value in {**OPS, **PARTS, **{n: e.function for n, e in ENTRIES.items()}}.items():
        section = ""
        assert "ForwardRef" not in inspect.getdoc(value), name
        for line in inspect.getdoc(value).splitlines():
            if not line.startswith(" ") and line:
                section = line
            elif section in ITEM_SECTIONS and re.match(r" {4}\S", line):
                wrong += [] if re.fullmatch(ITEM, line.strip()) else [f"{name}: {line}"]
    assert not wrong, "\n".join(wrong)


def test_each_argument_has_a_description_of_its_own():
    """ "See above" is what a user's entry has where its own docstring has to say it."""
    left = [
        f"{name}: {line.strip()}"
        for name, value in {**OPS, **PARTS, **{n: e.function for n, e in ENTRIES.items()}}.items()
        for line in inspect.getdoc(value).splitlines()
        if "See above" in line
    ]
    assert not left, "\n".join(left)


def test_each_description_has_its_argument():
    """A table may also name a kind, whose entries share it."""
    owners = {**PARTS, **{name: entry.function for name, entry in ENTRIES.items()}}
    taken = {name: set(inspect.signature(value).parameters) for name, value in owners.items()}
    unused = [
        f"{of}: {argument}"
        for of, table in DESCRIPTIONS.items()
        for argument in table
        if not any(
            argument in arguments
            for name, arguments in taken.items()
            if of in (name, name.partition("/")[0], name.rpartition(".")[2], "")
        )
    ]
    assert not unused, unused
