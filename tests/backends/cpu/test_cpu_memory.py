"""Peak growth of resident memory of a policy loss, measured in a separate process.

It is nothing in place, and one gradient as a drop-in.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

pytest.importorskip("reweight_ops._core.backends.cpu", exc_type=ImportError)
if not Path("/proc/self/clear_refs").exists():
    pytest.skip("the peak of resident memory is read from Linux's /proc", allow_module_level=True)

SCRIPT = """
import json, sys
from bench.cases import Case
from bench.measure import Memory
from bench.providers import providers
found = {}
for dtype in ("float32", "bfloat16"):
    for job, entropy in (("loss", False), ("loss", True), ("logps", False)):
        case = Case(job, 128, 65536, dtype, entropy)
        data, memory = case.data(), Memory("cpu")
        for p in providers(("cpu",)):
            if p.ours and p.serves(case):
                run = p.make(data)
                run(), data.restore()  # the first call allocates what later ones keep: code, thread stacks
                found[f"{case.name}: {p.name}"] = memory.growth(run) / case.logits_bytes
                data.restore()
print(json.dumps(found))
"""


def test_extra_memory():
    root = ROOT
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    growth = json.loads(done.stdout.splitlines()[-1])
    assert len(growth) == 2 * (2 * 5 + 2)
    for name, share in growth.items():
        new_gradient = "drop-in" in name and name.startswith("loss")
        # 3 % of 16 MiB is 0.5 MiB: [N] vectors, allocator slack, lazily touched stacks.
        assert share <= (1.03 if new_gradient else 0.03), f"{name}: {share:.3f} times the logits"
        assert not new_gradient or share > 0.9, (
            f"{name}: {share:.3f}: the gradient was not seen, so nothing was measured"
        )
