"""Results do not depend on the process's default dtype or default device.

Each default runs in a separate process, because a kernel that writes fp32 into a
smaller buffer corrupts the heap.
"""

import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason

DEFAULTS = {
    "usual": "",
    "float16": "torch.set_default_dtype(torch.float16)",
    "bfloat16": "torch.set_default_dtype(torch.bfloat16)",
    "float64": "torch.set_default_dtype(torch.float64)",
    "meta": "torch.set_default_device('meta')",
}
SCRIPT = """
import sys
import torch
import public_calls
{default}
every = {{**public_calls.calls(), **public_calls.golden_calls()}}
found = {{}}
for name, call in every.items():
    try:
        found[name] = call()
    except Exception as error:
        found[name] = f"{{type(error).__name__}}: {{error}}"
torch.save(found, sys.argv[1])
"""


def results(folder, which):
    path = folder / f"{which}.pt"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(default=DEFAULTS[which]), path],
        env=dict(os.environ, PYTHONPATH=str(ROOT / "tests/support"), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
    return torch.load(path)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    found = results(tmp_path_factory.mktemp("usual"), "usual")
    assert not [x for x in found.values() if isinstance(x, str)]
    return found


@pytest.mark.parametrize("which", [x for x in DEFAULTS if x != "usual"])
# docs/semantics.md: S21
def test_results_are_those_of_the_usual_default(which, usual, tmp_path):
    got = results(tmp_path, which)
    wrong = {}
    for name, want in usual.items():
        found = got[name]
        if isinstance(found, str):
            wrong[name] = found
        elif [(x.dtype, x.device) for x in found] != [(x.dtype, x.device) for x in want]:
            wrong[name] = [x.dtype for x in found]
        elif not all(
            torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
            for a, b in zip(found, want, strict=True)
        ):
            wrong[name] = [
                (a - b).abs().max().item()
                for a, b in zip(found, want, strict=True)
                if a.numel() and a.dtype != torch.bool
            ]
    assert not wrong


@pytest.mark.skipif(
    unsupported_reason("cpu", Request("token_stats", torch.device("cpu"), torch.float32))
    is not None,
    reason="no C++ extension",
)
@pytest.mark.parametrize(
    "wrong", [{"dtype": torch.float16}, {"dtype": torch.float64}, {"size": -1}], ids=str
)
def test_a_result_that_the_kernel_would_overrun_is_refused(wrong, monkeypatch):
    """The modules receive addresses: their outputs are checked before they write."""
    empty = torch.empty

    def other(size, **keywords):
        *rows, columns = size
        return empty(
            (*rows, columns + wrong.get("size", 0)),
            **{**keywords, **{k: v for k, v in wrong.items() if k == "dtype"}},
        )

    z, ids = torch.randn(2, 8, requires_grad=True), torch.tensor([1, 2])
    logits = z.detach().clone()
    monkeypatch.setattr(torch, "empty", other)
    for call in (
        lambda: rw.token_logps(logits, ids, backend="cpu"),
        lambda: rw.token_divergence(logits, logits, backend="cpu"),
    ):
        with pytest.raises(rw.InvalidCall, match="a result is"):
            call()
