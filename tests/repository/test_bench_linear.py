"""The linear head in the ordinary harness: cases and providers, one file that keeps its
other cases, slow baselines run once; tiny shapes.
"""

import json
import sys

import pytest
import torch

import reweight_ops as rw
from bench import __main__ as harness
from bench import linear, report
from bench.distill import JOBS, TINY_SHAPE, DistillCase, distill_providers
from bench.linear import LinearCase, linear_providers
from bench.measure import Effort, Memory, gate, run_case
from bench.rows import rows_cases, rows_providers

CASES = [LinearCase("linear", 64, 32, 320, "float32", "cpu", zero) for zero in (False, True)]
OURS = ("cpu one_pass", "cpu two_pass")


def bench(monkeypatch, out, *arguments):
    monkeypatch.setitem(harness.SUITES, "linear", lambda device, tiny: CASES)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    command = [
        "bench",
        "--suite",
        "linear",
        "--pages",
        "default",
        "--out",
        str(out),
        "--rounds",
        "2",
        "--quiet",
        "1",
        "--no-plot",
    ]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    harness.main()
    return json.loads((out / "cpu-linear-default-pages.json").read_text())


def test_measures_and_shows(tmp_path, monkeypatch, capsys):
    document = bench(monkeypatch, tmp_path, "--providers", "F.linear,eager", "--no-memory")
    assert [c["name"] for c in document["cases"]] == [c.name for c in CASES]
    for entry in document["cases"]:
        timed = {r["provider"]: r for r in entry["results"] if r["ms"]}
        assert {*OURS, "eager", "F.linear, then policy_loss"} == set(timed)
        assert all(r["gate"] <= 1 and len(r["ms"]) == 2 for r in timed.values())
        assert {len(ms) for ms in entry["limits"].values()} == {2}
        rows = {row["provider"]: row for row in report.rows_of(entry)}
        assert all(
            rows[name]["limit"] == "gemms" and "eager" in rows[name]["against"] for name in OURS
        )
    assert capsys.readouterr().out.count("cpu one_pass") == 2


def test_chunks_of_other_sizes(tmp_path, monkeypatch):
    """They are timed beside the default, and the op gets them."""
    seen, op = [], rw.linear_policy_loss

    def recorded(*args, **options):
        seen.append(options["chunk_rows"])
        return op(*args, **options)

    monkeypatch.setattr(rw, "linear_policy_loss", recorded)
    chosen = ("--providers", "none", "--no-memory", "--skip", "zero", "--chunk-rows", "16", "48")
    (entry,) = bench(monkeypatch, tmp_path, *chosen)["cases"]
    assert [r["provider"] for r in entry["results"] if r["ms"]] == [
        *OURS,
        "cpu chunks of 16",
        "cpu chunks of 48",
    ]
    assert set(seen) == {None, 16, 48}


def test_update_keeps_the_other_cases(tmp_path, monkeypatch):
    first = bench(monkeypatch, tmp_path, "--providers", "none", "--no-memory", "--commit", "first")
    again = bench(
        monkeypatch,
        tmp_path,
        "--providers",
        "none",
        "--no-memory",
        "--commit",
        "second",
        "--update",
        "--skip",
        "zero",
    )
    assert [c["name"] for c in again["cases"]] == [c.name for c in CASES]
    assert [c["commit"] for c in again["cases"]] == ["second", "first"] and again["cases"][
        1
    ] == first["cases"][1]
    alone = bench(monkeypatch, tmp_path, "--providers", "none", "--no-memory", "--skip", "zero")
    assert [c["name"] for c in alone["cases"]] == [CASES[0].name]


def test_a_slow_baseline_is_run_once(capsys):
    """The counted run is the one after the gate, whose memory is also measured; our ops
    are never left out of the rounds.
    """
    chosen = [p for p in linear_providers(("cpu",)) if p.name in ("eager", OURS[0])]
    results, limits, _ = run_case(
        CASES[0], chosen, Effort(rounds=3, slow=0.0, memory=Memory("cpu")), lambda: None
    )
    assert {r.provider: len(r.ms) for r in results} == {"eager": 1, OURS[0]: 3}
    assert all(r.extra_bytes is not None for r in results)
    entry = {
        "case": {"job": "linear"},
        "results": [r.to_json() for r in results],
        "limits": limits,
        "logits_bytes": CASES[0].logits_bytes,
        "gradient_bytes": CASES[0].gradient_bytes,
        "least_flops": CASES[0].least_flops(),
        "name": "x",
        "foreign_load": 0.0,
    }
    once = {row["provider"]: row["once"] for row in report.rows_of(entry)}
    assert once == {"eager": True, OURS[0]: False}
    machine = {"processor": "p", "threads": 1, "huge_pages": False, "torch": "t", "commit": "c"}
    report.print_tables({"machine": machine, "cases": [entry]})
    assert capsys.readouterr().out.count(" once ") == 1


def test_the_gate_refuses_wrong_gradients(monkeypatch):
    """Our op with one gradient off by a tenth, in hidden states or in the weight."""
    data = CASES[0].data()
    value, grads = linear.ours("cpu", "one_pass")(data)()
    assert data.error(False, value, grads) <= 1
    for which in (0, 1):
        bad = tuple(g * 1.1 if i == which else g for i, g in enumerate(grads))
        assert data.error(False, value, bad) > 1


def test_rows_without_advantage_are_spread_over_the_chunks():
    zero = (
        (LinearCase("linear", 2048, 4, 16, "float32", "cpu", True).data().advantages == 0)
        .view(8, 256)
        .float()
        .mean(1)
    )
    assert 0.35 < zero.mean() < 0.45 and (zero < 1).all() and (zero > 0).sum() >= 6


@pytest.mark.parametrize("zero", [False, True])
def test_only_rows_without_advantage_are_dropped(zero):
    """There are clipped rows, but too few to be dropped: the op that is timed against
    three GEMMs of all rows computes all rows.
    """
    data = LinearCase("linear", 2048, 64, 640, "float32", "cpu", zero).data()
    rows = dict(old_per_token_logps=data.old, chunk_rows=256, plan="one_pass")
    out = rw.linear_policy_loss(
        data.hidden, data.weight, data.ids, data.advantages, spec=rw.methods.ppo(0.2), **rows
    )
    metrics = out.metrics.as_floats()
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0
    assert (
        0.4 < metrics["rows_dropped_backward"] / 2048 < 0.45
        if zero
        else metrics["rows_dropped_backward"] == 0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_limits_are_the_three_gemms(dtype):
    case = LinearCase("linear", 64, 32, 320, str(dtype).removeprefix("torch."), "cpu")
    data = case.data()
    z, dh, dw = data.limits()["gemms"]()
    assert torch.equal(z, data.hidden.flatten(0, 1) @ data.weight.t())
    assert torch.equal(dh, z @ data.weight) and torch.equal(dw, z.t() @ data.hidden.flatten(0, 1))
    assert data.limits()["gemms, reused output"]() is None


@pytest.mark.parametrize("job", JOBS)
def test_distillation(job):
    """Every provider passes the gate; a gradient of another divergence does not."""
    case = DistillCase(job, *TINY_SHAPE, "float32", "cpu")
    results, limits, _ = run_case(case, distill_providers(("cpu",)), Effort(rounds=1), lambda: None)
    assert [r.provider for r in results if r.ms] == ["eager", "TRL chunked", *OURS] and len(
        limits["gemms"]
    ) == 1
    other = DistillCase(JOBS[(JOBS.index(job) + 1) % len(JOBS)], *TINY_SHAPE, "float32", "cpu")
    eager = distill_providers(("cpu",))[0]
    assert gate(eager, case.data(), eager.make(other.data())) > 1


@pytest.mark.parametrize("case", rows_cases("cpu", tiny=True), ids=lambda case: case.job)
def test_rows(case):
    """Picked ids, kept sets and statistics: everyone passes the gate, which a gradient
    that is off by a tenth does not.
    """
    results, limits, _ = run_case(case, rows_providers(("cpu",)), Effort(rounds=1), lambda: None)
    assert {r.provider: r.failed or r.wrong for r in results if not r.ms} == {} and len(
        results
    ) >= 2
    entry = {
        "name": case.name,
        "case": {"job": case.job},
        "results": [r.to_json() for r in results],
        "limits": limits,
        "logits_bytes": 1,
    }
    assert all(row["limit"] for row in report.rows_of(entry))
    for provider in (p for p in rows_providers(("cpu",)) if p.serves(case)):
        data = case.data()
        value, grad = provider.make(data)()
        bad = tuple(g * 1.1 for g in grad) if isinstance(grad, tuple) else grad * 1.1
        assert data.error(provider.exact, value, grad) <= 1 < data.error(provider.exact, value, bad)
