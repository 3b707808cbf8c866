"""Divergences and distillation from hidden states: refused calls, and explain."""

import pytest
import torch

import reweight_ops as rw

WRONG = {
    "kind": (dict(kind="kl"), "kind is 'kl', expected one of forward_kl, .*generalized_jsd"),
    "beta": (dict(beta=0.5), "beta belongs to kind='generalized_jsd'"),
    "beta range": (dict(kind="generalized_jsd", beta=0.0), r"beta is 0.0, expected a number in \(0, 1\)"),
    "no teacher": (dict(other=None), "other is a NoneType, expected a HiddenLogits, a TopKLogps, or logits"),
    "columns": (dict(other=rw.HiddenLogits(torch.zeros(2, 3, 4), torch.zeros(9, 4))), "logits have 7 columns, other_logits 9: pass vocab_size"),
    "logits columns": (dict(other=torch.zeros(2, 3, 9)), "logits have 7 columns, other_logits 9: pass vocab_size"),
    "vocab_size": (dict(other=torch.zeros(2, 3, 5), vocab_size=6), "vocab_size is 6, other_logits have 5 columns"),
    "rows": (dict(other=torch.zeros(2, 4, 7)), r"other_logits has shape \(2, 4, 7\), expected \(2, 3\)"),
    "hidden rows": (dict(other=rw.HiddenLogits(torch.zeros(2, 4, 4), torch.zeros(7, 4))), r"linear_token_divergence, other: hidden has shape \(2, 4, 4\)"),
    "width": (dict(other=rw.HiddenLogits(torch.zeros(2, 3, 4), torch.zeros(7, 5))), r"other: lm_head_weight has shape \(7, 5\), expected \(V, 4\)"),
    "grad": (dict(other=rw.HiddenLogits(torch.zeros(2, 3, 4), torch.zeros(7, 4, requires_grad=True))), "other.lm_head_weight requires grad"),
    "logits grad": (dict(other=torch.zeros(2, 3, 7, requires_grad=True)), "other_logits require grad"),
    "fp64 beside fp32": (dict(other=rw.HiddenLogits(torch.zeros(2, 3, 4).double(), torch.zeros(7, 4).double())), "fp64 for both or for none"),
    "softcap": (dict(other_softcap=-1.0), "softcap is -1.0"),
    "temperature": (dict(other_temperature=0.0), r"other_temperature is 0.0, expected a number in \(0, inf\)"),
    "consume": (dict(consume_logits=True), "consume_logits is for an op that takes logits"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case):
    options, message = WRONG[case]
    other = rw.HiddenLogits(torch.zeros(2, 3, 4), torch.zeros(7, 4))
    with pytest.raises(rw.InvalidCall, match=message):
        rw.linear_token_divergence(
            torch.zeros(2, 3, 5), torch.zeros(7, 5), **{"other": other, **options}
        )


def test_unknown_keywords_and_no_hidden_states():
    t = rw.HiddenLogits(h := torch.zeros(2, 3, 5), w := torch.zeros(7, 5))
    with pytest.raises(TypeError, match="Did you mean teacher_softcap"):
        rw.linear_distillation_loss(h, w, t, teacher_softcaps=1.0)
    with pytest.raises(rw.InvalidCall, match=r"hidden must be a tensor R \+ \(D,\)"):
        rw.linear_token_divergence(None, w, t)
    with pytest.raises(rw.InvalidCall, match="token_weights require grad"):
        rw.linear_distillation_loss(h, w, t, token_weights=torch.ones(2, 3, requires_grad=True))


def test_explain():
    h, w = torch.empty(2, 3, 5, device="meta", requires_grad=True), torch.empty(7, 5, device="meta")
    t = rw.HiddenLogits(torch.empty(2, 3, 4, device="meta"), torch.empty(7, 4, device="meta"))
    found = rw.explain(rw.linear_distillation_loss, h, w, t, device="cpu", backend="reference")
    assert (found.plan, found.backend) == ("one_pass", "reference")
    found = rw.explain(
        rw.linear_token_divergence,
        h,
        w,
        t,
        kind="generalized_jsd",
        device="cpu",
        backend="reference",
    )
    assert (found.plan, found.one_pass_unsupported_reason) == (
        "two_pass",
        "there is no loss to fuse: these are statistics",
    )
