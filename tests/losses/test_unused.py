"""Nothing is silently ignored: an argument or option without effect is an error, unless
the caller passes everything.
"""

import math

import pytest
import torch

import reweight_ops as rw

Z, IDS = (
    torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)),
    torch.ones(2, 3, dtype=torch.long),
)
LOGPS, ADVANTAGES = torch.full((2, 3), -1.0), torch.ones(2)

CASES = [
    ("grpo", "ref_per_token_logps", LOGPS, {}),
    ("grpo", "sampling_per_token_logps", LOGPS, {}),
    ("grpo", "segment_ids", IDS, {}),
    ("reinforce", "old_per_token_logps", LOGPS, {}),
    ("sft", "old_per_token_logps", LOGPS, {"advantages": None}),
    ("sft", "advantages", ADVANTAGES, {}),
    ("dapo", "denominator_mask", IDS, {"num_items_in_batch": 5}),
]


@pytest.mark.parametrize(("spec", "name", "value", "more"), CASES)
def test_an_argument_without_effect(spec, name, value, more):  # docs/semantics.md: S28
    call = {"advantages": ADVANTAGES, "spec": spec} | more
    for op, first in ((rw.policy_loss, (Z, IDS)), (rw.policy_loss_from_logps, (LOGPS,))):
        with pytest.raises(rw.InvalidCall, match=f"{name} would have no effect"):
            op(*first, **{**call, name: value})
        ignoring = op(*first, **{**call, name: value}, unused="ignore")
        without = op(
            *first,
            **{"advantages": None, **call}
            if name != "advantages"
            else {**call, "advantages": None},
        )
        assert torch.equal(ignoring.loss, without.loss)
    with pytest.raises(rw.InvalidCall, match="unused is 'drop'"):
        rw.policy_loss(Z, IDS, **call, unused="drop")


def test_arguments_with_effect_pass():
    rw.policy_loss(Z, IDS, ADVANTAGES, spec="dapo", denominator_mask=IDS, old_per_token_logps=LOGPS)
    rw.policy_loss(Z, IDS, ADVANTAGES, spec=rw.methods.trl("grpo"), denominator_mask=IDS)
    rw.policy_loss(Z, IDS, ADVANTAGES, spec=rw.methods.grpo(beta=0.1), ref_per_token_logps=LOGPS)
    rw.policy_loss(Z, IDS, None, spec="npo", ref_per_token_logps=LOGPS)


@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        (rw.methods.trl, "cispo", {"delta": 2.0}),
        (rw.methods.trl, "sapo", {"epsilon": 0.3}),
        (rw.methods.trl, "grpo", {"sapo_temperature_pos": 2.0}),
        (rw.methods.trl, "dapo", {"vespo_k_pos": 1.0}),
        (rw.methods.trl, "dapo", {"vllm_importance_sampling_clip_max": 1.0}),
        (rw.methods.verl, "gspo", {"clip_ratio_c": 4.0}),
        (rw.methods.verl, "gpg", {"clip_ratio": 0.1}),
        (rw.methods.verl, "vanilla", {"tau_neg": 2.0}),
        (rw.methods.verl, "vanilla", {"kl_loss_coef": 0.1}),
        (rw.methods.verl, "sapo", {"loss_agg_mode": "token-sum"}),
        (rw.methods.verl, "bypass_mode", {"rollout_is_threshold": 3.0}),
        (rw.methods.trl, "grpo", {"max_completion_length": 8}),
        (rw.methods.trl, "grpo", {"use_bias_correction_kl": False}),
    ],
)
def test_an_option_without_effect(method, name, options):
    with pytest.raises(rw.InvalidCall, match=f"{next(iter(options))} has no effect"):
        method(name, **options)
    assert method(name, **options, unused="ignore") == method(name)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_positive(value):  # docs/semantics.md: S29
    rows = torch.ones(2, 3)
    rows[1, 2] = value
    for temperature in (torch.tensor(value), rows):
        with pytest.raises(rw.InvalidCall, match="temperature is"):
            rw.token_logps(Z, IDS, temperature=temperature)
    mask = torch.ones(2, 3)
    mask[1, 2] = 0
    assert rw.token_logps(Z, IDS, temperature=rows, completion_mask=mask).isfinite().all()


def test_a_compiled_call_cannot_look_and_answers_nan():
    torch._dynamo.reset()
    rows = torch.ones(2, 3)
    rows[1, 2] = -1.0
    found = torch.compile(
        lambda t: rw.token_logps(Z, IDS, temperature=t), backend="aot_eager", fullgraph=True
    )(rows)
    assert found[1, 2].isnan() and found.isfinite().sum() == 5


X, LOSSES = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda **k: rw.advantages.grpo(X, group_size=2, scale_rewards="none", **k), "epsilon"),
        (lambda **k: rw.advantages.rloo(X, group_size=2, **k), "epsilon"),
        (lambda **k: rw.advantages.aapo(X, X, group_size=2, **k), "epsilon"),
        (lambda **k: rw.advantages.spo_tree(X, torch.tensor([-1, 0]), **k), "epsilon"),
        (
            lambda **k: rw.advantages.gigpo(
                X, X, torch.arange(2), torch.arange(2), group_size=2, num_anchors=2, **k
            ),
            "epsilon",
        ),
        (
            lambda **k: rw.sample_weights.dynamic_loss_reweighting(
                LOSSES, temperature=1.0, strategy="quadratic", **k
            ),
            "delta",
        ),
        (lambda **k: rw.weights.steer(mapping="exponential", **k), "w_max"),
        (lambda **k: rw.weights.steer(mapping="linear", **k), "floor"),
    ],
    ids=[
        "grpo",
        "rloo",
        "aapo",
        "spo_tree",
        "gigpo",
        "dynamic_loss_reweighting",
        "steer",
        "linear steer",
    ],
)
def test_an_option_without_effect_before_the_loss(call, name):
    call()
    with pytest.raises(rw.InvalidCall, match=f"{name} has no effect with"):
        call(**{name: 0.5})
