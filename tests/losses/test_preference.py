"""Pair losses against a transcription of TRL's, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import preference as oracle
from pair_rows import P, T, batch, sides

import reweight_ops as rw
from reweight_ops import preference

TRL = {
    "sigmoid": {}, "hinge": {}, "ipo": {}, "exo_pair": dict(label_smoothing=1e-3), "nca_pair": {}, "robust": dict(label_smoothing=0.2),
    "bco_pair": {}, "sppo_hard": {}, "aot": dict(label_smoothing=0.1), "aot_unpaired": {}, "apo_zero": {}, "apo_down": {}, "discopop": {},
    "sft": {}, "sigmoid_norm": {},
}  # fmt: skip


@pytest.mark.parametrize("beta", [0.1, 1.7])
@pytest.mark.parametrize("kind", TRL)
def test_trl_loss_types(kind, beta):
    logps, ref, _, _, mask = batch()
    out = rw.preference_loss_from_logps(
        logps,
        spec=preference.trl(kind, beta=beta, **TRL[kind]),
        completion_mask=mask,
        ref_per_token_logps=ref,
    )
    want = oracle.trl_loss(*sides(logps, mask), *sides(ref, mask), [kind], beta=beta, **TRL[kind])
    assert out.loss.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.005]),
        dict(f_divergence_type="forward_kl"),
        dict(f_divergence_type="js_divergence", loss_type="ipo"),
        dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3),
        dict(ld_alpha=0.5),
        dict(ld_alpha=0.0, loss_type="hinge"),
        dict(loss_type="discopop", discopop_tau=0.3),
    ],
    ids=str,
)
def test_trl_options(options):
    logps, ref, _, _, mask = batch(seed=1)
    kinds = options.get("loss_type", "sigmoid")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    out = rw.preference_loss_from_logps(
        logps, spec=preference.trl(**options), completion_mask=mask, ref_per_token_logps=ref
    )
    rest = {k: v for k, v in options.items() if k != "loss_type"}
    assert out.loss.item() == pytest.approx(
        oracle.trl_loss(*sides(logps, mask), *sides(ref, mask), kinds, **rest), rel=1e-12
    )


def test_trl_use_weighting_and_the_authors_clamp():
    logps, ref, _, p_sq, mask = batch()
    given = dict(completion_mask=mask, ref_per_token_logps=ref, log_sum_p_sq=p_sq)
    out = rw.preference_loss_from_logps(logps, spec=preference.trl(use_weighting=True), **given)
    want = oracle.trl_loss(
        *sides(logps, mask), *sides(ref, mask), ["sigmoid"], log_sum_p_sq=sides(p_sq, mask)
    )
    assert out.loss.item() == pytest.approx(want, rel=1e-12)
    plain = rw.preference_loss_from_logps(
        logps, spec=preference.dpo(), completion_mask=mask, ref_per_token_logps=ref
    ).per_pair_loss
    raw = [
        oracle.wpo_weight(*c) * oracle.wpo_weight(*r)
        for c, r in zip(
            *(
                list(zip(*s, strict=True))
                for s in zip(sides(logps, mask), sides(p_sq, mask), strict=True)
            ),
            strict=True,
        )
    ]
    assert out.weights.tolist() == pytest.approx(raw, rel=1e-12)
    big = rw.preference_loss_from_logps(
        logps, spec=preference.wpo(beta=0.1, clamp=True), **{**given, "log_sum_p_sq": p_sq - 3}
    )
    clamped = [min(w * math.exp(6), 1.0) for w in raw]
    assert (max(clamped) == 1 and min(w * math.exp(6) for w in raw) < 1) or all(
        c == 1 for c in clamped
    )
    assert big.per_pair_loss.tolist() == pytest.approx(
        [c * x for c, x in zip(clamped, plain.tolist(), strict=True)], rel=1e-12
    )


def test_weights_are_detached():
    logps, ref, _, p_sq, mask = batch()
    given = dict(completion_mask=mask, ref_per_token_logps=ref)
    x = logps.nan_to_num(0).requires_grad_()
    out = rw.preference_loss_from_logps(
        x, spec=preference.wpo(beta=0.1, clamp=False), log_sum_p_sq=p_sq, **given
    )
    (grad,) = torch.autograd.grad(out.loss, x)
    plain = rw.preference_loss_from_logps(x, spec="dpo", **given)
    (want,) = torch.autograd.grad(plain.loss, x)
    torch.testing.assert_close(grad, want * out.weights.repeat(2)[:, None], rtol=1e-12, atol=0)
    assert (out.per_token_logps[~mask] == 0).all() and torch.equal(
        out.per_token_logps[mask], logps[mask]
    )


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_sorted_losses_leave_out_ignored_pairs(kind):
    logps, ref, _, _, mask = batch()
    spec = preference.trl(kind, beta=1.0)
    whole = rw.preference_loss_from_logps(
        logps, spec=spec, completion_mask=mask, ref_per_token_logps=ref
    )

    def padded(x, fill):
        extra = torch.full((1, T), fill, dtype=x.dtype)
        return torch.cat([extra, x[:P], extra, x[P:]])

    out = rw.preference_loss_from_logps(
        padded(logps, math.nan),
        spec=spec,
        completion_mask=padded(mask, 0),
        ref_per_token_logps=padded(ref, math.nan),
    )
    assert out.per_pair_loss.tolist() == pytest.approx(
        [0.0, *whole.per_pair_loss.tolist()], rel=1e-12
    )
    torch.testing.assert_close(out.loss, whole.loss, rtol=1e-12, atol=0)


def test_by_hand():
    # chosen [-1, -2], ref [-1.5, -2.5]: log-ratio 1; rejected [-1], ref [-0.5]: -0.5;
    # margin 1.5; β 2: x = 3.
    logps = torch.tensor([[-1.0, -2.0], [-1.0, -9.0]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-1.5, -2.5], [-0.5, -9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1], [1, 0]])
    out = rw.preference_loss_from_logps(
        logps, spec=preference.dpo(beta=2.0), completion_mask=mask, ref_per_token_logps=ref
    )
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-3)))
    (grad,) = torch.autograd.grad(out.loss, logps)
    s = 2.0 / (1 + math.exp(3))  # β·σ(-x)
    assert grad.tolist() == [pytest.approx([-s, -s]), pytest.approx([s, 0.0])]
    names = {k: float(v) for k, v in out.metrics.items()}
    assert names == pytest.approx({
        "rewards/chosen": 2.0, "rewards/rejected": -1.0, "rewards/margins": 3.0, "rewards/accuracies": 1.0, "logps/accuracies": 0.0,
        "logps/chosen": -3.0,
        "logps/rejected": -1.0, "tokens": 3.0, "sequences": 2.0,
    })  # fmt: skip

    def value(spec, **more):
        return rw.preference_loss_from_logps(
            logps, spec=spec, completion_mask=mask, **more
        ).loss.item()

    # cDPO: 0.9·0.04859 + 0.1·3.04859.  γ = 0.5: margin (-3 + 2) - (-1 + 0.25) = -0.25.
    # IPO in sums, β 2: (1.5 - 0.25)².
    assert value(preference.cdpo(beta=2.0), ref_per_token_logps=ref) == pytest.approx(
        0.9 * 0.0485873516 + 0.1 * 3.0485873516
    )
    assert value(preference.dpo_gamma(0.5, beta=2.0), ref_per_token_logps=ref) == pytest.approx(
        math.log1p(math.exp(0.5))
    )
    assert value(preference.ipo(beta=2.0, average=False), ref_per_token_logps=ref) == pytest.approx(
        1.5625
    )
    # RPO: cumulative adds -0.1·2·(-3) = 0.6, average 0.2·1.5 = 0.3.
    dpo = math.log1p(math.exp(-3))
    assert value(
        preference.rpo("cumulative", beta=2.0, eta=0.1), ref_per_token_logps=ref
    ) == pytest.approx(dpo + 0.6)
    assert value(preference.rpo("average", beta=2.0), ref_per_token_logps=ref) == pytest.approx(
        dpo + 0.3
    )
    # SimPO: means -1.5 and -1: 2·(-0.5) - 1 = -2.  CPO: margin -2, β 2: x = -4, plus
    # NLL 1.5.
    assert value(preference.simpo(beta=2.0, gamma=1.0)) == pytest.approx(math.log1p(math.exp(2)))
    assert value(preference.cpo(beta=2.0)) == pytest.approx(math.log1p(math.exp(4)) + 1.5)
    # ORPO: log odds of e^-1.5: -1.5 - log(1 - 0.22313) = -1.24752, of e^-1: -1 - log(1
    # - 0.36788) = -0.54132; difference -0.70619.
    assert value(preference.orpo(beta=0.5)) == pytest.approx(
        1.5 + 0.5 * math.log1p(math.exp(0.7061934)), abs=1e-6
    )
    # Unlikelihood: -3 + log(1 - e^-1) = -3.45868, β 2; with the reference's -4 and
    # -0.5: -3 + 4 - 0.45868 + 0.5 = 1.04132.
    assert value(preference.no_sft_ratio_w_unlikelihood(beta=2.0)) == pytest.approx(
        math.log1p(math.exp(6.9173503)), abs=1e-6
    )
    assert value(preference.unlikelihood(beta=2.0), ref_per_token_logps=ref) == pytest.approx(
        math.log1p(math.exp(-2.0826497)), abs=1e-6
    )
    # APO.
    assert value(preference.apo(2.0, "zero"), ref_per_token_logps=ref) == pytest.approx(
        1 - 1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(1))
    )
    # INPO, η 0.5, τ 0.2: D = -2, D_ref = -4 + 0.5 = -3.5, D_old = -1: -2 + 0.4·3.5 +
    # 0.6·1 - 1 = -1.
    old = torch.tensor([-2.0, -1.0])
    assert value(
        preference.inpo(0.5, 0.2), ref_per_token_logps=ref, old_sequence_logps=old
    ) == pytest.approx(1.0)
    assert oracle.inpo(-2, -3.5, -1, 0.5, 0.2) == pytest.approx(1.0)
