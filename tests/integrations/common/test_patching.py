"""Patching another library: checked, counted, undone, and loud about what it does not
know.
"""

import importlib.metadata
import re
import types
import warnings

import pytest

import reweight_ops as rw
from reweight_ops.integrations import trainers
from reweight_ops.integrations.patching import (
    Counts,
    Patch,
    Replacement,
    check_signature,
    source_digest,
)


@pytest.fixture
def library():
    class Base:
        def inherited(self, x):
            return "theirs"

    class Trainer(Base):
        def loss(self, inputs, scale=1):
            return "theirs"

        @staticmethod
        def helper(x):
            return "theirs"

    return types.SimpleNamespace(Trainer=Trainer, Base=Base)


def ours(*args, **kwargs):
    return "ours"


def test_every_kind_of_attribute_comes_back_as_it_was(library):
    before = dict(vars(library.Trainer))
    with Patch(
        "Lib 1.0",
        [
            Replacement(library.Trainer, "loss", ours, ("self", "inputs")),
            Replacement(library.Trainer, "inherited", ours),
            Replacement(library.Trainer, "helper", staticmethod(ours)),
        ],
    ):
        trainer = library.Trainer()
        assert [trainer.loss(1), trainer.inherited(1), trainer.helper(1)] == ["ours"] * 3
    assert dict(vars(library.Trainer)) == before
    assert library.Base().inherited(1) == "theirs"


def test_undo_twice_and_after_an_error(library):
    with (
        pytest.raises(ZeroDivisionError),
        Patch("Lib", [Replacement(library.Trainer, "loss", ours)]) as patch,
    ):
        1 / 0  # noqa: B018
    assert library.Trainer().loss(1) == "theirs"
    patch.undo()
    assert library.Trainer().loss(1) == "theirs"


def test_a_second_patch_of_the_same_attribute_is_refused_until_undone(library):
    where = [Replacement(library.Trainer, "loss", ours)]
    with Patch("Lib", where):
        with pytest.raises(rw.InvalidCall, match=r"Trainer\.loss is patched already"):
            Patch("Lib", [Replacement(library.Trainer, "inherited", ours), *where])
        assert library.Trainer().inherited(1) == "theirs"  # nothing half done
        with Patch("Lib", [Replacement(library.Trainer, "inherited", ours)]):
            assert library.Trainer().inherited(1) == "ours"
    with Patch("Lib", where):
        assert library.Trainer().loss(1) == "ours"


def test_what_another_replaced_on_top_stays(library):
    patch = Patch("Lib", [Replacement(library.Trainer, "loss", ours)])
    library.Trainer.loss = lambda self, inputs: "a third"
    with pytest.warns(UserWarning, match=r"Trainer\.loss was replaced again"):
        patch.undo()
    assert library.Trainer().loss(1) == "a third"


def test_the_original_is_checked_first(library):
    for expected, message in (
        (
            ("self", "batch"),
            r"Trainer\.loss has the signature \(self, inputs, scale=1\), expected \(self, batch, optional",
        ),
        (("self",), "expected"),  # `inputs` is required
    ):
        with pytest.raises(rw.BackendUnavailable, match=message):
            Patch("Lib 1.0", [Replacement(library.Trainer, "loss", ours, expected)])
    with pytest.raises(rw.BackendUnavailable, match=r"Trainer\.los does not exist"):
        Patch("Lib 1.0", [Replacement(library.Trainer, "los", ours)])
    assert library.Trainer().loss(1) == "theirs"
    holder = types.SimpleNamespace(Trainer=library.Trainer, __name__="holder")
    check_signature("Lib 1.0", holder, "Trainer.loss", ("self", "inputs"))
    assert source_digest(library.Trainer.loss) != source_digest(library.Base.inherited)


def test_reasons_are_counted_and_reported_once():
    total = Counts("Lib")
    counts = Counts("Lib", total)
    with pytest.warns(UserWarning, match="leaves this to Lib: a reason") as seen:
        counts.left("a reason")
        counts.left("a reason")
    assert len(seen) == 1
    counts.ran("op")
    assert counts.delegated_calls == total.delegated_calls == {"a reason": 2}
    assert counts.fused_calls == total.fused_calls == {"op": 1}
    counts.clear()
    assert not counts.fused_calls and total.fused_calls
    with pytest.warns(UserWarning):
        counts.left("a reason")


@pytest.mark.parametrize(
    ("version", "standing"),
    [
        ("1.16.0", "tested"),
        ("1.15.3", "between tested ones"),
        ("1.16.1", "newer than any tested"),
        ("1.20.0.dev0+abc", "newer than any tested"),
        ("1.9.0", "older than any tested"),
    ],
)
def test_standing_of_a_version(version, standing):
    assert trainers.named("TRL").standing(version) == standing


def test_standing_where_there_is_no_release():
    assert (
        trainers.named("slime, Miles").standing("0.1")
        == "compared with a transcription of slime 624b824a"
    )


def test_a_newer_version_warns_once(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    monkeypatch.setattr(trainers, "_reported", set())
    with pytest.warns(
        UserWarning, match=r"TRL 99\.0 is newer than any that reweight_ops was tested with"
    ) as seen:
        assert trainers.check_version("TRL") == trainers.check_version("TRL") == "TRL 99.0"
    assert len(seen) == 1
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: trainers.named("TRL").tested[-1]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainers.check_version("TRL")
    with pytest.raises(rw.InvalidCall, match="no integration for 'trl'"):
        trainers.named("trl")


def test_every_integration_asks_for_its_trainers_version():
    """One that has no released version has none to be newer than."""
    from paths import ROOT

    folder = ROOT / "reweight_ops" / "integrations"
    asked = {
        name
        for path in folder.rglob("*.py")
        for name in re.findall(r'check_version\("([^"]+)"\)', path.read_text())
    }
    assert asked >= {t.name for t in trainers.TRAINERS.values() if t.tested} and asked <= set(
        trainers.TRAINERS
    )


def test_every_page_of_a_trainer_exists_and_names_its_hook():
    from paths import ROOT

    for trainer in trainers.TRAINERS.values():
        page = (ROOT / trainer.page).read_text()
        assert trainer.hook.partition(":")[0].partition(" ")[0] in page and all(
            version in page for version in trainer.tested
        ), trainer.name
        assert (
            bool(trainer.tested) != bool(trainer.commit) and trainer.commit.split(" ")[-1] in page
        ), trainer.name
        examples = re.findall(r"`(examples/\w+\.\w+)`", page)
        # a page may name the trainer's own too
        assert any((ROOT / example).exists() for example in examples), trainer.name
