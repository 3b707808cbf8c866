"""Row weights of prompts and of weighted means by the kernels of every backend that has
them, against PyTorch's operations in fp64.
"""

import itertools

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.calls.keywords import PolicyOptions
from reweight_ops._core.calls.policy import resolve_loss
from reweight_ops._core.rows import resolve, structure
from reweight_ops._core.rows.groups import Groups
from reweight_ops._core.rows.primitives import Runs, Weighing
from reweight_ops._core.rows.resolve import RUN, resolve_rows
from reweight_ops.testing import make_batch

CPU = torch.device("cpu")


def _missing(backend):
    try:
        return select.unsupported_reason(backend, select.Request("token_stats", CPU, torch.float32))
    except rw.errors.BackendUnavailable as error:
        return str(error)


@pytest.fixture(params=["cpu", "triton"])
def kernels(request, monkeypatch):
    """The row primitives of a backend. Triton's take 16 rows at a time, so that a few
    rows are several blocks.
    """
    if (reason := _missing(request.param)) is not None:
        pytest.skip(str(reason))
    if request.param == "triton":
        from reweight_ops.triton_kernels import row_config

        small = row_config.RowConfig(padded=16, weighed=16, packed=16)
        monkeypatch.setattr(row_config, "_current", small)
    return select.load(request.param).rows


#: 20 sequences, some of them without rows, and 3 rows of none.
S = 20
LENGTHS = torch.randint(0, 5, (S,), generator=torch.Generator().manual_seed(2))
N = int(LENGTHS.sum()) + 3
OFFSETS = torch.cat([torch.zeros(1, dtype=torch.long), LENGTHS.cumsum(0)])
OWNER = torch.randint(-1, S + 1, (N,), generator=torch.Generator().manual_seed(5))
LAYOUTS = {
    "padded": ((S, 18), {}),
    "offsets": ((1, N), {"cu_seqlens": OFFSETS}),
    "offsets in int32": ((1, N), {"cu_seqlens": torch.stack([OFFSETS] * 2, -1).int()[:, 1]}),
    "ids": ((1, N), {"sequence_ids": OWNER[None], "num_sequences": S}),
}
#: Prompts, some of which no sequence has.
PROMPTS = 25
GROUPS = torch.randint(0, PROMPTS, (S,), generator=torch.Generator().manual_seed(6))


def drawn(shape, seed, share=0.6):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=g) < share


def selected(shape, seed):
    """A token weight that is 0 for half of the rows and whole sequences, and NaN where
    a mask is 0.
    """
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(shape, generator=g) * 3
    u[drawn(shape, seed + 1, 0.4)] = 0
    if shape[0] > 1:
        u[3:9] = 0
    return torch.where(drawn(shape, 1), u, torch.nan)


def rows_of(shape, data, primitives, dtype):
    return resolve_rows("op", shape, CPU, dtype, data, primitives=primitives)


#: A weight has the rounding errors of a sum, its division and three more divisions or
#: products, and of the numbers for them.
MOST = 8 * 2.0**-24


def both(shape, data, spec, primitives, **options):
    """Row weights by the kernels, and in fp64."""
    found = []
    for kernels, dtype in ((primitives, torch.float32), (None, torch.float64)):
        rows = rows_of(shape, data, kernels, dtype)
        spare = torch.zeros(rows.count, dtype=dtype)
        call = resolve_loss(rows, 1.0, spec, PolicyOptions(**options))
        statistics = dict.fromkeys(("logp", "entropy", "log_sum_p_sq"), spare)
        if kernels is not None:
            assert call._fused_row_weights(statistics) is not None, "the kernels form them"
        found.append(call.row_weights(statistics))
    return found


def assert_same(shape, data, spec, primitives, **options):
    got, want = both(shape, data, spec, primitives, **options)
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    error = (got - want).abs().nan_to_num()
    assert (error <= MOST * want.abs().nan_to_num() + 2.0**-149).all(), error.max()
    return got


def reductions(shape):
    u, packed = rw.weights.Precomputed(values=selected(shape, 3)), shape[0] == 1
    yield rw.TokenMean(weight=u)
    yield rw.TokenMean(weight=rw.weights.Precomputed(values=1e-3 * selected(shape, 3)))  # sum < 1
    for per, count in itertools.product(("token_mean", "token_sum"), ("all", "nonempty")):
        yield rw.SequenceMean(per=per, count=count, weight=u)
    yield rw.SequenceMean(per="constant", horizon=7.3, weight=u)
    if not packed:
        yield rw.SequenceMean(per="constant", weight=u)
    yield rw.PromptMean()
    yield rw.PromptMean(group_size=2)


GIVEN = {
    "plain": {},
    "a number": {"num_sequences_in_batch": 3.7, "loss_scale": 0.3},
    "tensors": {
        "num_sequences_in_batch": torch.tensor(11),
        "loss_scale": torch.tensor(0.7, dtype=torch.float64),
    },
}


def masked(shape, places, denominator):
    mask = drawn(shape, 1)
    if "sequence_ids" in places:
        mask = mask & (OWNER >= 0) & (OWNER < S)
    if shape[0] > 1:
        mask[5:8] = False  # sequences without rows
    data = {"completion_mask": mask, **places}
    return data | ({"denominator_mask": drawn(shape, 8)} if denominator else {})


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_weights(kernels, layout, given):
    shape, places = LAYOUTS[layout]
    data = masked(shape, places, denominator=given != "plain")
    for reduction in reductions(shape):
        options, spec = dict(GIVEN[given]), rw.methods.reinforce().replace(reduction=reduction)
        if "num_sequences_in_batch" not in reduction.reads:
            options.pop("num_sequences_in_batch", None)
        if isinstance(reduction, rw.TokenMean) and "num_items_in_batch" in reduction.reads:
            options["num_items_in_batch"] = 5  # a weighted mean does not read it
        groups = {"group_ids": GROUPS, "num_groups": PROMPTS} if spec.reads_groups else {}
        got = assert_same(shape, data | groups, spec, kernels, **groups, **options)
        assert got.any()


def test_terms_with_different_reductions(kernels):
    """They alternate, and the first has the caller's factor."""
    shape, places = LAYOUTS["padded"]
    u, v = (rw.weights.Precomputed(values=selected(shape, seed)) for seed in (3, 4))
    rule = rw.rules.RULES["entropy_bonus"]()
    groups = {"group_ids": GROUPS, "num_groups": PROMPTS}
    for first, *others in (
        (rw.TokenMean(), rw.TokenMean(weight=u), rw.TokenMean(weight=v)),
        (rw.PromptMean(), rw.TokenMean(per_call=True), None, rw.SequenceMean(weight=v)),
        (rw.SequenceMean(weight=u), None, rw.PromptMean(), rw.PromptMean(group_size=10)),
    ):
        spec = rw.methods.reinforce().replace(
            reduction=first, penalties=tuple([rw.Penalty(rule, 0.1, r) for r in others])
        )
        own = groups if spec.reads_groups else {}
        data = masked(shape, places, True) | own
        if spec.reads_groups and any(r and getattr(r, "group_size", None) for r in others):
            # one call has group_ids or a group_size
            spec = spec.replace(penalties=spec.penalties[:-1])
        options = {"token_weights": torch.rand(shape), "loss_scale": 3.0, **own}
        got = assert_same(shape, data, spec, kernels, **options)
        different = {tuple(w.tolist()) for w in got[1:]}
        assert len(different) == len({*spec.reduction_of_term[1:]})


@pytest.mark.parametrize("layout", ["padded", "offsets"])
def test_no_row_is_kept(kernels, layout):
    shape, places = LAYOUTS[layout]
    data = {"completion_mask": torch.zeros(shape), **places}
    for reduction in reductions(shape):
        spec = rw.methods.reinforce().replace(reduction=reduction)
        groups = {"group_ids": GROUPS, "num_groups": PROMPTS} if spec.reads_groups else {}
        assert not assert_same(shape, data | groups, spec, kernels, **groups).any()


def test_weights_that_are_not_finite_or_negative(kernels):
    """As in PyTorch: a sum that is not positive divides by 1, and is not counted."""
    u = torch.ones(4, 3)
    u[1, 1], u[2, 0], u[3] = torch.nan, torch.inf, -1
    mask = torch.ones(4, 3)
    for at in ([], [1], [2], [1, 2]):
        mask[at] = 0
        for reduction in (
            rw.TokenMean(weight=rw.weights.Precomputed(values=u)),
            rw.SequenceMean(weight=rw.weights.Precomputed(values=u)),
            rw.SequenceMean(per="token_sum", weight=rw.weights.Precomputed(values=u)),
        ):
            spec = rw.methods.reinforce().replace(reduction=reduction)
            assert_same((4, 3), {"completion_mask": mask}, spec, kernels)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_term_does_not_depend_on_others(kernels, layout):
    """It has its bits in any company, and a term without a weighing stays as it is."""
    shape, places = LAYOUTS[layout]
    rows = rows_of(shape, masked(shape, places, True), kernels, torch.float32)
    n, g = rows.count, torch.Generator().manual_seed(9)
    u = torch.stack([selected(shape, seed).view(-1) for seed in (3, 4)])
    measured, factor = kernels.measure(rows.masked, u), torch.rand(n, generator=g)
    by_rows, by_tensor = Weighing("rows", weight=1), Weighing(torch.tensor(7), True)
    some = (
        (by_rows, Weighing("sequences", True, weight=0), by_rows),
        (None, Weighing(3.7, horizon=5.3), by_tensor, by_rows, Weighing(0.9, True, 2.2)),
        (by_tensor, None, Weighing(torch.tensor(0.3)), Weighing("rows", True)),
    )
    for weighings, scale in itertools.product(some, (1, 0.3, torch.tensor(0.7))):
        before = torch.full((len(weighings), n), 9.0)
        found = kernels.weigh(measured, weighings, scale, factor, before.clone())
        for k, weighing in enumerate(weighings):
            own = None if k else factor
            want = before[k : k + 1]
            if weighing is not None:
                want = kernels.weigh(measured, (weighing,), scale, own)
                assert want.count_nonzero() > 9 and len(set(want[0].tolist())) > 2 - (own is None)
            assert torch.equal(found[k : k + 1], want)


def test_small_weights(kernels):
    """``1 / u`` overflows, and ``u / (u + u + u)`` does not."""
    u = torch.full((2, 3), 2.0**-140)
    reduction = rw.SequenceMean(weight=rw.weights.Precomputed(values=u))
    spec = rw.methods.reinforce().replace(reduction=reduction)
    got = assert_same((2, 3), {}, spec, kernels, num_sequences_in_batch=1)
    torch.testing.assert_close(got, torch.full((1, 6), 1 / 3))


@pytest.mark.parametrize("shape", [(2 * RUN + 7,), (3, 1100)], ids=str)
def test_sums_are_rounded_once(kernels, shape):
    """They are as exact as fp32 numbers can be, whatever the blocks are."""
    g = torch.Generator().manual_seed(4)
    u, keep = torch.rand(shape, generator=g), drawn(shape, 5)
    rows = rows_of(shape, {"completion_mask": keep}, kernels, torch.float32)
    both = torch.stack([u.view(-1), torch.full((u.numel(),), 0.5)])
    found = kernels.measure(rows.masked, both)
    run = shape[-1] if len(shape) > 1 else RUN
    want = torch.stack([part.sum() for part in (u.double() * keep).view(-1).split(run)])
    assert found.sums.dtype == torch.float32
    assert torch.equal(found.sums[0], want.float())
    assert torch.equal(found.sums[1], rows.masked.lengths[0] / 2)
    assert found.weights is both and found.lengths is rows.masked.lengths


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts(kernels, layout, dtype):
    shape, places = LAYOUTS[layout]
    data = masked(shape, places, True)
    rows = rows_of(shape, data, kernels, torch.float32)
    ids = torch.stack([GROUPS, -GROUPS], -1).to(dtype)
    for given in (ids[:, 0], ids[:, 0].contiguous()):
        found, index = kernels.regroup(rows.masked, given, PROMPTS)
        owner = rows.sequences.spread(GROUPS + 1) - 1
        assert torch.equal(index, GROUPS) and index.dtype == torch.int64
        assert torch.equal(found.runs.owner, torch.where(owner < 0, PROMPTS, owner))
        assert found.runs == Runs(rows.count, PROMPTS, owner=found.runs.owner)
        for row, counts in enumerate((rows.keep, rows.denominator)):
            want = Groups(PROMPTS, index=GROUPS).sum(rows.sequences.count_rows(counts, torch.int32))
            assert torch.equal(found.lengths[row], want) and want.max() > 0
        assert found.keep is rows.masked.keep and found.counted is rows.masked.counted


@pytest.mark.parametrize("count", [3, 0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_that_nobody_reads_may_be_out_of_range(kernels, monkeypatch, layout, count):
    """As on a GPU: the weights are NaN, and no other memory is read or written."""
    monkeypatch.setattr(structure, "is_readable", lambda t: False)
    shape, places = LAYOUTS[layout]
    spec = rw.methods.reinforce().replace(reduction=rw.PromptMean())
    ids = GROUPS % 3
    for bad in (None, -1, 3, 10**9):
        ids = ids.clone()
        if bad is not None:
            ids[7] = bad
        groups = {"group_ids": ids, "num_groups": count}
        data = masked(shape, places, False) | groups
        rows = rows_of(shape, data, kernels, torch.float32)
        call = resolve_loss(rows, 1.0, spec, PolicyOptions(**groups))
        w = call._fused_row_weights()
        assert rows.trust is not None and bool(rows.trust.isnan()) == (bad is not None or not count)
        assert rows.prompts.index.max() == (count if bad is not None or not count else 2)
        assert w[0][rows.keep].isnan().all() == rows.trust.isnan() and not w[0][~rows.keep].any()
        want = rows_of(shape, data, None, torch.float32)
        assert torch.equal(rows.prompts.index, want.prompts.index)
        assert torch.equal(rows.trust.isnan(), want.trust.isnan())
        # a row of no prompt does not divide by another number
        alone = call.spec.reduction.masked(rows)._replace(trust=None)
        owner = rows.sequences.spread(rows.prompts.index - count) + count
        assert torch.equal(alone.runs.owner, owner)
        plan = call.spec.reduction.weighing(rows, call.divisors)
        finite = kernels.weigh(alone, (plan,), 1.0, None)[0]
        outside = rows.keep & (alone.runs.owner == count)
        prompts = max(int((alone.lengths[1] > 0).sum()), 1)
        assert torch.equal(finite[outside], torch.full_like(finite[outside], 1 / prompts))
        if bad is not None:
            with pytest.raises(rw.InvalidCall, match=r"group_ids\[\d+\] \(flat\) is "):
                resolve_rows("op", shape, CPU, torch.float32, data, validate=True, primitives=kernels)  # fmt: skip


@pytest.mark.parametrize("bad", [[2, 5, 9], [0, 8, 5], [0, 3, 10**9], [0, -(10**9), 9]], ids=str)
def test_malformed_offsets_that_nobody_reads(kernels, monkeypatch, bad):
    monkeypatch.setattr(structure, "is_readable", lambda t: False)
    u = rw.weights.Precomputed(values=torch.rand(1, 9))
    data = {"cu_seqlens": torch.tensor(bad)}
    for reduction in (rw.TokenMean(weight=u), rw.SequenceMean(weight=u), rw.PromptMean(), rw.PromptMean(group_size=2)):  # fmt: skip
        spec = rw.methods.reinforce().replace(reduction=reduction)
        groups = {"group_ids": torch.tensor([0, 0]), "num_groups": 1} if spec.reads_groups else {}
        rows = rows_of((1, 9), data | groups, kernels, torch.float32)
        call = resolve_loss(rows, 1.0, spec, PolicyOptions(**groups))
        w = call._fused_row_weights({"logp": torch.zeros(9)})[0]
        assert w[rows.keep].isnan().all() and not w[~rows.keep].any()


def test_too_many_prompts_to_look_for_are_pytorchs(kernels, monkeypatch):
    monkeypatch.setattr(resolve, "_MOST_SEARCHED", RUN * 3 - 1)
    ids = torch.tensor([0, 2, 2, 0])
    for count, fused in ((2, True), (3, False)):
        groups = {"group_ids": ids.clamp(max=count - 1), "num_groups": count}
        rows = rows_of((4, 3), groups, kernels, torch.float32)
        assert (rows.by_prompt is not None) == fused and rows.masked is not None
        spec = rw.methods.reinforce().replace(reduction=rw.PromptMean())
        call = resolve_loss(rows, 1.0, spec, PolicyOptions(**groups))
        assert (call._fused_row_weights() is not None) == fused
        torch.testing.assert_close(call.row_weights()[0], torch.full((12,), 1 / 12))


def test_what_is_no_list_of_prompts_is_an_error():
    """The module of C++ checks nothing."""
    pytest.importorskip("reweight_ops._C", exc_type=ImportError)
    kernels = select.load("cpu").rows
    rows = rows_of((4, 3), {}, kernels, torch.float32)
    for ids in (torch.zeros(3, dtype=torch.long), torch.zeros(4), torch.zeros(4, 1).long()):
        with pytest.raises(rw.InvalidCall, match="regroup: ids are"):
            kernels.regroup(rows.masked, ids, 2)


METHODS = {
    "scale_rl": (rw.methods.scale_rl(), {"group_ids": torch.tensor([1, 0, 1]), "num_groups": 4}),
    "runs": (rw.methods.scale_rl(group_size=3), {}),
    "vapo": (rw.methods.vapo(), {}),
    "grad_diff": (rw.methods.grad_diff(0.5), {}),
    "npo": (rw.methods.npo(gamma=0.5), {}),
    "weighted sequences": (
        rw.methods.grpo().replace(
            reduction=rw.SequenceMean(weight=rw.weights.SignWeight(positive=2.0, negative=0.5))
        ),
        {},
    ),
}


@pytest.mark.parametrize("plan", ["auto", "two_pass"])
@pytest.mark.parametrize("name", METHODS)
def test_losses(kernels, name, plan):
    """Loss, gradient and metrics as PyTorch gives them."""
    spec, options = METHODS[name]
    batch = make_batch(spec, (3, 5), 13)
    results = []
    for backend in (kernels.name, "reference"):
        z = batch["logits"].detach().clone().requires_grad_()
        call = {**batch, "logits": z, "spec": spec, "plan": plan, "unused": "ignore", **options}
        out = rw.policy_loss(backend=backend, **call)
        results.append((out, *torch.autograd.grad(out.loss, z)))
    (got, grad), (want, expected) = results
    rows = got._call.rows
    assert rows.primitives is kernels and want._call.rows.primitives is None
    assert (rows.by_prompt is not None) == spec.reads_groups, "a result keeps them"
    torch.testing.assert_close(got.loss, want.loss, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected, rtol=2e-4, atol=1e-6)
    sums = want.metrics.as_floats()
    assert got.metrics.as_floats() == pytest.approx(sums, rel=1e-4, abs=1e-6, nan_ok=True)
