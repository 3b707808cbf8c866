"""The rules of docs/semantics.md on shapes, masks and ids, on every backend here."""

import math

import pytest
import torch
from small_calls import CPU_BACKENDS, PLANS, B, T, V, loss_and_grad, same, small_batch

import reweight_ops as rw


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def data():
    return small_batch()


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
