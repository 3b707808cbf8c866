"""A student's hidden states and a teacher's, both heads' options, and the same logits
computed at once.
"""

import torch

import reweight_ops as rw
from reweight_ops._core.engine.distillation import KINDS

B, T, D, E, V = 2, 7, 8, 5, 37
ALL = (*KINDS, "generalized_jsd")
INPUTS = ("hidden", "weight", "bias", "a", "b")


def make(dtype=torch.float64, seed=0, v=V):
    """Student and teacher; the teacher's head is narrower and padded."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    sizes = dict(hidden=(B, T, D), weight=(v, D), bias=(v,), a=(2, D), b=(v, 2))
    d = {name: normal(*size).requires_grad_() for name, size in sizes.items()}
    d |= dict(
        t_hidden=normal(B, T, E),
        t_weight=normal(v + 3, E),
        t_bias=normal(v + 3),
        mask=torch.rand(B, T, generator=g) < 0.7,
    )
    row = torch.float64 if dtype == torch.float64 else torch.float32
    return d | dict(upstream=normal(B, T).to(row), heat=(normal(B, T).abs() + 0.5).to(row))


def student(d):
    return dict(lm_head_bias=d["bias"], lora=rw.Lora(d["a"], d["b"], 0.5), logit_scale=1.3)


def teacher(d, as_logits=False):
    if as_logits:
        return teacher_logits(d)
    return rw.HiddenLogits(d["t_hidden"], d["t_weight"], d["t_bias"], 0.7)


def student_logits(d):
    return 1.3 * (
        d["hidden"] @ d["weight"].T + d["bias"] + 0.5 * (d["hidden"] @ d["a"].T) @ d["b"].T
    )


def teacher_logits(d):
    return 0.7 * (d["t_hidden"] @ d["t_weight"].T + d["t_bias"])


def options_of(d, kind, of="other"):
    found = dict(
        kind=kind,
        completion_mask=d["mask"],
        temperature=d["heat"],
        softcap=6.0,
        vocab_size=d["weight"].size(0) - 1,
    )
    return (
        found
        | {f"{of}_temperature": 1.1, f"{of}_softcap": 9.0}
        | ({"beta": 0.3} if kind == "generalized_jsd" else {})
    )


def grads(total, d, **more):
    return torch.autograd.grad(total, [d[name] for name in INPUTS], **more)


def same(found, wanted, **tolerance):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
