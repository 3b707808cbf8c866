"""A failure on one rank is an error on every rank, within a bounded time."""

import os
import time

import pytest
import torch
from ranks import Pool

import reweight_ops as rw

V = 5


def logits(ranks, n=6):
    return torch.randn(n, V, generator=torch.Generator().manual_seed(ranks.rank)).requires_grad_()


def raised(function):
    try:
        function()
    except rw.ReweightOpsError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def faults(ranks):
    """Map each fault to this rank's exception; after all of them the
    ranks still agree."""
    group, odd = ranks.group(range(4)), ranks.rank == 2
    n = 6 + odd
    ids, few = torch.zeros(n, dtype=torch.long), torch.arange(6)
    z = logits(ranks, n)
    over = dict(process_group=group)
    found = {
        "rows": raised(lambda: rw.token_logps(z, ids, **over)),
        "ids": raised(lambda: rw.token_logps(z[:6], few + odd, **over)),
        "call": raised(lambda: (rw.token_logps if odd else rw.token_stats)(z[:6], few, **over)),
        "statistics": raised(lambda: rw.token_logps(z[:6], few, return_entropy=odd, **over)),
        "gradient": raised(lambda: rw.token_logps(z[:6].detach() if odd else z[:6], few, **over)),
        "argument": raised(lambda: rw.token_logps(z[:6], few[:5] if odd else few, **over)),
        "keyword": raised(
            lambda: rw.policy_loss(z[:6], few, 1.0, spec="no such" if odd else "dapo", **over)
        ),
        "vocabulary": raised(lambda: rw.token_logps(z[:6], few, vocab_size=4 * V + 1, **over)),
        "id beyond": raised(lambda: rw.token_logps(z[:6], few + 4 * V, **over)),
        "sequences": raised(
            lambda: rw.policy_loss(
                logits(ranks).view(3, 2, V)[: 3 - odd],
                few.view(3, 2)[: 3 - odd] % V,
                1.0,
                spec="gspo",
                sequence_group=group,
            )
        ),
        "sequence keyword": raised(
            lambda: rw.policy_loss(
                z[:6],
                few % V,
                1.0,
                spec="dapo",
                temperature=-1.0 if odd else 1.0,
                sequence_group=group,
            )
        ),
    }
    of_sequences = dict(completion_ids=few.view(3, 2) % V, sequence_group=group)
    z = logits(ranks).view(3, 2, V)
    found["sequence spec"] = raised(
        lambda: rw.policy_loss(z, advantages=1.0, spec="dapo" if odd else "gspo", **of_sequences)
    )
    surrogate = rw.methods.grpo().surrogate
    means = [rw.SequenceMean(per=per) for per in ("token_mean", "constant")]
    specs = [rw.PolicyLossSpec(surrogate=surrogate, reduction=mean) for mean in means]
    found["sequence part"] = raised(
        lambda: rw.policy_loss(z, advantages=1.0, spec=specs[odd], **of_sequences)
    )
    given = dict(num_sequences_in_batch=None if odd else 3.0)
    found["sequence divisor"] = raised(
        lambda: rw.policy_loss(z, advantages=1.0, spec="gspo", **given, **of_sequences)
    )
    given = dict(num_sequences_in_batch=3.0 + odd)  # numbers are each rank's own
    rw.policy_loss(z, advantages=1.0, spec="gspo", **given, **of_sequences).loss.backward()
    rw.token_logps(z.view(6, V), few, **over).sum().backward()
    return found


OF_ALL = {
    "rows": "InvalidCall: token_logps: the ranks of the group differ in rows, rank by rank: 6, 6, 7, 6.",
    "ids": "differ in completion_ids and masks",
    "call": "of the group is in another call",
    "statistics": "differ in what is asked for",
    "gradient": "differ in whether a gradient is needed",
    "vocabulary": "vocab_size is 21, and all ranks of process_group together have 20 columns",
    "id beyond": "completion_ids[0] (flat) is 20, expected 0 to 19",
    "sequence spec": "differ in the spec or what it is given",
    "sequence part": "differ in the spec or what it is given",
    "sequence divisor": "differ in the spec or what it is given",
    "sequences": "differ in number of sequences, rank by rank: 3, 3, 2, 3.",
}
OF_ONE = {
    "argument": "logits has 6 positions, completion_ids 5",
    "keyword": "no policy loss 'no such'",
    "sequence keyword": "temperature is -1.0",
}


def test_a_rank_that_differs_or_raises_is_an_error_on_every_rank(four):
    ranks = four.run(faults)
    for fault, message in OF_ALL.items():
        assert all(message in found[fault] for found in ranks), [found[fault] for found in ranks]
    for fault, message in OF_ONE.items():
        assert message in ranks[2][fault], ranks[2][fault]
        others = [found[fault] for rank, found in enumerate(ranks) if rank != 2]
        assert all(
            "rank 2 of the group raised before its part of this call" in other for other in others
        ), others


def lists(ranks):
    """The same of what reads more than a row's own id."""
    over, odd = dict(process_group=ranks.group(range(4))), ranks.rank == 2
    z, ids, weight, hidden = logits(ranks), torch.arange(6) % V, torch.ones(V, 2), torch.ones(6, 2)
    pick = dict(stats=("selected_logps", "topk_ids"), selected_ids=ids[:, None], top_k=2)
    sets = rw.SamplingMask(torch.cat([ids, ids + V]), torch.arange(0, 13, 2))
    sets = sets._replace(token_ids=torch.stack([ids, ids + V], 1).flatten())
    other = sets._replace(token_ids=torch.stack([ids, ids + 2 * V], 1).flatten())
    top, no_top = (
        rw.TopKLogps(ids[:, None], -torch.ones(6, 1)),
        rw.TopKLogps(ids[:, None] + 4 * V, -torch.ones(6, 1)),
    )
    head = (hidden, weight, ids, 1.0)

    def taught(kind):
        return rw.Teacher(z.detach(), 0.1, kind=kind)

    def beyond(ids):
        return sets._replace(token_ids=torch.where(sets.token_ids == V, ids, sets.token_ids))

    found = {
        "list": raised(
            lambda: rw.token_stats(z, ids, **{**pick, "selected_ids": ids[:, None] + odd}, **over)
        ),
        "length": raised(
            lambda: rw.token_stats(
                z, ids, **{**pick, "selected_ids": ids[:, None].expand(6, 2 + odd)}, **over
            )
        ),
        "top_k": raised(lambda: rw.token_stats(z, ids, **{**pick, "top_k": 2 + odd}, **over)),
        "sets": raised(
            lambda: rw.token_logps(z, ids, sampling_mask=other if odd else sets, **over)
        ),
        "no sets": raised(
            lambda: rw.token_logps(z, ids, sampling_mask=None if odd else sets, **over)
        ),
        "kind": raised(
            lambda: rw.linear_policy_loss(
                *head, spec="dapo", teacher=taught("generalized_jsd" if odd else "jeffreys"), **over
            )
        ),
        "beta": raised(
            lambda: rw.token_divergence(
                z, z.detach(), kind="generalized_jsd", beta=0.7 if odd else 0.5, **over
            )
        ),
        "listed beyond": raised(
            lambda: rw.token_stats(z, ids, **{**pick, "selected_ids": ids[:, None] + 4 * V}, **over)
        ),
        "of a teacher": raised(lambda: rw.distillation_loss(z, no_top, **over)),
        "too many": raised(lambda: rw.token_stats(z, ids, **{**pick, "top_k": 4 * V + 1}, **over)),
        "kept beyond": raised(lambda: rw.token_logps(z, ids, sampling_mask=beyond(4 * V), **over)),
        "bool mask": raised(
            lambda: rw.token_logps(z, ids, sampling_mask=torch.ones(6, V, dtype=torch.bool), **over)
        ),
        "not kept": raised(lambda: rw.token_logps(z, ids + (ids == 3), sampling_mask=sets, **over)),
        "top": raised(
            lambda: rw.linear_distillation_loss(
                hidden, weight, top if not odd else z.detach(), **over
            )
        ),
    }
    whole = torch.ones(6, 4 * V, dtype=torch.bool)
    same = [
        rw.token_logps(z, ids, sampling_mask=whole, vocab_size=4 * V, **over),
        rw.token_logps(z, ids, **over),
    ]
    assert torch.allclose(*same)
    empty = torch.zeros(0, V).requires_grad_()
    none = torch.zeros(0, dtype=torch.long)
    stats = rw.token_stats(empty, none, stats=("topk_logps",), top_k=2, **over)
    stats.topk_logps.sum().backward()
    assert stats.topk_logps.shape == (0, 2) and empty.grad.shape == (0, V)
    assert rw.token_logps(
        empty, none, sampling_mask=rw.SamplingMask(none, torch.zeros(1, dtype=torch.long)), **over
    ).shape == (0,)
    assert rw.distillation_loss(empty, empty.detach(), kind="generalized_jsd", **over).loss == 0
    return found


OF_LISTS = {
    "list": "differ in completion_ids and masks",
    "length": "differ in completion_ids and masks",
    "top_k": "differ in what is asked for",
    "sets": "differ in completion_ids and masks",
    "no sets": "differ in completion_ids and masks",
    "kind": "differ in what is asked for",
    "beta": "differ in what is asked for",
    "listed beyond": "selected_ids has 20 in row 0 (flat), expected 0 to 19",
    "of a teacher": "teacher.token_ids has 20 in row 0 (flat), expected 0 to 19",
    "too many": "top_k is 21, expected an integer from 1 to 20",
    "kept beyond": "sampling_mask.token_ids has ids beyond 19",
    "bool mask": "pass vocab_size",
    "not kept": "which is not one of the 2 ids that sampling_mask keeps there",
    "top": "differ in",
}


def test_what_reads_more_ids_is_the_same_call_on_every_rank(four):
    for found in four.run(lists):
        assert found.keys() == OF_LISTS.keys()
        assert all(message in found[fault] for fault, message in OF_LISTS.items()), found


def nothing(ranks):
    """Ranks without rows: a loss of 0 and gradients of the right shape, over
    vocabularies and over sequences.
    """
    group = ranks.group(range(4))
    empty = torch.zeros(0, V).requires_grad_()
    loss = rw.policy_loss(
        empty, torch.zeros(0, dtype=torch.long), 1.0, spec="dapo", process_group=group
    ).loss
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, V)
    length = 3 * (ranks.rank == 1)  # one rank has all tokens
    z = torch.randn(2, length, V, generator=torch.Generator().manual_seed(0), requires_grad=True)
    whole = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for spec in ("gspo", "dapo", rw.methods.disco(group_size=2)):
        adv = torch.tensor([1.0, -1.0])
        part = rw.policy_loss(
            z, torch.ones(2, length, dtype=torch.long), adv, spec=spec, sequence_group=group
        ).loss
        want = rw.policy_loss(whole, torch.ones(2, 3, dtype=torch.long), adv, spec=spec).loss
        found, expected = torch.autograd.grad(part, z)[0], torch.autograd.grad(want, whole)[0]
        assert part == 0 if not length else torch.allclose(part, want), spec
        assert not length or torch.allclose(found, expected, atol=1e-7), spec
    return []


def test_ranks_without_rows(four):
    four.check(nothing)


def late(ranks):
    """Rank 1 raises after the ranks have agreed: the others wait for its statistics
    until the group's timeout.
    """
    group = ranks.group(range(4), fresh=True, timeout=2)
    if ranks.rank == 1:
        from reweight_ops._core.engine import autograd

        def broken(*arguments):
            raise rw.ReweightOpsError("out of memory, say")

        before, autograd.whole_rows = autograd.whole_rows, broken
    began = time.monotonic()
    found = raised(
        lambda: rw.token_logps(logits(ranks), torch.zeros(6, dtype=torch.long), process_group=group)
    )
    if ranks.rank == 1:
        autograd.whole_rows = before
    return found, time.monotonic() - began


def test_a_rank_that_raises_late_ends_the_wait_of_the_others(four):
    for rank, (found, seconds) in enumerate(four.run(late)):
        assert (
            "out of memory" if rank == 1 else "the other ranks of the group did not take part"
        ) in found, found
        assert seconds < 30


def dies(ranks, when):
    z = logits(ranks)
    ids = torch.zeros(6, dtype=torch.long)
    hidden, weight = torch.ones(6, 2, requires_grad=True), torch.ones(V, 2, requires_grad=True)
    # a new one is not whole yet on the other rank when this one has it
    group = torch.distributed.group.WORLD
    if when == "before":
        if ranks.rank:
            os._exit(1)
        return raised(lambda: rw.token_logps(z, ids, process_group=group))
    loss = rw.linear_token_logps(hidden, weight, ids, process_group=group).sum()
    if ranks.rank:
        os._exit(1)
    return raised(loss.backward)


@pytest.mark.parametrize("when", ["before", pytest.param("backward", marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_wait_of_the_other(when):
    pool = Pool(2)
    try:
        pool.start(dies, when)
        ((fine, found),) = pool.results([True, False])
        assert fine and "the other ranks of the group did not take part" in found, found
    finally:
        pool.close()
