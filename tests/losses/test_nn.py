"""The modules have the ops' numbers, and the parameters and state dict of the
``nn.Linear`` that they replace.

They refuse heads that do more.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import reweight_ops as rw

B, T, D, V = 2, 5, 4, 11
MODULES = {
    "logps": (rw.FusedLinearLogProbs, {}),
    "loss": (rw.FusedLinearPolicyLoss, {"spec": "grpo"}),
}


@pytest.fixture(params=MODULES)
def module(request):
    return MODULES[request.param]


def data(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return (
        hidden,
        torch.randint(V, (B, T), generator=g),
        torch.randn(B, T, generator=g, dtype=torch.float64).to(dtype),
    )


def run(head, hidden, ids, advantages, **keywords):
    if isinstance(head, rw.FusedLinearPolicyLoss):
        return head(hidden, ids, advantages, **keywords).loss
    return (head(hidden, ids, **keywords) * advantages).sum()


@pytest.mark.parametrize("bias", [False, True])
def test_is_the_op(module, bias):
    cls, own = module
    linear = nn.Linear(D, V, bias=bias).double()
    head = cls.from_linear(linear, temperature=0.7, softcap=5.0, chunk_rows=3, **own)
    hidden, ids, advantages = data()
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 1]])
    got = run(head, hidden, ids, advantages, completion_mask=mask)
    options = dict(completion_mask=mask, temperature=0.7, softcap=5.0, lm_head_bias=linear.bias)
    if own:
        want = rw.linear_policy_loss(hidden, linear.weight, ids, advantages, **own, **options).loss
    else:
        want = (rw.linear_token_logps(hidden, linear.weight, ids, **options) * advantages).sum()
    torch.testing.assert_close(got, want)
    leaves = [hidden, *linear.parameters()]
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)
    by = [
        torch.autograd.grad(run(head, hidden, ids, advantages, **heat), hidden)[0]
        for heat in ({}, {"temperature": 1.0})
    ]
    assert not torch.allclose(*by)  # a call's keyword replaces the setting


def test_entropies_and_the_whole_output():
    hidden, ids, advantages = data(torch.float32)
    logps, entropies = rw.FusedLinearLogProbs(D, V, temperature=0.5)(
        hidden, ids, return_entropy=True
    )
    assert logps.shape == entropies.shape == (B, T) and entropies.requires_grad
    head = rw.FusedLinearPolicyLoss(D, V, spec=rw.methods.dapo(), plan="two_pass")
    out = head(hidden, ids, advantages, old_per_token_logps=torch.full((B, T), -2.0))
    assert (
        out.plan == "two_pass"
        and out.ratio.shape == (B, T)
        and "clip_ratio/region_mean" in out.metrics
    )


def test_parameters_are_those_of_a_linear(module):
    """Own parameters are initialised like ``nn.Linear``'s, borrowed ones are the same
    objects, names are equal, ties stay.
    """
    cls, own = module
    for bias in (False, True):
        torch.manual_seed(0)
        linear = nn.Linear(D, V, bias=bias)
        torch.manual_seed(0)
        head = cls(D, V, bias, **own)
        assert list(head.state_dict()) == list(linear.state_dict())
        assert all(
            torch.equal(a, b) for a, b in zip(head.parameters(), linear.parameters(), strict=True)
        )
        cls(D, V, bias, **own).load_state_dict(linear.state_dict())
    embedding = nn.Embedding(V, D)
    linear.weight = embedding.weight
    head = cls.from_linear(linear, **own)
    assert head.weight is embedding.weight and head.bias is linear.bias
    model = nn.ModuleDict({"embedding": embedding, "lm_head": head})
    assert len(list(model.parameters())) == 2 and set(model.state_dict()) == {
        "embedding.weight",
        "lm_head.weight",
        "lm_head.bias",
    }
    _, ids, advantages = data(torch.float32)
    run(head, torch.tanh(embedding(ids)), ids, advantages).backward()
    assert embedding.weight.grad.abs().max() > 0
    other = copy.deepcopy(head).to(torch.bfloat16)
    assert (
        other.weight.dtype == torch.bfloat16
        and other.weight is not head.weight
        and other.settings == head.settings
    )
    assert cls(D, V, device="meta", dtype=torch.float16, **own).weight.is_meta


def test_checkpointing_changes_no_gradient(module):
    cls, own = module
    head, (hidden, ids, advantages) = cls(D, V, **own).double(), data()
    inputs = [hidden, head.weight]
    plain = torch.autograd.grad(run(head, hidden, ids, advantages), inputs)
    again = torch.autograd.grad(
        checkpoint(run, head, hidden, ids, advantages, use_reentrant=False), inputs
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_compiles(module):
    torch._dynamo.reset()
    cls, own = module
    head, (hidden, ids, advantages) = cls(D, V, temperature=0.7, **own), data(torch.float32)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(head, hidden, ids, advantages), run(head, hidden, ids, advantages)
    )


def test_shows_its_settings(module):
    cls, own = module
    assert f"{cls.__name__}(in_features=4, out_features=11, bias=True, temperature=0.7" in repr(
        cls(D, V, True, temperature=0.7, **own)
    )


class Quantised(nn.Linear):
    def forward(self, x):
        return x


class Wrapper(torch.Tensor):
    pass


def _weight(linear, weight):
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _hooked(register):
    linear = nn.Linear(D, V)
    getattr(linear, register)(lambda *args: None)
    return linear


def _replaced(linear):
    linear.forward = lambda x: x
    return linear


REFUSED = {
    "a parametrisation": (
        nn.utils.parametrizations.weight_norm(nn.Linear(D, V)),
        "parametrised, its weight is computed from other parameters",
    ),
    "a forward of the instance": (_replaced(nn.Linear(D, V)), "forward is replaced"),
    "a hook before": (_hooked("register_forward_pre_hook"), "with forward hooks"),
    "a hook after": (_hooked("register_forward_hook"), "with forward hooks"),
    "a class of its own": (
        Quantised(D, V),
        "Quantised, which is not a plain nn.Linear: dequantise or merge it, or pass head",
    ),
    "no module": (torch.zeros(3), "Tensor, which is not a plain nn.Linear"),
    "integers": (
        _weight(nn.Linear(D, V), torch.zeros(V, D, dtype=torch.uint8)),
        "quantised, its weight is torch.uint8",
    ),
    "fp8": (
        _weight(nn.Linear(D, V), torch.zeros(V, D).to(torch.float8_e4m3fn)),
        "quantised, its weight is torch.float8_e4m3fn",
    ),
    "a wrapped tensor": (
        _weight(nn.Linear(D, V), torch.zeros(V, D).as_subclass(Wrapper)),
        "quantised, its weight is a Wrapper",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_heads_that_are_refused(module, case):
    cls, own = module
    linear, message = REFUSED[case]
    with pytest.raises(rw.InvalidCall, match=f"{cls.__name__}: the head is .*{message}"):
        cls.from_linear(linear, **own)


def test_the_op_says_what_to_do_with_a_quantised_weight():
    with pytest.raises(
        rw.InvalidCall,
        match="lm_head_weight is torch.int8, a quantised head: dequantise it, or pass",
    ):
        rw.linear_token_logps(
            torch.zeros(2, D),
            torch.zeros(V, D, dtype=torch.int8),
            torch.zeros(2, dtype=torch.int64),
        )


@pytest.mark.parametrize(
    "name", ["lm_head_bias", "lora", "row_index", "consume_logits", "drop_last"]
)
def test_keywords_that_are_no_setting(module, name):
    cls, own = module
    with pytest.raises(rw.InvalidCall, match=f"{cls.__name__}: {name} is not a setting"):
        cls(D, V, **own, **{name: None})


def test_wrong_settings(module):
    cls, own = module
    with pytest.raises(TypeError, match="Did you mean temperature"):
        cls(D, V, **own, temprature=1.0)
    with pytest.raises(rw.InvalidCall, match="lm_head_bias is the module's own"):
        run(cls(D, V, **own), *data(torch.float32), lm_head_bias=torch.zeros(V))
    with pytest.raises(rw.InvalidCall, match="expected a PolicyLossSpec"):
        rw.FusedLinearPolicyLoss(D, V, spec=3)
