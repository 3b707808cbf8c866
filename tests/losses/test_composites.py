"""The losses of :mod:`reweight_ops.divergences` other than KL: against loops, by hand,
in chunks, at their edges.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import reweight_ops as rw
from reweight_ops import divergences
from reweight_ops._core.engine import chunked_rows as chunks

V = 7


def batch(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    z, t = (2 * torch.randn(3, 4, V, generator=g, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, V, (3, 4), generator=g)
    mask = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    return z.to(dtype), t.to(dtype), ids, mask


def pld_by_loops(s, t, y, tau):
    q = [math.exp(v / tau) for v in t]
    q = [v / sum(q) for v in q]
    order = [y, *sorted((v for v in range(len(t)) if v != y), key=lambda v: -t[v])]
    return sum(
        q[v] * (math.log(sum(math.exp(s[u]) for u in order[k:])) - s[v])
        for k, v in enumerate(order)
    )


def dhkd_by_loops(s, t, tau):
    """The released code's two Bernoulli KLs."""
    total = 0.0
    for a, b in zip(s, t, strict=True):
        p = 1 / (1 + math.exp(-(a - b) / tau))
        total += 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))
    return tau**2 * total


def ldr_by_loops(f, y, lam, c):
    return lam * math.log(
        sum(math.exp((c * (k != y) + f[k] - f[y]) / lam) for k in range(len(f))) / len(f)
    )


def stablemax_by_loops(z, y):
    s = [x + 1 if x >= 0 else 1 / (1 - x) for x in z]
    return -math.log(s[y] / sum(s))


CASES = {
    "pld": (
        lambda z, t, ids, **o: divergences.pld(z, t, ids, teacher_temperature=1.7, **o),
        lambda s, t, y: pld_by_loops(s, t, y, 1.7),
    ),
    "dhkd": (
        lambda z, t, ids, **o: divergences.dhkd(z, t, temperature=2.0, **o),
        lambda s, t, y: dhkd_by_loops(s, t, 2.0),
    ),
    "ldr": (
        lambda z, t, ids, **o: divergences.ldr(z, ids, lambda_=2.5, margin=0.4, **o),
        lambda s, t, y: ldr_by_loops(s, y, 2.5, 0.4),
    ),
    "stablemax": (
        lambda z, t, ids, **o: divergences.stablemax(z, ids, **o),
        lambda s, t, y: stablemax_by_loops(s, y),
    ),
    "superhf": (
        lambda z, t, ids, **o: divergences.superhf(z, t, ids, beta=0.4, **o),
        lambda s, t, y: (
            -log_softmax(s)[y]
            + 0.4
            * sum(
                math.exp(b) * (b - a) for a, b in zip(log_softmax(s), log_softmax(t), strict=True)
            )
        ),
    ),
    "symmetric": (
        lambda z, t, ids, **o: divergences.symmetric_cross_entropy(z, t, **o),
        lambda s, t, y: (
            -0.5
            * sum(
                math.exp(b) * a + math.exp(a) * b
                for a, b in zip(log_softmax(s), log_softmax(t), strict=True)
            )
        ),
    ),
}


def log_softmax(x):
    lse = math.log(sum(map(math.exp, x)))
    return [v - lse for v in x]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("elements", [1 << 24, 2 * V])
def test_against_loops_and_gradcheck(name, elements, monkeypatch):
    # 12 rows in one chunk, or two per chunk
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", elements)
    call, formula = CASES[name]
    z, t, ids, mask = batch()
    got = call(z, t, ids, completion_mask=mask)
    want = [
        [
            formula(z[i, j].tolist(), t[i, j].tolist(), int(ids[i, j])) if mask[i, j] else 0.0
            for j in range(4)
        ]
        for i in range(3)
    ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-11, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: call(x, t, ids, completion_mask=mask), (z.requires_grad_(),)
    )
    poisoned = torch.where(mask[..., None], z.detach(), math.nan).requires_grad_()
    (grad,) = torch.autograd.grad(
        call(poisoned, torch.where(mask[..., None], t, math.nan), ids, completion_mask=mask).sum(),
        poisoned,
    )
    assert grad.isfinite().all() and (grad[~mask] == 0).all() and grad[mask].any()


@pytest.mark.parametrize("name", CASES)
def test_half_precision_and_drop_last(name):
    call, _ = CASES[name]
    z, t, ids, mask = batch(torch.bfloat16)
    want = call(z.double(), t.double(), ids, completion_mask=mask)
    got = call(z, t, ids, completion_mask=mask)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    longer = torch.cat([z, z[:, :1]], 1).requires_grad_()
    same = call(longer, t, ids, completion_mask=mask, drop_last=True)
    torch.testing.assert_close(same, got)
    (grad,) = torch.autograd.grad(same.sum(), longer)
    assert (grad[:, -1] == 0).all() and grad.dtype == torch.bfloat16


def test_superhf_of_one_completion_is_its_authors_loss():
    """Their trainer's loss of a mini-batch of one completion, but for the position of
    its KL (openfeedback/superhf, ``finetune_language_model``): ``KLDivLoss`` with
    log-targets over the completion, cut at 0.
    """
    z, t, ids, _ = batch()
    z, t, ids = z[0].requires_grad_(), t[0], ids[0]
    kl = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(
        torch.log_softmax(z, -1), torch.log_softmax(t, -1)
    )
    want = F.cross_entropy(z, ids) + 0.35 * torch.maximum(kl, torch.tensor(0.0))
    got = divergences.superhf(z, t, ids).mean()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(x, z)[0] for x in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-14)


def test_ldr_at_its_limits_and_per_row():
    z, _, ids, _ = batch()
    nll = -torch.log_softmax(z, -1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(divergences.ldr(z, ids, margin=0.0), nll - math.log(V))
    # λ → 0: Crammer and Singer's max_k (c·1[k≠y] + f_k - f_y), to within λ·log V.
    hinge = (z + 0.3 * (1 - F.one_hot(ids, V)) - z.gather(-1, ids[..., None])).amax(-1)
    gap = hinge - divergences.ldr(z, ids, lambda_=0.02, margin=0.3)
    assert (gap > -1e-9).all() and (gap < 0.02 * math.log(V) + 1e-6).all()
    lam = torch.linspace(0.5, 3, 12, dtype=torch.float64).view(3, 4)
    rows = [
        [ldr_by_loops(z[i, j].tolist(), int(ids[i, j]), float(lam[i, j]), 0.1) for j in range(4)]
        for i in range(3)
    ]
    torch.testing.assert_close(
        divergences.ldr(z, ids, lambda_=lam), torch.tensor(rows, dtype=torch.float64)
    )
    sure = torch.zeros(1, V)
    sure[0, 2] = 60.0
    assert divergences.ldr(sure.requires_grad_(), torch.tensor([2])).isfinite().all()


def test_aldr():
    # Uniform: KL 0, λ stays. One-hot: KL = log V, λ = λ₀(1 - 1/α). H = ½ log V between.
    h = torch.tensor([math.log(V), 0.0, 0.5 * math.log(V)])
    assert divergences.aldr(h, V, lambda0=1.0, alpha=2.0).tolist() == pytest.approx(
        [1.0, 0.5, 0.75]
    )
    with pytest.raises(rw.InvalidCall, match="alpha is 0.0"):
        divergences.aldr(h, V, lambda0=1.0, alpha=0.0)


def test_confidence_masked_kl():
    z, t, _, mask = batch()
    got = divergences.confidence_masked_kl(
        z, t, threshold=0.5, sharpening_temperature=0.4, completion_mask=mask
    )
    sure = torch.softmax(t, -1).amax(-1) > 0.5
    q = torch.softmax(t / 0.4, -1)
    want = torch.where(sure & mask, (q * (q.log() - torch.log_softmax(z, -1))).sum(-1), 0)
    assert (sure & mask).any() and (~sure & mask).any()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_pld_by_hand_and_its_special_case():
    # s = 0, t = (0, ln 2), label 0: order 0, 1 although the teacher prefers 1; q = 1/3,
    # 2/3: 1/3·ln 2 + 0.
    z, t = (
        torch.zeros(1, 2, dtype=torch.float64),
        torch.tensor([[0.0, math.log(2)]], dtype=torch.float64),
    )
    assert divergences.pld(z, t, torch.tensor([0])).item() == pytest.approx(math.log(2) / 3)
    z, _, ids, _ = batch()
    one_hot = torch.where(F.one_hot(ids, V).bool(), 0.0, -torch.inf).double()
    nll = -torch.log_softmax(z, -1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(divergences.pld(z, one_hot, ids), nll)
    both = z.clone()
    both[..., 0], one_hot[..., 0] = -torch.inf, -torch.inf
    ids = ids.clamp(min=1)
    one_hot.scatter_(-1, ids[..., None], 0.0)
    assert (
        torch.autograd.grad(divergences.pld(both.requires_grad_(), one_hot, ids).sum(), both)[0]
        .isfinite()
        .all()
    )


def test_dhkd_gradient_and_large_differences():
    s, t = (
        torch.tensor([[300.0, -2.0]], dtype=torch.float64, requires_grad=True),
        torch.tensor([[-300.0, 1.0]], dtype=torch.float64),
    )
    loss = divergences.dhkd(s, t, temperature=2.0)
    assert loss.item() == pytest.approx(4 * ((150 - math.log(2)) + math.log(math.cosh(0.75))))
    assert torch.autograd.grad(loss.sum(), s)[0][0].tolist() == pytest.approx(
        [1.0, -math.tanh(0.75)]
    )


def test_stablemax_is_no_softmax():
    z = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    # s = 1, 2, 1/2: -log(2 / 3.5); gradient s'/S - 1[k=y]·s'/s with s' = 1, 1, 1/4.
    loss = divergences.stablemax(z, torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(1.75))
    assert torch.autograd.grad(loss.sum(), z)[0][0].tolist() == pytest.approx(
        [1 / 3.5, 1 / 3.5 - 0.5, 0.25 / 3.5]
    )


def test_wrong_calls():
    z, t, ids, _ = batch()
    for call, message in (
        (lambda: divergences.dhkd(z, t, temperature=0.0), r"expected a number in \(0, inf\)"),
        (lambda: divergences.pld(z, t, ids[:2]), r"completion_ids is \(2, 4\), so expected"),
        (lambda: divergences.pld(z, t[..., :5], ids), "pass vocab_size"),
        (
            lambda: divergences.ldr(z, ids, temperature=2.0),
            "the temperature is called lambda_ here",
        ),
        (
            lambda: divergences.stablemax((z.requires_grad_() * 1), ids, consume_logits=True),
            "does not write over",
        ),
    ):
        with pytest.raises(rw.InvalidCall, match=message):
            call()
    with pytest.raises(TypeError, match="unexpected keyword argument 'tau'"):
        divergences.pld(z.detach(), t, ids, tau=1.0)


def test_chunks_bound_the_memory(monkeypatch):
    """No temporary is larger than a chunk's, whatever the number of rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 4 * V)
    z, ids = torch.randn(64, V, requires_grad=True), torch.zeros(64, dtype=torch.int64)
    inside = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and func.__name__.startswith(
                ("reciprocal", "clamp", "div", "add", "rsub")
            ):
                inside.append(out.numel())
            return out

    with Watch():
        divergences.stablemax(z, ids).sum().backward()
    assert inside and max(n for n in inside if n != 64) <= 4 * V
