"""The chunks of the linear head: sizes, positions of rows, kept logits, dropped rows,
and the dtype of gradient sums.
"""

import pytest
import torch
from peaks import peaks, reads_peaks
from test_linear import BACKENDS, B, D, T, V, from_hidden, from_logits, make, same

import reweight_ops as rw
from reweight_ops._core.calls.chunking import balanced, chunking
from reweight_ops._core.engine.linear import gemms as linear_gemms
from reweight_ops._core.engine.linear.gemms import Chunk, Gradients, compacted

CPU = torch.device("cpu")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def gemms(monkeypatch):
    """Rows of every forward GEMM, and separately of every backward GEMM."""
    seen = {"forward": [], "backward": []}
    logits, add = Chunk.logits, Gradients.add

    def spy_logits(self, hidden):
        seen["forward"].append(hidden.size(0))
        return logits(self, hidden)

    def spy_add(self, rows, h, chunk, with_gradient):
        seen["backward"].append(h.size(0) if with_gradient is None else with_gradient.numel())
        return add(self, rows, h, chunk, with_gradient)

    monkeypatch.setattr(Chunk, "logits", spy_logits)
    monkeypatch.setattr(Gradients, "add", spy_add)
    return seen


# --- sizes ----------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 700, 2048, 8192, 100_000])
@pytest.mark.parametrize("row_bytes", [64, 64000, 303872, 10**9])
@pytest.mark.parametrize("budget", [None, 1 << 20, 1 << 30])
def test_default_chunks(rows, row_bytes, budget):
    """Within the budget (or 256 rows), multiples of 64 with little padding; kept logits
    stay within the budget.
    """
    size, keep = chunking(rows, row_bytes, CPU, None, budget)
    limit = max(min(budget or 96 << 20, 96 << 20) // row_bytes, 256)
    assert 1 <= size <= max(limit, 1)
    if rows > size:
        assert size % 64 == 0
        count = -(-rows // size)
        assert count * size - rows < (64 * count if rows < 2048 else 0.04 * rows)
        assert keep % size == 0 or keep == rows
        assert keep == 0 or (keep + (0 if keep == rows else size)) * row_bytes <= budget
    else:
        assert keep == rows


def test_two_chunks_of_4096_rows_on_a_gpu():
    """They take at most 1.3 GiB at Qwen's vocabulary, with what dropping rows takes."""
    row_bytes = 2 * 151936
    size, keep = chunking(8192, row_bytes, torch.device("cuda"))
    assert (size, keep) == (4096, 0)
    assert size * row_bytes + linear_gemms._BLOCK["cuda"] <= 1.3 * 2**30


def test_explicit_chunks_keep_nothing_by_default():
    assert chunking(100, 8, CPU, 7) == (7, 0)
    # four chunks fit, one of them is the working one
    assert chunking(100, 8, CPU, 7, 8 * 7 * 4) == (7, 21)
    assert chunking(100, 8, CPU, 7, 8 * 100) == (7, 100)
    assert chunking(5, 8, CPU, 7) == (7, 5)
    assert balanced(10, 4) == 4 and balanced(9, 4) == 3


# --- positions of rows ----------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# docs/semantics.md: S31
def test_a_row_is_the_same_bits_wherever_it_stands(backend, dtype):
    """One row at every position of 75 rows in chunks of 32, of which the last is
    padded: log-prob, entropy and gradient.
    """
    g = torch.Generator().manual_seed(0)
    n, width, vocab = 75, 96, 1031
    weight = torch.randn(vocab, width, generator=g).to(dtype)
    rows = torch.randn(n, width, generator=g).to(dtype)
    ids = torch.randint(vocab, (n,), generator=g)
    found = []
    for place in range(n):
        order = [*range(1, place + 1), 0, *range(place + 1, n)]
        h = rows[order].requires_grad_()
        logps, entropies = rw.linear_token_logps(
            h, weight, ids[order], chunk_rows=32, return_entropy=True, backend=backend
        )
        (grad,) = torch.autograd.grad(logps.sum() + entropies.sum(), h)
        found.append((logps[place].item(), entropies[place].item(), tuple(grad[place].tolist())))
    assert len(set(found)) == 1


def test_a_gradient_is_the_same_bits_whichever_other_rows_have_a_coefficient(backend):
    """Backward recomputes only the logits of rows with a gradient.

    Its GEMMs have as many rows as forward's: fewer would round differently.
    """
    g = torch.Generator().manual_seed(0)
    n, width, vocab = 43, 96, 1031
    weight, rows = torch.randn(vocab, width, generator=g), torch.randn(n, width, generator=g)
    ids, found = torch.randint(vocab, (n,), generator=g), []
    for with_gradient in ([1], [1, 2], [1, 2, 3, 7, 40, 41, 42], range(n)):
        h, upstream = (
            rows.clone().requires_grad_(),
            torch.zeros(n).index_fill(0, torch.tensor(with_gradient), 1.0),
        )
        logps = rw.linear_token_logps(h, weight, ids, chunk_rows=32, backend=backend)
        (grad,) = torch.autograd.grad(logps, h, upstream)
        found.append(tuple(grad[1].tolist()))
    assert len(set(found)) == 1


def test_chunk_sizes_agree(backend):  # docs/semantics.md: S31
    """Different chunk sizes agree to the rounding of the logits, not bitwise."""
    d = make(torch.float32)
    want = rw.linear_token_logps(d["hidden"].double(), d["weight"].double(), d["ids"])
    for size in (1, 2, 5, 16, 1000):
        got = rw.linear_token_logps(
            d["hidden"], d["weight"], d["ids"], chunk_rows=size, backend=backend
        )
        torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-6)


# --- kept logits ----------------------------------------------------------------------
@pytest.mark.parametrize("spec", ["grpo", "gspo"])
@pytest.mark.parametrize(
    ("chunks_kept", "forward_rows"),
    [(0, [4] * 6 + [3] + [4] * 6 + [3]), (2, [4] * 6 + [3] + [4] * 4 + [3]), (7, [4] * 6 + [3])],
)
def test_kept_logits_are_not_computed_again(gemms, chunks_kept, forward_rows, spec):
    d = make()
    budget = 4 * V * 8 * (chunks_kept + 1) if chunks_kept else None
    out = from_hidden(
        d, spec, plan="two_pass", chunk_rows=4, memory_budget=budget, compact_rows=False
    )
    same(out, from_logits(d, spec, plan="two_pass"), [d["hidden"], d["weight"], d["bias"]])
    assert gemms["forward"] == forward_rows


def test_a_second_backward_computes_again_what_the_first_wrote_over(gemms):
    d = make()
    out = from_hidden(d, plan="two_pass", chunk_rows=4, memory_budget=1 << 30, compact_rows=False)
    first, second = (
        torch.autograd.grad(out.loss, [d["hidden"], d["weight"]], retain_graph=True)
        for _ in range(2)
    )
    assert len(gemms["forward"]) == 2 * 7
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_nothing_is_kept_without_a_gradient(monkeypatch):
    made = []
    original = Chunk.__init__
    monkeypatch.setattr(
        Chunk, "__init__", lambda self, *args: made.append(1) or original(self, *args)
    )
    d = make()
    for grad in (False, True):
        made.clear()
        with torch.set_grad_enabled(grad):
            rw.linear_token_logps(
                d["hidden"], d["weight"], d["ids"], memory_budget=1 << 30, chunk_rows=4
            )
        assert len(made) == (7 if grad else 1)


# --- rows that matter -----------------------------------------------------------------
@pytest.mark.parametrize("memory_budget", [None, 4 * V * 8 * 3, 1 << 30])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_metrics_count_the_rows_of_the_gemms(gemms, plan, memory_budget):
    """40 % of the rows have no advantage and some are ignored: the metrics count the
    rows of the GEMMs, whatever was kept.
    """
    d = make()
    d["adv"][torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.4] = 0
    lora = rw.Lora(
        torch.randn(2, D, dtype=torch.float64, requires_grad=True),
        torch.randn(V, 2, dtype=torch.float64, requires_grad=True),
        0.5,
    )
    merged = {**d, "weight": d["weight"] + lora.scale * lora.b @ lora.a}
    options = dict(completion_mask=d["mask"], plan=plan, backend="reference")
    ours = from_hidden(d, chunk_rows=4, memory_budget=memory_budget, lora=lora, **options)
    metrics = ours.metrics.as_floats()
    same(
        ours, from_logits(merged, **options), [d["hidden"], d["weight"], d["bias"], lora.a, lora.b]
    )
    kept = d["mask"].sum().item()
    assert metrics["rows_dropped_forward"] == B * T - kept
    if memory_budget is None or plan == "one_pass":
        assert kept - sum(gemms["backward"]) == metrics["rows_dropped_backward"] > 0.2 * kept
    assert sum(gemms["backward"]) <= kept - (metrics["rows_skipped"] - 3)


@pytest.mark.parametrize("rows_at_once", [1, 3, 7, 100])
@pytest.mark.parametrize(
    "with_gradient",
    [
        [],
        [0],
        [39],
        [0, 1, 2, 3],
        [5, 6, 7, 30, 38, 39],
        [*range(1, 40)],
        [*range(0, 40, 2)],
        [*range(40)],
    ],
    ids=str,
)
def test_compacting_in_place_moves_every_row(monkeypatch, with_gradient, rows_at_once):
    chunk, index = (
        torch.randn(40, 6, generator=torch.Generator().manual_seed(0)),
        torch.tensor(with_gradient, dtype=torch.int64),
    )
    monkeypatch.setitem(linear_gemms._BLOCK, "cpu", rows_at_once * 6 * 4 + 5)
    want = chunk[index]
    got = compacted(chunk, index)
    assert torch.equal(got, want) and (not with_gradient or got.data_ptr() == chunk.data_ptr())


def test_counting_is_off_unless_it_may_wait(gemms):
    d = make()
    out = from_hidden(d, completion_mask=d["mask"], compact_rows=False, plan="one_pass")
    assert gemms == {"forward": [B * T], "backward": [B * T]}
    assert out.metrics["rows_dropped_forward"] == out.metrics["rows_dropped_backward"] == 0


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 27], "positions outside 0 to 26"),
        ([-1], "positions outside 0 to 26"),
        ([3, 4, 3], "row 3 more than once"),
        ([0, 1], "leaves out row"),
    ],
)
def test_wrong_row_index(index, message):
    d = make()
    with pytest.raises(rw.InvalidCall, match=message):
        from_hidden(d, completion_mask=d["mask"], row_index=torch.tensor(index))


def test_row_index_in_any_order():
    d = make()
    index = torch.randperm(B * T, generator=torch.Generator().manual_seed(0))
    index = index[d["mask"].flatten()[index]]
    ours = from_hidden(
        d,
        completion_mask=d["mask"],
        row_index=index,
        chunk_rows=4,
        temperature=torch.rand(B, T, dtype=torch.float64) + 0.5,
    )
    assert ours.metrics["rows_dropped_forward"] == (~d["mask"]).sum()
    same(
        from_hidden(d, completion_mask=d["mask"], row_index=index, chunk_rows=4),
        from_logits(d, completion_mask=d["mask"]),
        [d["hidden"], d["weight"]],
    )


# --- the dtype of sums ----------------------------------------------------------------
def weight_gradient(h, w, ids, **options):
    return torch.autograd.grad(rw.linear_token_logps(h, w, ids, **options).sum(), w)[0]


def bf16_problem():
    g = torch.Generator().manual_seed(1)
    h, w = torch.randn(256, D, generator=g).bfloat16(), torch.randn(V, D, generator=g).bfloat16()
    return h, w.requires_grad_(), torch.randint(V, (256,), generator=g)


@pytest.mark.parametrize("chunk_rows", [32, 8], ids=["8 chunks", "32 chunks"])
def test_fp32_sums_round_once(chunk_rows):
    """If requested, fp32 sums are as good as one GEMM over all rows for any number of
    chunks; bf16 sums lose with each chunk.
    """
    h, w, ids = bf16_problem()
    truth = weight_gradient(h.double(), w.detach().double().requires_grad_(), ids)

    def error(**options):
        return (
            (weight_gradient(h, w, ids, **options).double() - truth).norm() / truth.norm()
        ).item()

    one = error(chunk_rows=256)
    assert error(chunk_rows=chunk_rows, accumulate_dtype=torch.float32) < 1.15 * one
    assert error(chunk_rows=chunk_rows, accumulate_dtype=torch.bfloat16) > 1.4 * one


def test_autocast_keeps_an_fp32_weights_gradient_in_fp32():
    """``F.linear`` under autocast returns bf16 values in an fp32 tensor. Here the sum
    is never rounded to bf16.
    """
    h, w, ids = bf16_problem()
    w = w.detach().float().requires_grad_()
    truth = weight_gradient(h.double(), w.detach().double().requires_grad_(), ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = weight_gradient(h.float(), w, ids, chunk_rows=16)
        eager = torch.autograd.grad(
            rw.token_logps(torch.nn.functional.linear(h.float(), w), ids).sum(), w
        )[0]
    assert (
        got.dtype == torch.float32
        and not torch.equal(got, got.bfloat16().float())
        and torch.equal(eager, eager.bfloat16().float())
    )
    assert (got - truth).norm() < (eager - truth).norm()


@pytest.mark.parametrize(
    "options",
    [{"accumulate_dtype": torch.float16}, {"memory_budget": 0}, {"chunk_rows": 2.5}],
    ids=str,
)
def test_wrong_options(options):
    h, w, ids = bf16_problem()
    with pytest.raises(rw.InvalidCall, match=next(iter(options))):
        rw.linear_token_logps(h, w, ids, **options)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_equal_to_the_bit(backend, dtype, plan):
    d = make(dtype)
    d["adv"][0] = 0
    options = dict(
        backend=backend, plan=plan, chunk_rows=4, completion_mask=d["mask"], loss_scale=8.0
    )
    inputs = [d["hidden"], d["weight"], d["bias"]]
    runs = [torch.autograd.grad(from_hidden(d, **options).loss, inputs) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


# --- memory ---------------------------------------------------------------------------
SCRIPT = """
import json, torch
import reweight_ops as rw
from bench.measure import Memory
N, D, V = 2048, 64, 32768
found = {}
for dtype in (torch.float32, torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(N, D, generator=g).to(dtype).requires_grad_(), torch.randn(V, D, generator=g).to(dtype).requires_grad_()
    ids, some = torch.randint(V, (N,), generator=g), torch.randn(N, generator=g)
    none = some.clone()
    none[torch.rand(N, generator=g) < 0.4] = 0
    memory = Memory("cpu")
    rows = 256
    for plan in ("one_pass", "two_pass"):
        for keep in (None, 1 << 40):
            for adv in (some, none):
                def run():
                    rw.linear_policy_loss(h, w, ids, adv, spec="dapo", plan=plan, chunk_rows=rows, memory_budget=keep).loss.backward()
                run(); h.grad = w.grad = None
                growth = memory.growth(run) - (h.numel() + w.numel()) * dtype.itemsize
                h.grad = w.grad = None
                found[f"{plan} {dtype} {'40% zero ' if adv is none else ''}kept={keep is not None}"] = growth / (rows * V * dtype.itemsize)
print(json.dumps(found))
"""


@reads_peaks
def test_memory_is_one_chunk():
    """Memory beyond the gradients is one chunk of eight, in both plans and dtypes, also
    if rows are dropped.

    It is all chunks if the budget lets two_pass keep them.
    """
    for name, chunks in peaks(SCRIPT).items():
        if name.startswith("two_pass") and name.endswith("True"):
            assert 7.5 < chunks < 8.5, (name, chunks)
        else:
            assert 0.7 < chunks < 1.4, (name, chunks)
