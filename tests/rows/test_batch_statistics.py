"""``batch`` of a weight against loops over Python numbers, in every layout of
sequences, values and gradients; masked rows hold NaN.
"""

import math

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.calls.logps import resolve_logps
from reweight_ops._core.formula.base import TokenWeight
from reweight_ops._core.rows.batch import BatchStatistics

LENGTHS = [5, 1, 0, 7, 3, 0]
PROMPTS = [0, 1, 1, 0, 2, 1]
LAYOUTS = ("padded", "packed", "ids")


def layout(kind):
    """The rows, the sequence of each (None: out) and where a test's values for padding
    are NaN.
    """
    g = torch.Generator().manual_seed(5)
    if kind == "padded":
        mask = torch.arange(8) < torch.tensor(LENGTHS)[:, None]
        mask[3, 2] = mask[0, 0] = False  # holes, as of tool outputs
        owner = torch.arange(6)[:, None].expand(6, 8).reshape(-1).tolist()
        tensors = {"completion_mask": mask}
    else:
        lengths = [n + 2 for n in LENGTHS[:2]] + [0] + LENGTHS[3:]
        owner = [s for s, n in enumerate(lengths) for _ in range(n)]
        mask = torch.rand(len(owner), generator=g) < 0.8
        tensors = {
            "completion_mask": mask,
            "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        }
        if kind == "ids":
            ids = torch.tensor(owner)[torch.randperm(len(owner), generator=g)]
            owner = ids.tolist()
            tensors = {"completion_mask": mask, "sequence_ids": ids, "num_sequences": 6}
    logps = torch.zeros(mask.shape, dtype=torch.float64)
    tensors |= {"group_ids": torch.tensor(PROMPTS), "num_groups": 4}
    rows = resolve_logps("test", logps, tensors)
    keep = mask.reshape(-1).tolist()
    # ties
    x = torch.randn(len(owner), generator=g, dtype=torch.float64).round(decimals=1)
    x[~mask.reshape(-1)] = math.nan
    return rows, [s if k else None for s, k in zip(owner, keep, strict=True)], x.requires_grad_()


def quantile(values, q):
    ordered, at = sorted(values, key=torch.Tensor.item), q * (len(values) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return low + (at - math.floor(at)) * (high - low)


def smaller(values, i):
    """How many rank before the i-th."""
    return sum(
        v.item() < values[i].item() or (v.item() == values[i].item() and j < i)
        for j, v in enumerate(values)
    )


def ranked(values, i):
    return [v for j, v in enumerate(values) if smaller(values, j) <= smaller(values, i)]


#: Name to what it is for the i-th of the values of a sequence, prompt or call.
SEQUENCE = {
    "seq_sum": lambda v, i: sum(v),
    "seq_mean": lambda v, i: sum(v) / len(v),
    "seq_max": lambda v, i: max(v, key=torch.Tensor.item),
    "seq_min": lambda v, i: min(v, key=torch.Tensor.item),
    "seq_cumsum": lambda v, i: sum(v[: i + 1]),
    "seq_suffix_sum": lambda v, i: sum(v[i:]),
    "seq_rank": lambda v, i: smaller(v, i),
}
SEQUENCE_WITH = {
    "seq_cumsum": (0.5, lambda v, i: sum(0.5 ** (i - s) * v[s] for s in range(i + 1))),
    "seq_suffix_sum": (
        torch.tensor(0.9, dtype=torch.float64),
        lambda v, i: sum(
            torch.tensor(0.9, dtype=torch.float64) ** (s - i) * v[s] for s in range(i, len(v))
        ),
    ),
    "seq_quantile": (0.3, lambda v, i: quantile(v, 0.3)),
}
PROMPT = {
    "group_sum": lambda v, i: sum(v),
    "group_mean": lambda v, i: sum(v) / len(v),
    "group_max": lambda v, i: max(v, key=torch.Tensor.item),
    "group_min": lambda v, i: min(v, key=torch.Tensor.item),
}
CALL = {"rank": smaller, "mean_below": lambda v, i: sum(ranked(v, i)) / len(ranked(v, i))}
CASES = [
    *((name, (), f, "sequence") for name, f in SEQUENCE.items()),
    *((name, (x,), f, "sequence") for name, (x, f) in SEQUENCE_WITH.items()),
    *((name, (), f, "prompt") for name, f in PROMPT.items()),
    *((name, (), f, "call") for name, f in CALL.items()),
]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "args", "expected", "level"), CASES, ids=[f"{n}-{len(a)}" for n, a, _, _ in CASES]
)
def test_a_statistic_is_the_loop(name, args, expected, level, kind):
    rows, owner, x = layout(kind)
    got = getattr(BatchStatistics(rows), name)(x, *args)
    upstream = torch.linspace(-1, 2, len(owner), dtype=torch.float64)
    of = {"sequence": lambda s: s, "prompt": lambda s: PROMPTS[s], "call": lambda s: 0}[level]
    total = torch.zeros((), dtype=torch.float64)
    seen = 0
    for i, s in enumerate(owner):
        if s is None:
            continue
        members = [j for j, other in enumerate(owner) if other is not None and of(other) == of(s)]
        want = expected([x[j] for j in members], members.index(i))
        torch.testing.assert_close(
            got[i],
            torch.as_tensor(want, dtype=torch.float64),
            rtol=1e-13,
            atol=1e-13,
            msg=f"row {i} of {owner}",
        )
        total, seen = total + upstream[i] * want, seen + 1
    assert seen > 8
    inside = torch.tensor([s is not None for s in owner])
    if name.endswith("rank"):
        assert not got.requires_grad
        return
    (by,) = torch.autograd.grad((got * upstream)[inside].sum(), x)
    (by_loop,) = torch.autograd.grad(total, x)
    assert not by[~inside].any()
    if not name.endswith(("max", "min")):  # which share a gradient among equal ones
        torch.testing.assert_close(by, torch.where(inside, by_loop, 0), rtol=1e-12, atol=1e-12)
    else:
        torch.testing.assert_close(by.sum(), by_loop.nan_to_num().sum())


def test_the_capped_mean_of_infinite_values():
    """The largest of all may be inf: a token without probability, squared."""
    rows, owner, _ = layout(next(iter(LAYOUTS)))
    x = torch.arange(float(len(owner)), dtype=torch.float64)
    inside = [i for i, s in enumerate(owner) if s is not None]
    x[inside[-1]] = torch.inf
    got = BatchStatistics(rows).capped_mean(x, torch.ones(len(owner), dtype=torch.bool))
    for i in inside:
        want = torch.stack([torch.minimum(x[j], x[i]) for j in inside]).mean()
        torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_capped_mean_is_the_loop(kind):
    rows, owner, x = layout(kind)
    where = torch.rand(len(owner), generator=torch.Generator().manual_seed(1)) < 0.6
    got = BatchStatistics(rows).capped_mean(x, where)
    members = [i for i, s in enumerate(owner) if s is not None and where[i]]
    want = [sum(torch.minimum(x[j], x[i]) for j in members) / len(members) for i in members]
    torch.testing.assert_close(got[members], torch.stack(want))
    assert not got[[i for i in range(len(owner)) if i not in members]].any()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_numbers_count_rows(kind):
    rows, owner, _ = layout(kind)
    batch = BatchStatistics(rows)
    inside = [i for i, s in enumerate(owner) if s is not None]
    assert float(batch.sum(1.0)) == len(inside)
    for i in inside:
        alike = [j for j in inside if owner[j] == owner[i]]
        assert float(batch.seq_cumsum(1.0)[i]) == alike.index(i) + 1
        assert float(batch.seq_suffix_sum(1.0)[i]) == len(alike) - alike.index(i)
        assert float(batch.group_sum(1.0)[i]) == sum(
            PROMPTS[owner[j]] == PROMPTS[owner[i]] for j in inside
        )


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_nan_row_is_its_own_sequences(kind):
    """An inf or NaN among the rows that are in reaches no other sequence's sums, nor
    those of its own that do not see it.
    """
    rows, owner, x = layout(kind)
    batch = BatchStatistics(rows)
    inside = [i for i, s in enumerate(owner) if s is not None]
    nan_at = [i for i in inside if owner[i] == 3][1]
    for value in (math.inf, math.nan):
        y = x.detach().clone()
        y[nan_at] = value
        for name, sees in (
            ("seq_cumsum", lambda i: i >= nan_at),
            ("seq_suffix_sum", lambda i: i <= nan_at),
        ):
            got = getattr(batch, name)(y)
            for i in inside:
                assert got[i].isfinite() == (owner[i] != 3 or not sees(i)), (name, i)


def test_long_sequences_keep_their_digits():
    """fp32, 20 000 tokens of 1e-3 after another sequence of 1e6s: a difference of
    running totals over the call would have no digit left.
    """
    logps = torch.zeros(40_000)
    rows = resolve_logps("test", logps, {"cu_seqlens": torch.tensor([0, 20_000, 40_000])})
    x = torch.cat([torch.full((20_000,), 1e6), torch.full((20_000,), 1e-3)])
    got = BatchStatistics(rows).seq_cumsum(x)
    assert math.isclose(float(got[-1]), 20.0, rel_tol=1e-5) and float(got[20_000]) == pytest.approx(
        1e-3
    )


def test_empty_calls_have_statistics():
    rows = resolve_logps(
        "test",
        torch.zeros(2, 3),
        {"completion_mask": torch.zeros(2, 3), "group_ids": torch.tensor([0, 0]), "num_groups": 1},
    )
    batch = BatchStatistics(rows)
    for name, args, _, _ in CASES:
        assert getattr(batch, name)(torch.full((6,), math.nan), *args).shape == (6,)


def test_they_fail_loudly():
    rows = resolve_logps("test", torch.zeros(4), {})
    x = torch.zeros(4)
    with pytest.raises(rw.InvalidCall, match=r"batch.seq_\* needs sequences"):
        BatchStatistics(rows).seq_cumsum(x)
    rows = resolve_logps("test", torch.zeros(2, 2), {})
    with pytest.raises(rw.InvalidCall, match=r"batch.group_\* needs group_ids"):
        BatchStatistics(rows).group_mean(x)
    with pytest.raises(rw.InvalidCall, match="expected one number"):
        BatchStatistics(rows).seq_cumsum(x, torch.full((4,), 0.5))
    for quantile in (BatchStatistics(rows).quantile, BatchStatistics(rows).quantile_nearest):
        with pytest.raises(rw.InvalidCall, match=r"quantile.*shape \(4,\), expected one number"):
            quantile(x, torch.full((4,), 0.5))


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_weights_use_them_in_a_loss(backend):
    """A weight with a gradient, by sequence and by prompt; ``group_ids`` is read, and
    needed.
    """

    @rw.weight
    class Steep(TokenWeight):
        decay: float = 0.5

        def weight(self, xp, t, batch):
            return (
                xp.exp(0.1 * batch.seq_suffix_sum(t.logp, self.decay))
                + batch.group_mean(t.logp)
                + batch.seq_rank(t.entropy)
            )

    g = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 5, 7, generator=g, dtype=torch.float64).requires_grad_()
    ids, A = torch.randint(7, (4, 5), generator=g), torch.randn(4, generator=g, dtype=torch.float64)
    spec = rw.PolicyLossSpec(
        surrogate=rw.methods.reinforce().surrogate, weights=(Steep(detach=False),), name="steep"
    )
    given = {"spec": spec, "backend": backend if backend == "reference" else "auto"}
    groups = {"group_ids": torch.tensor([0, 1, 1, 0]), "num_groups": 2}
    out = rw.policy_loss(logits, ids, A, **given, **groups)
    logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    H = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    suffix = sum(torch.nn.functional.pad(logp[:, s:], (0, s)) * 0.5**s for s in range(5))
    mean = torch.stack([logp[[0, 3]].mean(), logp[[1, 2]].mean()])[torch.tensor([0, 1, 1, 0])][
        :, None
    ]
    want = (-A[:, None] * logp * ((0.1 * suffix).exp() + mean + H.argsort(-1).argsort(-1))).mean()
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, logits)[0], torch.autograd.grad(want, logits)[0]
    )
    with pytest.raises(rw.InvalidCall, match="needs group_ids"):
        rw.policy_loss(logits, ids, A, **given)
    with pytest.raises(rw.InvalidCall, match="reads prompts"):
        rw.policy_loss(logits, ids, A, spec="reinforce", **groups)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.25, 0.4, 0.5, 0.75, 0.9, 1.0])
def test_a_quantile_of_infinite_values_is_between_its_neighbours(q):
    """An order statistic is itself; between -inf and a number is -inf; never NaN."""
    values = [-math.inf, -math.inf, -1.0, 2.0, math.inf]
    x = torch.tensor([*values[::-1], math.nan], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    batch = BatchStatistics(resolve_logps("test", mask.double(), {"completion_mask": mask}))
    at = q * 4
    low, high = values[math.floor(at)], values[math.ceil(at)]
    share = at - math.floor(at)
    want = low if share == 0 or math.isinf(low) else low + share * (high - low)
    for got in (batch.quantile(x, q), batch.seq_quantile(x, q)[0]):
        assert got.item() == want
        (by,) = torch.autograd.grad(got, x)
        assert by.sum() == 1 and not by[-1]


def test_a_quantile_of_some_rows_is_theirs():
    rows, owner, x = layout("padded")
    batch, kept = BatchStatistics(rows), torch.tensor([s is not None for s in owner])
    where = x.detach() > 0
    got = batch.quantile(x, 0.3, where)
    want = torch.quantile(x[kept & where], 0.3)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    by = [torch.autograd.grad(y, x)[0].nan_to_num() for y in (got, want)]
    assert by[0].count_nonzero() == 2 and by[0].sum() == pytest.approx(1)
    assert batch.quantile(x, 0.3, torch.zeros_like(where)).item() == math.inf


def test_a_quantile_of_sequences_with_a_share_of_each_row():
    values, q = torch.tensor([[3.0, 1.0, 2.0, 0.0]]).double(), [0.0, 1 / 3, 2 / 3, 1.0]
    rows = resolve_logps("test", values, {"completion_mask": torch.ones(1, 4)})
    found = BatchStatistics(rows).seq_quantile(values.view(-1), torch.tensor(q).double())
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 2.0, 3.0]).double())
