"""A call over ranks that have parts of sequences, in a graph of torch.compile."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import reweight_ops as rw

B, T, V = 4, 7, 9
SURROGATE = rw.methods.grpo().surrogate


def spec_of(**parts):
    return rw.PolicyLossSpec(surrogate=SURROGATE, **parts)


#: Name to spec: what is summed over ranks, and what is ordered over them.
SPECS = {
    "gspo": rw.methods.gspo(),
    "gmpo": rw.methods.gmpo(),
    "dapo": rw.methods.dapo(),
    "disco": rw.methods.disco(group_size=2),
    "batch mean": spec_of(ratio=rw.BatchMeanRatio()),
    "top entropies": spec_of(weights=(rw.weights.TopEntropy(fraction=0.3),)),
}


def part_of(ranks, sequence, vocab):
    """This rank's tokens, uneven over ranks, and its columns."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(B, T, V, generator=g)
    ids, old = torch.randint(V, (B, T), generator=g), -2.2 + 0.2 * torch.randn(B, T, generator=g)
    adv = torch.tensor([1.0, -1.0, 0.5, -0.25])
    tokens = [slice(0, 3), slice(3, T)][sequence] if sequence is not None else slice(None)
    columns = [slice(0, 4), slice(4, V)][vocab] if vocab is not None else slice(None)
    return dict(
        z=z[:, tokens, columns].contiguous(), ids=ids[:, tokens], old=old[:, tokens], adv=adv
    )


def whole_graphs(ranks, name, backend, sharded=False):
    """Differences of the compiled call from the eager one, over the ranks of two."""
    if sharded:
        (_, vocab), (sequences, columns) = ranks.axes(2, 2)
        over = dict(sequence_group=sequences, process_group=columns)
    else:
        vocab, over = None, dict(sequence_group=ranks.group(range(2)))
        if ranks.rank > 1:
            return []
    at = torch.distributed.get_rank(over["sequence_group"])
    stored = name != "disco"

    def function(t):
        given = dict(old_per_token_logps=t["old"]) if stored else {}
        z = t["z"].tanh()
        out = rw.policy_loss(z, t["ids"], t["adv"], spec=SPECS[name], **given, **over)
        return out.loss, out.per_token_logps

    torch._dynamo.reset()
    wrong, found, counter = [], [], CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for f in (function, compiled, compiled):  # the second time the graph is there
        t = part_of(ranks, at, vocab)
        t["z"].requires_grad_()
        out = f(t)
        out[0].backward()
        found.append([*out, t["z"].grad])
    if counter.frame_count != 1:
        wrong.append(f"{name}: {counter.frame_count} graphs")
    for again in found[1:]:
        for k, (x, y) in enumerate(zip(found[0], again, strict=True)):
            if not torch.allclose(x, y, rtol=2e-6, atol=2e-6):
                wrong.append(f"{name}, {k}: {(x - y).abs().max()}")
    return wrong


NORMAL = ("dapo",)


@pytest.mark.parametrize(
    "name",
    [name if name in NORMAL else pytest.param(name, marks=pytest.mark.slow) for name in SPECS],
)
def test_a_call_over_sequences_is_one_graph(four, name):
    four.check(whole_graphs, name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gspo", "top entropies"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_call_over_both_is_one_graph(four, name, backend):
    four.check(whole_graphs, name, backend, True)
