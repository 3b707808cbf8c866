"""Mixers of objectives (golden rows are in the package): their updates against torch's
own optimizer, and what a common factor does to advantages.
"""

import itertools
import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops import objectives


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("squash", ["sigmoid", "tanh", "none"])
def test_constrained_rlhf_is_sgd_on_the_lagrangian(squash):
    mixer = objectives.ConstrainedRLHF(thresholds=(0.44, 0.238, 0.5), squash=squash)
    state = mixer.init(dtype=torch.float64)
    u = state.multipliers.clone().requires_grad_()
    optimizer = torch.optim.SGD([u], lr=0.1, momentum=0.1)
    apply = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "none": lambda x: x}[squash]
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        means = 2 * torch.rand(3, generator=g, dtype=torch.float64)
        optimizer.zero_grad()
        (apply(u) * (means - f64(0.44, 0.238, 0.5))).sum().backward()
        optimizer.step()
        if squash == "none":
            u.data.clamp_(min=0)
        state, weights = mixer.update(state, means)
        torch.testing.assert_close(weights, apply(u.detach()))
    assert (weights >= 0).all() or squash == "tanh"


def test_constrained_rlhf_presses_what_is_below_its_threshold():
    mixer = objectives.ConstrainedRLHF(thresholds=(0.5, 0.5))
    state = mixer.init()
    assert mixer.multipliers(state).tolist() == [0.5, 0.5]
    state, weights = mixer.update(state, torch.tensor([0.1, 0.9]))
    assert weights[0] > 0.5 > weights[1]
    assert mixer.init().multipliers.tolist() == [0, 0], "an update changes no state in place"


def test_constrained_rlhf_mix():
    # Normalized: KL (1, -1)/sqrt(2), the first reward the same, the second the
    # opposite.
    kl, a = f64(3, 1), f64(5, 0, 1, 2).view(2, 2)
    weights, unit = f64(0.25, 0.5), 1 / math.sqrt(2)
    got = objectives.ConstrainedRLHF(thresholds=(0.0, 0.0)).mix(kl, a, weights)
    torch.testing.assert_close(
        got, f64(1, -1) * unit * (2 - 0.75 + 0.25 - 0.5), rtol=1e-7, atol=1e-7
    )
    got = objectives.ConstrainedRLHF(thresholds=(0.0, 0.0), squash="none").mix(kl, a, weights)
    torch.testing.assert_close(got, f64(1, -1) * unit * (1 + 0.25 - 0.5), rtol=1e-7, atol=1e-7)
    tokens = objectives.ConstrainedRLHF(thresholds=(0.0, 0.0)).mix(
        torch.rand(3, 5), torch.rand(3, 5, 2), weights
    )
    assert tokens.shape == (3, 5)
    with pytest.raises(rw.InvalidCall, match=r"advantages has shape \(2, 3\), expected \(2, 2\)"):
        objectives.ConstrainedRLHF(thresholds=(0.0, 0.0)).mix(kl, torch.rand(2, 3), weights)


def volume_by_counting(points, reference, n=12):
    """Unit cells of a grid between the reference and (n, ..., n) that some point
    dominates.
    """
    cells = itertools.product(*(range(r, n) for r in reference))
    return sum(
        any(all(x > c for x, c in zip(p, cell, strict=True)) for p in points) for cell in cells
    )


@pytest.mark.parametrize("dimensions", [1, 2, 3, 4])
def test_hypervolume(dimensions):
    g = torch.Generator().manual_seed(dimensions)
    for _ in range(10):
        # also worse than the reference
        points = tuple(
            tuple(p) for p in torch.randint(-1, 8, (6, dimensions), generator=g).tolist()
        )
        reference = tuple(torch.randint(0, 3, (dimensions,), generator=g).tolist())
        assert objectives.hypervolume(points, reference) == volume_by_counting(points, reference, 8)


def test_hypervolume_reward_weighting():
    mixer = objectives.HypervolumeRewardWeighting(reference=(0.0, 0.0))
    state, _ = mixer.update(mixer.init(), (0.5, 0.4))
    assert state == ((0.5, 0.4),)
    # dominated: nothing gained, not kept
    assert mixer.update(state, (0.4, 0.3)) == (state, 0.5)
    assert len(mixer.update(state, (0.2, 1.0))[0]) == 2
    # worse than the start in one metric
    assert mixer.update(mixer.init(), (-1.0, 5.0)) == ((), 0.5)
    for wrong, message in (
        ((0.5,), "1 metrics, but the reference has 2"),
        ((0.5, math.nan), "are not finite"),
    ):
        with pytest.raises(rw.InvalidCall, match=message):
            mixer.update((), wrong)


def test_a_factor_of_all_rewards_cancels_in_a_standard_deviation():
    rewards = f64(1, 0, 0.5, 0.2)
    _, weight = objectives.HypervolumeRewardWeighting(reference=(0.0,)).update((), (0.7,))
    assert weight > 1.3
    torch.testing.assert_close(
        *(rw.advantages.grpo(r, epsilon=0, group_size=4) for r in (rewards, weight * rewards))
    )
    torch.testing.assert_close(
        *(
            w * rw.advantages.dr_grpo(r, group_size=4)
            for r, w in ((rewards, weight), (weight * rewards, 1))
        )
    )


def test_gradient_reward_weighting():
    mixer = objectives.GradientRewardWeighting(learning_rate=0.1, regularization=0.2)
    state = mixer.init(3, dtype=torch.float64)
    gradients = f64(1, 0, 0, 2, -1, 0).view(3, 2)  # sum (0, 2): influences 0, 4, 0
    influences = objectives.gradient_influences(gradients)
    assert influences.tolist() == [0, 4, 0]
    state, weights = mixer.update(state, f64(0, 1e6, 0))
    assert weights.tolist() == [0, 1, 0] and state.isfinite().all(), (
        "what has vanished can come back"
    )


def test_recap_needs_a_window():
    with pytest.raises(TypeError, match="window"):
        objectives.Recap()
    with pytest.raises(rw.InvalidCall, match=r"expected a whole number in \[1, inf\)"):
        objectives.Recap(window=0)


def test_updates_read_no_value():
    """Meta tensors have no values: code that would wait for a GPU fails on them."""
    for mixer, count in (
        (objectives.ConstrainedRLHF(thresholds=(0.1, 0.2)), ()),
        (objectives.GradientRewardWeighting(), (2,)),
        (objectives.Recap(window=3), (2,)),
    ):
        _, weights = mixer.update(mixer.init(*count, device="meta"), torch.zeros(2, device="meta"))
        assert weights.shape == (2,) and weights.device.type == "meta"


def test_wrong_objectives():
    with pytest.raises(rw.InvalidCall, match="squash is 'relu'"):
        objectives.ConstrainedRLHF(thresholds=(1.0,), squash="relu")
    with pytest.raises(rw.InvalidCall, match="thresholds is empty"):
        objectives.ConstrainedRLHF(thresholds=())
    with pytest.raises(rw.InvalidCall, match=r"mean_rewards has shape \(3,\), expected \(2,\)"):
        mixer = objectives.ConstrainedRLHF(thresholds=(1.0, 2.0))
        mixer.update(mixer.init(), torch.zeros(3))
    with pytest.raises(rw.InvalidCall, match=r"expected \(K, P\)"):
        objectives.gradient_influences(torch.zeros(3))
