"""Kept calls, and the same calls with nothing kept, to test that keeping changes
nothing.
"""

import torch

import reweight_ops as rw
from reweight_ops.testing import make_batch

SHAPE, VOCAB = (3, 5), 17


def batch_of(spec, seed, shape=SHAPE, dtype=torch.float32):
    batch = make_batch(spec, shape, VOCAB, seed=seed)
    return {**batch, "logits": batch["logits"].detach().to(dtype).contiguous()}


def result(batch, **options):
    """The results of a call, with its gradient and metrics."""
    z = (
        batch["logits"]
        .detach()
        .requires_grad_(batch["logits"].requires_grad or torch.is_grad_enabled())
    )
    out = rw.policy_loss(**{**batch, "logits": z, **options})
    grads = torch.autograd.grad(out.loss.sum(), z) if out.loss.requires_grad else ()
    rows = (
        out.per_token_logps,
        out.entropies,
        out.per_token_loss,
        out.ratio,
        out.coef,
        out.is_clipped,
        out.metrics.sums,
    )
    return [out.plan, out.backend, tuple(out.metrics), out.loss.detach(), *rows, *grads]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        same = (
            torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) and a.dtype == b.dtype
            if isinstance(a, torch.Tensor)
            else a == b
        )
        assert same, (a, b)


def fresh(calls, make):
    """The result of a call that finds nothing kept."""
    before = dict(calls._calls)
    calls._calls.clear()
    try:
        return make()
    finally:
        calls._calls.clear()
        calls._calls.update(before)
