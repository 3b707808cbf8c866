"""Row kernels on packed sequences against PyTorch's operations, and in place of a chain
of them for log-probs and hidden states (in Triton's interpreter).
"""

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.rows import resolve, structure
from reweight_ops._core.rows.primitives import Runs
from reweight_ops._core.rows.resolve import resolve_rows

pytest.importorskip("triton")
TRITON = select.unsupported_reason(
    "triton", select.Request("token_stats", torch.device("cpu"), torch.float32)
)
pytestmark = pytest.mark.skipif(TRITON is not None, reason=str(TRITON))

#: Sequences of these lengths, the last of which is empty, and rows of none after them.
LENGTHS, AFTER, VOCAB = (3, 0, 7, 1, 5, 0), 2, 13
S, N = len(LENGTHS), sum(LENGTHS) + AFTER
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)
OWNER = torch.repeat_interleave(torch.arange(S), torch.tensor(LENGTHS))
#: The same sequences with their rows in any order; the last rows are of none.
MIXED = torch.cat(
    [
        OWNER[torch.randperm(N - AFTER, generator=torch.Generator().manual_seed(1))],
        torch.tensor([S, -3]),
    ]
)
PLACES = {
    "offsets": {"cu_seqlens": OFFSETS},
    "offsets in int32, strided": {"cu_seqlens": torch.stack([OFFSETS, OFFSETS], -1).int()[:, 0]},
    "ids": {"sequence_ids": MIXED, "num_sequences": S},
    "ids in int32, as rows": {"sequence_ids": MIXED.int()[None], "num_sequences": S},
}
KINDS = ("logits", "logps", "hidden")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(spec, seed=0):
    g = generator(seed)
    mask = torch.rand(1, N, generator=g) < 0.8
    mask[0, N - AFTER :] = False  # sequence ids there are malformed
    ids = torch.randint(VOCAB, (1, N), generator=g)
    ids[0, 4] = -100
    found = {
        "completion_ids": ids,
        "completion_mask": mask,
        "old_per_token_logps": -2 - torch.rand(1, N, generator=g),
        "advantages": torch.randn(S, 2, generator=g).bfloat16()[:, :1],
    }
    if "ref_logp" in spec.requires:
        found["ref_per_token_logps"] = -2 - torch.rand(1, N, generator=g)
    return found


def call(kind, spec, data, **options):
    """The result of a kind of call, and its gradients."""
    g = generator(9)
    data = {**data, **options}
    backend = data.pop("backend")
    if kind == "logps":
        inputs = [(-2 - torch.rand(1, N, generator=g)).requires_grad_()]
        del data["completion_ids"]
        out = rw.policy_loss_from_logps(*inputs, spec=spec, unused="ignore", **data)
    elif kind == "logits":
        inputs = [torch.randn(1, N, VOCAB, generator=g).requires_grad_()]
        out = rw.policy_loss(*inputs, spec=spec, unused="ignore", backend=backend, **data)
    else:
        inputs = [
            torch.randn(1, N, 4, generator=g).requires_grad_(),
            torch.randn(VOCAB, 4, generator=g).requires_grad_(),
        ]
        out = rw.linear_policy_loss(*inputs, spec=spec, unused="ignore", backend=backend, **data)
    return out, torch.autograd.grad(out.loss, inputs)


def both(monkeypatch, kind, spec, data, **options):
    results = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("REWEIGHT_OPS_BACKEND", backend)
        out, grads = call(kind, spec, data, backend=backend, **options)
        assert (out._call.rows.primitives is not None) == (backend == "triton")
        results.append((out, grads))
    return results


def assert_same(monkeypatch, kind, spec, data, **options):
    (got, grads), (want, expected) = both(monkeypatch, kind, spec, data, **options)
    torch.testing.assert_close(got.loss, want.loss, rtol=2e-5, atol=1e-6)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=2e-4, atol=1e-6)
    metrics, sums = got.metrics.as_floats(), want.metrics.as_floats()
    assert metrics == pytest.approx(sums, rel=1e-4, abs=1e-6, nan_ok=True)
    for name in ("per_token_logps", "per_token_loss", "ratio", "coef"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=2e-4, atol=1e-6)


SPECS = {
    "token mean": rw.methods.dapo(),
    "sequence mean": rw.methods.grpo(beta=0.1),
    "mean of the non-empty": rw.methods.dapo().replace(reduction=rw.SequenceMean(count="nonempty")),
    "horizon": rw.methods.dapo().replace(reduction=rw.SequenceMean(per="constant", horizon=11)),
    "sequence ratio": rw.methods.gspo(),
    "its tokens' gradient": rw.methods.gspo().replace(ratio=rw.SequenceRatio(gradient="token", clamp=0.05)),
    "its sum": rw.methods.gspo().replace(ratio=rw.SequenceRatio(normalize=False)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SPECS)
def test_packed_sequences(monkeypatch, name, place, kind):
    spec = SPECS[name]
    data = batch(spec) | PLACES[place]
    assert_same(monkeypatch, kind, spec, data)
    factor = torch.rand(1, N, generator=generator(3))
    counted = torch.rand(1, N, generator=generator(4)) < 0.7
    counted[0, -AFTER:] = True  # rows of no sequence count in no denominator
    assert_same(monkeypatch, kind, spec, data, token_weights=factor, denominator_mask=counted, loss_scale=torch.tensor(0.5))  # fmt: skip


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_without_masks_and_with_one_sequence(monkeypatch, plan):
    spec = SPECS["sequence mean"]
    data = batch(spec) | {"advantages": 0.5, "cu_seqlens": torch.tensor([0, N])}
    del data["completion_mask"]
    assert_same(monkeypatch, "logits", spec, data, plan=plan)
    assert_same(monkeypatch, "logps", spec, data)


def test_more_rows_than_a_program_takes(monkeypatch):
    lengths = torch.tensor([1500, 3, 0, 1024, 700])
    n, g = int(lengths.sum()), generator()
    logps, old = -torch.rand(2, 1, n, generator=g) - 0.5
    for place in (
        {"cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])},
        {"sequence_ids": torch.randint(5, (1, n), generator=g), "num_sequences": 5},
    ):
        found = []
        for backend in ("triton", "reference"):
            monkeypatch.setenv("REWEIGHT_OPS_BACKEND", backend)
            x = logps.clone().requires_grad_()
            out = rw.policy_loss_from_logps(
                x,
                torch.randn(5, 1, generator=generator(2)),
                spec="gspo",
                old_per_token_logps=old,
                **place,
            )
            found.append((out.loss, *torch.autograd.grad(out.loss, x), out.metrics.sums))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-6)


def test_too_many_ids_to_look_for_are_pytorchs(monkeypatch):
    spec = SPECS["sequence ratio"]
    data = batch(spec) | PLACES["ids"]
    with monkeypatch.context() as limited:
        limited.setattr(resolve, "_MOST_SEARCHED", S * N - 1)
        got, _ = call("logits", spec, data, backend="triton")
    want, _ = call("logits", spec, data, backend="triton")
    assert got._call.rows.primitives is None is not want._call.rows.primitives
    torch.testing.assert_close(got.loss, want.loss, rtol=2e-5, atol=1e-6)


MALFORMED = {
    "first": {"cu_seqlens": torch.tensor([2, 5, N])},
    "falls": {"cu_seqlens": torch.tensor([0, 8, 5])},
    "beyond": {"cu_seqlens": torch.tensor([0, 3, 10**9])},
    "negative": {"cu_seqlens": torch.tensor([0, -(10**9), N])},
    "ids above": {"sequence_ids": torch.full((N,), 10**9), "num_sequences": 2},
    "ids below": {"sequence_ids": torch.full((N,), -1, dtype=torch.int32), "num_sequences": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ["dapo", "gspo"])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_places_that_nobody_reads_are_nan(monkeypatch, case, spec, kind):
    """As on a GPU. The kernels read and write only their own memory."""
    monkeypatch.setenv("REWEIGHT_OPS_BACKEND", "triton")
    monkeypatch.setattr(structure, "is_readable", lambda t: False)
    spec = rw.method(spec)
    data = batch(spec) | {"advantages": torch.ones(2, 1)} | MALFORMED[case]
    del data["completion_mask"]
    out, grads = call(kind, spec, data, backend="triton")
    assert out.loss.isnan()
    # their advantages are those of the sequences
    assert out.per_token_loss.view(-1)[out._call.rows.keep].isnan().all()
    assert all(grad[grad != 0].isnan().all() for grad in grads)
    metrics = out.metrics.as_floats()
    assert all(x != x for name, x in metrics.items() if not name.startswith("rows_dropped"))
    with pytest.raises(rw.InvalidCall, match=r"cu_seqlens\[|sequence_ids\["):
        call(kind, spec, data, backend="triton", validate=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_what_nobody_reads_is_the_same(monkeypatch, place, kind):
    """Sequence ids of ignored rows may be malformed."""
    monkeypatch.setenv("REWEIGHT_OPS_BACKEND", "triton")
    spec = SPECS["sequence ratio"]
    data = batch(spec) | PLACES[place]
    want, expected = call(kind, spec, data, backend="triton")
    monkeypatch.setattr(structure, "is_readable", lambda t: False)
    got, grads = call(kind, spec, data, backend="triton")
    assert got._call.rows.trust is not None is want._call.rows.trust
    assert torch.equal(got.loss, want.loss) and got.metrics.as_floats() == want.metrics.as_floats()
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("runs", [Runs(6, 2, offsets=torch.tensor([0, 2, 5])), Runs(6, 2, owner=torch.tensor([0, 1, 5, -1, 0, 1]))], ids=["offsets", "index"])  # fmt: skip
def test_the_index_of_packed_rows(runs):
    want = [0, 0, 1, 1, 1, 2] if runs.owner is None else [0, 1, 2, 2, 0, 1]
    counts = [True, False, True, True, False, True]
    found = select.load("triton").rows.mask(None, None, torch.tensor(counts), runs, torch.device("cpu"))  # fmt: skip
    assert found.ids is None and found.runs.owner.tolist() == want
    counted = [s for s, is_in in zip(want, counts, strict=True) if is_in]
    assert found.keep.tolist() == [s < 2 for s in want]
    assert found.counted.tolist() == [s < 2 and c for s, c in zip(want, counts, strict=True)]
    assert found.lengths.tolist() == [[x.count(0), x.count(1)] for x in (want, counted)]
    assert bool(found.trust.isnan()) == (runs.owner is not None)
    spread = select.load("triton").rows.spread
    for dtype in (torch.bfloat16, torch.float32):
        values = torch.tensor([[0.5, 9.0], [-2.0, 9.0]]).to(dtype)[:, 0]
        rows = spread(found._replace(trust=None), values)
        assert rows.dtype == torch.float32 and rows.tolist() == [[0.5, -2.0, 0.0][s] for s in want]
        assert spread(found, values).isnan().all() == found.trust.isnan()


def test_trust_of_groups_reaches_the_weights(monkeypatch):
    """Malformed groups make NaN of what packed sequences alone would not."""
    monkeypatch.setattr(structure, "is_readable", lambda t: False)
    for groups, finite in ((torch.tensor([0, 1]), True), (torch.tensor([0, 7]), False)):
        rows = resolve_rows(
            "op", (1, N), torch.device("cpu"), torch.float32,
            {"cu_seqlens": torch.tensor([0, 4, N]), "group_ids": groups, "num_groups": 2, "completion_mask": torch.ones(1, N)},
            primitives=select.load("triton").rows,
        )  # fmt: skip
        weighing = rw.TokenMean().weighing(rows, rw._core.spec.reduction.Divisors())
        w = rows.primitives.weigh(rows.masked, (weighing,), 1.0, None)
        assert bool(w.isfinite().all()) == finite
