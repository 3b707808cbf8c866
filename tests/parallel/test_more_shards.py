"""What reads more than a row's own id of a vocabulary in shards: picked ids, a
teacher's top-k, a teacher beside a loss, the generalised JSD.
"""

import math

import pytest
import torch
from split_calls import differences
from test_vocabulary import normal, rows, two, two_heads

import reweight_ops as rw

N, D, V, R = 12, 5, 37, 2


def picked(t, **options):
    names = ("logps", "entropies", "selected_logps", "topk_logps", "topk_ids")
    given = dict(
        stats=names,
        selected_ids=t["selected"],
        top_k=t["top_k"],
        temperature=t.get("temperature", 1.0),
    )
    if "weight" in t:
        lora = rw.Lora(t["a"], t["b"], 0.5)
        found = rw.linear_token_stats(
            t["hidden"],
            t["weight"],
            t["ids"],
            lora=lora,
            chunk_rows=t["chunk_rows"],
            **given,
            **options,
        )
    else:
        found = rw.token_stats(t["logits"], t["ids"], softcap=t.get("softcap"), **given, **options)
    # Of odd rows several columns tie, and any of them may be listed.
    return [getattr(found, name) for name in names if name != "topk_ids" or "odd" not in t]


def taught_top(t, **options):
    teacher = rw.TopKLogps(t["teacher_ids"], t["teacher_logps"].detach(), tail=t["tail"])
    rest = dict(kind=t["kind"], completion_mask=t["mask"], **options)
    if "weight" in t:
        out = rw.linear_distillation_loss(
            t["hidden"], t["weight"], teacher, chunk_rows=t["chunk_rows"], **rest
        )
    else:
        out = rw.distillation_loss(t["logits"], teacher, **rest)
    return [out.loss, out.forward_kl, out.reverse_kl]


def taught(t, **options):
    logits = (
        t["other"].detach()
        if t["of_logits"]
        else rw.HiddenLogits(t["hidden2"].detach(), t["weight2"].detach())
    )
    teacher = rw.Teacher(logits, 0.3, kind=t["kind"])
    out = rw.linear_policy_loss(
        t["hidden"],
        t["weight"],
        t["ids"],
        t["advantages"],
        spec=rw.methods.trl(entropy_coef=0.1),
        teacher=teacher,
        chunk_rows=t["chunk_rows"],
        **options,
    )
    return [out.loss, out.per_token_logps, out.entropies, out.teacher.forward_kl, out.teacher.loss]


def kept(t, **options):
    sets = rw.SamplingMask(t["kept_ids"], t["offsets"])
    more = dict(
        sampling_mask=sets, entropy_over=t["over"], temperature=t.get("temperature", 1.0), **options
    )
    names = ("logps", "entropies", "lse", "log_sum_p_sq", "max_logp", "is_top1")
    if "weight" in t:
        out = rw.linear_policy_loss(
            t["hidden"],
            t["weight"],
            t["ids"],
            t["advantages"],
            spec=rw.methods.trl(entropy_coef=0.1),
            chunk_rows=t["chunk_rows"],
            **more,
        )
        return [out.loss, out.per_token_logps, out.entropies]
    found = rw.token_stats(t["logits"], t["ids"], stats=names, softcap=t.get("softcap"), **more)
    return [getattr(found, name) for name in names]


def kept_sets(g, z, ids):
    """Of every row some ids and its own; of some rows all of one shard, only its own,
    or all that there are.
    """
    mask = torch.rand(z.shape, generator=g) < 0.3
    mask[0], mask[1], mask[8] = False, False, True
    mask[1, :9] = True
    mask.scatter_(1, torch.where(ids < 0, 0, ids)[:, None], True)
    sets = rw.SamplingMask.from_mask(mask)
    order = torch.randperm(3, generator=g)  # in any order
    at = slice(int(sets.offsets[3]), int(sets.offsets[3]) + 3)
    sets.token_ids[at] = sets.token_ids[at][order]
    return dict(kept_ids=sets.token_ids, offsets=sets.offsets)


def calls():
    """``(name, function, tensors, which are sharded)``, in fp64."""
    g = torch.Generator().manual_seed(4)
    z, ids = rows(g)
    selected = torch.randint(V, (N, 4), generator=g)
    # an id twice, padding, the row's own
    selected[:, 1], selected[3, 2], selected[7:9, 3] = selected[:, 0], -100, ids[7:9]
    of_logits = {"logits": -1}
    nan_rows = dict(logits=z, ids=ids, selected=selected, top_k=3, odd=True)
    yield "picked of odd rows", picked, nan_rows, of_logits
    sound, other = normal(g, N, V, scale=2.0), normal(g, N, V, scale=2.0).detach()
    yield (
        "picked",
        picked,
        dict(logits=sound, ids=ids, selected=torch.arange(0, V, 5), top_k=V, softcap=3.0),
        of_logits,
    )
    learnt = (0.5 + torch.rand(N, generator=g, dtype=torch.float64)).requires_grad_()
    yield (
        "picked, learnt temperature",
        picked,
        dict(logits=sound, ids=ids, selected=selected, top_k=11, temperature=learnt),
        of_logits,
    )
    head = dict(
        hidden=normal(g, N, D),
        weight=normal(g, V, D),
        a=normal(g, R, D),
        b=normal(g, V, R),
        ids=ids,
    )
    of_head = {"weight": 0, "b": 0}
    mask = torch.arange(N) != 7
    listed = torch.stack([torch.randperm(V, generator=g)[:4] for _ in range(N)])
    stored = dict(
        teacher_ids=listed, teacher_logps=other.log_softmax(-1).gather(-1, listed) - 0.5, mask=mask
    )
    heads = dict(
        hidden=head["hidden"],
        weight=head["weight"],
        hidden2=normal(g, N, 3).detach(),
        weight2=normal(g, V, 3).detach(),
        other=other,
    )
    of_heads = {"weight": 0, "weight2": 0, "other": -1}
    adv = torch.randn(N, generator=g, dtype=torch.float64)
    for chunk_rows in (None, 5):
        yield (
            f"picked of a head, {chunk_rows}",
            picked,
            {**head, "selected": selected, "top_k": 3, "chunk_rows": chunk_rows},
            of_head,
        )
        top = {
            **stored,
            "hidden": head["hidden"],
            "weight": head["weight"],
            "chunk_rows": chunk_rows,
            "tail": "bucket",
            "kind": "forward_kl",
        }
        yield f"top-k teacher of a head, {chunk_rows}", taught_top, top, {"weight": 0}
        t = {**heads, "ids": ids, "advantages": adv, "chunk_rows": chunk_rows}
        for of_logits_too, kind in (
            (False, "reverse_kl"),
            (True, "jeffreys"),
            (False, "generalized_jsd"),
        ):
            yield (
                f"a teacher beside, {chunk_rows}, {kind}",
                taught,
                {**t, "of_logits": of_logits_too, "kind": kind},
                of_heads,
            )
        t = {**heads, "mask": mask, "chunk_rows": chunk_rows}
        jsd = two_heads(rw.linear_distillation_loss, kind="generalized_jsd", beta=0.3)
        yield f"jsd of heads, {chunk_rows}", jsd, t, of_heads
    for over in ("kept", "vocabulary"):
        sets = dict(kept_sets(g, z, ids), over=over)
        yield f"kept sets of odd rows, {over}", kept, dict(logits=z, ids=ids, **sets), of_logits
        yield (
            f"kept sets, {over}",
            kept,
            dict(logits=sound, ids=ids, **sets, softcap=3.0),
            of_logits,
        )
        yield (
            f"kept sets, {over}, learnt temperature",
            kept,
            dict(logits=sound, ids=ids, temperature=learnt, **sets),
            of_logits,
        )
        for chunk_rows in (None, 5):
            t = dict(
                hidden=head["hidden"],
                weight=head["weight"],
                ids=ids,
                advantages=adv,
                chunk_rows=chunk_rows,
                **sets,
            )
            yield f"kept sets of a head, {over}, {chunk_rows}", kept, t, {"weight": 0}
    for tail, kind in (
        ("bucket", "reverse_kl"),
        ("renormalize", "forward_kl"),
        ("ignore", "generalized_jsd"),
    ):
        yield (
            f"top-k teacher, {tail}",
            taught_top,
            {**stored, "logits": sound, "tail": tail, "kind": kind},
            of_logits,
        )
    both = {"logits": -1, "other": -1}
    for beta in (0.5, 0.1):
        jsd = dict(kind="generalized_jsd", beta=beta)
        yield (
            f"jsd {beta}",
            two(rw.token_divergence, **jsd),
            dict(logits=sound, other=other, mask=mask),
            both,
        )
        yield (
            f"jsd loss {beta}",
            two(rw.distillation_loss, **jsd),
            dict(logits=sound, other=other, mask=mask),
            both,
        )
    holes, other_holes = sound.detach().clone(), other.clone()
    holes[0, :12] = other_holes[1, :12] = -math.inf
    for x in (holes, other_holes):
        x[2, 12:] = -math.inf
    jsd = two(rw.token_divergence, kind="generalized_jsd")
    yield (
        "jsd with holes",
        jsd,
        dict(logits=holes.clone().requires_grad_(), other=other_holes.clone(), mask=mask),
        both,
    )
    other_holes[4] = -math.inf
    holes[5, 3] = math.nan
    yield (
        "jsd of rows without a distribution",
        jsd,
        dict(logits=holes.requires_grad_(), other=other_holes, mask=mask),
        both,
    )


def every_call(ranks, world, padding, dtype, options, only=""):
    at, (group, _) = ranks.axes(world, 4 // world)
    split, wrong = (group, at[0], world, padding), []
    for name, function, tensors, vocab in (call for call in calls() if only in call[0]):
        wrong += [
            f"{name}: {e}" for e in differences(function, tensors, vocab, split, dtype, **options)
        ]
    return wrong


@pytest.mark.parametrize(
    ("world", "padding"), [(4, 0), (4, 30), pytest.param(2, 9, marks=pytest.mark.slow)]
)
def test_every_call_is_one_process_in_fp64(four, world, padding):
    four.check(every_call, world, padding, torch.float64, {})


@pytest.mark.parametrize(
    ("backend", "only"),
    [
        ("cpu", ""),
        ("reference", ""),
        *(
            pytest.param("triton", only, marks=pytest.mark.slow)
            for only in ("picked", "jsd", "kept")
        ),
    ],
)
def test_every_call_is_as_exact_in_fp32(four, backend, only):
    four.check(every_call, 4, 0, torch.float32, {"backend": backend}, only)


def ties(ranks):
    """Of equal logits the lowest id comes first, also where a shard has fewer columns
    than are asked for, and every id is listed once.
    """
    group, columns = ranks.group(range(4)), [(0, 1), (1, 7), (7, 7), (7, 9)][ranks.rank]
    z = torch.tensor(
        [[0.0, 2, 1, 2, -math.inf, 1, 0, 2, -math.inf], [-math.inf] * 8 + [1.0], [3.0] * 9]
    )
    ids = torch.tensor([1, 8, 0])
    out = rw.token_stats(
        z[:, slice(*columns)].contiguous(),
        ids,
        stats=("topk_ids", "topk_logps"),
        top_k=9,
        process_group=group,
    )
    assert torch.equal(out.topk_ids, z.sort(dim=-1, descending=True, stable=True).indices), (
        out.topk_ids
    )
    torch.testing.assert_close(out.topk_logps, z.log_softmax(-1).gather(-1, out.topk_ids))
    return []


def test_of_equal_logits_the_lowest_id_comes_first(four):
    four.check(ties)
