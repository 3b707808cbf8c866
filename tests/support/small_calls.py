"""A small policy loss on every backend that runs on a CPU here, with its gradient."""

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


def small_batch():
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
