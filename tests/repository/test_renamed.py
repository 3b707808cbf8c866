"""Old names: an error or a warning says the new one."""

import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops import kernels


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [(rw, "Constraint", "HingeConstraint"), (rw.rules, "LEAVES", "TOKEN_FIELDS")],
)
def test_an_old_name_warns_of_its_new_one(module, old, new):
    with pytest.warns(DeprecationWarning, match=rf"\b{old} is called .*\b{new} now"):
        assert getattr(module, old) is getattr(module, new)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_an_old_attribute_of_an_explanation_warns_of_its_new_name():
    z, ids = torch.randn(1, 2, 5, requires_grad=True), torch.tensor([[1, 2]])
    told = rw.explain(rw.policy_loss, z, ids, 1.0, spec="gspo")
    with pytest.warns(DeprecationWarning, match="is called one_pass_unsupported_reason now"):
        assert told.why_not_one_pass == told.one_pass_unsupported_reason
    assert told.plan == "two_pass" and told.one_pass_unsupported_reason
    with pytest.raises(AttributeError, match="has no attribute 'why'"):
        told.why  # noqa: B018


def test_the_raw_kernels_name_the_keyword_that_took_the_place_of_an_old_one():
    z, ids, one = torch.randn(2, 5), torch.tensor([1, 2]), torch.ones(1)
    softmax = kernels.SoftmaxParams(5)
    with pytest.raises(TypeError, match=r"token_stats\(\) .*'head'. Here it is softmax\."):
        kernels.token_stats(z, ids, one, head=softmax)
    stats = dict(
        zip(
            ("logp", "lse"),
            kernels.token_stats(z, ids, one, softmax=softmax, stats=("logp", "lse")),
            strict=True,
        )
    )
    with pytest.raises(TypeError, match=r"token_grad\(\) .*'coefs'. Here it is derivatives\."):
        kernels.token_grad(z, ids, one, stats, coefs={})
    derivatives = {"logp": -torch.ones(2)}
    grad = kernels.token_grad(
        z, ids, one, stats, derivatives=derivatives, softmax=softmax, backend="reference"
    )
    torch.testing.assert_close(
        grad, z.softmax(-1) - torch.nn.functional.one_hot(ids, 5), rtol=0, atol=1e-6
    )
    with pytest.raises(TypeError, match=r"RowInputs\(\) .*'weights'. Here it is row_weights\."):
        kernels.RowInputs(weights=torch.ones(1, 2))
    assert kernels.RowInputs(row_weights=one).row_weights is one


def test_a_reduction_with_the_old_method_is_told_the_new_one():
    class Old(rw.Reduction):
        coupled = True

        def row_weights(self, rows, divisors, weight=None):
            return rw.TokenMean().row_weights(rows, divisors)

        def shares(self, rows, weighted, adv):
            return weighted

    spec = rw.methods.reinforce().replace(reduction=Old())
    with pytest.raises(
        NotImplementedError,
        match=r"no contributions\(self, rows, weighted, adv\) \(it has shares\(\)",
    ):
        rw.policy_loss(torch.randn(1, 2, 5), torch.tensor([[1, 2]]), math.pi, spec=spec)
