"""Every op of hidden states says what to do with a head whose weight is quantised, of
the student and of the teacher.

The weights stand in for those of bitsandbytes (4 and 8 bits), torchao and FP8 trainers:
they have the same dtypes, shapes and kinds of class.
"""

import pytest
import torch

import reweight_ops as rw

B, T, D, V = 2, 3, 4, 12


class Params4bit(torch.nn.Parameter):
    pass


class Int8Params(torch.nn.Parameter):
    pass


class Float8Tensor(torch.Tensor):
    """Claims bf16, and no matrix product of it is defined."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)

    def __init__(self, data):
        self.data8 = data

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def fp8():
    return torch.zeros(V, D).to(torch.float8_e4m3fn)


WEIGHTS = {
    "bitsandbytes, 4 bits": lambda: Params4bit(
        torch.zeros(V * D // 2, 1, dtype=torch.uint8), False
    ),
    "bitsandbytes, 8 bits": lambda: Int8Params(torch.zeros(V, D, dtype=torch.int8), False),
    "bitsandbytes, not yet quantised": lambda: Params4bit(
        torch.zeros(V, D, dtype=torch.bfloat16), False
    ),
    "a wrapper": lambda: Float8Tensor(fp8()),
    "a parameter of a wrapper": lambda: torch.nn.Parameter(Float8Tensor(fp8()), False),
    "fp8": fp8,
}

HIDDEN, IDS = torch.zeros(B, T, D, dtype=torch.bfloat16), torch.zeros(B, T, dtype=torch.int64)
WEIGHT = torch.zeros(V, D, dtype=torch.bfloat16)
ADVANTAGES, MASK = torch.ones(B), torch.ones(B, T)
TEACHER = rw.HiddenLogits(HIDDEN, WEIGHT)


def policy(weight, **options):
    return rw.linear_policy_loss(HIDDEN, weight, IDS, ADVANTAGES, spec="grpo", **options)


OPS = {
    "linear_token_logps": lambda w: rw.linear_token_logps(HIDDEN, w, IDS),
    "linear_token_stats": lambda w: rw.linear_token_stats(HIDDEN, w, IDS),
    "linear_policy_loss": policy,
    "linear_preference_loss": lambda w: rw.linear_preference_loss(
        HIDDEN, w, IDS, spec="dpo", ref_per_token_logps=torch.zeros(B, T), completion_mask=MASK
    ),
    "linear_token_divergence": lambda w: rw.linear_token_divergence(HIDDEN, w, TEACHER),
    "linear_distillation_loss": lambda w: rw.linear_distillation_loss(HIDDEN, w, TEACHER),
}
TEACHERS = {
    "linear_token_divergence": lambda q: rw.linear_token_divergence(HIDDEN, WEIGHT, q),
    "linear_distillation_loss": lambda q: rw.linear_distillation_loss(HIDDEN, WEIGHT, q),
    "linear_policy_loss": lambda q: policy(WEIGHT, teacher=rw.Teacher(q, 0.1)),
}


def test_every_linear_op_is_here():
    assert OPS.keys() == {name for name in dir(rw) if name.startswith("linear_")}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_each_op_says_what_to_do(kind):
    message = (
        "a quantised head: dequantise it, or pass head\\(hidden\\) to the op that takes logits"
    )
    for name, op in OPS.items():
        with pytest.raises(rw.InvalidCall, match=f"{name}: lm_head_weight is .*, {message}"):
            op(WEIGHTS[kind]())
    for name, op in TEACHERS.items():
        with pytest.raises(rw.InvalidCall, match=f"{name}.*: lm_head_weight is .*, {message}"):
            op(rw.HiddenLogits(HIDDEN, WEIGHTS[kind]()))


def test_logits_of_the_heads_own_forward_are_served():
    """What the message says to do."""
    z = torch.zeros(B, T, V, dtype=torch.bfloat16, requires_grad=True)
    rw.token_logps(z, IDS).sum().backward()
    assert z.grad is not None
