"""The verl oracle against verl's own registered losses, where verl is importable."""

import pytest
import torch
from oracles import verl as oracle
from verl_common import core_algos, policy_config
from verl_common import worker_config as actor

AGG = [{}, {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 11, "loss_scale_factor": 32}]


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(5)
    shape = (6, 10)
    old = -3 * torch.rand(shape, generator=g)
    # one empty sequence: verl leaves it out of sequence means
    lengths = torch.tensor([10, 0, 4, 7, 2, 10])
    return {
        "old": old,
        "log_prob": (old + 0.5 * torch.randn(shape, generator=g)).clamp(max=0).requires_grad_(),
        "adv": torch.randn(shape, generator=g),
        "mask": (torch.arange(10) < lengths[:, None]).float(),
        "rollout": torch.rand(shape, generator=g) + 0.5,
        "ref": old + 0.3 * torch.randn(shape, generator=g),
        "entropy": torch.rand(shape, generator=g).requires_grad_(),
    }


def config(**kw):
    return actor.ActorConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, rollout_n=1, **kw)


def assert_same(theirs, ours, *leaves):
    for leaf in leaves:
        (g_theirs,), (g_ours,) = (
            torch.autograd.grad(loss, leaf, retain_graph=True) for loss in (theirs, ours)
        )
        assert g_theirs.norm() > 0
        assert (g_theirs - g_ours).norm() <= 1e-6 * g_theirs.norm()
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)


#: Options that verl's configuration has for a mode, chosen so that nothing is left to
#: chance and something happens.
OWN = {
    "clip_cov": {"clip_cov_ratio": 0.4, "clip_cov_lb": 0.4},
    "kl_cov": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.3},
    "dro": {"dro_beta": 0.5},
}


@pytest.mark.parametrize("info", AGG, ids=["local", "global"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "rollout_is"])
@pytest.mark.parametrize("agg", oracle.AGG_MODES)
@pytest.mark.parametrize("mode", [m for m in oracle.LOSSES if m != "bypass_mode"])
def test_loss(batch, mode, agg, weighted, info):
    own = OWN.get(mode, {})
    cfg = config(
        clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=2.0, policy_loss=policy_config(**own)
    )
    cfg.global_batch_info.update(info)
    rollout = batch["rollout"] if weighted else None
    theirs, metrics = core_algos.get_policy_loss_fn(mode)(
        old_log_prob=batch["old"],
        log_prob=batch["log_prob"],
        advantages=batch["adv"],
        response_mask=batch["mask"],
        loss_agg_mode=agg,
        config=cfg,
        rollout_is_weights=rollout,
    )
    ours, our_metrics = oracle.policy_loss(
        mode,
        batch["log_prob"],
        batch["adv"],
        batch["mask"],
        old_logps=batch["old"],
        rollout_is_weights=rollout,
        clip_ratio_high=0.3,
        clip_ratio_c=2.0,
        loss_agg_mode=agg,
        global_batch_info=info,
        **own,
    )
    assert_same(theirs, ours, batch["log_prob"])
    assert our_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-7)


BYPASS = [("ppo_clip", None, 2.0), ("reinforce", None, 2.0)]
BYPASS += [
    ("reinforce", level, threshold)
    for level, lower in (("token", 0.8), ("sequence", 0.1))
    for threshold in (1.1, (lower, 1.3))
]


@pytest.mark.parametrize(("loss_type", "level", "threshold"), BYPASS)
def test_bypass_mode(batch, loss_type, level, threshold):
    """verl writes a pair of thresholds as ``"0.8_1.3"``."""
    theirs = "_".join(map(str, threshold)) if isinstance(threshold, tuple) else threshold
    correction = {
        "loss_type": loss_type,
        "rollout_is": level,
        "rollout_is_threshold": theirs,
        "rollout_rs": None,
    }
    cfg = config(clip_ratio_c=2.0, policy_loss=policy_config(rollout_correction=correction))
    expected, _ = core_algos.get_policy_loss_fn("bypass_mode")(
        old_log_prob=batch["old"],
        log_prob=batch["log_prob"],
        advantages=batch["adv"],
        response_mask=batch["mask"],
        config=cfg,
    )
    ours, _ = oracle.policy_loss(
        "bypass_mode",
        batch["log_prob"],
        batch["adv"],
        batch["mask"],
        old_logps=batch["old"],
        clip_ratio_c=2.0,
        rollout_loss_type=loss_type,
        rollout_is=level,
        rollout_is_threshold=threshold,
    )
    assert_same(expected, ours, batch["log_prob"])


def test_the_batch_meets_every_branch(batch):
    """Clips on both sides and the dual clip are active, or the comparison above would
    prove little.
    """
    _, metrics = oracle.policy_loss(
        "vanilla",
        batch["log_prob"],
        batch["adv"],
        batch["mask"],
        old_logps=batch["old"],
        clip_ratio_c=2.0,
    )
    assert min(metrics["actor/pg_clipfrac"], metrics["actor/pg_clipfrac_lower"]) > 0.01


@pytest.mark.parametrize("kind", oracle.KL_TYPES)
def test_kl_penalty(batch, kind):
    ref = batch["ref"].clone()
    # beyond the clamps of the argument and of the value
    ref[0, :4] = torch.tensor([25.0, -25.0, 5.0, -5.0])
    theirs = core_algos.kl_penalty(batch["log_prob"], ref, kind)
    ours = oracle.kl_penalty(batch["log_prob"], ref, kind)
    assert_same(theirs.sum(), ours.sum(), batch["log_prob"])


@pytest.mark.parametrize("agg", oracle.AGG_MODES)
def test_entropy_and_kl_terms(batch, agg):
    """Put together as ``ppo_loss`` does: ``pg - entropy_coeff H + kl_loss_coef KL``,
    each with the same aggregation.
    """
    cfg = config(clip_ratio_low=0.2, clip_ratio_high=0.2)
    pg, _ = core_algos.compute_policy_loss_vanilla(
        batch["old"], batch["log_prob"], batch["adv"], batch["mask"], agg, cfg
    )
    entropy = core_algos.agg_loss(batch["entropy"], batch["mask"], agg)
    kl = core_algos.agg_loss(
        core_algos.kl_penalty(batch["log_prob"], batch["ref"], "low_var_kl"), batch["mask"], agg
    )
    ours, _ = oracle.policy_loss(
        "vanilla",
        batch["log_prob"],
        batch["adv"],
        batch["mask"],
        old_logps=batch["old"],
        ref_logps=batch["ref"],
        entropies=batch["entropy"],
        loss_agg_mode=agg,
        entropy_coeff=0.01,
        kl_loss_coef=0.1,
    )
    assert_same(pg - 0.01 * entropy + 0.1 * kl, ours, batch["log_prob"], batch["entropy"])
