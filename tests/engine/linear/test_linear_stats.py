"""``linear_token_stats``: numbers and gradients of ``token_stats`` on the same logits,
and of TRL's fused head from its wheel.
"""

import math

import pytest
import torch
from test_linear import BACKENDS, B, T, V, make

import reweight_ops as rw

NAMES = (
    "logps",
    "entropies",
    "lse",
    "log_sum_p_sq",
    "max_logp",
    "is_top1",
    "log1m_p",
    "mean_logits",
)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def differentiable(found):
    return found.logps.sum() + 2 * found.entropies.sum() + 3 * found.lse.sum()


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("compact", [False, True])
def test_equals_the_logits_op(compact, chunk_rows):
    d = make()
    ids, inputs = d["ids"] % (V - 4), [d["hidden"], d["weight"], d["bias"]]
    t = torch.rand(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    options = dict(
        stats=NAMES, completion_mask=d["mask"], temperature=t, softcap=6.0, vocab_size=V - 4
    )
    ours = rw.linear_token_stats(
        d["hidden"],
        d["weight"],
        ids,
        lm_head_bias=d["bias"],
        logit_scale=1.3,
        chunk_rows=chunk_rows,
        compact_rows=compact,
        **options,
    )
    want = rw.token_stats(1.3 * (d["hidden"] @ d["weight"].T + d["bias"]), ids, **options)
    for name in NAMES:
        a, b = getattr(ours, name), getattr(want, name)
        assert a.shape == (B, T) and a.requires_grad == b.requires_grad == (
            name in ("logps", "entropies", "lse")
        )
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(differentiable(found), inputs) for found in (ours, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_only_what_was_asked_for():
    d = make()
    found = rw.linear_token_stats(d["hidden"], d["weight"], d["ids"], stats=("log_sum_p_sq",))
    assert [name for name in NAMES if getattr(found, name) is not None] == ["log_sum_p_sq"]
    with pytest.raises(
        rw.InvalidCall, match="linear_token_stats: stats is .* expected some of logps"
    ):
        rw.linear_token_stats(d["hidden"], d["weight"], d["ids"], stats=("logp",))
    with pytest.raises(TypeError, match="Did you mean stats"):
        rw.linear_token_stats(d["hidden"], d["weight"], d["ids"], stat=("logps",))
    assert (
        rw.explain(rw.linear_token_stats, d["hidden"], d["weight"], d["ids"]).backend == "reference"
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("strides", ["plain", "drop_last", "packed"])
def test_mean_logits(backend, strides, softcap):
    """Against a sum in fp64, to a rounding of each logit.

    Ignored rows are 0, rows without a distribution NaN, and a column of -inf makes it
    -inf.
    """
    v = 5000
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 4, v + 7, generator=g) * 3 + 40
    wide[1, 2, 5], wide[2, 0, 9] = math.nan, -math.inf
    mask = torch.ones(3, 4 if strides != "drop_last" else 3, dtype=torch.bool)
    mask[0, 1] = False
    t = torch.rand(mask.shape, generator=g) + 0.5
    z = wide[..., :v] if strides == "plain" else wide
    options = dict(
        stats=("mean_logits",),
        completion_mask=mask,
        temperature=t,
        backend=backend,
        softcap=softcap,
        vocab_size=v,
    )
    if strides == "packed":
        z, options = (
            z.flatten(0, 1),
            {**options, "completion_mask": mask.flatten(), "temperature": t.flatten()},
        )
    found = rw.token_stats(
        z,
        torch.ones(options["completion_mask"].shape, dtype=torch.int64),
        drop_last=strides == "drop_last",
        **options,
    )
    exact = wide[:, : mask.size(1), :v].double()
    x = (
        exact
        if softcap is None
        else torch.where(exact == -math.inf, exact, softcap * torch.tanh(exact / softcap))
    )
    want = torch.where(mask, x.mean(-1) / t.double(), 0)
    assert want.isnan().sum() == want.isinf().sum() == 1
    torch.testing.assert_close(
        found.mean_logits.double().view(mask.shape), want, rtol=4 * 2.0**-24, atol=0, equal_nan=True
    )


def test_a_mean_is_the_same_bits_wherever_its_row_stands(backend):
    """Also alone, where PyTorch splits a long sum among threads."""
    g, columns, before = torch.Generator().manual_seed(0), 50021, torch.get_num_threads()
    row, others = torch.randn(columns, generator=g), torch.randn(4, columns, generator=g)
    found = set()
    torch.set_num_threads(2)
    try:
        for place in range(5):
            z = torch.cat([others[:place], row[None], others[place:]])
            for rows in (z, z[place : place + 1], z[place][None, None].expand(2, 3, -1)):
                ids = torch.zeros(rows.shape[:-1], dtype=torch.int64)
                mean = rw.token_stats(
                    rows, ids, stats=("mean_logits",), backend=backend
                ).mean_logits.flatten()
                found.add(mean[place if len(rows) == 5 else 0].item())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_trls_five_outputs(backend, softcap, bias):
    """The installed TRL ``_ChunkedLogProbFunction``, in fp32.

    Values agree to 1e-6 of the largest number that is subtracted (the log-sum-exp,
    which TRL has in fp32), gradients to 1e-6 of the largest element.
    """
    utils = pytest.importorskip("trl.trainer.utils")
    trl = utils._ChunkedLogProbFunction
    d = make(torch.float32, v=300)
    # The rows are not peaked: in fp32, TRL's 1 - p of a sure token is only the rounding
    # of p.
    h, w, b = (
        (0.3 * d["hidden"]).detach().requires_grad_(),
        d["weight"],
        d["bias"] if bias else None,
    )
    inputs = [x for x in (h, w, b) if x is not None]
    d["ids"][0] = (h[0] @ w.T + (0 if b is None else b)).argmax(-1)
    logps, entropies, p_sq, mean, top1 = trl.apply(
        h.flatten(0, 1), w, b, d["ids"].flatten(), 0.8, 64, softcap, 1.3
    )
    ours = rw.linear_token_stats(
        h,
        w,
        d["ids"],
        stats=NAMES,
        temperature=0.8,
        softcap=softcap,
        logit_scale=1.3,
        lm_head_bias=b,
        chunk_rows=8,
        backend=backend,
    )
    for a, e in (
        (ours.logps, logps),
        (ours.entropies, entropies),
        (ours.log_sum_p_sq, p_sq),
        (ours.mean_logits, mean),
    ):
        torch.testing.assert_close(a.flatten(), e, rtol=0, atol=1e-6 * ours.lse.abs().max().item())
    assert torch.equal(ours.is_top1.flatten(), top1) and top1[:T].all() and not top1.all()
    upstream = torch.randn(2, B * T, generator=torch.Generator().manual_seed(1))
    theirs = torch.autograd.grad((logps * upstream[0] + entropies * upstream[1]).sum(), inputs)
    mine = torch.autograd.grad(
        (ours.logps.flatten() * upstream[0] + ours.entropies.flatten() * upstream[1]).sum(), inputs
    )
    for a, e in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6 * e.abs().max().item())


def test_mean_logits_in_a_transform_and_beside_second_derivatives():
    d = make()

    def total(h):
        found = rw.linear_token_stats(
            h, d["weight"].detach(), d["ids"], stats=("logps", "mean_logits")
        )
        return (found.logps * found.mean_logits).sum(), found.mean_logits

    grad, mean = torch.func.grad(total, has_aux=True)(d["hidden"].detach())
    value, want = total(d["hidden"])
    torch.testing.assert_close(mean, want)
    torch.testing.assert_close(grad, torch.autograd.grad(value, d["hidden"])[0])
