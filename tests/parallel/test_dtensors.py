"""DTensors sharded on the vocabulary are recognised and give DTensor gradients;
unsupported calls are refused with the reason.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import reweight_ops as rw

B, T, D, V, R = 4, 3, 6, 22, 2


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=dtype)

    return (
        normal(B, T, V),
        normal(B, T, D),
        normal(V, D),
        normal(V),
        normal(R, D),
        normal(V, R),
        torch.randint(V, (B, T), generator=g),
    )


def same(wrong, name, found, expected):
    found = found.full_tensor() if isinstance(found, DTensor) else found
    if not torch.allclose(found, expected, rtol=1e-10, atol=1e-12):
        wrong.append(f"{name}: {(found - expected).abs().max()}")


def placed(ranks):
    """Logits, heads and two models over a mesh of data and vocabulary, against one
    process.
    """
    z, h, w, c, a, b, ids = inputs()
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("dp", "tp"))
    data = slice(2 * mesh.get_local_rank("dp"), 2 * mesh.get_local_rank("dp") + 2)
    adv, wrong, total = torch.tensor([1.0, -0.5, 2.0, -1.0], dtype=torch.float64), [], B * T

    def leaf(x, *placements):
        return distribute_tensor(x, mesh, placements).requires_grad_()

    whole = z.clone().requires_grad_()
    want = rw.policy_loss(whole, ids, adv, spec="dapo", num_items_in_batch=total)
    want.loss.backward()
    logits = leaf(z, Shard(0), Shard(2))
    out = rw.policy_loss(logits, ids[data], adv[data], spec="dapo", num_items_in_batch=total)
    out.loss.backward()
    assert isinstance(logits.grad, DTensor) and logits.grad.placements == (Shard(0), Shard(2))
    same(wrong, "logits", logits.grad, whole.grad)
    same(wrong, "log-probs", out.per_token_logps, want.per_token_logps[data])
    explained = rw.explain(rw.policy_loss, logits, ids[data], adv[data], spec="dapo")
    assert (
        explained.plan == "two_pass"
        and "process_group shards the vocabulary" in explained.one_pass_unsupported_reason
    )

    leaves = [x.clone().requires_grad_() for x in (h, w, c, a, b)]
    want = rw.linear_policy_loss(
        *leaves[:2], ids, adv, spec="gspo", lm_head_bias=leaves[2], lora=rw.Lora(*leaves[3:], 0.5)
    )
    want.loss.backward()
    rows, columns, both = (
        (Shard(0), Replicate()),
        (Replicate(), Shard(0)),
        (Replicate(), Replicate()),
    )
    given = [
        leaf(x, *where)
        for x, where in zip((h, w, c, a, b), (rows, columns, columns, both, columns), strict=True)
    ]
    lora = rw.Lora(*given[3:], 0.5)
    out = rw.linear_policy_loss(
        *given[:2],
        ids[data],
        adv[data],
        spec="gspo",
        lm_head_bias=given[2],
        lora=lora,
        num_sequences_in_batch=B,
    )
    out.loss.backward()
    for name, found, expected in zip(
        ("hidden", "weight", "bias", "lora.a", "lora.b"), given, leaves, strict=True
    ):
        same(wrong, f"head, {name}", found.grad, expected.grad)

    student = z.clone().requires_grad_()
    rw.token_divergence(student, z.flip(-1)).sum().backward()
    logits = leaf(z, Shard(0), Shard(2))
    kl = rw.token_divergence(logits, distribute_tensor(z.flip(-1), mesh, (Shard(0), Shard(2))))
    kl.sum().backward()
    same(wrong, "divergence", logits.grad, student.grad)
    teacher = rw.HiddenLogits(
        distribute_tensor(h.flip(0), mesh, rows), distribute_tensor(w.flip(0), mesh, columns)
    )
    kl = rw.linear_token_divergence(*given[:2], teacher)
    same(
        wrong,
        "two heads",
        kl,
        rw.linear_token_divergence(h, w, rw.HiddenLogits(h.flip(0), w.flip(0)))[data],
    )
    logits = leaf(z, Replicate(), Replicate())
    same(wrong, "replicated", rw.token_logps(logits, ids), rw.token_logps(z, ids))
    return wrong


def test_placements_are_read_and_gradients_are_placed(four):
    four.check(placed)


def uneven(ranks):
    """More ranks than columns: the last shards are empty."""
    mesh, wrong = DeviceMesh("cpu", torch.arange(4)), []
    z, _, _, _, _, _, ids = inputs()
    z, ids = z[..., :5], ids % 5
    logits, whole = (
        distribute_tensor(z, mesh, (Shard(2),)).requires_grad_(),
        z.clone().requires_grad_(),
    )
    for x in (logits, whole):
        rw.token_logps(x, ids, return_entropy=True)[1].sum().backward()
    same(wrong, "uneven", logits.grad, whole.grad)
    return wrong


def test_shards_without_columns(four):
    four.check(uneven)


def refusals(ranks):
    z, h, w, _, _, _, ids = inputs()
    mesh, group = DeviceMesh("cpu", torch.arange(4)), ranks.group(range(4))
    part = z[..., :5].clone().requires_grad_()
    inside = ids % 20
    refused = {}

    def refuse(name, function):
        try:
            function()
        except (rw.UnsupportedRequest, rw.InvalidCall) as error:
            refused[name] = str(error)

    refuse(
        "one_pass",
        lambda: rw.policy_loss(
            part, inside, 1.0, spec="dapo", plan="one_pass", process_group=group
        ),
    )
    refuse(
        "graph",
        lambda: torch.autograd.grad(
            rw.token_logps(part, inside, process_group=group).sum(), part, create_graph=True
        ),
    )
    refuse(
        "transform",
        lambda: torch.func.grad(lambda x: rw.token_logps(x, inside, process_group=group).sum())(
            part.detach()
        ),
    )
    refuse("segments", lambda: segments(z, ids, group))
    refuse("reducer", lambda: reducer(z, ids, group))
    refuse("fsdp", lambda: rw.linear_token_logps(h, distribute_tensor(w, mesh, (Shard(0),)), ids))
    refuse("partial", lambda: rw.token_logps(DTensor.from_local(z, mesh, [Partial()]), ids))
    refuse(
        "two groups",
        lambda: rw.token_logps(distribute_tensor(z, mesh, (Shard(2),)), ids, process_group=group),
    )
    refuse("hidden", lambda: rw.linear_token_logps(h, distribute_tensor(w, mesh, (Shard(1),)), ids))
    refuse("no group", lambda: rw.policy_loss(z, ids, 1.0, spec="dapo", sequence_group="cp"))
    refuse("pairs", lambda: rw.preference_loss(z[:2], ids[:2], spec="simpo", sequence_group=group))
    return refused


def segments(z, ids, group):
    spec = rw.PolicyLossSpec(surrogate=rw.methods.grpo().surrogate, ratio=rw.SegmentRatio())
    return rw.policy_loss(
        z, ids, 1.0, spec=spec, segment_ids=torch.zeros_like(ids), sequence_group=group
    )


def reducer(z, ids, group):
    spec = rw.PolicyLossSpec(
        surrogate=rw.methods.grpo().surrogate,
        reduction=rw.FromFunction(lambda loss, mask: (loss * mask).sum()),
    )
    return rw.policy_loss(z, ids, 1.0, spec=spec, sequence_group=group)


WHY = {
    "one_pass": "a row's statistics need those of all ranks",
    "graph": "create_graph=True needs the whole vocabulary on one rank",
    "transform": "torch.func's transforms",
    "segments": "no rank knows which tokens of other ranks come before",
    "reducer": "sees only this rank's rows",
    "fsdp": "If this is FSDP's parameter",
    "partial": "redistribute it to Shard or Replicate",
    "two groups": "process_group is given, and the DTensors name it already",
    "hidden": "which is not the vocabulary's",
    "pairs": "gather the log-probs of whole sequences",
    "no group": "sequence_group is a str, expected a torch.distributed.ProcessGroup",
}


def test_what_cannot_be_had_over_ranks_is_refused(four):
    for refused in four.run(refusals):
        assert refused.keys() == WHY.keys(), WHY.keys() - refused.keys()
        assert all(why in refused[name] for name, why in WHY.items()), refused
