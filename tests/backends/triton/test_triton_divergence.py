"""Two logits tensors on Triton, with rows of several tiles and segments: accuracy, and
equal bits of split rows.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from divergence_criterion import assert_accurate
from sure_rows import CAPS, assert_divergences_kept, sure_pairs, transformed_pairs
from triton_oracle import DEVICE

from reweight_ops._core.backends import triton_divergence as backend
from reweight_ops._core.backends import triton_launch as tokens
from reweight_ops._core.backends.base import DivergenceInputs, SoftmaxParams
from reweight_ops._core.rows.groups import IGNORE_INDEX
from reweight_ops.triton_kernels.config import Config, Launch

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    def config(columns: int, itemsize: int, other_itemsize: int) -> Config:
        launch = Launch(32, 128)
        vector = 16 // min(itemsize, other_itemsize)
        return Config(64 // vector, 2, vector, 256, launch, launch, launch, 2)

    monkeypatch.setattr(backend, "divergence_config", config)


@pytest.mark.parametrize(
    ("case", "kind", "dtype"),
    [
        ("shifted", "forward_kl", F32),
        ("close", "reverse_kl", F32),
        ("cap", "symmetric_cross_entropy", BF16),
    ],
    ids=str,
)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_accuracy(case, kind, dtype, split, monkeypatch):
    monkeypatch.setattr(tokens, "processors", lambda device: 10**6 if split else 0)
    assert_accurate("triton", case, kind, dtype)


@pytest.mark.parametrize(
    ("dtype", "split", "vocab", "step"),
    [
        (F32, False, 129, 53),
        # more and longer rows, which take a minute in the interpreter
        *(
            pytest.param(dtype, split, 1003, 5, marks=pytest.mark.slow)
            for dtype in (F32, F16, BF16)
            for split in (False, True)
        ),
    ],
    ids=str,
)
def test_sure_tokens(dtype, split, vocab, step, monkeypatch):
    monkeypatch.setattr(tokens, "processors", lambda device: 10**6 if split else 0)
    pairs = sure_pairs(vocab, dtype)
    assert_divergences_kept(backend, pairs.some(step))


@pytest.mark.parametrize("caps", CAPS, ids=str)
def test_sure_tokens_at_temperatures_and_soft_caps(caps):
    """Two rows of p and three of q have their mass next to the largest column, where
    it is summed again.
    """
    pairs = transformed_pairs(129, F32, caps)
    assert_divergences_kept(backend, pairs.some(42))


#: About 20 seconds each in the interpreter: the other pairs are slow tests.
USUAL = {((BF16, BF16), False), ((F32, F32), True)}


@pytest.mark.parametrize(
    "dtypes, in_place",
    [
        pytest.param(
            dtypes,
            in_place,
            id=f"{dtypes}-{'in place' if in_place else 'apart'}",
            marks=() if (dtypes, in_place) in USUAL else pytest.mark.slow,
        )
        for dtypes in [(F32, F32), (BF16, BF16), (F16, F32), (F32, BF16)]
        for in_place in (False, True)
    ],
)
def test_splitting_rows_changes_no_bit(dtypes, in_place, monkeypatch):
    """Also, it launches only its slots, their merge and the gradient."""
    # 4 segments; the last tile and the last vector are not whole, and padding follows
    n, v = 5, 1003
    g = torch.Generator().manual_seed(0)
    x, y = (4 * torch.randn(n, v + 300, generator=g).to(DEVICE) for _ in range(2))
    x[2, 40:300] = -math.inf
    ids = torch.tensor([0, IGNORE_INDEX, 0, 0, 0], device=DEVICE)
    t = torch.linspace(0.5, 1.5, n, device=DEVICE)
    softmax = SoftmaxParams(v)
    derivatives = torch.tensor(
        [[1.0, 0, -1, 0.5, 0], [0, 1, 0, -0.5, 0], [1, 1, 1, 0, 0]], device=DEVICE
    )
    launched = []
    launch = tokens.launch
    monkeypatch.setattr(
        tokens,
        "launch",
        lambda kernel, *a, **k: (launched.append(kernel.fn.__name__), launch(kernel, *a, **k))[1],
    )

    def run(yes: bool):
        monkeypatch.setattr(tokens, "processors", lambda device: 10**6 if yes else 0)
        logits = x.to(dtypes[0])
        two = DivergenceInputs(
            logits, y.to(dtypes[1]), ids, t, t.flip(0).contiguous(), softmax, softmax
        )
        table = backend.divergence_stats(two)
        out = logits.clone() if in_place else torch.full_like(logits, math.nan)
        backend.divergence_grad(
            two._replace(logits=out) if in_place else two, table, derivatives, out
        )
        fused = logits.clone() if in_place else torch.full_like(logits, math.nan)
        both = backend.divergence_loss_grad(
            two._replace(logits=fused) if in_place else two,
            torch.ones(3, device=DEVICE),
            derivatives[0],
            fused,
        )
        return table, out, both, fused

    whole = run(False)
    assert launched == ["divergence_kernel"] * 3
    launched.clear()
    cut = run(True)
    pair = ["partial_divergence_kernel", "divergence_kernel"]
    assert launched == [*pair, "divergence_kernel", *pair, "divergence_kernel"]
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (BF16, BF16),
        pytest.param((F32, F32), marks=pytest.mark.slow),
        pytest.param((F32, BF16), marks=pytest.mark.slow),
        pytest.param((F16, F32), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_gradient_has_the_same_bits_at_every_address(dtypes, split, monkeypatch):
    """Both tensors and the gradient begin anywhere. A row has columns before the first
    multiple of 16 bytes, a vector that is not whole, and padding.
    """
    monkeypatch.setattr(tokens, "processors", lambda device: 10**6 if split else 0)
    n, width = 3, 300
    g = torch.Generator().manual_seed(1)
    rows = [(4 * torch.randn(n, width, generator=g)).to(dtype) for dtype in dtypes]
    ids, t = torch.tensor([0, IGNORE_INDEX, 0]), torch.linspace(0.5, 1.5, n)
    derivatives = torch.tensor([[1.0, 0, -1], [0.5, 1, 0], [1, 1, 1]])
    softmax = SoftmaxParams(width - 23)

    def placed(values, start):
        memory = torch.full((n, width + 24), math.nan, dtype=values.dtype)
        at = memory[:, start : start + width]
        at.copy_(values)
        return memory, at

    def gradients(x_start, y_start, out_start):
        found = []
        for fused in (False, True):
            memory, x = placed(rows[0], x_start)
            y = placed(rows[1], y_start)[1]
            out_memory, out = (memory, x) if out_start is None else placed(rows[0], out_start)
            two = DivergenceInputs(x, y, ids, t, t.flip(0).contiguous(), softmax, softmax)
            if fused:
                backend.divergence_loss_grad(two, torch.ones(3), derivatives[0], out)
            else:
                backend.divergence_grad(two, backend.divergence_stats(two), derivatives, out)
            start = x_start if out_start is None else out_start
            assert out_memory[:, :start].isnan().all()
            assert out_memory[:, start + width :].isnan().all()
            found.append(out)
        return torch.stack(found)

    want = gradients(0, 0, 0)
    assert not want[:, 1].any() and not want[..., softmax.vocab_size :].any()
    for place in ((3, 3, 3), (3, 3, None), (1, 2, 3), (0, 0, 1), (2, 0, 0)):
        assert torch.equal(gradients(*place), want), place
