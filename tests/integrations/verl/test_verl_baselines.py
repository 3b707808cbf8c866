"""Advantage estimators against verl's own functions, on ragged groups, responses with
holes and an empty one.
"""

import numpy as np
import pytest
import torch
from verl_common import core_algos

import reweight_ops as rw

INDEX = np.array([0, 0, 0, 1, 1, 1, 2, 3, 3])
GROUPS = {"group_ids": torch.tensor(INDEX), "num_groups": 4}
B, T = 9, 8


@pytest.fixture(params=["whole", "holes"])
def data(request):
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(T) < torch.tensor([8, 5, 3, 4, 4, 2, 6, 0, 7])[:, None]
    if request.param == "holes":
        mask[[0, 1, 3, 8], [3, 1, 0, 2]] = False
    return {
        "rewards": torch.randint(0, 3, (B, T), generator=g).double(),
        "mask": mask,
        "logps": -3 * torch.rand(B, T, generator=g, dtype=torch.float64),
        "square": -torch.rand(B, T, generator=g, dtype=torch.float64),
        "ratio": torch.rand(B, T, generator=g, dtype=torch.float64) + 0.5,
    }


def theirs(name, rewards, mask, **options):
    advantages, _ = core_algos.get_adv_estimator_fn(name)(
        token_level_rewards=rewards, response_mask=mask.double(), index=INDEX, **options
    )
    return advantages


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", ["otb", "tir_otb"])
def test_optimal_token_baselines(data, kind, weighted, tail):
    name = {"otb": "optimal_token_baseline", "tir_otb": "tir_optimal_token_baseline"}[kind]
    ratio = data["ratio"] if weighted else None
    expected = theirs(
        name,
        data["rewards"],
        data["mask"],
        old_log_probs=data["logps"],
        sum_pi_squared=data["square"].exp(),
        rollout_is_weights=ratio,
        handle_zero_tail=tail,
    )
    poisoned = {
        k: torch.where(data["mask"], data[k], torch.nan) for k in ("rewards", "logps", "square")
    }
    got = getattr(rw.advantages, kind)(
        poisoned["rewards"],
        data["mask"],
        poisoned["logps"],
        poisoned["square"],
        importance_sampling_ratio=ratio,
        zero_tail=tail,
        **GROUPS,
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert expected.abs().sum() > 1


@pytest.mark.parametrize("scale", [True, False])
def test_grpo_passk(data, scale):
    """Of groups of at least two, as verl demands; scores tie in one."""
    scores = torch.tensor([3.0, 1, 2, 1, 1, 0, 0, 1, 4, 2], dtype=torch.float64)
    index = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    expected, _ = core_algos.get_adv_estimator_fn("grpo_passk")(
        token_level_rewards=scores[:, None],
        response_mask=torch.ones(10, 1),
        index=index,
        config={"norm_adv_by_std_in_grpo": scale},
    )
    got = rw.advantages.grpo_passk(
        scores, scale_rewards=scale, group_ids=torch.tensor(index), num_groups=4
    )
    torch.testing.assert_close(got, expected[:, 0].double())


def test_gpg(data):
    scores = torch.tensor([3.0, 0, 2, 1, 1, 0, 2, 1, 4], dtype=torch.float64)
    expected = theirs("gpg", scores[:, None].clone(), torch.ones(B, 1), f_norm=2.0)[:, 0]
    got = rw.advantages.gpg(scores, f_norm=2.0, singleton="reward", **GROUPS)
    torch.testing.assert_close(got, expected)
