"""The CUDA backend without a GPU: what was compiled, and its messages. The tests marked
gpu run it.
"""

import importlib
import re
import shutil
import sys
import types
import warnings

import pytest
import torch
from cuda_emulation import fixtures
from paths import ROOT

import reweight_ops
from reweight_ops._core.backends import native, select
from reweight_ops._core.backends.base import Request, RowInputs, SoftmaxParams
from reweight_ops._core.backends.sources import source_hash
from reweight_ops._core.engine.plan import Choice
from reweight_ops._core.formula.loss_program import Program
from reweight_ops.errors import BackendUnavailable, ReweightOpsError

explain_module = importlib.import_module("reweight_ops._core.losses.explain")

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def backend():
    return pytest.importorskip(
        "reweight_ops._core.backends.cuda", reason="built without CUDA", exc_type=ImportError
    )


def test_what_it_does_not_serve(backend):
    reason = backend.BACKEND.unsupported_reason
    assert "logits are on cpu" in reason(Request("token_stats", torch.device("cpu"), torch.float32))
    assert "fp32, bf16 or fp16" in reason(
        Request("token_stats", torch.device("cuda", 0), torch.float64)
    )
    if not torch.cuda.is_available():
        assert "sees no GPU" in reason(
            Request("token_stats", torch.device("cuda", 0), torch.float32)
        )
    assert backend._native.program_unsupported_reason(Program.of(("clip", "k3"))) is None
    assert "registers, one pass holds 320" in backend._native.program_unsupported_reason(
        Program.of(("k3",) * 100)
    )


def test_statuses(backend, monkeypatch):
    backend._check(0)
    with pytest.raises(ReweightOpsError, match="cudaErrorIllegalAddress"):
        backend._check(700)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BackendUnavailable, match="driver is too old"):
        backend._check(35)


def test_a_launch_without_a_driver_is_a_status(backend):
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    row = torch.zeros(8)
    ids = torch.zeros(1, dtype=torch.int64)
    call = backend._cuda.Call(
        0,
        row.data_ptr(),
        (1, 0, 8),
        1,
        8,
        (8, 0, 8),
        float("inf"),
        ids.data_ptr(),
        row.data_ptr(),
        False,
    )
    status = backend._cuda.token_stats(call, [row.data_ptr(), 0, 0, 0, 0, 0])
    assert status != 0 and backend._cuda.error_string(status).startswith("cudaError")


def test_without_the_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "reweight_ops._cuda", None)
    monkeypatch.delattr(reweight_ops, "_cuda", raising=False)
    monkeypatch.delitem(sys.modules, "reweight_ops._core.backends.cuda", raising=False)
    monkeypatch.setattr(select, "_loaded", {})
    with pytest.raises(BackendUnavailable, match="REWEIGHT_OPS_BUILD=cuda"):
        select.load("cuda")


@pytest.mark.parametrize("part", ["cpu", "cuda"])
def test_an_extension_built_from_other_sources(monkeypatch, tmp_path, part):
    """The installed extension is from these sources.

    A change of any of them, or an extension without a hash, is refused with
    instructions.
    """
    module = pytest.importorskip(
        "reweight_ops._C" if part == "cpu" else "reweight_ops._cuda", exc_type=ImportError
    )
    assert native.checked(module, part) is module
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    assert source_hash(part, tmp_path / "csrc") == module.sources
    with (tmp_path / "csrc/common/primitives.h").open("a") as file:
        file.write("// another line")
    changed = source_hash(part, tmp_path / "csrc")
    assert changed != module.sources and source_hash(part, tmp_path / "nowhere") is None
    monkeypatch.setattr(native, "source_hash", lambda part: changed)
    monkeypatch.delitem(sys.modules, f"reweight_ops._core.backends.{part}", raising=False)
    monkeypatch.setattr(select, "_loaded", {})
    choice = "REWEIGHT_OPS_BUILD=cuda " if part == "cuda" else ""
    said = re.escape(
        f"built from other sources; rebuild it with {choice}pip install -e {ROOT} --no-deps"
    )
    with pytest.warns(UserWarning, match=said), pytest.raises(BackendUnavailable, match=said):
        select.load(part)
    with warnings.catch_warnings(), pytest.raises(BackendUnavailable, match=said):
        warnings.simplefilter("error")  # it warns once
        select.load(part)
    older = "older was built from other sources"
    with pytest.warns(UserWarning, match=older), pytest.raises(BackendUnavailable, match=older):
        native.checked(types.ModuleType("older"), part)


def test_calls_that_a_stale_extension_would_serve_say_so_once(monkeypatch):
    """They run on the reference; only the first call warns that a faster backend
    exists.
    """
    module = pytest.importorskip("reweight_ops._C", exc_type=ImportError)
    monkeypatch.setitem(
        sys.modules,
        "reweight_ops._C",
        types.SimpleNamespace(__name__=module.__name__, sources="other"),
    )
    monkeypatch.delitem(sys.modules, "reweight_ops._core.backends.cpu", raising=False)
    monkeypatch.setattr(select, "_loaded", {})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            reweight_ops.token_logps(torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.int64))
    assert len([w for w in found if "built from other sources" in str(w.message)]) == 1


def test_explain_says_which_kernel_a_call_takes(backend, monkeypatch):
    emulated, _ = fixtures.emulated()
    monkeypatch.setattr(backend, "_cuda", emulated)
    kernel_of, place = backend.BACKEND.kernel_of, torch.device("cuda", 0)
    assert kernel_of(
        torch.empty(2, 3, 151936, dtype=torch.bfloat16, device="meta"), 151936, place
    ).startswith("ring")
    assert (
        kernel_of(torch.empty(2, 1027, device="meta")[:, :1024], 1024, place)
        == "streaming (rows of the logits do not all start at a multiple of 16 bytes)"
    )
    assert kernel_of(torch.empty(2, 1024)[:, :1000], 1000, place).startswith("ring")
    monkeypatch.setattr(
        explain_module, "choose_plan", lambda *args: Choice("one_pass", "cuda", None)
    )
    logits = torch.empty(2, 3, 1001, device="meta", requires_grad=True)
    said = reweight_ops.explain(
        reweight_ops.policy_loss,
        logits,
        torch.empty(2, 3, dtype=torch.long, device="meta"),
        1.0,
        spec="grpo",
        device="cuda",
    )
    assert said.kernel.startswith(
        "streaming (rows of the logits"
    ) and "backend: cuda, kernel: streaming" in str(said)


def test_the_documented_limits_of_the_ring(monkeypatch, backend):
    """The numbers in the backend's docstring."""
    emulated, _ = fixtures.emulated()
    monkeypatch.setattr(backend, "_cuda", emulated)
    try:
        for device, limits in (
            ((9, 227 << 10, 1), (786432, 393216)),
            ((12, 99 << 10, 1), (32768, 16384)),
        ):
            emulated.set_device(*device)
            for dtype, limit in zip((torch.float16, torch.float32), limits, strict=True):
                assert str(limit) in sys.modules["reweight_ops._core.backends.cuda"].__doc__
                for v, kernel in ((limit, "ring"), (limit + 64, "streaming")):
                    assert backend.BACKEND.kernel_of(
                        torch.empty(2, v, dtype=dtype, device="meta"), v, torch.device("cuda", 0)
                    ).startswith(kernel), v
    finally:
        emulated.set_device(9, 227 << 10, 2)


def test_not_on_rocm(monkeypatch):
    monkeypatch.delitem(sys.modules, "reweight_ops._core.backends.cuda", raising=False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(BackendUnavailable, match="ROCm"):
        importlib.import_module("reweight_ops._core.backends.cuda")


# ---- on a GPU


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v", [1, 4099, 151936])
def test_on_a_gpu_as_the_reference(backend, dtype, v):
    g = torch.Generator().manual_seed(v)
    z = (torch.randn(40, v, generator=g) * 3).to(dtype)
    ids = torch.randint(0, v, (40,), generator=g)
    ids[3] = -100
    inputs = RowInputs(torch.ones(1, 40), None, torch.randn(40, generator=g))
    program, params = (
        Program.of(("clip",)),
        torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, float("inf")]),
    )
    reference = select.load("reference")
    want_out, out = torch.empty_like(z), torch.empty_like(z, device="cuda")
    want = reference.token_loss_grad(
        z, ids, torch.ones(1), SoftmaxParams(v), inputs, program, params, want_out
    )
    there = RowInputs(*(x if x is None else x.cuda() for x in inputs))
    got = backend.token_loss_grad(
        z.cuda(),
        ids.cuda(),
        torch.ones(1, device="cuda"),
        SoftmaxParams(v),
        there,
        program,
        params.cuda(),
        out,
    )
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.cpu(), want_out)
    stats = backend.token_stats(
        z.cuda(), ids.cuda(), torch.ones(1, device="cuda"), SoftmaxParams(v), ("logp",)
    )
    assert torch.equal(stats[0], got[0])
