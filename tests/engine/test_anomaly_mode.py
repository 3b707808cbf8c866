"""``torch.autograd.set_detect_anomaly(True)`` finds no NaN in any backward of a healthy
call, not even one that is discarded.
"""

import public_calls
import pytest
import torch

CALLS = public_calls.calls()
OPS = sorted({name.split()[0] for name in CALLS})


@pytest.mark.parametrize("op", OPS)
def test_every_public_op(op):
    raised = {}
    for name, call in CALLS.items():
        if name.split()[0] != op:
            continue
        want = call()
        try:
            with torch.autograd.set_detect_anomaly(True):
                got = call()
        except RuntimeError as error:
            raised[name] = str(error).splitlines()[0]
        else:
            assert all(
                torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
                for a, b in zip(got, want, strict=True)
            ), name
    assert not raised
