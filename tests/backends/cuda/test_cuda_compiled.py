"""The compiled CUDA kernels of every target of setup.py: no spills, no warnings, and no
longer loops.
"""

import re
import shutil

import nvcc
import pytest
from paths import ROOT

SASS_ARCH, ARCHS = "90", ["80", "90", "100", "120"]
CSRC = ROOT / "csrc"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The fatbin for one target and the compiler's output, by kernel and dtype."""
    folder, made = tmp_path_factory.mktemp("fatbins"), {}

    def get(kernel, dtype="bf16", arch=SASS_ARCH):
        at = kernel, dtype, arch
        if at not in made:
            fatbin = folder / f"{'_'.join(at)}.fatbin"
            made[at] = (fatbin, nvcc.compile_kernels(CSRC, kernel, dtype, [arch], fatbin))
        return made[at]

    return get


#: A file takes 4 to 12 seconds a target. The others are slow tests.
USUAL = [("bf16", "90"), ("bf16", "100")]  # sm_100 has spilled where no other target did


@pytest.mark.parametrize(
    ("kernel", "dtype", "arch"),
    [
        pytest.param(k, d, a, marks=() if (d, a) in USUAL else pytest.mark.slow)
        for d in nvcc.DTYPES
        for k in nvcc.KERNELS
        for a in ARCHS
    ],
)
def test_no_kernel_spills_on_any_target(compiled, kernel, dtype, arch):
    """A spill fails the build, and ``auto`` would then install without CUDA kernels. No
    other warning is allowed either.
    """
    _, said = compiled(kernel, dtype, arch)
    assert said == ""


def test_every_target_is_tested():
    assert nvcc.archs() == ARCHS


#: Instructions that each function of a kernel must have. UBLKCP is a bulk copy (to
#: shared memory, to global), STAS st.async, SYNCS an mbarrier.
NEEDED = {
    "stats_kernel": [r"LDG\S*\.128"],
    "grad_kernel": [r"LDG\S*\.128", r"STG\S*\.128"],
    "divergence_kernel": [
        r"LDG\S*\.128",
        r"STG\S*\.128",
        r"STAS\S*\.128",
        r"SYNCS\S*TRYWAIT",
    ],
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


#: Statistics, those with ids, and loss, with and without a soft cap and rows at any
#: address; gradient with and without a soft cap; both of packed rows.
STREAMING = 18


def problems(sass: str, count: int) -> list[str]:
    """Problems by function: missing instructions, and accesses of local memory."""
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
    """The instructions of each innermost loop, from the target of a backward branch to
    the branch.

    They include waits and rebasing.
    """
    code = [
        (int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", function)
    ]
    places = {at: i for i, (at, _) in enumerate(code)}
    ends = []
    for i, (at, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            ends.append((places[int(target[1], 16)], i))
    inner = [
        (a, b) for a, b in ends if not any((a, b) != (c, d) and a <= c and d <= b for c, d in ends)
    ]
    return [[text for _, text in code[a : b + 1]] for a, b in inner]


#: Maximum of instructions per logit in the loops over whole tiles.
LEAN = {"statistics": 7.5, "gradient": 6.0, "gradient with entropy": 8.0}
LEAN_KERNELS = {
    "stats_kernelINS_4Bf16ELNS0_4SumsE1ELb1E": {"statistics"},
    "grad_kernelINS_4Bf16ELb0E": {"gradient", "gradient with entropy"},
    "ring_kernelINS_4Bf16ELb0E": {*LEAN},
}


def kind_of(loop: list[str]) -> str | None:
    """Kind of a loop in which a thread has 4 or 8 vectors of 8 logits, with one
    exponential each.
    """
    count = {
        name: sum(name in text for text in loop)
        for name in ("MUFU.EX2", "MNMX", "HMNMX", "STS", "STG")
    }
    if count["MUFU.EX2"] not in (32, 33, 64):
        return None
    if not count["STS"] and not count["STG"]:
        return "statistics"
    # An entropy needs bounded exponents, two logits at once. Bounding one by one is the
    # loop for logits far from zero, which is never hot.
    return "gradient" if not count["MNMX"] else "gradient with entropy" if count["HMNMX"] else None


def too_many(sass: str, kernel: str) -> list[str]:
    """Problems of a kernel's loops over whole tiles: too many instructions, narrow
    accesses, a 64-bit division.
    """
    (function,) = (
        f for f in re.split(r"Function : ", sass)[1:] if re.search(rf"\d{kernel}", f.split()[0])
    )
    by_kind = {kind_of(loop): loop for loop in loops(function)}
    found = [f"{kernel}: no loop of {kind}" for kind in LEAN_KERNELS[kernel] - by_kind.keys()]
    for kind in LEAN_KERNELS[kernel] & by_kind.keys():
        loop, name = by_kind[kind], f"{kernel}, {kind}"
        logits = sum("MUFU.EX2" in x for x in loop) // 32 * 32
        if len(loop) > LEAN[kind] * logits:
            found.append(
                f"{name}: {len(loop) / logits:.2f} instructions a logit, at most {LEAN[kind]}"
            )
        # A row's constants may have other loads.
        loads = [x for x in loop if re.search(r"\b(LDG|LDS)\.", x)]
        if sum(".128" in x for x in loads) != logits // 8 or any(".U16" in x for x in loads):
            found.append(f"{name}: logits not read by 16 bytes")
        if any(re.search(r"\bCALL|MUFU\.RCP64H|I2F\S*\.U64|F2I\S*\.U64", x) for x in loop):
            found.append(f"{name}: a 64-bit division")
    return found


def test_sass_has_wide_accesses_and_no_local_memory(compiled):
    for kernel, functions in (("streaming", STREAMING), ("divergence", 6), ("scale", 1)):
        sass = nvcc.sass(compiled(kernel)[0], SASS_ARCH)
        assert problems(sass, functions) == [], kernel
        if kernel == "streaming":
            assert [
                fault for kernel in list(LEAN_KERNELS)[:2] for fault in too_many(sass, kernel)
            ] == []


def test_sass_of_the_ring(compiled):
    """There are bulk copies both ways and messages, and no barrier of all memory in the
    rows' loop.

    One such barrier comes with the barrier of the cluster at the start.
    """
    sass = nvcc.sass(compiled("ring")[0], SASS_ARCH)
    assert problems(sass, 2) == []
    assert too_many(sass, [*LEAN_KERNELS][2]) == []
    for function in re.split(r"Function : ", sass)[1:]:
        assert len(re.findall(r"MEMBAR\.\S*GPU", function)) <= 1, function.split()[0]


def with_lines(sass, after, more):
    """The code with other instructions after each that has ``after``, at addresses of
    their own.
    """
    made = []
    for line in sass.splitlines():
        made.append(line)
        if after in line:
            made += [
                f"        /*{0xF0000000 + len(made) + k:x}*/ {x} ;" for k, x in enumerate(more)
            ]
    return "\n".join(made)


def test_the_gate_sees_long_and_narrow_loops(compiled):
    """The negative control of the counts, on machine code that is changed as text."""
    sass, kernels = nvcc.sass(compiled("streaming")[0], SASS_ARCH), list(LEAN_KERNELS)[:2]
    for kernel in kernels:
        kinds = LEAN_KERNELS[kernel]
        longer = too_many(with_lines(sass, "MUFU.EX2", ["FADD R0, R0, R1"] * 3), kernel)
        assert sum("instructions a logit" in x for x in longer) == len(kinds) == len(longer)
        divides = too_many(with_lines(sass, "MUFU.EX2", ["CALL.REL.NOINC 0x10"]), kernel)
        assert sum("64-bit division" in x for x in divides) == len(kinds)
        narrow = too_many(re.sub(r"(LDG\S*)\.128", r"\1.64", sass), kernel)
        assert sum("not read by 16 bytes" in x for x in narrow) == len(kinds) == len(narrow)
        assert too_many(sass, kernel) == []


@pytest.fixture
def planted(tmp_path):
    """The machine code of a kernel after a replacement in its sources."""

    def get(kernel, file, text, bug, flags=nvcc.FLAGS):
        csrc = tmp_path / "csrc"
        shutil.copytree(CSRC, csrc, dirs_exist_ok=True)
        source = (csrc / "cuda" / file).read_text()
        assert source.count(text) == 1, f"the text is there {source.count(text)} times"
        (csrc / "cuda" / file).write_text(source.replace(text, bug))
        target = tmp_path / "planted.fatbin"
        nvcc.compile_kernels(csrc, kernel, "bf16", [SASS_ARCH], target, flags)
        return nvcc.sass(target, SASS_ARCH)

    return get


TOO_FEW_REGISTERS = (
    "streaming",
    "streaming.cu",
    "RW_KERNEL(kThreads, kRuleBlocks<kFull>)",
    "RW_KERNEL(kThreads, 5)",
)


@pytest.mark.slow
def test_a_spill_fails_the_build(planted):
    with pytest.raises(RuntimeError, match="spill"):
        planted(*TOO_FEW_REGISTERS)
    lenient = [f for f in nvcc.FLAGS if "Werror" not in f]
    assert any(
        "local memory" in p for p in problems(planted(*TOO_FEW_REGISTERS, lenient), STREAMING)
    )


@pytest.mark.slow
def test_the_gate_sees_narrow_accesses(planted):
    assert any(
        "no LDG" in p
        for p in problems(
            planted("streaming", "gradient.h", "v[u] = load16(x", "v[u] = load_elements(x"),
            STREAMING,
        )
    )


@pytest.mark.slow
def test_the_gate_sees_lost_messages(planted):
    assert any(
        "no STAS" in p
        for p in problems(
            planted("ring", "ring.cu", "if (lane < slice.slices.count) {", "if (false) {"), 2
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "bug", "seen"),
    [
        (
            "elements.h",
            "kBoundsPairs = std::is_same_v<T, Bf16>",
            "kBoundsPairs = false",
            "no loop of gradient with entropy",
        ),
        (
            "ring.cu",
            "for (int t = from; t < whole; ++t) {\n        wait",
            "for (int t = from; t < whole; ++t) {\n        if (slice.end % (slice.first + t + 1) == 12345) return;\n        wait",
            "64-bit division",
        ),
    ],
    ids=("bounds one by one", "a 64-bit division"),
)
def test_the_gate_sees_loops_that_are_not_lean(planted, file, text, bug, seen):
    assert any(seen in p for p in too_many(planted("ring", file, text, bug), [*LEAN_KERNELS][2]))
