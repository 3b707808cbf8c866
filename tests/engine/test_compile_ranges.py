"""Numbers that cannot be meant, in specs that a compiled function builds: refused while it is compiled."""

import pytest
import torch
import torch._dynamo

import reweight_ops as rw

Z, IDS = torch.zeros(4, 3, 7), torch.ones(4, 3, dtype=torch.long)
OLD = torch.full((4, 3), -2.0)


def policy(spec):
    return rw.policy_loss(Z, IDS, 1.0, spec=spec, old_per_token_logps=OLD).loss


WRONG = {
    "a method's bound": (lambda: policy(rw.methods.grpo(epsilon_low=-0.2)), "epsilon_low is -0.2, expected a number in"),
    "a rule's": (lambda: policy(rw.PolicyLossSpec(surrogate=rw.rules.surrogates.Clip(epsilon_high=float("nan")))), "epsilon_high is nan"),
    "a weight's": (lambda: policy(rw.methods.dapo().with_weight(rw.weights.AdvantageReweighting(alpha=2.0))), "alpha is 2.0"),
    "a penalty's": (lambda: policy(rw.methods.dapo().with_penalty(rw.Penalty(rw.rules.penalties.EntropyBonus(), "1"))), "coef is '1'"),
    "a reduction's": (lambda: policy(rw.methods.dr_grpo(horizon=-1.0)), "horizon is -1.0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_number_that_cannot_be_meant(name):
    torch._dynamo.reset()
    call, message = WRONG[name]
    with pytest.raises(Exception, match=message):
        torch.compile(lambda: call(), backend="eager", fullgraph=True)()
    with pytest.raises(rw.InvalidCall, match=message):
        call()
