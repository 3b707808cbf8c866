"""Kept sets: a row's distribution is over the ids that the sampler kept. Against a
plain masked log-softmax in fp64.
"""

import pytest
import torch
from sampling_rows import SHAPE, VOCAB, kept_batch, oracle, shuffled

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops._core.calls import sampling_mask as module
from reweight_ops._core.calls.keywords import SoftmaxOptions
from reweight_ops._core.calls.logits import resolve_logits
from reweight_ops._core.engine import kept_ops
from reweight_ops.testing import compare, make_batch
from reweight_ops.testing.batches import make_sampling_mask

BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(b, Request("packed_stats", torch.device("cpu"), torch.float32)) is None
]
OVER = ("kept", "vocabulary")
STATS = ("logps", "entropies", "lse", "log_sum_p_sq", "max_logp", "is_top1", "log1m_p")
ENTROPY = rw.methods.grpo(entropy_coef=0.1)
UNMASKED = torch.ones(SHAPE, dtype=torch.bool)
UNMASKED[1, 2] = False


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance, check_dtype=False)


# --- statistics


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(
    "softmax",
    [
        {},
        {"temperature": 0.7, "softcap": 5.0},
        {"vocab_size": 9},
        {"temperature": torch.linspace(0.5, 2, 12).view(SHAPE).double()},
    ],
)
def test_statistics_and_their_gradients_are_those_of_a_masked_softmax(over, softmax):
    z, ids, mask = kept_batch()
    columns = softmax.get("vocab_size", VOCAB)
    ids, mask = ids % columns, mask[..., :columns]
    mask = mask.scatter(-1, ids[..., None], True)
    ids = torch.where(UNMASKED, ids, -100)
    z.requires_grad_()
    found = rw.token_stats(
        z,
        ids,
        stats=STATS,
        sampling_mask=shuffled(mask),
        entropy_over=over,
        backend="reference",
        **softmax,
    )
    expected = oracle(z, ids, mask, over, **softmax)
    for name in STATS:
        value = torch.where(UNMASKED, expected[name], 0)
        close(getattr(found, name), value) if name != "is_top1" else None
    assert found.is_top1.equal(expected["is_top1"] & UNMASKED)
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(3, *SHAPE, generator=g, dtype=torch.float64)
    names = ("logps", "entropies", "lse")
    ours, theirs = (
        torch.autograd.grad(
            sum(
                (w * torch.where(UNMASKED, s[name], 0)).sum()
                for w, name in zip(weights, names, strict=True)
            ),
            z,
        )[0]
        for s in ({name: getattr(found, name) for name in names}, expected)
    )
    close(ours, theirs)


@pytest.mark.parametrize("over", OVER)
def test_gradcheck(over):
    z, ids, mask = kept_batch((3,), 6)
    t = torch.rand(3, dtype=torch.float64) + 0.5

    def both(z, t):
        return rw.token_logps(
            z,
            ids,
            return_entropy=True,
            sampling_mask=mask,
            entropy_over=over,
            temperature=t,
            backend="reference",
        )

    torch.autograd.gradcheck(both, (z.requires_grad_(), t.requires_grad_()))
    torch.autograd.gradgradcheck(lambda z: both(z, t.detach()), (z,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_outside_of_the_set_the_gradient_is_exactly_zero_and_nothing_is_read(backend):
    z, ids, mask = kept_batch(dtype=torch.float32)
    z = torch.where(mask, z, torch.nan).requires_grad_()
    for call in (
        lambda: rw.token_logps(z, ids, sampling_mask=mask, backend=backend).sum(),
        lambda: (
            rw.policy_loss(
                z, ids, 1.0, spec="grpo", sampling_mask=mask, backend=backend, plan="one_pass"
            ).loss
        ),
        lambda: (
            rw.policy_loss(
                z, ids, 1.0, spec="grpo", sampling_mask=mask, backend=backend, plan="two_pass"
            ).loss
        ),
    ):
        (grad,) = torch.autograd.grad(call(), z)
        assert (grad[~mask] == 0).all() and grad.isfinite().all()
        assert (grad[mask] != 0).any()


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_by_the_criterion(backend, dtype, over):
    batch = make_batch(ENTROPY, (4, 16), 257, dtype)
    for plan in ("one_pass", "two_pass"):
        for softmax in ({}, {"temperature": 0.6, "vocab_size": 250}):
            columns = softmax.get("vocab_size", 257)
            batch["completion_ids"] %= columns
            mask = make_sampling_mask(batch)[..., :columns]
            found = compare(
                ENTROPY,
                batch,
                backend=backend,
                plan=plan,
                loss_scale=64.0,
                sampling_mask=mask,
                entropy_over=over,
                **softmax,
            )
            assert found.passed and found.plan == plan, found


# --- policy losses


def _policy(spec, over, **keywords):
    batch = make_batch(spec, (4, 6), VOCAB, dtype=torch.float64)
    z = batch.pop("logits").detach().requires_grad_()
    _, _, mask = kept_batch((4, 6), VOCAB)
    ids = batch.pop("completion_ids")
    mask = mask.scatter(-1, ids.clamp(min=0)[..., None], True)
    ours = rw.policy_loss(
        z,
        ids,
        batch["advantages"],
        spec=spec,
        sampling_mask=shuffled(mask),
        entropy_over=over,
        **keywords,
        **_rest(batch),
    )
    expected = oracle(z, ids, mask, over)
    theirs = rw.policy_loss_from_logps(
        expected["logps"],
        batch["advantages"],
        spec=spec,
        entropies=expected["entropies"],
        log_sum_p_sq=expected["log_sum_p_sq"],
        unused="ignore",  # not every spec reads both statistics
        **_rest(batch),
    )
    return z, mask, ours, theirs


def _rest(batch):
    return {name: value for name, value in batch.items() if name != "advantages"}


@pytest.mark.parametrize("name", sorted(rw.METHODS))
def test_every_method_is_itself_on_the_kept_distribution(name):
    spec = rw.METHODS[name].build()
    for over in OVER:
        z, mask, ours, theirs = _policy(spec, over, backend="reference", plan="two_pass")
        close(ours.loss, theirs.loss, 1e-10)
        a, b = (
            torch.autograd.grad(out.loss.sum(), z, allow_unused=True)[0] for out in (ours, theirs)
        )
        close(a, b, 1e-9)
        if spec.one_pass_unsupported_reason is not None:
            continue
        z, mask, ours, _ = _policy(spec, over, backend="reference", plan="one_pass")
        (c,) = torch.autograd.grad(ours.loss, z)
        assert ours.plan == "one_pass"
        close(ours.loss, theirs.loss, 1e-10)
        close(c, b, 1e-9)
        if over == "kept":
            assert (c[~mask] == 0).all() and (a[~mask] == 0).all()


def test_layouts_and_consumed_logits_change_nothing():
    z, ids, mask = kept_batch(dtype=torch.float32)
    kept = rw.SamplingMask.from_mask(mask)
    for plan in ("one_pass", "two_pass"):

        def run(logits, plan=plan, **keywords):
            leaf = logits.clone().requires_grad_()
            out = rw.policy_loss(
                leaf * 1, ids, 1.0, spec=ENTROPY, sampling_mask=kept, plan=plan, **keywords
            )
            return out.loss, torch.autograd.grad(out.loss, leaf)[0]

        for over in OVER:
            loss, grad = run(z, entropy_over=over)
            consumed = run(z, entropy_over=over, consume_logits=True)
            assert loss == consumed[0] and grad.equal(consumed[1])
            longer = torch.cat([z, torch.full_like(z[:, :1], torch.nan)], 1)
            padded = torch.cat([longer, torch.full_like(longer[..., :3], torch.nan)], -1)
            found = run(padded, entropy_over=over, drop_last=True, vocab_size=VOCAB)
            assert loss == found[0] and grad.equal(found[1][:, :-1, :VOCAB])
            assert not found[1][:, -1].any() and not found[1][..., VOCAB:].any()


def test_of_no_rows_and_of_ignored_rows():
    z, ids, mask = kept_batch()
    nothing = torch.full_like(ids, -100)
    z.requires_grad_()
    for kept in (
        rw.SamplingMask.from_mask(mask),
        rw.SamplingMask(torch.zeros(0, dtype=torch.int32), torch.zeros(13, dtype=torch.int64)),
    ):
        logps = rw.token_logps(z, nothing, sampling_mask=kept)
        assert not logps.any() and not torch.autograd.grad(logps.sum(), z)[0].any()
    assert rw.token_logps(z[:0], ids[:0], sampling_mask=mask[:0]).shape == (0, SHAPE[1])
    garbage = rw.SamplingMask(torch.tensor([0, 7, 99, 99, 1]), torch.tensor([0, 2, 4, 5]))
    found = rw.token_logps(z.view(-1, VOCAB)[:3], torch.tensor([7, -100, 1]), sampling_mask=garbage)
    assert found[1:].tolist() == [0, 0] and found[0] < 0


def test_nothing_waits_for_a_device():
    """On meta tensors every wait is an error: the checks, the gather and the scatter do
    not wait.
    """
    meta = {"device": "meta"}
    for shape in ((6, 9), (2, 3, 9)):
        z = torch.empty(shape, dtype=torch.bfloat16, **meta)
        kept = rw.SamplingMask(
            torch.empty(20, dtype=torch.int32, **meta), torch.empty(7, dtype=torch.int32, **meta)
        )
        options = SoftmaxOptions(sampling_mask=kept)
        found = resolve_logits(
            "op", z, torch.empty(shape[:-1], dtype=torch.int64, **meta), options, {}
        )
        entries = kept_ops._Kept(z, found.ids, *found.kept[:3])
        rows = entries.gather(z, torch.ones(1, **meta), 1.0)
        for add in (False, True):
            entries.scatter(rows.values, z, add)
        assert rows.values.shape == (20,) and rows.bounds.shape == (2, 6)


# --- invalid arguments

ROW = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.0, 0.0]])


def sets(ids, offsets, dtype=torch.int64):
    return rw.SamplingMask(torch.tensor(ids, dtype=dtype), torch.tensor(offsets, dtype=torch.int64))


MALFORMED = {
    "the id is not kept": (sets([1, 0, 2], [0, 1, 3]), [1, 3], r"completion_ids\[1\] \(flat\) is 3, which is not one of the 2 ids that sampling_mask keeps there"),
    "nothing is kept": (sets([1], [0, 1, 1]), [1, 3], r"completion_ids\[1\] \(flat\) is 3, which is not one of the 0 ids"),
    "an id twice": (sets([1, 3, 0, 3], [0, 1, 4]), [1, 3], r"keeps an id of row 1 \(flat\) more than once"),
    "an id outside": (sets([1, 3, 4], [0, 1, 3]), [1, 3], r"token_ids\[2\] is 4, in row 1 \(flat\), expected 0 to 3"),
    "a negative id": (sets([1, -1, 3], [0, 1, 3]), [1, 3], r"token_ids\[1\] is -1, in row 1"),
}  # fmt: skip
OFFSETS = {
    "do not begin at 0": ([1, 3], [1, 1, 2], "run from 1 to 2, expected 0 to 2"),
    "end elsewhere": ([1, 3], [0, 1, 3], "run from 0 to 3, expected 0 to 2"),
    "fall": ([1, 3], [0, 3, 2], r"offsets\[2\] is 2, less than offsets\[1\] = 3"),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_set_that_cannot_be_meant_names_its_row_or_is_nan_in_it(case, backend, monkeypatch):
    kept, ids, message = MALFORMED[case]
    ids = torch.tensor(ids)
    with pytest.raises(rw.InvalidCall, match=message):
        rw.token_logps(ROW, ids, sampling_mask=kept)
    # As on a GPU, where the host reads nothing: NaN in that row alone, and no gradient.
    monkeypatch.setattr(module, "is_readable", lambda t: False)
    for over in OVER:
        z = ROW.clone().requires_grad_()
        for plan in ("one_pass", "two_pass"):
            out = rw.policy_loss(
                z,
                ids,
                1.0,
                spec="reinforce",
                sampling_mask=kept,
                entropy_over=over,
                backend=backend,
                plan=plan,
            )
            assert out.per_token_logps.isnan().tolist() == [False, True] and out.loss.isnan()
            assert out.entropies.detach().isnan().tolist() == [False, True]
            assert torch.autograd.grad(out.loss, z)[0][0].isfinite().all()


@pytest.mark.parametrize("case", OFFSETS)
def test_malformed_offsets_are_named_or_everything_is_nan(case, monkeypatch):
    ids, offsets, message = OFFSETS[case]
    kept = sets(ids, offsets)
    with pytest.raises(rw.InvalidCall, match=message):
        rw.token_logps(ROW, torch.tensor([1, 3]), sampling_mask=kept)
    monkeypatch.setattr(module, "is_readable", lambda t: False)
    assert rw.token_logps(ROW, torch.tensor([1, 3]), sampling_mask=kept).isnan().all()


INVALID = {
    "a dtype": (
        sets([1, 3], [0, 1, 2], torch.float32),
        {},
        "token_ids is .* expected one dimension of int32 or int64",
    ),
    "a number of rows": (
        sets([1, 3], [0, 2]),
        {},
        "offsets has 2 elements, expected 3: one more than there are rows",
    ),
    "something else": (
        3,
        {},
        r"sampling_mask is a int, expected a SamplingMask\(token_ids, offsets\) or a bool mask",
    ),
    "a mask of another shape": (
        torch.ones(2, 3, dtype=torch.bool),
        {},
        r"has shape \(2, 3\), expected \(2,\) \+ \(4,\)",
    ),
    "a mask of another dtype": (torch.ones(2, 4), {}, "expected bool"),
    "an entropy": (
        sets([1, 3], [0, 1, 2]),
        {"entropy_over": "all"},
        "entropy_over is 'all', expected one of kept, vocabulary",
    ),
    "an entropy without a mask": (
        None,
        {"entropy_over": "vocabulary"},
        "entropy_over would have no effect",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_arguments_that_do_not_fit(case):
    kept, keywords, message = INVALID[case]
    with pytest.raises(rw.InvalidCall, match=message):
        rw.token_logps(ROW, torch.tensor([1, 3]), sampling_mask=kept, **keywords)


def test_what_has_no_kept_distribution_says_so():
    z, ids, mask = kept_batch(dtype=torch.float32)
    hidden, weight = torch.zeros(*SHAPE, 2), torch.zeros(VOCAB, 2)
    mask[..., 0] = True  # a divergence has no ids, which the mask could be without
    top = rw.TopKLogps(torch.tensor([1]), torch.zeros(*SHAPE, 1))
    for call in (
        lambda: rw.token_stats(z, ids, stats=("mean_logits",), sampling_mask=mask),
        lambda: rw.token_divergence(z, z, sampling_mask=mask),
        lambda: rw.token_divergence(z, top, sampling_mask=mask),
        lambda: rw.linear_distillation_loss(hidden, weight, top, sampling_mask=mask),
        lambda: rw.distillation_loss(z, z, sampling_mask=mask),
        lambda: rw.linear_token_divergence(hidden, weight, z, sampling_mask=mask),
        lambda: rw.divergences.symmetric_cross_entropy(z, z, sampling_mask=mask),
    ):
        with pytest.raises(rw.UnsupportedRequest, match="sampling_mask"):
            call()


# --- the spine: plans, kept calls, transforms, graphs, pairs


def test_explain_answers_and_a_backend_asked_for_by_name_never_falls_back():
    z, ids, mask = kept_batch(dtype=torch.float32)
    told = rw.explain(rw.policy_loss, z.requires_grad_(), ids, 1.0, spec="grpo", sampling_mask=mask)
    out = rw.policy_loss(z, ids, 1.0, spec="grpo", sampling_mask=mask)
    assert (told.plan, told.backend) == (out.plan, out.backend) == ("one_pass", BACKENDS[-1])
    meta = {"device": "meta"}
    kept = rw.SamplingMask(
        torch.empty(9, dtype=torch.int32, **meta), torch.empty(13, dtype=torch.int64, **meta)
    )
    for value in (kept, mask.to("meta")):
        told = rw.explain(
            rw.token_logps, z.to("meta"), ids.to("meta"), sampling_mask=value, device="cpu"
        )
        assert told.backend == BACKENDS[-1]


def test_a_call_that_was_made_before_is_not_taken_for_one_with_a_mask():
    z, ids, mask = kept_batch(dtype=torch.float32)
    z.requires_grad_()
    for _ in range(3):  # the first loads a backend, the second is remembered
        plain = rw.policy_loss(z, ids, 1.0, spec="grpo")
        kept = rw.policy_loss(z, ids, 1.0, spec="grpo", sampling_mask=mask)
        expected = (
            oracle(z, ids, every, "kept")["logps"] for every in (torch.ones_like(mask), mask)
        )
        for out, logps in zip((plain, kept), expected, strict=True):
            close(out.per_token_logps, logps, 1e-5)
    rw.policy_loss(z, ids, 1.0, spec="grpo", entropy_over="kept")
    with pytest.raises(rw.InvalidCall, match="entropy_over"):
        rw.policy_loss(z, ids, 1.0, spec="grpo", entropy_over="vocabulary")


def test_transforms():
    z, ids, mask = kept_batch((3,), 6)
    kept = rw.SamplingMask.from_mask(mask)

    def total(z):
        logps, entropies = rw.token_logps(z, ids, return_entropy=True, sampling_mask=kept)
        return (logps * entropies).sum()

    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    close(torch.func.grad(total)(z), expected)


def _statistics(z, ids, **keywords):
    logps, entropies = rw.token_logps(z, ids, return_entropy=True, **keywords)
    return (logps * entropies).sum()


def _loss(z, ids, **keywords):
    return rw.policy_loss(z, ids, 1.0, spec="dapo", **keywords).loss


@pytest.mark.parametrize(
    ("function", "over"),
    [
        (_statistics, "kept"),
        *(
            pytest.param(f, over, marks=pytest.mark.slow)
            for f, over in ((_loss, "kept"), (_loss, "vocabulary"))
        ),
    ],
)
def test_graphs(function, over):
    z, ids, mask = kept_batch((3,), 6, torch.float32)
    kept = rw.SamplingMask.from_mask(mask)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (first, graph), (second, eager) = (
        (value, torch.autograd.grad(value, leaf)[0])
        for leaf, f in (
            (z.clone().requires_grad_(), compiled),
            (z.clone().requires_grad_(), function),
        )
        for value in (f(leaf, ids, sampling_mask=kept, entropy_over=over),)
    )
    close(first, second, 1e-6)
    close(graph, eager, 1e-6)
    # In a graph nothing is read: an id that its row does not keep is NaN.
    keeps = kept.token_ids[: kept.offsets[1]].tolist()
    other = next(i for i in range(6) if i not in keeps)
    wrong = kept._replace(token_ids=torch.where(kept.token_ids == ids[0], other, kept.token_ids))
    assert compiled(z.clone().requires_grad_(), ids, sampling_mask=wrong, entropy_over=over).isnan()


def test_pairs_of_kept_distributions():
    z, ids, mask = kept_batch((4, 3))
    ref = torch.randn(4, dtype=torch.float64)
    leaf, plain = z.clone().requires_grad_(), z.clone().requires_grad_()
    ours = rw.preference_loss(
        leaf, ids, spec="dpo", ref_sequence_logps=ref, sampling_mask=mask
    ).loss
    theirs = rw.preference_loss_from_logps(
        oracle(plain, ids, mask)["logps"], spec="dpo", ref_sequence_logps=ref
    ).loss
    close(ours, theirs)
    close(torch.autograd.grad(ours, leaf)[0], torch.autograd.grad(theirs, plain)[0])
