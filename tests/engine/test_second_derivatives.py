"""Second derivatives and ``torch.func`` are right if autograd can have a graph of the
gradient, and else an error.

They are never silently zero. The reference is autograd on a plain PyTorch transcription
of each op.
"""

import math
import re
from functools import partial

import pytest
import torch
from torch import Tensor

import reweight_ops as rw
from reweight_ops import Lora
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops.testing import make_batch

SPEC = rw.methods.grpo(beta=0.1, entropy_coef=0.02)
BACKENDS = [
    b
    for b in ("reference", "cpu")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]
VOCAB, CAP, T = 13, 4.0, 0.8
#: PyTorch's message when it refuses to differentiate a compiled backward; until 2.10,
#: that of a gradient without a graph.
PYTORCHS = "double backward|element 0 of tensors does not require grad"


def inputs(dtype=torch.float32):
    batch = make_batch(SPEC, (2, 4), VOCAB, seed=3, dtype=dtype)
    z = batch.pop("logits").detach().clone()
    z[0, 1, 5] = -math.inf
    batch["completion_ids"][0, 1] = 2
    batch["completion_mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    z[0, 3] = math.nan  # an ignored row may hold anything
    return z, batch


def plain_stats(z: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The statistics in plain PyTorch."""
    masked = z == -math.inf
    x = torch.where(masked, -math.inf, CAP * torch.tanh(torch.where(masked, 0, z) / CAP) / T)
    x = torch.where(mask[..., None], x, 0)
    log_p = torch.log_softmax(x, -1)
    found = {
        "logps": log_p.gather(-1, ids[..., None])[..., 0],
        "entropies": -(log_p.exp() * torch.where(masked, 0, log_p)).sum(-1),
        "lse": x.logsumexp(-1),
    }
    return {name: torch.where(mask, value, 0) for name, value in found.items()}


def mixed(found: dict[str, Tensor]) -> Tensor:
    return sum(
        (k + 1) * (value * torch.linspace(1, 2, value.numel()).view_as(value)).sum()
        for k, value in enumerate(found.values())
    )


def stats_of(z: Tensor, batch: dict, backend: str) -> Tensor:
    names = ("logps", "entropies", "lse")
    got = rw.token_stats(
        z,
        batch["completion_ids"],
        stats=names,
        completion_mask=batch["completion_mask"],
        softcap=CAP,
        temperature=T,
        backend=backend,
    )
    return mixed({name: getattr(got, name) for name in names})


def plain_of(z: Tensor, batch: dict) -> Tensor:
    return mixed(plain_stats(z, batch["completion_ids"], batch["completion_mask"]))


def policy_of(z: Tensor, batch: dict, backend: str, **options) -> Tensor:
    return rw.policy_loss(
        z, **batch, spec=SPEC, softcap=CAP, temperature=T, backend=backend, **options
    ).loss


def plain_policy(z: Tensor, batch: dict) -> Tensor:
    found = plain_stats(z, batch["completion_ids"], batch["completion_mask"])
    rest = {name: value for name, value in batch.items() if name != "completion_ids"}
    return rw.policy_loss_from_logps(
        found["logps"], spec=SPEC, entropies=found["entropies"], **rest
    ).loss


def penalty(f, *leaves: Tensor) -> list[Tensor]:
    """The gradient of a gradient penalty."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    value = f(*leaves)
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    return list(
        torch.autograd.grad(value + sum(g.nan_to_num().square().sum() for g in grads), leaves)
    )


def close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.nan_to_num(), b.nan_to_num(), rtol=3e-5, atol=3e-6)


CASES = {
    "token_stats": (stats_of, plain_of),
    "policy_loss": (partial(policy_of, plan="two_pass"), plain_policy),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_a_gradient_penalty_is_right(name, backend):
    ours, plain = CASES[name]
    z, batch = inputs()
    got, want = penalty(lambda x: ours(x, batch, backend), z), penalty(lambda x: plain(x, batch), z)
    assert want[0].nan_to_num().abs().max() > 1e-2
    close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_with_a_graph_is_the_gradient(backend):
    z, batch = inputs()
    z.requires_grad_()
    plain, graph = (
        torch.autograd.grad(stats_of(z, batch, backend), z, create_graph=g)[0]
        for g in (False, True)
    )
    torch.testing.assert_close(graph, plain, rtol=1e-5, atol=1e-6)


def test_gradgradcheck():
    z, batch = inputs(torch.float64)
    z = z.nan_to_num(neginf=-3.0).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: stats_of(x, batch, "reference"), (z,))
    assert torch.autograd.gradgradcheck(
        lambda x: policy_of(x, batch, "reference", plan="two_pass"), (z,)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_hidden_states(backend):
    _, batch = inputs()
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=g) for shape in ((2, 4, 6), (VOCAB, 6), (VOCAB,))
    )
    a, b = torch.randn(2, 6, generator=g), torch.randn(VOCAB, 2, generator=g)
    hidden[0, 3] = math.nan
    keep = batch["completion_mask"][..., None]

    def ours(h, w, c, p, q):
        return rw.linear_policy_loss(
            h,
            w,
            **batch,
            lm_head_bias=c,
            lora=Lora(p, q, 0.5),
            spec=SPEC,
            softcap=CAP,
            temperature=T,
            plan="two_pass",
            chunk_rows=3,
            backend=backend,
        ).loss

    def plain(h, w, c, p, q):
        h = torch.where(keep, h, 0)
        return plain_policy(h @ w.T + c + 0.5 * (h @ p.T) @ q.T, batch)

    leaves = (hidden, weight, bias, a, b)
    close(penalty(ours, *leaves), penalty(plain, *leaves))


def kl(z: Tensor, other: Tensor, kind: str, mask: Tensor) -> Tensor:
    p, q = torch.log_softmax(torch.where(mask[..., None], z, 0), -1), torch.log_softmax(other, -1)
    value = {
        "forward_kl": lambda: (q.exp() * (q - p)).sum(-1),
        "reverse_kl": lambda: (p.exp() * (p - q)).sum(-1),
        "cross_entropy": lambda: -(q.exp() * p).sum(-1),
    }[kind]()
    return torch.where(mask, value, 0).sum()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "cross_entropy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_divergences(backend, kind):
    z, batch = inputs()
    z[0, 1, 5] = -2.0
    mask, other = (
        batch["completion_mask"],
        torch.randn(z.shape, generator=torch.Generator().manual_seed(1)),
    )

    def ours(x):
        return rw.token_divergence(x, other, kind=kind, completion_mask=mask, backend=backend).sum()

    close(penalty(ours, z), penalty(lambda x: kl(x, other, kind, mask), z))
    close([torch.func.grad(ours)(z)], [torch.func.grad(lambda x: kl(x, other, kind, mask))(z)])

    def distilled(x):
        return rw.distillation_loss(
            x,
            other,
            kind=kind,
            completion_mask=mask,
            backend=backend,
            plan="two_pass",
            num_items_in_batch=1,
        ).loss

    close(penalty(distilled, z), penalty(lambda x: kl(x, other, kind, mask), z))


def test_composites():
    z, _ = inputs()
    z, other = (
        z.nan_to_num(neginf=-2.0),
        torch.randn(z.shape, generator=torch.Generator().manual_seed(1)),
    )

    def ours(x):
        return rw.token_divergence(x, other, kind="generalized_jsd", beta=0.3).sum()

    def plain(x):
        p, q = torch.log_softmax(x, -1), torch.log_softmax(other, -1)
        m = torch.log(0.7 * p.exp() + 0.3 * q.exp())
        return (0.3 * q.exp() * (q - m) + 0.7 * p.exp() * (p - m)).sum()

    close([torch.func.grad(ours)(z)], [torch.func.grad(plain)(z)])
    close(penalty(ours, z), penalty(plain, z))


# --- torch.func
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_func_grad_and_hessian_vector_products(name, backend):
    ours, plain = CASES[name]
    z, batch = inputs()
    f, g = (lambda x: ours(x, batch, backend)), (lambda x: plain(x, batch))
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    close([torch.func.grad(f)(z)], [torch.func.grad(g)(z)])
    close(torch.func.jvp(f, (z,), (v,)), torch.func.jvp(g, (z,), (v,)))
    close(
        torch.func.jvp(torch.func.grad(f), (z,), (v,)),
        torch.func.jvp(torch.func.grad(g), (z,), (v,)),
    )
    close([torch.autograd.functional.hvp(f, z, v)[1]], [torch.autograd.functional.hvp(g, z, v)[1]])


def test_func_hessian_and_vmap():
    z, batch = inputs()
    ids, mask = batch["completion_ids"], batch["completion_mask"]

    def one(x, y, m):
        return rw.token_logps(x, y, completion_mask=m, softcap=CAP, temperature=T).sum()

    def plain(x, y, m):
        return plain_stats(x, y, m)["logps"].sum()

    close(
        [torch.func.hessian(one)(z[1], ids[1], mask[1])],
        [torch.func.hessian(plain)(z[1], ids[1], mask[1])],
    )
    close(
        [torch.vmap(torch.func.grad(one))(z, ids, mask)],
        [torch.vmap(torch.func.grad(plain))(z, ids, mask)],
    )


@pytest.mark.parametrize("plan", ["auto", "two_pass"])
def test_a_compiled_func_grad_is_right(plan):
    torch._dynamo.reset()
    z, batch = inputs()
    want = torch.func.grad(lambda x: plain_policy(x, batch))(z)
    compiled = torch.compile(
        torch.func.grad(lambda x: policy_of(x, batch, "auto", plan=plan)), backend="aot_eager"
    )
    close([compiled(z)], [want])
    compiled = torch.compile(
        torch.func.grad(lambda x: stats_of(x, batch, "auto")), backend="aot_eager"
    )
    close([compiled(z)], [torch.func.grad(lambda x: plain_of(x, batch))(z)])
    inner = torch.compile(lambda x: policy_of(x, batch, "auto", plan=plan), backend="aot_eager")
    close([torch.func.grad(inner)(z)], [want])


# --- one_pass
def one_pass(z, batch, **options):
    return policy_of(z, batch, "auto", plan="one_pass", **options)


def distilled_in_one_pass(z, batch):
    return rw.distillation_loss(
        z, torch.zeros_like(z), completion_mask=batch["completion_mask"], plan="one_pass"
    ).loss


def linear_in_one_pass(z, batch):
    return rw.linear_policy_loss(z, torch.eye(VOCAB), **batch, spec=SPEC, plan="one_pass").loss


@pytest.mark.parametrize("loss", [one_pass, distilled_in_one_pass, linear_in_one_pass])
def test_one_pass_raises(loss):
    z, batch = inputs()
    z = z.nan_to_num(neginf=-2.0).requires_grad_()
    with pytest.raises(rw.UnsupportedRequest, match='plan="two_pass"'):
        torch.autograd.grad(loss(z, batch), z, create_graph=True)
    with pytest.raises(
        rw.UnsupportedRequest, match=r"plan='one_pass' is impossible inside torch\.func"
    ):
        torch.func.grad(lambda x: loss(x, batch))(z.detach())


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_compiled_losses_raise(plan):
    torch._dynamo.reset()
    z, batch = inputs()
    z.requires_grad_()
    compiled = torch.compile(lambda x: policy_of(x, batch, "auto", plan=plan), backend="aot_eager")
    with pytest.raises((RuntimeError, NotImplementedError), match=f"second derivatives|{PYTORCHS}"):
        (grad,) = torch.autograd.grad(compiled(z), z, create_graph=True)
        grad.square().sum().backward()
    if plan == "one_pass":
        with pytest.raises(Exception, match=r"plan='one_pass' is impossible inside torch\.func"):
            torch.compile(
                torch.func.grad(lambda x: policy_of(x, batch, "auto", plan=plan)),
                backend="aot_eager",
            )(z.detach())


def test_a_penalty_inside_a_compiled_function_is_right_or_raises():
    torch._dynamo.reset()
    z, batch = inputs()

    def total(x, f):
        (grad,) = torch.autograd.grad(f(x), x, create_graph=True)
        return grad.nan_to_num().square().sum()

    for plan in ("one_pass", "two_pass"):
        ours, plain = z.clone().requires_grad_(), z.clone().requires_grad_()
        try:
            torch.compile(
                partial(total, f=lambda x, plan=plan: policy_of(x, batch, "auto", plan=plan)),
                backend="aot_eager",
            )(ours).backward()
        except (RuntimeError, NotImplementedError) as error:
            assert re.search(f"second derivatives|create_graph|{PYTORCHS}", str(error))
            continue
        total(plain, lambda x: plain_policy(x, batch)).backward()
        close([ours.grad], [plain.grad])


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_infinite_divergence_has_a_gradient_of_nan_with_a_graph_too(drop_last):
    z, other = torch.randn(2, 3, 5).requires_grad_(), torch.randn(2, 3, 5)
    other[0, 1, 2] = -math.inf
    teacher = other[:, :-1] if drop_last else other
    value = rw.token_divergence(z, teacher, kind="reverse_kl", drop_last=drop_last)
    plain, graph = (
        torch.autograd.grad(value.sum(), z, create_graph=g, retain_graph=True)[0]
        for g in (False, True)
    )
    assert plain[0, 1].isnan().all() and not plain[1].isnan().any()
    torch.testing.assert_close(graph, plain, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["old_per_token_logps", "advantages", "loss_scale"])
def test_a_written_argument_is_an_error_where_the_loss_is_computed_again(name):
    logps = torch.full((2, 3), -1.0, requires_grad=True)
    data = {
        "old_per_token_logps": torch.full((2, 3), -1.1),
        "advantages": torch.tensor([[1.0, -1.0, 0.5]] * 2),
        "loss_scale": torch.tensor(2.0),
    }
    out = rw.policy_loss_from_logps(logps, spec="grpo", **data)
    assert out.backend != "torch"
    (before,) = torch.autograd.grad(out.loss, logps, retain_graph=True)
    data[name].mul_(1.1)
    (after,) = torch.autograd.grad(out.loss, logps, retain_graph=True)
    assert torch.equal(before, after)
    with pytest.raises(rw.ReweightOpsError, match=f"{name} has been written in place"):
        torch.autograd.grad(out.loss, logps, create_graph=True)
