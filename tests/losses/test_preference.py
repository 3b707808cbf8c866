"""Pair losses against transcriptions of TRL and of the papers, by hand, and at their
edges.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracles import preference as oracle

import reweight_ops as rw
from reweight_ops import preference
from reweight_ops._core.catalogue.registry import CATALOGUE
from reweight_ops._core.rows.numerics import log1mexp
from reweight_ops.testing.pairs import pair_inputs

P, T, V = 4, 7, 13
LENGTHS = ((7, 3, 1, 5), (4, 6, 2, 5))  # chosen, rejected


def batch(dtype=torch.float64, seed=0):
    """Log-probs of policy, reference and sampler in halves, ``[2P, T]``,
    and the mask."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([*LENGTHS[0], *LENGTHS[1]])
    mask = torch.arange(T) < lengths[:, None]
    logps, ref, old = (
        -3 * torch.rand(2 * P, T, generator=g, dtype=torch.float64) - 0.05 for _ in range(3)
    )
    p_sq = -torch.rand(2 * P, T, generator=g, dtype=torch.float64) - 0.2
    poison = torch.full_like(logps, math.nan)
    return [torch.where(mask, x, poison).to(dtype) for x in (logps, ref, old, p_sq)] + [mask]


def sides(x, mask):
    rows = [row[m].tolist() for row, m in zip(x.double(), mask, strict=True)]
    return rows[:P], rows[P:]


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


def test_methods_with_inputs():
    logps, ref, old, _, mask = batch(seed=3)
    given = dict(completion_mask=mask, ref_per_token_logps=ref)
    ratio = [
        [sum(a) - sum(b) for a, b in zip(x, y, strict=True)]
        for x, y in zip(sides(logps, mask), sides(ref, mask), strict=True)
    ]
    m = [c - r for c, r in zip(*ratio, strict=True)]
    h = [-8.0, -1.0, 0.3, 10.0]

    def losses(spec, **more):
        return rw.preference_loss_from_logps(
            logps, spec=spec, **given, **more
        ).per_pair_loss.tolist()

    weights = [oracle.madpo_weight(x, 0.5, 2.0, 1.0, math.log(0.999 / 0.001)) for x in h]
    want = [-w * oracle.log_sigmoid(0.1 * x) for w, x in zip(weights, m, strict=True)]
    assert losses(preference.madpo(), reward_margins=torch.tensor(h)) == pytest.approx(
        want, rel=1e-6
    )
    assert [
        oracle.madpo_weight(x, 0.5, 2.0, 1.0, 6.907) for x in (-3, -1, 0, 1, 3, 10)
    ] == pytest.approx([0.062, 0.446, 1.0, 1.204, 1.047, 0.995], abs=6e-4)
    c = [0.0, 0.25, 2 / 3, 1.0]
    want = [
        -x * oracle.log_sigmoid(0.1 * d) - (1 - x) * oracle.log_sigmoid(-0.1 * d)
        for x, d in zip(c, m, strict=True)
    ]
    assert losses(
        preference.cream(), consistency=torch.tensor(c, dtype=torch.float64)
    ) == pytest.approx(want, rel=1e-12)
    d = [
        [a - b for a, b in zip(map(sum, x[0]), map(sum, x[1]), strict=True)]
        for x in (sides(logps, mask), sides(ref, mask), sides(old, mask))
    ]
    want = [oracle.inpo(*x, 0.0075, 0.0025) for x in zip(*d, strict=True)]
    assert losses(preference.inpo(), old_per_token_logps=old) == pytest.approx(want, rel=1e-12)
    agree = [x * y > 0 for x, y in zip(m, h, strict=True)]
    want = [
        (-oracle.log_sigmoid(0.1 * x) + 0.3 * (oracle.sigmoid(0.1 * x) - oracle.sigmoid(y)) ** 2)
        * a
        for x, y, a in zip(m, h, agree, strict=True)
    ]
    assert any(agree) and not all(agree)
    assert losses(preference.scir(0.3), judge_margins=torch.tensor(h)) == pytest.approx(
        want, rel=1e-6
    )


def test_unlikelihood_against_the_formula():
    logps, ref, _, _, mask = batch(seed=4)
    call = dict(spec="unlikelihood", completion_mask=mask)
    got = rw.preference_loss_from_logps(
        logps, **call, ref_per_token_logps=ref
    ).per_pair_loss.tolist()
    want = [
        oracle.unlikelihood(*sequences, 0.1)
        for sequences in zip(*sides(logps, mask), *sides(ref, mask), strict=True)
    ]
    assert got == pytest.approx(want, rel=1e-12)
    with pytest.raises(rw.InvalidCall, match="needs ref_per_token_logps"):
        rw.preference_loss_from_logps(logps, **call)
    call["spec"] = "no_sft_ratio_w_unlikelihood"
    got = rw.preference_loss_from_logps(logps, **call).per_pair_loss.tolist()
    want = [
        oracle.no_sft_ratio_w_unlikelihood(c, r, 0.1)
        for c, r in zip(*sides(logps, mask), strict=True)
    ]
    assert got == pytest.approx(want, rel=1e-12)


def test_log1mexp_is_accurate_and_its_gradient_is_finite():
    x = torch.tensor(
        [-1e-30, -1e-7, -1e-3, -0.6, -0.7, -3.0, -50.0, -math.inf, 0.0], requires_grad=True
    )
    y = log1mexp(x)
    exact = [
        math.log(2.0**-24),
        math.log(1e-7),
        math.log(-math.expm1(-1e-3)),
        math.log1p(-math.exp(-0.6)),
        math.log1p(-math.exp(-0.7)),
    ]
    assert y[:5].tolist() == pytest.approx(exact, rel=2e-6) and y[6].item() == pytest.approx(
        -math.exp(-50), rel=1e-5, abs=0
    )
    assert y[7] == 0 and y[8].item() == pytest.approx(exact[0])
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all() and grad[0] == 0 and grad[8] == 0 and grad[7] == 0
    assert grad[3].item() == pytest.approx(-math.exp(-0.6) / -math.expm1(-0.6), rel=1e-6)


def test_ens_loss_slopes():
    s, noise = [0.5, -2.0, 3.0, 0.1], [0.3, -1.0, 2.0, -0.2, -3.0]
    got = preference.losses.ensemble_slopes(
        torch.tensor(s), torch.tensor(noise), 0.0, torch.ones(4, dtype=torch.bool)
    ).tolist()
    assert got == pytest.approx(oracle.ens_loss_slopes(s, noise), rel=1e-6)
    # By hand: slopes -1, -1 (e^0.3, e^2 capped), -0.81873, -0.36788, -0.04979; margins
    # in order -2, 0 (extra), 0.1, 0.5, 3.
    assert got == pytest.approx([-0.36788, -1.0, -0.04979 / 3, -0.81873], abs=2e-5)
    logps, ref, _, _, mask = batch()
    logps.requires_grad_()
    out = rw.preference_loss_from_logps(
        logps,
        spec=preference.ens_loss(beta=1.0),
        completion_mask=mask,
        ref_per_token_logps=ref,
        noise=torch.randn(5),
    )
    (grad,) = torch.autograd.grad(out.loss, logps)
    # the slope of a decreasing loss
    assert (grad[:P][mask[:P]] < 0).all() and (grad[P:][mask[P:]] > 0).all()


def test_rank_list():
    # [L, G], best first
    scores = torch.tensor([[2.0, 1.0, 1.5, -1.0], [0.0, 0.5, 0.2, 0.1]], dtype=torch.float64)
    logps = scores.reshape(-1, 1)
    zero = torch.zeros(8)

    def value(order, skips, rows):
        spec = preference.rank_list(4, beta=1.0, skips=skips)
        return rw.preference_loss_from_logps(
            rows, spec=spec, pairs=order, ref_sequence_logps=zero
        ).per_pair_loss.tolist()

    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    want = [
        sum(softplus(row[i + k] - row[i]) for k in (1, 2) for i in range(4 - k))
        for row in scores.tolist()
    ]
    every = [
        sum(math.log(1 + sum(math.exp(row[j] - row[i]) for j in range(i + 1, 4))) for i in range(3))
        for row in scores.tolist()
    ]
    halves = scores.T.reshape(-1, 1)
    for order, rows in (("interleaved", logps), ("halves", halves)):
        assert value(order, (1, 2), rows) == pytest.approx(want, rel=1e-12)
        assert value(order, "all", rows) == pytest.approx(every, rel=1e-12)


def test_rank_consistency():
    now, before = torch.randn(5, 6), torch.randn(5, 6)
    got = preference.rank_consistency(now, before)
    assert got.tolist() == pytest.approx(
        [(oracle.kendall(a, b) + 1) / 2 for a, b in zip(now.tolist(), before.tolist(), strict=True)]
    )
    assert (
        preference.rank_consistency(now, now).tolist()
        == preference.rank_consistency(now, 3 * now + 1, kind="spearman").tolist()
        == [1.0] * 5
    )
    assert (
        preference.rank_consistency(now, -now).tolist()
        == preference.rank_consistency(now, -now, kind="spearman").tolist()
        == [0.0] * 5
    )
    # ranks (2, 1, 0) and (2, 0, 1): Σd² = 2, ρ = 1 - 12/24 = 0.5.
    a, b = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[3.0, 1.0, 2.0]])
    assert preference.rank_consistency(a, b, kind="spearman").item() == pytest.approx(0.75)
    assert (
        preference.rank_consistency(a, b, kind="toporder").item() == 0
        and preference.rank_consistency(a, a, kind="toporder").item() == 1
    )
    with pytest.raises(rw.InvalidCall, match="kind is 'tau'"):
        preference.rank_consistency(a, b, kind="tau")


def test_mcts_dpo_counts_from_the_first_difference():
    ids = torch.tensor([[1, 2, 3, 4], [5, 5, 5, 5], [1, 2, 9, 4], [5, 6, 5, -100]])
    logps = -torch.rand(4, 4, dtype=torch.float64)
    ref = -torch.rand(4, 4, dtype=torch.float64)
    values = dict(chosen_values=torch.tensor([3.0, 0.5]), rejected_values=torch.tensor([1.0, 4.0]))
    out = rw.preference_loss_from_logps(
        logps,
        spec=preference.mcts_dpo(beta=0.7),
        completion_ids=ids,
        ref_per_token_logps=ref,
        **values,
    )
    x = (logps - ref).tolist()
    d = [sum(x[0][2:]) - sum(x[2][2:]), sum(x[1][1:]) - sum(x[3][1:3])]
    want = [oracle.mcts_dpo(d[0], 3.0, 1.0, 0.7), oracle.mcts_dpo(d[1], 0.5, 4.0, 0.7)]
    assert out.per_pair_loss.tolist() == pytest.approx(want, rel=1e-12)
    # By hand: c = 1/(1 + 1/3) = 0.75, ε 0.25; c = 1/(1 + 4/1) = 0.2, ε = min(0.8, 0.5)
    # = 0.5.
    order = torch.tensor([0, 2, 1, 3])
    mixed = rw.preference_loss_from_logps(
        logps[order],
        spec=preference.mcts_dpo(beta=0.7),
        completion_ids=ids[order],
        ref_per_token_logps=ref[order],
        pairs="interleaved",
        **values,
    )
    assert mixed.per_pair_loss.tolist() == pytest.approx(want, rel=1e-12)
    ipo = rw.preference_loss_from_logps(
        logps, spec=preference.mcts_dpo(0.7, "ipo"), completion_ids=ids, ref_per_token_logps=ref
    )
    per_token = [sum(x[0][2:]) / 2 - sum(x[2][2:]) / 2, sum(x[1][1:]) / 3 - sum(x[3][1:3]) / 2]
    assert ipo.per_pair_loss.tolist() == pytest.approx([(y - 1 / 1.4) ** 2 for y in per_token])
    with pytest.raises(rw.InvalidCall, match="needs completion_ids"):
        rw.preference_loss_from_logps(logps, spec="mcts_dpo", ref_per_token_logps=ref, **values)


def test_sparse_po_and_its_mask_gradients():
    logps, ref, _, _, mask = batch(seed=5)
    g = torch.Generator().manual_seed(6)
    kl, m_u, m_d = (torch.rand(2 * P, T, generator=g, dtype=torch.float64) for _ in range(3))
    m_u = torch.where(m_u < 0.3, 0, m_u)
    leaves = [x.nan_to_num(0).requires_grad_() for x in (logps, kl, m_u, m_d)]
    spec = preference.sparse_po(beta=0.8, reward_norm_coef=0.01, kl_norm_coef=0.002)

    def loss(logps, kl, m_u, m_d):
        return rw.preference_loss_from_logps(
            logps,
            spec=spec,
            completion_mask=mask,
            ref_per_token_logps=ref,
            per_token_kl=kl,
            reward_mask=m_u,
            kl_mask=m_d,
        )

    parts = [sides(x, mask) for x in (logps, ref, kl, m_u, m_d)]
    want = []
    for i in range(P):
        both = [
            {
                k: x[side][i]
                for k, x in zip(("logps", "ref", "kl", "m_u", "m_d"), parts, strict=True)
            }
            for side in (0, 1)
        ]
        want.append(oracle.sparse_po(both, 0.8, 0.01, 0.002))
    assert loss(*leaves).per_pair_loss.tolist() == pytest.approx(want, rel=1e-12)
    assert torch.autograd.gradcheck(lambda *x: loss(*x).loss, leaves)
    # A mask of 0 hides an infinite KL.
    wild = kl.clone()
    wild[0, 0], m_d[0, 0] = math.inf, 0.0
    assert loss(logps, wild, m_u, m_d).loss.isfinite()


def test_mapo_masks():
    g = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 5, 3, generator=g) for _ in range(2)]
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    got = preference.mapo_masks(layers, mask)
    want = torch.zeros(2, 5)
    for a in layers:
        for b in range(2):
            x = a[b].mean(-1)[mask[b] == 1]
            z = (x - x.mean()) / x.std()
            want[b, : len(z)] += (z - z.min()) / (z.max() - z.min()) / 2
    torch.testing.assert_close(got, want)
    assert preference.mapo_masks([torch.ones(1, 3, 2)], torch.ones(1, 3)).tolist() == [[0, 0, 0]]


def call_all(name, dtype=torch.float64):
    """The spec of a registered pair loss and keywords that satisfy it."""
    entry = CATALOGUE["pair_loss"][name]
    spec = entry.build()
    rows = 2 * P // spec.group_size * spec.group_size
    logps, ref, old, p_sq, mask = (x[:rows] for x in batch(dtype))
    g = torch.Generator().manual_seed(9)
    given = {"completion_mask": mask, "pairs": "interleaved"}
    needs = {
        "ref": ("ref_per_token_logps", ref),
        "ref_tokens": ("ref_per_token_logps", ref),
        "old": ("old_per_token_logps", old),
    }
    needs["log_sum_p_sq"] = ("log_sum_p_sq", p_sq.nan_to_num(0))
    given |= {needs[need][0]: needs[need][1] for need in spec.requires & set(needs)} | pair_inputs(
        spec, (rows, T), dtype, g
    )
    if spec.tokens != "completion":
        given["completion_ids"] = torch.randint(0, 3, (rows, T), generator=g)
    return spec, logps, given


@pytest.mark.parametrize("name", sorted(CATALOGUE["pair_loss"]))
def test_every_method_has_exact_gradients(name):
    spec, logps, given = call_all(name)
    detached = rw.preference_loss_from_logps(logps, spec=spec, **given)
    assert detached.loss.isfinite() and detached.loss.dtype == torch.float64
    x = logps.nan_to_num(0).requires_grad_()
    # detached factors: finite differences would move them
    if spec.weights or name == "ens_loss":
        (grad,) = torch.autograd.grad(rw.preference_loss_from_logps(x, spec=spec, **given).loss, x)
        assert grad.isfinite().all() and grad.any()
    else:
        assert torch.autograd.gradcheck(
            lambda y: rw.preference_loss_from_logps(y, spec=spec, **given).loss, (x,)
        )
        (grad,) = torch.autograd.grad(rw.preference_loss_from_logps(x, spec=spec, **given).loss, x)
    assert (grad[~given["completion_mask"]] == 0).all()


@pytest.mark.parametrize("name", sorted(CATALOGUE["pair_loss"]))
def test_pairs_that_are_out_change_nothing(name):
    spec, logps, given = call_all(name)
    if name == "ens_loss":
        pytest.skip("the number of draws is the number of pairs")
    whole = rw.preference_loss_from_logps(logps, spec=spec, **given)
    extra = spec.group_size

    def longer(x):
        if not isinstance(x, torch.Tensor):
            return x
        rows = extra if x.dim() == 2 else 1
        return torch.cat([x, torch.zeros(rows, *x.shape[1:], dtype=x.dtype)])

    padded = rw.preference_loss_from_logps(
        longer(logps), spec=spec, **{k: longer(v) for k, v in given.items()}
    )
    torch.testing.assert_close(padded.loss, whole.loss, rtol=1e-12, atol=0)
    assert padded.per_pair_loss[-1] == 0 and {
        k: float(v) for k, v in padded.metrics.items()
    } == pytest.approx({k: float(v) for k, v in whole.metrics.items()})


@pytest.mark.parametrize("name", ["dpo", "wpo", "simpo", "inpo"])
def test_all_masked_is_a_differentiable_zero(name):
    spec, logps, given = call_all(name, torch.float32)
    x = logps.requires_grad_()
    out = rw.preference_loss_from_logps(
        x, spec=spec, **{**given, "completion_mask": torch.zeros(2 * P, T)}
    )
    (grad,) = torch.autograd.grad(out.loss, x)
    assert out.loss == 0 and (grad == 0).all()


def test_layouts_agree():
    logps, ref, _, _, mask = batch()
    halves = rw.preference_loss_from_logps(
        logps, spec="dpo", completion_mask=mask, ref_per_token_logps=ref
    )
    order = torch.arange(2 * P).view(2, P).T.reshape(-1)
    mixed = rw.preference_loss_from_logps(
        logps[order],
        spec="dpo",
        completion_mask=mask[order],
        ref_per_token_logps=ref[order],
        pairs="interleaved",
    )
    assert torch.equal(halves.per_pair_loss, mixed.per_pair_loss)
    lengths = mask.sum(-1)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for spec in ("dpo", preference.dpo(ld_alpha=0.5), preference.ipo()):
        want = rw.preference_loss_from_logps(
            logps, spec=spec, completion_mask=mask, ref_per_token_logps=ref
        ).loss
        packed = rw.preference_loss_from_logps(
            logps[mask], spec=spec, cu_seqlens=cu, ref_per_token_logps=ref[mask]
        )
        torch.testing.assert_close(packed.loss, want, rtol=1e-14, atol=0)
    owner = torch.repeat_interleave(torch.arange(2 * P), lengths)
    by_id = rw.preference_loss_from_logps(
        logps[mask],
        spec="dpo",
        sequence_ids=owner,
        num_sequences=2 * P,
        ref_per_token_logps=ref[mask],
    )
    torch.testing.assert_close(by_id.loss, halves.loss, rtol=1e-14, atol=0)
    sums = torch.where(mask, ref, 0).sum(-1)
    stored = rw.preference_loss_from_logps(
        logps, spec="dpo", completion_mask=mask, ref_sequence_logps=sums
    )
    torch.testing.assert_close(stored.loss, halves.loss, rtol=1e-14, atol=0)


def test_accumulation_and_loss_scale():
    logps, ref, _, _, mask = batch()

    def part(i, **more):
        rows = torch.tensor([i, i + 1, P + i, P + i + 1])
        return rw.preference_loss_from_logps(
            logps[rows],
            spec="dpo",
            completion_mask=mask[rows],
            ref_per_token_logps=ref[rows],
            **more,
        )

    whole = rw.preference_loss_from_logps(
        logps, spec="dpo", completion_mask=mask, ref_per_token_logps=ref
    )
    torch.testing.assert_close(sum(part(i, num_pairs_in_batch=P).loss for i in (0, 2)), whole.loss)
    torch.testing.assert_close(part(0, loss_scale=torch.tensor(8.0)).loss, 8 * part(0).loss)
    combined = rw.Metrics.combine([part(0).metrics, part(2).metrics])
    assert {k: float(v) for k, v in combined.items()} == pytest.approx(
        {k: float(v) for k, v in whole.metrics.items()}
    )
