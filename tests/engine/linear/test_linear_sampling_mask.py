"""Kept sets from hidden states: the numbers of logits, of which only chunks exist."""

import pytest
import torch
from sampling_rows import SHAPE, VOCAB, kept_batch, shuffled

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops._core.engine import kept_ops
from reweight_ops._core.engine.linear import gemms

BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(b, Request("packed_stats", torch.device("cpu"), torch.float32)) is None
]
OVER = ("kept", "vocabulary")
WIDTH, ENTROPY = 5, rw.methods.grpo(entropy_coef=0.1)


def head(dtype=torch.float64, seed=3):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*SHAPE, WIDTH, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    _, ids, mask = kept_batch()
    ids = ids.clone()
    ids[1, 1] = -100
    return hidden, weight, ids, shuffled(mask)


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def _statistics(op, *first, **keywords):
    found = op(*first, stats=("logps", "entropies", "lse", "log_sum_p_sq", "max_logp"), **keywords)
    return (found.logps.sin() + found.entropies * found.lse).sum(), (
        found.logps,
        found.entropies,
        found.lse,
        found.log_sum_p_sq,
        found.max_logp,
    )


def _policy(op, *first, **keywords):
    out = op(*first, 0.5, spec=ENTROPY, **keywords)
    return out.loss, (out.per_token_logps, out.entropies, out.coef)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(
    "chunks",
    [
        {"chunk_rows": 5},
        {"chunk_rows": 5, "memory_budget": 1 << 20},
        {"chunk_rows": 4, "compact_rows": False},
        {},
    ],
)
@pytest.mark.parametrize("what", ["statistics", "one_pass", "two_pass"])
@pytest.mark.parametrize("readable", [True, False])
def test_as_from_logits(what, over, chunks, readable, monkeypatch):
    if not readable:  # as on a GPU: a chunk's number of entries is unknown
        monkeypatch.setattr(kept_ops, "_READABLE", ())
    hidden, weight, ids, kept = head()
    temperature = (
        torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
        .view(SHAPE)
        .requires_grad_(what != "one_pass")
    )
    keywords = {
        "sampling_mask": kept,
        "entropy_over": over,
        "temperature": temperature,
        "softcap": 6.0,
        "backend": "reference",
    }
    if what != "statistics":
        keywords["plan"] = what
    run, ops = (
        (_statistics, (rw.linear_token_stats, rw.token_stats))
        if what == "statistics"
        else (_policy, (rw.linear_policy_loss, rw.policy_loss))
    )
    ours, shown = run(ops[0], hidden, weight, ids, **keywords, **chunks)
    theirs, expected = run(ops[1], hidden @ weight.t(), ids, **keywords)
    close(ours, theirs)
    for a, b in zip(shown, expected, strict=True):
        close(a, b)
    leaves = [hidden, weight, *([temperature] if temperature.requires_grad else [])]
    for a, b in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        close(a, b)


@pytest.mark.parametrize("readable", [True, False])
def test_chunks_without_entries_and_rows_without_coefficients(readable, monkeypatch):
    if not readable:
        monkeypatch.setattr(kept_ops, "_READABLE", ())
    hidden, weight, ids, kept = head()
    ids, lengths = ids.clone().view(-1), kept.offsets.diff()
    ids[4:8], lengths[4:8] = -100, 0  # one chunk of 4 has no entry
    inside = torch.arange(12).repeat_interleave(kept.offsets.diff()) // 4 != 1
    kept = rw.SamplingMask(
        kept.token_ids[inside], torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    )
    advantages = torch.tensor([1.0, 0, 0, 2, 1, 1, 1, 1, 0, 0, 3, 0], dtype=torch.float64)
    hidden = hidden.detach().view(12, WIDTH).requires_grad_()
    expected = rw.policy_loss(
        hidden @ weight.t(),
        ids,
        advantages,
        spec="reinforce",
        sampling_mask=kept,
        backend="reference",
    ).loss
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for plan in ("one_pass", "two_pass"):
        for compact in (True, False):
            keywords = {
                "plan": plan,
                "compact_rows": compact,
                "chunk_rows": 4,
                "backend": "reference",
                "sampling_mask": kept,
            }
            out = rw.linear_policy_loss(
                hidden, weight, ids, advantages, spec="reinforce", **keywords
            )
            close(out.loss, expected)
            for a, b in zip(torch.autograd.grad(out.loss, (hidden, weight)), theirs, strict=True):
                close(a, b)
            assert (
                not compact
                or int(out.metrics.as_floats(names="trl").get("rows_dropped_backward", 1)) > 0
            )


def test_rows_in_any_order_and_second_derivatives():
    hidden, weight, ids, kept = head()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for keywords in ({"row_index": order}, {}):
        logps = rw.linear_token_logps(
            hidden, weight, ids, sampling_mask=kept, chunk_rows=5, backend="reference", **keywords
        )
        expected = rw.token_logps(hidden @ weight.t(), ids, sampling_mask=kept, backend="reference")
        close(logps, expected)
        for a, b in zip(
            torch.autograd.grad(logps.sin().sum(), (hidden, weight)),
            torch.autograd.grad(expected.sin().sum(), (hidden, weight)),
            strict=True,
        ):
            close(a, b)
    torch.autograd.gradgradcheck(
        lambda h: rw.linear_token_logps(h, weight, ids, sampling_mask=kept)[0, :2], (hidden,)
    )


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_change_no_bit_and_no_more_logits_exist(plan, backend, monkeypatch):
    hidden, weight, ids, kept = head(torch.float32)
    sizes = []
    plain = gemms.Chunk.__init__

    def counted(self, size, *rest):
        sizes.append(size)
        plain(self, size, *rest)

    monkeypatch.setattr(gemms.Chunk, "__init__", counted)
    found = []
    for compact in (True, False):
        keywords = {
            "chunk_rows": 4,
            "compact_rows": compact,
            "plan": plan,
            "backend": backend,
            "sampling_mask": kept,
        }
        found.append(
            rw.linear_policy_loss(hidden, weight, ids, 1.0, spec="grpo", **keywords).per_token_logps
        )
    assert found[0].equal(found[1]) and max(sizes) == 4


def test_a_module_takes_the_mask_with_the_call():
    hidden, weight, ids, kept = head(torch.float32)
    with pytest.raises(
        rw.InvalidCall, match="sampling_mask is not a setting: pass it with the call"
    ):
        rw.FusedLinearLogProbs(WIDTH, VOCAB, sampling_mask=kept)
    module = rw.FusedLinearLogProbs(WIDTH, VOCAB)
    module.weight.data.copy_(weight)
    assert module(hidden, ids, sampling_mask=kept).equal(
        rw.linear_token_logps(hidden, weight, ids, sampling_mask=kept)
    )
