"""Collectives and bytes of a call agree with the formulas of docs/scaling.md."""

from unittest.mock import patch

import torch
from wire import collectives

import reweight_ops as rw
from bench.scaling import (
    AGREEMENT,
    DIVERGENCE_STATES,
    JSD_SUMS,
    LOGP_STATES,
    OVER_VOCABULARY,
    STABLEMAX_SUMS,
    hidden_gradient,
    row_vector,
    sequence_sum,
    states,
    whole_rows,
)
from reweight_ops._core.engine.linear.gemms import Chunk

N, D, V, R = 12, 8, 20, 3


def inputs():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(4 * V, (3, 4), generator=g)
    return (
        ids,
        torch.randn(3, 4, V, generator=g),
        torch.randn(3, 4, D, generator=g),
        torch.randn(V, D, generator=g),
    )


def rows(statistics, fp64=False):
    return ("all_gather", states(N, statistics, fp64))


def counted(ranks):
    """Differences from the formulas, for every kind of call."""
    group = ranks.group(range(4))
    ids, z, h, w = inputs()
    adv, agree, wrong = torch.ones(3), ("all_gather", AGREEMENT), []

    def check(name, function, forward, backward=()):
        with collectives() as seen:
            out = function()
        if seen != [agree, *forward]:
            wrong.append(f"{name}: {seen}")
        if out is None:
            return
        with collectives() as seen:
            out.sum().backward()
        if seen != list(backward):
            wrong.append(f"{name}, backward: {seen}")

    def leaf(x):
        return x.clone().requires_grad_()

    over = dict(process_group=group)
    check("logps", lambda: rw.token_logps(leaf(z), ids, **over), [rows(LOGP_STATES)])
    check(
        "entropies",
        lambda: rw.token_logps(leaf(z), ids, return_entropy=True, **over)[1],
        [rows(LOGP_STATES + 1)],
    )
    check("bf16", lambda: rw.token_logps(leaf(z.bfloat16()), ids, **over), [rows(LOGP_STATES)])
    check(
        "fp64",
        lambda: rw.token_logps(leaf(z.double()), ids, **over),
        [rows(LOGP_STATES, fp64=True)],
    )
    check(
        "loss",
        lambda: rw.policy_loss(leaf(z), ids, adv, spec="grpo", **over).loss,
        [rows(LOGP_STATES + 1)],
    )
    pick = dict(
        stats=("logps", "selected_logps", "topk_logps"),
        selected_ids=torch.tensor([0, 30, 70]),
        top_k=2,
    )
    picked = [rows(LOGP_STATES + 3 + 2 * 2)]
    check("picked", lambda: rw.token_stats(leaf(z), ids, **pick, **over).topk_logps, picked)
    top = rw.TopKLogps(ids[..., None], -torch.ones(3, 4, 1))
    check(
        "top-k teacher",
        lambda: rw.distillation_loss(leaf(z), top, **over).loss,
        [rows(LOGP_STATES + 1)],
    )
    sets = dict(sampling_mask=rw.SamplingMask(ids.flatten(), torch.arange(13)), **over)
    check(
        "kept sets",
        lambda: rw.token_logps(leaf(z), ids, return_entropy=True, **sets)[1],
        [rows(LOGP_STATES + 1)],
    )
    both = [rows(LOGP_STATES + OVER_VOCABULARY)]
    check(
        "two distributions",
        lambda: rw.token_logps(
            leaf(z), ids, return_entropy=True, entropy_over="vocabulary", **sets
        )[1],
        both,
    )
    jsd = [rows(DIVERGENCE_STATES), rows(JSD_SUMS)]
    check("jsd", lambda: rw.token_divergence(leaf(z), z, kind="generalized_jsd", **over), jsd)
    check("divergence", lambda: rw.token_divergence(leaf(z), z, **over), [rows(DIVERGENCE_STATES)])
    hidden = [("all_reduce", hidden_gradient(rows_of_chunk, D, 4)) for rows_of_chunk in (5, 5, 2)]
    linear = dict(chunk_rows=5, compact_rows=False, **over)
    check(
        "linear",
        lambda: rw.linear_token_logps(leaf(h), leaf(w), ids, **linear),
        [rows(LOGP_STATES)],
        hidden,
    )
    check(
        "frozen hidden states",
        lambda: rw.linear_token_logps(h, leaf(w), ids, **linear),
        [rows(LOGP_STATES)],
    )
    lora = rw.Lora(leaf(torch.ones(R, D)), leaf(torch.ones(V, R)))
    check(
        "lora",
        lambda: rw.linear_token_logps(leaf(h), w, ids, lora=lora, **linear),
        [rows(LOGP_STATES)],
        [*hidden, ("all_reduce", 4 * R * D)],
    )
    taught = [rows(LOGP_STATES + 1 + DIVERGENCE_STATES)]
    for kind, more in (("reverse_kl", []), ("generalized_jsd", [rows(JSD_SUMS)])):
        teacher = rw.Teacher(rw.HiddenLogits(h, w), 0.1, kind=kind)
        loss = dict(spec="grpo", teacher=teacher, **linear)
        check(
            f"teacher, {kind}",
            lambda loss=loss: rw.linear_policy_loss(h, leaf(w), ids, adv, **loss).loss,
            taught + more,
        )
    whole = dict(process_group=None, sequence_group=group)
    ids = ids % V
    check(
        "sequences, token mean",
        lambda: rw.policy_loss(leaf(z), ids, adv, spec="dapo", **whole).loss,
        [("all_reduce", 8)],
    )
    check(
        "sequences, known divisor",
        lambda: rw.policy_loss(leaf(z), ids, adv, spec="dapo", num_items_in_batch=9, **whole).loss,
        [],
    )
    per_sequence = ("all_reduce", sequence_sum(3))
    # the log-ratios and lengths of the ratio, and the lengths of the mean
    gspo = [per_sequence] * 3
    check(
        "sequences, ratio",
        lambda: rw.policy_loss(leaf(z), ids, adv, spec="gspo", **whole).loss,
        gspo,
        [per_sequence],
    )
    quantile = rw.PolicyLossSpec(
        surrogate=rw.methods.grpo().surrogate, weights=(rw.weights.TopEntropy(fraction=0.5),)
    )
    check(
        "sequences, quantile",
        lambda: (
            rw.policy_loss(leaf(z), ids, adv, spec=quantile, num_items_in_batch=9, **whole).loss
        ),
        # the entropies of the rows of all ranks, and how many there are
        [("all_reduce", row_vector(4 * N)), ("all_reduce", 8)],
    )
    check(
        "stablemax",
        lambda: rw.divergences.stablemax(leaf(z), ids, **over),
        [rows(STABLEMAX_SUMS)],
    )
    check("dhkd", lambda: rw.divergences.dhkd(leaf(z), z, **over), [rows(1)])
    of_rows = [("all_gather", whole_rows(N, V))] * 2
    check("pld", lambda: rw.divergences.pld(leaf(z), z, ids, **over), of_rows, of_rows)
    return wrong


def test_collectives_and_bytes_are_those_of_the_formulas(four):
    four.check(counted)


def launches(ranks):
    """The collectives that a rank starts and waits for in backward from hidden states,
    in order.
    """
    seen = []
    reduce, logits = torch.distributed.all_reduce, Chunk.logits

    class Sum:
        def __init__(self, work):
            self.work = work

        def wait(self):
            seen.append("wait")
            return self.work.wait()

    def all_reduce(x, *arguments, async_op=False, **options):
        seen.append("sum")
        work = reduce(x, *arguments, async_op=async_op, **options)
        return Sum(work) if async_op else work

    def chunk(self, hidden):
        seen.append("chunk")
        return logits(self, hidden)

    ids, _, h, w = inputs()
    hidden = h.clone().requires_grad_()
    out = rw.linear_token_logps(
        hidden, w, ids, chunk_rows=5, compact_rows=False, process_group=ranks.group(range(4))
    )
    with (
        patch.object(torch.distributed, "all_reduce", all_reduce),
        patch.object(Chunk, "logits", chunk),
    ):
        out.sum().backward()
    return seen


def test_the_hidden_gradient_is_summed_while_the_next_chunk_is_computed(four):
    """No sum is waited for before the last chunk is done."""
    for seen in four.run(launches):
        assert seen == ["chunk", "sum"] * 3 + ["wait"] * 3


def bits(ranks):
    """A row's results have the same bits on every rank and in every batch; with other
    shards they differ by rounding.
    """
    ids, z, _, _ = inputs()
    z = torch.cat([z] * 4, -1)
    z += torch.arange(4 * V) / 50
    found = []
    for world in (2, 4):
        (at, _), (group, _) = ranks.axes(world, 4 // world)
        part = z[..., at * (4 * V // world) : (at + 1) * (4 * V // world)].contiguous()
        found.append(rw.token_logps(part, ids, return_entropy=True, process_group=group))
        alone = rw.token_logps(
            part[1:2].contiguous(), ids[1:2], return_entropy=True, process_group=group
        )
        assert all(torch.equal(a[1:2], b) for a, b in zip(found[-1], alone, strict=True))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    return [[t.numpy().tobytes() for t in pair] for pair in found]


def test_every_rank_has_the_same_bits(four):
    first, *others = four.run(bits)
    assert all(other == first for other in others)
