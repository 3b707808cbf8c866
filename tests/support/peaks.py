"""Peak memory, which a script measures in a process of its own and prints as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

reads_peaks = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="the peak of resident memory is read from Linux's /proc",
)


def peaks(script: str) -> dict[str, float]:
    """Return what ``script`` prints last.

    It has one thread: beside other tests, several wait for each other at every barrier.
    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
