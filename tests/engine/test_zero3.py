"""ZeRO-3's parameters work if they are gathered, and are refused with instructions if
they are not.

The stand-in does what ``deepspeed/runtime/zero/partition_parameters.py`` does to a
parameter (``_convert_to_deepspeed_param``, ``free_param``, ``GatheredParameters``).
"""

import contextlib
import enum

import pytest
import torch
from torch import nn

import reweight_ops as rw

D, V = 5, 11


class ZeroParamStatus(enum.Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2


def free(parameter):
    parameter.data = torch.empty(0, dtype=parameter.dtype)
    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def convert(parameter):
    """Convert a parameter: ``ds_tensor`` holds its data, on one rank all of them."""
    parameter.ds_id, parameter.ds_shape, parameter.ds_numel = 7, parameter.shape, parameter.numel()
    parameter.ds_tensor = parameter.detach().flatten().clone()
    free(parameter)


@contextlib.contextmanager
def GatheredParameters(parameters):
    for parameter in parameters:
        parameter.data = parameter.ds_tensor.view(parameter.ds_shape).clone()
        parameter.ds_status = ZeroParamStatus.AVAILABLE
    try:
        yield
    finally:
        for parameter in parameters:
            free(parameter)


class Head(nn.Linear):
    """A module whose hooks gather like the engine's.

    They gather around its forward, and from the gradient of its output until backward
    has passed it.
    """

    def forward(self, hidden, call):
        with GatheredParameters(self.parameters()):
            loss = call(hidden, self.weight, self.bias)
        stack = contextlib.ExitStack()
        loss.register_hook(
            lambda grad: stack.enter_context(GatheredParameters(list(self.parameters()))) and None
        )
        hidden.register_hook(lambda grad: stack.close())
        return loss


def hidden_states():
    return torch.randn(
        2, 3, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).requires_grad_()


def call(plan):
    ids = torch.arange(6).view(2, 3)

    def loss(hidden, weight, bias):
        return rw.linear_policy_loss(
            hidden,
            weight,
            ids,
            torch.tensor([1.0, -2.0]),
            spec="dapo",
            plan=plan,
            lm_head_bias=bias,
        ).loss

    return loss


def head(kind=nn.Linear):
    torch.manual_seed(1)
    return kind(D, V).double()


def expected(plan):
    hidden, whole = hidden_states(), head()
    loss = call(plan)(hidden, whole.weight, whole.bias)
    loss.backward()
    return loss, hidden.grad, whole.weight.grad, whole.bias.grad


PLANS = ["one_pass", "two_pass"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("how", ["context", "module"])
def test_gathered_parameters_are_parameters(plan, how):
    hidden, own = hidden_states(), head(Head if how == "module" else nn.Linear)
    for parameter in own.parameters():
        convert(parameter)
    if how == "module":
        loss = own(hidden, call(plan))
        loss.backward()
    else:
        with GatheredParameters(list(own.parameters())):
            loss = call(plan)(hidden, own.weight, own.bias)
            loss.backward()
    assert own.weight.numel() == 0
    assert all(
        torch.equal(*pair)
        for pair in zip(
            (loss, hidden.grad, own.weight.grad, own.bias.grad), expected(plan), strict=True
        )
    )


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_released_parameter_is_refused(name):
    own = head()
    convert(getattr(own, name))
    shape = r"\(11, 5\)" if name == "weight" else r"\(11,\)"
    with pytest.raises(
        rw.InvalidCall,
        match=rf"lm_head_{name} is a parameter that ZeRO-3 has released \(of shape {shape}, here empty\): gather it",
    ):
        call("auto")(hidden_states(), own.weight, own.bias)
    with pytest.raises(rw.InvalidCall, match="ZeRO-3 has released"):
        rw.FusedLinearLogProbs.from_linear(own)(
            hidden_states(), torch.zeros(2, 3, dtype=torch.long)
        )


@pytest.mark.parametrize("plan", PLANS)
def test_one_that_is_released_before_backward_is_refused(plan):
    own = head()
    convert(own.weight)
    with GatheredParameters([own.weight]):
        loss = call(plan)(hidden_states(), own.weight, own.bias)
    with pytest.raises(
        rw.InvalidCall,
        match="ZeRO-3 has released a parameter of the head since forward: gather it for the forward and the backward",
    ):
        loss.backward()
