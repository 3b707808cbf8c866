"""The ring kernel, run thread by thread on the CPU.

Its reference is the streaming kernel, whose accuracy
tests/backends/cuda/test_cuda_emulated.py checks. Both must agree in every bit, for any
batch, under every schedule of threads, copies and messages.
"""

import math

import pytest
import torch
from built_in import own_rules
from criterion import assert_gradient, assert_values
from cuda_emulation.fixtures import SCHEDULES, emulated
from kernel_oracle import gradient, rows, statistics

from reweight_ops._core.backends.base import RowInputs, SoftmaxParams
from reweight_ops._core.formula.loss_program import Program
from reweight_ops._core.rows.groups import IGNORE_INDEX

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Row lengths in 16-byte vectors, and the blocks of a cluster. A tile is 1024 vectors;
#: a block holds up to 10 tiles of a row, and 13 of two rows.
SHAPES = {
    "none": (0, 1),
    "part of a tile": (100, 1),
    "a tile": (1024, 1),
    "six tiles": (6 * 1024 - 3, 1),
    "ten tiles": (10 * 1024 - 3, 1),  # and 3 of the next row
    "two blocks": (10 * 1024 + 8, 2),
    "two blocks, part ahead": (15000, 2),  # 8 tiles, 5 of the next row
    "four": (25001, 4),  # 7 and 6
    "eight": (41001, 8),
}
CLAMP = [-20.0, 20.0]
CLIP = [1.0, 0.2, 0.2, math.inf]
PROGRAMS = {
    "plain": (Program.of(("clip",)), [*CLAMP, *CLIP]),
    "entropy": (Program.of(("clip", "entropy_bonus")), [*CLAMP, *CLIP, 0.05]),
}
NOT_SUPPORTED = "status 801"


@pytest.fixture(scope="module")
def loaded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield emulated()
    torch.set_num_threads(threads)


@pytest.fixture
def emulator(loaded):
    yield loaded[0]
    loaded[0].set_kernel("auto")
    loaded[0].set_device(9, 227 << 10, 2)


@pytest.fixture
def cuda(loaded, emulator):
    return loaded[1]


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


def width(vectors, dtype, tail=0):
    return vectors * (16 // dtype.itemsize) + tail


def aligned(shape, dtype, fill=math.nan):
    """A tensor whose rows are padded to whole vectors."""
    columns = -(-shape[-1] * dtype.itemsize // 16) * 16 // dtype.itemsize
    made = torch.full((*shape[:-1], columns + 16), fill, dtype=dtype)
    assert made.data_ptr() % 16 == 0
    return made[..., : shape[-1]]


def batch(n, v, dtype, padding=0, seed=0):
    """Rows of every kind: plain, ignored, with a bad id, -inf in columns and in whole
    tiles, a masked target, NaN, and without a gradient.
    """
    values, ids = rows(n, v, dtype, "plain", seed=seed)
    z = aligned((n, v + padding), dtype)
    z[:, :v] = values
    kind = torch.arange(n) % 8
    z[kind == 2, : v // 2] = -math.inf
    z[kind == 2, v - 1] = 1.0
    z[kind == 3, v // 3] = math.nan
    z[torch.arange(n)[kind == 4], ids[kind == 4]] = -math.inf
    z[kind == 5] = math.nan
    ids[kind == 5] = IGNORE_INDEX
    z[kind == 6] = math.inf
    ids[kind == 6] = v
    ids[kind == 1] = v - 1  # the last column: in the tail, if there is one
    adv = torch.randn(n, generator=torch.Generator().manual_seed(seed)).sign()
    adv[kind == 7] = 0.0
    return z, ids, adv


def loss_grad(
    cuda,
    z,
    ids,
    adv,
    program=PROGRAMS["entropy"],
    softmax=None,
    temperature=None,
    out=None,
    inputs=None,
):
    n = ids.numel()
    out = aligned(z.shape, z.dtype) if out is None else out
    temperature = torch.linspace(0.7, 1.4, n) if temperature is None else temperature
    weights = torch.ones(len(program[0].terms), n)
    given = RowInputs(weights, torch.linspace(-3, 0, n), adv) if inputs is None else inputs
    return cuda.token_loss_grad(
        z,
        ids,
        temperature,
        softmax or SoftmaxParams(z.size(-1)),
        given,
        program[0],
        torch.tensor(program[1]),
        out,
    ), out


def same(a, b):
    """Bitwise equal: NaN is NaN, and a zero has its sign."""
    kinds = {4: torch.int32, 2: torch.int16}
    return torch.equal(
        a.contiguous().view(kinds[a.itemsize]), b.contiguous().view(kinds[b.itemsize])
    )


def by_streaming(emulator, cuda, *args, **keywords):
    emulator.set_kernel("streaming")
    emulator.set_schedule("eager", 0)
    return loss_grad(cuda, *args, **keywords)


def by_ring(emulator, cuda, schedule, seed, *args, **keywords):
    emulator.set_kernel("ring")
    emulator.set_schedule(schedule, seed)
    return loss_grad(cuda, *args, **keywords)


#: Clusters of several blocks under every schedule in one dtype: dtypes do not affect
#: waits.
CASES = [
    (d, s, k)
    for s in SHAPES
    for d in DTYPES
    for k in SCHEDULES
    if d == "bf16"
    or (k == "random" and s not in ("four", "eight"))
    or s in ("none", "part of a tile")
]


@pytest.mark.parametrize(("dtype", "shape", "schedule"), CASES)
def test_as_the_streaming_kernel(emulator, cuda, dtype, shape, schedule):
    dtype, vectors = DTYPES[dtype], SHAPES[shape][0]
    v = width(vectors, dtype, tail=3)
    n = 16 if vectors < 7000 else 9
    emulator.set_device(9, 227 << 10, 2 if n == 16 else 1)
    z, ids, adv = batch(n, v, dtype, padding=5)
    softmax = SoftmaxParams(v)
    want_rows, want = by_streaming(emulator, cuda, z, ids, adv, softmax=softmax)
    assert (
        (want[..., v:] == 0).all() and (want[ids == IGNORE_INDEX] == 0).all() and (want != 0).any()
    )
    got_rows, got = by_ring(emulator, cuda, schedule, 1, z, ids, adv, softmax=softmax)
    assert same(got_rows, want_rows) and same(got, want)
    clone = aligned(z.shape, dtype)
    clone.copy_(z)
    got_rows, _ = by_ring(emulator, cuda, schedule, 2, clone, ids, adv, softmax=softmax, out=clone)
    assert same(got_rows, want_rows) and same(clone, want), "in place"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("schedule", ["late", "random", "skew"])
@pytest.mark.parametrize("shape", ["part of a tile", "two blocks", "two blocks, part ahead"])
def test_many_rows(emulator, cuda, shape, schedule, seed):
    """Enough rows for every ring and stage to be reused several times, in
    one cluster."""
    v = width(SHAPES[shape][0], torch.bfloat16)
    n = 40 if shape == "part of a tile" else 14
    z, ids, adv = batch(n, v, torch.bfloat16, seed=seed)
    emulator.set_device(9, 227 << 10, 1)
    want_rows, want = by_streaming(emulator, cuda, z, ids, adv)
    got_rows, got = by_ring(emulator, cuda, schedule, seed, z, ids, adv)
    assert same(got_rows, want_rows) and same(got, want)


@pytest.mark.parametrize("schedule", ["random", "skew"])
@pytest.mark.parametrize("case", ["plain", "entropy", "softcap", "squares"])
def test_every_gradient(emulator, cuda, dtype, case, schedule, monkeypatch):
    """Each form of the sweep, over two blocks, with the target in every slice and in
    the tail.
    """
    v = width(SHAPES["two blocks"][0], dtype, tail=1)
    z, ids, adv = batch(8, v, dtype)
    ids[0], ids[2], ids[7] = 0, v // 2 + 8, v - 2
    adv[:] = torch.tensor([1.0, -1.0] * 4)
    program = PROGRAMS.get(case, PROGRAMS["entropy"])
    if case == "squares":
        compiled = cuda.compiled  # as for a rule that reads log_sum_p_sq
        monkeypatch.setattr(
            cuda, "compiled", lambda *a: (*compiled(*a)[:2], True, *compiled(*a)[3:])
        )
    softmax = SoftmaxParams(v, 12.0 if case == "softcap" else math.inf)
    want_rows, want = by_streaming(emulator, cuda, z, ids, adv, program=program, softmax=softmax)
    got_rows, got = by_ring(
        emulator, cuda, schedule, 1, z, ids, adv, program=program, softmax=softmax
    )
    assert same(got_rows, want_rows) and same(got, want)


@pytest.mark.parametrize("name", own_rules())
def test_every_rule(emulator, cuda, name):
    n, v = 8, width(100, torch.float32)
    z, ids = rows(n, v, torch.float32, "plain")
    g = torch.Generator().manual_seed(1)
    old, ref, sampling = (torch.randn(n, generator=g) - 3 for _ in range(3))
    inputs = RowInputs(
        torch.rand(1, n, generator=g), old, torch.randn(n, generator=g), ref, sampling
    )
    values = [0.5] * len(own_rules()[name].parameter_names())
    program = Program.of((name,)), [*CLAMP, 1.0, *values]
    want_rows, want = by_streaming(emulator, cuda, z, ids, None, program=program, inputs=inputs)
    got_rows, got = by_ring(
        emulator, cuda, "random", 1, z, ids, None, program=program, inputs=inputs
    )
    assert same(got_rows, want_rows) and same(got, want)


def test_accuracy_over_eight_blocks(emulator, cuda):
    """The criterion against fp64, so that not everything depends on the streaming
    kernel.
    """
    v, n = width(41001, torch.bfloat16), 4
    z, ids = rows(n, v, torch.bfloat16, "plain")
    t, adv = torch.tensor([0.8]), torch.tensor([1.0, -1.0, 2.0, 0.5])
    # on-policy: the coefficient is -adv
    inputs = RowInputs(torch.ones(1, n), None, adv)
    got, out = by_ring(
        emulator,
        cuda,
        "random",
        1,
        z,
        ids,
        adv,
        program=PROGRAMS["plain"],
        temperature=t,
        inputs=inputs,
    )
    exact, single = (
        statistics(z.to(d), ids, t.to(d).expand(n)) for d in (torch.float64, torch.float32)
    )
    for k, name in enumerate(("logp", "entropy")):
        assert_values(got[k], single[name], exact[name], name)
    assert torch.equal(got[4], -adv)
    truth, base = (
        gradient(z.to(d), ids, t.to(d).expand(n), {"logp": -adv})
        for d in (torch.float64, torch.float32)
    )
    assert_gradient(out, base, truth, adv.abs() / t, ids)


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_agree(emulator, cuda, dtype, shape):
    """An on-policy ratio is exactly 1, wherever the row starts: token_stats and both
    kernels add in the same order.
    """
    v, n = width(SHAPES[shape][0], dtype, tail=2), 3
    values, ids = rows(n, v, dtype, "plain")
    z = aligned((n, v), dtype)
    z.copy_(values)
    odd = torch.empty(n, v + 1, dtype=dtype)[:, 1:]
    odd.copy_(values)
    emulator.set_schedule("random", 3)
    one = torch.ones(1)
    logp = cuda.token_stats(z, ids, one, SoftmaxParams(v), ("logp",))[0]
    assert torch.equal(cuda.token_stats(odd, ids, one, SoftmaxParams(v), ("logp",))[0], logp)
    inputs = RowInputs(torch.ones(1, n), logp, torch.ones(n))
    for logits, kernel in ((z, "ring"), (z, "streaming"), (odd, "auto")):
        emulator.set_kernel(kernel)
        got, _ = loss_grad(
            cuda, logits, ids, None, program=PROGRAMS["plain"], temperature=one, inputs=inputs
        )
        assert torch.equal(got[0], logp) and (got[4] == -1).all(), kernel


def test_nothing_is_written_around_rows(emulator, cuda, dtype):
    v = width(1100, dtype)
    values, ids = rows(5, v, dtype, "plain")
    buffer = torch.full((7, v + 64), 7.0, dtype=dtype)
    view = buffer[1:6, 32 : 32 + v]
    view.copy_(values)
    _, want = by_streaming(emulator, cuda, view.clone(), ids, torch.ones(5))
    by_ring(emulator, cuda, "late", 1, view, ids, torch.ones(5), out=view)
    assert same(view, want)
    view.fill_(7.0)
    assert (buffer == 7).all()


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_fewer_rows_than_clusters(emulator, cuda, n):
    v = width(SHAPES["two blocks"][0], torch.bfloat16)
    emulator.set_device(9, 227 << 10, 3)
    values, ids = rows(max(n, 1), v, torch.bfloat16, "plain")
    z, ids = values[:n], ids[:n]
    want_rows, want = by_streaming(emulator, cuda, z, ids, torch.ones(n))
    got_rows, got = by_ring(emulator, cuda, "random", 1, z, ids, torch.ones(n))
    assert same(got_rows, want_rows) and same(got, want)


def test_all_rows_out(emulator, cuda):
    v = width(1030, torch.bfloat16, tail=1)
    z, ids = aligned((5, v), torch.bfloat16), torch.full((5,), IGNORE_INDEX)
    got, out = by_ring(emulator, cuda, "random", 1, z, ids, torch.ones(5))
    assert (got == 0).all() and (out == 0).all()


# ---- which kernel a call takes


def why(cuda, emulator, z, out=None):
    call = cuda.call(
        z,
        torch.zeros(z.numel() // max(z.size(-1), 1), dtype=torch.int64),
        torch.ones(1),
        SoftmaxParams(z.size(-1)),
    )
    out = z if out is None else out
    return emulator.ring_unsupported_reason(call, out.data_ptr(), cuda.out_rows(z, out))


def test_the_rule(emulator, cuda):
    z = torch.zeros(4, 1024, dtype=torch.bfloat16)
    assert why(cuda, emulator, z) == ""
    assert (
        why(cuda, emulator, torch.zeros(4, 1024 * 257, dtype=torch.bfloat16)[:, : 1024 * 256]) == ""
    ), "262144 columns in 16 bits"
    assert why(cuda, emulator, torch.zeros(4, 262144)) == "", "as many in 32 bits"
    assert why(cuda, emulator, torch.zeros(1, 393216)) == ""
    odd = torch.zeros(4, 1025, dtype=torch.bfloat16)
    for reason, logits, out in (
        ("rows of the logits", odd[:, :1024], z),
        ("rows of the logits", odd.view(-1)[1:1025].view(1, 1024), z[:1]),
        (
            "rows of the logits",
            torch.zeros(2, 3 * 1024 + 1, dtype=torch.bfloat16)[:, : 3 * 1024].view(2, 3, 1024),
            torch.zeros(2, 3, 1024, dtype=torch.bfloat16),
        ),
        ("rows of the gradient", z, odd[:, :1024]),
        ("does not fit in the shared memory of 8 blocks", torch.zeros(1, 393220), None),
    ):
        assert reason in why(cuda, emulator, logits, out)
    assert why(cuda, emulator, odd[:1, :1024]) == "", "one row has no stride"
    emulator.set_device(8, 164 << 10, 2)
    assert "older than Hopper" in why(cuda, emulator, z)
    emulator.set_device(12, 99 << 10, 2)  # the smaller shared memory of sm_120
    assert why(cuda, emulator, torch.zeros(1, 32768, dtype=torch.bfloat16)) == ""
    assert "does not fit" in why(cuda, emulator, torch.zeros(1, 32776, dtype=torch.bfloat16))
    emulator.set_device(9, 2 * 16400 + 2816, 2)
    assert "3 tiles of 16 KiB in each, 2 fit" in why(cuda, emulator, z), (
        "one of the next row, and one in motion"
    )
    emulator.set_device(9, 227 << 10, 0)
    assert "cannot run a cluster of 1 blocks" in why(cuda, emulator, z)
    emulator.set_kernel("streaming")
    assert "set_kernel chose" in why(cuda, emulator, z)
    with pytest.raises(ValueError, match="auto, streaming or ring"):
        emulator.set_kernel("best")


@pytest.mark.parametrize("device", [(8, 164 << 10, 2), (9, 227 << 10, 0), (9, 40 << 10, 2)])
def test_what_the_ring_cannot_serve_is_streamed(emulator, cuda, device):
    """A kernel that is requested by name does not fall back."""
    z, ids = rows(3, 1024, torch.bfloat16, "plain")
    want = by_streaming(emulator, cuda, z, ids, torch.ones(3))
    emulator.set_device(*device)
    emulator.set_kernel("auto")
    got = loss_grad(cuda, z, ids, torch.ones(3))
    assert same(got[0], want[0]) and same(got[1], want[1])
    with pytest.raises(AssertionError, match=NOT_SUPPORTED):
        by_ring(emulator, cuda, "eager", 0, z, ids, torch.ones(3))


def test_a_small_ring(emulator, cuda):
    """The smallest number of tiles that a row needs: the row, one tile of the next, and
    one in flight. And a few more, up to a whole row ahead.
    """
    for v, least in ((5000, 3), (20000, 5)):
        z, ids, adv = batch(20, v, torch.bfloat16)
        want = by_streaming(emulator, cuda, z, ids, adv)
        for tiles in (least, least + 1, least + 2):
            emulator.set_device(9, tiles * 16400 + 2816, 1)
            for schedule in SCHEDULES:
                got = by_ring(emulator, cuda, schedule, 1, z, ids, adv)
                assert same(got[0], want[0]) and same(got[1], want[1]), schedule
