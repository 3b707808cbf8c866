"""The Triton backend end to end through the public op, by the package's criterion.

It is a part of ``reweight-ops check --backend triton``.
"""

import warnings

import pytest
import torch

pytest.importorskip("triton")

from reweight_ops._core.backends import triton_launch
from reweight_ops._core.backends import triton_token as backend
from reweight_ops.testing.checks import Case, run_case
from reweight_ops.testing.ops import OPS, compare_op, make_op_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["grpo", "cispo", "gspo_token"])
def test_by_the_criterion(method, dtype):
    found = run_case(Case("triton", method, dtype, DEVICE), 131)
    assert found.passed, found
    assert found.backend == "triton" and found.plan == (
        "two_pass" if method == "gspo_token" else "one_pass"
    )


#: Ops whose kernels no other test of this folder runs.
_FIRST = {
    ("token_stats", "selected_logps"),
    ("token_stats", "topk_logps"),
    ("token_stats", "topk_ids"),
    ("linear_token_stats", "topk_logps"),
    ("linear_token_divergence", "TopKLogps"),
    ("linear_policy_loss", "teacher, one_pass"),
    ("linear_policy_loss", "teacher, two_pass"),
}


@pytest.mark.parametrize(
    ("op", "what"),
    [
        pytest.param(op, what, marks=() if (op, what) in _FIRST else pytest.mark.slow)
        for op, whats in OPS.items()
        for what in whats
    ],
)
def test_ops_by_the_criterion(op, what):
    dtype = torch.bfloat16 if "teacher" in what else torch.float32
    found = compare_op(
        OPS[op][what], make_op_batch((2, 3), 131, dtype, DEVICE), backend="triton", loss_scale=64.0
    )
    assert found.passed, found


@pytest.mark.skipif(not triton_launch.interpreted(), reason="a GPU rounds by itself")
def test_the_criterion_sees_one_bit_of_bf16(monkeypatch):
    """The negative control: without the emulated rounding the interpreter truncates."""
    original = backend._Call.__init__

    def truncating(self, *args, **more):
        original(self, *args, **more)
        self.emulate = False

    monkeypatch.setattr(backend._Call, "__init__", truncating)
    assert not run_case(Case("triton", "reinforce", "bfloat16", DEVICE), 131).passed


def test_an_older_triton_is_called_untested():
    with pytest.warns(RuntimeWarning, match=r"Triton 3\.5\.1 is older .*3\.6 to 3\.9"):
        triton_launch.warn_if_untested("3.5.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("3.6.0", "3.9.0", "3.10.0+git1234"):
            triton_launch.warn_if_untested(version)
