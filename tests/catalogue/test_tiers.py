"""The tiers of the entries: in the record, the table, the CLI and the namespaces."""

from typer.testing import CliRunner

import reweight_ops as rw
from reweight_ops._core.catalogue.registry import CATALOGUE, KINDS
from reweight_ops._core.catalogue.table import by_tier, markdown
from reweight_ops._core.catalogue.tiers import CORE, TIERS
from reweight_ops.cli import app
from reweight_ops.methods.trl import LOSS_TYPES as POLICY_LOSS_TYPES
from reweight_ops.preference.trl import LOSS_TYPES

ENTRIES = [entry for entries in CATALOGUE.values() for entry in entries.values()]


def test_core_entries_exist_and_have_a_formula():
    for kind, names in CORE.items():
        assert names <= set(CATALOGUE[kind])
        assert all(CATALOGUE[kind][name].certainty != "derived" for name in names)


def test_every_entry_has_a_tier():
    assert {entry.tier for entry in ENTRIES} == set(TIERS)
    assert all((e.tier == "derived") == (e.certainty == "derived") for e in ENTRIES)


def test_what_trl_ships_is_core():
    named = set(POLICY_LOSS_TYPES) & set(CATALOGUE["policy_loss"])
    assert len(named) > 5 and named <= CORE["policy_loss"]


def test_what_trl_offers_for_pairs_is_core():
    named = set(LOSS_TYPES) & set(CATALOGUE["pair_loss"])
    assert len(named) > 3 and named <= CORE["pair_loss"]


def test_the_table_and_the_namespace_list_core_first():
    tiers = [entry.tier for entry in by_tier("policy_loss")]
    assert tiers == sorted(tiers, key=list(TIERS).index)
    page = markdown()
    assert page.index("| [`dapo`]") < page.index("| [`awm`]") and "| core |" in page
    for kind, (namespace, _) in KINDS.items():
        doc = getattr(rw, namespace.removeprefix("rw.")).__doc__
        for entry in CATALOGUE[kind].values():
            part = doc[doc.index(f"{entry.tier.capitalize()} (") :].partition("\n\n")[0]
            assert entry.function.__name__ in part


def test_the_cli_filters_by_tier():
    derived = CliRunner().invoke(app, ["methods", "--kind", "policy_loss", "--tier", "derived"])
    assert derived.exit_code == 0 and "awm" in derived.output and "dapo" not in derived.output
    wrong = CliRunner().invoke(app, ["methods", "--tier", "best"])
    assert wrong.exit_code and "core, catalogue, derived" in wrong.output
