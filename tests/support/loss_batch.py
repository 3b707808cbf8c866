"""A batch in fp64 for losses that are compared with transcriptions of papers, and the
comparison of loss and gradient.
"""

import torch

import reweight_ops as rw

B, T, V = 8, 9, 7


def policy_batch():
    g = torch.Generator().manual_seed(9)

    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    logits = (2 * normal(B, T, V)).requires_grad_()
    ids = torch.randint(V, (B, T), generator=g)
    logp = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    old, ref = (logp.detach() + s * normal(B, T) for s in (0.4, 0.3))
    mask = torch.arange(T) < torch.tensor([9, 1, 4, 7, 2, 9, 5, 3])[:, None]
    return dict(
        logits=logits,
        ids=ids,
        logp=logp,
        old=old,
        ref=ref,
        mask=mask,
        A=normal(B),
        rewards=torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 0]),
    )


def ours(batch, spec, adv, **options):
    given = {
        "completion_mask": batch["mask"],
        "old_per_token_logps": batch["old"],
        "backend": "reference",
        "unused": "ignore",
        **options,
    }
    return rw.policy_loss(batch["logits"], batch["ids"], adv, spec=spec, **given)


def same(got, expected, batch):
    (a,), (b,) = (
        torch.autograd.grad(loss, batch["logits"], retain_graph=True) for loss in (got, expected)
    )
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    assert b.abs().sum() > 1e-3
