"""A hyper-parameter that requires grad has a gradient, or is refused: what is learnt
and never moves looks like a schedule that is stuck.
"""

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.formula.base import RULES
from reweight_ops._core.spec import policy
from reweight_ops.testing import make_batch

LEARNT = torch.tensor(0.4, requires_grad=True)
WEIGHT = rw.weights.AdvantageReweighting(alpha=LEARNT)
K3 = rw.rules.penalties.K3()
GRPO, DISCO = rw.methods.grpo(), rw.methods.disco()

#: What no gradient reaches, to the name in the error.
REFUSED = {
    "a detached weight": (
        lambda: rw.methods.advantage_reweighting(alpha=LEARNT),
        "weights.0.alpha",
    ),
    "one that is added": (lambda: GRPO.with_weight(WEIGHT), "weights.0.alpha"),
    "a weight over the batch": (
        lambda: rw.methods.top_entropy(fraction=LEARNT),
        "weights.0.fraction",
    ),
    "a formula for a number": (
        lambda: rw.methods.grpo(epsilon_high=WEIGHT),
        "clip.epsilon_high.alpha",
    ),
    "a reduction's weight": (
        lambda: GRPO.replace(reduction=rw.TokenMean(weight=WEIGHT)),
        "weight.alpha",
    ),
    "a penalty's reduction": (
        lambda: GRPO.with_penalty(rw.Penalty(K3, 0.1, rw.TokenMean(weight=WEIGHT))),
        "weight.alpha",
    ),
    "a bound beneath a stop": (lambda: rw.methods.cispo(ratio_max=LEARNT), "surrogate.ratio_max"),
    "a bound in a condition": (
        lambda: rw.methods.glm5(epsilon_low=LEARNT),
        "surrogate.epsilon_low",
    ),
    "a constraint": (lambda: DISCO.replace(**{"penalties.0.reduction.bound": LEARNT}), "bound"),
    "a weight of pairs": (
        lambda: rw.preference.dpo().with_weight(
            rw.preference.MarginAdaptive(
                **dict.fromkeys(("c_min", "c_max", "lambda_", "tau"), LEARNT)
            )
        ),
        "weights.0.c_min",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_gradient_reaches_is_refused(name):
    make, path = REFUSED[name]
    with pytest.raises(
        rw.InvalidCall,
        match=rf"{path} requires grad, but no gradient reaches it: .+ Pass .+\.detach\(\)\.",
    ):
        make()


def test_refused_where_a_graph_builds_it():
    torch._dynamo.reset()

    def step(z, x):
        return rw.policy_loss(
            z,
            torch.ones(4, 3, dtype=torch.long),
            1.0,
            spec=rw.methods.reinforce().with_weight(rw.weights.AdvantageReweighting(alpha=x)),
        ).loss

    with pytest.raises(Exception, match="alpha requires grad, but no gradient reaches it"):
        torch.compile(step, fullgraph=True, backend="eager")(
            torch.zeros(4, 3, 7, requires_grad=True), LEARNT
        )


def gradient(make):
    """By the hyper-parameter, of the spec that ``make`` makes of it; None where it is
    refused.
    """
    x = torch.tensor(0.4, requires_grad=True)
    try:
        spec = make(x)
    except rw.InvalidCall as error:
        assert "requires grad" in str(error)
        return None
    batch = make_batch(spec, (6, 8), 11)
    loss = rw.policy_loss(batch.pop("logits"), **batch, spec=spec).loss
    (found,) = torch.autograd.grad(loss, x, allow_unused=True)
    assert found is not None, "neither refused nor moved"
    return found


def own(table):
    return [
        (cls, name)
        for cls in table.values()
        if cls.__module__.startswith("reweight_ops.")
        for name in cls.parameter_names()
    ]


@pytest.mark.parametrize(("cls", "name"), own(RULES), ids=lambda x: getattr(x, "__name__", x))
def test_every_number_of_a_rule_moves_or_is_refused(cls, name):
    if not cls.__ranges__[name].has(LEARNT):
        pytest.skip("takes no tensor")

    def make(x):
        rule = cls(**{name: x})
        return (
            rw.PolicyLossSpec(surrogate=rule)
            if cls.kind != "penalty"
            else GRPO.with_penalty(rw.Penalty(rule, 0.1))
        )

    gradient(make)


def test_what_is_refused_would_have_had_no_gradient(monkeypatch):
    """The other way: with the check taken away, autograd finds none of those."""
    refused = []
    for cls, name in own(RULES):
        if cls.__ranges__[name].has(LEARNT) and cls.kind != "penalty":
            try:
                rw.PolicyLossSpec(surrogate=cls(**{name: LEARNT}))
            except rw.InvalidCall:
                refused.append((cls, name))
    assert len(refused) > 3
    monkeypatch.setattr(policy, "refuse_learnt", lambda spec: None)
    for cls, name in refused:
        spec = rw.PolicyLossSpec(surrogate=cls(**{name: LEARNT}))
        batch = make_batch(spec, (6, 8), 11)
        loss = rw.policy_loss(batch.pop("logits"), **batch, spec=spec).loss
        assert torch.autograd.grad(loss, LEARNT, allow_unused=True) == (None,), (cls, name)
