"""Pair losses of papers, and what they read beside log-probs, against transcriptions in
loops.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracles import preference as oracle
from pair_rows import P, T, batch, sides

import reweight_ops as rw
from reweight_ops import preference
from reweight_ops._core.rows.numerics import log1mexp


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
