"""The Triton backend against an independent fp64 oracle: autograd through log_softmax
and the rules' formulas.

By the package's criterion (tests/support/criterion.py) and nothing looser. Runs in
Triton's interpreter, or on a GPU if there is one.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from built_in import own_rules

pytest.importorskip("triton")

from triton_batches import CONDITIONS, DTYPES, ROWS, make
from triton_oracle import (
    DEVICE,
    check_grad,
    check_loss_grad,
    check_stats,
    default_params,
    run_loss_grad,
    run_stats,
    small_config,
)

from reweight_ops._core.backends import triton_launch
from reweight_ops._core.backends import triton_token as backend
from reweight_ops._core.backends.base import DERIVATIVES, LOSS_ROWS, STATS, RowInputs, SoftmaxParams
from reweight_ops._core.formula.loss_program import Program
from reweight_ops._core.rows.groups import IGNORE_INDEX
from reweight_ops.rules import RULES, WEIGHTS, Rule, TokenWeight, rule, weight


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("REWEIGHT_OPS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and segments per row, at sizes that suit the interpreter."""
    monkeypatch.setattr(backend, "config_for", small_config)


#: A condition in one dtype takes seconds in the interpreter. The others are slow tests.
USUAL = {(name, torch.float16) for name in CONDITIONS} | {("plain", dtype) for dtype in DTYPES}


@pytest.mark.parametrize(
    "condition, dtype",
    [
        pytest.param(
            name,
            dtype,
            id=f"{name}-{str(dtype)[6:]}",
            marks=() if (name, dtype) in USUAL else pytest.mark.slow,
        )
        for name in CONDITIONS
        for dtype in DTYPES
    ],
)
def test_conditions(condition, dtype, small_tiles):
    if dtype != torch.float16:  # the other primitives use the same conversions
        check_stats(CONDITIONS[condition](dtype))
        check_grad(CONDITIONS[condition](dtype))
    check_loss_grad(CONDITIONS[condition](dtype))


@pytest.mark.parametrize("name", sorted(own_rules()))
def test_rules(name):
    terms = (name,) if own_rules()[name].kind == "surrogate" else ("reinforce", name)
    check_loss_grad(make(n=12, program=Program.of(terms)))


@pytest.mark.parametrize(
    "program",
    [
        Program.of(("clip", "k1", "k2", "entropy_bonus")),
        Program.of(("cispo", "k3_corrected"), (("truncated_importance", "surrogate"),)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_programs(program, dtype):
    check_loss_grad(make(dtype, program=program))


@pytest.mark.parametrize("vocab", [32000, 50257, 151936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_real_vocabularies(vocab, dtype):
    batch = make(dtype, n=4, v=vocab)
    check_stats(batch)
    check_loss_grad(batch)


@pytest.mark.parametrize("names", [("logp",), ("entropy",), ("lse", "logp"), ("log_sum_p_sq",)])
def test_gradient_of_some_statistics(names):
    check_grad(make(), names)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_in_place(dtype, small_tiles):
    batch = make(dtype)
    _, out = run_loss_grad(batch)
    _, inside = run_loss_grad(batch, in_place=True)
    assert torch.equal(out, inside)
    check_grad(make(dtype), in_place=True)


def test_on_policy_is_ratio_one_and_keeps_its_gradient():
    batch = make(program=Program.of(("clip",)))
    batch.inputs = batch.inputs._replace(old_logp=None)
    rows = check_loss_grad(batch)
    assert torch.equal(rows[3], -batch.inputs.adv * (batch.inputs.row_weights[0] != 0))
    batch.inputs = batch.inputs._replace(old_logp=run_stats(batch, ("logp",))["logp"])
    assert torch.equal(run_loss_grad(batch)[0], rows)


# --- what must be bitwise -------------------------------------------------------------


def split(monkeypatch, yes: bool) -> None:
    monkeypatch.setattr(triton_launch, "processors", lambda device: 10**6 if yes else 0)


@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_splitting_rows_changes_no_bit(dtype, in_place, small_tiles, monkeypatch):
    """Also, a primitive of split rows takes at most three launches, and a gradient or a
    primitive of whole rows always one.
    """
    n, v = 6, 1000  # 4 segments of 256 columns and, with padding, 3 chunks of 512
    batch = make(
        dtype,
        n=n,
        v=v + 300,
        softmax=SoftmaxParams(v),
        ids=torch.tensor([3, 999, IGNORE_INDEX, 600, v + 1, 511]),
    )
    given = [x.to(DEVICE) for x in (batch.logits, batch.ids, batch.temperature)]
    derivatives = {name: torch.linspace(-1, 2, n, device=DEVICE) for name in DERIVATIVES}
    launched = []
    launch = triton_launch.launch
    monkeypatch.setattr(
        triton_launch,
        "launch",
        lambda kernel, *a, **k: (launched.append(kernel.fn.__name__), launch(kernel, *a, **k))[1],
    )

    def run(yes: bool):
        split(monkeypatch, yes)
        stats = backend.token_stats(*given, batch.softmax, STATS)
        out = given[0].clone() if in_place else torch.full_like(given[0], math.nan)
        backend.token_grad(
            out if in_place else given[0],
            *given[1:],
            batch.softmax,
            dict(zip(STATS, stats, strict=True)),
            derivatives,
            out,
        )
        return (stats, out, *run_loss_grad(batch, in_place))

    whole = run(False)
    assert launched == ["stats_kernel", "gradient_kernel", "loss_grad_kernel"]
    launched.clear()
    cut = run(True)
    assert launched == [
        "partial_kernel",
        "stats_kernel",
        "gradient_kernel",
        "partial_kernel",
        "merge_kernel",
        "loss_grad_kernel",
    ]
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def test_a_row_is_the_same_bits_wherever_it_stands(small_tiles):
    batch = make(torch.bfloat16, n=10)
    rows, out = run_loss_grad(batch)
    order = torch.tensor([7, 2, 2, 9, 0])
    inputs = RowInputs(*(None if x is None else x[..., order].contiguous() for x in batch.inputs))
    moved = dataclasses.replace(
        batch, logits=batch.logits[order], ids=batch.ids[order], inputs=inputs
    )
    moved_rows, moved_out = run_loss_grad(moved)
    assert torch.equal(moved_rows, rows[:, order])
    assert torch.equal(moved_out, out[order])


def test_both_primitives_give_the_same_logp(small_tiles):
    batch = make(torch.bfloat16, softmax=SoftmaxParams(400, softcap=20.0))
    stats, rows = run_stats(batch, ("logp", "entropy")), run_loss_grad(batch)[0]
    assert torch.equal(stats["logp"], rows[0]) and torch.equal(stats["entropy"], rows[1])
    assert torch.equal(run_stats(batch, ("logp",))["logp"], rows[0])


# --- NaN rows, shards, nothing to do --------------------------------------------------


@pytest.mark.parametrize("bad_logit", ["nan", "+inf", "all -inf", "nan in the last tile"])
@pytest.mark.parametrize("softcap", [math.inf, 30.0])
def test_a_nan_row_is_nan_and_alone(bad_logit, softcap, small_tiles):
    batch = make(n=8, softmax=SoftmaxParams(400, softcap=softcap))
    healthy, healthy_out = run_loss_grad(batch)
    batch.logits = batch.logits.clone()
    if bad_logit == "all -inf":
        batch.logits[4] = -math.inf
    else:
        batch.logits[4, 399 if "last" in bad_logit else 17] = (
            math.inf if bad_logit == "+inf" else math.nan
        )
    rows, out = run_loss_grad(batch)
    assert rows[:, 4].isnan().all()
    assert out[4].isnan().all()
    others = torch.arange(8) != 4
    assert torch.equal(rows[:, others], healthy[:, others])
    assert torch.equal(out[others], healthy_out[others])
    for name, values in run_stats(batch).items():
        # a shard of a row may be empty
        empty = name == "lse_low" and bad_logit == "all -inf"
        assert values[4] == -math.inf if empty else values[4].isnan()
        assert values[others].isfinite().all()


def test_a_nan_row_is_nan_also_where_the_rule_only_compares():
    """Every comparison with NaN is false, so that clip would call the row clipped,
    without a gradient. Padding still stays zero.
    """
    batch = make(
        n=8, program=Program.of(("clip",)), softmax=SoftmaxParams(350), ids=make(n=8).ids % 350
    )
    batch.logits = batch.logits.clone()
    batch.logits[4, 17] = math.nan
    rows, out = run_loss_grad(batch)
    assert rows[:5, 4].isnan().all()
    assert out[4, :350].isnan().all()
    assert torch.equal(out[:, 350:], torch.zeros(8, 50))


def test_the_targets_slope_keeps_its_digits_as_p_goes_to_1():
    """1 - p comes from logp and is relatively accurate where a rounded p has no digits
    left.
    """
    logp = -torch.logspace(-9, -1, 24)
    logits = torch.zeros(24, 2)
    logits[:, 1] = torch.log(torch.expm1(-logp.double())).float()
    ids, one = torch.zeros(24, dtype=torch.int64), torch.ones(24)
    stats = {"logp": logp, "lse": -logp}
    out = torch.full((24, 2), math.nan, device=DEVICE)
    given = {k: v.to(DEVICE) for k, v in stats.items()}
    backend.token_grad(
        logits.to(DEVICE),
        ids.to(DEVICE),
        torch.ones(1, device=DEVICE),
        SoftmaxParams(2),
        given,
        {"logp": one.to(DEVICE)},
        out,
    )
    want = -torch.expm1(logp.double())
    assert ((out[:, 0].cpu().double() - want).abs() <= 8 * 2.0**-24 * want).all()


def test_a_target_of_minus_infinity():
    batch = make(program=Program.of(("reinforce", "entropy_bonus")))
    batch.logits = batch.logits.clone()
    batch.logits[5, batch.ids[5]] = -math.inf
    rows, out = run_loss_grad(batch)
    assert rows[0, 5] == -math.inf
    assert out[5, batch.ids[5]] == 0
    assert out[5].isfinite().all()
    truth = batch.gradient(torch.float64, {"logp": torch.zeros(ROWS), "entropy": rows[5]})
    truth[5] -= rows[4, 5] * torch.softmax(batch.logits[5].double() / 0.8, -1) / 0.8
    usable = torch.arange(400) != batch.ids[5]
    assert torch.allclose(out[5, usable].double(), truth[5, usable], rtol=1e-5, atol=1e-9)


def test_two_shards_are_one_vocabulary():
    batch = make(v=600)
    whole = check_stats(batch)
    halves = []
    for start, stop in ((0, 256), (256, 600)):
        softmax = SoftmaxParams(stop - start, vocab_start=start, vocab_total=600)
        part = dataclasses.replace(batch, logits=batch.logits[:, start:stop], softmax=softmax)
        stats = check_stats(part)
        assert torch.equal(stats["logp"] == -math.inf, (batch.ids < start) | (batch.ids >= stop))
        halves.append((part, stats))
    # token_grad of a shard, from the statistics of the whole
    g = torch.randn(ROWS, generator=torch.Generator().manual_seed(2))
    outs = []
    for part, _ in [(batch, None), *halves]:
        out = torch.full(part.logits.shape, math.nan, device=DEVICE)
        given = {k: v.to(DEVICE) for k, v in whole.items()}
        derivatives = {"logp": g.to(DEVICE), "entropy": -g.to(DEVICE)}
        backend.token_grad(
            part.logits.to(DEVICE),
            batch.ids.to(DEVICE),
            batch.temperature.to(DEVICE),
            part.softmax,
            given,
            derivatives,
            out,
        )
        outs.append(out.cpu())
    assert torch.allclose(outs[0], torch.cat(outs[1:], -1), rtol=0, atol=16 * 2.0**-24)


def test_no_rows_and_no_rows_with_gradient():
    empty = torch.empty(0, 8, device=DEVICE)
    ids, t = torch.empty(0, dtype=torch.int64, device=DEVICE), torch.ones(1, device=DEVICE)
    assert backend.token_stats(empty, ids, t, SoftmaxParams(8), STATS).shape == (len(STATS), 0)
    inputs = RowInputs(torch.empty(1, 0, device=DEVICE), adv=torch.empty(0, device=DEVICE))
    rows = backend.token_loss_grad(
        empty,
        ids,
        t,
        SoftmaxParams(8),
        inputs,
        Program.of(("reinforce",)),
        default_params(Program.of(("reinforce",))).to(DEVICE),
        empty,
    )
    assert rows.shape == (len(LOSS_ROWS), 0)
    batch = make(program=Program.of(("clip",)))
    batch.inputs = batch.inputs._replace(row_weights=torch.zeros(1, ROWS))
    rows, out = run_loss_grad(batch)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(rows[2:], torch.zeros_like(rows[2:]))


def test_masked_rows_are_not_read_by_token_grad():
    batch = make()
    batch.logits = torch.full_like(batch.logits, math.nan)
    zeros = {
        k: torch.zeros(ROWS, device=DEVICE) for k in ("logp", "lse", "entropy", "log_sum_p_sq")
    }
    out = torch.full(batch.logits.shape, math.nan, device=DEVICE)
    backend.token_grad(
        batch.logits.to(DEVICE),
        batch.ids.to(DEVICE),
        batch.temperature.to(DEVICE),
        batch.softmax,
        zeros,
        dict.fromkeys(DERIVATIVES, zeros["logp"]),
        out,
    )
    assert torch.equal(out.cpu(), torch.zeros(ROWS, 400))


# --- user rules -----------------------------------------------------------------------


@pytest.fixture
def registries():
    saved = dict(RULES), dict(WEIGHTS)
    yield
    for registry, content in zip((RULES, WEIGHTS), saved, strict=True):
        registry.clear()
        registry.update(content)


def test_a_users_rule_runs_in_one_pass_with_its_derivative(registries, monkeypatch, tmp_path):
    monkeypatch.setenv("REWEIGHT_OPS_CACHE", str(tmp_path))

    @rule("soft_gate")
    class SoftGate(Rule):
        sharpness: float = 3.0

        def loss(self, xp, t):
            gate = xp.sigmoid(self.sharpness * (t.entropy - 1.0)) + xp.tanh(t.log_sum_p_sq)
            return -gate * t.adv * xp.minimum(xp.exp(t.log_ratio), 2.0)

    @weight("rarity")
    class Rarity(TokenWeight):
        a: float = 0.5

        def weight(self, xp, t, batch):
            return 1 + self.a * xp.log1p(-0.5 * xp.exp(t.logp))

    program = Program.of(("soft_gate", "k3"), (("rarity", "surrogate"),))
    check_loss_grad(make(program=program))
    assert len(list(tmp_path.glob("programs/*.py"))) == 1

    @rule("soft_gate")  # as in a notebook cell that runs again
    class SoftGate(Rule):  # noqa: F811
        def loss(self, xp, t):
            return -t.adv * t.logp * t.entropy

    check_loss_grad(make(program=Program.of(("soft_gate",))))
    assert len(list(tmp_path.glob("programs/*.py"))) == 2
