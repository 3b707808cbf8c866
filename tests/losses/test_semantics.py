"""The rules of docs/semantics.md on shapes, masks, ids, divisors and gradients, on
every available backend.
"""

import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason

CPU_BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(
        b, Request("token_loss_grad", torch.device("cpu"), torch.float32, rw.methods.grpo().program)
    )
    is None
]
PLANS = ["one_pass", "two_pass"]
B, T, V = 3, 5, 13


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    z = torch.randn(B, T, V, generator=g) * 2
    ids = torch.randint(V, (B, T), generator=g)
    adv = torch.randn(B, T, generator=g)
    old = torch.log_softmax(z, -1).gather(-1, ids[..., None])[..., 0] + 0.3 * torch.randn(
        B, T, generator=g
    )
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0]])
    return dict(z=z, ids=ids, adv=adv, old=old, mask=mask)


def loss_and_grad(z, ids, adv, spec="grpo", **options):
    z = z.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = rw.policy_loss(z, ids, adv, spec=spec, **options)
    loss = out.loss if out.loss.dim() == 0 else out.loss.sum()
    return out, torch.autograd.grad(loss, z)[0]


def same(a, b, **tolerance):
    torch.testing.assert_close(a[0].loss, b[0].loss, **tolerance)
    torch.testing.assert_close(a[1], b[1], **tolerance)


# --- shapes ---------------------------------------------------------------------------
@pytest.mark.parametrize("plan", PLANS)
# docs/semantics.md: S1
def test_drop_last_is_the_slice_without_the_copy(data, backend, plan):
    longer = torch.cat([data["z"], torch.full((B, 1, V), math.nan)], 1)
    options = dict(
        old_per_token_logps=data["old"], completion_mask=data["mask"], backend=backend, plan=plan
    )
    plain = loss_and_grad(data["z"], data["ids"], data["adv"], **options)
    dropped = loss_and_grad(longer, data["ids"], data["adv"], drop_last=True, **options)
    same(plain, (dropped[0], dropped[1][:, :-1]), rtol=0, atol=0)
    assert (dropped[1][:, -1] == 0).all()


@pytest.mark.parametrize("plan", PLANS)
def test_any_batch_and_row_stride(data, backend, plan):
    options = dict(old_per_token_logps=data["old"], backend=backend, plan=plan)
    plain = loss_and_grad(data["z"], data["ids"], data["adv"], **options)
    big = torch.full((B + 2, 2 * T + 1, V + 7), math.nan)
    view = big[1 : B + 1, : 2 * T : 2, 3 : V + 3]
    view.copy_(data["z"])
    leaf = view.detach().requires_grad_()
    out = rw.policy_loss(leaf, data["ids"], data["adv"], spec="grpo", **options)
    same(plain, (out, torch.autograd.grad(out.loss, leaf)[0]), rtol=0, atol=0)


def test_leading_dimensions(data, backend):
    one = loss_and_grad(data["z"], data["ids"], data["adv"], backend=backend)
    four = loss_and_grad(data["z"][None], data["ids"][None], data["adv"][None], backend=backend)
    same(one, (four[0], four[1][0]), rtol=0, atol=0)
    flat = loss_and_grad(
        data["z"].view(-1, V),
        data["ids"].view(-1),
        data["adv"].view(-1),
        spec="dapo",
        backend=backend,
    )
    same(
        loss_and_grad(data["z"], data["ids"], data["adv"], spec="dapo", backend=backend),
        (flat[0], flat[1].view(B, T, V)),
        rtol=0,
        atol=0,
    )


def test_int32_ids(data, backend):
    same(
        loss_and_grad(data["z"], data["ids"], 1.0, backend=backend),
        loss_and_grad(data["z"], data["ids"].int(), 1.0, backend=backend),
        rtol=0,
        atol=0,
    )


def test_sequence_shapes_of_per_row_arguments(data, backend):
    per_sequence = torch.tensor([0.5, -1.0, 2.0])
    want = loss_and_grad(
        data["z"], data["ids"], per_sequence[:, None].expand(B, T), backend=backend
    )
    for shaped in (per_sequence, per_sequence[:, None]):
        same(want, loss_and_grad(data["z"], data["ids"], shaped, backend=backend), rtol=0, atol=0)
    same(
        loss_and_grad(data["z"], data["ids"], torch.full((B,), 0.7), backend=backend),
        loss_and_grad(data["z"], data["ids"], 0.7, backend=backend),
        rtol=0,
        atol=0,
    )


def test_packed_rows_are_the_padded_rows(data, backend):  # docs/semantics.md: S3
    lengths = [3, 5, 2]
    rows = [slice(0, n) for n in lengths]
    packed = {
        k: torch.cat([data[k][i, r] for i, r in enumerate(rows)])
        for k in ("z", "ids", "adv", "old")
    }
    cu = torch.tensor([0, 3, 8, 10], dtype=torch.int32)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    per_sequence = torch.tensor([0.5, -1.0, 2.0])
    index = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    for spec in ("gspo", "grpo", "dapo"):
        padded = loss_and_grad(
            data["z"],
            data["ids"],
            per_sequence,
            spec,
            old_per_token_logps=data["old"],
            completion_mask=mask,
            backend=backend,
        )
        for sequences in ({"cu_seqlens": cu}, {"sequence_ids": index, "num_sequences": 3}):
            for adv in (per_sequence, per_sequence[:, None], per_sequence[index]):
                out = loss_and_grad(
                    packed["z"],
                    packed["ids"],
                    adv,
                    spec,
                    old_per_token_logps=packed["old"],
                    backend=backend,
                    **sequences,
                )
                same((padded[0], padded[1][mask]), out, rtol=1e-6, atol=1e-7)
        one = loss_and_grad(
            packed["z"][None],
            packed["ids"][None],
            per_sequence,
            spec,
            old_per_token_logps=packed["old"][None],
            cu_seqlens=cu,
            backend=backend,
        )
        same((padded[0], padded[1][mask]), (one[0], one[1][0]), rtol=1e-6, atol=1e-7)


def test_rows_beyond_the_last_offset_are_out(data, backend):  # docs/semantics.md: S2
    flat = [data[k].flatten(0, 1) for k in ("z", "ids", "adv")]
    out, grad = loss_and_grad(*flat, "dapo", cu_seqlens=torch.tensor([0, 4, 9]), backend=backend)
    want, cut = loss_and_grad(*(x[:9] for x in flat), "dapo", backend=backend)
    same((out, grad[:9]), (want, cut), rtol=0, atol=0)
    assert (grad[9:] == 0).all() and (out.per_token_logps[9:] == 0).all()


def test_segments_are_runs_inside_a_sequence(data):
    spec = rw.methods.gspo(epsilon_low=0.2, epsilon_high=0.2).replace(ratio=rw.SegmentRatio())
    segments = torch.tensor([[7, 7, 7, 2, 2], [0, 0, 1, 1, 1], [5, 5, 5, 5, 5]])
    out = rw.policy_loss(
        data["z"],
        data["ids"],
        data["adv"],
        spec=spec,
        old_per_token_logps=data["old"],
        segment_ids=segments,
    )
    logp = torch.log_softmax(data["z"], -1).gather(-1, data["ids"][..., None])[..., 0]
    log_ratio = logp - data["old"]
    for row, start, stop in ((0, 0, 3), (0, 3, 5), (1, 0, 2), (1, 2, 5), (2, 0, 5)):
        want = log_ratio[row, start:stop].mean().exp()
        torch.testing.assert_close(out.ratio[row, start:stop], want.expand(stop - start))


# --- ignored rows ---------------------------------------------------------------------
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("how", ["mask", "ids", "float_mask"])
# docs/semantics.md: S2
def test_an_ignored_row_is_never_read(data, backend, plan, how):
    """It may hold NaN logits, and stored values of NaN and inf; its outputs and
    gradient are exactly 0.
    """
    inside = data["mask"].bool()
    z, old, adv = data["z"].clone(), data["old"].clone(), data["adv"].clone()
    z[~inside], old[~inside], adv[~inside] = math.nan, math.inf, math.nan
    ids, options = data["ids"], {"completion_mask": data["mask"]}
    if how == "ids":
        ids, options = torch.where(inside, ids, -100), {}
    if how == "float_mask":
        options = {"completion_mask": data["mask"] * 0.3}
    for spec in ("grpo", "gspo", "top_entropy", rw.methods.grpo(beta=0.1, entropy_coef=0.1)):
        resolved = rw.method(spec) if isinstance(spec, str) else spec
        if plan == "one_pass" and resolved.one_pass_unsupported_reason:
            continue
        ref = {"ref_per_token_logps": old} if "ref_logp" in resolved.requires else {}
        clean = {"ref_per_token_logps": data["old"]} if ref else {}
        out, grad = loss_and_grad(
            z,
            ids,
            adv,
            resolved,
            old_per_token_logps=old,
            plan=plan,
            backend=backend,
            **options,
            **ref,
        )
        want, expected = loss_and_grad(
            data["z"],
            data["ids"],
            data["adv"],
            resolved,
            old_per_token_logps=data["old"],
            completion_mask=data["mask"],
            plan=plan,
            backend=backend,
            **clean,
        )
        same((out, grad), (want, expected), rtol=0, atol=0)
        for row in (
            out.per_token_logps,
            out.entropies,
            out.per_token_loss,
            out.coef,
            out.ratio,
            out.is_clipped.float(),
        ):
            assert (row[~inside] == 0).all()
        assert (grad[~inside] == 0).all() and grad.isfinite().all()
        assert all(math.isfinite(v) for v in out.metrics.as_floats().values())


@pytest.mark.parametrize("plan", PLANS)
# docs/semantics.md: S5
def test_a_batch_with_every_row_out_is_a_differentiable_zero(data, backend, plan):
    for spec in ("grpo", "dapo", rw.methods.grpo(entropy_coef=0.1)):
        out, grad = loss_and_grad(
            data["z"] * math.nan,
            data["ids"],
            data["adv"],
            spec,
            completion_mask=torch.zeros(B, T),
            plan=plan,
            backend=backend,
        )
        assert out.loss == 0 and (grad == 0).all()


def test_no_rows_at_all(backend):
    out, grad = loss_and_grad(
        torch.empty(2, 0, V),
        torch.empty(2, 0, dtype=torch.long),
        torch.empty(2),
        "dapo",
        backend=backend,
    )
    assert out.loss == 0 and grad.shape == (2, 0, V)


@pytest.mark.parametrize("plan", PLANS)
def test_denominator_mask_counts_only(data, backend, plan):  # docs/semantics.md: S13
    options = dict(
        old_per_token_logps=data["old"], completion_mask=data["mask"], plan=plan, backend=backend
    )
    out, grad = loss_and_grad(
        data["z"], data["ids"], data["adv"], "dapo", denominator_mask=torch.ones(B, T), **options
    )
    plain, reference = loss_and_grad(data["z"], data["ids"], data["adv"], "dapo", **options)
    scale = data["mask"].sum() / (B * T)
    torch.testing.assert_close(out.loss, plain.loss * scale)
    torch.testing.assert_close(grad, reference * scale)


def test_zero_gradient_rows_have_statistics_and_a_zero_gradient(data, backend):
    adv = data["adv"].clone()
    adv[1] = 0
    out, grad = loss_and_grad(data["z"], data["ids"], adv, "reinforce", backend=backend)
    assert (
        (grad[1] == 0).all() and (out.per_token_logps[1] < 0).all() and (out.entropies[1] > 0).all()
    )
    assert out.metrics["rows_skipped"] == T


# --- ids ------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [-1, V, 2**40])
def test_a_bad_id_is_an_error_on_the_cpu(data, bad):  # docs/semantics.md: S7
    ids = data["ids"].clone()
    ids[1, 2] = bad
    with pytest.raises(
        rw.InvalidCall, match=rf"completion_ids\[7\].*is {bad}, expected 0 to {V - 1}"
    ):
        rw.token_logps(data["z"], ids)


def test_a_bad_id_behind_a_mask_is_fine(data):
    ids = torch.where(data["mask"].bool(), data["ids"], 10**9)
    torch.testing.assert_close(
        rw.token_logps(data["z"], ids, completion_mask=data["mask"]),
        rw.token_logps(data["z"], data["ids"], completion_mask=data["mask"]),
    )


# docs/semantics.md: S7
def test_the_kernel_itself_answers_a_bad_id_with_nan(data, backend):
    """The result of a GPU call, where checking would synchronise."""
    from reweight_ops import kernels

    ids = data["ids"].flatten().clone()
    ids[3], ids[4] = V, -7
    z, one = data["z"].view(-1, V), torch.ones(1)
    stats = kernels.token_stats(z, ids, one, stats=("logp", "entropy", "lse"), backend=backend)
    assert (
        stats[:, 3:5].isnan().all()
        and stats[:, :3].isfinite().all()
        and stats[:, 5:].isfinite().all()
    )
    grad = kernels.token_grad(
        z, ids, one, dict(logp=stats[0], lse=stats[2]), {"logp": torch.ones(B * T)}, backend=backend
    )
    assert (grad[3:5] == 0).all() and grad.isfinite().all()


# --- -inf, NaN ------------------------------------------------------------------------
@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("plan", PLANS)
def test_minus_inf_columns(data, backend, plan, softcap):  # docs/semantics.md: S23
    masked = torch.zeros(V, dtype=torch.bool)
    masked[[0, 4, 12]] = True
    z = data["z"].masked_fill(masked, -math.inf)
    kept = torch.nonzero(~masked)[:, 0]
    position = torch.searchsorted(kept, data["ids"].clamp(1, 3))
    ids = kept[position]
    spec = rw.methods.grpo(entropy_coef=0.05)
    options = dict(old_per_token_logps=data["old"], plan=plan, backend=backend, softcap=softcap)
    out, grad = loss_and_grad(z, ids, data["adv"], spec, **options)
    want, small = loss_and_grad(data["z"][..., kept], position, data["adv"], spec, **options)
    assert (grad[..., masked] == 0).all()
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(grad[..., kept], small, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("plan", PLANS)
def test_minus_inf_target(data, backend, plan):  # docs/semantics.md: S24
    z = data["z"].clone()
    z[0, 0, data["ids"][0, 0]] = -math.inf
    out, grad = loss_and_grad(z, data["ids"], data["adv"], "reinforce", plan=plan, backend=backend)
    assert out.per_token_logps[0, 0] == -math.inf and out.loss.isinf()
    assert (
        grad.isfinite().all() and grad[0, 0, data["ids"][0, 0]] == 0 and grad[0, 0].abs().sum() > 0
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("plan", PLANS)
def test_a_bad_row_is_nan_alone(data, backend, plan, value):  # docs/semantics.md: S25
    z = data["z"].clone()
    if value == -math.inf:
        z[1, 2] = value
    else:
        z[1, 2, 4] = value
    out, grad = loss_and_grad(z, data["ids"], data["adv"], "reinforce", plan=plan, backend=backend)
    other = torch.ones(B, T, dtype=torch.bool)
    other[1, 2] = False
    assert (
        out.per_token_logps[1, 2].isnan()
        and out.entropies[1, 2].isnan()
        and grad[1, 2].isnan().all()
    )
    clean, expected = loss_and_grad(
        data["z"], data["ids"], data["adv"], "reinforce", plan=plan, backend=backend
    )
    torch.testing.assert_close(grad[other], expected[other], rtol=0, atol=0)
    torch.testing.assert_close(
        out.per_token_logps[other], clean.per_token_logps[other], rtol=0, atol=0
    )


@pytest.mark.parametrize("plan", PLANS)
def test_a_ratio_that_would_overflow(data, backend, plan):  # docs/semantics.md: S15
    """exp(200) is inf in fp32; the clamp bounds it, and a clipped token's gradient is
    0, not NaN.
    """
    old = data["old"].clone()
    old[0, 0], old[0, 1] = -250.0, 200.0
    for spec in ("grpo", "sapo", "cispo", rw.methods.grpo(beta=0.1)):
        resolved = rw.method(spec) if isinstance(spec, str) else spec
        ref = {"ref_per_token_logps": old} if "ref_logp" in resolved.requires else {}
        out, grad = loss_and_grad(
            data["z"],
            data["ids"],
            data["adv"].abs(),
            resolved,
            old_per_token_logps=old,
            plan=plan,
            backend=backend,
            **ref,
        )
        assert out.loss.isfinite() and grad.isfinite().all()
        assert spec != "grpo" or (grad[0, 0] == 0).all()


@pytest.mark.parametrize("plan", PLANS)
def test_a_zero_weight_selects_zero(data, backend, plan):  # docs/semantics.md: S11
    """0 * inf would be NaN: a token with weight 0 may hold anything."""
    adv = data["adv"].clone()
    adv[0, 1] = math.inf
    weights = torch.ones(B, T)
    weights[0, 1] = 0
    out, grad = loss_and_grad(
        data["z"], data["ids"], adv, token_weights=weights, plan=plan, backend=backend
    )
    assert out.loss.isfinite() and grad.isfinite().all() and (grad[0, 1] == 0).all()


# --- on-policy, weights, divisors, scale ----------------------------------------------
@pytest.mark.parametrize("plan", PLANS)
def test_no_old_log_probs_is_on_policy(data, backend, plan):  # docs/semantics.md: S8
    out, grad = loss_and_grad(data["z"], data["ids"], data["adv"], plan=plan, backend=backend)
    _, reinforce = loss_and_grad(
        data["z"],
        data["ids"],
        data["adv"],
        rw.methods.reinforce().replace(reduction=rw.SequenceMean()),
        plan=plan,
        backend=backend,
    )
    assert (out.ratio == 1).all()
    torch.testing.assert_close(grad, reinforce)
    own = rw.token_logps(data["z"], data["ids"], backend=backend)
    assert (
        rw.policy_loss(
            data["z"],
            data["ids"],
            data["adv"],
            spec="grpo",
            old_per_token_logps=own,
            plan="two_pass",
            backend=backend,
        ).ratio
        == 1
    ).all()
    given, same_grad = loss_and_grad(
        data["z"], data["ids"], data["adv"], old_per_token_logps=own, plan=plan, backend=backend
    )
    assert (given.ratio == 1).all()
    torch.testing.assert_close(same_grad, grad, rtol=0, atol=0)


@pytest.mark.parametrize("plan", PLANS)
# docs/semantics.md: S10
def test_factors_multiply_the_surrogate_only(data, backend, plan):
    spec = rw.methods.dapo(entropy_coef=0.3)
    w, r = torch.rand(B, T), torch.rand(B, 1)
    options = dict(old_per_token_logps=data["old"], plan=plan, backend=backend)
    both = loss_and_grad(
        data["z"],
        data["ids"],
        data["adv"],
        spec,
        token_weights=w,
        importance_sampling_ratio=r,
        **options,
    )
    same(
        both,
        loss_and_grad(data["z"], data["ids"], data["adv"], spec, token_weights=w * r, **options),
    )
    surrogate = loss_and_grad(
        data["z"], data["ids"], data["adv"], rw.methods.dapo(), token_weights=w * r, **options
    )
    entropy = loss_and_grad(data["z"], data["ids"], data["adv"] * 0, spec, **options)
    torch.testing.assert_close(both[0].loss, surrogate[0].loss + entropy[0].loss)
    torch.testing.assert_close(both[1], surrogate[1] + entropy[1])


# docs/semantics.md: S9
def test_a_weight_multiplies_the_term_not_the_advantage(data, backend):
    """They differ for a negative factor: -L(A) is not L(-A) under a clip."""
    old = data["old"] - 1
    flipped, _ = loss_and_grad(
        data["z"],
        data["ids"],
        data["adv"],
        "dapo",
        token_weights=-torch.ones(B, T),
        old_per_token_logps=old,
        backend=backend,
    )
    plain, _ = loss_and_grad(
        data["z"], data["ids"], data["adv"], "dapo", old_per_token_logps=old, backend=backend
    )
    negative, _ = loss_and_grad(
        data["z"], data["ids"], -data["adv"], "dapo", old_per_token_logps=old, backend=backend
    )
    torch.testing.assert_close(flipped.loss, -plain.loss)
    assert abs(flipped.loss - negative.loss) > 0.1
    torch.testing.assert_close(
        flipped.metrics["clip_ratio/region_mean"], plain.metrics["clip_ratio/region_mean"]
    )


@pytest.mark.parametrize("plan", PLANS)
# docs/semantics.md: S12
def test_num_items_in_batch_is_the_divisor(data, backend, plan):
    options = dict(
        old_per_token_logps=data["old"], completion_mask=data["mask"], plan=plan, backend=backend
    )
    plain, grad = loss_and_grad(data["z"], data["ids"], data["adv"], "dapo", **options)
    for n in (37.0, torch.tensor(37.0)):
        out, scaled = loss_and_grad(
            data["z"], data["ids"], data["adv"], "dapo", num_items_in_batch=n, **options
        )
        torch.testing.assert_close(out.loss, plain.loss * data["mask"].sum() / 37)
        torch.testing.assert_close(scaled, grad * data["mask"].sum() / 37)


@pytest.mark.parametrize("plan", PLANS)
# docs/semantics.md: S14
def test_loss_scale_scales_loss_and_gradient_but_not_metrics(data, backend, plan):
    spec = rw.methods.grpo(entropy_coef=0.1)
    plain, grad = loss_and_grad(
        data["z"], data["ids"], data["adv"], spec, plan=plan, backend=backend
    )
    for scale in (1024.0, torch.tensor(1024.0)):
        out, scaled = loss_and_grad(
            data["z"], data["ids"], data["adv"], spec, loss_scale=scale, plan=plan, backend=backend
        )
        torch.testing.assert_close(out.loss, plain.loss * 1024)
        torch.testing.assert_close(scaled, grad * 1024)
        assert out.metrics.as_floats() == pytest.approx(plain.metrics.as_floats())


def test_from_function_equals_the_reducer(data, backend):
    def reducer(loss, mask):
        return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()

    options = dict(old_per_token_logps=data["old"], completion_mask=data["mask"], backend=backend)
    same(
        loss_and_grad(
            data["z"],
            data["ids"],
            data["adv"],
            rw.methods.grpo().replace(reduction=rw.FromFunction(reducer)),
            **options,
        ),
        loss_and_grad(data["z"], data["ids"], data["adv"], "grpo", **options),
    )


def test_no_reduction_takes_a_per_row_upstream(data, backend):
    spec = rw.methods.dapo().replace(reduction=rw.NoReduction())
    z = data["z"].clone().requires_grad_()
    out = rw.policy_loss(
        z,
        data["ids"],
        data["adv"],
        spec=spec,
        completion_mask=data["mask"],
        old_per_token_logps=data["old"],
        backend=backend,
    )
    assert (
        out.plan == "two_pass"
        and out.loss.shape == (B, T)
        and (out.loss[data["mask"] == 0] == 0).all()
    )
    upstream = torch.rand(B, T)
    (grad,) = torch.autograd.grad(out.loss, z, upstream)
    _, want = loss_and_grad(
        data["z"],
        data["ids"],
        data["adv"],
        rw.methods.dapo().replace(reduction=rw.TokenSum()),
        token_weights=upstream,
        completion_mask=data["mask"],
        old_per_token_logps=data["old"],
        backend=backend,
    )
    torch.testing.assert_close(grad, want)
    # An expanded upstream gradient, as from .sum(), is not a special case.
    (ones,) = torch.autograd.grad(rw.token_logps(z, data["ids"], backend=backend).sum(), z)
    (reference,) = torch.autograd.grad(
        torch.log_softmax(z, -1).gather(-1, data["ids"][..., None]).sum(), z
    )
    torch.testing.assert_close(ones, reference)


def test_advantages_may_be_none_where_nothing_reads_them(data, backend):
    from reweight_ops._core.formula.base import RULES

    @rw.rule("sft_nll")
    class SftNll(rw.Rule):
        def loss(self, xp, t):
            return -t.logp

    try:
        out, grad = loss_and_grad(
            data["z"],
            data["ids"],
            None,
            rw.PolicyLossSpec(surrogate=SftNll()),
            completion_mask=data["mask"],
            backend=backend,
        )
        z = data["z"].clone().requires_grad_()
        want = torch.nn.functional.cross_entropy(
            z.view(-1, V), data["ids"].where(data["mask"].bool(), -100).view(-1)
        )
        same(
            (out, grad),
            (
                rw.policy_loss(
                    z,
                    data["ids"],
                    None,
                    spec=rw.PolicyLossSpec(surrogate=SftNll()),
                    completion_mask=data["mask"],
                ),
                torch.autograd.grad(want, z)[0],
            ),
        )
        torch.testing.assert_close(out.loss, want)
    finally:
        del RULES["sft_nll"]


def test_constants_are_uploaded_once(data):
    from reweight_ops._core.rows import constants

    spec = rw.methods.grpo(epsilon_low=0.123)
    rw.policy_loss(data["z"], data["ids"], 1.0, spec=spec)
    before = dict(vars(constants._constants))
    z = data["z"].clone().requires_grad_()
    for _ in range(3):
        rw.policy_loss(z, data["ids"], 1.0, spec=spec, temperature=0.77)
    after = vars(constants._constants)
    assert len(set(after) - set(before)) <= 2 and all(
        after[key] is value for key, value in before.items()
    )


@pytest.mark.parametrize("plan", PLANS)
def test_a_row_depends_on_itself_alone(data, backend, plan):  # docs/semantics.md: S4
    """A row has the same bits at every position in the batch and next to any other
    rows.
    """
    g = torch.Generator().manual_seed(9)
    z = torch.randn(40, 1003, generator=g) * 3
    ids, adv = torch.randint(1003, (40,), generator=g), torch.randn(40, generator=g)
    spec = rw.methods.dapo(entropy_coef=0.1).replace(reduction=rw.TokenSum())
    whole, grad = loss_and_grad(z, ids, adv, spec, plan=plan, backend=backend)
    order = torch.randperm(40, generator=g)
    shuffled, moved = loss_and_grad(
        z[order], ids[order], adv[order], spec, plan=plan, backend=backend
    )
    assert torch.equal(whole.per_token_logps[order], shuffled.per_token_logps) and torch.equal(
        grad[order], moved
    )
    for row in (0, 17, 39):
        alone, own = loss_and_grad(
            z[row : row + 1],
            ids[row : row + 1],
            adv[row : row + 1],
            spec,
            plan=plan,
            backend=backend,
        )
        assert torch.equal(alone.per_token_logps[0], whole.per_token_logps[row]) and torch.equal(
            own[0], grad[row]
        )
    again, repeated = loss_and_grad(z, ids, adv, spec, plan=plan, backend=backend)
    assert torch.equal(again.loss, whole.loss) and torch.equal(repeated, grad)


def test_micro_batches_add_up(data, backend):  # docs/semantics.md: S12
    whole, grad = loss_and_grad(
        data["z"], data["ids"], data["adv"], "dapo", num_items_in_batch=11.0, backend=backend
    )
    parts = [
        loss_and_grad(
            data["z"][i : i + 1],
            data["ids"][i : i + 1],
            data["adv"][i : i + 1],
            "dapo",
            num_items_in_batch=11.0,
            backend=backend,
        )
        for i in range(B)
    ]
    torch.testing.assert_close(sum(p[0].loss for p in parts), whole.loss)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad)


def test_a_shift_of_the_row_changes_nothing(data, backend):  # docs/semantics.md: S16
    plain = loss_and_grad(data["z"], data["ids"], data["adv"], backend=backend)
    shifted = loss_and_grad(data["z"] - 300, data["ids"], data["adv"], backend=backend)
    same(plain, shifted, rtol=1e-4, atol=1e-5)
