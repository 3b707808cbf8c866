"""The command line, in process."""

import dataclasses
import sys

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

import reweight_ops as rw
from bench import __main__ as harness
from reweight_ops import cli
from reweight_ops._core.backends import reference_token as reference
from reweight_ops._core.backends import select
from reweight_ops._core.backends.select import load
from reweight_ops._core.catalogue.registry import CATALOGUE
from reweight_ops.integrations.trainers import TRAINERS
from reweight_ops.testing import checks, make_batch
from reweight_ops.testing import pairs as testing_pairs
from reweight_ops.testing.batches import LEAST_VOCAB


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(cli, "console", cli.Console(width=200))

    def invoke(*arguments):
        return CliRunner().invoke(cli.app, list(arguments))

    return invoke


def test_info_names_versions_and_every_backend_with_its_reason(run):
    result = run("info")
    assert result.exit_code == 0 and rw.__version__ in result.stdout
    assert all(name in result.stdout for name in rw.BACKENDS) and "available" in result.stdout


def test_version(run):
    result = run("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, f"reweight-ops {rw.__version__}")


def test_bench_hands_over_everything(run, monkeypatch):
    """It also has its own help. In an installation the module is part of the package; a
    test of the wheel runs that one.
    """
    monkeypatch.setitem(sys.modules, "reweight_ops.bench.__main__", harness)
    result = run("bench", "--help")
    assert (
        result.exit_code == 0
        and result.stdout.startswith("usage: reweight-ops bench")
        and "reweight-ops bench --suite pair" in result.stdout
    )
    result = run("bench", "--only", "nothing", "--skip", "fp16", "--tiny")
    assert (
        result.exit_code == 1
        and "no case matches --only nothing --skip fp16; the cases" in result.output
    )


def test_methods_lists_every_method(run):
    out = run("methods").stdout
    assert all(name in out for name in rw.METHODS) and "2503.14476" in out


@pytest.mark.parametrize("name", sorted(rw.METHODS))
def test_show(run, name):
    result = run("show", name)
    assert result.exit_code == 0
    for part in (rw.METHODS[name].full_name, "surrogate", "parameter", "plan"):
        assert part in result.stdout


def test_show_has_the_weights_in_its_table(run):
    """At a ratio of 2 and p = 0.5 the old probability is 0.25: the weight is 0.3·0.25 +
    0.7.
    """
    out = run("show", "advantage_reweighting").stdout
    assert "surrogate times advantage_reweighting of one token" in " ".join(out.split())
    row = next(line for line in out.splitlines() if line.startswith("│ 2 "))
    assert "-0.9300" in row and "+1.5500" in row
    assert "the weight top_entropy is not in this table" in " ".join(
        run("show", "top_entropy").stdout.split()
    )


@pytest.mark.parametrize("name", ["AdvantageReweighting", "SurprisalReweighting", "Relift"])
def test_show_finds_a_class(run, name):
    result = run("show", name)
    assert result.exit_code == 0 and f".{name}" in result.stdout


def test_show_an_unknown_method_is_an_error(run):
    result = run("show", "dappo")
    assert result.exit_code != 0 and "dapo" in result.output


def test_check_passes_and_says_what_was_not_checked(run):
    result = run(
        "check", "--backend", "reference", "--method", "grpo", "--method", "gspo", "--vocab", "101"
    )
    # Two losses in three dtypes, one of them also with two kinds of sampling masks, and
    # the advantage of the same name.
    assert (
        result.exit_code == 0
        and "13 passed, 0 failed" in result.stdout
        and "cuda: not checked" in result.stdout
    )
    result = run(
        "check",
        "--backend",
        "reference",
        "--method",
        "grpo",
        "--kind",
        "policy_loss",
        "--vocab",
        "101",
    )
    assert (
        result.exit_code == 0
        and "9 passed, 0 failed" in result.stdout
        and "golden" not in result.stdout
    )


def test_check_says_which_vocabularies_it_takes(run):
    """So few columns that a batch means nothing are refused at once, and the fewest
    that it takes pass.
    """
    for vocab in ("1", "0", "-3"):
        result = run("check", "--vocab", vocab)
        assert (
            result.exit_code == 2
            and "--vocab" in result.output
            and "Traceback" not in result.output
        )
    arguments = (
        "--backend",
        "reference",
        "--method",
        "grpo",
        "--method",
        "dpo",
        "--method",
        "token_divergence",
        "--vocab",
    )
    result = run("check", *arguments, str(LEAST_VOCAB))
    assert result.exit_code == 0 and " 0 failed" in result.stdout
    with pytest.raises(rw.InvalidCall, match=f"at least {LEAST_VOCAB} columns"):
        make_batch(rw.methods.grpo(), vocab=1)


def test_check_runs_every_entry(run):
    """One entry of every kind except the divergences that are composites of others, and
    every op (tests/repository/test_check_ops.py).
    """
    selection = checks.Selection(("reference",), dtypes=("float32",))
    names = [(case.kind, case.method) for case in checks.cases(selection)] + [
        (c.kind, c.name) for c in checks.golden_cases(selection)
    ]
    assert {n for n in names if n[0] not in ("divergence", checks.OP)} == {
        (k, n) for k in CATALOGUE if k != "divergence" for n in CATALOGUE[k]
    }
    assert (
        names.count(("divergence", "token_divergence")) == 2
        and names.count(("advantage", "grpo")) == 1 + torch.cuda.is_available()
    )
    kinds = run("check", "--kind", "schedule", "--kind", "objective")
    assert (
        kinds.exit_code == 0
        and "golden rows" in kinds.stdout
        and "hypervolume" in kinds.stdout
        and "backend" not in kinds.stdout
    )


@pytest.mark.parametrize("name", sorted(CATALOGUE["pair_loss"]))
def test_check_passes_every_pair_loss(name):
    for dtype in ("float32", "bfloat16"):
        found = checks.run_case(checks.Case("reference", name, dtype, "cpu", "pair_loss"), 101)
        assert found.passed, found


@pytest.mark.parametrize("kind", checks.DIRECTIONS)
def test_check_passes_the_divergences(kind):
    found = checks.run_case(
        checks.Case("reference", "token_divergence", "bfloat16", "cpu", "divergence", kind), 101
    )
    assert found.passed, found


def test_check_fails_on_a_wrong_golden_row(run, monkeypatch):
    wrong = [
        dataclasses.replace(row, expected=[2, -1, -1 + 1e-9]) if row.name == "rloo" else row
        for row in checks.GOLDEN
    ]
    monkeypatch.setattr(checks, "GOLDEN", tuple(wrong))
    result = run("check", "--kind", "advantage")
    assert (
        result.exit_code == 1
        and "1 failed" in result.stdout
        and "failed advantage rloo float64" in result.stdout
    )
    monkeypatch.setattr(checks, "GOLDEN", ())
    assert run("check", "--method", "rloo").exit_code == 1, "an entry without a row"


@pytest.mark.parametrize("method", ["dpo", "wpo", "sparse_po"])
def test_check_fails_on_a_wrong_gradient_of_pairs(run, monkeypatch, method):
    """A part in 100,000 of every element, in fp32, by the backend under check alone."""

    def wrong(logits, ids, temperature, softmax, stats, derivatives, out):
        reference.token_grad(logits, ids, temperature, softmax, stats, derivatives, out)
        out.mul_(1 + error)

    broken = dataclasses.replace(load("reference"), name="cpu", token_grad=wrong)
    monkeypatch.setitem(select._loaded, "cpu", broken)
    arguments = (
        "check",
        "--backend",
        "cpu",
        "--kind",
        "pair_loss",
        "--method",
        method,
        "--vocab",
        "101",
        "--dtype",
        "float32",
    )
    error = 0.0
    assert run(*arguments).exit_code == 0
    error = 1e-5
    result = run(*arguments)
    assert (
        result.exit_code == 1
        and f"failed cpu pair_loss {method} float32" in result.stdout
        and "column" in result.stdout
    )


@pytest.mark.parametrize("fault", ["value", "gradient"])
def test_check_fails_on_a_wrong_divergence(monkeypatch, fault):
    original, calls = testing_pairs.token_divergence, []

    def wrong(logits, *args, **options):
        calls.append(options["backend"])
        if len(calls) > 1:  # the backend under check is called first, then the truth
            return original(logits, *args, **options)
        value = original(logits, *args, **options)
        return value * (1 + 1e-5) if fault == "gradient" else value + 1e-4 * value.detach().max()

    monkeypatch.setattr(testing_pairs, "token_divergence", wrong)
    case = checks.Case(
        "reference", "token_divergence", "float32", "cpu", "divergence", "forward_kl"
    )
    found = checks.run_case(case, 101)
    assert not found.passed and (found.grad > 1) == (fault == "gradient") and len(calls) == 3


def test_check_fails_on_a_wrong_kernel(run, monkeypatch):
    def wrong(logits, ids, temperature, softmax, stats, derivatives, out):
        reference.token_grad(logits, ids, temperature, softmax, stats, derivatives, out)
        out.mul_(1.01)

    def fused(logits, ids, temperature, softmax, inputs, program, params, out):
        rows = reference.token_loss_grad(
            logits, ids, temperature, softmax, inputs, program, params, out
        )
        out.mul_(1.01)
        return rows

    def packed(rows, stats, derivatives, out):
        load("reference").packed_grad(rows, stats, derivatives, out)
        out.mul_(1.01)

    broken = dataclasses.replace(
        load("reference"), name="cpu", token_grad=wrong, token_loss_grad=fused, packed_grad=packed
    )
    monkeypatch.setitem(select._loaded, "cpu", broken)
    result = run("check", "--backend", "cpu", "--method", "grpo", "--vocab", "101")
    assert (
        result.exit_code == 1
        and "9 failed" in result.stdout
        and "target column" in result.stdout
        and "golden" not in result.stdout
    )


def test_check_refuses_unknown_names(run):
    for arguments in (
        ("--backend", "tpu"),
        ("--method", "dappo"),
        ("--dtype", "int8"),
        ("--kind", "loss"),
        ("--kind", "reward", "--method", "grpo"),
    ):
        assert isinstance(run("check", *arguments).exception, rw.InvalidCall)
    with pytest.raises(SystemExit) as exit_:
        sys.argv = ["reweight-ops", "check", "--method", "dappo"]
        cli.main()
    assert exit_.value.code == 2


def test_trainers_lists_versions_and_hooks(run, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    out = run("trainers").stdout
    for trainer in TRAINERS.values():
        assert trainer.name in out and trainer.page in out
    assert "newer than any tested" in out
