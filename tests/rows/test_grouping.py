"""What all functions on rewards share: group arguments, dtypes, ties, missing scores,
errors, devices, ``torch.compile``.
"""

import functools
import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops import advantages as adv
from reweight_ops import rewards, sample_weights
from reweight_ops._core.catalogue.registry import CATALOGUE

B, G, T = 24, 4, 6


def columns(dtype=torch.float64, device="cpu", seed=0):
    """A column of every kind that an estimator may take; rewards are 0, 1/2 or 1, with
    groups of equal ones and an all-wrong one.
    """
    g = torch.Generator().manual_seed(seed)
    r = torch.randint(0, 3, (B,), generator=g).to(dtype) / 2
    r[:G], r[G : 2 * G] = 0.1, 0
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    draws = {
        "r": r,
        "other": torch.rand(B, generator=g).to(dtype),
        "correct": (r > 0.4).to(dtype),
        "lengths": mask.sum(-1).to(dtype),
        "logps": -torch.rand(B, T, generator=g).to(dtype),
        "mask": mask,
        "per_func": torch.rand(B, 3, generator=g).to(dtype),
    }
    return {k: v.to(device) for k, v in draws.items()}


#: Name in the catalogue (or the function's) to a call on columns ``c`` and group
#: arguments.
GROUPED = {
    "advantage/grpo": lambda c, **k: adv.grpo(c["r"], **k),
    "advantage/grpo batch": lambda c, **k: adv.grpo(c["r"], scale_rewards="batch", **k),
    "advantage/dr_grpo": lambda c, **k: adv.dr_grpo(c["r"], **k),
    "advantage/gdpo": lambda c, **k: adv.gdpo(c["per_func"], **k),
    "advantage/rloo": lambda c, **k: adv.rloo(c["r"], normalize_advantages=True, **k),
    "advantage/opo": lambda c, **k: adv.opo(c["r"], c["lengths"], **k),
    "advantage/aapo": lambda c, **k: adv.aapo(c["r"], c["other"], scale_rewards=True, **k),
    "advantage/pvpo": lambda c, **k: adv.pvpo(c["r"], c["per_func"][: B // G], **k),
    "advantage/qae": lambda c, **k: adv.qae(c["r"], **k),
    "advantage/grpo_lead": lambda c, **k: adv.grpo_lead(c["r"] - 0.4, **k),
    "advantage/mapo_mixed": lambda c, **k: adv.mapo_mixed(c["r"], c["correct"], **k),
    "advantage/difficulty_prior": lambda c, **k: adv.difficulty_prior(
        c["r"], c["correct"], slope=2.0, normalize=True, **k
    ),
    "advantage/ngrpo": lambda c, **k: adv.ngrpo(c["r"], **k),
    "advantage/lens": lambda c, **k: adv.lens(c["correct"], c["logps"], c["mask"], **k),
    "advantage/canon": lambda c, **k: adv.canon(c["r"], c["other"], alpha=0.9, **k),
    "advantage/edge_grpo": lambda c, **k: adv.edge_grpo(c["r"], c["other"], **k),
    "advantage/hapo": lambda c, **k: adv.hapo(c["r"], c["lengths"], **k),
    "advantage/reinforce_plus_plus_baseline": lambda c, **k: adv.reinforce_plus_plus_baseline(
        c["r"], c["mask"], **k
    ),
    "advantage/lite_ppo": lambda c, **k: adv.lite_ppo(c["r"], **k),
    "advantage/gpg": lambda c, **k: adv.gpg(c["r"], **k),
    "advantage/a_star_po": lambda c, **k: adv.a_star_po(c["r"], c["per_func"][: B // G], **k),
    "advantage/grpo_passk": lambda c, **k: adv.grpo_passk(c["r"], **k),
    "advantage/passk_training": lambda c, **k: adv.passk_training(c["correct"], k=2, **k),
    "advantage/maxrl": lambda c, **k: adv.maxrl(c["r"], **k),
    "advantage/otb": lambda c, **k: adv.otb(c["r"], c["mask"], c["logps"], c["logps"] / 2, **k),
    "advantage/tir_otb": lambda c, **k: adv.tir_otb(
        c["r"], c["mask"], c["logps"], c["logps"] / 2, **k
    ),
    "reward/trust_grpo": lambda c, **k: rewards.trust_grpo(
        c["r"], c["other"], step=3, total_steps=10, **k
    ),
    "reward/grpo_lead_length": lambda c, **k: rewards.grpo_lead_length(
        c["correct"], c["lengths"], min_length=2.0, **k
    ),
    "reward/grpo_lambda_length": lambda c, **k: rewards.grpo_lambda_length(
        c["correct"], c["lengths"], alpha=0.5, **k
    ),
    "sample_weight/kl_tilt": lambda c, **k: sample_weights.kl_tilt(c["r"], beta=0.5, **k),
    "sample_weight/kl_dro": lambda c, **k: sample_weights.kl_dro(c["other"], temperature=0.5, **k),
    "sample_weight/raft": lambda c, **k: sample_weights.raft(c["r"], keep=2, **k),
    "sample_weight/d3s": lambda c, **k: sample_weights.d3s(c["other"], num_samples=3, **k),
    "sample_weight/dynamic_sampling": lambda c, **k: sample_weights.dynamic_sampling(
        c["r"], high=0.8, **k
    ),
    "sample_weight/selective_rehearsal": lambda c, **k: sample_weights.selective_rehearsal(
        c["other"], keep=1, **k
    ),
}


def remax(c):
    return adv.remax(
        c["r"],
        c["other"],
        c["mask"],
        gamma=0.9,
        kl_coef=0.1,
        per_token_logps=c["logps"],
        ref_per_token_logps=c["logps"] * 2,
    )


def gigpo(c):
    ids = torch.arange(B, device=c["r"].device)
    return adv.gigpo(c["r"], c["other"], ids % B, ids % 3, num_anchors=3, norm="std", group_size=G)


def chain(c):
    segments = adv.spo_segments(c["logps"], c["mask"], interval=2)
    return adv.spo_chain(c["per_func"], c["r"], segments, c["mask"])


def choice(c):
    """Of three options the right ones are those above their mean: at least one."""
    marks = c["per_func"]
    return rewards.soft_multi_choice(
        (marks - 0.7).relu(), (marks - marks.mean(1, keepdim=True)).relu()
    )


def sources(c):
    """Ids of five sources, or classes, and how many samples each has."""
    return torch.arange(B, device=c["r"].device) % 5, 1 + 50 * c["other"][:5]


#: Without group arguments.
OTHERS = {
    "advantage/gae": lambda c: adv.gae(c["r"], c["logps"], c["mask"], gamma=0.9)[0],
    "advantage/decoupled_gae": lambda c: adv.decoupled_gae(
        c["logps"], c["logps"], c["mask"], gamma=0.9
    )[1],
    "advantage/reinforce_plus_plus": lambda c: adv.reinforce_plus_plus(
        c["r"], c["mask"], gamma=0.9
    ),
    "advantage/remax": remax,
    "advantage/gigpo": gigpo,
    "advantage/spo_chain": chain,
    "advantage/spo_tree": lambda c: adv.spo_tree(
        c["r"], torch.arange(B, device=c["r"].device) // 3 - 1, scale="std"
    ),
    "reward/wco": lambda c: rewards.wco(c["per_func"]),
    "reward/uwo": lambda c: rewards.uwo(c["per_func"]),
    "reward/lsc": lambda c: rewards.lsc(c["per_func"], 0.5),
    "reward/weighted_mean": lambda c: rewards.weighted_mean(c["per_func"], c["other"][:3]),
    "reward/harmonic_mean": lambda c: rewards.harmonic_mean(c["per_func"]),
    "advantage/psr_nsr": lambda c: adv.psr_nsr(c["correct"]),
    "reward/soft_multi_choice": choice,
    "reward/traac": lambda c: rewards.traac(
        c["correct"], c["other"], c["lengths"], c["lengths"] + 1, scale=2.0
    ),
    "sample_weight/exponential_advantage": lambda c: sample_weights.exponential_advantage(
        c["r"], temperature=0.5, max_weight=3.0
    ),
    "sample_weight/dynamic_loss_reweighting": lambda c: sample_weights.dynamic_loss_reweighting(
        c["r"], temperature=0.4
    ),
    "sample_weight/glow": lambda c: sample_weights.glow(c["r"], c["other"]),
    "sample_weight/source_weights": lambda c: sample_weights.source_weights(
        c["other"][:6], torch.arange(B, device=c["r"].device) % 5
    ),
    "sample_weight/class_balanced": lambda c: sample_weights.class_balanced(*sources(c), beta=0.99),
    "sample_weight/upweight": lambda c: sample_weights.upweight(*sources(c), temperature=2.0),
    "sample_weight/focal": lambda c: sample_weights.focal(c["other"]),
    "sample_weight/trajectory_rw": lambda c: sample_weights.trajectory_rw(c["r"]),
    "sample_weight/trajectory_aw": lambda c: sample_weights.trajectory_aw(c["r"], c["other"]),
}
ALL = {**{name: functools.partial(f, group_size=G) for name, f in GROUPED.items()}, **OTHERS}
#: A row of ``per_func`` is a group: rewards of the reference policy.
REFERENCED = ("advantage/pvpo", "advantage/a_star_po")
IDS = {"group_ids": torch.arange(B) // G, "num_groups": B // G}


def test_every_entry_is_here():
    entries = {
        f"{kind}/{name}"
        for kind in ("advantage", "reward", "sample_weight")
        for name in CATALOGUE[kind]
    }
    assert entries == {name.split()[0] for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_shape_dtype_and_detachment(name):
    for dtype in (torch.float32, torch.float64):
        c = columns(dtype)
        c["r"].requires_grad_()
        c["per_func"].requires_grad_()
        got = ALL[name](c)
        assert (
            got.dtype == dtype
            and got.shape[0] == B
            and got.isfinite().all()
            and not got.requires_grad
        )
    exact = ALL[name](columns(torch.float64))
    torch.testing.assert_close(
        ALL[name](columns(torch.float32)), exact.float(), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("name", ALL)
def test_nothing_reads_a_value(name):
    """Meta tensors have no values: code that would wait for a GPU fails on them."""
    got = ALL[name](columns(device="meta"))
    assert got.device.type == "meta" and got.shape[0] == B


@pytest.mark.parametrize("kind", ["advantage", "reward", "sample_weight"])
def test_compiles_into_one_graph(kind):
    """All functions of a kind are in one graph: separate traces would take a minute and
    a half.
    """
    torch._dynamo.reset()
    names = [name for name in ALL if name.startswith(kind)]
    together = lambda c: tuple(ALL[name](c) for name in names)  # noqa: E731
    c = columns()
    for name, got, expected in zip(
        names, torch.compile(together, fullgraph=True, backend="eager")(c), together(c), strict=True
    ):
        torch.testing.assert_close(got, expected, msg=name)


@pytest.mark.parametrize("name", GROUPED)
def test_a_size_and_ids_are_the_same_groups(name):
    c = columns()
    torch.testing.assert_close(
        GROUPED[name](c, **IDS), GROUPED[name](c, group_size=G), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", GROUPED)
def test_rows_may_come_in_any_order(name):
    """Without ties: those go by row."""
    c = columns()
    c["r"] = c["r"] + torch.linspace(0, 0.01, B, dtype=torch.float64)
    place = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    moved = {k: v[place] for k, v in c.items()}
    if name in REFERENCED:
        moved["per_func"] = c["per_func"]
    got = GROUPED[name](moved, group_ids=IDS["group_ids"][place], num_groups=B // G)
    torch.testing.assert_close(got, GROUPED[name](c, group_size=G)[place], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", [n for n in GROUPED if "gdpo" not in n])
def test_a_completion_without_a_score_is_in_no_statistic(name):
    """The same as without its row; itself it has advantage or weight 0 (as a reward it
    stays NaN).
    """
    c = columns()
    drop = torch.tensor([2, 9, 10, *range(16, 20)])
    for key in (
        ("r", "correct")
        if "kl_dro" not in name and "d3s" not in name and "rehearsal" not in name
        else ("other",)
    ):
        c[key][drop] = math.nan
    keep = torch.ones(B, dtype=torch.bool)
    keep[drop] = False
    got = GROUPED[name](c, **IDS)
    rest = {k: v[keep] for k, v in c.items()}
    if name in REFERENCED:
        rest["per_func"] = c["per_func"]
    without = GROUPED[name](rest, group_ids=IDS["group_ids"][keep], num_groups=B // G)
    torch.testing.assert_close(got[keep], without, rtol=1e-10, atol=1e-12)
    assert (got[drop].isnan() if name.startswith("reward/") else got[drop] == 0).all()


#: Not those whose baseline is another's rewards, nor the optimal token baselines: the
#: end of a longest response has none.
OTHER_BASELINES = ("aapo", "pvpo", "a_star_po", "gdpo", "ngrpo", "lens", "otb", "tir_otb")
ZERO_FOR_EQUAL = [
    n for n in GROUPED if n.startswith("advantage/") and n.split("/")[1] not in OTHER_BASELINES
]


@pytest.mark.parametrize(
    "name",
    [n for n in ZERO_FOR_EQUAL if "baseline" not in n and "rloo" not in n and "canon" not in n],
)
def test_equal_rewards_and_single_completions_have_exactly_no_advantage(name):
    """Also for 0.1, whose sums are not exact; a division by epsilon would make
    advantages of the rounding.
    """
    c = columns(torch.float32)
    for value in (0.1, 1 / 3, 1e6):
        c["r"][:], c["correct"][:] = value, 1
        assert GROUPED[name](c, group_size=G).abs().max() == 0
        assert GROUPED[name](c, group_size=6).abs().max() == 0
    assert GROUPED[name](columns(), group_size=1).abs().max() == 0


def test_the_same_of_the_others():
    """Normalized over the batch, only a batch of equal rewards is without advantage;
    CANON's alpha moves equal rewards on purpose.
    """
    c = columns(torch.float32)
    c["r"][:] = 1 / 3
    assert adv.rloo(c["r"], normalize_advantages=True, group_size=G).abs().max() == 0
    assert adv.reinforce_plus_plus_baseline(c["r"], c["mask"], group_size=G).abs().max() == 0
    assert adv.canon(c["r"], c["other"], group_size=6).abs().max() == 0
    assert adv.canon(c["r"], c["other"], alpha=0.9, group_size=1).abs().max() == 0
    assert (
        adv.canon(c["r"], c["other"], alpha=0.9, inter_weight=1.0, group_size=6).abs().min() > 0.03
    )


@pytest.mark.parametrize("name", GROUPED)
def test_wrong_group_arguments(name):
    c = columns()
    call = functools.partial(GROUPED[name], c)
    optional = name.split("/")[1] in ("kl_tilt", "kl_dro", "d3s")
    wrong = [
        ({"group_size": G, **IDS}, "and not both"),
        ({"group_size": 5}, "divides the 24 rows"),
        ({"group_size": 0}, "divides the 24 rows"),
        ({"group_size": 4.0}, "divides the 24 rows"),
        ({"group_ids": IDS["group_ids"]}, "group_ids with num_groups"),
        ({**IDS, "num_groups": 0}, "expected a positive int"),
        ({**IDS, "num_groups": 5}, r"group_ids\[\d+\] is 5, outside \[0, num_groups=5\)"),
        ({**IDS, "group_ids": IDS["group_ids"] - 1}, r"group_ids\[\d+\] is -1, outside"),
        ({**IDS, "group_ids": IDS["group_ids"][1:]}, "group_ids must be an int32 or int64"),
        ({**IDS, "group_ids": IDS["group_ids"].double()}, "group_ids must be an int32 or int64"),
    ]
    for keywords, message in wrong if optional else [*wrong, ({}, "pass group_size")]:
        with pytest.raises(rw.InvalidCall, match=message):
            call(**keywords)
    with pytest.raises(TypeError, match="'groupsize'. Did you mean group_size"):
        call(groupsize=G)


@pytest.mark.parametrize("name", ALL)
def test_sixteen_bits_are_refused(name):
    c = {k: v.half() if v.is_floating_point() else v for k, v in columns().items()}
    with pytest.raises(rw.InvalidCall, match=r"torch.float16.*pass it as .float\(\)"):
        ALL[name](c)


def test_wrong_shapes_and_types():
    r = torch.rand(B)
    with pytest.raises(rw.InvalidCall, match=r"grpo: rewards has shape \(24, 1\), expected \(B,\)"):
        adv.grpo(r[:, None], group_size=G)
    with pytest.raises(rw.InvalidCall, match="grpo: rewards is a list"):
        adv.grpo(r.tolist(), group_size=G)
    with pytest.raises(
        rw.InvalidCall, match=r"aapo: reference_rewards has shape \(23,\), expected \(24,\)"
    ):
        adv.aapo(r, r[1:], group_size=G)
    with pytest.raises(rw.InvalidCall, match=r"gdpo: rewards has shape \(24,\), expected \(B, K\)"):
        adv.gdpo(r, group_size=G)
    with pytest.raises(rw.InvalidCall, match=r"wco: rewards has shape \(24,\), expected \(B, K\)"):
        rewards.wco(r)
    with pytest.raises(rw.InvalidCall, match="expected 'group', 'batch' or 'none'"):
        adv.grpo(r, scale_rewards="Group", group_size=G)
    with pytest.raises(rw.InvalidCall, match="expected 'zero' .* or 'reward'"):
        adv.rloo(r, singleton="one", group_size=G)
    with pytest.raises(rw.InvalidCall, match=r"gae: values has shape \(24,\), expected \(24, 6\)"):
        adv.gae(r, r, torch.ones(B, T))
    with pytest.raises(
        rw.InvalidCall,
        match=r"gae: rewards has shape \(3,\), expected \(24, 6\) per token, or \(24,\)",
    ):
        adv.gae(r[:3], torch.ones(B, T), torch.ones(B, T))
    with pytest.raises(rw.InvalidCall, match="without kl_coef they would have no effect"):
        adv.remax(
            r,
            r,
            torch.ones(B, T),
            per_token_logps=torch.ones(B, T),
            ref_per_token_logps=torch.ones(B, T),
        )
    for call, message in (
        (lambda: adv.qae(r, quantile=1.0, group_size=G), r"expected a number in \(0, 1\)"),
        (lambda: adv.canon(r, r, metric_kind="len", group_size=G), "'entropy' or 'length'"),
        (
            lambda: adv.lens(
                r, torch.ones(B, T), torch.ones(B, T), importance="mean", group_size=G
            ),
            "'length_normalized' or 'raw'",
        ),
        (lambda: adv.pvpo(r, torch.ones(5, 2), group_size=G), r"expected \(6, M\)"),
        (lambda: adv.spo_tree(r, r), "parents must be an int32 or int64"),
        (
            lambda: adv.gigpo(r, r, r, r, num_anchors=1, group_size=G),
            "episode_ids must be an int32 or int64",
        ),
    ):
        with pytest.raises(rw.InvalidCall, match=message):
            call()


def test_out_of_range_ids_are_visible_where_values_cannot_be_read():
    """Inside a graph, as on a GPU: that row is NaN, no other row changes."""
    ids = torch.tensor([0, 0, 7, -1, 1, 1])
    r = torch.tensor([1.0, 0, 5, 5, 2, 4])
    torch._dynamo.reset()
    got = torch.compile(
        lambda r, i: adv.grpo(r, group_ids=i, num_groups=2), fullgraph=True, backend="eager"
    )(r, ids)
    assert got.isnan().tolist() == [False, False, True, True, False, False]
    torch.testing.assert_close(got[[0, 1, 4, 5]], adv.grpo(r[[0, 1, 4, 5]], group_size=2))


def test_masked_tokens_are_never_read():
    c = columns()
    poisoned = {**c, "logps": c["logps"].masked_fill(~c["mask"], math.nan)}
    for name in (
        "advantage/gae",
        "advantage/decoupled_gae",
        "advantage/remax",
        "advantage/spo_chain",
    ):
        torch.testing.assert_close(OTHERS[name](poisoned), OTHERS[name](c))
    torch.testing.assert_close(
        GROUPED["advantage/lens"](poisoned, group_size=G),
        GROUPED["advantage/lens"](c, group_size=G),
    )
    none = torch.zeros(B, T)
    assert adv.reinforce_plus_plus(c["r"], none).abs().max() == 0
    assert adv.gae(c["r"], none, none).advantages.abs().max() == 0
    one = none.clone()
    one[3, 2] = 1
    # nothing to normalize by
    assert (
        adv.whiten(torch.full((B, T), math.nan).where(one == 0, torch.tensor(7.0)), one).abs().max()
        == 0
    )


def test_an_empty_batch():
    assert adv.grpo(torch.zeros(0), group_size=4).shape == (0,)
    assert adv.rloo(
        torch.zeros(0), group_ids=torch.zeros(0, dtype=torch.int64), num_groups=3
    ).shape == (0,)
