"""One-pass losses that the C++ backend prepares when they are called again."""

import pytest
import torch
from kept_calls import SHAPE, VOCAB, assert_equal, batch_of, fresh, result

import reweight_ops as rw
from reweight_ops.errors import ReweightOpsError

pytest.importorskip("reweight_ops._C", exc_type=ImportError)

#: Calls in one pass whose loss the backend prepares.
PREPARED = {
    "numbers": {},
    "masked positions": {"denominator_mask": torch.ones(SHAPE)},
    "a tensor as divisor": {"num_items_in_batch": torch.tensor(7)},
    "a divisor": {"num_items_in_batch": 5, "loss_scale": torch.tensor(0.3)},
    "advantages of sequences": {"advantages": torch.tensor([1.0, -2.0, 0.5])},
    "advantages in a column": {"advantages": torch.tensor([[1.0], [-2.0], [0.5]])},
    "strided": {
        "old_per_token_logps": torch.randn(5, 3).t() - 2,
        "advantages": torch.randn(6)[::2],
    },
    "one number": {"old_per_token_logps": -2.0, "advantages": torch.tensor(0.7)},
    "a factor": {"token_weights": torch.rand(SHAPE)},
    "another factor": {"importance_sampling_ratio": torch.rand(SHAPE[0])},
    "both factors": {
        "token_weights": torch.rand(SHAPE),
        "importance_sampling_ratio": torch.rand(SHAPE[0], 1),
    },
    "what is not read": {"ref_per_token_logps": torch.randn(SHAPE), "unused": "ignore"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PREPARED)
def test_prepared_losses(kept_calls, name, dtype):
    for spec in (rw.methods.dapo(), rw.methods.grpo(beta=0.1).replace(reduction=rw.TokenMean())):
        options = {"spec": spec, "plan": "one_pass", "loss_scale": 64.0, **PREPARED[name]}
        if "ref_logp" in spec.requires:
            options["unused"] = "error"
        for seed in range(3):
            batch = batch_of(spec, seed, dtype=dtype)
            found = result(batch, **options)
            assert_equal(found, fresh(kept_calls, lambda b=batch, o=options: result(b, **o)))
    assert len(kept_calls) == 2 and all(
        call.direct is not None for call in kept_calls._calls.values()
    )


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_prepared_losses_write_where_they_should(kept_calls, drop_last, consume):
    spec = rw.methods.dapo()
    batch = batch_of(spec, 0)
    rest = {k: v for k, v in batch.items() if k != "logits"}
    leaf = torch.cat(
        [batch["logits"], torch.full((SHAPE[0], int(drop_last), VOCAB), 3.0)], 1
    ).requires_grad_()

    def call():
        z = leaf * 1.0
        version = z._version
        out = rw.policy_loss(
            z, **rest, spec=spec, drop_last=drop_last, consume_logits=consume, plan="one_pass"
        )
        assert (z._version > version) == consume
        return torch.autograd.grad(out.loss * 3, leaf)[0]

    first = call()
    assert all(torch.equal(call(), first) for _ in range(2))
    (kept_call,) = kept_calls._calls.values()
    assert kept_call.direct is not None and kept_call.direct.consume == consume
    wrong = {**rest, "completion_ids": torch.full(SHAPE, VOCAB)}
    z = leaf * 1.0
    before = z.detach().clone()
    with pytest.raises(rw.InvalidCall, match="is 17"):
        rw.policy_loss(
            z, **wrong, spec=spec, drop_last=drop_last, consume_logits=consume, plan="one_pass"
        )
    assert torch.equal(z, before) and z._version == 0


def test_a_prepared_loss_reads_what_it_was_given(kept_calls):
    """Rows that are read later are those of the call, whatever happened to its
    arguments since.
    """
    spec = rw.methods.grpo(beta=0.1)
    batch = batch_of(spec, 0)
    expected = result(batch, spec=spec)
    z = batch["logits"].clone().requires_grad_()
    given = {
        k: v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in batch.items()
        if k != "logits"
    }
    out = rw.policy_loss(z, **given, spec=spec)
    assert "_rest" in vars(out) and "per_token_logps" not in vars(out)
    for t in given.values():
        if isinstance(t, torch.Tensor):
            t.zero_()
    assert torch.equal(
        out.metrics.sums.nan_to_num(7.5), expected[10].nan_to_num(7.5)
    ) and torch.equal(out.coef, expected[8])
    assert "_rest" not in vars(out) and "PolicyLossOutput(loss=" in repr(out)
    with pytest.raises(AttributeError, match="no attribute 'metric'"):
        out.metric  # noqa: B018


def test_a_second_backward_through_a_prepared_loss(kept_calls):
    spec = rw.methods.dapo()
    batch = batch_of(spec, 0)
    for _ in range(2):
        z = batch["logits"].clone().requires_grad_()
        loss = rw.policy_loss(**{**batch, "logits": z}, spec=spec).loss
        loss.backward(retain_graph=True)
        with pytest.raises(ReweightOpsError, match="a second backward"):
            loss.backward()
        with pytest.raises(rw.UnsupportedRequest, match="create_graph=True"):
            torch.autograd.grad(
                rw.policy_loss(**{**batch, "logits": z}, spec=spec).loss, z, create_graph=True
            )
