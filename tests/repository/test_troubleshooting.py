"""Each message that docs/troubleshooting.md explains is one that a user gets: a call
raises it, as the page's reader would have written that call."""

import importlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from paths import ROOT

import reweight_ops as rw
from reweight_ops._core.backends import native

TOLD = re.findall(
    r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M
)
B, T, V = 2, 4, 10
IDS, ADVANTAGES, STORED = torch.zeros(B, T, dtype=torch.long), torch.ones(B), -torch.ones(B, T)


class Subclass(torch.Tensor):
    pass


def logits(**options):
    return torch.zeros(B, T, V, requires_grad=True, **options)


def loss(ids=IDS, advantages=ADVANTAGES, spec="dapo", **keywords):
    return rw.policy_loss(logits(), ids, advantages, spec=spec, **keywords)


def without_typer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "typer", None)
        patch.delitem(sys.modules, "reweight_ops.cli", raising=False)
        importlib.import_module("reweight_ops.cli")


def without_cuda_kernels():
    if "_cuda" in sys.modules or torch.cuda.is_available():
        pytest.skip("this installation may have them")
    loss(backend="cuda")


def of_other_sources():
    with pytest.warns(UserWarning, match="until then"):
        native.checked(SimpleNamespace(__name__="reweight_ops._C", sources="others"), "cpu")


def backward_again():
    found = loss(plan="one_pass").loss
    found.backward(retain_graph=True)
    found.backward()


def consumed():
    x = logits() * 1
    rw.policy_loss(x, IDS, ADVANTAGES, spec="dapo", consume_logits=True)
    rw.token_logps(x, IDS)


def refilled():
    old = STORED.clone()
    out = loss(old_per_token_logps=old)
    old.zero_()
    out.metrics.as_floats()


CALLS = {
    "needs its command-line extra": without_typer,
    "was asked for": lambda: rw.token_logps(logits(dtype=torch.float64), IDS, backend="cpu"),
    "this installation has no CUDA kernels": without_cuda_kernels,
    "was built from other sources": of_other_sources,
    "plan='one_pass' is impossible": lambda: loss(spec="gspo", plan="one_pass"),
    "second backward through a one-pass loss": backward_again,
    "would have no effect": lambda: loss(ref_per_token_logps=STORED),
    "got an unexpected keyword argument": lambda: loss(old_log_probs=STORED),
    "consumed by an earlier call with consume_logits=True": consumed,
    "written in place since the call": refilled,
    "pass drop_last=True": lambda: loss(ids=IDS[:, 1:]),
    "so expected": lambda: loss(advantages=torch.ones(B + 1)),
    "needs ref_per_token_logps": lambda: loss(spec=rw.methods.grpo(beta=0.1)),
    "for an ignored row": lambda: loss(ids=IDS + V),
    "outside [": lambda: loss(
        spec="gspo", sequence_ids=IDS + 7, num_sequences=B, advantages=torch.ones(B, T)
    ),
    "tensor subclasses are not supported": lambda: rw.token_logps(
        logits().detach().as_subclass(Subclass), IDS
    ),
    "log-probs in 16 bits lose the ratio": lambda: loss(old_per_token_logps=STORED.bfloat16()),
    "pass it as .float()": lambda: rw.advantages.grpo(torch.ones(4).half(), group_size=4),
}


def test_every_message_has_a_call():
    assert list(CALLS) == sorted(CALLS, key=TOLD.index) and set(CALLS) == set(TOLD)


@pytest.mark.parametrize("message", CALLS)
def test_the_message_is_raised(message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    errors = (rw.ReweightOpsError, TypeError, SystemExit)
    with pytest.raises(errors, match=re.escape(message)):
        CALLS[message]()
