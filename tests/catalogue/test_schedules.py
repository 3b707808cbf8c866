"""Schedules by hand; Lopti's two passes and CAPO's masks inside real losses. Lopti in
TRL is in ``trl_hooks``.
"""

import math

import pytest
import torch
from oracles import papers

import reweight_ops as rw
from reweight_ops import schedules


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(7)
    B, T, V = 4, 6, 5
    logits = torch.randn(B, T, V, generator=g, dtype=torch.float64)
    ids = torch.randint(V, (B, T), generator=g)
    mask = torch.arange(T) < torch.tensor([6, 3, 5, 2])[:, None]
    old = rw.token_logps(logits, ids) + 0.1 * torch.randn(B, T, generator=g, dtype=torch.float64)
    return {
        "logits": logits,
        "ids": ids,
        "mask": mask,
        "old": old,
        "A": torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64),
    }


def test_lopti_passes_over_everything_twice():
    """A generator of mini-batches is not exhausted by the first pass; all of them, in
    order, with the unlikely tokens' loss first.
    """
    low, high = schedules.lopti(eta=0.3, beta=0.1)
    assert (low, high) == (
        rw.methods.lopti("low", eta=0.3, beta=0.1),
        rw.methods.lopti("high", eta=0.3, beta=0.1),
    ) and low != high
    order = list(schedules.lopti_updates((name for name in "abc"), eta=0.3, beta=0.1))
    assert order == [(low, "a"), (low, "b"), (low, "c"), (high, "a"), (high, "b"), (high, "c")]
    assert schedules.lopti("high_first", eta=0.3, beta=0.1) == (high, low)
    with pytest.raises(rw.InvalidCall, match="half is set by the schedule"):
        schedules.lopti(half="low")


def test_lopti_updates_are_the_two_steps_of_the_paper(batch):
    """Plain SGD over two mini-batches, four steps: against the paper's masked surrogate
    written out, with the logits as parameters.
    """
    rows = [slice(0, 2), slice(2, 4)]

    def surrogate(logp, part):
        r, A = torch.exp(logp - batch["old"][part]), batch["A"][part, None]
        return -torch.minimum(r * A, r.clip(0.8, 1.2) * A)

    expected = batch["logits"].clone().requires_grad_()
    for half in (0, 1):
        for part in rows:
            logp = torch.log_softmax(expected[part], -1).gather(-1, batch["ids"][part, :, None])[
                ..., 0
            ]
            halves = papers.lopti(
                surrogate(logp, part), batch["old"][part], batch["mask"][part], eta=0.2
            )
            (grad,) = torch.autograd.grad(halves[half], expected)
            expected = (expected.detach() - 0.5 * grad).requires_grad_()
    logits = batch["logits"].clone().requires_grad_()
    for spec, part in schedules.lopti_updates(rows, eta=0.2):
        out = rw.policy_loss(
            logits[part],
            batch["ids"][part],
            batch["A"][part],
            spec=spec,
            old_per_token_logps=batch["old"][part],
            completion_mask=batch["mask"][part],
        )
        (grad,) = torch.autograd.grad(out.loss, logits)
        logits = (logits.detach() - 0.5 * grad).requires_grad_()
    torch.testing.assert_close(logits, expected)
    assert (logits - batch["logits"]).abs().max() > 0.01


def test_capo(batch):
    mask = batch["mask"]
    early = schedules.capo(batch["A"], mask, step=29, switch_step=30)
    assert early.dtype == torch.bool
    # A = 0 is kept
    assert torch.equal(early, mask & torch.tensor([True, False, True, True])[:, None])
    assert torch.equal(schedules.capo(batch["A"], mask, step=30, switch_step=30), mask)
    assert torch.equal(
        schedules.capo(batch["A"], mask, step=torch.tensor(5), switch_step=torch.tensor(9)), early
    )
    tokens = batch["A"][:, None].expand(mask.shape).clone()
    tokens[0, 0] = -1
    assert schedules.capo(tokens, mask, step=0, switch_step=1)[0].tolist() == [
        False,
        True,
        True,
        True,
        True,
        True,
    ]
    with pytest.raises(
        rw.InvalidCall, match=r"advantages has shape \(3,\), expected \(4, 6\) or \(4,\)"
    ):
        schedules.capo(batch["A"][1:], mask, step=0, switch_step=1)


def test_capo_drops_the_kl_and_keeps_the_denominator(batch):
    """As its docstring says: mask and denominator mask give the expectation over all
    samples of 1[A >= 0]·(surrogate - beta·KL).
    """
    ref = batch["old"] - 0.3
    keep = schedules.capo(batch["A"], batch["mask"], step=0, switch_step=1)
    out = rw.policy_loss(
        batch["logits"],
        batch["ids"],
        batch["A"],
        spec=rw.methods.grpo(beta=0.1).replace(reduction=rw.TokenMean()),
        old_per_token_logps=batch["old"],
        ref_per_token_logps=ref,
        completion_mask=keep,
        denominator_mask=batch["mask"],
    )
    logp = torch.log_softmax(batch["logits"], -1).gather(-1, batch["ids"][..., None])[..., 0]
    r, A, d = torch.exp(logp - batch["old"]), batch["A"][:, None], ref - logp
    terms = -torch.minimum(r * A, r.clip(0.8, 1.2) * A) + 0.1 * (torch.exp(d) - d - 1)
    torch.testing.assert_close(out.loss, terms[keep].sum() / batch["mask"].sum())


def test_d3s():
    start, half, end = (
        schedules.d3s(p, num_samples=(16, 64), token_fraction=(0.2, 1.0)) for p in (0.0, 0.5, 1.0)
    )
    assert (start, end) == ((16, 0.2), (64, 1.0))
    advantages = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert rw.sample_weights.d3s(advantages, num_samples=half.num_samples).sum() == 40
    with pytest.raises(rw.InvalidCall, match=r"expected a number in \[0, 1\]"):
        schedules.d3s(1.5, num_samples=(1, 2), token_fraction=(0, 1))
    with pytest.raises(TypeError, match="num_samples"):
        schedules.d3s(0.5, token_fraction=(0, 1))


def test_tsa():
    assert schedules.tsa(torch.tensor(0.5), num_classes=2).item() == 0.75
    with pytest.raises(rw.InvalidCall, match="curve is 'cos'"):
        schedules.tsa(0.5, num_classes=2, curve="cos")


def test_relift():
    rewards = torch.tensor([0, 0, 0, 0, 0, 1, -1, -1, 0, -1.0])
    assert schedules.all_failed(rewards, group_size=2).tolist() == [True, True, False, False, False]
    assert schedules.all_failed(rewards, fail_value=-1.0, group_size=2).tolist() == [
        False,
        False,
        False,
        True,
        False,
    ]
    ids = {"group_ids": torch.tensor([0, 0, 2, 2]), "num_groups": 3}
    assert schedules.all_failed(torch.tensor([0, 0, 0, math.nan]), **ids).tolist() == [
        True,
        False,
        False,
    ]
    switch = schedules.Relift(buffer_size=5)
    state, due = switch.update(switch.update(switch.init(), 4)[0], 3)
    assert due and state.buffered == 2, "what is over stays"
    with pytest.raises(rw.InvalidCall, match="num_failed is -1"):
        switch.update(switch.init(), -1)
