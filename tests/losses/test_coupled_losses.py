"""DisCO and DRPO, whose losses couple the sequences of a prompt, against independent
transcriptions in fp64.

Loss and gradient are compared.
"""

import math

import pytest
import torch
from loss_batch import B, T, V, ours, policy_batch, same
from oracles import papers

import reweight_ops as rw


@pytest.fixture(scope="module")
def batch():
    return policy_batch()


@pytest.mark.parametrize("tau", [10.0, 1.0, math.inf])
@pytest.mark.parametrize("score", ["log_likelihood", "likelihood_ratio"])
def test_disco(batch, score, tau):
    groups = [0, 0, 0, 0, 1, 1, 1, 1]
    for rewards in (
        batch["rewards"],
        torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0]),
        torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 1]),
    ):
        rows = papers.sequences(batch["mask"], batch["logp"], batch["old"])
        scores = torch.stack(
            [(lp if score == "log_likelihood" else (lp - o).exp()).mean() for lp, o in rows]
        )
        drift = torch.cat([o - lp for lp, o in rows]).mean()
        expected = papers.disco(scores, rewards, groups, tau) + papers.kl_constraint(
            drift, 3.0, -0.5
        )
        spec = rw.methods.disco(score, tau=tau, kl_strength=3.0, kl_bound=-0.5, group_size=4)
        same(ours(batch, spec, rewards).loss, expected, batch)


def test_disco_constraint_estimators_and_bound(batch):
    rows = papers.sequences(batch["mask"], batch["logp"], batch["old"])
    d = torch.cat([lp - o for lp, o in rows])
    scores = torch.stack([lp.mean() for lp, _ in rows])
    objective = papers.disco(scores, batch["rewards"], [0, 0, 0, 0, 1, 1, 1, 1], 10.0)
    k3 = (d.exp() - d - 1).mean()
    spec = rw.methods.disco(kl_estimator="k3", kl_strength=2.0, kl_bound=0.01, group_size=4)
    same(
        ours(batch, spec, batch["rewards"]).loss,
        objective + papers.kl_constraint(k3, 2.0, 0.01),
        batch,
    )
    for off in (dict(kl_bound=1e3), dict(kl_strength=0.0)):
        same(
            ours(batch, rw.methods.disco(group_size=4, **off), batch["rewards"]).loss,
            objective,
            batch,
        )


def test_drpo(batch):
    rows = papers.sequences(batch["mask"], batch["logp"], batch["old"])
    scores = torch.stack([lp.mean() for lp, _ in rows])
    weights = [math.exp((1 - len(lp) / T) / 0.3) for lp, _ in rows]
    expected = papers.disco(scores, batch["rewards"], [0, 0, 0, 0, 1, 1, 1, 1], 10.0, weights)
    options = dict(length_temperature=0.3, kl_strength=0.0)
    same(
        ours(batch, rw.methods.drpo(group_size=4, **options), batch["rewards"]).loss,
        expected,
        batch,
    )
    longer = [math.exp((1 - len(lp) / 20) / 0.3) for lp, _ in rows]
    expected = papers.disco(scores, batch["rewards"], [0, 0, 0, 0, 1, 1, 1, 1], 10.0, longer)
    same(
        ours(batch, rw.methods.drpo(group_size=4, max_length=20, **options), batch["rewards"]).loss,
        expected,
        batch,
    )


def test_drpo_of_any_preference(batch):
    """``exp(r_i/λ)`` of the positives' rewards, also large ones without overflow; the
    length is one of them, up to a constant.
    """
    rows = papers.sequences(batch["mask"], batch["logp"], batch["old"])
    scores = torch.stack([lp.mean() for lp, _ in rows])
    groups, options = [0, 0, 0, 0, 1, 1, 1, 1], dict(kl_strength=0.0, group_size=4)
    rewards = batch["rewards"] * torch.tensor([2.0, 1, 1, 0.5, 1, 1.5, 3, 1])
    expected = papers.disco(
        scores, rewards, groups, 10.0, [math.exp(r / 0.7) for r in rewards.tolist()]
    )
    spec = rw.methods.drpo(0.7, preference="advantages", **options)
    same(ours(batch, spec, rewards).loss, expected, batch)
    same(ours(batch, spec, torch.where(rewards > 0, rewards + 1000, rewards)).loss, expected, batch)
    shorter = batch["rewards"] * torch.tensor(
        [2 - len(lp) / T for lp, _ in rows], dtype=torch.float64
    )
    same(
        ours(batch, rw.methods.drpo(0.3, preference="advantages", **options), shorter).loss,
        ours(batch, rw.methods.drpo(0.3, **options), batch["rewards"]).loss,
        batch,
    )
    for wrong in (dict(preference="size"), dict(preference="advantages", max_length=20)):
        with pytest.raises(rw.InvalidCall, match="GroupContrast"):
            rw.methods.drpo(group_size=4, **wrong)


def test_coupled_losses_take_prompts_by_id_and_packed_rows(batch):
    """Shuffled ``group_ids``, and the same tokens packed, give the loss of consecutive
    groups.
    """
    expected = ours(
        batch, rw.methods.drpo(group_size=4, kl_strength=2.0, kl_bound=-1.0), batch["rewards"]
    )
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    shuffled = {k: batch[k][order] for k in ("logits", "ids", "old", "mask")}
    spec = rw.methods.drpo(kl_strength=2.0, kl_bound=-1.0, max_length=T)
    got = ours(shuffled, spec, batch["rewards"][order], group_ids=order // 4, num_groups=2)
    torch.testing.assert_close(got.loss, expected.loss)
    keep = batch["mask"].flatten()
    cu = torch.cat([torch.zeros(1, dtype=torch.long), batch["mask"].sum(1).cumsum(0)])
    packed = {
        "logits": batch["logits"].flatten(0, 1)[keep],
        "ids": batch["ids"].flatten()[keep],
        "old": batch["old"].flatten()[keep],
    }
    got = ours(
        {**packed, "mask": torch.ones_like(packed["ids"])},
        spec,
        batch["rewards"],
        cu_seqlens=cu,
        group_ids=torch.arange(B) // 4,
        num_groups=2,
    )
    torch.testing.assert_close(got.loss, expected.loss)
    with pytest.raises(rw.InvalidCall, match="give max_length"):
        ours(
            {**packed, "mask": torch.ones_like(packed["ids"])},
            "drpo",
            batch["rewards"],
            cu_seqlens=cu,
            group_ids=torch.arange(B) // 4,
            num_groups=2,
        )


def test_coupled_losses_scale_and_mean_what_they_say(batch):
    """``loss_scale`` is a factor of a nonlinear loss, a row's shares add up, and
    coefficients are the gradient.

    Ignored rows are the same at both levels.
    """
    spec = rw.methods.drpo(group_size=4, kl_strength=2.0, kl_bound=-1.0)
    one, eight = (ours(batch, spec, batch["rewards"], loss_scale=s) for s in (1.0, 8.0))
    torch.testing.assert_close(eight.loss, 8 * one.loss)
    torch.testing.assert_close(eight.coef, 8 * one.coef)
    (grad,) = torch.autograd.grad(one.loss, batch["logits"], retain_graph=True)
    p = torch.softmax(batch["logits"], -1).detach()
    expected = one.coef[..., None] * (torch.nn.functional.one_hot(batch["ids"], V) - p)
    torch.testing.assert_close(grad, expected)
    assert one.plan == "two_pass" and (one.coef[~batch["mask"]] == 0).all()


def test_coupled_corner_cases(batch):
    spec = rw.methods.disco(kl_strength=0.0, group_size=4)
    for rewards in (torch.zeros(B), torch.ones(B)):  # every prompt has one label
        out = ours(batch, spec, rewards)
        assert (
            out.loss == 0
            and (torch.autograd.grad(out.loss, batch["logits"], retain_graph=True)[0] == 0).all()
        )
    nothing = ours({**batch, "mask": torch.zeros_like(batch["mask"])}, spec, batch["rewards"])
    assert (
        nothing.loss == 0
        and torch.isfinite(
            torch.autograd.grad(nothing.loss, batch["logits"], retain_graph=True)[0]
        ).all()
    )
    # An empty response is in neither set: prompt 0 keeps its other positive.
    some = batch["mask"].clone()
    some[3] = False
    rows = papers.sequences(batch["mask"], batch["logp"])
    scores = torch.stack([lp.mean() for (lp,) in rows])
    kept = [0, 1, 2, 4, 5, 6, 7]
    expected = papers.disco(scores[kept], batch["rewards"][kept], [0, 0, 0, 1, 1, 1, 1], 10.0)
    same(ours({**batch, "mask": some}, spec, batch["rewards"]).loss, expected, batch)
    # Scores far apart do not overflow the soft maximum.
    extreme = ours(
        batch, rw.methods.disco(tau=1e-3, kl_strength=0.0, group_size=4), batch["rewards"]
    )
    assert torch.isfinite(extreme.loss) and torch.isfinite(extreme.coef).all()


def test_coupled_calls_fail_loudly(batch):
    for options, message in (
        (dict(spec=rw.methods.drpo()), "either a group_size, or group_ids"),
        (dict(spec=rw.methods.drpo(group_size=3)), "8 sequences are not a multiple"),
        (
            dict(spec=rw.methods.drpo(group_size=4), group_ids=torch.arange(B), num_groups=B),
            "group_ids would have no effect",
        ),
        (
            dict(spec=rw.methods.drpo(), group_ids=torch.arange(B)),
            "group_ids and num_groups go together",
        ),
        (
            dict(spec=rw.methods.drpo(), group_ids=torch.arange(3), num_groups=3),
            "one for each of the 8 sequences",
        ),
        (
            dict(spec=rw.methods.dapo(), group_ids=torch.arange(B), num_groups=B),
            "group_ids would have no effect",
        ),
        (
            dict(spec=rw.methods.drpo(group_size=4), num_items_in_batch=3),
            "num_items_in_batch would have no effect",
        ),
        (dict(spec=rw.methods.drpo(group_size=4), adv=None), "reads advantages"),
    ):
        options = dict(options)
        with pytest.raises(rw.InvalidCall, match=message):
            ours(batch, options.pop("spec"), options.pop("adv", batch["rewards"]), **options)
    with pytest.raises(rw.UnsupportedRequest, match="on one rank"):
        rw.methods.drpo(process_group="dp")
    for wrong in (dict(score="x"), dict(kl_estimator="k2"), dict(group_size=0)):
        with pytest.raises(rw.InvalidCall):
            rw.methods.disco(**wrong)


@pytest.mark.parametrize("name", ["drpo", "hapo"])
def test_coupled_losses_compile_without_a_graph_break(name):
    from reweight_ops.testing import make_batch

    spec = rw.METHODS[name].build()
    given = make_batch(spec, (4, 10), 33)
    z = given.pop("logits").detach().requires_grad_()

    def loss(z):
        return rw.policy_loss(z, spec=spec, **given).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(z)
    torch.testing.assert_close(compiled, loss(z))
    torch.testing.assert_close(
        torch.autograd.grad(compiled, z)[0], torch.autograd.grad(loss(z), z)[0]
    )
