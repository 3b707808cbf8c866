"""Tracing: what is recorded, what is refused and how, and derivatives against autograd
on generated formulas.
"""

from __future__ import annotations

import gc
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_formulas import ExactSlopes
from running_error import evaluate, no_tie

from reweight_ops._core.formula.base import DIFFERENTIABLE_FIELDS
from reweight_ops._core.formula.derive import derive, value
from reweight_ops._core.formula.namespace import FUNCTIONS, TorchNamespace
from reweight_ops._core.formula.trace import Graph, TracedNamespace, trace_rule, trace_weight, walk
from reweight_ops.rules import RULES, TOKEN_FIELDS, Rule, TokenWeight, rule, weight


def rule_of(formula, **fields):
    """A rule class whose loss is ``formula(xp, t, self)``."""
    namespace = {
        "__annotations__": dict.fromkeys(fields, float),
        "loss": lambda self, xp, t: formula(xp, t, self),
        **fields,
    }
    return rule("made_in_a_test")(type("Made", (Rule,), namespace))


def test_the_namespaces_have_the_same_names():
    names = {n for n in dir(TracedNamespace(Graph())) if not n.startswith("_")}
    assert (
        names
        == set(FUNCTIONS)
        == {n for n in dir(TorchNamespace(torch.float64)) if not n.startswith("_")} - {"dtype"}
    )


def test_equal_expressions_are_one_node():
    traced = trace_rule(rule_of(lambda xp, t, s: xp.exp(t.logp) * 2 + xp.exp(t.logp) * 2))
    a, b = traced.result.args
    assert a is b
    assert len(walk(traced.result)) == 5


def test_only_leaves_that_reach_the_result_count():
    def formula(xp, t, s):
        xp.exp(t.entropy)
        return xp.where(t.adv > 0, t.logp, xp.stop_gradient(t.ref_logp))

    assert trace_rule(rule_of(formula)).leaves == {"adv", "logp", "ref_logp"}


def test_parameters_are_symbols_and_settings_are_not():
    @weight("made_in_a_test")
    class Made(TokenWeight):
        SETTINGS = ("scope", "detach", "power")
        power: int = 3
        a: float = 5.0

        def weight(self, xp, t, batch):
            return self.helper(xp, t) ** self.power

        def helper(self, xp, t):
            return self.a * t.adv

    traced = trace_weight(Made)
    assert traced.parameters == ("a",)
    assert repr(traced.result) == "mul(mul(mul(a, adv), mul(a, adv)), mul(a, adv))"


def test_super_and_inherited_fields():
    class Child(RULES["clip"]):
        scale: float = 2.0

        def loss(self, xp, t):
            return self.scale * super().loss(xp, t)

    traced = trace_rule(rule("made_in_a_test")(Child))
    assert traced.parameters == ("epsilon_low", "epsilon_high", "delta", "scale")
    assert repr(traced.result).startswith("mul(scale, neg(min(")


def test_batch_weights_are_recognised_and_their_operands_are_read():
    @weight("made_in_a_test")
    class Made(TokenWeight):
        def weight(self, xp, t, batch):
            return t.adv - batch.quantile(t.entropy, q=0.8)

    traced = trace_weight(Made)
    assert traced.uses_batch
    assert traced.leaves == {"adv", "entropy"}
    assert not trace_rule(RULES["clip"]).uses_batch


def test_a_redefined_class_is_traced_anew_and_the_old_one_is_collected():
    old = rule_of(lambda xp, t, s: t.logp)
    trace_rule(old)
    gone = weakref.ref(old)
    new = rule_of(lambda xp, t, s: t.entropy)
    assert trace_rule(new).leaves == {"entropy"}
    assert trace_rule(new) is trace_rule(new)
    del old
    gc.collect()
    assert gone() is None


REFUSED = {
    "math": (lambda xp, t: math.exp(t.logp), TypeError, "xp has: exp"),
    "torch": (lambda xp, t: torch.exp(t.logp), TypeError, r"torch\.exp .* use xp\.exp"),
    "torch under another name": (
        lambda xp, t: torch.clamp(t.logp, 0, 1),
        TypeError,
        r"use xp\.clip",
    ),
    "a tensor": (lambda xp, t: torch.ones(3) * t.logp, TypeError, "Tensor"),
    "torch.where": (lambda xp, t: torch.where(t.adv > 0, 1.0, 0.0), TypeError, r"use xp\.where"),
    "numpy": (lambda xp, t: np.log1p(t.logp), TypeError, r"numpy\.log1p .* use xp\.log1p"),
    "numpy.where": (lambda xp, t: np.where(t.adv > 0, 1, 2), TypeError, r"use xp\.where"),
    "an array": (lambda xp, t: np.asarray(t.logp), TypeError, "numpy on a traced value"),
    "if": (lambda xp, t: 1.0 if t.adv > 0 else 2.0, TypeError, r"use xp\.where"),
    "and": (lambda xp, t: xp.where(t.adv > 0 and t.logp < 0, 1.0, 0.0), TypeError, "& | ~"),
    "min": (lambda xp, t: min(t.adv, t.logp), TypeError, r"xp\.minimum"),
    "a method": (lambda xp, t: t.logp.exp(), AttributeError, r"use xp\.exp"),
    "an unknown function": (lambda xp, t: xp.softplus(t.logp), AttributeError, r"no xp\.softplus"),
    "an unknown leaf": (lambda xp, t: t.advantage, AttributeError, "it has: logp"),
    "a condition as a number": (lambda xp, t: (t.adv > 0) * t.logp, TypeError, r"use xp\.where"),
    "a number as a condition": (
        lambda xp, t: xp.where(t.adv, 1.0, 0.0),
        TypeError,
        "expected a condition",
    ),
    "a fractional power": (lambda xp, t: t.logp**0.5, TypeError, r"xp\.exp\(n"),
    "nothing": (lambda xp, t: None, TypeError, "NoneType"),
    "a condition as the loss": (lambda xp, t: t.adv > 0, TypeError, "condition"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_kernel_cannot_do_is_refused_with_the_way_out(case):
    formula, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        trace_rule(rule_of(lambda xp, t, s: formula(xp, t)))
    assert "Made" in str(caught.value)


def test_a_value_of_an_earlier_trace_is_refused():
    kept = []
    trace_rule(rule_of(lambda xp, t, s: kept.append(t.logp) or t.logp))
    with pytest.raises(TypeError, match="earlier call"):
        trace_rule(rule_of(lambda xp, t, s: t.adv * kept[0]))


def test_numpy_scalars_are_numbers():
    assert (
        repr(trace_rule(rule_of(lambda xp, t, s: np.float64(2) * t.logp)).result)
        == "mul(2.0, logp)"
    )


# --- derivatives ----------------------------------------------------------------------


def leaf_values(n: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(n, generator=g, dtype=torch.float64) for name in TOKEN_FIELDS}
    for value_ in values.values():
        value_[torch.rand(n, generator=g) < 0.1] = 0.0  # ties and kinks
    return values


def autograd(cls: type[Rule], values: dict[str, torch.Tensor], **fields: float):
    """The loss in fp64 torch and its derivative by every differentiable leaf."""
    leaves = {k: v.clone().requires_grad_(k in DIFFERENTIABLE_FIELDS) for k, v in values.items()}
    loss = cls(**fields).loss(ExactSlopes(torch.float64), SimpleNamespace(**leaves))
    loss = torch.as_tensor(loss, dtype=torch.float64).expand_as(values["logp"])
    if not loss.requires_grad:
        return loss, {k: torch.zeros_like(loss) for k in DIFFERENTIABLE_FIELDS}
    grads = torch.autograd.grad(
        loss.sum(),
        [leaves[k] for k in DIFFERENTIABLE_FIELDS],
        allow_unused=True,
        materialize_grads=True,
    )
    return loss.detach(), dict(zip(DIFFERENTIABLE_FIELDS, grads, strict=True))


numbers = st.sampled_from(
    [f"t.{leaf}" for leaf in (*DIFFERENTIABLE_FIELDS, "adv")] * 2
    + ["s.a", "1.5", "-0.25", "2", "0.0", "1"]
)


def _grow(children):
    unary = st.sampled_from(
        ["exp", "expm1", "log", "log1p", "sigmoid", "tanh", "abs", "stop_gradient"]
    )
    condition = st.tuples(children, st.sampled_from(["<", "<=", ">", ">="]), children).map(
        lambda c: f"({c[0]} + 0 * t.adv {c[1]} {c[2]})"
    )
    conditions = (
        condition
        | st.tuples(condition, st.sampled_from("&|"), condition).map(
            lambda c: f"({c[0]} {c[1]} {c[2]})"
        )
        | condition.map("~{}".format)
    )
    return (
        st.tuples(children, st.sampled_from(["+", "-", "*", "/"]), children).map(
            lambda c: f"({c[0]} {c[1]} {c[2]})"
        )
        | st.tuples(unary, children).map(lambda c: f"xp.{c[0]}({c[1]} + 0 * t.adv)")
        | children.map("(-{})".format)
        | st.tuples(st.sampled_from(["minimum", "maximum"]), children, children).map(
            lambda c: f"xp.{c[0]}({c[1]} + 0 * t.adv, {c[2]})"
        )
        | st.tuples(children, children | st.just("-0.5"), children | st.just("s.a")).map(
            lambda c: f"xp.clip({c[0]} + 0 * t.adv, {c[1]}, {c[2]})"
        )
        | st.tuples(conditions, children, children).map(
            lambda c: f"xp.where({c[0]}, {c[1]}, {c[2]})"
        )
    )


@settings(max_examples=300, deadline=None)
@given(st.recursive(numbers, _grow, max_leaves=10), st.integers(0, 2**16))
def test_generated_formulas_have_the_derivative_of_autograd(source, seed):
    # "+ 0 * t.adv" here and in _grow: torch functions take no Python numbers, so each
    # gets a tensor.
    text = f"({source}) + 0 * t.adv"
    formula = eval(f"lambda xp, t, s: {text}")
    try:
        cls = rule_of(formula, a=0.75)
        truth, slopes = autograd(cls, values := leaf_values(64, seed))
    except ZeroDivisionError:
        return  # of literal numbers
    try:
        traced = trace_rule(cls)
    finally:
        RULES.pop("made_in_a_test", None)
    environment = {**values, "a": torch.tensor(0.75, dtype=torch.float64)}
    usable = no_tie(traced, environment) & truth.isfinite()
    roots = [value(traced), *derive(traced).values()]
    # Autograd multiplies the same factors in another order: its error is of the size of
    # the bound, not below it.
    for (got, bound), want in zip(
        evaluate(roots, environment, u=2.0**-53), [truth, *slopes.values()], strict=True
    ):
        ok = usable & want.isfinite() & bound.isfinite()
        assert got[ok].isfinite().all()
        assert ((got - want).abs()[ok] <= 2.0**10 * bound[ok]).all(), (text, traced.result)


def test_a_branch_not_taken_gives_no_nan():
    """Torch agrees on the value and, with selects last, on the slope; 0 * inf must not
    appear.
    """
    cases = {
        "log of a zero that a select hides": lambda xp, t, s: xp.where(
            t.logp > 0, xp.log(xp.where(t.logp > 0, t.logp, 0.0)), 0.0
        ),
        "exp of a constant that overflows": lambda xp, t, s: (
            1 / xp.exp(xp.where(t.logp > 0, 800.0, t.logp))
        ),
        "division by a clipped zero": lambda xp, t, s: xp.where(
            t.logp > 0, 1 / xp.clip(t.logp, 0.0, 9.0), 0.0
        ),
        "a sum of two hidden slopes": lambda xp, t, s: (
            1 / xp.exp(xp.where(t.logp > 0, 800.0, t.logp) + xp.where(t.logp > -0.5, 0.0, t.logp))
        ),
    }
    values = leaf_values(512, 0)
    for name, formula in cases.items():
        traced = trace_rule(rule_of(formula))
        for got, _ in evaluate([traced.result, *derive(traced).values()], values):
            assert not got.isnan().any(), name


@pytest.mark.parametrize("x", [-100.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 100.0])
@pytest.mark.parametrize("function", ["sigmoid", "tanh", "expm1", "exp"])
def test_slopes_keep_their_digits_in_the_tails(function, x):
    """Evaluated in fp32 arithmetic (bound by running error), every slope is relatively
    accurate: none is 1 - almost 1.
    """
    traced = trace_rule(rule_of(lambda xp, t, s: getattr(xp, function)(t.logp)))
    at = torch.tensor([x], dtype=torch.float64)
    got, bound = evaluate([derive(traced)["logp"]], dict.fromkeys(TOKEN_FIELDS, at))[0]
    exact = {
        "sigmoid": 1 / (2 + 2 * math.cosh(x)),
        "tanh": 1 / math.cosh(x) ** 2,
        "expm1": math.exp(x),
        "exp": math.exp(x),
    }[function]
    assert math.isclose(got.item(), exact, rel_tol=1e-12)
    assert bound.item() <= 64 * 2.0**-24 * exact + 2.0**-120


def test_conventions_at_kinks():
    """abs has slope 0 at 0 and a clip passes the gradient on its bounds, in torch and
    here.
    """
    for formula in (lambda xp, t, s: xp.abs(t.logp), lambda xp, t, s: xp.clip(t.logp, -1.0, 1.0)):
        values = {
            k: torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64) for k in TOKEN_FIELDS
        }
        cls = rule_of(formula)
        assert torch.equal(
            evaluate([derive(trace_rule(cls))["logp"]], values)[0][0],
            autograd(cls, values)[1]["logp"],
        )


@pytest.mark.parametrize("name", ["minimum", "maximum"])
def test_an_extremum_of_nan_has_a_slope_of_nan(name):
    """The first argument has the slope. The second is the bound of a clip."""

    def formula(xp, t, s):
        return getattr(xp, name)(t.logp * t.adv, xp.clip(t.logp, -1.0, 1.0) * t.adv)

    values = {k: torch.full((2,), 2.0, dtype=torch.float64) for k in TOKEN_FIELDS}
    values["adv"] = torch.tensor([math.nan, -1.0], dtype=torch.float64)
    cls = rule_of(formula)
    (slope, _), *_ = evaluate([derive(trace_rule(cls))["logp"]], values)
    torch.testing.assert_close(slope, autograd(cls, values)[1]["logp"], equal_nan=True)
    assert slope[0].isnan() and slope[1].isfinite()


def test_k3_has_an_accurate_slope_at_small_differences():
    """exp(d) - 1 by expm1: a KL penalty is read mostly near d = 0."""
    traced = trace_rule(RULES["k3"])
    assert any(x.op == "expm1" for x in walk(derive(traced)["logp"]))
    assert not any(x.op == "exp" for x in walk(derive(traced)["logp"]))


def test_the_straight_through_idiom_loses_no_digits():
    traced = trace_rule(RULES["k1_straight_through"])
    assert repr(value(traced)) == "sub(logp, ref_logp)"
