"""Methods of trainers: the op against independent transcriptions, loss and gradient, in
fp64.
"""

import math

import pytest
import torch
from loss_batch import same
from oracles import papers
from oracles import trainers as oracle

import reweight_ops as rw

B, T, V = 8, 9, 7
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.fixture(scope="module")
def batch():
    g = torch.Generator().manual_seed(21)

    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    logits = (2 * normal(B, T, V)).requires_grad_()
    ids = torch.randint(V, (B, T), generator=g)
    logp = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    old, ref = ((logp.detach() + s * normal(B, T)).clamp(max=-1e-3) for s in (0.4, 0.5))
    mask = torch.arange(T) < torch.tensor([9, 1, 4, 7, 2, 9, 5, 3])[:, None]
    return dict(
        logits=logits,
        ids=ids,
        logp=logp,
        old=old,
        ref=ref,
        mask=mask,
        A=normal(B),
        rewards=torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 0]),
    )


def ours(batch, spec, adv, **options):
    given = {
        "completion_mask": batch["mask"],
        "old_per_token_logps": batch["old"],
        "ref_per_token_logps": batch["ref"],
        **options,
    }
    return rw.policy_loss(
        batch["logits"], batch["ids"], adv, spec=spec, backend="reference", unused="ignore", **given
    )


def args(batch):
    return batch["logp"], batch["old"], batch["A"], batch["mask"]


def test_two_sided_clip(batch):
    r, A = (batch["logp"] - batch["old"]).exp(), batch["A"][:, None]
    assert ((r > 1.5) & (A < 0) & batch["mask"]).any()
    expected = -torch.minimum(r.clamp(max=1.5) * A, r.clamp(0.8, 1.2) * A)[batch["mask"]].mean()
    for plan in ("one_pass", "two_pass"):
        same(
            ours(batch, rw.methods.two_sided_clip(1.5), batch["A"], plan=plan).loss, expected, batch
        )


def test_glm5(batch):
    """SkyRL's ``rollout_is``: the gradient is that of the masked ratio."""
    r, A = (batch["logp"] - batch["old"]).exp(), batch["A"][:, None]
    inside = (r > 0.8) & (r < 1.3)
    expected = -torch.where(inside, r, 0).detach() * A * batch["logp"]
    for plan in ("one_pass", "two_pass"):
        same(
            ours(batch, rw.methods.glm5(0.2, 0.3), batch["A"], plan=plan).loss,
            expected[batch["mask"]].mean(),
            batch,
        )


@pytest.mark.parametrize(
    ("budget", "least"), [(0.04, 0.0), (0.15, 0.0), (0.04, 0.3), (100.0, 0.0), (1e-9, 0.05)]
)
def test_m2po(batch, budget, least):
    """There is one bound for the call. The token exactly at it may be on either side,
    and its gradient too.
    """
    low, high = oracle.m2po_bounds(*args(batch), budget, least, least)
    expected = papers.dapo(*args(batch), low, high)
    out = ours(batch, rw.methods.m2po(budget, least, least), batch["A"])
    torch.testing.assert_close(out.loss, expected, rtol=1e-11, atol=1e-13)
    (a,), (b,) = (
        torch.autograd.grad(x, batch["logits"], retain_graph=True) for x in (out.loss, expected)
    )
    differing = ((a - b).abs().amax(-1) > 1e-12).sum()
    assert differing <= (1 if least == 0 and budget < 1 else 0)
    unbounded = papers.dapo(*args(batch), 1.0, math.inf)
    assert (unbounded - expected).abs() > 1e-3 or budget == 100


@pytest.mark.parametrize(
    "options", [{}, {"log_clip_low": 0.2, "log_clip_high": 0.4, "log_clip_c": 0.9}, {"power": 0.0}]
)
def test_ctpo(batch, options):
    renamed = {"log_clip_low": "low", "log_clip_high": "high", "log_clip_c": "c", "power": "power"}
    expected = oracle.ctpo(*args(batch), **{renamed[name]: x for name, x in options.items()})
    same(ours(batch, rw.methods.ctpo(**options), batch["A"]).loss, expected, batch)


def test_ctpo_of_packed_rows(batch):
    """The same sequences in packed form have the same loss."""
    inside, lengths = batch["mask"], batch["mask"].sum(1)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    packed = rw.policy_loss(
        batch["logits"][inside],
        batch["ids"][inside],
        batch["A"][:, None],
        spec="ctpo",
        old_per_token_logps=batch["old"][inside],
        cu_seqlens=cu,
        backend="reference",
    )
    same(packed.loss, ours(batch, "ctpo", batch["A"]).loss, batch)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_prime_rl(batch, plan):
    for mask, low, high in (("dppo", 0.1, 0.05), ("ipo", 0.2, 0.08)):
        spec = rw.methods.prime_rl(mask, low, high, kl_tau=0.1)
        expected = oracle.prime_rl(*args(batch), mask, low, high, 0.1)
        same(ours(batch, spec, batch["A"], plan=plan).loss, expected, batch)
    with pytest.raises(rw.InvalidCall, match="expected 'dppo' or 'ipo'"):
        rw.methods.prime_rl("tv")


def test_fipo(batch):
    same(ours(batch, "fipo", batch["A"]).loss, oracle.fipo(*args(batch)), batch)
    weight = rw.weights.FutureInfluence(half_life=2.0, participation_max=1.4, safety_ratio=1.2)
    spec = rw.methods.ppo().with_weight(weight)
    same(
        ours(batch, spec, batch["A"]).loss,
        oracle.fipo(*args(batch), half_life=2.0, safety=1.2, delta=1.4),
        batch,
    )


def test_rlsd_is_the_loss_of_reweighted_advantages(batch):
    for negative_only, kind in (
        (False, rw.weights.SelfDistilledEvidence),
        (True, rw.weights.NegativeSelfDistilledEvidence),
    ):
        A = oracle.rlsd_advantages(batch["A"], batch["ref"], batch["old"], 0.7, 0.3, negative_only)
        spec = rw.methods.grpo().with_weight(kind(mixing=0.7, epsilon=0.3))
        assert spec.one_pass_unsupported_reason is None
        same(ours(batch, spec, batch["A"]).loss, ours(batch, "grpo", A).loss, batch)


def test_sdar(batch):
    expected = papers.grpo(
        batch["logp"], batch["old"], batch["ref"], batch["A"], batch["mask"], beta=0.0
    )
    expected = expected + 0.3 * oracle.sdar(batch["logp"], batch["ref"], batch["mask"], 2.0)
    same(ours(batch, rw.methods.sdar(0.3, 2.0), batch["A"]).loss, expected, batch)


def test_iw_opd(batch):
    expected = oracle.iw_opd(batch["logp"], batch["ref"], batch["old"], batch["mask"], 0.7)
    same(ours(batch, rw.methods.iw_opd(0.7), None).loss, expected, batch)
    same(
        ours(batch, "opd", None).loss,
        oracle.iw_opd(batch["logp"], batch["ref"], batch["old"], batch["mask"], 0.0),
        batch,
    )


@pytest.mark.parametrize("tau", [0.5, 0.01])
def test_real(batch, tau):
    """Also for groups with one label only, and where exp(1/tau) would overflow for some
    scores.
    """
    for rewards in (batch["rewards"], torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0])):
        scores = torch.stack(
            [
                (lp - o).mean()
                for lp, o in papers.sequences(batch["mask"], batch["logp"], batch["old"])
            ]
        )
        expected = oracle.real(scores, rewards, GROUPS, tau)
        out = ours(batch, rw.methods.real(tau, group_size=4), rewards)
        same(out.loss, expected, batch)
    by_ids = ours(
        batch, rw.methods.real(tau), rewards, group_ids=torch.tensor(GROUPS), num_groups=2
    )
    same(by_ids.loss, expected, batch)
    far = {**batch, "old": batch["old"] - 50.0}
    assert ours(far, rw.methods.real(0.01, group_size=4), batch["rewards"]).loss.isfinite()


def test_a_star_po(batch):
    expected = oracle.a2po(batch["logp"], batch["ref"], batch["A"], batch["mask"], 0.2)
    same(ours(batch, rw.methods.a_star_po(0.2), batch["A"]).loss, expected, batch)


def test_kto(batch):
    options = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    expected = oracle.kto(
        batch["logp"], batch["ref"], batch["rewards"], batch["mask"], 0.4, 0.3, 1.3, 0.7
    )
    for kl in (0.4, torch.tensor(0.4, dtype=torch.float64)):
        same(ours(batch, rw.methods.kto(kl=kl, **options), batch["rewards"]).loss, expected, batch)


def test_scale_rl(batch):
    for groups in ([0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 2, 1, 2, 2]):
        # one prompt has no response here
        given = {"group_ids": torch.tensor(groups), "num_groups": 4}
        for plan in ("one_pass", "two_pass"):
            same(
                ours(batch, rw.methods.scale_rl(1.3), batch["A"], plan=plan, **given).loss,
                oracle.scale_rl(*args(batch), groups, 1.3),
                batch,
            )
    spec = rw.methods.scale_rl(1.3, group_size=4)
    same(ours(batch, spec, batch["A"]).loss, oracle.scale_rl(*args(batch), GROUPS, 1.3), batch)


def test_vapo(batch):
    right = batch["rewards"] > 0
    for correct, adv in (
        (batch["rewards"], batch["A"]),
        (None, torch.where(right, 1, -1) * batch["A"].abs()),
    ):
        expected = oracle.vapo(batch["logp"], batch["old"], adv, batch["mask"], right.tolist(), 0.3)
        same(ours(batch, rw.methods.vapo(0.3, correct), adv).loss, expected, batch)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_unbiased_kl(batch, kind):
    rule = {
        "k1": rw.rules.penalties.K1Unbiased,
        "k2": rw.rules.penalties.K2Unbiased,
        "k3": rw.rules.penalties.K3Unbiased,
    }[kind]()
    spec = rw.PolicyLossSpec(surrogate=rw.rules.RULES["nll"](), penalties=(rw.Penalty(rule, 0.5),))
    kl = oracle.openrlhf_kl(batch["logp"], batch["ref"], batch["old"], kind)
    expected = (-batch["logp"] + 0.5 * kl)[batch["mask"]].mean()
    for plan in ("one_pass", "two_pass"):
        same(ours(batch, spec, None, plan=plan).loss, expected, batch)


def test_second_moment_mask(batch):
    drift = (batch["old"] - batch["ref"])[batch["mask"]].tolist()
    for threshold in (0.04, 0.1, 1e-6, 10.0):
        expected = torch.tensor(oracle.m2_mask(drift, threshold), dtype=torch.float64)
        spec = rw.PolicyLossSpec(
            surrogate=rw.rules.RULES["nll"](),
            weights=(rw.weights.SecondMomentMask(threshold=threshold),),
        )
        out = ours(
            batch,
            spec.replace(reduction=rw.NoReduction()),
            None,
            sampling_per_token_logps=batch["ref"],
        )
        got = (out.loss / -batch["logp"])[batch["mask"]]
        torch.testing.assert_close(got, expected)


def test_trm_and_stapo(batch):
    r = (batch["logp"] - batch["old"]).exp().detach()
    k3 = torch.where(batch["mask"], r - r.log() - 1, 0).amax(1)
    threshold = k3.median().item() + 1e-6
    kept = (k3 <= threshold)[:, None] & batch["mask"]
    spec = rw.methods.ppo().with_weight(rw.weights.trm(threshold))
    same(
        ours(batch, spec, batch["A"]).loss,
        ours(
            batch, "ppo", batch["A"], completion_mask=kept, num_items_in_batch=batch["mask"].sum()
        ).loss,
        batch,
    )
    H = papers.entropy(batch["logits"].detach())
    unlikely = (batch["A"][:, None] > 0) & (batch["logp"] < math.log(0.4)) & batch["mask"]
    spurious = unlikely & (H[unlikely].quantile(0.6) > H)
    mask = rw.weights.SpuriousTokens(probability=0.4, entropy_quantile=0.6)
    spec = rw.methods.ppo().replace(reduction=rw.TokenMean(weight=mask))
    assert 0 < spurious.sum() < batch["mask"].sum()
    same(
        ours(batch, spec, batch["A"]).loss,
        ours(batch, "ppo", batch["A"], completion_mask=batch["mask"] & ~spurious).loss,
        batch,
    )
    with pytest.raises(rw.InvalidCall, match="expected 'k2', 'k3' or 'tv'"):
        rw.weights.trm(0.1, "kl")


def test_adaptive_entropy():
    control, theirs = rw.schedules.AdaptiveEntropy(), oracle.EntController(0.005, 0.0, 1e-4, 0.2)
    state = control.init(dtype=torch.float64)
    entropies = torch.linspace(0, 0.4, 7).tolist() * 20 + [0.1] * 60
    for entropy in entropies:
        state, coef = control.update(state, torch.tensor(entropy))
        assert math.isclose(float(coef), theirs.update(entropy), abs_tol=1e-12)
    assert float(control.update(state, math.nan)[0].coef) == float(state.coef)
    assert rw.methods.grpo(entropy_coef=coef).tensors["penalties.0.coef"] is coef
