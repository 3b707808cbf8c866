"""Our advantage estimators under verl's registry, beside verl's own. CPU."""

import functools

import numpy as np
import pytest
import torch
from trainers import trainer
from verl_common import core_algos

import reweight_ops as rw
from reweight_ops.integrations import verl as integration

(algorithm,) = trainer("verl", "verl.trainer.config.algorithm", missing=("ray",))


@pytest.fixture(autouse=True)
def registry_restored(monkeypatch):
    monkeypatch.setattr(
        core_algos, "ADV_ESTIMATOR_REGISTRY", dict(core_algos.ADV_ESTIMATOR_REGISTRY)
    )


def config(**fields):
    return algorithm.AlgoConfig(**fields)


@pytest.fixture
def batch():
    """Seven completions of three prompts in any order, one prompt with a single one; a
    masked token inside (a tool's answer).
    """
    g = torch.Generator().manual_seed(3)
    mask = (torch.arange(8) < torch.tensor([8, 3, 5, 8, 1, 6, 7])[:, None]).long()
    mask[0, 2] = mask[5, 3] = 0
    rewards = torch.zeros(7, 8)
    last = mask.cumsum(-1).argmax(-1)
    rewards[torch.arange(7), last] = torch.randn(7, generator=g).mul(2).round() / 2
    rewards -= 0.01 * torch.rand(7, 8, generator=g) * mask  # a KL in the rewards
    return {
        "token_level_rewards": rewards,
        "response_mask": mask,
        "index": np.array(["b", "a", "b", "c", "a", "b", "a"], dtype=object),
    }


def run(name, batch, cfg=None):
    # verl writes into its rewards
    given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    advantages, returns = core_algos.get_adv_estimator_fn(name)(**given, config=cfg or config())
    assert advantages.shape == returns.shape == batch["response_mask"].shape
    return advantages


#: An estimator of verl's registry, and ours with the settings that say the same.
REWARD = {"singleton": "reward"}
SAME = {
    "grpo": functools.partial(rw.advantages.grpo, epsilon=1e-6, **REWARD),
    "rloo": functools.partial(rw.advantages.rloo, **REWARD),
    "opo": functools.partial(rw.advantages.opo, **REWARD),
    "reinforce_plus_plus": rw.advantages.reinforce_plus_plus,
    "reinforce_plus_plus_baseline": functools.partial(
        rw.advantages.reinforce_plus_plus_baseline, **REWARD
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_verls_own(batch, name):
    theirs = run(name, batch)
    integration.register_advantages({"mine": SAME[name]})
    ours = run("mine", batch)
    assert theirs.norm() > 1 and (theirs - ours).norm() <= 1e-6 * theirs.norm()


def test_the_settings_of_verls_configuration(batch):
    # without an epsilon, which would have no effect
    unscaled = functools.partial(rw.advantages.grpo, **REWARD)
    integration.register_advantages(
        {"mine": unscaled, "discounted": rw.advantages.reinforce_plus_plus}
    )
    theirs, _ = core_algos.compute_grpo_outcome_advantage(
        batch["token_level_rewards"].clone(),
        batch["response_mask"],
        batch["index"],
        norm_adv_by_std_in_grpo=False,
    )
    torch.testing.assert_close(
        run("mine", batch, config(norm_adv_by_std_in_grpo=False)), theirs, rtol=1e-6, atol=1e-6
    )
    half = config(gamma=0.5)
    theirs = run("reinforce_plus_plus", batch, half)
    assert (theirs - run("reinforce_plus_plus", batch)).norm() > 0.1
    torch.testing.assert_close(run("discounted", batch, half), theirs, rtol=1e-6, atol=1e-6)


def test_every_estimator_has_a_name_or_a_reason(batch):
    names = integration.register_advantages()
    assert integration.register_advantages() == names  # as after the plugin
    reasons = integration.left_out_advantages()
    known = {n.removeprefix("rw_") for n in names}
    assert known | set(reasons) == set(rw.advantages.__all__) & (
        known | set(reasons)
    ) and not known & set(reasons)
    assert {
        "grpo",
        "dr_grpo",
        "rloo",
        "opo",
        "qae",
        "hapo",
        "ngrpo",
        "reinforce_plus_plus",
    } <= known
    for name, reason in {
        "gae": "it needs values",
        "gdpo": "one by one",
        "remax": "adv_estimator=remax only",
        "canon": "it needs metric",
    }.items():
        assert reason in reasons[name], (name, reasons[name])
    for name in names:
        assert run(name, batch).isfinite().all(), name


def test_one_estimator_by_hand(batch):
    """``rw_qae`` of the prompts' rewards, spread over the tokens that are in."""
    integration.register_advantages()
    ids = torch.tensor([0, 1, 0, 2, 1, 0, 1])
    expected = rw.advantages.qae(batch["token_level_rewards"].sum(-1), group_ids=ids, num_groups=3)
    assert expected.norm() > 0.1
    torch.testing.assert_close(run("rw_qae", batch), expected[:, None] * batch["response_mask"])


@pytest.mark.parametrize(
    ("estimator", "change", "error", "message"),
    [
        (rw.advantages.gae, {}, rw.UnsupportedRequest, "verl cannot call mine: it needs values"),
        (rw.advantages.rloo, {"cfg": {"gamma": 0.9}}, rw.InvalidCall, "algorithm.gamma=0.9 would have no effect"),
        (rw.advantages.qae, {"cfg": {"norm_adv_by_std_in_grpo": False}}, rw.InvalidCall, "norm_adv_by_std_in_grpo=False would have no effect"),
        (functools.partial(rw.advantages.grpo, scale_rewards="batch"), {"cfg": {"norm_adv_by_std_in_grpo": False}}, rw.InvalidCall, "would have no effect"),
        (rw.advantages.grpo, {"index": None}, rw.InvalidCall, "the batch has no uid"),
    ],
)  # fmt: skip
def test_refusals(batch, estimator, change, error, message):
    change = dict(change)
    cfg = config(**change.pop("cfg", {}))
    with pytest.raises(error, match=message):
        integration.register_advantages({"mine": estimator})
        run("mine", batch | change, cfg)


def test_an_estimator_of_ones_own(batch):
    def centred(rewards, completion_mask):
        return rewards - rewards.mean()

    integration.register_advantages({"mine": centred})
    scores = batch["token_level_rewards"].sum(-1)
    torch.testing.assert_close(
        run("mine", batch), (scores - scores.mean())[:, None] * batch["response_mask"]
    )
