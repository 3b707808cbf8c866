"""Log-probs of several ids per row: ``selected_logps``, ``topk_logps``, ``topk_ids`` of
``token_stats`` and ``linear_token_stats``.
"""

import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops.testing import ERROR_FLOOR, ERROR_RATIO

BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]
B, T, V, K, TOP = 2, 5, 67, 6, 4
STATS = ("logps", "entropies", "lse", "selected_logps", "topk_logps", "topk_ids")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def make(dtype=torch.float64, seed=0, offset=0.0):
    """Lists with the row's own id, a repeated id, padding, and a column without mass.

    One row is ignored, and one has a sure first token.
    """
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(B, T + 1, V, generator=g, dtype=torch.float64) * 3 + offset).to(dtype)
    ids, picked = (
        torch.randint(V - 3, (B, T), generator=g),
        torch.randint(1, V - 3, (B, T, K), generator=g),
    )
    picked[..., 1], picked[..., 2], picked[0, 2, 3:], picked[1, 1, 4] = ids, picked[..., 0], -100, 7
    z[1, 1, 7], z[0, 1, picked[0, 1, 0]] = -math.inf, offset + 40
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 3] = False
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    heat = (torch.rand(B, T, generator=g, dtype=torch.float64) + 0.5).to(wide)
    up = {
        name: torch.randn(B, T, generator=g, dtype=torch.float64).to(wide)
        for name in ("logps", "entropies", "lse")
    }
    up |= {
        name: torch.randn(B, T, n, generator=g, dtype=torch.float64).to(wide)
        for name, n in (("selected_logps", K), ("topk_logps", TOP))
    }
    return dict(z=z, ids=ids, picked=picked, mask=mask, heat=heat, up=up)


def oracle(z, d, softcap, top_ids=None):
    """Differentiable statistics by name, in plain PyTorch and the dtype of ``z``."""
    x = z[:, :-1, : V - 2]
    masked = x == -math.inf
    x = (
        x
        if softcap is None
        else torch.where(masked, x, softcap * torch.tanh(torch.where(masked, 0, x) / softcap))
    )
    x = x / d["heat"].to(z.dtype)[..., None]
    log_p = torch.log_softmax(x, -1)
    finite = torch.where(masked, 0, log_p)
    listed = d["picked"] != -100
    top_ids = x.topk(TOP).indices if top_ids is None else top_ids.clamp(min=0)
    found = {
        "logps": log_p.gather(-1, d["ids"][..., None])[..., 0],
        "entropies": -(log_p.exp() * finite).sum(-1),
        "lse": x.logsumexp(-1),
        "selected_logps": torch.where(listed, log_p.gather(-1, d["picked"].clamp(min=0)), 0),
        "topk_logps": log_p.gather(-1, top_ids),
    }
    return {
        name: torch.where(d["mask"].view(B, T, *(1,) * (v.dim() - 2)), v, 0)
        for name, v in found.items()
    }


def total(found, d):
    """The sum with upstream gradients, which are 0 for the column without mass."""
    parts = []
    for name, up in d["up"].items():
        value = found[name] if isinstance(found, dict) else getattr(found, name)
        parts.append((torch.where(value == -math.inf, 0, value) * up.to(value.dtype)).sum())
    return sum(parts)


def run(d, softcap, backend, **options):
    z = d["z"].clone().requires_grad_()
    found = rw.token_stats(
        z * 1 if options.get("consume_logits") else z,
        d["ids"],
        stats=STATS,
        selected_ids=d["picked"],
        top_k=TOP,
        completion_mask=d["mask"],
        temperature=d["heat"],
        softcap=softcap,
        vocab_size=V - 2,
        drop_last=True,
        backend=backend,
        **options,
    )
    return found, torch.autograd.grad(total(found, d), z)[0]


@pytest.mark.parametrize("consume_logits", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_by_the_criterion(dtype, softcap, consume_logits, backend):
    if dtype == torch.float64 and backend != "reference":
        backend = "reference"
    d = make(dtype)
    found, grad = run(d, softcap, backend, consume_logits=consume_logits)
    exact, single = (
        d["z"].double().requires_grad_(),
        d["z"].to(torch.promote_types(dtype, torch.float32)).requires_grad_(),
    )
    want, plain = (
        oracle(exact, d, softcap, found.topk_ids),
        oracle(single, d, softcap, found.topk_ids),
    )
    torch.testing.assert_close(
        found.topk_ids[d["mask"]], exact[:, :-1, : V - 2].topk(TOP).indices[d["mask"]]
    )
    assert (found.topk_ids[~d["mask"]] == -100).all()
    for name, value in want.items():
        got, there = getattr(found, name), value.isfinite()
        assert torch.equal(got[~there].double(), value[~there])
        error, base = ((x.double() - value)[there].abs().max() for x in (got, plain[name]))
        assert error <= ERROR_RATIO * base + ERROR_FLOOR * (value[there].abs().max() + 1), name
    truth, fp32 = (
        torch.autograd.grad(total(o, d), z)[0] for o, z in ((want, exact), (plain, single))
    )
    size = (
        sum(u.abs().sum(-1).max() if u.dim() > 2 else u.abs().max() for u in d["up"].values())
        / d["heat"].min()
    )
    error, base = ((g.double() - truth).abs().max() for g in (grad, fp32.to(dtype)))
    assert error <= ERROR_RATIO * base + ERROR_FLOOR * size
    assert (
        (grad[1, 3] == 0).all()
        and (grad[:, -1] == 0).all()
        and (grad[..., V - 2 :] == 0).all()
        and grad[1, 1, 7] == 0
    )


def test_16_bit_gradients_are_rounded_once(backend):
    """An element of a picked id is the exact number rounded, not a sum of
    rounded ones."""
    d = make(torch.bfloat16)
    _, grad = run(d, None, backend)
    exact = d["z"].double().requires_grad_()
    truth = torch.autograd.grad(total(oracle(exact, d, None), d), exact)[0]
    error = (grad.double() - truth).abs() / (truth.abs() + 1e-2)
    assert error.max() <= 2.0**-8 + 1e-5


def test_a_far_offset_and_a_sure_token_keep_their_digits(backend):
    d = make(torch.float32, offset=3e4)
    found, _ = run(d | {"heat": torch.ones(B, T)}, None, backend)
    want = oracle(d["z"].double(), d | {"heat": torch.ones(B, T)}, None)["selected_logps"]
    there = want.isfinite()
    torch.testing.assert_close(
        found.selected_logps[there].double(), want[there], rtol=3e-7, atol=1e-12
    )
    assert -1e-6 < want[0, 1, 0] < 0


def test_one_list_for_all_rows_and_int32(backend):
    d = make(torch.float32)
    shared = torch.tensor([5, 1, -100, 5], dtype=torch.int32)
    options = dict(stats=("selected_logps",), completion_mask=d["mask"], backend=backend)
    z = d["z"][:, :-1].clone().requires_grad_()
    a = rw.token_stats(z, d["ids"], selected_ids=shared, **options).selected_logps
    b = rw.token_stats(
        z, d["ids"], selected_ids=shared.long().expand(B, T, 4), **options
    ).selected_logps
    assert (
        a.shape == (B, T, 4)
        and torch.equal(a, b)
        and (a[..., 2] == 0).all()
        and (a[1, 3] == 0).all()
    )
    assert torch.equal(*(torch.autograd.grad(x.pow(2).sum(), z)[0] for x in (a, b)))


def test_second_derivatives_transforms_and_temperature():
    d = make()
    z, heat = d["z"][:, :-1].clone().requires_grad_(), d["heat"].clone().requires_grad_()
    options = dict(stats=STATS[3:], selected_ids=d["picked"], top_k=TOP, completion_mask=d["mask"])

    def loss(z, heat):
        found = rw.token_stats(z, d["ids"], temperature=heat, **options)
        return (
            torch.where(found.selected_logps == -math.inf, 0, found.selected_logps).pow(2)
            * d["up"]["selected_logps"]
        ).sum() + (found.topk_logps.pow(3) * d["up"]["topk_logps"]).sum()

    # Without the column of -inf, whose finite difference is NaN.
    z = torch.where(z == -math.inf, -3.0, z).detach().requires_grad_()
    assert torch.autograd.gradcheck(loss, (z, heat), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, d["heat"]), (z,), fast_mode=True)
    (grad,) = torch.autograd.grad(loss(z, d["heat"]), z)
    torch.testing.assert_close(torch.func.grad(lambda z: loss(z, d["heat"]))(z.detach()), grad)


@pytest.mark.parametrize("chunk_rows", [3, 100])
@pytest.mark.parametrize("compact", [False, True])
def test_from_hidden_states(compact, chunk_rows, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    g, d = torch.Generator().manual_seed(1), make(dtype)
    hidden, weight = (
        torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for s in ((B, T, 8), (V, 8))
    )
    options = dict(
        stats=STATS,
        selected_ids=d["picked"],
        top_k=TOP,
        completion_mask=d["mask"],
        temperature=d["heat"],
        vocab_size=V - 2,
    )
    got = rw.linear_token_stats(
        hidden,
        weight,
        d["ids"],
        chunk_rows=chunk_rows,
        compact_rows=compact,
        backend=backend,
        **options,
    )
    want = rw.token_stats(hidden @ weight.T, d["ids"], backend=backend, **options)
    near = {} if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    for name in STATS:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), **near)
    for a, b in zip(
        *(torch.autograd.grad(total(x, d), (hidden, weight)) for x in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b, **near)
    (h,) = torch.autograd.grad(
        rw.linear_token_stats(hidden, weight, d["ids"], chunk_rows=3, **options)
        .topk_logps[..., 1]
        .sum(),
        hidden,
    )
    assert (h[d["mask"]] != 0).any(-1).all() and (h[~d["mask"]] == 0).all()


def test_compiles():
    d = make(torch.float32)
    torch._dynamo.reset()

    def loss(z):
        found = rw.token_stats(
            z, d["ids"], stats=STATS, selected_ids=d["picked"], top_k=TOP, completion_mask=d["mask"]
        )
        return total(found, d)

    z = d["z"][:, :-1].clone().requires_grad_()
    want, got = loss(z), torch.compile(loss, fullgraph=True, backend="aot_eager")(z)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, z), torch.autograd.grad(want, z))


def test_a_nan_row_is_nan_and_alone(backend):
    d = make(torch.float32)
    d["z"][0, 0, 3] = math.nan
    found, grad = run(d, None, backend)
    assert found.selected_logps.isnan().any(-1).sum() == found.topk_logps.isnan().any(-1).sum() == 1
    assert grad.isnan().any(-1).sum() == 1 and grad[0, 0, : V - 2].isnan().all()


WRONG = {
    "no ids": (dict(stats=("selected_logps",)), "'selected_logps' needs selected_ids"),
    "no count": (dict(stats=("topk_ids",)), "'topk_ids' needs top_k"),
    "unread ids": (
        dict(stats=("logps",), selected_ids=torch.zeros(2, 3, 1).long()),
        "selected_ids would have no effect: put 'selected_logps'",
    ),
    "unread count": (dict(stats=("logps",), top_k=2), "top_k would have no effect"),
    "count": (dict(stats=("topk_ids",), top_k=8), "top_k is 8, expected an integer from 1 to 7"),
    "shape": (
        dict(stats=("selected_logps",), selected_ids=torch.zeros(2, 1).long()),
        r"has shape \(2, 1\), expected \(2, 3\) \+ \(K,\)",
    ),
    "dtype": (
        dict(stats=("selected_logps",), selected_ids=torch.zeros(2, 3, 1)),
        "selected_ids are torch.float32",
    ),
    "id": (
        dict(stats=("selected_logps",), selected_ids=torch.tensor([1, 7])),
        r"has 7 in row 0 \(flat\), expected 0 to 6, or -100",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("linear", [False, True])
def test_wrong_calls(case, linear):
    options, message = WRONG[case]
    op = (
        (rw.linear_token_stats, torch.zeros(2, 3, 5), torch.zeros(7, 5))
        if linear
        else (rw.token_stats, torch.zeros(2, 3, 7))
    )
    with pytest.raises(rw.InvalidCall, match=message):
        op[0](*op[1:], torch.zeros(2, 3, dtype=torch.int64), **options)


def test_an_id_that_nobody_could_read_is_nan_without_a_gradient(monkeypatch):
    """As on a GPU, where nothing waits for the ids."""
    monkeypatch.setattr("reweight_ops._core.calls.picked.is_readable", lambda t: False)
    z = torch.randn(1, 7, requires_grad=True)
    found = rw.token_stats(
        z, torch.tensor([1]), stats=("selected_logps",), selected_ids=torch.tensor([[2, 7, -5]])
    ).selected_logps
    assert found.isnan().tolist() == [[False, True, True]]
    (grad,) = torch.autograd.grad(found.nan_to_num().sum(), z)
    torch.testing.assert_close(grad[0], (torch.arange(7) == 2).float() - z.softmax(-1)[0].detach())


@pytest.mark.parametrize("stat", ["topk_logps", "topk_ids"])
def test_a_sampling_mask_has_no_picked_ids(stat):
    z, ids = torch.zeros(2, 4), torch.tensor([1, 0])
    kept = rw.SamplingMask(torch.tensor([1, 3, 0]), torch.tensor([0, 2, 3]))
    with pytest.raises(
        rw.UnsupportedRequest, match="over the whole vocabulary: request them without sampling_mask"
    ):
        rw.token_stats(z, ids, stats=(stat,), top_k=2, sampling_mask=kept)
