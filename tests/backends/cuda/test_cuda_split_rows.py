"""Few long rows of two logits tensors, each shared by a cluster of blocks.

They run thread by thread on the CPU. They must have the bits of rows that one block
takes, whose accuracy test_cuda_divergence.py checks.
"""

from __future__ import annotations

import importlib
import math
import sys
import types

import pytest
import torch
from cuda_emulation.fixtures import SCHEDULES, emulated
from divergence_rows import CONSTANTS, DTYPES, assert_accurate, both_plans, make
from sure_rows import assert_divergences_kept, sure_pairs

import reweight_ops
from reweight_ops._core.backends import select
from reweight_ops._core.backends.native_divergence import NativeDivergence
from reweight_ops._core.backends.sources import source_hash
from reweight_ops._core.engine.plan import Choice
from reweight_ops._core.rows.groups import IGNORE_INDEX


@pytest.fixture(scope="module")
def kernels():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that is not written holds NaN
    module, native = emulated()
    yield module, NativeDivergence(native)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


#: Row lengths by the number of blocks that share a row. The last slice has fewer groups
#: of columns than the others, and columns after them.
SHARED = {2: 33003, 4: 65549, 8: 131101}


@pytest.fixture
def split(kernels):
    kernels[0].set_schedule("random", 1)
    kernels[0].set_divergence_kernel("split")
    yield kernels[1]
    kernels[0].set_divergence_kernel("auto")


def whole_rows(module, primitives, two, constants, weights):
    """The results of blocks that take whole rows, in a fixed order."""
    module.set_divergence_kernel("whole")
    module.set_schedule("eager", 0)
    out = torch.full_like(two.logits, math.nan)
    table = primitives.divergence_loss_grad(two, constants, weights, out)
    module.set_divergence_kernel("split")
    return table, out


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_rows_are_accurate(split, dtype):
    assert_accurate(split, make(2, SHARED[2], DTYPES[dtype]), CONSTANTS["all"])


@pytest.mark.parametrize("blocks", SHARED)
def test_the_documented_slices(kernels, blocks):
    assert kernels[0].divergence_blocks(SHARED[blocks]) == blocks
    assert kernels[0].divergence_blocks(32768) == 1 and kernels[0].divergence_blocks(32776) == 2


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("blocks", [2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_split_rows_have_the_bits_of_whole_rows(kernels, split, blocks, schedule):
    """Under every schedule; the second row is ignored, the third has zeros in the last
    slice only.
    """
    module, v = kernels[0], SHARED[blocks]
    two = make(3, v, torch.bfloat16, case="per_row")._replace(
        ids=torch.tensor([0, IGNORE_INDEX, 1])
    )
    two.logits[2, -40000 // blocks :] = -math.inf
    constants, weights = torch.tensor(CONSTANTS["forward"]), torch.linspace(0.5, 2, 3)
    want_table, want = whole_rows(module, split, two, constants, weights)
    module.set_schedule(schedule, 3)
    for plan, table, grad in both_plans(split, two, constants, weights):
        assert torch.equal(table, want_table) and torch.equal(grad, want), plan


@pytest.mark.parametrize(("dtype", "other"), [("bf16", "fp32"), ("fp32", "fp16"), ("fp16", "bf16")])
def test_split_rows_at_any_address(kernels, split, dtype, other):
    """Views in NaNs, with padding: the bits are those of whole, aligned rows, and
    nothing is written outside of a row.
    """
    v = SHARED[2]
    two = make(3, v, DTYPES[dtype], DTYPES[other])
    constants, weights = torch.tensor(CONSTANTS["all"]), torch.linspace(0.5, 2, 3)
    want_table, want = whole_rows(kernels[0], split, two, constants, weights)
    for starts in ((1, 3, 2), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        wholes = [
            torch.full((3, -(-v // 8) * 8 + 16), math.nan, dtype=t.dtype)
            for t in (two.logits, two.other, two.logits)
        ]
        x, y, out = (w[:, s : v + s + 4] for w, s in zip(wholes, starts, strict=True))
        x[:, :v], y[:, :v] = two.logits, two.other
        got = split.divergence_loss_grad(two._replace(logits=x, other=y), constants, weights, out)
        assert torch.equal(got, want_table) and torch.equal(out[:, :v], want), starts
        around, s = wholes[2], starts[2]
        assert (out[:, v:] == 0).all() and around[:, v + s + 4 :].isnan().all(), starts
        assert around[:, :s].isnan().all(), starts


def test_sure_tokens_in_split_rows(split):
    """The largest columns are in both slices."""
    pairs = sure_pairs(SHARED[2], torch.bfloat16)
    assert_divergences_kept(split, pairs.some(41))


def test_equal_logits_in_split_rows(split):
    """Every slice has a largest column, of which one is left out."""
    v = SHARED[8]
    z = torch.full((1, v), 3.0, dtype=torch.bfloat16)
    table = split.divergence_stats(make(1, v, torch.bfloat16)._replace(logits=z, other=z))
    assert table[2:4, 0].tolist() == pytest.approx([math.log(v)] * 2, rel=1e-6)


def test_split_rows_that_are_nan(split):
    """Every block fills its part: an infinite KL(p‖q), a NaN in the last slice, no
    coefficients.
    """
    two = make(3, SHARED[2], torch.bfloat16)._replace(ids=torch.arange(3))
    two.other[0, 20000], two.logits[1, -1] = -math.inf, math.nan
    constants, weights = torch.tensor(CONSTANTS["reverse"]), torch.tensor([1.0, 1.0, 0.0])
    for plan, table, grad in both_plans(split, two, constants, weights):
        assert table[1, 0] == math.inf and table[:4, 1].isnan().all(), plan
        assert grad[:2].isnan().all() and (grad[2] == 0).all(), plan


def test_which_rows_are_split(kernels):
    """Long rows that fill less than three quarters of the blocks, from Hopper on."""
    module, cuda = kernels

    def why(n, v, major=9, clusters=2):
        two = make(n, v, torch.bfloat16)
        module.set_device(major, 227 << 10, clusters)
        try:
            return module.split_unsupported_reason(*cuda._calls(two))
        finally:
            module.set_device(9, 227 << 10, 2)

    assert why(1, 32776) == ""
    assert why(1, 32768) == "a row of 32768 columns is short enough for one block"
    assert why(2, 32776) == "2 rows are enough for the 2 blocks that run at once"
    assert "older than Hopper" in why(1, 32776, major=8)
    assert why(1, 131101, clusters=0) == "the GPU cannot run a cluster of 8 blocks"
    module.set_divergence_kernel("whole")
    assert "chose whole rows" in why(1, 32776)
    module.set_divergence_kernel("split")
    assert why(2, 32776) == ""
    short, one = make(1, 100), torch.ones(1)
    with pytest.raises(AssertionError, match="status 801"):
        cuda.divergence_loss_grad(short, torch.ones(3), one, torch.empty_like(short.logits))
    module.set_divergence_kernel("auto")
    with pytest.raises(ValueError, match="expected auto, whole or split"):
        module.set_divergence_kernel("ring")


@pytest.fixture
def backend(kernels, monkeypatch):
    """The CUDA backend on the emulated module, also where none was built."""
    module = types.SimpleNamespace(
        **{name: getattr(kernels[0], name) for name in dir(kernels[0]) if name[0] != "_"},
        sources=source_hash("cuda"),
        __name__="_cuda_emulated",
    )
    monkeypatch.setitem(sys.modules, "reweight_ops._cuda", module)
    monkeypatch.setattr(reweight_ops, "_cuda", module, raising=False)
    monkeypatch.delitem(sys.modules, "reweight_ops._core.backends.cuda", raising=False)
    monkeypatch.setattr(select, "_loaded", {})
    yield importlib.import_module("reweight_ops._core.backends.cuda")
    sys.modules.pop("reweight_ops._core.backends.cuda", None)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_explain_says_whether_rows_are_split(backend, monkeypatch, plan):
    explain = importlib.import_module("reweight_ops._core.losses.explain")
    monkeypatch.setattr(explain, "choose_plan", lambda *args: Choice(plan, "cuda", None))

    def kernel(rows, columns):
        logits = torch.empty(1, rows, columns, dtype=torch.bfloat16, device="meta")
        said = reweight_ops.explain(
            reweight_ops.token_divergence, logits, logits, kind="forward_kl", device="cuda"
        )
        assert f"backend: cuda, kernel: {said.kernel}" in str(said)
        return said.kernel

    assert kernel(1, 151936) == "split rows (8 blocks share a row)"
    assert kernel(1, 50257) == "split rows (2 blocks share a row)"
    assert kernel(2, 151936) == ("whole rows (2 rows are enough for the 2 blocks that run at once)")
    assert "short enough for one block" in kernel(1, 32000)


def test_a_zero_in_the_last_of_eight_slices(split):
    two = make(1, SHARED[8], torch.bfloat16)
    two.logits[0, -5] = -math.inf
    table = split.divergence_stats(two)
    assert table[0, 0] == math.inf and table[1:4, 0].isfinite().all()
