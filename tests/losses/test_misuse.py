"""Wrong parts and names: each error names what was meant."""

import dataclasses

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.catalogue.registry import CATALOGUE, KINDS
from reweight_ops._core.formula.base import RULES, WEIGHTS

Z, IDS = torch.zeros(1, 2, 4), torch.tensor([[1, 2]])
LOGPS = torch.full((1, 2), -1.0)
CLIP, WEIGHT = rw.methods.grpo().surrogate, rw.weights.AdvantageReweighting()
PENALTY = rw.methods.grpo(beta=0.1).penalties[0]


def policy(**k):
    return rw.policy_loss(Z, IDS, 1.0, **{"spec": "grpo", **k})


class Bare(rw.Rule):
    x: float = 1.0

    def loss(self, xp, t):
        return -t.adv * t.logp * self.x


class BareWeight(rw.TokenWeight):
    def weight(self, xp, t, batch):
        return xp.exp(t.logp)


class Derived(type(CLIP)):
    """Without its own decorator it would count as a clip."""

    def loss(self, xp, t):
        return -t.adv * t.logp


INVALID = {
    "a rule without its decorator": (lambda: Bare(x=2.0), "Bare is not registered yet: write @rw.rule above its class"),
    "without arguments": (lambda: policy(spec=rw.PolicyLossSpec(surrogate=Bare())), "Bare is not registered yet"),
    "a weight without its decorator": (lambda: rw.methods.grpo().with_weight(BareWeight()), "BareWeight is not registered yet: write @rw.weight above"),
    "a rule derived from another": (lambda: Derived(epsilon_low=0.1), "Derived is not registered yet"),
    "the base itself": (rw.Rule, "Rule is not registered yet"),
    "weights, one": (lambda: rw.PolicyLossSpec(surrogate=CLIP, weights=WEIGHT), r"weights is a AdvantageReweighting, expected a tuple: weights=\(weight,\)"),
    "weights, a list": (lambda: rw.PolicyLossSpec(surrogate=CLIP, weights=[WEIGHT]), r"weights is a list, expected a tuple: weights=tuple\(weights\)"),
    "weights replaced": (lambda: rw.methods.grpo().replace(weights=WEIGHT), "weights is a AdvantageReweighting, expected a tuple"),
    "penalties, one": (lambda: rw.PolicyLossSpec(surrogate=CLIP, penalties=PENALTY), r"penalties is a Penalty, expected a tuple: penalties=\(penalty,\)"),
    "a class for a weight": (lambda: rw.methods.grpo().with_weight(rw.weights.TopEntropy), r"It is a class: write TopEntropy\(\.\.\.\)"),
    "a class for a rule": (lambda: rw.PolicyLossSpec(surrogate=type(CLIP)), r"It is a class: write Clip\(\.\.\.\)"),
    "terms, one": (lambda: rw.PairSpec(terms=rw.preference.dpo().terms[0]), r"terms is a PairTerm, expected a tuple: terms=\(term,\)"),
    "spec of a pair loss by name": (lambda: policy(spec="dpo"), r"'dpo' is a loss of pairs: rw.preference_loss\(\.\.\., spec='dpo'\)"),
    "a loss type of TRL": (lambda: policy(spec="bnpo"), r"a trainer's name: write rw.methods.trl\('bnpo'\)"),
    "a loss mode of verl": (lambda: policy(spec="vanilla"), r"a trainer's name: write rw.methods.verl\(\)"),
    "a pair loss type of TRL": (lambda: rw.preference_loss(Z, IDS, spec="sigmoid"), r"write rw.preference.trl\('sigmoid'\)"),
    "a pair loss that is not called": (lambda: rw.preference_loss(Z, IDS, spec=rw.preference.dpo), r"call it, dpo\(\.\.\.\)\. The names are: "),
    "a weight as the spec": (lambda: policy(spec=rw.weights.TopEntropy()), r"with_weight\(\.\.\.\)"),
    "columns of a sampler": (lambda: rw.SamplingMask.from_logits(Z, vocab_size=2.0), "vocab_size is 2.0"),
    "a list among statistics": (lambda: rw.token_stats(Z, IDS, stats=([],)), r"stats is \(\[\],\)"),
    "spec of a pair loss": (lambda: policy(spec=rw.preference.dpo()), "spec is a PairSpec, which rw.preference_loss takes"),
    "a method that has no default": (lambda: policy(spec="dro"), r"'dro' has no default for beta: pass spec=rw.methods.dro\(beta=\.\.\.\)"),
    "a switch, a word": (lambda: policy(drop_last="no"), "drop_last is 'no', expected True or False"),
    "a switch, a number": (lambda: policy(validate=1), "validate is 1, expected True or False"),
    "a switch of its own": (lambda: policy(differentiable_outputs="no"), "differentiable_outputs is 'no', expected True or False"),
    "return_entropy": (lambda: rw.token_logps(Z, IDS, return_entropy="no"), "return_entropy is 'no', expected True or False"),
    "compact_rows": (lambda: rw.linear_token_logps(Z, torch.zeros(4, 4), IDS, compact_rows="no"), "compact_rows is 'no', expected True or False or None"),
    "log_sum_p_sq that nothing reads": (lambda: rw.policy_loss_from_logps(LOGPS, 1.0, spec="grpo", log_sum_p_sq=LOGPS), "log_sum_p_sq would have no effect"),
    "spec in capitals": (lambda: policy(spec="GRPO"), "Did you mean 'grpo'"),
    "a method not called": (lambda: policy(spec=rw.methods.grpo), r"It is a function: call it, grpo\(\.\.\.\)"),
    "a weight for a spec": (lambda: policy(spec=WEIGHT), "expected a PolicyLossSpec or the name"),
    "a pair loss, a loss of tokens by name": (lambda: rw.preference_loss(Z, IDS, spec="grpo"), r"'grpo' is a loss of tokens: rw.policy_loss\(\.\.\., spec='grpo'\)"),
    "a pair loss, a loss of tokens": (lambda: rw.preference_loss(Z, IDS, spec=rw.methods.grpo()), "spec is a PolicyLossSpec, which rw.policy_loss takes"),
    "a pair method not called": (lambda: rw.preference_loss(Z, IDS, spec=rw.preference.dpo), r"call it, dpo\(\.\.\.\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_what_was_meant(name):
    call, message = INVALID[name]
    with pytest.raises(rw.InvalidCall, match=message):
        call()


NAMES = {
    "epsilon of grpo": (lambda: rw.methods.grpo(epsilon=0.2), r"grpo\(\) got .*'epsilon'. Here it is epsilon_low and epsilon_high"),
    "clip_eps of dapo": (lambda: rw.methods.dapo(clip_eps=0.2), "Here it is epsilon_low and epsilon_high"),
    "kl_coef of grpo": (lambda: rw.methods.grpo(kl_coef=0.2), "Here it is beta"),
    "a letter": (lambda: rw.weights.AdvantageReweighting(alfa=0.2), r"AdvantageReweighting\(\) got .*'alfa'. Did you mean alpha"),
    "of a method without any": (lambda: rw.methods.gpg(epsilon=0.2), r"gpg\(\) got .*'epsilon'. It takes none"),
    "of a class without any near": (lambda: rw.weights.TopEntropy(zzz=0.2), "It takes scope, detach, fraction"),
    "of a spec": (lambda: rw.SequenceMean(length=3), r"SequenceMean\(\) got"),
    "by name": (lambda: rw.method("grpo", epsilon=0.2), "Here it is epsilon_low and epsilon_high"),
    "trl": (lambda: rw.methods.trl(epsilon_low=0.2), r"trl\(\) got .*'epsilon_low'. Did you mean epsilon"),
    "input_ids": (lambda: rw.policy_loss(Z, input_ids=IDS, advantages=1.0, spec="grpo"), r"policy_loss\(\) got .*'input_ids'. Here it is completion_ids"),
    "labels": (lambda: rw.token_logps(Z, labels=IDS), r"token_logps\(\) got .*'labels'. Here it is completion_ids"),
    "advantage besides": (lambda: policy(advantage=IDS), "Here it is advantages"),
    "bias of a head": (lambda: rw.linear_token_logps(Z, Z[0], IDS, bias=Z), "Here it is lm_head_bias"),
    "labels besides": (lambda: policy(labels=IDS), "Here it is completion_ids"),
    "hidden_states": (lambda: rw.linear_token_logps(hidden_states=Z, lm_head_weight=torch.zeros(3, 4), completion_ids=IDS), "Here it is hidden"),
    "log_probs": (lambda: rw.policy_loss_from_logps(log_probs=LOGPS, advantages=1.0, spec="grpo"), "Here it is per_token_logps"),
    "mask": (lambda: policy(mask=IDS), r"policy_loss\(\) got .*'mask'. Here it is completion_mask"),
    "clip_eps": (lambda: policy(clip_eps=0.2), r"Here it is spec=methods.grpo\(epsilon_low=..., epsilon_high=...\)"),
    "nothing near": (lambda: rw.policy_loss(Z, IDS, 1.0), "missing 1 required keyword-only argument: 'spec'"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_others(name):
    call, message = NAMES[name]
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_catalogue_lists_under_a_namespace_is_in_it(kind):
    module = rw
    for part in KINDS[kind][0].split(".")[1:]:
        module = getattr(module, part)
    for name, entry in CATALOGUE[kind].items():
        assert getattr(module, name) is entry.function
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


def test_decorated_classes_are_what_they_were(registry):
    """One line above the class suffices; the class's own ``__init__`` stays."""
    assert dataclasses.is_dataclass(
        rw.rule("bare_rule")(
            type(
                "BareRule",
                (rw.Rule,),
                {"loss": Bare.loss, "x": 1.0, "__annotations__": {"x": float}},
            )
        )
    )
    assert RULES["bare_rule"](x=3.0).x == 3.0

    @rw.weight("own_weight")
    class Own(rw.TokenWeight):
        def weight(self, xp, t, batch):
            return xp.exp(t.logp)

    assert (
        WEIGHTS["own_weight"]().scope == "surrogate"
        and rw.methods.grpo().with_weight(Own(scope="all")).weights[0].scope == "all"
    )


def test_a_lora_as_a_plain_tuple():
    """The type of the keyword allows it."""
    a, b = torch.ones(2, 4), torch.ones(4, 2)
    for lora in (rw.Lora(a, b, 0.5), (a, b, 0.5)):
        found = rw.linear_token_logps(Z, torch.eye(4), IDS, lora=lora)
        teacher = rw.HiddenLogits(Z, torch.eye(4), lora=lora)
        assert rw.linear_token_divergence(Z, torch.eye(4), teacher).shape == found.shape


def test_explain_says_what_was_meant_too():
    with pytest.raises(TypeError, match="'input_ids'. Here it is completion_ids"):
        rw.explain(rw.policy_loss, Z, input_ids=IDS, advantages=1.0, spec="grpo")
