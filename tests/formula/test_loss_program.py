"""A loss program: its text, its graph against fp64 autograd on random rules, its table,
and every backend that evaluates it.
"""

from __future__ import annotations

import math

import pytest
import torch
from built_in import own_rules, own_weights
from random_losses import GIVEN, Drawn, check_one_pass

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import load, unsupported_reason
from reweight_ops._core.formula.loss_program import ONE_PASS, Program, loss_graph
from reweight_ops._core.formula.table import build_table
from reweight_ops._core.formula.text import read_formula, write_formula
from reweight_ops._core.formula.trace import trace_rule, trace_weight, walk
from reweight_ops.errors import InvalidCall
from reweight_ops.rules import RULES, TOKEN_FIELDS, WEIGHTS, Rule, TokenWeight, rule, weight
from reweight_ops.testing import make_batch

STORED_ROWS = ("reference", "cpu")
ONE_PASS_BACKENDS = [
    b
    for b in ("reference", "cpu", "triton")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]


SEEDS = range(40)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["ratio", "given ratio"])
@pytest.mark.parametrize("backend", STORED_ROWS)
def test_random_losses_on_stored_rows(backend, given, dtype):
    """Values, and derivatives by every leaf and row weight."""
    evaluate_rows, judged, asked = load(backend).evaluate_rows, 0, 0
    for seed in SEEDS:
        drawn = Drawn(seed)
        leaves = dict(drawn.leaves)
        if given:
            leaves["log_ratio"] = 0.5 * (leaves["logp"] - leaves["ref_logp"])
        names = loss_graph(drawn.program, given).names
        rows = {name: x.to(dtype) for name, x in leaves.items()}
        got = evaluate_rows(
            drawn.program, drawn.params.to(dtype), rows, drawn.row_weights.to(dtype), names
        )
        assert got.dtype == dtype
        # In fp64 the truth has errors of the size of the bound itself.
        u, slack = (2.0**-24, 1.0) if dtype == torch.float32 else (2.0**-53, 2.0**10)
        judged += drawn.check(got, names, leaves, u, slack)
        asked += got.numel()
    assert judged > 0.6 * asked, "most values are finite and have a bound"


@pytest.mark.parametrize("backend", ONE_PASS_BACKENDS)
def test_random_losses_in_one_pass(backend):
    check_one_pass(load(backend), SEEDS if backend != "triton" else SEEDS[:10])


# --- what a program is ----------------------------------------------------------------


@pytest.mark.parametrize("name", [*own_rules(), *own_weights()])
def test_a_text_is_the_formula(name):
    """Parsed, it is the same graph: the same text again."""
    traced = trace_rule(RULES[name]) if name in own_rules() else trace_weight(WEIGHTS[name])
    program = Program((write_formula(traced),))
    assert Program.decode(program.encode()) == program
    fields = "abcdefgh"[: len(traced.parameters)]
    graph = loss_graph(program)
    numbers = iter(graph.graph.node("param", x) for x in fields)
    again = read_formula(
        program.terms[0],
        graph.graph,
        lambda: next(numbers),
        lambda leaf: graph.graph.node("leaf", leaf),
    )
    assert (
        write_formula(type(traced)(again, traced.leaves, tuple(fields), False)) == program.terms[0]
    )


def redefined(formula):
    return rule("runs_as_redefined")(
        type("RunsAsRedefined", (Rule,), {"loss": lambda self, xp, t: formula(xp, t)})
    )


@pytest.mark.parametrize("backend", ONE_PASS_BACKENDS)
def test_a_rule_defined_again_runs_as_redefined(backend):
    """Two notebook cells define one name: the second formula is the one that runs."""
    z = torch.randn(2, 5, 17, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 17, (2, 5), generator=torch.Generator().manual_seed(1))
    losses = []
    for formula in (lambda xp, t: -t.adv * t.logp, lambda xp, t: -t.adv * xp.exp(t.logp)):
        spec = rw.PolicyLossSpec(surrogate=redefined(formula)())
        out = rw.policy_loss(
            z.clone().requires_grad_(), ids, 1.0, spec=spec, plan="one_pass", backend=backend
        )
        assert out.plan == "one_pass"
        losses.append(out.loss)
    logp = z.log_softmax(-1).gather(-1, ids[..., None])
    torch.testing.assert_close(losses[0], -logp.mean())
    torch.testing.assert_close(losses[1], -logp.exp().mean())


@pytest.mark.parametrize("backend", ONE_PASS_BACKENDS)
def test_seven_terms_and_six_weights_in_one_pass(backend):
    penalties = tuple(
        rw.Penalty(r, 0.01 * (i + 1))
        for i, r in enumerate([rw.rules.penalties.K2(), rw.rules.penalties.K3()] * 3)
    )
    weights = tuple(
        rw.weights.AdvantageReweighting(alpha=0.1 * (i + 1), scope=("all", "surrogate")[i % 2])
        for i in range(6)
    )
    spec = rw.PolicyLossSpec(
        surrogate=rw.rules.surrogates.Clip(), penalties=penalties, weights=weights
    )
    batch = make_batch(spec, (2, 5), 33)
    results = {}
    for plan in ("one_pass", "two_pass"):
        z = batch["logits"].detach().clone().requires_grad_()
        out = rw.policy_loss(**{**batch, "logits": z}, spec=spec, plan=plan, backend=backend)
        out.loss.backward()
        results[plan] = out.loss.detach(), z.grad
    torch.testing.assert_close(results["one_pass"], results["two_pass"], rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("backend", STORED_ROWS)
def test_a_weight_of_zero_selects_zero(backend):
    """Where the rule is infinite or NaN too; and a row that is not kept is zero in
    every output.
    """
    big = rule("overflows")(
        type("Overflows", (Rule,), {"loss": lambda self, xp, t: xp.exp(t.adv) * t.logp})
    )
    off = weight("chosen")(
        type("Chosen", (TokenWeight,), {"weight": lambda self, xp, t, batch: t.entropy})
    )
    program = Program.of((big,), ((off, "all"),))
    n = 6
    leaves = {name: torch.full((n,), -1.0) for name in GIVEN}
    leaves["adv"] = torch.tensor([1000.0, 1000.0, 1000.0, math.nan, 0.0, 0.0])
    leaves["entropy"] = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    row_weights = torch.tensor([[1.0, 1.0, 0.0, 1.0, 2.0, 3.0]])
    keep = torch.tensor([True, True, True, True, True, False])
    names = ("weighted_loss", "loss", "d_logp", "d_adv", "d_w0")
    got = load(backend).evaluate_rows(
        program, torch.tensor([-20.0, 20.0, 1.0]), leaves, row_weights, names, keep
    )
    assert (
        (got[0, 0].isinf())
        and (got[:, 1] == 0).all()
        and (got[:4, 2] == 0).all()
        and (got[:, 3] == 0).all()
    )
    assert got[:, 4].tolist() == [-2.0, -1.0, 2.0, -2.0, -1.0] and (got[:, 5] == 0).all()


@pytest.mark.parametrize("backend", STORED_ROWS)
def test_a_log_prob_that_is_nan_has_a_nan_derivative(backend):
    """Whatever a comparison makes of it; and a NaN of the old log-prob passes the clamp
    of the ratio.
    """
    program = Program.of(("clip",))
    params = torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, math.inf])
    leaves = {
        "logp": torch.tensor([math.nan, -1.0]),
        "old_logp": torch.tensor([-1.0, math.nan]),
        "adv": torch.ones(2),
    }
    got = load(backend).evaluate_rows(
        program, params, leaves, torch.ones(1, 2), ("weighted_loss", "d_logp"), None
    )
    assert got[:, 0].isnan().all() and got[0, 1].isnan()
    unselected = load(backend).evaluate_rows(
        program, params, leaves, torch.zeros(1, 2), ("weighted_loss", "d_logp", "own0"), None
    )
    assert (unselected == 0).all()


@pytest.mark.parametrize("backend", STORED_ROWS)
def test_stored_rows_refuse_what_they_do_not_know(backend):
    evaluate_rows = load(backend).evaluate_rows
    program, params = Program.of(("clip",)), torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, math.inf])
    leaves = {name: torch.zeros(3) for name in ("logp", "old_logp", "adv")}
    with pytest.raises(InvalidCall, match="no output 'd_advantage'"):
        evaluate_rows(program, params, leaves, torch.ones(1, 3), ("d_advantage",), None)
    with pytest.raises(InvalidCall, match="no output 'd_w1'"):
        evaluate_rows(program, params, leaves, torch.ones(1, 3), ("d_w1",), None)
    if backend == "reference":
        return
    cases = {
        "reads old_logp, but the call did not give it": lambda: evaluate_rows(
            program, params, {"logp": torch.zeros(3), "adv": torch.zeros(3)}, torch.ones(1, 3)
        ),
        "adv is": lambda: evaluate_rows(
            program, params, leaves | {"adv": torch.zeros(4)}, torch.ones(1, 3)
        ),
        "logp is": lambda: evaluate_rows(
            program, params, leaves | {"logp": torch.zeros(3).double()}, torch.ones(1, 3)
        ),
        "row weights are": lambda: evaluate_rows(program, params, leaves, torch.ones(2, 3)),
        "params is": lambda: evaluate_rows(program, params[:5], leaves, torch.ones(1, 3)),
        "params are": lambda: evaluate_rows(program, params.half(), leaves, torch.ones(1, 3)),
        "keep is": lambda: evaluate_rows(
            program, params, leaves, torch.ones(1, 3), ONE_PASS, torch.ones(3)
        ),
    }
    for message, call in cases.items():
        with pytest.raises(InvalidCall, match=message):
            call()


# --- the table ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_level_writes_nothing_that_it_reads(seed):
    """Nor twice, nor before its operands are there: the lanes of a warp may take its
    operations in any order.
    """
    graph = loss_graph(Drawn(seed).program)
    table = build_table(graph, graph.names)
    first = table.inputs + len(TOKEN_FIELDS) + table.rows
    known = {*range(table.parameters + len(table.constants)), *range(table.inputs, first)}
    begin = 0
    for end in table.levels:
        level = table.instructions[begin:end]
        read, written = {r for i in level for r in i.operands}, [i.out for i in level]
        assert read <= known and not read & {*written} and len({*written}) == len(written)
        assert not {*written} & {
            *range(table.parameters + len(table.constants)),
            *range(table.inputs, first),
        }
        known |= {*written}
        begin = end
    assert (
        begin == len(table.instructions)
        and {*table.outputs} <= known
        and max(known) < table.registers
    )


def test_registers_are_used_again():
    table = build_table(loss_graph(Program.of(("clip", "k3", "entropy_bonus"))))
    values = len(table.instructions) - table.uniform
    between = table.registers - table.inputs - len(TOKEN_FIELDS) - table.rows
    assert between < 0.5 * values
    assert len(walk(loss_graph(Program.of(("clip",)))["loss"])) > 10
