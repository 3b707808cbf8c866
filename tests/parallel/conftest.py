import pytest
import torch
from ranks import Pool

if not torch.distributed.is_available():
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def four():
    """Four gloo ranks, for all tests."""
    pool = Pool(4)
    yield pool
    pool.close()
