"""Tests of the tests: bugs planted in the CUDA kernels, each of which the tests of the emulated kernels have to find. And sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation.build import ROOT, SANITIZE, build, compiler

pytestmark = [pytest.mark.slow, pytest.mark.skipif(compiler() is None, reason="no C++ compiler to build the emulated kernels")]

#: name: (file, what it says, what the bug says)
MUTANTS = {
    "no barrier before the block's merge": ("statistics.h", "    barrier();\n    if (warp == 0)", "    if (warp == 0)"),
    "no second set of partial sums": ("streaming.cu", "            buffer ^= 1;\n            if (thread_index() == 0) {", "            if (thread_index() == 0) {"),
    "no barrier before the gradient": ("streaming.cu", "        barrier();\n        write_gradient<T, kFull>(row.x, out, int(call.vocab_size), int(call.columns), row.target, gradient,", "        write_gradient<T, kFull>(row.x, out, int(call.vocab_size), int(call.columns), row.target, gradient,"),
    "no barrier before a known gradient": ("streaming.cu", "        barrier();\n        write_gradient<T, kFull>(row.x, out, int(call.vocab_size), int(call.columns), row.target, gradients", "        write_gradient<T, kFull>(row.x, out, int(call.vocab_size), int(call.columns), row.target, gradients"),
    "no second row of constants": ("streaming.cu", "gradients[buffer], softcap);\n        buffer ^= 1;", "gradients[buffer], softcap);"),
    "entropy sum not rebased": ("statistics.h", "factor * fmaf(shift, s.sum, s.dot)", "factor * s.dot"),
    "sum of squares rebased once": ("statistics.h", "s.sum_sq *= factor * factor", "s.sum_sq *= factor"),
    "no guard for -inf": ("statistics.h", "return top == -kInf ? 0.0f : top * scale", "return top * scale"),
    "0 * -inf in the entropy": ("statistics.h", "dot = fmaf(e, fmaxf(t, kFloor), dot)", "dot = fmaf(e, t, dot)"),
    "0 * -inf in the gradient": ("gradient.h", "fmaf(fmaxf(t, kFloor), g.log, g.constant)", "fmaf(t, g.log, g.constant)"),
    "last columns forgotten": ("statistics.h", "    if (tail < columns) {", "    if (tail + 1 < columns) {"),
    "a vector too many": ("statistics.h", "if (i < vectors) v[u] = load_vector", "if (i <= vectors) v[u] = load_vector"),
    "gradient starts a step late": ("gradient.h", "(vectors - 1) / kStep * kStep", "vectors / kStep * kStep - kStep"),
    "target written by another thread": ("gradient.h", "owner<T>(target, vocab) == thread_index()", "(owner<T>(target, vocab) ^ 1) == thread_index()"),
    "target by its rounded probability": ("gradient.h", "logp_coef * expm1f(logp)", "logp_coef * (expf(logp) - 1.0f)"),
    "softcap without slope": ("gradient.h", "fmaf(e, g.p_coef, factor) * slope", "fmaf(e, g.p_coef, factor)"),
    "softcap makes -inf finite": ("statistics.h", "if (fabsf(x) != kInf) x = cap * r", "x = cap * r"),
    "padding not cleared": ("gradient.h", "column < columns; column += kThreads", "column < vocab; column += kThreads"),
    "vectors at any address": ("elements.h", "& 15) == 0", "& 1) == 0"),
    "32-bit offsets": ("../common/verbs.h", "return (i / per_batch) * batch_stride", "return int32_t((i % per_batch) * row_stride) + (i / per_batch) * batch_stride; return (i / per_batch) * batch_stride"),
    "one temperature for all": ("streaming.cu", "call.temperature_per_row ? i : 0", "0"),
    "rows that are out are swept": ("../common/verbs.h", "return call.ids[i] < 0 ||", "return"),
    "shards ignored": ("streaming.cu", "call.ids[i] - call.vocab_start", "call.ids[i]"),
    "inert rows are swept": ("gradient.h", "    if (d.all_zero()) return g;\n", ""),
    "NaN rows get numbers": ("gradient.h", "    if (rest != rest) {", "    if (false) {"),
    "the top's share approximate": ("statistics.h", "s.sum += expm1f(t * kLn2) - (e - 1.0f);", ""),
    "the words of a pair swapped": ("elements.h", "narrow_pair<T>(x[2 * j], x[2 * j + 1])", "narrow_pair<T>(x[2 * j + 1], x[2 * j])"),
    "the scale's rounding ignored": ("statistics.h", "rounding / log2e * (mean - t_top)", "0.0"),
}  # fmt: skip


def run_tests(module: Path, **environment: str) -> subprocess.CompletedProcess:
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(ROOT / "tests/test_cuda_emulated.py"),
    ]
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=900,
        cwd=ROOT,
        env={**os.environ, "REWEIGHT_OPS_EMULATED": str(module), **environment},
    )


@pytest.fixture(scope="module", autouse=True)
def control():
    """Without a planted bug everything passes: a failure would count as found 28 times."""
    result = run_tests(build())
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(name, tmp_path):
    file, text, bug = MUTANTS[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc/cuda" / file
    source = path.read_text()
    assert source.count(text) == 1, f"the text of mutant {name!r} is not there once"
    path.write_text(source.replace(text, bug))
    result = run_tests(build(tmp_path / "csrc", folder=tmp_path / "build"))
    assert result.returncode not in (0, 2, 3, 4, 5), f"not found: {name}\n{result.stdout[-2000:]}"


def test_sanitizers():
    """Reads and writes outside of rows, and undefined behavior; the whole suite, under AddressSanitizer and UBSan."""
    library = subprocess.run([*(compiler() or "").split(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("no AddressSanitizer")
    module = build(flags=("-O1", *SANITIZE))
    result = run_tests(module, LD_PRELOAD=library, ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
