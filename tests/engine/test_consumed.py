"""Consumed logits hold a gradient under every name. Tensors that only share their
storage stay valid.
"""

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.calls import consumed

ids = torch.randint(7, (4, 6))


def logits():
    return torch.randn(4, 7, 7).requires_grad_() * 1


def consume(z, i, plan="one_pass"):
    return rw.policy_loss(z, i, 1.0, spec="reinforce", plan=plan, consume_logits=True)


NAMES = {
    "itself": lambda z: (z, ids),
    "detach": lambda z: (z.detach(), ids),
    "view": lambda z: (z.view(2, 2, 6, 7), ids.view(2, 2, 6)),
    "rows": lambda z: (z[1:3], ids[1:3]),
    "columns": lambda z: (z[:, 2:], ids[:, 2:]),
    "vocabulary": lambda z: (z[..., :5], ids.clamp(max=4)),
    "data": lambda z: (z.data, ids),
    "transposed": lambda z: (z.transpose(0, 1), ids.t()),
}


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("name", NAMES)
def test_another_name_is_refused(name, plan):  # docs/semantics.md: S20
    z = logits()
    whole = z[:, :6]
    consume(whole, ids, plan)
    again, labels = NAMES[name](whole)
    with pytest.raises(rw.InvalidCall, match="consumed"):
        rw.token_logps(again.detach() if again.requires_grad else again, labels)


def test_other_parts_of_the_memory_are_served():
    z = logits()
    for row in range(4):  # one sequence after another
        consume(z[row : row + 1, :3], ids[row : row + 1, :3])
    assert rw.token_logps(z.detach()[:, 3:6], ids[:, 3:]).isfinite().all()
    with pytest.raises(rw.InvalidCall, match="consumed"):
        rw.token_logps(z.detach()[:, 2:6], ids[:, 2:])


def test_boxes_against_every_element():
    """For any two slices of a tensor, the answer is whether they share an element."""
    base = torch.arange(3 * 5 * 2).view(3, 5, 2)
    slices = [
        base[a:b, c:d]
        for a in range(3)
        for b in range(a + 1, 4)
        for c in range(5)
        for d in range(c + 1, 6)
    ]
    regions = [consumed._region(x) for x in slices]
    for x, left in zip(slices, regions, strict=True):
        inside = set(x.flatten().tolist())
        for y, right in zip(slices, regions, strict=True):
            assert left.overlaps(right) == bool(inside & set(y.flatten().tolist())), (left, right)


def test_a_copy_is_served():
    z = logits()
    whole = z[:, :6]
    kept = whole.detach().clone()
    consume(whole, ids)
    assert rw.token_logps(kept, ids).isfinite().all()


SECOND = {
    "token_divergence": lambda x: rw.token_divergence(torch.zeros(4, 6, 7), x),
    "distillation_loss": lambda x: rw.distillation_loss(torch.zeros(4, 6, 7), x),
    "linear_token_divergence": lambda x: rw.linear_token_divergence(torch.zeros(4, 6, 5), torch.ones(7, 5), x),
    "linear_distillation_loss": lambda x: rw.linear_distillation_loss(torch.zeros(4, 6, 5), torch.ones(7, 5), x),
    "preference_loss": lambda x: rw.preference_loss(
        torch.zeros(4, 6, 7), ids, spec="sparse_po", ref_logits=x, ref_per_token_logps=torch.zeros(4, 6),
        reward_mask=torch.ones(4, 6), kl_mask=torch.ones(4, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", SECOND)
def test_a_second_tensor_is_refused(op):
    z = logits()[:, :6]
    SECOND[op](z.detach())
    consume(z, ids)
    with pytest.raises(rw.InvalidCall, match="consumed"):
        SECOND[op](z.detach())


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_a_second_tensor_in_the_same_memory(plan, kind):
    """The gradient of a row would overwrite another row of a teacher that is a shifted
    view. It overwrites a teacher that is the same view where it has been read.
    """

    def gradient(teacher, consume_logits):
        leaf = torch.randn(4, 7, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
        z = leaf * 1
        rw.distillation_loss(
            z[:, :6],
            teacher(z.detach()),
            kind=kind,
            plan=plan,
            teacher_temperature=2.0,
            consume_logits=consume_logits,
        ).loss.backward()
        return leaf.grad

    def shifted(z):
        return z[:, 1:]

    with pytest.raises(rw.InvalidCall, match=r"would overwrite other_logits.*clone\(\)"):
        gradient(shifted, True)
    assert gradient(shifted, False).any()
    assert torch.equal(gradient(lambda z: shifted(z).clone(), True), gradient(shifted, False))
    same = gradient(lambda z: z[:, :6], True)
    assert same.any() and torch.equal(same, gradient(lambda z: z[:, :6].clone(), False))


def test_a_batch_of_one_has_any_stride():
    """A model that puts time first has logits ``[T, 1, V]``. Their transpose has a
    batch of one, of the stride of a token.
    """

    def consumed(teacher):
        leaf = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        z = (leaf * 1).transpose(0, 1)
        assert z.stride(0) == z.stride(1)
        out = rw.distillation_loss(
            z[..., :4], teacher(z.detach()), teacher_temperature=2.0, consume_logits=True
        )
        out.loss.backward()
        rw.token_logps(z.detach()[..., 4:], torch.zeros(1, 3).long())  # holds no gradient
        return leaf.grad

    def same(z):
        return z.as_strided((1, 3, 4), (24, 8, 1))

    def other_half(z):
        return z[..., 4:]

    for teacher in (same, other_half):
        grad = consumed(teacher)
        assert grad[..., :4].any()
        assert torch.equal(grad, consumed(lambda z, teacher=teacher: teacher(z).clone()))
