"""Compile-time variants of the ring (csrc/cuda/variants.h), emulated under every
schedule.

They have the bits of the streaming kernel, and no deadlock.
"""

import pytest
import torch
from cuda_emulation.build import build, compiler, load
from cuda_emulation.fixtures import SCHEDULES
from test_cuda_ring import SHAPES, batch, by_ring, by_streaming, same, width

from bench.gpu_variants import VARIANTS, defines
from reweight_ops._core.backends.native import Native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the emulated kernels"),
]

#: Variants that change a wait, an order or a count. The emulation does not see cache
#: hints and the number of blocks.
WAITS = {
    name: settings
    for name, settings in VARIANTS.items()
    if any(s in settings for s in ("KEEP", "DIRECT", "STORES", "NEIGHBOURS", "ROWS"))
}
WAITS |= {
    "no store in flight": "RING_STORES=0",
    "all": "RING_DIRECT=1 RING_ROWS_AHEAD=2 RING_NEIGHBOURS=1",
    "most": "RING_STORES=2 RING_ROWS_AHEAD=2",
}


@pytest.fixture(scope="module", params=WAITS)
def variant(request):
    pytest.importorskip("pybind11")
    module = load(build(flags=("-O1", *defines(WAITS[request.param])), dtypes=("bf16",)))

    def check(status: int) -> None:
        assert status == 0, f"status {status}: {module.last_error()}"

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module, Native(module, "cpu", lambda device: {}, check)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "shape",
    ["none", "part of a tile", "a tile", "ten tiles", "two blocks", "two blocks, part ahead"],
)
def test_as_the_streaming_kernel(variant, shape, schedule):
    module, primitives = variant
    v = width(SHAPES[shape][0], torch.bfloat16, tail=3)
    z, ids, adv = batch(24 if SHAPES[shape][0] < 2000 else 10, v, torch.bfloat16, padding=5)
    want = by_streaming(module, primitives, z, ids, adv)
    for clusters in (1, 2):
        module.set_device(9, 227 << 10, clusters)
        got = by_ring(module, primitives, schedule, clusters, z, ids, adv)
        assert same(got[0], want[0]) and same(got[1], want[1])
        clone = torch.empty_strided(z.shape, z.stride(), dtype=z.dtype)
        clone.copy_(z)
        got = by_ring(module, primitives, schedule, clusters, clone, ids, adv, out=clone)
        assert same(got[0], want[0]) and same(clone, want[1]), "in place"
