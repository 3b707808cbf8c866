"""The kernels of reductions that couple tokens against autograd of the reductions in
fp64 (in Triton's interpreter).
"""

import dataclasses
import itertools
import math
import random

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.backends import select, triton_launch
from reweight_ops._core.calls.policy import LossCall
from reweight_ops._core.engine import coupled
from reweight_ops._core.rows.groups import Groups
from reweight_ops._core.rows.primitives import CoupledTerms
from reweight_ops._core.rows.resolve import resolve_rows
from reweight_ops._core.spec.reduction import Divisors
from reweight_ops.testing import make_batch
from reweight_ops.triton_kernels import row_config

pytest.importorskip("triton")
TRITON = select.unsupported_reason(
    "triton", select.Request("token_stats", torch.device("cpu"), torch.float32)
)
pytestmark = pytest.mark.skipif(TRITON is not None, reason=str(TRITON))

PLACES = ("equal", "offsets", "ids")
#: Every number is exact in fp32, as the kernels take it.
REDUCTIONS = {
    "contrast": lambda **p: rw.GroupContrast(temperature=0.5, **p),
    "contrast of means": lambda **p: rw.GroupContrast(temperature=math.inf, **p),
    "contrast of short ones": lambda **p: rw.GroupContrast(
        length_temperature=0.25, max_length=4, **p
    ),
    "contrast of good ones": lambda **p: rw.GroupContrast(
        temperature=torch.tensor(2.0), length_temperature=torch.tensor(0.5), preference="advantages", **p
    ),
    "means of good ones": lambda **p: rw.GroupContrast(
        temperature=math.inf, length_temperature=0.125, preference="advantages", **p
    ),
    "any good ones": lambda **p: rw.GroupContrast(preference="advantages", **p),
    "classification": lambda **p: rw.GroupClassification(temperature=0.25, **p),
    "classification by a tensor": lambda **p: rw.GroupClassification(
        temperature=torch.tensor(4.0), **p
    ),
}  # fmt: skip
MEAN = rw.TokenMean(per_call=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Sequences, prompts and rows have several. What nothing has written is NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    sizes = row_config.RowConfig(padded=4, packed=4, evaluated=8)
    monkeypatch.setattr(row_config, "_current", sizes)
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """A loss of random rows, before its reductions. Ignored rows hold anything."""

    of_no_prompt = 0  # how many sequences have an id out of range

    def __init__(self, seed, place, runs, reduction, others=(), given_ratio=False):
        self.random = random.Random(seed)
        g = torch.Generator().manual_seed(seed)
        prompts, size = self.random.randint(1, 2), self.random.randint(2, 4)
        self.size = size
        sequences = prompts * size
        where = self._sequences(place, sequences)
        rows = where["shape"][-1] * (sequences if place == "equal" else 1)
        keep = torch.rand(rows, generator=g) < self.random.choice((0.3, 0.8, 1.0))
        if place == "ids":  # PyTorch refuses a valid row of no sequence
            ids = where["tensors"]["sequence_ids"][0]
            keep &= (ids >= 0) & (ids < sequences)
        tensors = {"completion_mask": keep.view(where["shape"]), **where["tensors"]}
        if not runs:
            # one prompt more than there are, and some without a sequence
            ids = torch.randint(prompts + 1, (sequences,), generator=g)
            tensors |= {"group_ids": ids, "num_groups": prompts + 2}
        self.given = (where["shape"], tensors)
        first, *others = (reduction(group_size=size if runs else None), *others)
        penalties = [rw.Penalty(rw.rules.penalties.K3(), c, r) for c, r in others]
        self.spec = rw.methods.reinforce().replace(reduction=first, penalties=tuple(penalties))
        terms = 1 + len(penalties)
        adv = torch.randn(sequences, generator=g).round()  # some are 0
        owner = self.rows(torch.float32).sequences.spread(torch.arange(sequences))
        self.adv = adv[owner] * (torch.rand(rows, generator=g) + 0.5)
        self.evaluated = torch.randn(1 + terms, rows, generator=g) * self.random.choice((0.1, 3.0))
        self.weights = torch.rand(terms + 1, rows, generator=g) + 0.5  # a parameter of rows too
        self.logp = -torch.rand(rows, generator=g) if given_ratio else None
        kept = self.rows(torch.float32).keep
        self.evaluated[:, ~kept] = 0
        self.adv[~kept] = torch.tensor([math.nan, math.inf, -math.inf, 1e30])[torch.arange(rows) % 4][~kept]  # fmt: skip

    def _sequences(self, place, count):
        if place == "equal":
            return {"shape": (count, self.random.choice((1, 3, 4, 9))), "tensors": {}}
        ends = sorted(self.random.randint(0, 5 * count) for _ in range(count))  # some are empty
        if place == "offsets":
            shape = (1, ends[-1] + 3)  # and rows of none
            return {"shape": shape, "tensors": {"cu_seqlens": torch.tensor([0, *ends])}}
        owner = [self.random.randint(-1, count) for _ in range(5 * count)]
        tensors = {"sequence_ids": torch.tensor(owner)[None], "num_sequences": count}
        return {"shape": (1, len(owner)), "tensors": tensors}

    def rows(self, dtype):
        shape, tensors = self.given
        primitives = select.load("triton").rows if dtype == torch.float32 else None
        rows = resolve_rows("op", shape, torch.device("cpu"), dtype, tensors, primitives=primitives)
        if not self.of_no_prompt:
            return rows
        index = rows.prompts.index.clone()
        index[: self.of_no_prompt] = rows.prompts.count
        return dataclasses.replace(rows, prompts=Groups(rows.prompts.count, index=index))

    def call(self, dtype, scale=3.5):
        rows, adv = self.rows(dtype), self.adv.to(dtype)
        return LossCall(self.spec, rows, Divisors(), scale, adv, None, None, None, None)

    def tensors(self, dtype):
        logp = None if self.logp is None else self.logp.to(dtype)
        return self.evaluated.to(dtype), self.weights.to(dtype), logp

    def by_kernels(self, **replaced):
        call = self.call(torch.float32)
        into, couplings = torch.empty(2, call.rows.count), coupled._couplings(call)
        evaluated, weights, logp = self.tensors(torch.float32)
        numbers = coupled._numbers(call, couplings)
        terms = CoupledTerms(couplings, numbers, evaluated, weights, call.adv, logp)
        masked = call.rows.masked._replace(**replaced)
        weights, unknown = call.rows.primitives.couple(masked, terms, into)
        return weights, into, unknown

    def by_autograd(self):
        call = self.call(torch.float64)
        into = torch.empty(2, call.rows.count, dtype=torch.float64)
        weights, unknown = coupled._by_autograd(call, *self.tensors(torch.float64), into)
        return weights, into, unknown


def same(case, **replaced):
    """The kernels compute in fp64 and round once, to fp32."""
    (weights, losses, unknown), wanted = case.by_kernels(**replaced), case.by_autograd()
    keep = case.rows(torch.float32).keep
    assert torch.equal(unknown, wanted[2])
    for got, want in ((weights, wanted[0]), (losses, wanted[1])):
        got, want = got[:, keep].double(), want[:, keep]
        torch.testing.assert_close(got, want, rtol=2**-23, atol=1e-11, equal_nan=True)
    return unknown, weights[:, keep]


@pytest.mark.parametrize("runs", [True, False], ids=["runs", "ids"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_prompts(name, place, runs):
    for seed in (9, 11):
        unknown, weights = same(Case(seed, place, runs, REDUCTIONS[name]))
        assert not unknown.any()
        assert seed == 9 or weights[0].max() > 0 > weights[0].min(), "a prompt has two sides"


def hinge(bound, strength=8.0):
    return rw.HingeConstraint(strength=strength, bound=bound)


@pytest.mark.parametrize("given_ratio", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_terms_beside_it(place, given_ratio):
    """Hinges on both sides of their bound, a mean, and a coefficient of 0."""
    others = [(0.25, hinge(-1e3)), (torch.tensor(0.5), MEAN), (0.0, hinge(-1.0)), (2.0, hinge(torch.tensor(1e3)))]  # fmt: skip
    for seed, (name, runs) in enumerate(
        itertools.product(("contrast of short ones", "classification"), (True, False))
    ):
        case = Case(seed, place, runs, REDUCTIONS[name], others, given_ratio=given_ratio)
        unknown, weights = same(case)
        assert not unknown.any() and not weights[4].any() and weights[5].gt(0).all()


#: What is not finite, in a row of which side of a prompt.
PLANTED = [("adv", -1), ("own", -1), ("own", 1), ("penalty loss", 1), ("own logp", -1), ("adv own", 1)]  # fmt: skip


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["contrast", "contrast of means", "contrast of good ones", "classification"])  # fmt: skip
def test_rows_that_are_not_finite(name, value):
    others = [(0.5, hinge(-0.25)), (0.25, MEAN)]
    for k, (what, side) in enumerate(PLANTED):
        for given_ratio in (False, True):
            place, seed = [("equal", 3), ("offsets", 7), ("ids", 6)][k % 3]
            case = Case(seed, place, k % 2 == 0, REDUCTIONS[name], others, given_ratio)
            slopes = case.by_autograd()[0][0] * case.rows(torch.float32).keep
            at = (slopes * side).argmax()
            assert slopes[at] * side > 0
            kinds = {"adv": case.adv, "loss": case.evaluated[0], "own": case.evaluated[1]}
            kinds |= {"penalty": case.evaluated[3], "logp": case.logp}
            for kind in what.split():
                if kinds[kind] is not None:
                    kinds[kind][at] = value
            assert same(case)[0][at] or value == value


@pytest.mark.parametrize("shape", [(17,), (3, 4)])
def test_a_hinge_alone(shape):
    """Beside a mean, and where rows have no sequences."""
    for bound, keep in itertools.product((-10.0, 10.0), (True, False)):
        case = Case(0, "equal", True, lambda group_size: MEAN, [(0.5, hinge(bound))])
        n = math.prod(shape)
        mask = (torch.arange(n) % 3 > 0) & keep
        case.given = (shape, {"completion_mask": mask.view(shape)})
        g = torch.Generator().manual_seed(1)
        case.evaluated = torch.where(mask, torch.randn(3, n, generator=g), 0)
        case.weights, case.adv = torch.rand(2, n, generator=g), torch.zeros(n)
        _, weights = same(case)
        assert weights[0].eq(case.weights[0, mask]).all()
        assert weights[1].gt(0).all() if bound < 0 else not weights[1].any()


@pytest.mark.parametrize("place", PLACES)
def test_sequences_that_nobody_has_checked(place):
    """Where the device finds them malformed, every row is unknown."""
    case = Case(5, place, False, REDUCTIONS["contrast"], [(0.5, hinge(-0.25))])
    keep = case.rows(torch.float32).keep
    same(case, trust=torch.zeros(()))
    weights, losses, unknown = case.by_kernels(trust=torch.tensor(math.nan))
    assert torch.equal(unknown, keep) and keep.any()
    assert weights[:, keep].isnan().all() and losses[0, keep].isnan().all()


@pytest.mark.parametrize("name", ["contrast", "classification"])
def test_large_scores(name):
    """No exponential overflows, and infinite scores of a side are as autograd has
    them.
    """
    for k, factor in enumerate((1e4, -1e4, math.inf, -math.inf)):
        case = Case(11, PLACES[k % 3], bool(k % 2), REDUCTIONS[name])
        kept = case.rows(torch.float32).keep
        case.evaluated[1] = torch.where(kept, case.evaluated[1].abs() * factor, 0)
        unknown, _ = same(case)
        assert math.isinf(factor) or not unknown.any()


@pytest.mark.parametrize("name", ["contrast", "classification"])
def test_sequences_of_no_prompt(name):
    """Their ids are what only the device can check. Their rows add nothing, although
    they have two sides.
    """
    case = Case(11, "equal", False, REDUCTIONS[name])
    of_none = torch.arange(len(case.adv)) < 3 * case.given[0][1]
    first = torch.arange(len(case.adv)) < case.given[0][1]
    case.adv[of_none] = torch.where(first[of_none], 1.0, -1.0)
    case.evaluated[1:, of_none] = 0.5 * case.rows(torch.float32).keep[of_none]
    case.of_no_prompt = 3
    unknown, weights = same(case)
    of_none = of_none[case.rows(torch.float32).keep]
    assert of_none.any() and not weights[0, of_none].any() and weights[0].any()
    assert not unknown.any()


def test_a_call_without_a_row():
    for name in REDUCTIONS:
        case = Case(1, "equal", True, REDUCTIONS[name], [(0.5, hinge(0.25))])
        case.given[1]["completion_mask"][:] = False
        case.evaluated[:] = 0
        same(case)
        (_, losses, unknown), keep = case.by_kernels(), case.rows(torch.float32).keep
        assert not unknown.any() and not losses.any() and not keep.any()


def test_what_only_pytorch_takes():
    class Own(rw.GroupContrast):
        """A reduction of a user, who changes what is compared."""

    def is_closed(*reductions, **prompts):
        first, *others = reductions
        penalties = [rw.Penalty(rw.rules.penalties.K3(), 0.5, r) for r in others]
        case = Case(1, "equal", not prompts, REDUCTIONS["contrast"])
        case.spec = rw.methods.reinforce().replace(reduction=first, penalties=tuple(penalties))
        call = case.call(torch.float32)
        return coupled._couplings(call) is not None, call

    size = Case(1, "equal", True, REDUCTIONS["contrast"]).size
    runs, ids = rw.GroupContrast(group_size=size), rw.GroupContrast()
    assert is_closed(runs, hinge(0.5), hinge(0.5), MEAN)[0] and is_closed(MEAN, runs)[0]
    assert is_closed(ids, ids=True)[0]
    assert not is_closed(Own(group_size=size))[0]
    assert not is_closed(rw.GroupContrast(group_size=size, temperature=torch.ones(2)))[0]
    assert not is_closed(runs, rw.GroupClassification(group_size=size))[0]
    # too many prompts to look for the sequences of each
    _, call = is_closed(ids, ids=True)
    call = dataclasses.replace(call, rows=dataclasses.replace(call.rows, by_prompt=None))
    assert coupled._couplings(call) is None


@pytest.mark.parametrize("name", ["disco", "drpo", "real"])
def test_the_launches_of_a_call(monkeypatch, name):
    """No reduction is differentiated by autograd."""
    spec, names, launch = rw.method(name), [], triton_launch.launch

    def recorded(kernel, *args, **meta):
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **meta)

    monkeypatch.setattr(triton_launch, "launch", recorded)
    monkeypatch.setattr(coupled, "_by_autograd", None)
    batch = make_batch(spec, (4, 3), 13)
    batch |= {"group_ids": torch.tensor([0, 1, 1, 0]), "num_groups": 2}
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[0, 1] = False
    for counted in (None, mask):
        z, more = batch["logits"].detach().clone().requires_grad_(), {"denominator_mask": counted}
        out = rw.policy_loss(
            **{**batch, **more, "logits": z}, spec=spec, backend="triton", unused="ignore"
        )
        (grad,) = torch.autograd.grad(out.loss, z)
        want = rw.policy_loss(
            **{**batch, **more, "logits": z}, spec=spec, backend="reference", unused="ignore"
        )
        (expected,) = torch.autograd.grad(want.loss, z)
        torch.testing.assert_close(out.loss, want.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, expected, rtol=2e-4, atol=1e-6)
    assert names.count("join_kernel") == 2 and names.count("contributions_kernel") == 2
