"""Numbers out of range that a compiled function builds or passes are refused during
compilation, with the plain call's message. A number that changes is refused too.
"""

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

import reweight_ops as rw

Z, IDS = torch.zeros(4, 3, 7), torch.ones(4, 3, dtype=torch.long)
OTHER, OLD = torch.full((4, 3, 7), 0.1), torch.full((4, 3), -2.0)
SIGMOID = rw.preference.PairTerm(loss=rw.preference.Sigmoid())


def policy(spec, **options):
    return rw.policy_loss(Z, IDS, 1.0, spec=spec, old_per_token_logps=OLD, **options).loss


def pairs(spec, **options):
    stored = {"ref_per_token_logps": OLD} if "ref" in spec.requires else {}
    return rw.preference_loss(Z, IDS, spec=spec, **stored, **options).loss


LEARNT = torch.tensor(0.5, requires_grad=True)


def adaptive(tau):
    return rw.preference.MarginAdaptive(c_min=0.5, c_max=2.0, lambda_=1.0, tau=tau)


WRONG = {
    "a pair weight's tensor": (
        lambda: pairs(rw.preference.dpo().with_weight(adaptive(LEARNT))),
        "weights.0.tau requires grad, but no gradient reaches it: weights are detached",
    ),
    "a method's bound": (
        lambda: policy(rw.methods.grpo(epsilon_low=-0.2)),
        "epsilon_low is -0.2, expected a number in",
    ),
    "a rule's": (
        lambda: policy(
            rw.PolicyLossSpec(surrogate=rw.rules.surrogates.Clip(epsilon_high=float("nan")))
        ),
        "epsilon_high is nan",
    ),
    "a weight's": (
        lambda: policy(rw.methods.dapo().with_weight(rw.weights.AdvantageReweighting(alpha=2.0))),
        "alpha is 2.0",
    ),
    "a penalty's": (
        lambda: policy(
            rw.methods.dapo().with_penalty(rw.Penalty(rw.rules.penalties.EntropyBonus(), "1"))
        ),
        "coef is '1'",
    ),
    "a reduction's": (lambda: policy(rw.methods.dr_grpo(horizon=-1.0)), "horizon is -1.0"),
    "a ratio's": (
        lambda: policy(rw.methods.dapo().replace(ratio=rw.TokenRatio(clamp=-3.0))),
        "clamp is -3.0",
    ),
    "a ratio's pair": (
        lambda: policy(rw.methods.dapo().replace(ratio=rw.TokenRatio(clamp=(0.0, "1")))),
        "clamp is .0.0, '1'., expected",
    ),
    "pairs": (
        lambda: pairs(rw.preference.dpo(beta=-1.0)),
        "dpo: beta is -1.0, expected a number in",
    ),
    "pairs, replaced": (
        lambda: pairs(rw.preference.dpo().replace(beta=-1.0)),
        "PairSpec: beta is -1.0",
    ),
    "a list of one": (
        lambda: pairs(rw.preference.PairSpec(terms=(SIGMOID,), group_size=1)),
        "group_size is 1, expected a whole number",
    ),
    "a pair loss's": (
        lambda: pairs(rw.preference.dpo().with_term(rw.preference.Sigmoid(label_smoothing=-2.0))),
        "label_smoothing is -2.0",
    ),
    "a pair term's": (
        lambda: pairs(rw.preference.dpo().with_term(rw.preference.Sigmoid(), "1")),
        "coef is '1'",
    ),
    "a pair score's": (lambda: pairs(rw.preference.dpo(ld_alpha=3.0)), "ld_alpha is 3.0"),
    "scale of pairs": (lambda: pairs(rw.preference.dpo(), loss_scale=-1.0), "loss_scale is -1.0"),
    "a scale": (
        lambda: policy("dapo", loss_scale=-1.0),
        "loss_scale is -1.0, expected a number in",
    ),
    "no number": (lambda: policy("dapo", loss_scale=True), "loss_scale is True"),
    "a divisor": (lambda: policy("dapo", num_items_in_batch=-1), "num_items_in_batch is -1"),
    "a temperature": (lambda: policy("dapo", temperature=0.0), "temperature is 0.0"),
    "a soft cap": (lambda: policy("dapo", softcap=-3.0), "softcap is -3.0"),
    "a mixture": (
        lambda: rw.token_divergence(Z, OTHER, kind="generalized_jsd", beta=2.0).sum(),
        "beta is 2.0",
    ),
    "another temperature": (
        lambda: rw.token_divergence(Z, OTHER, other_temperature=-1.0).sum(),
        "other_temperature is -1.0",
    ),
    "a teacher's": (
        lambda: rw.distillation_loss(Z, OTHER, teacher_temperature=-1.0).loss,
        "teacher_temperature is -1.0",
    ),
    "a composite's": (
        lambda: rw.divergences.kd(Z, OTHER, IDS, alpha=2.0).sum(),
        "kd: alpha is 2.0",
    ),
    "an advantage's": (lambda: rw.advantages.gae(OLD, OLD, OLD, gamma=2.0), "gae: gamma is 2.0"),
    "a keyword": (lambda: policy("dapo", chunk_rows=1), "unexpected keyword argument 'chunk_rows'"),
    "a method's keyword": (
        lambda: policy(rw.methods.grpo(clip_eps=0.1)),
        "unexpected keyword argument 'clip_eps'. Here it is epsilon_low",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_number_that_cannot_be_meant(name):
    torch._dynamo.reset()
    call, message = WRONG[name]
    with pytest.raises(Exception, match=message):
        torch.compile(lambda: call(), backend="eager", fullgraph=True)()
    with pytest.raises((rw.InvalidCall, TypeError), match=message):
        call()


#: Functions of a number, a value of it out of range, and the message. Before, the
#: number is 1.5 and then 1.25, which makes it an input of the graph.
LATER = {
    "a method's": (lambda x: policy(rw.methods.grpo(epsilon_low=x)), -0.2, "epsilon_low is -0.2"),
    "an open bound": (lambda x: policy("dapo", temperature=x), 0.0, "temperature is 0.0"),
    "an upper bound": (
        lambda x: rw.token_divergence(Z, OTHER, kind="generalized_jsd", beta=x / 2).sum(),
        2.0,
        r"beta is 1.0, expected a number in \(0, 1\)",
    ),
    "NaN": (lambda x: policy("dapo", loss_scale=x), float("nan"), "loss_scale is nan"),
    "a whole number": (
        lambda x: policy(rw.methods.dr_grpo(horizon=int(4 * x))),
        -1.0,
        "horizon is -4, expected a number in",
    ),
    "a count": (lambda x: policy("dapo", vocab_size=int(4 * x)), -1.0, "vocab_size is -4"),
    "a ratio's pair": (
        lambda x: policy(rw.methods.dapo().replace(ratio=rw.TokenRatio(clamp=(-1.0, x)))),
        float("nan"),
        "clamp is .-1.0, nan.",
    ),
    "pairs": (lambda x: pairs(rw.preference.dpo(beta=x)), -1.0, "dpo: beta is -1.0"),
    "a composite's": (
        lambda x: rw.divergences.kd(Z, OTHER, IDS, alpha=x / 2).sum(),
        4.0,
        "kd: alpha is 2.0",
    ),
    "another temperature": (
        lambda x: rw.token_divergence(Z, OTHER, other_temperature=x).sum(),
        -1.0,
        "other_temperature is -1.0",
    ),
}


#: A case takes seconds to trace. The others are slow tests.
USUAL = ("a method's", "an upper bound", "NaN", "a count")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.slow) for n in LATER]
)
def test_a_number_that_leaves_its_range_later(name):
    """It is an input of the graph by then. A number in range compiles nothing again."""
    torch._dynamo.reset()
    call, wrong, message = LATER[name]
    counter = CompileCounter()
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for x in (1.5, 1.25, 1.75):
        torch.testing.assert_close(compiled(x), call(x))
    frames = counter.frame_count
    for attempt in (compiled, compiled, call):
        with pytest.raises(Exception, match=message):
            attempt(wrong)
    torch.testing.assert_close(compiled(1.625), call(1.625))
    assert counter.frame_count == frames == 2


def test_a_number_that_is_an_input_at_once():
    """Where all numbers are dynamic, the first value is an input too."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda n: policy("dapo", vocab_size=n), backend="eager", fullgraph=True, dynamic=True
    )
    compiled(5)
    with pytest.raises(Exception, match="vocab_size is 6.5, expected a whole number"):
        compiled(6.5)


@pytest.mark.slow
def test_a_number_that_leaves_its_range_in_the_compilers_own_code():
    """Inductor turns inputs into tensors. The comparison remains a guard."""
    torch._dynamo.reset()
    z = Z.clone().requires_grad_()

    def step(x):
        return rw.token_logps(z, IDS, temperature=x).sum()

    compiled = torch.compile(step, fullgraph=True)
    for x in (1.5, 1.25):
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x), z), torch.autograd.grad(step(x), z)
        )
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(1.75)
    with pytest.raises(Exception, match="temperature is -1.0, expected a number in"):
        compiled(-1.0)
