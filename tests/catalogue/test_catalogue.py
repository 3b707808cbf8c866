"""The registry is complete, its entries are usable by name, and its page is fresh."""

import dataclasses
import inspect
from pathlib import Path

import catalogue_rows
import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.calls.specs import named_spec
from reweight_ops._core.catalogue.left_out import LEFT_OUT
from reweight_ops._core.catalogue.registry import CATALOGUE, KINDS, published
from reweight_ops._core.catalogue.search import entry_of
from reweight_ops._core.catalogue.table import level, plan
from reweight_ops.codegen import stale_files

ENTRIES = [entry for kind in CATALOGUE.values() for entry in kind.values()]
IDS = [f"{e.kind}/{e.name}" for e in ENTRIES]
ROWS = {
    (table, row): keys
    for table in ("FIRST", "SECOND", "FIELD", "NAMED")
    for row, keys in getattr(catalogue_rows, table).items()
}


@pytest.mark.parametrize("row", ROWS, ids=[f"{table}-{row}" for table, row in ROWS])
def test_every_published_method_is_accounted_for(row):
    keys = ROWS[row]
    if isinstance(keys, str):
        assert keys in LEFT_OUT
    else:
        missing = [key for key in keys if key not in IDS]
        assert not missing and keys


def test_the_surveys_are_whole():
    # the rows of their tables; DPO^γ and unlikelihood share one
    assert (len(catalogue_rows.FIRST), len(catalogue_rows.SECOND)) == (33, 48)


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_an_entry_is_complete(entry):
    assert entry.full_name and entry.paper and len(entry.formula) > 40
    if entry.certainty == "derived":
        assert "Derived" in entry.formula, "a derived entry says so, and from what"
    required = {
        name for name, default in entry.defaults.items() if default is inspect.Parameter.empty
    }
    if entry.kind in ("policy_loss", "pair_loss") or (
        entry.kind == "token_weight" and entry.plan is None
    ):
        assert required == set(entry.example), (
            "an example for exactly the arguments without a default"
        )
    assert level(entry), "a level"
    plan(entry)


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_an_entry_is_where_its_kind_says(entry):
    module = KINDS[entry.kind][0].removeprefix("rw.")
    assert getattr(getattr(rw, module), entry.function.__name__) is entry.function


def test_the_page_is_fresh():
    assert Path("docs/methods.md") not in stale_files(), (
        "run python -m reweight_ops.codegen and commit the result"
    )


def test_names_and_registration_fail_loudly():
    with pytest.raises(rw.InvalidCall, match="Did you mean 'dapo'"):
        entry_of("dapoo", "policy_loss")
    with pytest.raises(rw.InvalidCall, match="kind is 'loss'"):
        published("X", kind="loss", paper="p", arxiv="unknown")
    with pytest.raises(rw.InvalidCall, match="expected an id like"):
        published("X", kind="reward", paper="p", arxiv="arXiv:1")
    with pytest.raises(rw.InvalidCall, match="certainty is 'sure'"):
        published("X", kind="reward", paper="p", arxiv="unknown", certainty="sure")
    with pytest.raises(rw.InvalidCall, match="taken by"):
        published("X", name="dapo", kind="policy_loss", paper="p", arxiv="unknown")(lambda: None)
    with pytest.raises(rw.InvalidCall, match="test_catalogue has no kind of its own"):
        published("X", paper="p", arxiv="unknown")(lambda: None)


def test_a_method_by_name_is_built_once_and_a_users_own_every_time(monkeypatch):
    monkeypatch.setitem(CATALOGUE, "policy_loss", dict(CATALOGUE["policy_loss"]))
    assert named_spec("test", "dapo") is named_spec("test", "dapo")
    for epsilon in (0.1, 0.3):  # as if a notebook's cell ran twice

        @published("Own", kind="policy_loss", paper="p", arxiv="unknown")
        def own(epsilon=epsilon):
            return rw.methods.grpo(epsilon_low=epsilon, epsilon_high=epsilon)

        assert named_spec("test", "own").surrogate.epsilon_low == epsilon


@pytest.mark.parametrize("kind", ["policy_loss", "pair_loss"])
def test_a_spec_has_the_name_of_its_entry(kind):
    assert {name: entry.build().name for name, entry in CATALOGUE[kind].items()} == {
        name: name for name in CATALOGUE[kind]
    }


SHARED = {
    "policy_loss": rw.PolicyLossSpec(surrogate=rw.methods.grpo().surrogate),
    "pair_loss": rw.preference.PairSpec(terms=rw.preference.dpo().terms),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", SHARED)
def test_a_spec_that_two_methods_return_keeps_its_own_name(kind, compiled, monkeypatch):
    monkeypatch.setitem(CATALOGUE, kind, dict(CATALOGUE[kind]))
    shared = SHARED[kind]

    @published("One", kind=kind, paper="p", arxiv="unknown")
    def one():
        return shared

    @published("Two", kind=kind, paper="p", arxiv="unknown")
    def two():
        return one()

    def both(x):
        return x + 1, one(), two()

    torch._dynamo.reset()
    call = torch.compile(both, fullgraph=True, backend="eager") if compiled else both
    _, first, second = call(torch.zeros(()))
    assert (shared.name, first.name, second.name) == (None, "one", "two")
    assert first == dataclasses.replace(shared, name="one")
    assert first.weights == shared.weights  # what a spec finds of its parts is found again
    assert getattr(first, "requires", None) == getattr(shared, "requires", None)


def test_the_name_of_an_entry_is_that_of_its_function_or_class(monkeypatch):
    monkeypatch.setitem(CATALOGUE, "token_weight", {})

    @published("Two words", kind="token_weight", paper="p", arxiv="unknown")
    class TwoWords:
        pass

    assert CATALOGUE["token_weight"]["two_words"].function is TwoWords
