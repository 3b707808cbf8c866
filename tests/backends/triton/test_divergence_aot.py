"""The compiled kernel on two logits tensors: no spills, 16-byte loads and stores, no
needless compilation.
"""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def aot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)

    def run(*arguments: str):
        command = [sys.executable, str(ROOT / "tests/support/aot_divergence.py"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=pytest.mark.slow) for t in ("sm_80", "gfx942")] + ["sm_90"]
)
def test_compiles_without_spills_and_streams_16_bytes_at_a_time(aot, target):
    compiled = aot("compile", target)
    assert len(compiled) == 6  # two pairs of dtypes; statistics, gradient, both
    for kernel in compiled:
        assert kernel["spilled"] == 0, kernel
        if kernel["dtype"] == "torch.bfloat16+torch.bfloat16":
            assert kernel["wide_loads"] >= 2, kernel
    assert sum(k["wide_stores"] > 0 for k in compiled) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_rows_at_any_address_are_stored_16_bytes_at_a_time(aot, target):
    stats, grad, both = aot("unaligned", target)
    assert all(kernel["spilled"] == 0 for kernel in (stats, grad, both))
    assert grad["wide_stores"] >= 4 and both["wide_stores"] >= 4
    assert stats["wide_loads"] >= 16 and both["wide_loads"] >= 16


@pytest.mark.slow
def test_soft_caps_compile_without_spills(aot):
    assert all(kernel["spilled"] == 0 for kernel in aot("variants", "sm_90"))


def test_nothing_recompiles_that_need_not(aot):
    assert aot("count") == 3
