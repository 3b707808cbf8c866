"""``reweight-ops check`` of ops outside the catalogue covers everything that heads and
statistics can be asked for, and a wrong number fails.
"""

import dataclasses

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import load, unsupported_reason
from reweight_ops._core.engine.distillation import GENERALIZED_JSD
from reweight_ops._core.losses import documented, explain
from reweight_ops.testing import checks
from reweight_ops.testing.golden_ops import GOLDEN_OPS, ROWS
from reweight_ops.testing.ops import OPS, STATISTICS

BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]
#: Ops whose methods are catalogue entries, with a comparison of their own for each; and
#: those that only read log-probs.
ELSEWHERE = {
    "token_logps",
    "policy_loss_from_logps",
    "preference_loss",
    "preference_loss_from_logps",
    "linear_preference_loss",
}
#: Keyword, or type of one, to what of its name an op's cases have.
KEYWORDS = {
    "selected_ids": "selected_logps", "top_k": "topk_logps", "sampling_mask": "sampling_mask", "entropy_over": "entropy_over vocabulary", "teacher": "teacher",
    "differentiable_inputs": "differentiable_inputs", "temperature": "by temperature", "TopKLogps": "TopKLogps", "kind": GENERALIZED_JSD,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_passes(op, backend, dtype):
    for what in OPS[op]:
        found = checks.run_case(checks.Case(backend, op, dtype, "cpu", checks.OP, what), 37)
        assert found.passed, (what, found)


def test_every_op_is_compared_and_has_golden_rows():
    """Beside the modules, which are called as ops are."""
    ops = {op.__name__ for op in explain.PREPARED} - ELSEWHERE
    assert (
        {*ops, "FusedLinearLogProbs", "FusedLinearPolicyLoss"}
        == set(OPS)
        == set(GOLDEN_OPS)
        == {row.name for row in ROWS}
    )


@pytest.mark.parametrize("op", ["token_stats", "linear_token_stats"])
def test_every_statistic_is_compared_has_golden_rows_and_is_explained(op):
    assert set(STATISTICS) <= set(OPS[op])
    assert set(STATISTICS) == {
        name for row in ROWS if row.name == op for name in row.arguments["stats"]
    }
    ids, logits = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 5)
    first = (logits,) if op == "token_stats" else (torch.zeros(2, 3, 4), torch.zeros(5, 4))
    for name in STATISTICS:
        more = (
            {"top_k": 2}
            if name.startswith("topk")
            else {"selected_ids": ids[..., None]}
            if name == "selected_logps"
            else {}
        )
        found = rw.explain(getattr(rw, op), *first, ids, stats=(name,), **more)
        assert found.plan == "two_pass" and found.backends["reference"] is None
        assert f"``{name}``" in rw.TokenStats.__doc__


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_every_keyword_is_documented_and_compared(keyword):
    assert keyword in documented.KEYWORDS or keyword in rw.__all__
    assert any(KEYWORDS[keyword] in what for whats in OPS.values() for what in whats)
    written = {name: value for row in ROWS for name, value in row.arguments.items()}
    used = {value.function.__name__ for value in written.values() if hasattr(value, "function")}
    assert keyword in written or keyword in used, "no golden row"


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", GENERALIZED_JSD, "TopKLogps"])
def test_every_divergence_is_compared_from_hidden_states(kind):
    assert kind in OPS["linear_token_divergence"] and kind in OPS["linear_distillation_loss"]


def test_a_wrong_gradient_fails(monkeypatch):
    """A part in 100,000 of every element, in fp32."""

    def wrong(logits, ids, temperature, softmax, stats, derivatives, out):
        load("reference").token_grad(logits, ids, temperature, softmax, stats, derivatives, out)
        out.mul_(1 + 1e-5)

    monkeypatch.setitem(
        select._loaded, "cpu", dataclasses.replace(load("reference"), name="cpu", token_grad=wrong)
    )
    for op in ("token_stats", "linear_token_stats", "FusedLinearLogProbs"):
        what = "selected_logps" if "stats" in op else ""
        assert not checks.run_case(
            checks.Case("cpu", op, "float32", "cpu", checks.OP, what), 37
        ).passed


def test_wrong_picked_ids_fail(monkeypatch):
    monkeypatch.setattr(
        "reweight_ops._core.engine.picked_ops.top_ids",
        lambda z, ids, k, softmax: torch.arange(k).expand(ids.numel(), k),
    )
    for what in ("topk_ids", "topk_logps"):
        assert not checks.run_case(
            checks.Case("reference", "token_stats", "float32", "cpu", checks.OP, what), 37
        ).passed


def test_a_sum_of_two_gradients_is_rounded_once(monkeypatch):
    """A policy loss with a teacher in 16 bits: where each part is rounded first, the
    criterion sees it.
    """
    from reweight_ops._core.engine.linear import measures, works

    case = checks.Case(
        "reference", "linear_policy_loss", "float16", "cpu", checks.OP, "teacher, one_pass"
    )
    plain = measures.wide_blocks

    def narrow(logits):
        for rows, wide in plain(logits):
            yield rows, wide._replace(values=wide.values.to(logits.values.dtype))

    monkeypatch.setattr(works, "wide_blocks", narrow)
    assert not checks.run_case(case, 101).passed
