"""A call of several ranks in a graph of torch.compile: whole, compiled once, and the
eager call's numbers and errors.
"""

import time

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import reweight_ops as rw

N, D = 6, 5
COLUMNS = [slice(0, 4), slice(4, 11)]  # uneven


def shards(ranks):
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(N, 11, generator=g), torch.randn(N, 11, generator=g)
    h, w, h2 = (
        torch.randn(N, D, generator=g),
        torch.randn(11, D, generator=g),
        torch.randn(N, D, generator=g),
    )
    ids, part = torch.tensor([0, 9, 3, 4, -100, 7]), COLUMNS[ranks.rank]
    return dict(
        z=z[:, part].contiguous(),
        y=y[:, part].contiguous(),
        h=h,
        w=w[part],
        h2=h2,
        ids=ids,
        adv=torch.randn(N, generator=g),
    )


SPEC = rw.methods.trl(entropy_coef=0.1)


def policy(z, t, **over):
    out = rw.policy_loss(z[None], t["ids"][None], t["adv"][:, None].t(), spec=SPEC, **over)
    return out.loss, out.per_token_logps, out.entropies


def logps(z, t, **over):
    return (rw.token_logps(z, t["ids"], **over),)


def stats(z, t, **over):
    found = rw.token_stats(
        z,
        t["ids"],
        stats=("logps", "entropies", "log_sum_p_sq", "max_logp", "topk_logps"),
        top_k=3,
        **over,
    )
    return found.logps, found.entropies, found.log_sum_p_sq, found.max_logp, found.topk_logps


def divergence(kind):
    return lambda z, t, **over: (rw.token_divergence(z, t["y"], kind=kind, **over),)


def distillation(z, t, **over):
    return (rw.distillation_loss(z, t["y"], kind="forward_kl", **over).loss,)


def linear(w, t, **over):
    out = rw.linear_policy_loss(t["h"], w, t["ids"], t["adv"], spec=SPEC, **over)
    return out.loss, out.per_token_logps


def linear_divergence(w, t, **over):
    return (
        rw.linear_token_divergence(
            t["h"], w, rw.HiddenLogits(t["h2"], t["w"].detach()), kind="reverse_kl", **over
        ),
    )


def stablemax(z, t, **over):
    return (rw.divergences.stablemax(z, t["ids"], **over),)


def pld(z, t, **over):
    return (rw.divergences.pld(z, t["y"], t["ids"], **over),)


def two_calls(z, t, **over):
    return *logps(z, t, **over), *distillation(z, t, **over)


#: Name to the call, and what it is differentiated by.
CALLS = {
    "policy_loss": (policy, "z"),
    "token_logps": (logps, "z"),
    "token_stats": (stats, "z"),
    "token_divergence": (divergence("jeffreys"), "z"),
    "generalized_jsd": (divergence("generalized_jsd"), "z"),
    "distillation_loss": (distillation, "z"),
    "linear_policy_loss": (linear, "w"),
    "hidden": (linear, "h"),
    "two": (two_calls, "z"),
    "stablemax": (stablemax, "z"),
    "pld": (pld, "z"),
    "linear_token_divergence": (linear_divergence, "w"),
}


def whole_graphs(ranks, names, backend):
    group = ranks.group(range(2))
    if ranks.rank > 1:
        return []
    wrong = []
    for name in names:
        call, of = CALLS[name]
        found, counter = [], CompileCounterWithBackend(backend)

        def function(t, call=call, of=of):
            return call(t[of].tanh() if of != "w" else t[of], t, process_group=group)

        torch._dynamo.reset()
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        for f in (function, compiled, compiled):  # the second time the graph is there
            t = shards(ranks)
            t[of].requires_grad_()
            out = f(t)
            sum((k + 1) * x.sum() for k, x in enumerate(out)).backward()
            found.append([*out, t[of].grad])
        if counter.frame_count != 1:
            wrong.append(f"{name}: {counter.frame_count} graphs")
        for again in found[1:]:
            for k, (x, y) in enumerate(zip(found[0], again, strict=True)):
                if not torch.allclose(x, y, rtol=2e-6, atol=2e-6):
                    wrong.append(f"{name}, {k}: {(x - y).abs().max()}")
    return wrong


NORMAL = ("generalized_jsd",)


@pytest.mark.parametrize(
    "name",
    [name if name in NORMAL else pytest.param(name, marks=pytest.mark.slow) for name in CALLS],
)
def test_a_call_of_several_ranks_is_one_graph(four, name):
    four.check(whole_graphs, [name], "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["policy_loss", "linear_policy_loss", "two"])
def test_inductor_keeps_the_order_of_collectives(four, name):
    four.check(whole_graphs, [name], "inductor")


def outcome(function, *arguments):
    try:
        return float(function(*arguments).detach())
    except rw.ReweightOpsError as error:
        return f"{type(error).__name__}: {error}"


def ranks_apart(ranks):
    """What ranks find whose graphs, or shapes, are not the same: one traces alone,
    another's shard or rows are others.
    """
    group = ranks.group(range(2))
    if ranks.rank > 1:
        return None
    torch._dynamo.reset()
    t = shards(ranks)
    traced = []

    def count(graph, inputs):
        traced.append(graph)
        return graph

    @torch.compile(backend=count, fullgraph=True)
    def loss(z, ids):
        return rw.token_logps(z, ids, process_group=group).sum()

    found = [outcome(loss, t["z"], t["ids"])]
    # of other strides, for which rank 1 traces anew
    own = torch.nn.functional.pad(t["z"], (0, 1))[:, :-1] if ranks.rank else t["z"]
    found.append(outcome(loss, own, t["ids"]))
    graphs = len(traced)
    # rank 1 has a column less, and traces for it; rank 0 has its graph
    cut = t["z"][:, : -ranks.rank or None].contiguous()
    found.append(outcome(loss, cut, t["ids"]))
    rows = slice(ranks.rank, None)
    found.append(outcome(loss, t["z"][rows].contiguous(), t["ids"][rows].contiguous()))
    return found, graphs


def test_ranks_that_trace_apart_agree_or_all_raise(four):
    (first, graphs), (second, more), *_ = four.run(ranks_apart)
    assert (graphs, more) == (1, 2)
    assert str(first) == str(second)
    assert first[0] == first[1] != 0
    assert first[2].startswith(
        "InvalidCall: token_logps: rank 0 of the group runs a graph of torch.compile for other numbers"
    )
    assert first[3].startswith(
        "InvalidCall: token_logps: the ranks of the group differ in rows, rank by rank: 6, 5."
    )


def bad_arguments(ranks):
    """Rank 1 finds an error in its arguments while it traces the whole graph."""
    group = ranks.group(range(2), fresh=True, timeout=3)
    if ranks.rank > 1:
        return "", 0.0
    torch._dynamo.reset()
    t, began = shards(ranks), time.monotonic()

    @torch.compile(backend="eager", fullgraph=True)
    def loss(z, ids):
        return rw.token_logps(z, ids, process_group=group).sum()

    with pytest.raises(Exception) as error:  # PyTorch's, with ours in its text
        loss(t["z"], t["ids"][ranks.rank :])
    return str(error.value), time.monotonic() - began


@pytest.mark.slow
def test_a_rank_that_raises_in_its_trace_ends_the_wait_of_the_other(four):
    (first, seconds), (second, _), *_ = four.run(bad_arguments)
    assert "the other ranks of the group did not take part" in first, first
    assert "token_logps: logits has 6 positions, completion_ids 5" in second, second
    assert seconds < 60
