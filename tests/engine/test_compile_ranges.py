"""Numbers out of range that a compiled function builds or passes are refused during
compilation, with the plain call's message.
"""

import pytest
import torch
import torch._dynamo

import reweight_ops as rw

Z, IDS = torch.zeros(4, 3, 7), torch.ones(4, 3, dtype=torch.long)
OTHER, OLD = torch.full((4, 3, 7), 0.1), torch.full((4, 3), -2.0)
SIGMOID = rw.preference.PairTerm(loss=rw.preference.Sigmoid())


def policy(spec, **options):
    return rw.policy_loss(Z, IDS, 1.0, spec=spec, old_per_token_logps=OLD, **options).loss


def pairs(spec, **options):
    stored = {"ref_per_token_logps": OLD} if "ref" in spec.requires else {}
    return rw.preference_loss(Z, IDS, spec=spec, **stored, **options).loss


WRONG = {
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
