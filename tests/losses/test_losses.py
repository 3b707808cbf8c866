"""Losses of sequences and tokens, shapes of the cross-entropy, and unlearning, against
independent transcriptions in fp64.

Loss and gradient are compared.
"""

import dataclasses
import math

import pytest
import torch
from loss_batch import B, T, V, ours, policy_batch, same
from oracles import papers

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.backends.select import load


@pytest.fixture(scope="module")
def batch():
    return policy_batch()


def test_gmpo(batch):
    spec = rw.methods.gmpo(epsilon_low=0.2, epsilon_high=0.3)
    drift = (batch["logp"] - batch["old"])[batch["mask"]]
    assert (drift < -0.2).any() and (drift > 0.3).any()
    expected = papers.gmpo(batch["logp"], batch["old"], batch["A"], batch["mask"], 0.2, 0.3)
    same(ours(batch, spec, batch["A"]).loss, expected, batch)
    same(
        ours(batch, spec, batch["A"], old_per_token_logps=None).loss,
        papers.gmpo(batch["logp"], batch["logp"].detach(), batch["A"], batch["mask"], 0.2, 0.3),
        batch,
    )


def test_gmpo_has_one_advantage_a_sequence(batch):
    """The paper's A is per sequence; advantages per token used to give a number that
    the paper does not define.
    """
    spec, per_token = rw.methods.gmpo(), batch["A"][:, None].expand_as(batch["old"])
    with pytest.raises(rw.InvalidCall, match="one advantage per sequence, these are one per token"):
        ours(batch, spec, per_token)
    packed = dict(
        cu_seqlens=torch.tensor([0, 4, 9]),
        completion_mask=None,
        old_per_token_logps=batch["old"][0],
    )
    one = {**batch, "logits": batch["logits"][0], "ids": batch["ids"][0]}
    with pytest.raises(rw.InvalidCall, match="these are one per token"):
        ours(one, spec, per_token[0], **packed)
    want = ours(one, spec, batch["A"][:2, None], **packed).loss
    assert want.isfinite() and ours(one, spec, 1.0, **packed).loss != want
    short = {name: batch[name][:, :1] for name in ("logits", "ids", "mask", "old")}
    assert torch.equal(ours(short, spec, per_token[:, :1]).loss, ours(short, spec, batch["A"]).loss)


@pytest.mark.parametrize(
    "options", [{}, dict(k_pos=1.0, lambda_pos=0.5, k_neg=2.0, lambda_neg=1.5)]
)
def test_vespo(batch, options):
    expected = papers.vespo(batch["logp"], batch["old"], batch["A"], batch["mask"], **options)
    same(ours(batch, rw.methods.vespo(**options), batch["A"]).loss, expected, batch)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_decoupled_ppo(batch, plan):
    for cap, mode in ((math.inf, "truncate"), (1.2, "truncate"), (1.2, "mask")):
        args = batch["logp"], batch["old"], batch["ref"], batch["A"], batch["mask"]
        expected = papers.decoupled_ppo(*args, cap=cap, masked=mode == "mask")
        spec = rw.methods.decoupled_ppo(ratio_max=cap, mode=mode)
        same(
            ours(batch, spec, batch["A"], sampling_per_token_logps=batch["ref"], plan=plan).loss,
            expected,
            batch,
        )
    with pytest.raises(rw.InvalidCall, match="mode is 'drop'"):
        rw.methods.decoupled_ppo(mode="drop")


def test_topr(batch):
    drift = ((batch["logp"] - batch["old"]) * batch["mask"]).sum(1)
    advantages = batch["A"].abs()
    assert drift.max() > 0 > drift.min()
    # one ratio above 1, and one below
    advantages[torch.stack([drift.argmax(), drift.argmin()])] *= -1
    same(
        ours(batch, "topr", advantages).loss,
        papers.topr(batch["logp"], batch["old"], advantages, batch["mask"]),
        batch,
    )
    r, A = (batch["logp"] - batch["old"]).exp().detach(), batch["A"][:, None]
    expected = (-torch.where(A < 0, r.clamp(max=1), 1.0) * A * batch["logp"])[batch["mask"]].mean()
    for plan in ("one_pass", "two_pass"):
        same(ours(batch, rw.methods.topr("token"), batch["A"], plan=plan).loss, expected, batch)


def test_kimi_opmd(batch):
    expected = papers.kimi_opmd(batch["logp"], batch["old"], batch["A"], batch["mask"], 0.3)
    same(ours(batch, rw.methods.kimi_opmd(0.3), batch["A"]).loss, expected, batch)
    same(
        ours(batch, rw.methods.kimi_opmd(0.3, level="token"), batch["A"]).loss,
        ours(batch, rw.methods.dro(0.3), batch["A"]).loss,
        batch,
    )


@pytest.mark.parametrize("against", ["old", "sampler"])
def test_opsm(batch, against):
    drift = batch["ref"] if against == "sampler" else batch["old"]
    mean = ((drift - batch["logp"]) * batch["mask"]).sum(1) / batch["mask"].sum(1)
    threshold = mean[batch["A"] < 0].median().item() - 1e-6
    dropped = (mean > threshold) & (batch["A"] < 0)
    assert 0 < dropped.sum() < (batch["A"] < 0).sum()
    stored = {"sampling_per_token_logps": batch["ref"]} if against == "sampler" else {}
    out = ours(batch, rw.methods.opsm(threshold, against), batch["A"], **stored)
    if against == "old":
        same(
            out.loss,
            papers.opsm(batch["logp"], batch["old"], batch["A"], batch["mask"], threshold),
            batch,
        )
    same(out.loss, ours(batch, "grpo", torch.where(dropped, 0, batch["A"])).loss, batch)


def test_grpo_guard(batch):
    d = (batch["logp"] - batch["old"])[batch["mask"]]
    A = batch["A"][:, None].expand(B, T)[batch["mask"]]
    for scale, factor in ((1.0, 1.0), (0.5, 0.5), ("std", 1 / d.detach().std(correction=0))):
        r = (factor * (d - d.mean().detach())).exp()
        expected = -papers.clipped_objective(r, A, 0.2, 0.2).mean()
        same(ours(batch, rw.methods.grpo_guard(0.2, scale), batch["A"]).loss, expected, batch)
    with pytest.raises(rw.InvalidCall, match="'std'"):
        rw.methods.grpo_guard(0.2, scale="variance")


def test_awm(batch):
    rows = papers.sequences(batch["mask"], batch["logp"], batch["old"], batch["A"])
    token = -torch.cat([(lp - o).exp() * a for lp, o, a in rows]).mean()
    same(ours(batch, rw.methods.awm(), batch["A"]).loss, token, batch)
    sequence = -torch.cat([(lp - o).mean().exp() * a for lp, o, a in rows]).mean()
    same(ours(batch, rw.methods.awm("sequence"), batch["A"]).loss, sequence, batch)
    clipped = -torch.cat(
        [papers.clipped_objective((lp - o).exp(), a, 0.1, 0.1) for lp, o, a in rows]
    ).mean()
    same(ours(batch, rw.methods.awm(epsilon=0.1), batch["A"]).loss, clipped, batch)


# --- shapes of the cross-entropy, unlearning ------------------------------------------
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.7, 2.0])
def test_comp_sum(batch, tau, plan):
    expected = papers.comp_sum(batch["logits"], batch["ids"], batch["mask"], tau)
    same(ours(batch, rw.methods.comp_sum(tau), None, plan=plan).loss, expected, batch)
    if tau == 2:
        same(
            ours(batch, rw.methods.mae(), None, plan=plan).loss,
            (1 - batch["logp"].exp())[batch["mask"]].mean(),
            batch,
        )
    if tau == 1:
        same(
            ours(batch, rw.methods.sft(), None, plan=plan).loss,
            -batch["logp"][batch["mask"]].mean(),
            batch,
        )
    if tau == 1.7:
        same(
            ours(batch, rw.methods.gce(0.7), None, plan=plan).loss,
            ((1 - batch["logp"].exp() ** 0.7) / 0.7)[batch["mask"]].mean(),
            batch,
        )


def test_ldam_and_ldr(batch):
    for plan in ("one_pass", "two_pass"):
        first, second = (ours(batch, rw.methods.ldam(1.3), None, plan=plan).loss for _ in range(2))
        same(first, papers.ldam(batch["logits"], batch["ids"], batch["mask"], 1.3), batch)
        same(
            second - math.log(V),
            papers.ldr(batch["logits"], batch["ids"], batch["mask"], 1.3),
            batch,
        )
    per_token = torch.rand(B, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = papers.ldam(batch["logits"], batch["ids"], batch["mask"], per_token[..., None])
    same(ours(batch, rw.methods.ldam(per_token), None).loss, expected, batch)


def test_margin_keeps_its_digits_near_certainty():
    """p = 1 - 1e-12: the loss is (1-p)·e^Δ, which 1/p - 1 in fp32 would lose."""
    logp = torch.tensor([-1e-12], dtype=torch.float32)
    out = rw.policy_loss_from_logps(logp, None, spec=rw.methods.ldam(math.log(3.0)))
    torch.testing.assert_close(out.loss, torch.tensor(3e-12), rtol=1e-6, atol=0)


def test_npo(batch):
    for beta in (0.1, 2.0):
        out = ours(
            batch,
            rw.methods.npo(beta),
            None,
            ref_per_token_logps=batch["ref"],
            old_per_token_logps=None,
        )
        same(out.loss, papers.npo(batch["logp"], batch["ref"], batch["mask"], beta), batch)
    # At the reference the slope is that of gradient ascent, with no kink.
    start = ours(
        batch,
        rw.methods.npo(),
        None,
        ref_per_token_logps=batch["logp"].detach(),
        old_per_token_logps=None,
    )
    same(
        start.loss,
        torch.stack([lp.sum() for (lp,) in papers.sequences(batch["mask"], batch["logp"])]).mean()
        - batch["logp"].detach()[batch["mask"]].sum() / B
        + 20 * math.log(2),
        batch,
    )
    # A sequence far from it does not overflow.
    far = ours(
        batch,
        rw.methods.npo(5.0),
        None,
        ref_per_token_logps=batch["ref"] - 500,
        old_per_token_logps=None,
    )
    assert torch.isfinite(far.loss) and torch.isfinite(far.coef).all()
    with pytest.raises(rw.InvalidCall, match="needs ref_per_token_logps"):
        ours(batch, "npo", None)


def test_npo_with_retained_sequences_and_of_a_batch(batch):
    """The mean is over the sequences to forget, whatever is retained; WAGLE's code has
    one log-ratio per batch.
    """
    logp, ref, mask = batch["logp"], batch["ref"], batch["mask"]
    labels = torch.tensor([-1.0, 1, 1, -1, -1, 1, 1, 1])
    forget, retain = mask & (labels < 0)[:, None], mask & (labels > 0)[:, None]
    given = dict(ref_per_token_logps=ref, old_per_token_logps=None)
    expected = (
        papers.npo(logp[labels < 0], ref[labels < 0], mask[labels < 0], 0.3)
        - 0.7 * logp[retain].mean()
    )
    same(ours(batch, rw.methods.npo(0.3, gamma=0.7), labels, **given).loss, expected, batch)
    counted = ours(batch, rw.methods.npo(0.3, gamma=0.7), labels, num_sequences_in_batch=6, **given)
    same(
        counted.loss,
        papers.npo(logp[labels < 0], ref[labels < 0], mask[labels < 0], 0.3) / 2
        - 0.7 * logp[retain].mean(),
        batch,
    )
    same(
        ours(batch, rw.methods.npo(0.3, level="batch"), None, **given).loss,
        papers.wagle_npo(logp, ref, mask, 0.3),
        batch,
    )
    expected = papers.wagle_npo(logp, ref, forget, 0.3) - 0.7 * logp[retain].mean()
    same(
        ours(batch, rw.methods.npo(0.3, gamma=0.7, level="batch"), labels, **given).loss,
        expected,
        batch,
    )
    with pytest.raises(rw.InvalidCall, match="npo: level is 'token'"):
        rw.methods.npo(level="token")


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_dft(batch, plan):
    logp = batch["logp"][batch["mask"]]
    same(ours(batch, "dft", None, plan=plan).loss, -(logp.exp().detach() * logp).mean(), batch)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_gradient_ascent_and_difference(batch, plan):
    mask, logp = batch["mask"], batch["logp"]
    same(ours(batch, "gradient_ascent", None, plan=plan).loss, logp[mask].mean(), batch)
    labels = torch.tensor([-1.0, 1, 1, -1, -1, 1, -1, 1])
    forget, retain = mask & (labels < 0)[:, None], mask & (labels > 0)[:, None]
    same(
        ours(batch, rw.methods.grad_diff(0.3), labels, plan=plan).loss,
        logp[forget].mean() - 0.3 * logp[retain].mean(),
        batch,
    )


def test_methods_refuse_what_they_do_not_know():
    for build in (
        lambda: rw.methods.topr("word"),
        lambda: rw.methods.kimi_opmd(level="word"),
        lambda: rw.methods.awm("batch"),
        lambda: rw.methods.opsm(0.5, against="ref"),
        lambda: rw.SequenceRatio(against="policy"),
    ):
        with pytest.raises(rw.InvalidCall):
            build()


def test_the_criterion_still_sees_a_wrong_kernel_under_coupled_rows(monkeypatch):
    """The allowance for coupled rows is small: a relative error of 1e-4 in one target
    column of VESPO fails.
    """
    import reweight_ops._core.backends.reference_token as reference
    from reweight_ops.testing import compare, make_batch

    def wrong(logits, ids, temperature, softmax, stats, derivatives, out):
        reference.token_grad(logits, ids, temperature, softmax, stats, derivatives, out)
        if out.dtype == torch.float32:
            worst = derivatives["logp"].abs().argmax()
            out.view(-1, out.size(-1))[worst, ids[worst]] *= 1 + 1e-4

    broken = dataclasses.replace(load("reference"), name="cpu", token_grad=wrong)
    monkeypatch.setitem(select._loaded, "cpu", broken)
    spec = rw.methods.vespo()
    batch = make_batch(spec)
    assert (
        compare(spec, batch, backend="reference").passed
        and not compare(spec, batch, backend="cpu").passed
    )


@pytest.mark.parametrize(
    "name", ["drpo", "hapo", "gmpo", "vespo", "grpo_guard", "npo", "grad_diff", "opsm", "ldam"]
)
def test_from_hidden_states_it_is_the_same_loss(name):
    from reweight_ops.testing import make_batch

    spec = rw.METHODS[name].build()
    given = make_batch(spec, (4, 10), 33, dtype=torch.float64)
    del given["logits"]
    g = torch.Generator().manual_seed(1)
    hidden, head = (
        torch.randn(size, generator=g, dtype=torch.float64, requires_grad=True)
        for size in ((4, 10, 16), (33, 16))
    )
    linear = rw.linear_policy_loss(hidden, head, spec=spec, chunk_rows=7, **given).loss
    logits = rw.policy_loss(hidden @ head.T, spec=spec, **given).loss
    torch.testing.assert_close(linear, logits)
    for a, b in zip(
        *(torch.autograd.grad(x, (hidden, head)) for x in (linear, logits)), strict=True
    ):
        torch.testing.assert_close(a, b)
        assert b.abs().sum() > 0
