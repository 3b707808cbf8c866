"""Arguments of a second call of a signature that the first did not have: unusual
tensors, and numbers without fp32.
"""

import threading

import numpy as np
import pytest
import torch

import reweight_ops as rw
from reweight_ops.testing import make_batch

SPEC = rw.methods.reinforce()
LOGITS, IDS = (
    torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)),
    torch.arange(6).view(2, 3),
)


def loss(advantages, **options):
    return rw.policy_loss(LOGITS.clone().requires_grad_(), IDS, advantages, spec=SPEC, **options)


def warm(advantages):
    for _ in range(3):
        loss(advantages)


@pytest.mark.parametrize("name", ["advantages", "token_weights", "logits"])
def test_a_lazy_negation_is_an_error(name):
    warm(torch.zeros(2, 3))
    lazy = torch._neg_view(torch.ones(2, 3))
    given = {
        "advantages": torch.zeros(2, 3),
        "logits": LOGITS.clone().requires_grad_(),
        "completion_ids": IDS,
        name: lazy,
    }
    if name == "logits":
        given[name] = torch._neg_view(LOGITS.clone())
    with pytest.raises(rw.UnsupportedRequest, match=f"{name} is a lazy negation"):
        rw.policy_loss(**given, spec=SPEC)


def test_a_tensor_without_memory_is_what_the_first_call_makes_of_it():
    warm(torch.zeros(2))
    assert loss(torch._efficientzerotensor(2)).loss == 0
    freed = torch.zeros(2)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        loss(freed)


@pytest.mark.parametrize(
    ("usual", "odd", "error"),
    [
        (np.float64(1), np.float64("nan"), rw.InvalidCall),
        (1.0, 1e39, RuntimeError),
        (1, 10**400, rw.InvalidCall),
    ],
)
def test_a_number_that_is_none_in_fp32(usual, odd, error):
    with pytest.raises(error):
        loss(odd)
    warm(usual)
    with pytest.raises(error):
        loss(odd)


@pytest.mark.parametrize("name", sorted(rw.METHODS))
def test_one_sequence(name):
    spec = rw.METHODS[name].build()
    batch = make_batch(spec, (1, 4), 19)
    out, want = (
        rw.policy_loss(**batch, spec=spec, backend=backend) for backend in ("auto", "reference")
    )
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-5, atol=1e-6)


def test_threads_read_one_output():
    wrong = []
    for _ in range(20):
        warm(torch.ones(2))
        out, barrier = loss(torch.ones(2)), threading.Barrier(4)

        def read(name, out=out, barrier=barrier):
            barrier.wait()
            try:
                getattr(out, name)
            except AttributeError as error:
                wrong.append(error)

        threads = [
            threading.Thread(target=read, args=(name,))
            for name in ("metrics", "per_token_logps", "entropies", "ratio")
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong
    object.__setattr__(out, "_rest", None)
    assert out.__getattr__("loss") is out.loss, "another thread has read it in the meantime"
