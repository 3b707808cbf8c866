"""What stands where a part of a spec is wanted and is none: each error says what was
meant.
"""

import pytest
import torch

import reweight_ops as rw

RULES, WEIGHTS, PAIRS = rw.rules, rw.weights, rw.preference
CLIP, K3 = RULES.surrogates.Clip, RULES.penalties.K3
GRPO = rw.methods.grpo()


def spec(**fields):
    return rw.PolicyLossSpec(**{"surrogate": CLIP(), **fields})


WRONG = {
    "a penalty's rule by name": (
        lambda: rw.Penalty("k3", 0.01),
        "Write rw.rules.RULES['k3'](...).",
    ),
    "a penalty's rule misspelt": (
        lambda: rw.Penalty("K33", 0.01),
        "Write rw.rules.RULES['k3'](...).",
    ),
    "a penalty's rule as class": (lambda: rw.Penalty(K3, 0.01), "It is a class: write K3(...)."),
    "a coefficient first": (
        lambda: rw.Penalty(0.01, K3()),
        "Penalty: rule is 0.01, expected a Rule.",
    ),
    "a weight for a rule": (
        lambda: rw.Penalty(WEIGHTS.TopEntropy(fraction=0.5), 0.1),
        "expected a Rule",
    ),
    "a penalty's reduction as class": (
        lambda: rw.Penalty(K3(), 0.01, rw.TokenMean),
        "It is a class: write TokenMean(...).",
    ),
    "a penalty's reduction by name": (
        lambda: rw.Penalty(K3(), 0.01, "token_mean"),
        "Write rw.TokenMean(...).",
    ),
    "a bare rule as penalty": (lambda: GRPO.with_penalty(K3()), "Write rw.Penalty(K3(...), coef)."),
    "its class": (lambda: GRPO.with_penalty(K3), "Write rw.Penalty(K3(...), coef)."),
    "its name": (
        lambda: GRPO.with_penalty("k3"),
        "Write rw.Penalty(rw.rules.RULES['k3'](), coef).",
    ),
    "a name that is not text": (
        lambda: spec(name=3),
        "PolicyLossSpec: name is 3, expected a string or None.",
    ),
    "a pair loss's name that is none": (
        lambda: PAIRS.dpo().replace(name=b"dpo"),
        "PairSpec: name is b'dpo', expected a string or None.",
    ),
    "a surrogate by name": (lambda: spec(surrogate="clip"), "Write rw.rules.RULES['clip'](...)."),
    "a surrogate as class": (lambda: spec(surrogate=CLIP), "It is a class: write Clip(...)."),
    "a surrogate replaced by name": (
        lambda: GRPO.replace(surrogate="cispo"),
        "Write rw.rules.RULES['cispo'](...).",
    ),
    "a weight by name": (
        lambda: spec(weights=("top_entropy",)),
        "Write rw.weights.TopEntropy(...).",
    ),
    "a weight as class": (
        lambda: GRPO.with_weight(WEIGHTS.TopEntropy),
        "It is a class: write TopEntropy(...).",
    ),
    "a reduction by name": (lambda: spec(reduction="token_mean"), "Write rw.TokenMean(...)."),
    "a reduction as class": (
        lambda: spec(reduction=rw.TokenMean),
        "It is a class: write TokenMean(...).",
    ),
    "a reduction that is nowhere": (
        lambda: spec(reduction="zzz"),
        "A name is none: the classes are rw.FromFunction(...)",
    ),
    "a ratio by name": (lambda: spec(ratio="sequence"), "Write rw.SequenceRatio(...)."),
    "a ratio as class": (
        lambda: spec(ratio=rw.SequenceRatio),
        "It is a class: write SequenceRatio(...).",
    ),
    "a reduction's weight by name": (
        lambda: rw.TokenMean(weight="top_entropy"),
        "Write rw.weights.TopEntropy(...).",
    ),
    "a reduction's weight as class": (
        lambda: rw.SequenceMean(weight=WEIGHTS.TopEntropy),
        "It is a class: write TopEntropy(...).",
    ),
    "a reducer that is none": (
        lambda: rw.FromFunction("mean"),
        "fn is 'mean', expected a function",
    ),
    "a pair loss by name": (
        lambda: PAIRS.PairTerm(loss="sigmoid"),
        "Write rw.preference.Sigmoid(...).",
    ),
    "a pair loss as class": (
        lambda: PAIRS.dpo().with_term(PAIRS.Sigmoid),
        "It is a class: write Sigmoid(...).",
    ),
    "a bare pair loss": (
        lambda: PAIRS.PairSpec(terms=(PAIRS.Sigmoid(),)),
        "Write rw.preference.PairTerm(loss=..., coef=...).",
    ),
    "a pair score by name": (
        lambda: PAIRS.dpo().replace(score="log_ratio"),
        "Write rw.preference.LogRatio(...).",
    ),
    "a pair score as class": (
        lambda: PAIRS.dpo().replace(score=PAIRS.LogRatio),
        "It is a class: write LogRatio(...).",
    ),
    "a pair weight by name": (
        lambda: PAIRS.dpo().with_weight("margin_adaptive"),
        "Write rw.preference.MarginAdaptive(...).",
    ),
    "a pair weight as class": (
        lambda: PAIRS.dpo().with_weight(PAIRS.MarginAdaptive),
        "It is a class: write MarginAdaptive(...).",
    ),
    "a text for a switch": (
        lambda: WEIGHTS.TopEntropy(fraction=0.5, detach="no"),
        "detach is 'no', expected True or False.",
    ),
    "a text for a reduction's switch": (
        lambda: rw.TokenMean(per_call="no"),
        "per_call is 'no', expected True or False.",
    ),
    "a number for a method's switch": (
        lambda: PAIRS.ipo(average=0),
        "average is 0, expected True or False.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_error_says_what_was_meant(name):
    make, message = WRONG[name]
    with pytest.raises(rw.InvalidCall) as error:
        make()
    assert message in str(error.value)


def test_every_name_that_an_error_gives_is_there():
    """The names of the hints, not only those of the cases above."""
    from reweight_ops._core.formula.base import WEIGHTS as REGISTERED
    from reweight_ops._core.spec import pair_parts, ratio, reduction

    own = [cls for cls in REGISTERED.values() if cls.__module__.startswith("reweight_ops.")]
    assert all(getattr(rw.weights, cls.__name__) is cls for cls in own)
    kinds = (
        (rw, ratio.Ratio),
        (rw, reduction.Reduction),
        *[(PAIRS, k) for k in (pair_parts.Score, pair_parts.PairLoss, pair_parts.PairWeight)],
    )
    for where, kind in kinds:
        waiting = [kind]
        while waiting:
            below = [
                cls
                for cls in waiting.pop().__subclasses__()
                if cls.__module__.startswith("reweight_ops.")
            ]
            named = [cls for cls in below if not cls.__name__.startswith("_")]
            assert all(getattr(where, cls.__name__) is cls for cls in named)
            waiting += below
    with pytest.raises(rw.InvalidCall, match=r"the classes are") as error:
        rw.PolicyLossSpec(surrogate=rw.methods.dapo().surrogate, reduction="nothing alike")
    assert "GroupContrast" in str(error.value) and "._" not in str(error.value)


def test_a_rule_for_a_spec():
    with pytest.raises(rw.InvalidCall, match=r"Of a rule it is rw.PolicyLossSpec\(surrogate=...\)"):
        rw.policy_loss(torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.long), 1.0, spec=CLIP())
