"""Every test here runs on a GPU, once for each GPU backend; where there is none it is
skipped. ``REWEIGHT_OPS_GPU_TESTS=cpu,triton`` runs the very same bodies on CPU tensors
(Triton in its interpreter: minutes), to show that the tests themselves are sound.
"""

import pytest
import torch
from places import DRY, PLACES, Place

torch.utils.deterministic.fill_uninitialized_memory = True


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or DRY:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(params=PLACES, ids=str)
def place(request) -> Place:
    reason = request.param.unsupported_reason()
    if reason is not None:
        # On a GPU, a backend that is missing is a failure: the point of these tests is
        # to run them.
        pytest.fail(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def poisoned():
    """Memory that nobody has written holds NaN."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def give_back():
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
