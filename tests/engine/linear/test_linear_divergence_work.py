"""Divergences and distillation from hidden states: the GEMMs that run, and the memory
of one chunk.
"""

import pytest
import torch
from peaks import peaks, reads_peaks
from two_heads import (
    D,
    E,
    V,
    grads,
    make,
    options_of,
    same,
    student,
    student_logits,
    teacher,
    teacher_logits,
)

import reweight_ops as rw
from reweight_ops._core.engine import ops as library
from reweight_ops._core.engine.linear import gemms as linear_gemms
from reweight_ops._core.engine.linear.gemms import Chunk


@pytest.fixture
def gemms(monkeypatch):
    """Rows and width of every GEMM that computes logits."""
    seen = []
    logits = Chunk.logits
    monkeypatch.setattr(
        Chunk,
        "logits",
        lambda self, hidden: seen.append(tuple(hidden.shape)) or logits(self, hidden),
    )
    return seen


def test_the_gemms_of_each_plan(gemms):
    d = make()
    call = dict(chunk_rows=4, compact_rows=False, vocab_size=V)
    once = [(4, D), (4, E)] * 3 + [(2, D), (2, E)]
    rw.linear_distillation_loss(
        d["hidden"], d["weight"], teacher(d), plan="one_pass", **call
    ).loss.backward()
    assert gemms == once
    for budget, recomputed in ((None, once), (3 * 4 * (2 * V + 3) * 8, once[4:]), (1 << 30, [])):
        gemms.clear()
        rw.linear_token_divergence(
            d["hidden"], d["weight"], teacher(d), memory_budget=budget, **call
        ).sum().backward()
        assert gemms == once + recomputed


def test_rows_that_do_not_count_reach_no_gemm(gemms):
    d = make()
    d["upstream"][0] = 0
    out = rw.linear_token_divergence(
        d["hidden"], d["weight"], teacher(d), completion_mask=d["mask"], chunk_rows=3, vocab_size=V
    )
    inside = int(d["mask"].sum())
    assert (
        sum(n for n, width in gemms if width == D)
        == sum(n for n, width in gemms if width == E)
        == inside
    )
    gemms.clear()
    (out * d["upstream"]).sum().backward()
    assert sum(n for n, width in gemms if width == D) == int(d["mask"][1].sum()) < inside


def test_row_index_known_to_the_host():
    d = make()
    index = d["mask"].flatten().nonzero()[:, 0].flip(0)
    want = rw.token_divergence(student_logits(d), teacher_logits(d), **options_of(d, "jeffreys"))
    for as_logits in (False, True):
        got = rw.linear_token_divergence(
            d["hidden"],
            d["weight"],
            teacher(d, as_logits),
            row_index=index,
            chunk_rows=4,
            **student(d),
            **options_of(d, "jeffreys"),
        )
        torch.testing.assert_close(got, want)
        same(
            grads((got * d["upstream"]).sum(), d),
            grads((want * d["upstream"]).sum(), d, retain_graph=True),
        )


SCRIPT = """
import json, torch
import reweight_ops as rw
from bench.measure import Memory
N, D, E, V = 576, 32, 16, 32768
found = {}
for dtype in (torch.float32, torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(N, D, generator=g).to(dtype).requires_grad_(), torch.randn(V, D, generator=g).to(dtype).requires_grad_()
    y, u = torch.randn(N, E, generator=g).to(dtype), torch.randn(V, E, generator=g).to(dtype)
    memory, rows = Memory("cpu"), 192
    for kind in ("reverse_kl", "generalized_jsd"):
        for plan in ("one_pass", "two_pass"):
            def run(n):
                rw.linear_distillation_loss(h[:n], w, rw.HiddenLogits(y[:n], u), kind=kind, plan=plan, chunk_rows=rows).loss.backward()
            run(rows)  # what later calls keep
            h.grad = w.grad = None
            growth = memory.growth(lambda: run(N)) - (h.numel() + w.numel()) * dtype.itemsize
            h.grad = w.grad = None
            found[f"{kind} {plan} {dtype}"] = growth / (2 * rows * V * dtype.itemsize)
print(json.dumps(found))
"""


@reads_peaks
def test_memory_is_one_chunk_of_both_models():
    """Memory beyond the gradients is one of three chunks of both models' logits."""
    for name, chunks in peaks(SCRIPT).items():
        assert 0.7 < chunks < 1.6, (name, chunks)


def test_the_default_chunk_holds_both_models_logits(monkeypatch):
    made = []
    original = Chunk.__init__
    monkeypatch.setattr(
        Chunk,
        "__init__",
        lambda self, size, *rest: original(self, size, *rest) or made.append(self.data.nbytes),
    )
    monkeypatch.setattr(
        linear_gemms,
        "empty",
        lambda shape, dtype, device: torch.empty(1, 1, dtype=dtype).expand(shape),
    )
    monkeypatch.setattr(Chunk, "logits", lambda self, hidden: self.data[: hidden.size(0)])
    monkeypatch.setattr(library, "divergence_stats", lambda z, *rest: torch.zeros(8, z.size(0)))
    with torch.no_grad():
        h, w = torch.zeros(4000, 2), torch.zeros(20000, 2)
        rw.linear_token_divergence(h, w, rw.HiddenLogits(h, torch.zeros(20000, 2)))
    assert len(made) == 2 and 0.9 * (96 << 20) < sum(made) <= 96 << 20
