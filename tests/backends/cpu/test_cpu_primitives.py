"""Masks and row weights of the C++ backend are bitwise those of PyTorch's
operations."""

import dataclasses
import itertools

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends.select import load
from reweight_ops._core.calls.keywords import PolicyOptions
from reweight_ops._core.calls.policy import resolve_loss
from reweight_ops._core.rows.groups import IGNORE_INDEX
from reweight_ops._core.rows.resolve import RUN, resolve_rows
from reweight_ops.errors import InvalidCall

pytest.importorskip("reweight_ops._C", exc_type=ImportError)

MASKS = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
SHAPES = [(3, 5), (2 * RUN + 7,), (2, 3, 4)]


def layouts(t):
    """The same elements with other strides."""
    yield t
    yield torch.stack([t, t], -1)[..., 0]
    yield t.transpose(0, -1).contiguous().transpose(0, -1)


def tensors(shape, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, shape, generator=g)
    ids[torch.rand(shape, generator=g) < 0.2] = IGNORE_INDEX
    mask = torch.randint(0, 3, shape, generator=g).to(dtype)
    return ids, mask, torch.randint(0, 2, shape, generator=g).to(dtype)


def rows_of(shape, data, primitives):
    return resolve_rows(
        "op", shape, torch.device("cpu"), torch.float32, data, 50, False, primitives
    )


def both(shape, **data):
    """Rows by the module, and by PyTorch."""
    return rows_of(shape, data, load("cpu").rows), rows_of(shape, data, None)


@pytest.mark.parametrize("dtype", MASKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks(shape, dtype):
    ids, mask, denominator = tensors(shape, dtype)
    for i, m, d in itertools.product(layouts(ids), layouts(mask), (None, *layouts(denominator))):
        found, want = both(
            shape, completion_ids=i.int() if i is ids else i, completion_mask=m, denominator_mask=d
        )
        for name in ("ids", "keep", "denominator"):
            assert torch.equal(getattr(found, name), getattr(want, name)), name
        run = shape[-1] if len(shape) > 1 else RUN
        for row, x in enumerate((want.keep, want.denominator)):
            assert found.masked.lengths[row].tolist() == [int(part.sum()) for part in x.split(run)]
        inside = want.ids[want.keep]
        assert found.masked.bounds == (int(inside.min()), int(inside.max()))


def test_what_is_not_zero():
    values = [0.0, -0.0, 1e-45, -1.0, float("nan"), float("inf")]
    mask = torch.tensor([values])
    found, want = both((1, 6), completion_ids=torch.arange(6)[None], completion_mask=mask)
    assert found.keep.tolist() == want.keep.tolist() == [False, False, True, True, True, True]
    complex_one, _ = both(
        (1, 6), completion_ids=torch.arange(6)[None], completion_mask=mask.to(torch.complex64)
    )
    assert complex_one.keep.tolist() == found.keep.tolist()


def test_no_row_is_in():
    found, _ = both((2, 3), completion_ids=torch.full((2, 3), IGNORE_INDEX))
    assert not found.keep.any() and found.masked.bounds == (0, -1)


#: Rows of 5 sequences, two of them empty, and rows of none.
OFFSETS = torch.tensor([0, 0, 7, 8, 8, 20])
OWNER = torch.randint(-1, 7, (23,), generator=torch.Generator().manual_seed(5))
PLACES = {
    "offsets": {"cu_seqlens": OFFSETS},
    "int32 offsets, strided": {"cu_seqlens": torch.stack([OFFSETS, OFFSETS], -1).int()[:, 1]},
    "ids": {"sequence_ids": OWNER, "num_sequences": 5},
    "int32 ids, strided": {"sequence_ids": torch.stack([OWNER] * 2, -1).int()[:, 1], "num_sequences": 5},
}  # fmt: skip


@pytest.mark.parametrize("given", ["ids and mask", "ids", "mask", "neither"])
@pytest.mark.parametrize("place", PLACES)
def test_packed_rows(place, given):
    ids, mask, denominator = tensors((1, 23), torch.int64)
    owner = PLACES[place].get("sequence_ids")
    if owner is not None:  # the id of a sequence is checked in valid rows
        mask = mask * ((owner >= 0) & (owner < 5))
        ids = torch.where((owner >= 0) & (owner < 5), ids, IGNORE_INDEX)
        if given == "neither":
            given = "mask"
    data = {**PLACES[place], "denominator_mask": denominator}
    data |= {"completion_ids": ids} if "ids" in given else {}
    data |= {"completion_mask": mask} if "mask" in given else {}
    found, want = both((1, 23), **data)
    assert found.primitives is not None is not found.masked.lengths
    for name in ("keep", "denominator", *(["ids"] if "ids" in given else [])):
        assert torch.equal(getattr(found, name), getattr(want, name)), name
    assert torch.equal(found.sequences.index, want.sequences.index)
    for row, x in enumerate((want.keep, want.denominator)):
        counts = want.sequences.count_rows(x, torch.float32)
        assert found.masked.lengths[row].tolist() == counts.tolist()


@pytest.mark.parametrize("bad", [-1, 50, -(2**40)])
def test_ids_out_of_range_are_errors(bad):
    ids = torch.zeros(2, 3, dtype=torch.long)
    ids[1, 1] = bad
    messages = []
    for primitives in (load("cpu").rows, None):
        with pytest.raises(InvalidCall) as error:
            rows_of((2, 3), {"completion_ids": ids}, primitives)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and f"is {bad}" in messages[0]
    mask = ids == 0
    assert (
        both((2, 3), completion_ids=ids, completion_mask=mask)[0].keep.tolist()
        == mask.reshape(-1).tolist()
    )


NUMBERS = [
    None,
    7,
    0.3,
    torch.tensor(7),
    torch.tensor(2.7, dtype=torch.float64),
    torch.tensor(3.0, dtype=torch.bfloat16),
]
REDUCTIONS = [
    (rw.TokenMean(), "num_items_in_batch"),
    (rw.TokenSum(), None),
    *(
        (rw.SequenceMean(per=per, count=count), "num_sequences_in_batch")
        for per in ("token_mean", "token_sum", "constant")
        for count in ("all", "nonempty")
    ),
    (rw.SequenceMean(per="constant", horizon=11), "num_sequences_in_batch"),
]


@pytest.mark.parametrize("reduction, divisor", REDUCTIONS, ids=lambda x: str(x))
@pytest.mark.parametrize("place", [None, "offsets", "ids"])
@pytest.mark.parametrize("shape", [(4, 5), (RUN + 9,), (1, 23)], ids=str)
def test_weights(shape, place, reduction, divisor):
    if (place is None) != (shape != (1, 23)):
        pytest.skip("the places are those of 23 rows")
    if isinstance(reduction, rw.SequenceMean):
        if len(shape) == 1:
            pytest.skip("no sequences")
        if place is not None and reduction.per == "constant" and reduction.horizon is None:
            pytest.skip("packed sequences have no padded length")
    ids, mask, denominator = tensors(shape, torch.bool)
    packed = {} if place is None else PLACES[place]
    if place == "ids":
        mask = mask & (OWNER >= 0) & (OWNER < 5)
    factor = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    other = rw.TokenMean(per_call=True)
    spec = rw.methods.grpo(beta=0.1).replace(reduction=reduction)
    for extra, given, scale, u, counted in itertools.product(
        (False, True),
        NUMBERS if divisor else [None],
        (1.0, 0.3, torch.tensor(0.7)),
        (None, factor),
        (None, denominator),
    ):
        if counted is not None and (isinstance(reduction, rw.TokenSum) or given is not None):
            continue
        kind = (
            spec.with_penalty(rw.Penalty(rw.rules.RULES["entropy_bonus"](), 0.1, other))
            if extra
            else spec
        )
        options = {"loss_scale": scale, "token_weights": u, **({divisor: given} if divisor else {})}
        results = []
        for rows in both(shape, completion_ids=ids, completion_mask=mask, denominator_mask=counted, **packed):  # fmt: skip
            data = PolicyOptions(ref_per_token_logps=torch.zeros(shape), **options)
            call = resolve_loss(rows, 1.0, kind, data)
            fused = call._fused_row_weights() if rows.primitives is not None else None
            assert (fused is not None) == (rows.primitives is not None)
            results.append(call.row_weights())
        assert torch.equal(*results), options


def test_a_number_with_a_gradient_keeps_it():
    scale = torch.tensor(2.0, requires_grad=True)
    z = torch.zeros(2, 3, 7, requires_grad=True)
    out = rw.policy_loss(
        z,
        torch.zeros(2, 3, dtype=torch.long),
        1.0,
        spec="reinforce",
        loss_scale=2.0,
        plan="two_pass",
        backend="cpu",
    )
    rows = dataclasses.replace(out._call, loss_scale=scale).row_weights()
    assert rows.requires_grad
