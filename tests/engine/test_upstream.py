"""A one-pass gradient times its upstream gradient: every public op, every available
backend, eager and compiled.
"""

import math

import pytest
import torch
import torch._dynamo

import reweight_ops as rw
from reweight_ops._core.backends import base, select
from reweight_ops._core.engine import ops as library
from reweight_ops.testing import make_batch

SPEC = rw.methods.grpo(beta=0.04, entropy_coef=0.01)
SHAPE, VOCAB, WIDTH, RANK = (3, 8), 29, 5, 2
UPSTREAMS = [1.0, 0.3, -3.0, 0.0, math.inf, math.nan]
BACKENDS = [
    b
    for b in ("reference", "cpu", "triton")
    if select.unsupported_reason(
        b, base.Request("token_stats", torch.device("cpu"), torch.bfloat16)
    )
    is None
]


REST = make_batch(SPEC, SHAPE, VOCAB, torch.bfloat16)
LOGITS = REST.pop("logits").detach().clone()
REST["completion_mask"][-1, -1] = 0


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


OTHER = random(*SHAPE, VOCAB)


def policy(z, backend, **options):
    return rw.policy_loss(z, **REST, spec=SPEC, plan="one_pass", backend=backend, **options).loss


def policy_in_place(z, backend):
    return policy(z * 1, backend, consume_logits=True)


def policy_in_padded_place(z, backend):
    """In place over logits whose row stride exceeds the row length."""
    apart = torch.nn.functional.pad(z, (0, 5))[..., :VOCAB]
    return policy(apart, backend, consume_logits=True)


def distillation(z, backend):
    return rw.distillation_loss(
        z, OTHER, completion_mask=REST["completion_mask"], plan="one_pass", backend=backend
    ).loss


def linear(hidden, weight, bias, a, b, backend):
    options = dict(lm_head_bias=bias, lora=rw.Lora(a, b, 0.5), compact_rows=False)
    return rw.linear_policy_loss(
        hidden, weight, **REST, **options, spec=SPEC, plan="one_pass", backend=backend
    ).loss


FROM_LOGITS = {
    f.__name__: (f, lambda: [LOGITS])
    for f in (policy, policy_in_place, policy_in_padded_place, distillation)
}
LOSSES = {
    **FROM_LOGITS,
    "linear": (
        linear,
        lambda: [
            random(*SHAPE, WIDTH),
            random(VOCAB, WIDTH, seed=1),
            random(VOCAB, seed=2),
            random(RANK, WIDTH, seed=3),
            random(VOCAB, RANK, seed=4),
        ],
    ),
}


def gradients(name, backend, upstream, compiler=None):
    loss, make = LOSSES[name]
    leaves = [x.clone().requires_grad_() for x in make()]

    def step(*leaves):
        return loss(*leaves, backend)

    if compiler:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend=compiler)
    return torch.autograd.grad(step(*leaves), leaves, torch.tensor(upstream))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_fp32_product_rounded_once(name, backend):  # docs/semantics.md: S19
    """It is bitwise equal. Zero rows of masked tokens are multiplied too: 0 * inf is
    NaN, as everywhere in PyTorch.
    """
    plain = gradients(name, backend, 1.0)
    assert all(bool((g == 0).any()) for g in plain[:1])
    # the interpreter is slow
    for upstream in UPSTREAMS if backend != "triton" else (0.3, math.inf):
        for got, of_one in zip(gradients(name, backend, upstream), plain, strict=True):
            want = (of_one.float() * torch.tensor(upstream)).to(of_one.dtype)
            torch.testing.assert_close(
                got, want, rtol=0, atol=0, equal_nan=True, msg=lambda m, u=upstream: f"{u}: {m}"
            )


@pytest.mark.parametrize("name", LOSSES)
def test_compiled(name):
    for upstream in (1.0, 0.3, math.inf):
        want = gradients(name, "reference", upstream)
        for got, expected in zip(
            gradients(name, "reference", upstream, "aot_eager"), want, strict=True
        ):
            torch.testing.assert_close(got, expected, equal_nan=True)


def test_the_backend_that_made_the_gradient_scales_it(monkeypatch):
    """The backend that made the gradient scales it, with one call for each gradient."""
    seen = []
    monkeypatch.setattr(
        library, "scale_", lambda grad, factor, backend: seen.append((tuple(grad.shape), backend))
    )
    for name in LOSSES:
        gradients(name, "reference", 2.0)
    parameters = [
        (SHAPE[0] * SHAPE[1], WIDTH),
        (VOCAB, WIDTH),
        (VOCAB,),
        (RANK, WIDTH),
        (VOCAB, RANK),
    ]
    assert seen == [
        (shape, "reference") for shape in [(*SHAPE, VOCAB)] * len(FROM_LOGITS) + parameters
    ]


def test_an_earlier_user_of_what_is_scaled_raises():
    """The version of a gradient that is scaled in place is counted, as for PyTorch's
    own in-place operations.
    """
    grad = torch.ones(2, 3)
    before = grad._version
    library.scaled(grad, torch.tensor(2.0), "reference")
    assert grad._version > before
