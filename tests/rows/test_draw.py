"""``batch.draw`` and ``batch.largest``: how many they select, from which rows, and that
a draw is random.
"""

import math
from types import SimpleNamespace

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.rows.batch import BatchStatistics


def batch(keep):
    return BatchStatistics(
        SimpleNamespace(keep=keep, dtype=torch.float32, across=None, total=torch.sum)
    )


def test_a_draw_is_of_candidates_that_are_in():
    g = torch.Generator().manual_seed(0)
    keep, where = (torch.rand(500, generator=g) < p for p in (0.8, 0.5))
    n = int(keep.sum())
    drawn = batch(keep).draw(0.1, where, 3)
    assert int(drawn.sum()) == int(0.1 * n) and not drawn[~(keep & where)].any()
    # at least one
    assert torch.equal(batch(keep).draw(1e-4, where, 3).sum(), torch.tensor(1.0))
    # as many as there are
    assert torch.equal(batch(keep).draw(1.0, where, 3), (keep & where).float())
    assert (
        not batch(torch.zeros(5, dtype=torch.bool))
        .draw(0.5, torch.ones(5, dtype=torch.bool), 0)
        .any()
    )


def test_every_position_is_drawn_as_often_as_another():
    """Over 2000 seeds a position is drawn 500 ± 5·19 times; and the seed
    alone decides."""
    everyone = torch.ones(40, dtype=torch.bool)
    times = sum(batch(everyone).draw(0.25, everyone, seed) for seed in range(2000))
    assert times.sum() == 20000 and (times - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5
    assert torch.equal(
        batch(everyone).draw(0.25, everyone, 7),
        batch(everyone).draw(0.25, everyone, torch.tensor(7)),
    )
    # Two positions beside each other are drawn together a sixteenth of the time:
    # 0.25·9/39 of 2000 seeds is 115.
    both = sum(
        (d[:-1] * d[1:])
        for d in (batch(everyone).draw(0.25, everyone, seed) for seed in range(2000))
    )
    assert abs(both.mean() - 2000 * 0.25 * 9 / 39) < 10


def test_largest_rounds_down():
    x = torch.tensor([3.0, 9.0, 1.0, 9.0, 7.0])
    keep = torch.tensor([True, True, True, True, False])
    assert batch(keep).largest(x, 0.74).tolist() == [0, 1, 0, 1, 0]
    assert batch(keep).largest(x, 0.01).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_clip_cov_takes_the_gradient_of_the_drawn_tokens(backend):
    """The same tokens with every backend, other ones with another seed."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 20, 30, generator=g).requires_grad_()
    ids, A = torch.randint(30, (8, 20), generator=g), torch.randn(8, 20, generator=g)
    lost = []
    for seed in (0.0, 0.0, torch.tensor(1.0)):
        spec = rw.methods.clip_cov(fraction=0.05, lower=0.1, seed=seed)
        try:
            loss = rw.policy_loss(logits, ids, A, spec=spec, backend=backend).loss
        except rw.BackendUnavailable as error:
            pytest.skip(str(error))
        (grad,) = torch.autograd.grad(loss, logits)
        lost.append((grad == 0).all(-1))
    assert (
        int(lost[0].sum()) == 8
        and torch.equal(lost[0], lost[1])
        and not torch.equal(lost[0], lost[2])
    )


@pytest.mark.parametrize("value", [0.1, -2.3978953, 1 / 3])
@pytest.mark.parametrize("n", [7, 49, 1000])
def test_equal_numbers_have_no_deviation_from_their_mean(n, value):
    """The sign of a rounding would choose tokens by their advantage, and others on each
    backend.
    """
    x, advantages = torch.full((1, n), value), torch.linspace(-1, 1, n).roll(n // 2)[None]
    out = rw.policy_loss_from_logps(
        x.clone().requires_grad_(),
        advantages,
        spec=rw.methods.kl_cov(fraction=0.4),
        old_per_token_logps=x - 0.5,
    )
    penalised = out.per_token_loss + math.exp(0.5) * advantages > 0.1
    assert penalised[0].nonzero()[:, 0].tolist() == list(range(max(1, int(0.4 * n))))
