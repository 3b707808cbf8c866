"""A machine with Triton and a CUDA build of PyTorch, but without a driver or the
requested GPU: a login node, a CI.
"""

import subprocess
import sys

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends import triton_launch

META = {"device": "meta"}
CALL = (
    torch.empty(2, 3, 8, requires_grad=True, **META),
    torch.empty(2, 3, dtype=torch.long, **META),
    1.0,
)


@pytest.fixture
def properties(monkeypatch):
    """Asking PyTorch about a missing GPU raises."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")

    def capability(device):
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_explain_answers(device, properties):
    found = rw.explain(rw.policy_loss, *CALL, spec="grpo", device=device)
    assert found.backend == "reference" and "sees no GPU" in found.backends["triton"]
    hidden = torch.empty(2, 3, 4, requires_grad=True, **META)
    assert (
        "sees no GPU"
        in rw.explain(
            rw.linear_token_logps, hidden, torch.empty(8, 4, **META), CALL[1], device=device
        ).backends["triton"]
    )


def test_a_backend_that_is_asked_for_says_so(properties):
    with pytest.raises(rw.UnsupportedRequest, match="sees no GPU"):
        rw.explain(rw.policy_loss, *CALL, spec="grpo", device="cuda", backend="triton")


def test_a_gpu_that_the_machine_has_not(properties, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert (
        "sees 1 GPU, and no cuda:3"
        in rw.explain(rw.policy_loss, *CALL, spec="grpo", device="cuda:3").backends["triton"]
    )


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, reweight_ops as rw
from reweight_ops.cli import main
logits, ids = torch.randn(2, 3, 8, requires_grad=True), torch.zeros(2, 3, dtype=torch.long)
rw.policy_loss(logits, ids, 1.0, spec="grpo").loss.backward()
print(rw.explain(rw.policy_loss, logits, ids, 1.0, spec="grpo").backends["triton"])
for call in (lambda: rw.policy_loss(logits, ids, 1.0, spec="grpo", backend="triton"), lambda: rw.token_logps(logits, ids, backend="triton")):
    try:
        call()
    except rw.BackendUnavailable as error:
        print(error)
sys.argv = ["reweight-ops", "info"]
main()
"""


def test_a_machine_without_triton():
    """On a CPU-only installation ordinary calls, explain and the command line work.

    A backend requested by name says what is missing.
    """
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Triton cannot be imported") >= 3
