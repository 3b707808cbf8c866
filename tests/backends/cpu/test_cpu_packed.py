"""Packed rows on the CPU, at every instruction-set level, are as accurate as rows of
logits, with the same bits.
"""

import packed_rows
import pytest
from contract import DTYPES

cpu = pytest.importorskip("reweight_ops._core.backends.cpu", exc_type=ImportError)
_C, cpu = cpu._C, cpu.BACKEND


@pytest.fixture(params=_C.build_info()["supported_levels"])
def level(request):
    _C.set_level(request.param)
    yield request.param
    _C.set_level("auto")


@pytest.mark.parametrize(
    ("kind", "softmax"),
    [
        ("plain", "per_row"),
        ("peaked", "cold"),
        ("shifted", "plain"),
        ("low", "plain"),
        ("plain", "softcap"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(level, dtype, softmax, kind):
    for v in (1, 33, 2049) if kind == "plain" else (33,):
        packed_rows.check_accuracy(cpu, DTYPES[dtype], 12, v, softmax, kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_is_as_alone(level, dtype):
    packed_rows.check_each_row_alone(cpu, DTYPES[dtype], 9000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_corners(level, dtype):
    packed_rows.check_corners(cpu, DTYPES[dtype])


def test_sure_rows(level):
    packed_rows.check_sure_rows(cpu)
