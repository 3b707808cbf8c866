"""Invariants in fp64, where only rounding of the last digits is between two ways to say
the same: layouts of sequences, plans, heads in chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from drawn_calls import PolicyCall, fuzz, lengths, log_probs, mask_of, packed, policy_calls
from hypothesis import strategies as st

import reweight_ops as rw

#: They draw tokens by their places in the call.
BY_PLACE = ("clip_cov",)
EXACT = dict(rtol=1e-9, atol=1e-11)


def gradient(call: PolicyCall, batch, plan=None):
    z = batch["logits"].detach().requires_grad_()
    out = rw.policy_loss(
        **{**batch, "logits": z},
        spec=call.spec,
        plan=plan or call.plan,
        backend="reference",
        **call.head(),
    )
    (grad,) = torch.autograd.grad(out.loss.sum(), z)
    return out.loss.detach(), grad


def is_the_same_packed_permuted_and_in_two_passes(call: PolicyCall):
    batch, (s, t) = call.batch(), call.shape
    loss, grad = gradient(call, batch)
    torch.testing.assert_close(gradient(call, batch, "two_pass"), (loss, grad), **EXACT)
    if not s:
        return
    flat = packed(batch, call.shape)
    options = {
        name: x.reshape(-1) if isinstance(x, torch.Tensor) else x for name, x in call.head().items()
    }
    in_a_row = replace(call, packed=True)
    assert options.keys() == in_a_row.head().keys()
    torch.testing.assert_close(gradient(in_a_row, flat), (loss, grad.flatten(0, 1)), **EXACT)
    # sequence_ids instead of offsets, and every row in another place
    order = torch.randperm(s * t, generator=call.generator)
    mixed = {
        name: x[order]
        if isinstance(x, torch.Tensor) and x.shape[:1] == (s * t,) and s * t != s
        else x
        for name, x in flat.items()
    }
    del mixed["cu_seqlens"]
    mixed |= {"sequence_ids": (torch.arange(s * t) // t)[order], "num_sequences": s}
    if s * t != s and "row" not in dict(call.options).values() and call.method not in BY_PLACE:
        torch.testing.assert_close(
            gradient(in_a_row, mixed), (loss, grad.flatten(0, 1)[order]), **EXACT
        )
    # sequences in another order
    order = torch.randperm(s, generator=call.generator)
    moved = {name: x[order] if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    if "row" not in dict(call.options).values() and call.method not in BY_PLACE:
        torch.testing.assert_close(gradient(call, moved), (loss, grad[order]), **EXACT)


@pytest.mark.parametrize("examples, repeatable", lengths(30, 4000))
def test_layouts(examples, repeatable):
    calls = policy_calls(["reference"], dtypes=("fp64",)).filter(lambda call: not call.packed)
    fuzz(is_the_same_packed_permuted_and_in_two_passes, calls, examples, repeatable)


@dataclass(frozen=True)
class HeadCall:
    """A policy loss and log-probs from hidden states."""

    seed: int
    method: str
    plan: str
    shape: tuple[int, int]
    mask: str
    bias: bool
    lora: bool
    softcap: float | None
    scale: float
    temperature: float
    chunk_rows: int
    compact_rows: bool | None
    vocab_size: int | None


def head_calls() -> st.SearchStrategy:
    return st.builds(
        HeadCall,
        st.integers(0, 2**16),
        st.sampled_from(["grpo", "gspo", "cispo", "top_entropy", "sft", "opsm"]),
        st.sampled_from(["auto", "two_pass"]),
        st.sampled_from([(2, 3), (1, 1), (3, 5), (0, 2), (2, 0)]),
        st.sampled_from(["none", "random", "ragged", "numbers", "empty"]),
        st.booleans(),
        st.booleans(),
        st.sampled_from([None, 4.0]),
        st.sampled_from([1.0, 0.3]),
        st.sampled_from([1.0, 0.6]),
        st.sampled_from([1, 2, 3, 4, 64]),
        st.sampled_from([None, True, False]),
        st.sampled_from([None, 13]),
    )


def is_the_loss_of_its_logits(call: HeadCall):
    g, spec = torch.Generator().manual_seed(call.seed), rw.METHODS[call.method].build()
    v, d = 17, 5

    def leaf(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).requires_grad_()

    leaves = {"hidden": leaf(*call.shape, d), "weight": leaf(v, d)}
    leaves |= {"bias": leaf(v)} if call.bias else {}
    leaves |= {"a": leaf(2, d), "b": leaf(v, 2)} if call.lora else {}
    ids = torch.randint(0, call.vocab_size or v, call.shape, generator=g)
    mask = None if call.mask == "none" else mask_of(call.mask, call.shape, g)
    weight = leaves["weight"] + (0.5 * leaves["b"] @ leaves["a"] if call.lora else 0)
    logits = call.scale * torch.nn.functional.linear(leaves["hidden"], weight, leaves.get("bias"))
    options = {
        "completion_mask": mask,
        "softcap": call.softcap,
        "temperature": call.temperature,
        "vocab_size": call.vocab_size,
    }
    data = {"advantages": leaf(call.shape[0], 1).detach() if "adv" in spec.requires else None}
    old = log_probs(logits.detach(), ids, call.vocab_size or v, call.temperature, call.softcap)
    if "log_ratio" in spec.requires or "old_logp" in spec.requires:
        data["old_per_token_logps"] = old + 0.4 * leaf(*call.shape).detach()
    expected = rw.policy_loss(
        logits, ids, **data, **options, spec=spec, plan=call.plan, backend="reference"
    ).loss
    head = {
        "lm_head_bias": leaves.get("bias"),
        "logit_scale": call.scale,
        "chunk_rows": call.chunk_rows,
        "compact_rows": call.compact_rows,
    }
    head |= {"lora": rw.Lora(leaves["a"], leaves["b"], 0.5)} if call.lora else {}
    hidden = leaves["hidden"]
    if mask is not None:  # what an ignored row holds reaches nothing
        hidden = torch.where((mask != 0)[..., None], hidden, math.nan)
    found = rw.linear_policy_loss(
        hidden,
        leaves["weight"],
        ids,
        **data,
        **options,
        **head,
        spec=spec,
        plan=call.plan,
        backend="reference",
    ).loss
    inputs = list(leaves.values())
    torch.testing.assert_close(
        (found, *torch.autograd.grad(found, inputs)),
        (expected, *torch.autograd.grad(expected, inputs)),
        rtol=1e-9,
        atol=1e-11,
    )


@pytest.mark.parametrize("examples, repeatable", lengths(30, 4000))
def test_heads(examples, repeatable):
    fuzz(is_the_loss_of_its_logits, head_calls(), examples, repeatable)
