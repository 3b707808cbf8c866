"""Rows with one very likely token on Triton: log-prob and gradient keep their digits.

Large common offsets cost no digits (tests/support/sure_rows.py).
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sure_rows import TOLERANCE, SureRows, sure_rows, worst
from triton_oracle import DEVICE, default_params, small_config

from reweight_ops._core.backends import triton_launch
from reweight_ops._core.backends import triton_token as backend
from reweight_ops._core.backends.base import RowInputs, SoftmaxParams
from reweight_ops._core.formula.loss_program import Program

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: V, dtype, offset, tiles, and whether rows are split over programs. V = 1003 has
#: segments and a vector that is not whole.
NARROW = [
    (9, F32, 0.0, "real", False),
    (9, BF16, 300.0, "real", False),
    (257, F32, 300.0, "real", False),
]
WIDE = [
    (257, F16, 0.0, "real", False),
    (1003, F32, 0.0, "small", False),
    (1003, F32, 0.0, "small", True),
    (1003, BF16, 0.0, "small", True),
    (5003, F32, 0.0, "real", False),
    (5003, BF16, 0.0, "real", True),
]
#: All wide rows take up to a minute in the interpreter, so they are slow tests. One of
#: seven rows gives ten of the eleven margins and every place of the runner-up.
CASES = [(*case, 1) for case in NARROW] + [
    pytest.param(*case, every, marks=pytest.mark.slow if every == 1 else ())
    for case in WIDE
    for every in (1, 7)
]
REINFORCE = Program.of(("reinforce",))


def measure(rows, temperature: float = 1.0):
    """``(logp, logp, 1 - p, 1 - p)`` of statistics, one pass, the gradient primitive
    and one pass.
    """
    n, vocab = rows.logits.shape
    logits, ids = rows.logits.to(DEVICE), rows.ids.to(DEVICE)
    given = (logits, ids, torch.full((1,), temperature, device=DEVICE), SoftmaxParams(vocab))
    logp, lse, low = backend.token_stats(*given, ("logp", "lse", "lse_low"))
    one = torch.ones(n, device=DEVICE)
    out, fused = torch.empty_like(logits), torch.empty_like(logits)
    backend.token_grad(*given, {"logp": logp, "lse": lse, "lse_low": low}, {"logp": one}, out)
    inputs = RowInputs(one[None], adv=-one)  # the loss of REINFORCE is logp then
    found = backend.token_loss_grad(
        *given, inputs, REINFORCE, default_params(REINFORCE).to(DEVICE), fused
    )
    slopes = [g.gather(-1, ids[:, None])[:, 0].float().cpu() * temperature for g in (out, fused)]
    return logp.cpu(), found[0].cpu(), *slopes


@pytest.mark.parametrize(
    "vocab, dtype, offset, tiles, split, every", CASES, ids=lambda x: str(x).removeprefix("torch.")
)
def test_sure_rows_keep_log_prob_and_gradient(
    vocab, dtype, offset, tiles, split, every, monkeypatch
):
    if tiles == "small":
        monkeypatch.setattr(backend, "config_for", small_config)
    monkeypatch.setattr(triton_launch, "processors", lambda device: 10**6 if split else 0)
    rows = SureRows(*(part[::every].contiguous() for part in sure_rows(vocab, dtype, offset)))
    logp, fused_logp, slope, fused_slope = measure(rows)
    assert torch.equal(logp, fused_logp)
    assert worst(logp, rows.logp) <= TOLERANCE
    # A gradient is rounded to the dtype of the logits: gradients that fp16 or bf16
    # cannot hold are not checked.
    kept = rows.one_minus_p >= torch.finfo(dtype).tiny
    assert worst(slope[kept], rows.one_minus_p[kept]) <= TOLERANCE
    assert worst(fused_slope[kept], rows.one_minus_p[kept]) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("offset", [1e10, -1e30, 1e30])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_large_common_offsets_are_none(offset, dtype, temperature):
    logits = torch.full((1, 9), offset).to(dtype)
    rows = type(sure_rows(9))(
        logits, torch.tensor([4]), torch.tensor([-9.0]).log(), torch.tensor([8 / 9])
    )
    logp, _, slope, fused_slope = measure(rows, temperature)
    assert logp.item() == pytest.approx(-2.1972246, rel=1e-6)
    assert slope.item() == pytest.approx(8 / 9, rel=4e-3 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(slope, fused_slope)
