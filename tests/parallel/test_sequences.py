"""Sequences whose tokens several gloo ranks have: ratios, denominators, contrasts and
batch statistics are those of one process.
"""

import contextlib
import inspect

import pytest
import torch
from split_calls import B, Split, T, errors_of, positions_of

import reweight_ops as rw
from reweight_ops._core.formula.base import WEIGHTS
from reweight_ops._core.rows.batch import BatchStatistics
from reweight_ops._core.rows.resolve import resolve_rows

SURROGATE = rw.methods.grpo().surrogate

#: A spec for every quantity that is summed over a sequence or over the call's rows.
SPECS = {
    "token mean": rw.methods.dapo(),
    "sequence mean": rw.methods.grpo(),
    "sequence ratio": rw.methods.gspo(),
    "token gradient": rw.PolicyLossSpec(
        surrogate=SURROGATE, ratio=rw.SequenceRatio(gradient="token")
    ),
    "geometric mean": rw.methods.gmpo(),
    "batch mean": rw.PolicyLossSpec(surrogate=SURROGATE, ratio=rw.BatchMeanRatio()),
    "centred": rw.PolicyLossSpec(surrogate=SURROGATE, ratio=rw.CenteredRatio(scale="std")),
    "contrast": rw.methods.disco(),
    "entropy": rw.methods.trl(entropy_coef=0.01),
}

#: Statistics of a batch that run along a sequence.
ALONG = {"seq_cumsum", "seq_suffix_sum"}

#: Weights that read the batch. A draw uses positions in the order of ranks, so that it
#: differs.
READ_BATCH = {
    name: weight
    for name, weight in WEIGHTS.items()
    if weight.__module__.startswith("reweight_ops")
    and {"batch"} & set(weight.weight.__code__.co_varnames[:4])
    and name != "clip_cov"
}


def named(function):
    """The names that a function reads, and those that its helpers do."""
    found = set(function.__code__.co_names)
    helpers = [function.__globals__.get(name) for name in found]
    return found.union(
        *(
            named(f)
            for f in helpers
            if inspect.isfunction(f) and f.__module__ == function.__module__
        )
    )


def weighted():
    """A spec for every weight that reads the batch and has defaults."""
    for name, weight in READ_BATCH.items():
        with contextlib.suppress(TypeError):
            yield (
                f"weight {name}",
                rw.PolicyLossSpec(surrogate=SURROGATE, weights=(weight(),)),
                ALONG & named(weight.weight),
            )


SPECS |= {name: spec for name, spec, refused in weighted() if not refused}
SPECS |= {
    "classification": rw.methods.real(group_size=2),
    "prompt mean": rw.PolicyLossSpec(surrogate=SURROGATE, reduction=rw.PromptMean(2)),
    "constant": rw.PolicyLossSpec(surrogate=SURROGATE, reduction=rw.SequenceMean(per="constant")),
    "lengths": rw.methods.drpo(group_size=2, length_temperature=0.5),
}
REFUSED = {name: spec for name, spec, refused in weighted() if refused}
REFUSED |= {"cumulative": rw.PolicyLossSpec(surrogate=SURROGATE, ratio=rw.CumulativeRatio())}


def policy(ranks, cases):
    wrong = []
    for name, split, options in cases:
        wrong += [
            f"{name} {split}: {e}"
            for e in errors_of(SPECS[name], Split(**split).place(ranks), **options)
        ]
    return wrong


LAYOUTS = [dict(sequence=4), dict(sequence=4, layout="zigzag"), dict(sequence=2, vocab=2)]


def test_every_loss_over_two_and_four_ranks(four):
    """Each in one of the layouts, in turns; the slow test has all of them."""
    four.check(policy, [(name, LAYOUTS[i % len(LAYOUTS)], {}) for i, name in enumerate(SPECS)])


@pytest.mark.slow
def test_every_loss_in_every_layout(four):
    four.check(policy, [(name, split, {}) for name in SPECS for split in LAYOUTS])


def order_statistics(batch, x, where):
    """Statistics that compare a row with others, and those of extremes."""
    return {
        "rank": batch.rank(x),
        "mean_below": batch.mean_below(x),
        "capped_mean": batch.capped_mean(x, where),
        "seq_rank": batch.seq_rank(x),
        "seq_quantile": batch.seq_quantile(x, 0.3),
        "seq_max": batch.seq_max(x),
        "seq_min": batch.seq_min(x),
        "group_max": batch.group_max(x),
        "group_min": batch.group_min(x),
    }


def ordered(ranks, layout):
    """Every order statistic and its gradient, of sequences that end anywhere, with
    equal values.
    """
    group, at = ranks.group(range(4)), ranks.rank
    g = torch.Generator().manual_seed(3)
    x = torch.randint(5, (B, T), generator=g).double() + torch.rand(B, T, generator=g).round()
    x += torch.arange(B * T).view(B, T) / 1000  # ranks are places: equal values have none
    x[1, 3:6] = 7.0  # a tie of extremes
    mask = torch.arange(T) < torch.tensor([T, 5, 9, 3])[:, None]
    weights = torch.rand(B, T, generator=g, dtype=torch.float64)
    mine = positions_of(4, T, layout)[at]

    def found(x, mask, where, weights, **more):
        x = x.clone().requires_grad_()
        rows = resolve_rows(
            "test",
            tuple(x.shape),
            x.device,
            x.dtype,
            dict(completion_mask=mask, group_ids=torch.tensor([0, 1, 0, 1]), num_groups=2, **more),
        )
        if rows.across is not None:
            rows.across.agree(rows.count, B, True, x.detach())
        values = order_statistics(BatchStatistics(rows), x.view(-1), where.reshape(-1))
        for name, value in values.items():
            gradient = torch.zeros_like(x)
            if value.requires_grad:
                loss = (value * weights.reshape(-1)).sum()
                (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
            yield name, value.detach().view(x.shape), gradient

    whole = {name: rest for name, *rest in found(x, mask, x > 1, weights)}
    part = [t[:, mine].contiguous() for t in (x, mask, x > 1, weights)]
    wrong, tie = [], part[0] == 7  # equal values are in the order of ranks
    for name, value, gradient in found(*part, sequence_group=group):
        want, of_one = (x[:, mine] for x in whole[name])
        if name in ("rank", "seq_rank", "mean_below"):
            value, want = torch.where(tie, 0, value), torch.where(tie, 0, want)
        if not torch.allclose(value, want, rtol=1e-12):
            wrong.append(f"{name}: {value} of {want}")
        if name != "mean_below" and not torch.allclose(gradient, of_one, rtol=1e-10, atol=1e-12):
            wrong.append(f"{name}: gradient {gradient} of {of_one}")
    return wrong


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_order_statistics(four, layout):
    four.check(ordered, layout)


def refusals(ranks):
    wrong = []
    for name, spec in REFUSED.items():
        try:
            errors_of(spec, Split(sequence=4).place(ranks))
            wrong.append(f"{name}: no error")
        except rw.UnsupportedRequest as error:
            wrong += [] if "no rank knows" in str(error) else [f"{name}: {error}"]
    return wrong


def test_what_orders_a_sequence_s_tokens_is_refused(four):
    assert len(REFUSED) > 2
    four.check(refusals)


def packed(ranks, layout):
    """Packed rows over ranks, each with its own ``cu_seqlens`` of the same sequences,
    one of which is on one rank alone; in fp64.
    """
    lengths, vocab = [7, 1, 12, 5], 11
    group, total = ranks.group(range(4)), sum(lengths)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(total, vocab, generator=g, dtype=torch.float64)
    ids, old = (
        torch.randint(vocab, (total,), generator=g),
        -2.4 + 0.2 * torch.randn(total, generator=g, dtype=torch.float64),
    )
    adv = torch.tensor([1.0, -1.0, 0.5, -0.25], dtype=torch.float64)[:, None]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    own = [positions_of(4, n, layout)[ranks.rank] + starts[i] for i, n in enumerate(lengths)]
    mine, counts = torch.cat(own), torch.tensor([0, *(len(part) for part in own)]).cumsum(0)
    by_id = torch.cat([torch.full((len(part),), i) for i, part in enumerate(own)])
    wrong = []
    for name in ("token mean", "sequence mean", "sequence ratio", "contrast"):
        more = (
            dict(group_ids=torch.tensor([0, 0, 1, 1]), num_groups=2) if name == "contrast" else {}
        )
        spec = rw.methods.disco(group_size=None) if name == "contrast" else SPECS[name]
        given = {} if name == "contrast" else {"old_per_token_logps": old.clone().requires_grad_()}
        whole = z.clone().requires_grad_()
        want = rw.policy_loss(
            whole,
            ids,
            adv,
            spec=spec,
            cu_seqlens=starts,
            differentiable_inputs=bool(given),
            **given,
            **more,
        )
        want.loss.backward()
        for how in (dict(cu_seqlens=counts), dict(sequence_ids=by_id, num_sequences=4)):
            part = z[mine].clone().requires_grad_()
            stored = {key: x[mine].detach().requires_grad_() for key, x in given.items()}
            out = rw.policy_loss(
                part,
                ids[mine],
                adv,
                spec=spec,
                sequence_group=group,
                differentiable_inputs=bool(given),
                **how,
                **stored,
                **more,
            )
            out.loss.backward()
            for key, x in stored.items():
                if not torch.allclose(x.grad, given[key].grad[mine], rtol=1e-10, atol=1e-14):
                    wrong.append(f"{name} {list(how)}: gradient by {key}")
            loss = out.loss.detach().clone()
            torch.distributed.all_reduce(loss, group=group)
            if not torch.allclose(loss, want.loss.detach(), rtol=1e-12):
                wrong.append(f"{name} {list(how)}: loss {loss} of {want.loss}")
            if not torch.allclose(part.grad, whole.grad[mine], rtol=1e-10, atol=1e-14):
                wrong.append(
                    f"{name} {list(how)}: gradient {(part.grad - whole.grad[mine]).abs().max()}"
                )
    return wrong


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_packed_sequences(four, layout):
    four.check(packed, layout)


def test_factorisations(four):
    """Data by vocabulary by sequence, of one batch."""
    divisors = {
        "token mean": ("num_items_in_batch",),
        "sequence mean": ("num_sequences_in_batch",),
        "sequence ratio": ("num_sequences_in_batch",),
    }
    sizes = [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1), (1, 1, 4)]
    splits = [dict(zip(("data", "vocab", "sequence"), size, strict=True)) for size in sizes]
    four.check(
        policy,
        [
            (name, split, dict(divisors=given))
            for name, given in divisors.items()
            for split in splits
        ],
    )
