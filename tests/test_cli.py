"""The command line, in process."""

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

import reweight_ops as rw
from reweight_ops import cli
from reweight_ops.backends import reference


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


def test_methods_lists_every_method(run):
    out = run("methods").stdout
    assert all(name in out for name in rw.METHODS) and "2503.14476" in out


@pytest.mark.parametrize("name", sorted(rw.METHODS))
def test_show(run, name):
    result = run("show", name)
    assert result.exit_code == 0
    for part in (rw.METHODS[name].full_name, "surrogate", "parameter", "plan"):
        assert part in result.stdout


def test_show_an_unknown_method_is_an_error(run):
    result = run("show", "dappo")
    assert result.exit_code != 0 and "dapo" in result.output


def test_check_passes_and_says_what_was_not_checked(run):
    result = run("check", "--backend", "reference", "--method", "grpo", "--method", "gspo", "--vocab", "101")
    assert result.exit_code == 0 and "6 passed, 0 failed" in result.stdout and "cuda: not checked" in result.stdout


def test_check_fails_on_a_wrong_kernel(run, monkeypatch):
    def wrong(logits, ids, temperature, head, stats, coefs, out):
        reference.token_grad(logits, ids, temperature, head, stats, coefs, out)
        out.mul_(1.01)

    def fused(logits, ids, temperature, head, inputs, program, params, out):
        rows = reference.token_loss_grad(logits, ids, temperature, head, inputs, program, params, out)
        out.mul_(1.01)
        return rows

    broken = rw.backends.base.Backend("cpu", reference._unsupported_reason, reference.token_stats, wrong, fused)
    monkeypatch.setitem(rw.backends.select._loaded, "cpu", broken)
    result = run("check", "--backend", "cpu", "--method", "grpo", "--vocab", "101")
    assert result.exit_code == 1 and "3 failed" in result.stdout and "target column" in result.stdout


def test_check_refuses_unknown_names(run):
    for arguments in (("--backend", "tpu"), ("--method", "dappo"), ("--dtype", "int8")):
        assert isinstance(run("check", *arguments).exception, rw.InvalidCall)
    with pytest.raises(SystemExit) as exit_:
        import sys

        sys.argv = ["reweight-ops", "check", "--method", "dappo"]
        cli.main()
    assert exit_.value.code == 2
