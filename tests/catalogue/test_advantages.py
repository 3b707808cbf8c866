"""Advantage estimators against TRL's and verl's arithmetic, the papers' equations in
loops, and by hand.

The tests also cover what all estimators share.
"""

import math

import pytest
import torch
from oracles import estimators, trl_advantages, verl_advantages

import reweight_ops as rw
from reweight_ops import advantages as adv

NAN = math.nan


def close(got, expected, **tolerance):
    expected = torch.as_tensor(expected, dtype=got.dtype)
    torch.testing.assert_close(
        got,
        expected,
        **({"rtol": 1e-10, "atol": 1e-10} if got.dtype == torch.float64 else {}),
        **tolerance,
    )


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def ragged():
    """Groups of 4, 1, 6, 2 and 3 in mixed order, with ties, equal rewards and an
    all-wrong group.
    """
    g = torch.Generator().manual_seed(11)
    sizes = [4, 1, 6, 2, 3]
    ids = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])[
        torch.randperm(sum(sizes), generator=g)
    ]
    rewards = torch.randint(0, 4, (len(ids),), generator=g).double() / 2
    rewards[ids == 3] = 0.1
    return {
        "rewards": rewards,
        "ids": ids,
        "groups": {"group_ids": ids, "num_groups": len(sizes)},
        "generator": g,
    }


def by_group(ids, function, *columns):
    """A one-group oracle applied to every group of ragged rows."""
    out = torch.zeros(len(ids), dtype=torch.float64)
    for k in ids.unique():
        rows = (ids == k).nonzero().flatten()
        out[rows] = torch.tensor(
            function(*([c[i] for i in rows.tolist()] for c in columns)), dtype=torch.float64
        )
    return out


# --- TRL and verl ---------------------------------------------------------------------
@pytest.fixture
def tokens():
    """Ragged masks with a hole (a tool's answer), token rewards and values."""
    g = torch.Generator().manual_seed(5)
    B, T = 6, 9
    mask = (torch.arange(T) < torch.tensor([9, 4, 7, 2, 9, 5])[:, None]).double()
    mask[0, 3:5] = 0
    mask[4, 0] = 0
    draw = lambda: torch.randn(B, T, generator=g, dtype=torch.float64)  # noqa: E731
    outcome = torch.randint(0, 3, (B,), generator=g).double()
    last = torch.tensor([8, 3, 6, 1, 8, 4])
    token_rewards = torch.zeros(B, T, dtype=torch.float64).scatter(
        1, last[:, None], outcome[:, None]
    )
    return {
        "mask": mask,
        "rewards": draw() * mask,
        "values": draw() * mask,
        "outcome": outcome,
        "at_end": token_rewards,
        "draw": draw,
    }


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_is_trls(scale):
    g = torch.Generator().manual_seed(0)
    per_func = torch.randint(0, 3, (24, 2), generator=g).double()
    per_func[4:8] = 0.3  # equal rewards
    # one function, a row, all but one of a group
    per_func[1, 0], per_func[9], per_func[12:15] = NAN, NAN, NAN
    weights = f64(1.0, 0.5)
    expected = trl_advantages.grpo(per_func, weights, 4, scale)
    close(
        adv.grpo(rw.rewards.weighted_sum(per_func, weights), scale_rewards=scale, group_size=4),
        expected,
    )
    assert expected[9] == 0 and expected[12:16].abs().sum() == 0 and expected.abs().sum() > 5


def test_grpo_of_single_completions_is_trls_or_verls():
    rewards = f64(1.0, 0.5, -2.0)
    assert (
        adv.grpo(rewards, group_size=1).tolist()
        == [0, 0, 0]
        == trl_advantages.grpo(rewards[:, None], f64(1.0), 1).tolist()
    )
    close(adv.grpo(rewards, group_size=1, singleton="reward", epsilon=0), rewards)


def test_gdpo_is_trls():
    g = torch.Generator().manual_seed(1)
    per_func = torch.randint(0, 4, (20, 3), generator=g).double()
    per_func[2] = NAN
    weights = f64(1.0, 0.25, 2.0)
    close(adv.gdpo(per_func, weights, group_size=5), trl_advantages.gdpo(per_func, weights, 5))
    close(adv.gdpo(per_func, group_size=5), trl_advantages.gdpo(per_func, torch.ones(3), 5))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_rloo_is_trls(normalize, G):
    rewards = torch.randn(16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if G > 2:
        rewards[5], rewards[8:11] = NAN, NAN
    close(
        adv.rloo(rewards, normalize_advantages=normalize, group_size=G),
        trl_advantages.rloo(rewards, G, normalize),
    )


def test_group_estimators_are_verls(ragged):
    rewards, ids, groups = ragged["rewards"], ragged["ids"], ragged["groups"]
    mask = (
        torch.arange(5) < torch.randint(1, 6, (len(ids), 1), generator=ragged["generator"])
    ).double()
    token_rewards = torch.zeros_like(mask)
    token_rewards[:, 0] = rewards
    index = [f"prompt {i}" for i in ids.tolist()]
    close(
        adv.grpo(rewards, epsilon=1e-6, singleton="reward", **groups)[:, None] * mask,
        verl_advantages.grpo(token_rewards, mask, index),
    )
    close(
        adv.dr_grpo(rewards, singleton="reward", **groups)[:, None] * mask,
        verl_advantages.grpo(token_rewards, mask, index, norm_adv_by_std_in_grpo=False),
    )
    close(
        adv.rloo(rewards, singleton="reward", **groups)[:, None] * mask,
        verl_advantages.rloo(token_rewards, mask, index),
    )
    close(
        adv.opo(rewards, mask.sum(-1), singleton="reward", **groups)[:, None] * mask,
        verl_advantages.opo(token_rewards, mask, index),
    )
    close(
        adv.reinforce_plus_plus_baseline(rewards, mask, singleton="reward", **groups),
        verl_advantages.reinforce_plus_plus_baseline(token_rewards, mask, index),
    )


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_verls(tokens, gamma, lam):
    expected, returns = verl_advantages.gae(
        tokens["rewards"], tokens["values"], tokens["mask"], gamma, lam
    )
    got = adv.gae(tokens["rewards"], tokens["values"], tokens["mask"], gamma=gamma, lam=lam)
    close(got.advantages, expected * tokens["mask"])
    close(got.returns, returns * tokens["mask"])
    bare = adv.gae(
        tokens["rewards"], tokens["values"], tokens["mask"], gamma=gamma, lam=lam, whitened=False
    )
    close(
        bare.advantages,
        verl_advantages.gae(tokens["rewards"], tokens["values"], tokens["mask"], gamma, lam, False)[
            0
        ]
        * tokens["mask"],
    )


def test_decoupled_gae_is_two_passes_of_verls(tokens):
    got = adv.decoupled_gae(
        tokens["outcome"],
        tokens["values"],
        tokens["mask"],
        lam_actor=0.9,
        lam_critic=1.0,
        gamma=0.99,
    )
    actor, _ = verl_advantages.gae(tokens["at_end"], tokens["values"], tokens["mask"], 0.99, 0.9)
    _, critic = verl_advantages.gae(tokens["at_end"], tokens["values"], tokens["mask"], 0.99, 1.0)
    close(got.advantages, actor * tokens["mask"])
    close(got.returns, critic * tokens["mask"])


def test_gae_of_a_lambda_a_row(tokens):
    lam = torch.linspace(0.5, 1, 6, dtype=torch.float64)
    got = adv.gae(
        tokens["rewards"], tokens["values"], tokens["mask"], lam=lam, whitened=False
    ).advantages
    for i, value in enumerate(lam.tolist()):
        close(
            got[i],
            adv.gae(
                tokens["rewards"], tokens["values"], tokens["mask"], lam=value, whitened=False
            ).advantages[i],
        )


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus_is_verls(tokens, gamma):
    close(
        adv.reinforce_plus_plus(tokens["rewards"], tokens["mask"], gamma=gamma),
        verl_advantages.reinforce_plus_plus(tokens["rewards"], tokens["mask"], gamma),
    )
    close(
        adv.reinforce_plus_plus(tokens["outcome"], tokens["mask"], gamma=gamma),
        verl_advantages.reinforce_plus_plus(tokens["at_end"], tokens["mask"], gamma),
    )


def test_remax_is_verls_and_its_authors(tokens):
    greedy = f64(1, 0, 2, 0.5, 0, 1)
    expected = verl_advantages.remax(tokens["at_end"], greedy, tokens["mask"])
    close(adv.remax(tokens["outcome"], greedy, tokens["mask"]), expected * tokens["mask"])
    logps, refs = tokens["draw"](), tokens["draw"]()
    got = adv.remax(
        4 * tokens["outcome"],
        greedy,
        tokens["mask"],
        reward_clip=5,
        gamma=0.99,
        kl_coef=0.05,
        per_token_logps=logps,
        ref_per_token_logps=refs,
    )
    for i, row in enumerate(tokens["mask"].bool()):
        expected = estimators.remax(
            4 * tokens["outcome"][i].item(),
            greedy[i].item(),
            logps[i][row].tolist(),
            refs[i][row].tolist(),
        )
        close(got[i][row], expected)
        assert got[i][~row].abs().sum() == 0


# --- the papers, in loops -------------------------------------------------------------
def test_grpo_lead(ragged):
    signed = ragged["rewards"] - 0.6
    keep = ragged["ids"] != 1
    got = adv.grpo_lead(signed, **ragged["groups"])
    close(got[keep], by_group(ragged["ids"][keep], estimators.grpo_lead, signed[keep].tolist()))
    assert got[~keep].item() == 0


def test_mapo_mixed(ragged):
    correct, keep = ragged["rewards"] > 0.6, ragged["ids"] != 1
    got = adv.mapo_mixed(ragged["rewards"], correct, **ragged["groups"])
    close(
        got[keep],
        by_group(
            ragged["ids"][keep],
            estimators.mapo_mixed,
            ragged["rewards"][keep].tolist(),
            correct[keep].tolist(),
        ),
    )


def test_ngrpo(ragged):
    close(
        adv.ngrpo(ragged["rewards"], **ragged["groups"]),
        by_group(ragged["ids"], estimators.ngrpo, ragged["rewards"].tolist()),
    )
    two = adv.ngrpo(ragged["rewards"], max_reward=2.0, num_virtual=2, **ragged["groups"])
    close(
        two,
        by_group(ragged["ids"], lambda r: estimators.ngrpo(r, 2.0, 2), ragged["rewards"].tolist()),
    )


@pytest.mark.parametrize("K", [0.2, 0.4, 0.5, 0.6, 0.9])
@pytest.mark.parametrize("correction", [0, 1])
def test_qae(ragged, K, correction):
    keep = ragged["ids"] != 1
    got = adv.qae(ragged["rewards"], quantile=K, correction=correction, **ragged["groups"])
    close(
        got[keep],
        by_group(
            ragged["ids"][keep],
            lambda r: estimators.qae(r, K, correction),
            ragged["rewards"][keep].tolist(),
        ),
    )


@pytest.mark.parametrize("reading", ["length_normalized", "raw"])
@pytest.mark.parametrize("likely", [False, True])
def test_lens(ragged, reading, likely):
    """Also with probabilities near 1, where the raw reading of D matters."""
    g, ids = ragged["generator"], ragged["ids"]
    B, T = len(ids), 6
    logps = -torch.rand(B, T, generator=g, dtype=torch.float64) * (0.02 if likely else 3)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    correct = torch.zeros(B, dtype=torch.float64)
    # fewer than half: D_imp may exceed the other term
    for k, n in ((0, 1), (1, 1), (2, 2), (4, 3)):
        correct[(ids == k).nonzero()[:n]] = 1
    keep = (ids != 1) & (ids != 4)
    texts = [row[m].tolist() for row, m in zip(logps, mask, strict=True)]
    expected = by_group(
        ids[keep],
        lambda c, t: estimators.lens(c, t, reading),
        correct[keep].tolist(),
        [t for t, k in zip(texts, keep.tolist(), strict=True) if k],
    )
    got = adv.lens(
        correct, logps.masked_fill(~mask, NAN), mask, importance=reading, **ragged["groups"]
    )
    close(got[keep], expected)
    assert got[ids == 4].tolist() == [0, 0, 0]  # all correct: 0/0 as written
    assert got[ids == 3].abs().max() > 1e-4  # all wrong: it learns


@pytest.mark.parametrize("kind", ["entropy", "length"])
@pytest.mark.parametrize(
    ("mu", "alpha", "beta"), [(0.5, 1.0, 0.0), (1.0, 0.9, 0.1), (0.0, 0.9, 0.1), (0.3, 1.1, -0.2)]
)
def test_canon(ragged, kind, mu, alpha, beta):
    # with ties
    metric = torch.randint(0, 3, (len(ragged["ids"]),), generator=ragged["generator"]).double()
    keep = ragged["ids"] != 1
    got = adv.canon(
        ragged["rewards"],
        metric,
        metric_kind=kind,
        inter_weight=torch.tensor(mu),
        alpha=alpha,
        beta=beta,
        **ragged["groups"],
    )
    expected = by_group(
        ragged["ids"][keep],
        lambda r, m: estimators.canon(r, m, mu, alpha, beta, kind),
        ragged["rewards"][keep].tolist(),
        metric[keep].tolist(),
    )
    # mu is an fp32 tensor here
    torch.testing.assert_close(got[keep], expected, rtol=1e-6, atol=1e-7)
    assert got[~keep].item() == 0


def test_edge_grpo(ragged):
    entropy = 0.5 + torch.rand(
        len(ragged["ids"]), generator=ragged["generator"], dtype=torch.float64
    )
    keep = ragged["ids"] != 1
    got = adv.edge_grpo(ragged["rewards"], entropy, bounds=(0, math.inf), **ragged["groups"])
    close(
        got[keep],
        by_group(
            ragged["ids"][keep],
            estimators.edge_grpo,
            ragged["rewards"][keep].tolist(),
            entropy[keep].tolist(),
        ),
    )
    close(adv.edge_grpo(ragged["rewards"], entropy, **ragged["groups"]), got)
    certain = adv.edge_grpo(f64(1, 0), f64(0, 1), group_size=2)
    # bound 0.1
    assert certain.isfinite().all() and certain[0] == pytest.approx(
        10 * 0.5 / (math.sqrt(0.5) + 1e-4)
    )
    assert adv.edge_grpo(f64(1, 0), f64(0, 0), group_size=2).isfinite().all()


def test_hapo(ragged):
    lengths = torch.randint(1, 9, (len(ragged["ids"]),), generator=ragged["generator"])
    keep = ragged["ids"] != 1
    got = adv.hapo(ragged["rewards"], lengths, **ragged["groups"])
    close(
        got[keep],
        by_group(
            ragged["ids"][keep],
            estimators.hapo,
            ragged["rewards"][keep].tolist(),
            lengths[keep].tolist(),
        ),
    )


def test_spo_chain():
    g = torch.Generator().manual_seed(8)
    B, T = 8, 40
    logps = torch.where(torch.rand(B, T, generator=g) < 0.5, -0.01, -1.0).double()
    logps[2] = -0.01  # no choice anywhere
    logps[3, 0] = -1.0  # a cut before the first token
    logps[4, 0] = -0.01
    lengths = torch.tensor([40, 13, 9, 40, 40, 1, 0, 22])
    mask = torch.arange(T) < lengths[:, None]
    segments = adv.spo_segments(logps.masked_fill(~mask, NAN), mask, interval=5)
    values = torch.rand(B, int(segments.cuts.max()), generator=g, dtype=torch.float64)
    unread = torch.arange(values.shape[1]) >= segments.cuts[:, None]
    rewards = torch.rand(B, generator=g, dtype=torch.float64)
    got = adv.spo_chain(values.masked_fill(unread, NAN), rewards, segments, mask)
    for i in range(B):
        close(
            got[i][mask[i]],
            estimators.spo_chain(logps[i][mask[i]].tolist(), values[i].tolist(), rewards[i].item()),
        )
        assert got[i][~mask[i]].abs().sum() == 0
    with pytest.raises(rw.InvalidCall, match=r"segments.cuts\[0\] is 4, outside \[0, S \+ 1=2\)"):
        adv.spo_chain(values[:, :1], rewards, segments, mask)


def test_spo_tree_refuses_a_parent_that_is_no_row():
    values = f64(0.5, 0.25, 0.75)
    with pytest.raises(
        rw.InvalidCall, match=r"parents\[2\] is 3, outside \[-1, the number of rows=3\)"
    ):
        adv.spo_tree(values, torch.tensor([-1, 0, 3]))


def test_spo_tree_knows_a_long_path_from_a_cycle():
    """Read, and in one graph for any number of nodes, where it is NaN."""
    torch._dynamo.reset()
    graph = torch.compile(adv.spo_tree, fullgraph=True, dynamic=True, backend="eager")
    for n in (1, 2, 3, 4, 5, 64, 65, 100, 127, 128, 129):
        values, path = torch.rand(n), torch.arange(n) - 1
        gains = adv.spo_tree(values, path)
        torch.testing.assert_close(gains[1:], values.diff())
        torch.testing.assert_close(graph(values, path), gains)
        path[n // 2] = n - 1
        below = torch.arange(n) >= n // 2
        with pytest.raises(rw.InvalidCall, match="among the ancestors"):
            adv.spo_tree(values, path)
        assert torch.equal(graph(values, path).isnan(), below)
    assert adv.spo_tree(torch.rand(0), torch.arange(0)).shape == (0,)


@pytest.mark.parametrize("norm", ["mean", "std"])
def test_gigpo(norm):
    g = torch.Generator().manual_seed(4)
    groups = [0, 0, 0, 1, 1, 1]
    returns = torch.randint(0, 3, (6,), generator=g).double()
    episode_ids = torch.randint(0, 6, (30,), generator=g)
    anchors = torch.randint(0, 7, (30,), generator=g)
    values = torch.randn(30, generator=g, dtype=torch.float64)
    got = adv.gigpo(
        returns,
        values,
        episode_ids,
        anchors,
        num_anchors=7,
        norm=norm,
        group_ids=torch.tensor(groups),
        num_groups=2,
    )
    steps = list(zip(episode_ids.tolist(), anchors.tolist(), values.tolist(), strict=True))
    close(got, estimators.gigpo(list(zip(groups, returns.tolist(), strict=True)), steps, norm))
    with pytest.raises(rw.InvalidCall, match="outside \\[0, num_anchors=6\\)"):
        adv.gigpo(returns, values, episode_ids, anchors, num_anchors=6, group_size=3)


def test_discounted_returns():
    # 2 + .5·(0 + .5·4) = 3 over the hole; the masked token gets 0.
    mask = torch.tensor([[1, 0, 1, 1, 0]])
    close(adv.discounted_returns(f64(2, 9, 0, 4, 9)[None], mask, gamma=0.5), [[3, 0, 2, 4, 0]])
    close(adv.discounted_returns(f64(8), mask, gamma=0.5), [[2, 0, 4, 8, 0]])


# --- by hand (golden rows are in the package) -----------------------------------------
def test_ngrpo_of_an_all_right_group():
    assert adv.ngrpo(torch.ones(4), group_size=4).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("rewards", "K", "baseline"),
    [
        # p = 3/5 = 1 - K: a tie, in floating point 0.6 <= 1 - 0.4 is decided by
        # rounding
        ([1, 1, 1, 0, 0], 0.4, 0),
        ([1] * 6 + [0] * 4, 0.4, 0),
        ([1] * 7 + [0] * 3, 0.4, 1),
        ([1] * 93 + [0] * 7, 0.07, 0),  # 0.07·100 is above 7 in floating point
        ([1] * 5 + [0] * 3, 0.4, 1),  # where the interpolated quantile would be 0.8
        ([1, 1], 0.6, 1),
    ],
)
def test_qae_baseline_at_ties(rewards, K, baseline):
    got = adv.qae(torch.tensor(rewards, dtype=torch.float64), quantile=K, group_size=len(rewards))
    assert [bool(x) for x in got] == [r != baseline for r in rewards]


def test_qae_totals_are_the_papers():
    """p <= 1 - K: the correct completions' share of the advantage is sqrt((1-p)/p)·p =
    sqrt(p(1-p)) of the group, with the population std.
    """
    p = 2 / 8
    got = adv.qae(
        torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64), epsilon=0, group_size=8
    )
    assert got.sum().item() / 8 == pytest.approx(math.sqrt(p / (1 - p)))


def test_mapo_refuses_what_turns_signs():
    with pytest.raises(rw.InvalidCall, match="a reward is negative"):
        adv.mapo_mixed(f64(1, -1, -1, -1), torch.tensor([1, 0, 0, 0]), group_size=4)
    assert adv.mapo_mixed(torch.zeros(4), torch.zeros(4), group_size=4).tolist() == [0] * 4


def test_canons_default_compares_with_the_other_half_only(ragged):
    """The authors' ``_lambda = 1``; with 1/2, the default before, the metric has no
    effect in even groups.
    """
    metric = torch.rand(len(ragged["ids"]), generator=ragged["generator"], dtype=torch.float64)
    keep = ragged["ids"] != 1
    columns = ragged["rewards"][keep].tolist(), metric[keep].tolist()
    close(
        adv.canon(ragged["rewards"], metric, **ragged["groups"])[keep],
        by_group(ragged["ids"][keep], lambda r, m: estimators.canon(r, m, mu=1.0), *columns),
    )


def test_canon_of_equal_parts_is_dr_grpo_for_even_groups_only():
    rewards, metric = torch.randn(
        2, 14, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    even = adv.canon(rewards[:8], metric[:8], inter_weight=0.5, group_size=8)
    close(even, adv.dr_grpo(rewards[:8], group_size=8))
    odd = adv.canon(rewards[:7], metric[:7], inter_weight=0.5, group_size=7)
    assert (odd - adv.dr_grpo(rewards[:7], group_size=7)).abs().max() > 1e-3
