"""What every pair loss does with its rows: exact gradients, pairs that are out,
layouts, and parts of a batch.
"""

from __future__ import annotations

import pytest
import torch
from pair_rows import P, T, batch

import reweight_ops as rw
from reweight_ops import preference
from reweight_ops._core.catalogue.registry import CATALOGUE
from reweight_ops.testing.pairs import pair_inputs


def call_all(name, dtype=torch.float64):
    """The spec of a registered pair loss and keywords that satisfy it."""
    entry = CATALOGUE["pair_loss"][name]
    spec = entry.build()
    rows = 2 * P // spec.group_size * spec.group_size
    logps, ref, old, p_sq, mask = (x[:rows] for x in batch(dtype))
    g = torch.Generator().manual_seed(9)
    given = {"completion_mask": mask, "pairs": "interleaved"}
    needs = {
        "ref": ("ref_per_token_logps", ref),
        "ref_tokens": ("ref_per_token_logps", ref),
        "old": ("old_per_token_logps", old),
    }
    needs["log_sum_p_sq"] = ("log_sum_p_sq", p_sq.nan_to_num(0))
    given |= {needs[need][0]: needs[need][1] for need in spec.requires & set(needs)} | pair_inputs(
        spec, (rows, T), dtype, g
    )
    if spec.tokens != "completion":
        given["completion_ids"] = torch.randint(0, 3, (rows, T), generator=g)
    return spec, logps, given


@pytest.mark.parametrize("name", sorted(CATALOGUE["pair_loss"]))
def test_every_method_has_exact_gradients(name):
    spec, logps, given = call_all(name)
    detached = rw.preference_loss_from_logps(logps, spec=spec, **given)
    assert detached.loss.isfinite() and detached.loss.dtype == torch.float64
    x = logps.nan_to_num(0).requires_grad_()
    # detached factors: finite differences would move them
    if spec.weights or name == "ens_loss":
        (grad,) = torch.autograd.grad(rw.preference_loss_from_logps(x, spec=spec, **given).loss, x)
        assert grad.isfinite().all() and grad.any()
    else:
        assert torch.autograd.gradcheck(
            lambda y: rw.preference_loss_from_logps(y, spec=spec, **given).loss, (x,)
        )
        (grad,) = torch.autograd.grad(rw.preference_loss_from_logps(x, spec=spec, **given).loss, x)
    assert (grad[~given["completion_mask"]] == 0).all()


@pytest.mark.parametrize("name", sorted(CATALOGUE["pair_loss"]))
def test_pairs_that_are_out_change_nothing(name):
    spec, logps, given = call_all(name)
    if name == "ens_loss":
        pytest.skip("the number of draws is the number of pairs")
    whole = rw.preference_loss_from_logps(logps, spec=spec, **given)
    extra = spec.group_size

    def longer(x):
        if not isinstance(x, torch.Tensor):
            return x
        rows = extra if x.dim() == 2 else 1
        return torch.cat([x, torch.zeros(rows, *x.shape[1:], dtype=x.dtype)])

    padded = rw.preference_loss_from_logps(
        longer(logps), spec=spec, **{k: longer(v) for k, v in given.items()}
    )
    torch.testing.assert_close(padded.loss, whole.loss, rtol=1e-12, atol=0)
    assert padded.per_pair_loss[-1] == 0 and {
        k: float(v) for k, v in padded.metrics.items()
    } == pytest.approx({k: float(v) for k, v in whole.metrics.items()})


@pytest.mark.parametrize("name", ["dpo", "wpo", "simpo", "inpo"])
def test_all_masked_is_a_differentiable_zero(name):
    spec, logps, given = call_all(name, torch.float32)
    x = logps.requires_grad_()
    out = rw.preference_loss_from_logps(
        x, spec=spec, **{**given, "completion_mask": torch.zeros(2 * P, T)}
    )
    (grad,) = torch.autograd.grad(out.loss, x)
    assert out.loss == 0 and (grad == 0).all()


def test_layouts_agree():
    logps, ref, _, _, mask = batch()
    halves = rw.preference_loss_from_logps(
        logps, spec="dpo", completion_mask=mask, ref_per_token_logps=ref
    )
    order = torch.arange(2 * P).view(2, P).T.reshape(-1)
    mixed = rw.preference_loss_from_logps(
        logps[order],
        spec="dpo",
        completion_mask=mask[order],
        ref_per_token_logps=ref[order],
        pairs="interleaved",
    )
    assert torch.equal(halves.per_pair_loss, mixed.per_pair_loss)
    lengths = mask.sum(-1)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for spec in ("dpo", preference.dpo(ld_alpha=0.5), preference.ipo()):
        want = rw.preference_loss_from_logps(
            logps, spec=spec, completion_mask=mask, ref_per_token_logps=ref
        ).loss
        packed = rw.preference_loss_from_logps(
            logps[mask], spec=spec, cu_seqlens=cu, ref_per_token_logps=ref[mask]
        )
        torch.testing.assert_close(packed.loss, want, rtol=1e-14, atol=0)
    owner = torch.repeat_interleave(torch.arange(2 * P), lengths)
    by_id = rw.preference_loss_from_logps(
        logps[mask],
        spec="dpo",
        sequence_ids=owner,
        num_sequences=2 * P,
        ref_per_token_logps=ref[mask],
    )
    torch.testing.assert_close(by_id.loss, halves.loss, rtol=1e-14, atol=0)
    sums = torch.where(mask, ref, 0).sum(-1)
    stored = rw.preference_loss_from_logps(
        logps, spec="dpo", completion_mask=mask, ref_sequence_logps=sums
    )
    torch.testing.assert_close(stored.loss, halves.loss, rtol=1e-14, atol=0)


def test_accumulation_and_loss_scale():
    logps, ref, _, _, mask = batch()

    def part(i, **more):
        rows = torch.tensor([i, i + 1, P + i, P + i + 1])
        return rw.preference_loss_from_logps(
            logps[rows],
            spec="dpo",
            completion_mask=mask[rows],
            ref_per_token_logps=ref[rows],
            **more,
        )

    whole = rw.preference_loss_from_logps(
        logps, spec="dpo", completion_mask=mask, ref_per_token_logps=ref
    )
    torch.testing.assert_close(sum(part(i, num_pairs_in_batch=P).loss for i in (0, 2)), whole.loss)
    torch.testing.assert_close(part(0, loss_scale=torch.tensor(8.0)).loss, 8 * part(0).loss)
    combined = rw.Metrics.combine([part(0).metrics, part(2).metrics])
    assert {k: float(v) for k, v in combined.items()} == pytest.approx(
        {k: float(v) for k, v in whole.metrics.items()}
    )
