"""Two logits tensors: against textbook formulas in fp64, by the accuracy criterion on
every backend, and with zero probabilities.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from divergence_criterion import assert_accurate, available, run, textbook, two_logits
from torch.nn import functional as F

import reweight_ops as rw
from reweight_ops import divergences
from reweight_ops._core.engine.distillation import KINDS

BACKENDS = ["reference", "cpu", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kind", [*KINDS, "generalized_jsd"])
def test_textbook_and_gradcheck(kind):
    z, other, mask = two_logits(vocab=11)
    options = dict(
        kind=kind, completion_mask=mask, temperature=0.7, other_temperature=1.3, softcap=4.0
    )
    got = rw.token_divergence(z, other, **options)
    want = textbook(4 * torch.tanh(z / 4) / 0.7, other / 1.3, kind)
    torch.testing.assert_close(got, torch.where(mask, want, 0), rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda x: rw.token_divergence(x, other, **options), (z.requires_grad_(),)
    )


def test_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(q‖p) = ln 2 - H(q) = 0.130812, KL(p‖q) = ½ ln 2
    # + ½ ln(2/3) = 0.143841.
    z, other = (
        torch.zeros(1, 2, dtype=torch.float64, requires_grad=True),
        torch.tensor([[0.0, math.log(3)]], dtype=torch.float64),
    )
    for kind, value, grad in (
        ("forward_kl", 0.1308120, [0.25, -0.25]),
        (
            "reverse_kl",
            0.1438410,
            [0.5 * (math.log(2) - 0.1438410), 0.5 * (math.log(2 / 3) - 0.1438410)],
        ),
        ("cross_entropy", math.log(2), [0.25, -0.25]),
    ):
        got = rw.token_divergence(z, other, kind=kind)
        assert got.item() == pytest.approx(value, abs=1e-7)
        assert torch.autograd.grad(got.sum(), z)[0][0].tolist() == pytest.approx(grad, abs=1e-7)


def test_generalized_jsd_is_trls():
    z, other, _ = two_logits(dtype=torch.float32)
    p, q = torch.log_softmax(z, -1), torch.log_softmax(other, -1)
    beta = torch.tensor(0.3)
    mix = torch.logsumexp(torch.stack([p + torch.log1p(-beta), q + torch.log(beta)]), dim=0)
    want = (
        0.3 * F.kl_div(mix, q, reduction="none", log_target=True)
        + 0.7 * F.kl_div(mix, p, reduction="none", log_target=True)
    ).sum(-1)
    torch.testing.assert_close(
        rw.token_divergence(z, other, kind="generalized_jsd", beta=0.3), want, rtol=1e-5, atol=1e-6
    )


ACCURACY = [
    ("cpu", *c)
    for c in itertools.product(
        ["plain", "shifted", "close", "cap"],
        ["forward_kl", "reverse_kl", "symmetric_cross_entropy"],
        DTYPES,
    )
]
ACCURACY += [  # the interpreter is slow: every case, kind and dtype once
    ("triton", "plain", "forward_kl", torch.bfloat16),
    ("triton", "shifted", "reverse_kl", torch.float32),
    ("triton", "close", "symmetric_cross_entropy", torch.float32),
    ("triton", "cap", "symmetric_cross_entropy", torch.float16),
    ("triton", "plain", "reverse_kl", torch.bfloat16),
]


@pytest.mark.parametrize(("backend", "case", "kind", "dtype"), ACCURACY, ids=str)
def test_accuracy(backend, case, kind, dtype):
    assert_accurate(backend, case, kind, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [1, 2, 31, 33, 2048, 2049])
def test_any_width_mixed_dtypes_and_strides(backend, columns):
    available(backend)
    z, other, mask = two_logits((2, 3), columns, torch.float32)
    big = torch.full((2, 5, columns + 3), math.nan, dtype=torch.bfloat16)
    big[:, 1:4, 1 : columns + 1] = other.bfloat16()
    view = big[:, 1:4, 1 : columns + 1]
    got = rw.token_divergence(z, view, kind="jeffreys", backend=backend, completion_mask=mask)
    want = torch.where(mask, textbook(z.double(), view.double(), "jeffreys"), 0)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_probabilities(backend, dtype):
    available(backend)
    inf = math.inf
    # 70 columns: whole vectors without mass, and a tail.
    z = torch.randn(8, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    other = z.roll(1, 0).clone()
    z[0, 3] = -inf  # p = 0 < q
    other[1, 64] = -inf  # q = 0 < p
    z[2, 5] = other[2, 5] = -inf  # both 0: no contribution
    z[3, :64] = other[3, :64] = -inf  # whole vectors without mass
    z[4] = -inf  # no distribution
    other[5, 0] = math.nan
    z[6, 0] = inf
    keep = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0])
    z[7] = math.nan
    x = z.clone().requires_grad_()
    forward, reverse = (
        rw.token_divergence(x, other, kind=k, backend=backend, completion_mask=keep)
        for k in ("forward_kl", "reverse_kl")
    )
    assert (
        forward[0] == inf and reverse[0].isfinite() and forward[1].isfinite() and reverse[1] == inf
    )
    for i, there in ((2, [c for c in range(70) if c != 5]), (3, range(64, 70))):
        want = (
            textbook(z[i, there].double(), other[i, there].double(), "forward_kl"),
            textbook(z[i, there].double(), other[i, there].double(), "reverse_kl"),
        )
        assert forward[i].item() == pytest.approx(want[0].item(), rel=1e-5) and reverse[
            i
        ].item() == pytest.approx(want[1].item(), rel=1e-5)
    assert (
        forward[4:7].isnan().all() and reverse[4:7].isnan().all() and forward[7] == reverse[7] == 0
    )

    (g,) = torch.autograd.grad(forward[:4].sum() + forward[7], x, retain_graph=True)
    p, q = torch.softmax(z.double(), -1), torch.softmax(other.double(), -1)
    want = torch.where(z == -inf, 0, p - q)[:4]
    torch.testing.assert_close(
        g[:4].double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )
    assert (g[4:] == 0).all() and (g[:4][z[:4] == -inf] == 0).all()
    (g,) = torch.autograd.grad(reverse[[0, 1, 2, 3, 7]].sum(), x)
    assert (
        g[1].isnan().all()
        and g[[0, 2, 3]].isfinite().all()
        and (g[7] == 0).all()
        and (g[:4][z[:4] == -inf][[0, 1]] == 0).all()
    )
    single = rw.distillation_loss(
        x,
        other,
        kind="reverse_kl",
        completion_mask=torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]),
        token_weights=torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 0]),
        backend=backend,
    )
    assert single.loss.isfinite()
    (g,) = torch.autograd.grad(single.loss, x)
    assert (g[1] == 0).all() and g.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_tensors_give_exact_zeros(backend):
    available(backend)
    z, _, _ = two_logits(
        (1, 3) if backend == "triton" else (3, 5),
        1100 if backend == "triton" else 2500,
        torch.bfloat16,
    )
    for kind in ("forward_kl", "reverse_kl"):
        x = z.clone().requires_grad_()
        d = rw.token_divergence(x, z, kind=kind, backend=backend)
        assert (d == 0).all()
        assert (torch.autograd.grad(d.sum(), x)[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [-1e4, -1e30, -math.inf, None])
def test_masked_columns(backend, dtype, low):
    """Columns masked by -inf or by a number, also the lowest finite one (None), in both
    tensors or more in p than in q.

    KL(p‖q) is computed by hand over the other columns.
    """
    available(backend)
    low = torch.finfo(dtype).min if low is None else low
    z, other, _ = two_logits((1, 4), 700, dtype)
    left = torch.zeros(700, dtype=torch.bool)
    left[[3, 350, 699]] = True
    z[..., ~left] = low
    other[..., 100:300] = low
    p, q = z[..., left].double().log_softmax(-1), other.double().log_softmax(-1)[..., left]
    d = rw.token_divergence(z, other, kind="reverse_kl", backend=backend)
    entropy = rw.token_stats(
        z, torch.full((1, 4), 3), stats=("entropies",), backend=backend
    ).entropies
    torch.testing.assert_close(d.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(p.exp() * p).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_apart_and_extreme(backend):
    """Where q has mass, p is 2^-1400: the difference of logits is all of KL(q‖p)."""
    available(backend)
    z, other = torch.zeros(1, 3000), torch.zeros(1, 3000)
    z[0, 7], other[0, 2900] = 1000.0, 1000.0
    x = z.requires_grad_()
    for kind in ("forward_kl", "reverse_kl"):
        d = rw.token_divergence(x, other, kind=kind, backend=backend)
        assert d.item() == pytest.approx(1000.0, rel=1e-6)
        (g,) = torch.autograd.grad(d.sum(), x)
        assert g.isfinite().all()
    # of KL(p‖q): p is 1 in one column, and there log p - log q = KL
    assert g.abs().max() < 1e-3
    (g,) = torch.autograd.grad(rw.token_divergence(x, other, backend=backend).sum(), x)
    assert g[0, 7] == 1 and g[0, 2900] == -1


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_drop_last_padding_and_plans(backend):
    available(backend)
    z, other, mask = two_logits((2, 4), 300, torch.float32)
    wide, teacher = torch.randn(2, 5, 310), torch.randn(2, 4, 305)
    wide[:, :-1, :300], teacher[..., :300] = z, other
    options = dict(backend=backend, completion_mask=mask, kind="jeffreys")
    x = z.clone().requires_grad_()
    want = rw.distillation_loss(x, other, plan="two_pass", **options)
    (g,) = torch.autograd.grad(want.loss, x)
    for plan in ("one_pass", "two_pass"):
        for consume in (False, True):
            leaf = wide.clone().requires_grad_()
            used = leaf * 1
            out = rw.distillation_loss(
                used,
                teacher,
                plan=plan,
                consume_logits=consume,
                vocab_size=300,
                drop_last=True,
                **options,
            )
            (got,) = torch.autograd.grad(out.loss, leaf)
            torch.testing.assert_close(got[:, :-1, :300], g, rtol=1e-5, atol=1e-8)
            assert (got[:, -1] == 0).all() and (got[..., 300:] == 0).all()
            torch.testing.assert_close(out.loss, want.loss)
            if consume:
                with pytest.raises(rw.InvalidCall, match="consumed"):
                    rw.token_divergence(used, teacher, vocab_size=300)
    out = rw.distillation_loss(x, other, **options)
    out.loss.backward(retain_graph=True)
    with pytest.raises(rw.ReweightOpsError, match="second backward"):
        out.loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_nothing_but_itself(backend):
    available(backend)
    z, other, _ = two_logits((1, 6), 1500, torch.bfloat16)
    whole = rw.token_divergence(z, other, kind="jeffreys", backend=backend)
    for i in (0, 3, 5):
        shifted = torch.zeros(3, 1507, dtype=torch.bfloat16)
        shifted[1, 3:1503] = z[0, i]
        alone = rw.token_divergence(
            shifted[1:2, 3:1503], other[0, i : i + 1], kind="jeffreys", backend=backend
        )
        assert torch.equal(alone[0], whole[0, i])


def test_every_instruction_set_level():
    from reweight_ops import _C

    z, other, mask = two_logits((2, 3), 777, torch.bfloat16)
    z[0, 0, 5] = -math.inf
    want = rw.token_divergence(
        z.double(), other.double(), kind="reverse_kl", completion_mask=mask, backend="reference"
    )
    try:
        for level in _C.build_info()["supported_levels"]:
            _C.set_level(level)
            x = z.clone().requires_grad_()
            got = rw.token_divergence(
                x, other, kind="reverse_kl", completion_mask=mask, backend="cpu"
            )
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
            assert torch.autograd.grad(got.sum(), x)[0].isfinite().all()
    finally:
        _C.set_level("auto")


def test_threads_change_nothing():
    z, other, mask = two_logits((8, 16), 4000, torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run("cpu", z, other, "jeffreys", None, "one_pass", completion_mask=mask))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(
        results[0][0].per_token_divergence, results[1][0].per_token_divergence
    )


def test_memory_of_one_pass_in_place():
    """No tensor of the logits' size exists except the caller's two."""
    z, other, _ = two_logits((2, 8), 4001, torch.float32)
    x = z.clone().requires_grad_()
    used = x * 1
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel()
                for t in (out if isinstance(out, (tuple, list)) else [out])
                if isinstance(t, torch.Tensor) and t.data_ptr() != used.data_ptr()
            )
            return out

    with Watch():
        rw.distillation_loss(used, other, consume_logits=True, backend="cpu").loss.backward()
    # the multiplication's own backward, and its accumulation
    assert max(s for s in sizes) < z.numel() or sizes.count(z.numel()) <= 2


def test_compiles():
    z, other, mask = two_logits((2, 3), 50, torch.float32)
    x = z.requires_grad_()
    for call in (
        lambda x: rw.token_divergence(x, other, kind="reverse_kl", completion_mask=mask).sum(),
        lambda x: rw.distillation_loss(x, other, completion_mask=mask).loss,
    ):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), call(x))
        torch.testing.assert_close(*(torch.autograd.grad(f(x), x)[0] for f in (compiled, call)))


def test_sparse_po_from_two_logits_tensors():
    z, other, mask = two_logits((4, 3), 17)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 17, (4, 3), generator=g)
    m_u, m_d = (torch.rand(4, 3, generator=g, dtype=torch.float64) for _ in range(2))
    ref = torch.log_softmax(other / 0.9, -1).gather(-1, ids[..., None])[..., 0]
    given = dict(completion_mask=mask, ref_per_token_logps=ref, reward_mask=m_u, kl_mask=m_d)

    def direct(x):
        log_p, log_q = torch.log_softmax(x / 0.9, -1), torch.log_softmax(other / 0.9, -1)
        score = (
            (
                m_u * (log_p.gather(-1, ids[..., None])[..., 0] - ref)
                + m_d * (log_q.exp() * (log_q - log_p)).sum(-1)
            )
            * mask
        ).sum(-1)
        return -F.logsigmoid(0.1 * (score[:2] - score[2:])).mean()

    x = z.requires_grad_()
    out = rw.preference_loss(x, ids, spec="sparse_po", ref_logits=other, temperature=0.9, **given)
    torch.testing.assert_close(out.loss, direct(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, x)[0],
        torch.autograd.grad(direct(x), x)[0],
        rtol=1e-10,
        atol=1e-14,
    )
    for backend in ("cpu", "triton"):
        y = z.detach().float().requires_grad_()
        got = rw.preference_loss(
            y,
            ids,
            spec="sparse_po",
            ref_logits=other.float(),
            temperature=0.9,
            backend=backend,
            **{k: v.float() if v.is_floating_point() else v for k, v in given.items()},
        )
        torch.testing.assert_close(got.loss.double(), out.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(got.loss, y)[0].double(),
            torch.autograd.grad(direct(x), x)[0],
            rtol=1e-4,
            atol=1e-7,
        )


WRONG = {
    "kind": (dict(kind="kl"), "kind is 'kl', expected one of forward_kl"),
    "beta": (dict(beta=0.5), "beta belongs to kind='generalized_jsd'"),
    "beta range": (dict(kind="generalized_jsd", beta=1.0), r"expected a number in \(0, 1\)"),
    "columns": (
        dict(other=torch.zeros(2, 3, 9)),
        "logits have 7 columns, other_logits 9: pass vocab_size",
    ),
    "vocab_size": (dict(other=torch.zeros(2, 3, 5), vocab_size=6), "other_logits have 5 columns"),
    "rows": (dict(other=torch.zeros(2, 4, 7)), r"other_logits has shape \(2, 4, 7\)"),
    "grad": (dict(other=torch.zeros(2, 3, 7, requires_grad=True)), "other_logits require grad"),
    "fp64 beside fp32": (dict(other=torch.zeros(2, 3, 7, dtype=torch.float64)), "fp64 for both"),
    "ints": (dict(other=torch.zeros(2, 3, 7, dtype=torch.int64)), "other_logits are torch.int64"),
    "mask": (dict(completion_mask=torch.ones(3)), "completion_mask has shape"),
    "softcap": (dict(other_softcap=-1.0), "other_softcap is -1.0"),
    "temperature": (dict(other_temperature=0.0), r"expected a number in \(0, inf\)"),
    "no tensor": (dict(other=None), "other_logits must be a tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case):
    options, message = WRONG[case]
    options = dict(options)
    with pytest.raises(rw.InvalidCall, match=message):
        rw.token_divergence(
            torch.zeros(2, 3, 7), options.pop("other", torch.zeros(2, 3, 7)), **options
        )


def test_other_wrong_calls():
    z = torch.zeros(2, 3, 7)
    with pytest.raises(TypeError, match="Did you mean other_temperature"):
        rw.token_divergence(z, z, other_temprature=1.0)
    with pytest.raises(
        (rw.BackendUnavailable, rw.UnsupportedRequest), match="'cuda' was asked for"
    ):
        rw.token_divergence(z, z, backend="cuda")
    with pytest.raises(rw.UnsupportedRequest, match="expected fp32, bf16 or fp16"):
        rw.token_divergence(z.double(), z.double(), backend="cpu")
    with pytest.raises(rw.InvalidCall, match="token_weights require grad"):
        rw.distillation_loss(z, z, token_weights=torch.ones(2, 3, requires_grad=True))
    assert divergences.token_divergence is rw.token_divergence


@pytest.mark.parametrize("plan", ["auto", "two_pass"])
def test_the_distillation_loss_has_the_generalized_jsd(plan):
    z, other, _ = two_logits(dtype=torch.float64)
    z = z.detach().requires_grad_()
    weights = torch.rand(
        z.shape[:-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    out = rw.distillation_loss(
        z, other, kind="generalized_jsd", beta=0.3, token_weights=weights, loss_scale=2.0, plan=plan
    )
    value = rw.token_divergence(z, other, kind="generalized_jsd", beta=0.3)
    want = 2 * (weights * value).sum() / value.numel()
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(torch.autograd.grad(out.loss, z), torch.autograd.grad(want, z))
    torch.testing.assert_close(out.per_token_divergence, value.detach())
    torch.testing.assert_close(
        out.reverse_kl, rw.token_divergence(z, other, kind="reverse_kl").detach()
    )
    assert out.plan == "two_pass"
    with pytest.raises(rw.UnsupportedRequest, match="a composite in chunks"):
        rw.distillation_loss(z, other, kind="generalized_jsd", plan="one_pass")
