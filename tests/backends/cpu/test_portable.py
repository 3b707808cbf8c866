"""The portable kernels, which all other processors use, built here as a program.

If a cross compiler and an emulator are installed (Debian: g++-aarch64-linux-gnu,
qemu-user), they are also built for arm64. They are judged like every other level.
"""

import math
import shutil
import subprocess

import pytest
import torch
from criterion import assert_gradient, assert_values
from kernel_oracle import STATS, gradient, rows, statistics
from paths import ROOT

from reweight_ops._core.backends.native import DTYPES

_C = pytest.importorskip("reweight_ops._C")
#: The compiler, and the command that runs its output.
PROCESSORS = {
    "here": ("g++", []),
    "arm64": ("aarch64-linux-gnu-g++", ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]),
}
DEFINES = ["-DRW_HAS_PORTABLE", "-DRW_LEVEL=portable"]


@pytest.fixture(scope="module", params=PROCESSORS)
def primitives(request, tmp_path_factory):
    """The command of the program."""
    compiler, emulator = PROCESSORS[request.param]
    missing = [x for x in (compiler, *emulator[:1]) if shutil.which(x) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    program = tmp_path_factory.mktemp(request.param) / "primitives"
    sources = [
        ROOT / "tests/backends/cpu/portable.cpp",
        *(ROOT / "csrc/cpu" / name for name in ("dispatch.cpp", "kernels.cpp", "divergence.cpp")),
    ]
    flags = [
        *_C.build_info()["flags"].split(),
        "-Werror",
        "-Wno-psabi",
        *DEFINES,
        f"-I{ROOT / 'csrc'}",
    ]
    done = subprocess.run(
        [compiler, *flags, *map(str, sources), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [*emulator, str(program)]


def data(t):
    return t.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("softcap", [math.inf, 15.0])
@pytest.mark.parametrize("kind", ["plain", "peaked", "shifted", "low"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_gradient_and_likeliest_ids(primitives, dtype, kind, softcap):
    if kind in ("shifted", "low") and softcap < math.inf:
        pytest.skip("a softcap takes offsets away")
    temperature = 0.7
    for n, v in ((12, 1), (12, 33), (12, 2049), (40, 4099)):
        z, ids = rows(n, v, dtype, kind, seed=v)
        derivatives = torch.randn(4, n, generator=torch.Generator().manual_seed(v))
        arguments = [str(DTYPES[dtype]), str(n), str(v), str(softcap), str(temperature)]
        done = subprocess.run(
            [*primitives, *arguments],
            input=data(z) + data(ids) + data(derivatives),
            capture_output=True,
            check=True,
        )
        cut, end = 5 * n * 4, 5 * n * 4 + z.numel() * z.element_size()
        got = dict(
            zip(
                STATS,
                torch.frombuffer(bytearray(done.stdout[:cut]), dtype=torch.float32).view(5, n),
                strict=True,
            )
        )
        out = torch.frombuffer(bytearray(done.stdout[cut:end]), dtype=dtype).view(n, v)
        found = torch.frombuffer(bytearray(done.stdout[end:]), dtype=torch.int64).view(n, -1)
        assert torch.equal(found, z.sort(dim=-1, descending=True, stable=True).indices[:, :5])

        each = torch.full((n,), temperature)
        exact, single = (
            statistics(z.double(), ids, each.double(), softcap),
            statistics(z.float(), ids, each, softcap),
        )
        for name in STATS:
            assert_values(got[name], single[name], exact[name], f"{name} at V = {v}")
        by = dict(zip(("logp", "entropy", "lse", "log_sum_p_sq"), derivatives, strict=True))
        truth = gradient(z.double(), ids, each.double(), by, softcap)
        base = gradient(z.float(), ids, each, by, softcap)
        assert_gradient(out, base, truth, sum(c.abs() for c in derivatives) * 2 / each, ids)
