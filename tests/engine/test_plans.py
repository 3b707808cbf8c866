"""Plans and the reference: gradcheck passes in fp64, one pass equals two passes, and
every result meets the criterion.
"""

import dataclasses
import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.backends.select import load
from reweight_ops.testing import compare, gradcheck, make_batch

METHODS = sorted(rw.METHODS)
EXTRA = {
    "grpo_k3": rw.methods.grpo(beta=0.04, entropy_coef=0.01),
    "corrected_kl": rw.methods.trl("dapo", beta=0.04, entropy_coef=0.01),
    "four_terms": rw.methods.dapo()
    .with_penalty(rw.Penalty(rw.rules.penalties.K1(), 0.1))
    .with_penalty(rw.Penalty(rw.rules.penalties.K2(), 0.1))
    .with_penalty(rw.Penalty(rw.rules.penalties.EntropyBonus(), 0.01)),
    "two_weights": rw.methods.advantage_reweighting().with_weight(
        rw.weights.ProbabilityBand(upper=0.5)
    ),
    "truncated_is": rw.methods.grpo().with_weight(rw.weights.TruncatedImportance()),
    "masked_is": rw.methods.grpo().with_weight(rw.weights.MaskedImportance(ratio_min=0.5)),
    "sequence_is": rw.methods.grpo().with_weight(
        rw.weights.SequenceMaskedImportance(ratio_max=math.inf)
    ),
    "segment": rw.methods.gspo().replace(ratio=rw.SegmentRatio()),
    "current_ar_exact": rw.methods.grpo().with_weight(
        rw.weights.CurrentAdvantageReweighting(detach=False)
    ),
    "ar_sigmoid": rw.methods.advantage_reweighting(mode="sigmoid", negative_weight=0.5),
    "ar_balanced": rw.methods.advantage_reweighting(mode="balanced_sigmoid"),
    "ar_interval": rw.methods.advantage_reweighting(mode="interval", interval=(0.25, 0.9)),
    "raft_linear": rw.methods.advantage_reweighting(mode="raft_linear"),
    "spo_mean": rw.methods.ppo().replace(
        reduction=rw.TokenMean(weight=rw.weights.spo_probability_mask())
    ),
    "tsa": rw.methods.sft().with_weight(rw.weights.TrainingSignalAnnealing(threshold=0.5)),
    "f_distill": rw.methods.reinforce().with_weight(rw.weights.f_distill("forward_kl")),
    "sft_term": rw.methods.dapo().with_penalty(rw.Penalty(rw.rules.likelihood.NLL(), 0.1)),
    "steer": rw.methods.dapo().with_weight(rw.weights.steer("linear")),
    "stare": rw.methods.dapo().with_weight(rw.weights.SurprisalReweighting(damp=0.9)),
    "verl_kl": rw.methods.verl("vanilla", use_kl_loss=True, kl_loss_type="k3+", entropy_coeff=0.01),
}
SPECS = {name: rw.METHODS[name].build() for name in METHODS} | EXTRA
ONE_PASS = [name for name, spec in SPECS.items() if spec.one_pass_unsupported_reason is None]


@pytest.mark.parametrize("name", SPECS)
def test_fp64_reference_passes_gradcheck(name):
    assert gradcheck(
        SPECS[name], make_batch(SPECS[name], (4, 10), vocab=7, dtype=torch.float64, seed=3)
    )


def test_gradcheck_sees_a_wrong_gradient(monkeypatch):
    import reweight_ops._core.backends.reference_token as reference

    right = reference.token_grad

    def wrong(logits, ids, temperature, softmax, stats, derivatives, out):
        right(logits, ids, temperature, softmax, stats, derivatives, out)
        out[..., 0] *= 1.001

    broken = dataclasses.replace(load("reference"), name="reference", token_grad=wrong)
    monkeypatch.setitem(select._loaded, "reference", broken)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(
            SPECS["grpo"], make_batch(SPECS["grpo"], (4, 10), vocab=7, dtype=torch.float64, seed=3)
        )


@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass_is_two_pass(name):  # docs/semantics.md: S17
    spec = SPECS[name]
    batch = make_batch(spec, (4, 12), vocab=31, dtype=torch.float64)
    results = {}
    for plan in ("one_pass", "two_pass"):
        out = rw.policy_loss(**batch, spec=spec, plan=plan, backend="reference")
        (grad,) = torch.autograd.grad(out.loss, batch["logits"])
        results[plan] = (
            out.loss,
            grad,
            out.per_token_loss,
            out.coef,
            out.ratio,
            out.is_clipped.double(),
            out.metrics.sums,
        )
    for one, two in zip(*results.values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_reference_meets_the_criterion(name, dtype):
    spec = SPECS[name]
    result = compare(spec, make_batch(spec, dtype=dtype), backend="reference", loss_scale=64.0)
    assert result.passed, result


def test_compare_sees_a_wrong_kernel(monkeypatch):
    """The criterion itself: a relative error of 1e-5 in one target column fails in
    fp32.
    """
    import reweight_ops._core.backends.reference_token as reference

    def wrong(logits, ids, temperature, softmax, stats, derivatives, out):
        reference.token_grad(logits, ids, temperature, softmax, stats, derivatives, out)
        if out.dtype == torch.float32:
            out.view(-1, out.size(-1))[0, ids[0]] *= 1 + 1e-5

    broken = dataclasses.replace(load("reference"), name="cpu", token_grad=wrong)
    monkeypatch.setitem(select._loaded, "cpu", broken)
    batch = make_batch(SPECS["reinforce"])
    good = compare(SPECS["reinforce"], batch, backend="reference", plan="two_pass")
    bad = compare(SPECS["reinforce"], batch, backend="cpu", plan="two_pass")
    assert (
        good.passed
        and not bad.passed
        and bad.grad_target > 1
        and "target column (0, 0" in bad.worst
    )


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": torch.tensor([0.5, 1.0, 2.0, 0.9])},
        {"softcap": 8.0},
        {"softcap": 8.0, "temperature": 1.3},
        {"vocab_size": 200},
        {"loss_scale": 512.0},
        {"token_weights": torch.rand(4, 16)},
        {"consume_logits": True},
    ],
    ids=lambda o: ",".join(o),
)
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_call_options_meet_the_criterion(options, plan):
    spec = EXTRA["grpo_k3"]
    batch = make_batch(spec, dtype=torch.bfloat16)
    if "vocab_size" in options:
        batch["completion_ids"] %= options["vocab_size"]
    result = compare(spec, batch, backend="reference", plan=plan, **options)
    assert result.passed, result


def test_options_change_the_result():
    """The test above would pass if an option were ignored by both sides."""
    spec = SPECS["grpo"]
    batch = make_batch(spec, vocab=64)
    plain = rw.policy_loss(**batch, spec=spec, backend="reference").loss
    z = batch["logits"]
    for options, by_hand in (
        ({"temperature": 0.5}, z / 0.5),
        ({"temperature": torch.full((4,), 0.5)}, z / 0.5),
        ({"softcap": 5.0}, 5 * torch.tanh(z / 5)),
        ({"softcap": 5.0, "temperature": 2.0}, 5 * torch.tanh(z / 5) / 2),
    ):
        out = rw.policy_loss(**batch, spec=spec, backend="reference", **options).loss
        torch.testing.assert_close(
            out, rw.policy_loss(**{**batch, "logits": by_hand}, spec=spec, backend="reference").loss
        )
        assert abs(out - plain) > 1e-3
