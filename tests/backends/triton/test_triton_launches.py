"""What a launch of the Triton backend is given: a compiled program from the cache, a
launch shape, and the alignment of its tensors.
"""

from __future__ import annotations

import multiprocessing
import sys

import pytest
import torch

pytest.importorskip("triton")

from triton_batches import RICH, make
from triton_oracle import DEVICE

from reweight_ops._core.backends import triton_cache as triton_programs
from reweight_ops._core.backends import triton_launch
from reweight_ops._core.backends import triton_token as backend
from reweight_ops._core.backends.base import Request, SoftmaxParams
from reweight_ops._core.backends.select import load
from reweight_ops._core.formula.triton import program_py
from reweight_ops.triton_kernels.config import VARIANTS, bytes_in_flight, config_for


def test_the_cache_mends_a_short_file_and_serves_many_processes(tmp_path):
    text = program_py(RICH) + "\n# of this test alone\n"
    module = triton_programs.load_source(text, tmp_path)
    path = next(tmp_path.glob("programs/*.py"))
    path.write_text(text[:40])
    del sys.modules[module.__name__]
    assert triton_programs.load_source(text, tmp_path).program is not module.program
    assert path.read_text() == text
    path.unlink()
    del sys.modules[module.__name__]
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=triton_programs.load_source, args=(text, tmp_path)) for _ in range(4)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert [p.name for p in (tmp_path / "programs").iterdir() if p.is_file()] == [path.name]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("REWEIGHT_OPS_CACHE", str(tmp_path))
    assert triton_programs.cache_folder() == tmp_path
    monkeypatch.delenv("REWEIGHT_OPS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert triton_programs.cache_folder().name == "reweight_ops"


# --- reasons and launch shapes --------------------------------------------------------


def test_reasons():
    request = Request("token_stats", torch.device(DEVICE), torch.float32)
    assert load("triton").unsupported_reason(request) is None
    assert "float64" in load("triton").unsupported_reason(request._replace(dtype=torch.float64))
    assert (
        "xpu" in load("triton").unsupported_reason(request._replace(device=torch.device("xpu")))
        or triton_launch.interpreted()
    )


@pytest.mark.parametrize("shapes", sorted(VARIANTS))
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("columns", [1, 1000, 32000, 151936, 1 << 21])
def test_launch_shapes(columns, itemsize, shapes, monkeypatch):
    monkeypatch.setenv("REWEIGHT_OPS_TRITON_SHAPES", shapes)
    for capped in (False, True):
        config = config_for(columns, itemsize, capped)
        assert config.vector * itemsize == 16
        assert config.block & (config.block - 1) == 0
        assert config.segment % config.block == 0
        # chunks of a split gradient are whole tiles
        assert config.segment % (config.grad.threads * config.grad_vectors * config.vector) == 0
        for launch in (config.stats, config.one_pass, config.grad):
            assert launch.threads % 64 == 0
            assert launch.programs() >= 1
        # More threads than slots would do the same work twice.
        assert max(config.stats.threads, config.one_pass.threads) <= config.slots


@pytest.mark.parametrize(
    "columns, itemsize", [(32000, 2), (151936, 2), (262144, 2), (32000, 4), (151936, 4)]
)
def test_enough_bytes_are_in_flight(columns, itemsize):
    """An H200 needs 26 KiB a processor (4.3 TB/s, 0.8 us, 132 processors)."""
    config = config_for(columns, itemsize)
    needed = 4.3e12 * 0.8e-6 / 132
    for launch in (config.stats, config.one_pass):
        assert bytes_in_flight(launch, config.slots, config.vectors) >= needed
    assert bytes_in_flight(config.grad, config.grad.threads, config.grad_vectors) >= needed


def test_alignment_classes():
    base = torch.zeros(4096, dtype=torch.bfloat16)
    assert triton_launch.alignment(base.view(4, 1024)) == 16
    assert triton_launch.alignment(base[2:2050].view(2, 1024)) == 4
    assert triton_launch.alignment(base[1:2049].view(2, 1024)) == 2
    assert triton_launch.alignment(base[:1002].view(2, 501)) == 2
    assert triton_launch.alignment(base[:1000].view(2, 500), base[1:1001].view(2, 500)) == 2
    assert triton_launch.alignment(base.float()[1:1001].view(2, 500)) == 4


def test_a_gradient_that_begins_elsewhere_than_aligned_logits_has_registers(monkeypatch):
    """Its vectors are cut out of two, which few registers would spill."""
    shapes, v = [], 101
    batch = make(torch.bfloat16, v=104, softmax=SoftmaxParams(v))
    n = batch.ids.numel()
    logits, given = batch.logits[:, :v], (batch.ids, batch.temperature, batch.softmax)

    def record(*args, shape, **meta):
        shapes.append((shape.registers >= 128, meta["ALIGN"], meta["GRAD_ALIGN"]))

    monkeypatch.setattr(triton_launch, "launch", record)
    for out in (torch.empty_like(batch.logits)[:, :v], torch.empty(n, v, dtype=torch.bfloat16)):
        backend.token_loss_grad(logits, *given, batch.inputs, batch.program, batch.params, out)
    assert shapes == [(False, 16, 16), (True, 16, 2)]


def test_vectors_are_loaded_whole_only_where_gradient_and_logits_begin_alike():
    """The interpreter would read a vector at any address; a device would not."""
    base = torch.zeros(8192, dtype=torch.bfloat16)
    odd = base[:1002].view(2, 501)

    def alignments(z, out):
        call = backend._Call(z, torch.ones(1), SoftmaxParams(z.size(-1)), out)
        return call.align, call.peel, call.grad_align

    assert alignments(odd, odd) == (2, True, 16)
    assert alignments(odd, base[1024:2026].view(2, 501)) == (2, True, 16)
    assert alignments(odd, base[1025:2027].view(2, 501)) == (2, True, 2)
    assert alignments(odd, base[1024:2048].view(2, 512)[:, :501]) == (2, False, 2)
    assert alignments(base[1024:2048].view(2, 512)[:, :501], odd) == (16, True, 2)
    assert alignments(base[2:2050].view(2, 1024), base[4096:6144].view(2, 1024)) == (4, False, 2)
    even = base[:1024].view(2, 512)
    assert alignments(even, base[1024:2048].view(2, 512)) == (16, False, 16)
    wide = base.view(2, 2, 2048)
    assert alignments(wide[..., 1:502], wide[..., 9:510]) == (2, True, 16)
    shorter = base[:4040].view(2, 2, 1010)
    assert alignments(wide[..., :502], shorter[..., :502]) == (16, True, 2)


def test_a_dimension_of_size_one_has_no_alignment():
    """Its stride addresses nothing: that of a slice of one sequence, or of one row."""
    base = torch.zeros(8192, dtype=torch.bfloat16)
    sliced = base[:2004].view(1, 4, 501)[:, :-1]
    whole = base[4096:5599].view(1, 3, 501)
    assert triton_launch.begin_alike(sliced, whole) and triton_launch.begin_alike(whole, sliced)
    assert not triton_launch.begin_alike(sliced[:, 1:], whole[:, :-1])
    two = base[:4008].view(2, 4, 501)[:, :-1]
    assert not triton_launch.begin_alike(two, base[:3006].view(2, 3, 501))
    call = backend._Call(sliced, torch.ones(1), SoftmaxParams(501), whole)
    assert (call.align, call.peel, call.grad_align) == (2, True, 16)
    assert triton_launch.alignment(base[: 4 * 515].view(1, 4, 515)[..., :512]) == 2
    assert triton_launch.alignment(base[: 4 * 515].view(4, 515)[:1, :512]) == 16
    assert triton_launch.alignment(base[: 4 * 515].view(4, 1, 515)[..., :512]) == 2
    assert triton_launch.alignment(base.as_strided((1, 3, 512), (1539, 512, 1))) == 16
