"""A second backward through a linear loss gives the bits of the first; it must
recompute the logits that the first had kept.
"""

import pytest
import torch

import reweight_ops as rw


def make(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    leaves = [
        torch.randn(size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for size in ((2, 9, 5), (11, 5))
    ]
    stored = {
        "advantages": torch.randn(2, 9, generator=g),
        "completion_mask": torch.rand(2, 9, generator=g) > 0.4,
    }
    # Many rows are clipped: their gradient is zero, and backward leaves them out.
    stored["old_per_token_logps"] = -2.4 + torch.randn(2, 9, generator=g)
    return leaves, {"completion_ids": torch.randint(11, (2, 9), generator=g), **stored}


def loss(hidden, weight, batch, **options):
    return rw.linear_policy_loss(
        hidden, weight, **batch, spec="grpo", plan="two_pass", **options
    ).loss


@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_rows": 4}, {"chunk_rows": 4, "memory_budget": 300}, {"compact_rows": False}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward(dtype, options):
    for seed in range(20):
        leaves, batch = make(seed, dtype)
        value = loss(*leaves, batch, **options)
        first, second, third = (
            torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(3)
        )
        for a, b, c in zip(first, second, third, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c), seed


@pytest.mark.parametrize("options", [{}, {"chunk_rows": 4}], ids=str)
def test_gradcheck_at_its_own_tolerances(options):
    for seed in range(6):
        leaves, batch = make(seed, torch.float64)
        assert torch.autograd.gradcheck(
            lambda h, w, batch=batch: loss(h, w, batch, **options), leaves
        )


@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_rows": 4}, {"chunk_rows": 4, "memory_budget": 600}, {"compact_rows": False}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["reverse_kl", "generalized_jsd"])
def test_a_second_backward_of_a_divergence(kind, options):
    for seed in range(10):
        leaves, batch = make(seed, torch.float32)
        g = torch.Generator().manual_seed(seed)
        teacher = rw.HiddenLogits(
            torch.randn(2, 9, 3, generator=g), torch.randn(11, 3, generator=g)
        )
        weights = torch.where(batch["advantages"] > 0, batch["advantages"], 0)
        value = rw.linear_distillation_loss(
            *leaves,
            teacher,
            kind=kind,
            plan="two_pass",
            completion_mask=batch["completion_mask"],
            token_weights=weights,
            **options,
        ).loss
        first, second, third = (
            torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(3)
        )
        for a, b, c in zip(first, second, third, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c), seed
