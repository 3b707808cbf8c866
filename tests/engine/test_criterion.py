"""The accuracy criterion on batches where fuzzing found it wrong."""

import dataclasses

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.backends.select import load
from reweight_ops.testing import compare, make_batch


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_batch_without_rows_passes(shape):
    rows = torch.zeros(shape)
    batch = {
        "logits": rows.new_zeros(*shape, 7),
        "completion_ids": rows.long(),
        "advantages": rows,
        "completion_mask": rows.bool(),
    }
    assert compare(rw.methods.grpo(), batch, backend="reference").passed


def far_batch():
    """Unlikely targets. CISPO's loss has the log-prob, and so has its weight, whose
    gradient is stopped.
    """
    batch = make_batch(rw.methods.cispo(), (4, 8), 31)
    batch["logits"] = batch["logits"].detach() * 8
    batch["old_per_token_logps"] = rw.token_logps(
        batch["logits"].double(), batch["completion_ids"], backend="reference"
    ).float()
    return batch


def test_a_stopped_gradient_is_part_of_the_losss_conditioning(monkeypatch):
    """Errors of four roundings in the log-probs do not count as an error of the loss;
    errors of a hundred do.
    """

    def moved_by(roundings):
        def token_loss_grad(logits, ids, temperature, softmax, inputs, program, params, out):
            rows = load("reference").token_loss_grad(
                logits, ids, temperature, softmax, inputs, program, params, out
            )
            # the loss if every log-prob has this error
            if logits.dtype == torch.float32:
                logp, adv = rows[0].double(), inputs.adv.double()
                wrong = logp * (1 + roundings * 2.0**-24)
                rows[2] = (
                    inputs.row_weights[0]
                    * -(torch.exp(wrong - inputs.old_logp).clamp(max=5.0))
                    * adv
                    * wrong
                ).float()
            return rows

        return dataclasses.replace(load("reference"), name="cpu", token_loss_grad=token_loss_grad)

    batch = far_batch()
    for roundings, passes in ((0, True), (2, True), (100, False)):
        monkeypatch.setitem(select._loaded, "cpu", moved_by(roundings))
        found = compare(rw.methods.cispo(ratio_max=5.0), batch, backend="cpu", plan="one_pass")
        assert (found.loss <= 1) is passes, (roundings, found)
