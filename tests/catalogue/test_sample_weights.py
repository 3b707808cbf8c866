"""Sample weights and selections (golden rows are in the package): against exhaustive
search, and inside a loss.
"""

import math

import pytest
import torch
from oracles import estimators

import reweight_ops as rw
from reweight_ops import sample_weights as sw

NAN = math.nan


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(got, expected, **tolerance):
    torch.testing.assert_close(
        got,
        torch.as_tensor(expected, dtype=got.dtype),
        **{"rtol": 1e-10, "atol": 1e-12, **tolerance},
    )


def test_exponential_advantage():
    assert sw.exponential_advantage(torch.zeros(2, 3), temperature=1.0, max_weight=20.0).shape == (
        2,
        3,
    )
    for wrong in (
        {"temperature": 0.0, "max_weight": 1.0},
        {"temperature": 1.0, "max_weight": -1.0},
    ):
        with pytest.raises(rw.InvalidCall, match=r"expected a number in \(0, inf[)\]]"):
            sw.exponential_advantage(f64(1), **wrong)


def test_kl_dro_is_the_worst_distribution():
    """No other weights of mean 1 give more loss less the KL penalty."""
    losses, temperature = f64(0.3, 2.0, 1.1, 0.7), 0.6
    w = sw.kl_dro(losses, temperature=temperature)

    def objective(w):
        return (w * losses).mean() - temperature * (w / 4 * w.log()).sum()

    assert w.mean().item() == pytest.approx(1)
    assert objective(w).item() == pytest.approx(
        temperature * math.log(sum(math.exp(x / temperature) for x in losses.tolist()) / 4)
    )
    for seed in range(20):
        other = (
            torch.softmax(
                w.log() + 0.2 * torch.randn(4, generator=torch.Generator().manual_seed(seed)), 0
            )
            * 4
        )
        assert objective(other) < objective(w)


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "upper", "extremes"])
def test_dynamic_loss_reweighting_is_detached(strategy):
    losses = f64(1, 2, 5).requires_grad_()
    got = sw.dynamic_loss_reweighting(losses, temperature=0.4, strategy=strategy)
    # The mean of w·loss is the authors' sum of softmax·loss; no gradient goes through
    # the weights.
    assert got.sum().item() == pytest.approx(3)
    (grad,) = torch.autograd.grad((got * losses).mean(), losses)
    close(grad, got / 3)
    close(sw.dynamic_loss_reweighting(f64(3, 3), temperature=1.0, strategy=strategy), [1, 1])


def test_dynamic_loss_reweighting_refuses():
    with pytest.raises(rw.InvalidCall, match="strategy is 'mid'"):
        sw.dynamic_loss_reweighting(f64(1, 2), temperature=1.0, strategy="mid")


def test_glow_without_a_floor():
    before = f64(2, 2 + math.log(3) / 20, 2)
    close(
        sw.glow(f64(2, 2, 1), before, alpha=2.0, min_weight=0.0),
        [1, 0.5, 2 / (1 + math.exp(20))],
        rtol=1e-9,
    )


def test_raft_refuses_to_keep_none():
    with pytest.raises(rw.InvalidCall, match="keep is 0"):
        sw.raft(f64(1), keep=0, group_size=1)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9])
def test_d3s_has_the_greatest_variance_of_all_subsets(count):
    g = torch.Generator().manual_seed(count)
    for trial in range(12):
        a = (
            torch.randint(-4, 5, (8,), generator=g).double()
            if trial % 2
            else torch.randn(8, generator=g, dtype=torch.float64) + 100
        )
        chosen = sw.d3s(a, num_samples=count)
        best, variance = estimators.d3s(a.tolist(), count)
        assert chosen.sum() == min(count, 8)
        assert variance(chosen.nonzero().flatten().tolist()) == pytest.approx(
            best, rel=1e-9, abs=1e-9
        )


def test_d3s_in_ragged_groups():
    """The variant D3S-I: each group on its own; a group with fewer rows than asked for
    is kept whole.
    """
    g = torch.Generator().manual_seed(5)
    ids = torch.tensor([2, 0, 1, 0, 2, 0, 2, 0, 2, 0, 2, 1])
    a = torch.randn(12, generator=g, dtype=torch.float64)
    a[9] = NAN
    chosen = sw.d3s(a, num_samples=3, group_ids=ids, num_groups=4)
    assert chosen[9] == 0
    for k, expected in ((0, 3), (1, 2), (2, 3)):
        rows = [i for i in range(12) if ids[i] == k and i != 9]
        picked = [n for n, i in enumerate(rows) if chosen[i]]
        best, variance = estimators.d3s(a[rows].tolist(), 3)
        assert len(picked) == expected and variance(picked) == pytest.approx(best)


def test_source_weights():
    logits, ids = f64(0, math.log(3)).requires_grad_(), torch.tensor([0, 1, 0, 0])
    losses = f64(1, 10, 2, 3)
    w = sw.source_weights(logits, ids)
    # softmax 1/4, 3/4: the mean of w·loss is 1/4·2 + 3/4·10.
    loss = (w * losses).mean()
    assert loss.item() == pytest.approx(8)
    # Through the softmax: d/da_1 = 1/4·3/4·(10 - 2).
    (grad,) = torch.autograd.grad(loss, logits)
    close(grad, [-1.5, 1.5])
    plus = [math.log(2), math.log(4)]  # softplus
    close(
        sw.source_weights(logits.detach(), ids, normalize="softplus"),
        [2 * plus[i] / sum(plus) for i in ids.tolist()],
    )
    with pytest.raises(rw.InvalidCall, match=r"source_ids\[1\] is 2"):
        sw.source_weights(logits, ids + 1)
    with pytest.raises(rw.InvalidCall, match="normalize is 'sum'"):
        sw.source_weights(logits, ids, normalize="sum")


def test_learned_source_weights_train_through_a_policy_loss():
    """As token weights that require grad: the gradient of the outer problem is exact,
    through two passes.
    """
    g = torch.Generator().manual_seed(1)
    tokens = torch.randn(3, 4, 6, generator=g, dtype=torch.float64)
    ids, sources = torch.randint(6, (3, 4), generator=g), torch.tensor([0, 1, 1])
    advantages = f64(1, -0.5, 2)

    def loss(source_logits):
        w = sw.source_weights(source_logits, sources)
        return rw.policy_loss(
            tokens, ids, advantages, spec=rw.methods.reinforce(), token_weights=w, plan="two_pass"
        ).loss

    assert torch.autograd.gradcheck(loss, f64(0.3, -0.2).requires_grad_())
