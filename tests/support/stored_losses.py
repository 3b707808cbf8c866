"""Losses that row kernels evaluate on stored rows, against autograd in fp64."""

import pytest
import torch

import reweight_ops as rw
from reweight_ops.testing import make_batch

LENGTHS = (5, 0, 8, 3, 7, 8)


def batch_of(spec, **changes):
    batch = make_batch(spec, (len(LENGTHS), 8), 11)
    batch["completion_mask"] = torch.arange(8) < torch.tensor(LENGTHS)[:, None]
    batch["completion_mask"][0, 1] = False
    batch["advantages"] = torch.tensor([1.0, -0.5, 0.7, -1.0, 0.3, 0.2])[:, None].expand(-1, 8)
    if spec.reads_groups:
        batch |= {"group_ids": torch.tensor([1, 0, 1, 2, 0, 2]), "num_groups": 4}
    return batch | changes


def found(spec, batch, backend, dtype, upstream=None):
    """The loss, its gradient, and the metrics."""
    z = batch["logits"].detach().to(dtype).requires_grad_()
    data = {
        name: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for name, t in batch.items()
    }
    out = rw.policy_loss(**{**data, "logits": z}, spec=spec, backend=backend, unused="ignore")
    (grad,) = torch.autograd.grad(out.loss, z, upstream)
    # only row kernels know the derivatives
    assert (out._by is None) == (backend == "reference"), "who evaluated the loss?"
    rows = torch.stack([out.per_token_loss, out.coef, out.is_clipped.to(dtype)])
    return out.loss.detach(), grad, rows.detach(), out.metrics.as_floats()


def same(spec, batch, upstream=None, backend="cpu"):
    """The row kernels of a backend give what autograd gives in fp64."""
    *tensors, metrics = found(spec, batch, backend, torch.float32, upstream)
    up = None if upstream is None else upstream.double()
    *wanted_tensors, wanted = found(spec, batch, "reference", torch.float64, up)
    for got, want in zip(tensors, wanted_tensors, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=3e-4, atol=3e-6, equal_nan=True)
    common = {name: metrics[name] for name in wanted}
    assert common == pytest.approx(wanted, rel=1e-3, abs=1e-5, nan_ok=True)
