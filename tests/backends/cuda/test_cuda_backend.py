"""The CUDA backend where there is no GPU: what was compiled, and what it says. The tests marked gpu run it."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from cuda_emulation import fixtures
from cuda_emulation.build import DTYPES
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
SASS_ARCH = "90"


@pytest.fixture(scope="module")
def backend():
    return pytest.importorskip("reweight_ops._core.backends.cuda", reason="built without CUDA", exc_type=ImportError)


def test_what_it_does_not_serve(backend):
    reason = backend.BACKEND.unsupported_reason
    assert "logits are on cpu" in reason(Request("token_stats", torch.device("cpu"), torch.float32))
    assert "fp32, bf16 or fp16" in reason(Request("token_stats", torch.device("cuda", 0), torch.float64))
    if not torch.cuda.is_available():
        assert "sees no GPU" in reason(Request("token_stats", torch.device("cuda", 0), torch.float32))
    assert backend._native.why_not(Program.of(("clip", "k3"))) is None
    assert "registers, one pass holds 320" in backend._native.why_not(Program.of(("k3",) * 100))


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
    call = backend._cuda.Call(0, row.data_ptr(), (1, 0, 8), 1, 8, (8, 0, 8), float("inf"), ids.data_ptr(), row.data_ptr(), False)
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
    """What is installed is from these sources; a change of any of them, or an extension from before there was a hash, is refused with what to do."""
    module = pytest.importorskip("reweight_ops._C" if part == "cpu" else "reweight_ops._cuda", exc_type=ImportError)
    assert native.checked(module, part) is module
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    assert source_hash(part, tmp_path / "csrc") == module.sources
    with (tmp_path / "csrc/common/verbs.h").open("a") as file:
        file.write("// another line")
    changed = source_hash(part, tmp_path / "csrc")
    assert changed != module.sources and source_hash(part, tmp_path / "nowhere") is None
    monkeypatch.setattr(native, "source_hash", lambda part: changed)
    monkeypatch.delitem(sys.modules, f"reweight_ops._core.backends.{part}", raising=False)
    monkeypatch.setattr(select, "_loaded", {})
    choice = "REWEIGHT_OPS_BUILD=cuda " if part == "cuda" else ""
    said = re.escape(f"built from other sources; rebuild it with {choice}pip install -e {ROOT} --no-deps")
    with pytest.warns(UserWarning, match=said), pytest.raises(BackendUnavailable, match=said):
        select.load(part)
    with warnings.catch_warnings(), pytest.raises(BackendUnavailable, match=said):
        warnings.simplefilter("error")  # told once
        select.load(part)
    older = "older was built from other sources"
    with pytest.warns(UserWarning, match=older), pytest.raises(BackendUnavailable, match=older):
        native.checked(types.ModuleType("older"), part)


def test_calls_that_a_stale_extension_would_serve_say_so_once(monkeypatch):
    """They run, by the reference: what tells that it could be faster is the warning of the first one."""
    module = pytest.importorskip("reweight_ops._C", exc_type=ImportError)
    monkeypatch.setitem(sys.modules, "reweight_ops._C", types.SimpleNamespace(__name__=module.__name__, sources="other"))
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
    assert kernel_of(torch.empty(2, 3, 151936, dtype=torch.bfloat16, device="meta"), 151936, place).startswith("ring")
    assert (
        kernel_of(torch.empty(2, 1027, device="meta")[:, :1024], 1024, place)
        == "streaming (rows of the logits do not all start at a multiple of 16 bytes)"
    )
    assert kernel_of(torch.empty(2, 1024)[:, :1000], 1000, place).startswith("ring")
    monkeypatch.setattr(explain_module, "choose_plan", lambda *args: Choice("one_pass", "cuda", None))
    logits = torch.empty(2, 3, 1001, device="meta", requires_grad=True)
    said = reweight_ops.explain(
        reweight_ops.policy_loss, logits, torch.empty(2, 3, dtype=torch.long, device="meta"), 1.0, spec="grpo", device="cuda"
    )
    assert said.kernel.startswith("streaming (rows of the logits") and "backend: cuda, kernel: streaming" in str(said)


def test_the_documented_limits_of_the_ring(monkeypatch, backend):
    """The numbers in the backend's docstring."""
    emulated, _ = fixtures.emulated()
    monkeypatch.setattr(backend, "_cuda", emulated)
    try:
        for device, limits in (((9, 227 << 10, 1), (786432, 393216)), ((12, 99 << 10, 1), (32768, 16384))):
            emulated.set_device(*device)
            for dtype, limit in zip((torch.float16, torch.float32), limits, strict=True):
                assert str(limit) in sys.modules["reweight_ops._core.backends.cuda"].__doc__
                for v, kernel in ((limit, "ring"), (limit + 64, "streaming")):
                    assert backend.BACKEND.kernel_of(torch.empty(2, v, dtype=dtype, device="meta"), v, torch.device("cuda", 0)).startswith(
                        kernel
                    ), v
    finally:
        emulated.set_device(9, 227 << 10, 2)


def test_not_on_rocm(monkeypatch):
    monkeypatch.delitem(sys.modules, "reweight_ops._core.backends.cuda", raising=False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(BackendUnavailable, match="ROCm"):
        importlib.import_module("reweight_ops._core.backends.cuda")


# ---- what the compiler made


def tool(name: str) -> str | None:
    import importlib.util

    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin:
        shipped = Path(spec.origin).parent / "backends/nvidia/bin" / name
        found = str(shipped) if shipped.exists() else None
    return found


def nvcc_flags() -> list[str]:
    """As setup.py has them."""
    text = (ROOT / "setup.py").read_text()
    return [f for line in re.findall(r"^NVCC_FLAGS \+?= (.+)$", text, re.M) for f in eval(line)]


def compile_sass(source: Path, dtype: str, folder: Path, flags: list[str]) -> str:
    nvcc, dump = tool("nvcc"), tool("cuobjdump")
    if nvcc is None or dump is None:
        pytest.skip("needs nvcc and cuobjdump")
    obj = folder / "kernels.o"
    words = [nvcc, *flags, f"-gencode=arch=compute_{SASS_ARCH},code=sm_{SASS_ARCH}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}"]
    subprocess.run(
        [*words, f"-DRW_ELEMENT={DTYPES[dtype]}", f"-DRW_DTYPE={dtype}", "-c", str(source), "-o", str(obj)],
        check=True,
        capture_output=True,
        text=True,
    )
    environment = {**os.environ, "PATH": f"{Path(dump).parent}:{os.environ['PATH']}"}
    return subprocess.run([dump, "-sass", str(obj)], check=True, capture_output=True, text=True, env=environment).stdout


#: By kernel: what each of its functions must have. UBLKCP is a bulk copy (to shared memory, to global), STAS st.async, SYNCS an mbarrier.
NEEDED = {
    "stats_kernel": [r"LDG\S*\.128"],
    "grad_kernel": [r"LDG\S*\.128", r"STG\S*\.128"],
    "divergence_kernel": [r"LDG\S*\.128", r"STG\S*\.128"],
    "scale_kernel": [r"(LDG\S*\.128[\s\S]*?){4}STG\S*\.128"],  # four loads in flight
    "ring_kernel": [
        r"UBLKCP\.S\.G",
        r"UBLKCP\.G\.S",
        r"LDS\.128",
        r"STS\.128",
        r"STAS\S*\.128",
        r"SYNCS\S*TRYWAIT",
        r"STG\S*\.128",
    ],
}


def problems(sass: str, count: int) -> list[str]:
    """By function: instructions that are missing, and accesses of local memory."""
    found = []
    functions = re.split(r"Function : ", sass)[1:]
    assert len(functions) == count
    for function in functions:
        name = function.split()[0]
        (needed,) = (needed for kernel, needed in NEEDED.items() if kernel in name)
        found += [f"{name}: no {pattern}" for pattern in needed if not re.search(pattern, function)]
        if re.search(r"\b(LDL|STL)\b", function):
            found.append(f"{name}: local memory")
    return found


def loops(function: str) -> list[list[str]]:
    """The instructions of each loop that has no other inside: all from the target of a branch backwards to the branch, waits and rebasing among them."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", function)]
    places = {at: i for i, (at, _) in enumerate(code)}
    ends = []
    for i, (at, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            ends.append((places[int(target[1], 16)], i))
    inner = [(a, b) for a, b in ends if not any((a, b) != (c, d) and a <= c and d <= b for c, d in ends)]
    return [[text for _, text in code[a : b + 1]] for a, b in inner]


#: Instructions a logit of the loops over whole tiles, at most.
LEAN = {"statistics": 7.5, "gradient": 6.0, "gradient with entropy": 8.0}
LEAN_KERNELS = {
    "stats_kernelINS_4Bf16ELNS0_4SumsE0ELb1E": {"statistics"},
    "grad_kernelINS_4Bf16ELb0E": {"gradient", "gradient with entropy"},
    "ring_kernelINS_4Bf16ELb0E": {*LEAN},
}


def kind_of(loop: list[str]) -> str | None:
    """Of a loop in which a thread has 4 or 8 vectors of 8 logits, an exponential each."""
    count = {name: sum(name in text for text in loop) for name in ("MUFU.EX2", "MNMX", "HMNMX", "STS", "STG")}
    if count["MUFU.EX2"] not in (32, 33, 64):
        return None
    if not count["STS"] and not count["STG"]:
        return "statistics"
    # Exponents are bounded where an entropy needs it: two logits at once. One by one it is the loop for logits far from zero, which is never hot.
    return "gradient" if not count["MNMX"] else "gradient with entropy" if count["HMNMX"] else None


def too_many(sass: str, kernel: str) -> list[str]:
    """What is wrong with a kernel's loops over whole tiles: instructions, accesses narrower than 16 bytes, a 64-bit division."""
    (function,) = (f for f in re.split(r"Function : ", sass)[1:] if re.search(rf"\d{kernel}", f.split()[0]))
    by_kind = {kind_of(loop): loop for loop in loops(function)}
    found = [f"{kernel}: no loop of {kind}" for kind in LEAN_KERNELS[kernel] - by_kind.keys()]
    for kind in LEAN_KERNELS[kernel] & by_kind.keys():
        loop, name = by_kind[kind], f"{kernel}, {kind}"
        logits = sum("MUFU.EX2" in x for x in loop) // 32 * 32
        if len(loop) > LEAN[kind] * logits:
            found.append(f"{name}: {len(loop) / logits:.2f} instructions a logit, at most {LEAN[kind]}")
        # Of a row's constants there may be other loads.
        loads = [x for x in loop if re.search(r"\b(LDG|LDS)\.", x)]
        if sum(".128" in x for x in loads) != logits // 8 or any(".U16" in x for x in loads):
            found.append(f"{name}: logits not read by 16 bytes")
        if any(re.search(r"\bCALL|MUFU\.RCP64H|I2F\S*\.U64|F2I\S*\.U64", x) for x in loop):
            found.append(f"{name}: a 64-bit division")
    return found


def test_sass_has_wide_accesses_and_no_local_memory(tmp_path):
    for file, functions in (("streaming.cu", 10), ("divergence.cu", 6), ("scale.cu", 1)):
        sass = compile_sass(ROOT / "csrc/cuda" / file, "bf16", tmp_path, nvcc_flags())
        assert problems(sass, functions) == [], file
        if file == "streaming.cu":
            assert [fault for kernel in list(LEAN_KERNELS)[:2] for fault in too_many(sass, kernel)] == []


def test_sass_of_the_ring(tmp_path):
    """Bulk copies both ways, messages, and no barrier of all memory in the rows' loop: one comes with the barrier of the cluster at the start."""
    sass = compile_sass(ROOT / "csrc/cuda/ring.cu", "bf16", tmp_path, nvcc_flags())
    assert problems(sass, 2) == []
    assert too_many(sass, [*LEAN_KERNELS][2]) == []
    for function in re.split(r"Function : ", sass)[1:]:
        assert len(re.findall(r"MEMBAR\.\S*GPU", function)) <= 1, function.split()[0]


@pytest.mark.slow
def test_the_gates_see_spills_and_narrow_accesses(tmp_path):
    """The negative control: too few registers fail the build by its own flags, and without those the dump shows local memory."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/cuda/streaming.cu"
    ring = tmp_path / "csrc/cuda/ring.cu"
    source.write_text(source.read_text().replace("RW_KERNEL(kThreads, kRuleBlocks<kFull>)", "RW_KERNEL(kThreads, 5)"))
    with pytest.raises(subprocess.CalledProcessError):
        compile_sass(source, "bf16", tmp_path, nvcc_flags())
    lenient = [f for f in nvcc_flags() if "Werror" not in f]
    assert any("local memory" in p for p in problems(compile_sass(source, "bf16", tmp_path, lenient), 10))
    elements = tmp_path / "csrc/cuda/elements.h"
    elements.write_text(elements.read_text().replace("return aligned ? load16(p) : load_elements(p);", "return load_elements(p);"))
    gradient = tmp_path / "csrc/cuda/gradient.h"
    gradient.write_text(gradient.read_text().replace("v[u] = load16(x", "v[u] = load_elements(x"))
    assert any("no LDG" in p for p in problems(compile_sass(source, "bf16", tmp_path, lenient), 10))
    text = ring.read_text()
    planted = text.replace("if (lane < slice.slices.count) {", "if (false) {")
    assert planted != text
    ring.write_text(planted)
    assert any("no STAS" in p for p in problems(compile_sass(ring, "bf16", tmp_path, nvcc_flags()), 2))
    ring.write_text(text)
    elements.write_text(
        (ROOT / "csrc/cuda/elements.h").read_text().replace("kBoundsPairs = std::is_same_v<T, Bf16>", "kBoundsPairs = false")
    )
    assert any(
        "no loop of gradient with entropy" in p for p in too_many(compile_sass(ring, "bf16", tmp_path, nvcc_flags()), [*LEAN_KERNELS][2])
    )
    divided = text.replace(
        "const int whole = to < slice.whole_tiles ? to : slice.whole_tiles;\n    for (int t = from; t < whole; ++t) {\n        wait",
        "const int whole = to < slice.whole_tiles ? to : slice.whole_tiles;\n    for (int t = from; t < whole; ++t) {\n        if (slice.end % (slice.first + t + 1) == 12345) return;\n        wait",
    )
    assert divided != text
    ring.write_text(divided)
    assert any("64-bit division" in p for p in too_many(compile_sass(ring, "bf16", tmp_path, nvcc_flags()), [*LEAN_KERNELS][2]))


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
    program, params = Program.of(("clip",)), torch.tensor([-20.0, 20.0, 1.0, 0.2, 0.2, float("inf")])
    reference = select.load("reference")
    want_out, out = torch.empty_like(z), torch.empty_like(z, device="cuda")
    want = reference.token_loss_grad(z, ids, torch.ones(1), SoftmaxParams(v), inputs, program, params, want_out)
    there = RowInputs(*(x if x is None else x.cuda() for x in inputs))
    got = backend.token_loss_grad(z.cuda(), ids.cuda(), torch.ones(1, device="cuda"), SoftmaxParams(v), there, program, params.cuda(), out)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.cpu(), want_out)
    stats = backend.token_stats(z.cuda(), ids.cuda(), torch.ones(1, device="cuda"), SoftmaxParams(v), ("logp",))
    assert torch.equal(stats[0], got[0])
