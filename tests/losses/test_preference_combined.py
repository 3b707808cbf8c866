"""Composed preference losses: as sums of their named terms, by hand, and as the specs
of TRL's names that they equal.
"""

import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops import preference


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(8)
    mask = torch.arange(6) < torch.tensor([6, 3, 4, 2, 5, 1])[:, None]
    logps, ref = (
        torch.where(mask, -3 * torch.rand(6, 6, generator=g, dtype=torch.float64) - 0.05, math.nan)
        for _ in range(2)
    )
    return {"logps": logps.requires_grad_(), "ref": ref, "mask": mask}


def evaluate(data, spec, ref=True):
    stored = {"ref_per_token_logps": data["ref"]} if ref else {}
    loss = rw.preference_loss_from_logps(
        data["logps"], spec=spec, completion_mask=data["mask"], **stored
    ).loss
    return loss, torch.autograd.grad(loss, data["logps"], retain_graph=True)[0]


def sums(data, name):
    x = torch.where(data["mask"], data[name], 0).sum(1)
    return x[:3], x[3:]


@pytest.mark.parametrize(
    ("spec", "other"),
    [
        (
            preference.mpo(0.3),
            preference.trl(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=0.3),
        ),
        (preference.aot(0.3, 0.1), preference.trl("aot", beta=0.3, label_smoothing=0.1)),
        (preference.aot(0.3, paired=False), preference.trl("aot_unpaired", beta=0.3)),
        (preference.f_dpo(0.3), preference.trl(beta=0.3, f_divergence_type="js_divergence")),
        (
            preference.f_dpo(0.3, "alpha_divergence", 0.7),
            preference.trl(
                beta=0.3, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7
            ),
        ),
        (preference.ld_dpo(0.4, 0.3), preference.trl(beta=0.3, ld_alpha=0.4)),
    ],
)
def test_a_named_loss_is_trls(data, spec, other):
    for a, b in zip(evaluate(data, spec), evaluate(data, other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    assert spec.replace(name=other.name) == other


def test_irpo_by_its_equations(data):
    (w, lose), (rw_, rl), length = sums(data, "logps"), sums(data, "ref"), data["mask"].sum(1)[:3]
    expected = (
        -torch.nn.functional.logsigmoid(0.4 * ((w - rw_) - (lose - rl))) - 0.7 * w / length
    ).mean()
    loss, grad = evaluate(data, preference.irpo(0.4, 0.7))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, data["logps"])[0])
    one_each = preference.trl(["sigmoid", "sft"], beta=0.4, loss_weights=[1.0, 0.7])
    # TRL's NLL is the mean over all tokens
    assert (evaluate(data, one_each)[0] - loss).abs() > 1e-3


def test_tpo_reads_triples():
    """Chosen, rejected and gold responses, in halves or as consecutive triples."""
    g = torch.Generator().manual_seed(2)
    logps = -torch.rand(6, 4, generator=g, dtype=torch.float64)
    spec = preference.tpo(beta=0.5, alpha=0.3)
    loss = rw.preference_loss_from_logps(logps, spec=spec).loss
    total = logps.sum(1)
    expected = (
        -torch.nn.functional.logsigmoid(0.5 * (total[:2] - total[2:4])).mean()
        - 0.3 * logps[4:].mean()
    )
    torch.testing.assert_close(loss, expected)
    mixed = logps.view(3, 2, 4).transpose(0, 1).reshape(6, 4)
    torch.testing.assert_close(
        rw.preference_loss_from_logps(mixed, spec=spec, pairs="interleaved").loss, expected
    )
    with pytest.raises(rw.InvalidCall, match="do not form lists of 3"):
        rw.preference_loss_from_logps(logps[:4], spec=spec)
    with pytest.raises(rw.InvalidCall, match="loss_type is 'dpo'"):
        preference.tpo("dpo")


def test_alpha_po_goes_to_simpo(data):
    near, simpo = (
        evaluate(data, preference.alpha_po(1e-9), ref=False),
        evaluate(data, preference.simpo(), ref=False),
    )
    for a, b in zip(near, simpo, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    far = torch.full((2, 3), -300.0, dtype=torch.float64)
    assert rw.preference_loss_from_logps(far, spec=preference.alpha_po(0.25)).loss.isfinite()


def test_kto_baseline_is_a_clamped_mean_of_sequences():
    logps, mask = torch.tensor([[-1.0, math.nan], [-2.0, -1.0]]), torch.tensor([[1, 0], [1, 1]])
    ref = torch.tensor([[-1.5, -1.0], [-2.5, -2.0]])
    torch.testing.assert_close(
        preference.kto_baseline(logps, ref, mask), torch.tensor((0.5 + 1.5) / 2)
    )
    assert float(preference.kto_baseline(ref, torch.zeros(2, 2), mask)) == 0
    with pytest.raises(rw.InvalidCall, match="expected \\[B, T\\]"):
        preference.kto_baseline(logps, ref, mask[:1])
    with pytest.raises(rw.InvalidCall, match="16 bits"):
        preference.kto_baseline(logps.bfloat16(), ref, mask)
