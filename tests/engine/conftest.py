import pytest

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.engine import kept


@pytest.fixture
def kept_calls(monkeypatch):
    for backend in ("cpu", "reference"):
        select.load(backend)  # a backend that is loaded may be a better choice
    found = kept.KeptCalls()
    monkeypatch.setattr(rw._core.losses.policy, "KEPT", found)
    return found
