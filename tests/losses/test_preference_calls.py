"""Pair losses from logits on every backend, from hidden states, under torch.compile;
wrong calls.
"""

from __future__ import annotations

import math

import pytest
import torch
from pair_rows import P, T, V, batch

import reweight_ops as rw
from reweight_ops import preference
from reweight_ops._core.calls.keywords import PairKeywords, PairOptions
from reweight_ops._core.catalogue.registry import CATALOGUE


def logits_batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn(2 * P, T, V, generator=g)).to(dtype)
    ids = torch.randint(0, V, (2 * P, T), generator=g)
    mask = batch()[-1]
    ref = torch.log_softmax(3 * torch.randn(2 * P, T, V, generator=g), -1)
    return logits, ids, mask, ref


@pytest.mark.parametrize("name", ["dpo", "wpo", "unlikelihood", "ipo", "orpo"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_from_logits_on_every_backend(name, backend):
    logits, ids, mask, ref = logits_batch()
    spec = CATALOGUE["pair_loss"][name].build()
    given = {"completion_mask": mask} | (
        {"ref_per_token_logps": ref.gather(-1, ids[..., None])[..., 0]}
        if "ref" in spec.requires
        else {}
    )
    poisoned = torch.where(mask[..., None], logits, math.nan).requires_grad_()
    out = rw.preference_loss(poisoned, ids, spec=spec, backend=backend, temperature=0.7, **given)
    (grad,) = torch.autograd.grad(out.loss, poisoned)
    assert out.backend == backend

    x = logits.double().requires_grad_()
    log_p = torch.log_softmax(x / 0.7, -1)
    logps = log_p.gather(-1, ids[..., None])[..., 0]
    extra = {"log_sum_p_sq": torch.logsumexp(2 * log_p, -1)} if name == "wpo" else {}
    want = rw.preference_loss_from_logps(logps, spec=spec, **given, **extra)
    (exact,) = torch.autograd.grad(want.loss, x)
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(
        grad.double(), exact, rtol=2e-5, atol=2e-6 * float(exact.abs().max())
    )
    assert (grad[~mask] == 0).all()


def test_linear_form_and_consumed_logits():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * P, T, 5, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, 5, generator=g, dtype=torch.float64).requires_grad_()
    _, ids, mask, ref = logits_batch()
    given = dict(completion_mask=mask, ref_per_token_logps=ref.gather(-1, ids[..., None])[..., 0])
    for name in ("dpo", "wpo"):
        linear = rw.linear_preference_loss(hidden, weight, ids, spec=name, chunk_rows=3, **given)
        whole = rw.preference_loss(hidden @ weight.T, ids, spec=name, **given)
        torch.testing.assert_close(linear.loss, whole.loss)
        for a, b in zip(
            *(torch.autograd.grad(o.loss, (hidden, weight)) for o in (linear, whole)), strict=True
        ):
            torch.testing.assert_close(a, b)
    leaf = torch.randn(2 * P, T, V).requires_grad_()
    logits = leaf * 1
    out = rw.preference_loss(logits, ids, spec="dpo", consume_logits=True, **given)
    plain = rw.preference_loss(leaf, ids, spec="dpo", **given)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, leaf)[0], torch.autograd.grad(plain.loss, leaf)[0]
    )
    with pytest.raises(rw.InvalidCall, match="consumed"):
        rw.token_logps(logits, ids)


WRONG = {
    "no reference": (dict(spec="dpo"), "the spec 'dpo' needs ref_per_token_logps or ref_sequence_logps"),
    "both references": (dict(spec="dpo", ref_per_token_logps=torch.zeros(4, 3), ref_sequence_logps=torch.zeros(4)), "not both"),
    "a reference for nothing": (dict(spec="simpo", ref_sequence_logps=torch.zeros(4)), "'simpo' does not read ref_sequence_logps; it would have no effect"),
    "an input for nothing": (dict(spec="dpo", ref_sequence_logps=torch.zeros(4), noise=torch.zeros(3)), "does not read noise"),
    "odd": (dict(spec="simpo", logps=torch.zeros(3, 3)), "there are 3 sequences, which do not form pairs"),
    "a flat tensor": (dict(spec="simpo", logps=torch.zeros(6)), "a pair loss needs sequences"),
    "layout": (dict(spec="simpo", pairs="thirds"), "pairs is 'thirds'"),
    "margins of another size": (dict(spec="madpo", ref_sequence_logps=torch.zeros(4), reward_margins=torch.zeros(4)), r"reward_margins has shape \(4,\), expected \(2,\)"),
    "sums of another size": (dict(spec="dpo", ref_sequence_logps=torch.zeros(2)), r"expected \(4,\): one number a sequence"),
    "bf16 reference": (dict(spec="dpo", ref_sequence_logps=torch.zeros(4).bfloat16()), r"\.float\(\)"),
    "reference with grad": (dict(spec="dpo", ref_sequence_logps=torch.zeros(4, requires_grad=True)), "requires grad"),
    "no log Σp²": (dict(spec="wpo", ref_sequence_logps=torch.zeros(4)), "reads log_sum_p_sq"),
    "log Σp² for nothing": (dict(spec="simpo", log_sum_p_sq=torch.zeros(4, 3)), "does not read log_sum_p_sq"),
    "ref_logits": (dict(spec="sparse_po", ref_logits=torch.zeros(4, 3, 5)), "ref_logits needs the policy's logits"),
    "unknown spec": (dict(spec="dppo"), "Did you mean 'dpo'"),
    "no default": (dict(spec="dpo_gamma"), "'dpo_gamma' has no default for gamma"),
    "a policy spec": (dict(spec=rw.methods.grpo()), "spec is a PolicyLossSpec, which rw.policy_loss takes"),
    "scale": (dict(spec="simpo", loss_scale=torch.ones(2)), "loss_scale has shape"),
    "ld_alpha by ids": (dict(spec=preference.dpo(ld_alpha=0.5), logps=torch.zeros(6), sequence_ids=torch.tensor([0, 1, 0, 1, 0, 1]), num_sequences=2, ref_per_token_logps=torch.zeros(6)), "must be consecutive"),
    "fp16 log-probs": (dict(spec="simpo", logps=torch.zeros(4, 3).half()), "expected fp32 or fp64"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case):
    options, message = WRONG[case]
    options = dict(options)
    with pytest.raises(rw.InvalidCall, match=message):
        rw.preference_loss_from_logps(options.pop("logps", torch.zeros(4, 3)), **options)


def test_wrong_specs_and_keywords():
    for build, message in (
        (lambda: preference.trl("sigmoid", label_smoothing=0.1), "label_smoothing has no effect"),
        (lambda: preference.trl("kto"), "loss_type is 'kto'"),
        (lambda: preference.trl("apo_zero", f_divergence_type="forward_kl"), "is defined for"),
        (lambda: preference.trl("aot", use_weighting=True), "sorts their sides separately"),
        (lambda: preference.trl(["sigmoid"], loss_weights=[1, 2]), "2 loss_weights for 1"),
        (lambda: preference.dpo(beta=0.0), r"expected a number in \(0, inf\)"),
        (lambda: preference.dpo(divergence="kl"), "divergence is 'kl'"),
        (lambda: preference.robust_dpo(label_smoothing=0.5), r"in \[0, 0.5\)"),
        (lambda: preference.exo(label_smoothing=0.0), r"in \(0, 1\)"),
        (lambda: preference.inpo(eta=1.0, tau=2.0), "0 < tau < eta"),
        (lambda: preference.madpo(c_max=0.5), r"c_max is 0.5, expected a number in \(1, inf\)"),
        (lambda: preference.rank_list(3, skips=(3,)), "from 1 to 2"),
        (lambda: preference.rpo("average", eta=0.1), "belongs to form='cumulative'"),
        (lambda: rw.PairSpec(terms=()), "at least one PairTerm"),
    ):
        with pytest.raises(rw.InvalidCall, match=message):
            build()
    with pytest.raises(TypeError, match="Did you mean ref_sequence_logps"):
        rw.preference_loss_from_logps(
            torch.zeros(4, 3), spec="dpo", ref_sequence_logp=torch.zeros(4)
        )
    assert set(PairKeywords.__annotations__) == set(PairOptions.__dataclass_fields__)


def test_compiles_and_is_a_pytree():
    logps, ref, _, _, mask = batch(torch.float32)
    logps = logps.nan_to_num(0).requires_grad_()

    def loss(x):
        return rw.preference_loss_from_logps(
            x, spec="dpo", completion_mask=mask, ref_per_token_logps=ref
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logps), loss(logps))
    assert torch.equal(
        torch.autograd.grad(compiled(logps), logps)[0], torch.autograd.grad(loss(logps), logps)[0]
    )
    out = rw.preference_loss_from_logps(
        logps, spec="dpo", completion_mask=mask, ref_per_token_logps=ref
    )
    again = torch.utils._pytree.tree_map(lambda t: t, out)
    assert (
        torch.equal(again.per_pair_loss, out.per_pair_loss)
        and again.metrics.names == out.metrics.names
    )
