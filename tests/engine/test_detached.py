"""Detached entropies that meet autograd warn once; in every other way they are ordinary
tensors.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch._dynamo

import reweight_ops as rw
from reweight_ops._core import detached
from reweight_ops.testing import make_batch

SPEC = rw.methods.grpo(beta=0.1)
BATCH = make_batch(SPEC, (2, 4), 11)
LOGITS = BATCH.pop("logits").detach()


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    monkeypatch.setattr(detached, "_said", set())


def leaf():
    return LOGITS.clone().requires_grad_()


def policy(**options):
    return rw.policy_loss(leaf(), **BATCH, spec=SPEC, **options)


def said(function):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in found if "differentiable_outputs=True" in str(w.message)]


MEETINGS = {
    "bonus": lambda out: out.loss - 0.01 * out.entropies.mean(),
    "from the right": lambda out: out.entropies.sum() * 0.1 + out.loss,
    "in place": lambda out: (
        torch.zeros((), requires_grad=True).clone().add_(out.entropies.sum()) + out.loss
    ),
    "in a list": lambda out: torch.stack([out.loss, out.entropies[0].max()]).sum(),
    "part of a part": lambda out: (
        out.loss + out.entropies.unbind()[0].topk(2).values.sum() + out.entropies.chunk(2)[1].mean()
    ),
}


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("name", MEETINGS)
def test_a_term_without_a_gradient_is_seen_once(name, plan):
    out = policy(plan=plan)
    (message,) = said(lambda: MEETINGS[name](out))
    assert ".detach() says so" in message
    assert said(lambda: MEETINGS[name](out)) == []


def test_the_line_is_the_caller_s():
    out = policy()
    with pytest.warns(UserWarning, match="differentiable_outputs=True") as found:
        out.loss - out.entropies.mean()
    assert found[0].filename == __file__


def test_distillation():
    out = rw.distillation_loss(leaf(), LOGITS.roll(1, -1))
    assert len(said(lambda: out.loss - out.entropies.mean())) == 1


SILENT = {
    "differentiable": lambda: (lambda out: out.loss - out.entropies.mean())(
        policy(differentiable_outputs=True)
    ),
    "a constant": lambda: (lambda out: out.loss * out.entropies.detach().mean())(policy()),
    "no gradient anywhere": lambda: (
        lambda out: (out.entropies * 2).mean() + out.loss.detach() + out.entropies.max().item()
    )(policy()),
    "under no_grad": lambda: torch.no_grad()(lambda out: out.loss - out.entropies.mean())(policy()),
    "old log-probs of an evaluation": lambda: (
        leaf().sum() * torch.no_grad()(policy)().per_token_logps
    ).sum(),
    "an argument of the next call": lambda: (
        rw.policy_loss(
            leaf(), **{**BATCH, "old_per_token_logps": policy().per_token_logps}, spec=SPEC
        ).loss
    ),
    "a coefficient from a metric": lambda: (lambda out: out.loss * out.metrics["entropy"])(
        policy()
    ),
    "a leaf of its own": lambda: (policy().entropies.requires_grad_() * leaf().sum()).sum(),
}


@pytest.mark.parametrize("name", SILENT)
def test_nothing_is_said_of(name):
    assert said(SILENT[name]) == []


def test_an_argument_of_the_next_call_counts():
    weights = policy().entropies.clamp(max=1)
    a, b = (policy(token_weights=x).loss for x in (weights, weights.detach()))
    assert type(a) is torch.Tensor and torch.equal(a, b)


def test_they_are_ordinary_tensors_otherwise():
    x = policy().entropies
    y = x.detach()
    assert (
        type(y) is torch.Tensor and repr(x) == repr(y) and not x.requires_grad and torch.equal(x, y)
    )
    assert (
        type(x.data) is torch.Tensor
        and (x.numpy() == y.numpy()).all()
        and float(x.sum()) == float(y.sum())
    )
    for copied in (pickle.loads(pickle.dumps(x)), copy.deepcopy(x)):
        assert torch.equal(copied, y)
    file = io.BytesIO()
    torch.save({"entropies": x}, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)["entropies"]) is torch.Tensor


def test_compiled_functions_return_ordinary_ones_and_take_detached_ones():
    torch._dynamo.reset()

    def step(z, weights):
        out = rw.policy_loss(z, **BATCH, spec=SPEC, token_weights=weights)
        return out.loss, out.entropies

    weights = policy().entropies.clamp(max=1).detach()
    loss, entropies = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf(), weights)
    torch.testing.assert_close(loss, step(leaf(), weights)[0])
    assert type(entropies) is torch.Tensor
