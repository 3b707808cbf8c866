"""Numbers of a call that are tensors: an argument without a gradient refuses one that
requires it.

Constants of the kernels cannot be tensors.
"""

import math

import pytest
import torch
from torch import Tensor

import reweight_ops as rw

generator = torch.Generator().manual_seed(0)
Z, OTHER = torch.randn(2, 3, 7, generator=generator), torch.randn(2, 3, 7, generator=generator)
HIDDEN, WEIGHT = torch.randn(2, 3, 5, generator=generator), torch.randn(7, 5, generator=generator)
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def lora(scale: Tensor) -> rw.Lora:
    return rw.Lora(torch.ones(2, 5), torch.ones(7, 2), scale)


LEARNT = {
    "loss_scale": lambda x: rw.policy_loss(Z, IDS, 1.0, spec="dapo", loss_scale=x),
    "num_items_in_batch": lambda x: rw.policy_loss(Z, IDS, 1.0, spec="dapo", num_items_in_batch=x),
    "num_sequences_in_batch": lambda x: rw.linear_policy_loss(
        HIDDEN, WEIGHT, IDS, 1.0, spec="grpo", num_sequences_in_batch=x
    ),
    "loss_scale of log-probs": lambda x: rw.policy_loss_from_logps(
        Z[..., 0], 1.0, spec="dapo", loss_scale=x
    ),
    "loss_scale of distillation": lambda x: rw.distillation_loss(Z, OTHER, loss_scale=x),
    "num_items_in_batch of linear distillation": lambda x: rw.linear_distillation_loss(
        HIDDEN, WEIGHT, OTHER, num_items_in_batch=x
    ),
}


@pytest.mark.parametrize("name", LEARNT)
def test_a_number_whose_gradient_would_be_lost(name):
    with pytest.raises(
        rw.InvalidCall,
        match=f"{name.split()[0]} requires grad, but no gradient of this op flows to it",
    ):
        LEARNT[name](torch.tensor(2.0, requires_grad=True))
    LEARNT[name](torch.tensor(2.0))
    with torch.no_grad():
        LEARNT[name](torch.tensor(2.0, requires_grad=True))


CONSTANTS = {
    "softcap": lambda x: rw.token_logps(Z, IDS, softcap=x),
    "softcap of a head": lambda x: rw.linear_token_logps(HIDDEN, WEIGHT, IDS, softcap=x),
    "other_softcap": lambda x: rw.token_divergence(Z, OTHER, other_softcap=x),
    "teacher_softcap": lambda x: rw.linear_distillation_loss(
        HIDDEN, WEIGHT, OTHER, teacher_softcap=x
    ),
    "beta": lambda x: rw.token_divergence(Z, OTHER, kind="generalized_jsd", beta=x),
    "lora.scale": lambda x: rw.linear_token_logps(HIDDEN, WEIGHT, IDS, lora=lora(x)),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_no_tensor(name):
    with pytest.raises(rw.InvalidCall, match=rf"{name.split()[0]} is tensor\(0.5"):
        CONSTANTS[name](torch.tensor(0.5))
    CONSTANTS[name](0.5)


def test_a_logit_scale_is_one_positive_number():
    x = torch.tensor(2.0, requires_grad=True)
    rw.linear_token_logps(HIDDEN, WEIGHT, IDS, logit_scale=x).sum().backward()
    y = torch.tensor(2.0, requires_grad=True)
    torch.log_softmax(y * (HIDDEN @ WEIGHT.T), -1).gather(-1, IDS[..., None]).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for wrong, message in (
        (torch.ones(6), "shape"),
        (torch.tensor(-2.0), "is -2.0"),
        (torch.tensor(0.0), "is 0.0"),
        (math.nan, "is nan"),
    ):
        with pytest.raises(rw.InvalidCall, match=f"logit_scale.* {message}"):
            rw.linear_token_logps(HIDDEN, WEIGHT, IDS, logit_scale=wrong)
    # The cap is divided by the scale, and is a number: the gradient by the scale would
    # be wrong.
    with pytest.raises(rw.InvalidCall, match="logit_scale is a tensor, but softcap is a number"):
        rw.linear_token_logps(HIDDEN, WEIGHT, IDS, logit_scale=x, softcap=3.0)


def test_a_compiled_logit_scale_that_is_not_positive_is_nan():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s: rw.linear_token_logps(HIDDEN, WEIGHT, IDS, logit_scale=s),
        backend="aot_eager",
        fullgraph=True,
    )
    assert (
        compiled(torch.tensor(2.0)).isfinite().all() and compiled(torch.tensor(-2.0)).isnan().all()
    )
