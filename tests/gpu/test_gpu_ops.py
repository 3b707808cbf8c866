"""Statistics, heads, teachers, picked ids and kept sets on every GPU backend, by the
criterion: the ops of ``reweight-ops check``, from logits and from hidden states.
"""

import pytest
import torch
from places import sized

from reweight_ops.testing.ops import OPS, compare_op, make_op_batch

pytestmark = pytest.mark.gpu

CASES = [(op, what) for op, whats in OPS.items() for what in whats]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
@pytest.mark.parametrize(("op", "what"), CASES)
def test_op(place, op, what, dtype):
    found = compare_op(
        OPS[op][what],
        make_op_batch(sized((4, 16), (2, 6)), sized(4099, 131), dtype, place.device),
        backend=place.backend,
        loss_scale=64.0,
    )
    assert found.passed, found
