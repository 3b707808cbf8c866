"""Weights, schedules and mixtures that the survey papers name, against their sources'
arithmetic.
"""

import math

import pytest
import torch

import reweight_ops as rw


def test_class_balanced_is_the_authors():
    """``cifar_train.py``: ``(1 - β)/(1 - β^n)``, over its sum, times K; deferred to
    epoch 160.
    """
    counts, labels = [5000, 300, 12], torch.tensor([[0, 2], [1, 1]])
    for epoch in (0, 159, 160, 199):
        beta = [0, 0.9999][epoch // 160]
        raw = [(1 - beta) / (1.0 - beta**n) for n in counts]
        weights = torch.tensor([x / sum(raw) * 3 for x in raw], dtype=torch.float64)
        got = rw.sample_weights.class_balanced(
            labels, torch.tensor(counts, dtype=torch.float64), beta=rw.schedules.drw(epoch)
        )
        torch.testing.assert_close(got, weights[labels], rtol=1e-9, atol=1e-12)
    with pytest.raises(rw.InvalidCall, match="no sample"):
        rw.sample_weights.class_balanced(labels, torch.tensor([1.0, 0.0, 2.0]))
    with pytest.raises(rw.InvalidCall, match="outside"):
        rw.sample_weights.class_balanced(labels, torch.tensor([1.0, 2.0]))


def test_upweighted_samples_have_the_loss_of_temperature_sampling():
    counts, losses = (
        torch.tensor([10.0, 90, 900], dtype=torch.float64),
        torch.tensor([3.0, 2, 1], dtype=torch.float64),
    )
    ids = torch.repeat_interleave(torch.arange(3), counts.long())
    for tau in (1.0, 3.3, math.inf):
        share = counts ** (1 / tau) / (counts ** (1 / tau)).sum()
        got = (rw.sample_weights.upweight(ids, counts, temperature=tau) * losses[ids]).mean()
        torch.testing.assert_close(got, (share * losses).sum())


def test_dynamic_sampling_is_verls_filter():
    """``filter_groups``: a prompt stays if its metric's standard deviation is not 0, or
    it has one response.
    """
    index = [0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 4]
    rewards = torch.tensor([1.0, 1, 0, 0, 0, 1, 1, 1, 1, 0.5, 0.25])
    kept = [
        float(
            rewards[[j for j in range(11) if index[j] == q]].std(correction=0) > 0
            or index.count(q) == 1
        )
        for q in index
    ]
    groups = {"group_ids": torch.tensor(index), "num_groups": 5}
    assert rw.sample_weights.dynamic_sampling(rewards, **groups).tolist() == kept
    band = rw.sample_weights.dynamic_sampling(rewards, low=0.4, high=0.7, **groups)
    assert band.tolist() == [k if index[i] == 0 else 0.0 for i, k in enumerate(kept)]


def test_beta_dpo_is_the_authors_without_the_filter():
    control = rw.schedules.BetaDpo()
    state, mean = control.init(dtype=torch.float64), 0.0
    for gaps in ([0.1, -0.2, 3.0], [1.0, 1.5], [-40.0, -2.0], [0.0]):
        mean = 0.9 * mean + 0.1 * sum(gaps) / len(gaps)
        state, beta = control.update(state, torch.tensor(gaps))
        assert float(beta) == pytest.approx(
            max(0.1 * (1 + 0.6 * (sum(gaps) / len(gaps) - mean)), 1e-3), rel=1e-6
        )
    assert beta.dim() == 0 and rw.preference.dpo(beta=beta).beta is beta


def test_kd_is_cross_entropy_and_the_softened_kl():
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(3, 4, 9, generator=g, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    ids, mask = (
        torch.randint(9, (3, 4), generator=g),
        torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]),
    )
    got = rw.divergences.kd(s, t, ids, alpha=0.3, kd_temperature=2.5, completion_mask=mask)
    ce = torch.nn.functional.cross_entropy(s.transpose(1, 2), ids, reduction="none")
    kl = torch.nn.functional.kl_div(
        (s / 2.5).log_softmax(-1), (t / 2.5).softmax(-1), reduction="none"
    ).sum(-1)
    want = (0.3 * ce + 0.7 * 2.5**2 * kl) * mask
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), s)[0], torch.autograd.grad(want.sum(), s)[0]
    )


def test_kd_has_one_temperature():
    logits, ids = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(rw.InvalidCall, match="kd_temperature is the temperature of both"):
        rw.divergences.kd(logits, logits, ids, temperature=2.0)


def test_soft_multi_choice_counts_options():
    answers = ["A,B", "A,D", "A,B,C", "B", "D"]
    marks = torch.tensor([[float(o in a.split(",")) for o in "ABCD"] for a in answers])
    correct = torch.tensor([[1.0, 1, 1, 0]] * 5)
    expected = [
        len(set(a.split(","))) / 3 if set(a.split(",")) <= set("ABC") else 0.0 for a in answers
    ]
    assert rw.rewards.soft_multi_choice(marks, correct).tolist() == pytest.approx(expected)
    assert rw.rewards.soft_multi_choice(marks[:1], torch.zeros(1, 4)).isnan().all()
    with pytest.raises(rw.InvalidCall, match="one mark per option"):
        rw.rewards.soft_multi_choice(marks[0], correct[0])


def test_psr_and_nsr_by_the_authors_advantages():
    """``compute_psr_nsr_outcome_advantage``: returns, returns - 1, and weighted."""
    r = torch.tensor([1.0, 0.0, 1.0])
    assert torch.equal(rw.advantages.psr_nsr(r, positive_weight=1, negative_weight=0), r)
    assert torch.equal(rw.advantages.psr_nsr(r, positive_weight=0), r - 1)
    torch.testing.assert_close(rw.advantages.psr_nsr(r), torch.where(r == 1, 0.1 * r, r - 1))
