"""Collectives and bytes of a call, by the formulas of docs/scaling.md."""

import torch
from wire import collectives

import reweight_ops as rw
from bench.scaling import AGREEMENT, DIVERGENCE_STATES, LOGP_STATES, hidden_gradient, sequence_sum, states

N, D, V, R = 12, 8, 20, 3


def inputs():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(4 * V, (3, 4), generator=g)
    return ids, torch.randn(3, 4, V, generator=g), torch.randn(3, 4, D, generator=g), torch.randn(V, D, generator=g)


def rows(statistics, fp64=False):
    return ("all_gather", states(N, statistics, fp64))


def counted(ranks):
    """What differs from the formulas, of every kind of call."""
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
    check("entropies", lambda: rw.token_logps(leaf(z), ids, return_entropy=True, **over)[1], [rows(LOGP_STATES + 1)])
    check("bf16", lambda: rw.token_logps(leaf(z.bfloat16()), ids, **over), [rows(LOGP_STATES)])
    check("fp64", lambda: rw.token_logps(leaf(z.double()), ids, **over), [rows(LOGP_STATES, fp64=True)])
    check("loss", lambda: rw.policy_loss(leaf(z), ids, adv, spec="grpo", **over).loss, [rows(LOGP_STATES + 1)])
    check("divergence", lambda: rw.token_divergence(leaf(z), z, **over), [rows(DIVERGENCE_STATES)])
    hidden = [("all_reduce", hidden_gradient(rows_of_chunk, D, 4)) for rows_of_chunk in (5, 5, 2)]
    linear = dict(chunk_rows=5, compact_rows=False, **over)
    check("linear", lambda: rw.linear_token_logps(leaf(h), leaf(w), ids, **linear), [rows(LOGP_STATES)], hidden)
    check("frozen hidden states", lambda: rw.linear_token_logps(h, leaf(w), ids, **linear), [rows(LOGP_STATES)])
    lora = rw.Lora(leaf(torch.ones(R, D)), leaf(torch.ones(V, R)))
    check(
        "lora",
        lambda: rw.linear_token_logps(leaf(h), w, ids, lora=lora, **linear),
        [rows(LOGP_STATES)],
        [*hidden, ("all_reduce", 4 * R * D)],
    )
    whole = dict(process_group=None, sequence_group=group)
    ids = ids % V
    check("sequences, token mean", lambda: rw.policy_loss(leaf(z), ids, adv, spec="dapo", **whole).loss, [("all_reduce", 8)])
    check("sequences, known divisor", lambda: rw.policy_loss(leaf(z), ids, adv, spec="dapo", num_items_in_batch=9, **whole).loss, [])
    per_sequence = ("all_reduce", sequence_sum(3))
    gspo = [per_sequence] * 3  # the log-ratios and lengths of the ratio, and the lengths of the mean
    check("sequences, ratio", lambda: rw.policy_loss(leaf(z), ids, adv, spec="gspo", **whole).loss, gspo, [per_sequence])
    return wrong


def test_collectives_and_bytes_are_those_of_the_formulas(four):
    four.check(counted)


def bits(ranks):
    """A row's results are the same bits on every rank, and whatever else is in the batch; with other shards they differ by rounding."""
    ids, z, _, _ = inputs()
    z = torch.cat([z] * 4, -1)
    z += torch.arange(4 * V) / 50
    found = []
    for world in (2, 4):
        (at, _), (group, _) = ranks.axes(world, 4 // world)
        part = z[..., at * (4 * V // world) : (at + 1) * (4 * V // world)].contiguous()
        found.append(rw.token_logps(part, ids, return_entropy=True, process_group=group))
        alone = rw.token_logps(part[1:2].contiguous(), ids[1:2], return_entropy=True, process_group=group)
        assert all(torch.equal(a[1:2], b) for a, b in zip(found[-1], alone, strict=True))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    return [[t.numpy().tobytes() for t in pair] for pair in found]


def test_every_rank_has_the_same_bits(four):
    first, *others = four.run(bits)
    assert all(other == first for other in others)
