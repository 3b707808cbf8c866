"""The Triton backend against an fp64 oracle that knows nothing of it: autograd through log_softmax and the rules' own formulas.

Criterion: per dtype, the largest error of the gradient is at most 1.5 times that of torch's fp32 maths rounded once to the dtype, its
rms likewise, both plus 4·2⁻²⁴·(|coef| + |ent_coef|)/T; target and other columns apart. A kernel is judged on what it was given: the
gradient from the coefficients (and statistics) that it had, the coefficients with what the rounding of logp to fp32 does to them.
Runs in Triton's interpreter, or on a GPU if there is one.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from reweight_ops.backends import reference, triton_programs
from reweight_ops.backends import triton as backend
from reweight_ops.backends.base import COEFS, LOSS_ROWS, OUT, STATS, Head, Program, Request, RowInputs
from reweight_ops.codegen.printer import own_rules
from reweight_ops.codegen.triton import program_py
from reweight_ops.rules import RULES, WEIGHTS, Rule, TokenWeight, rule, weight
from reweight_ops.rules.namespace import TorchNamespace
from reweight_ops.triton_kernels.config import Config, config_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
U = 2.0**-24
RICH = Program(("clip", "k3", "entropy_bonus"), (("current_advantage_reweighting", "surrogate"), ("probability_band", "all")))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("REWEIGHT_OPS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and segments a row at sizes that the interpreter likes."""
    monkeypatch.setattr(backend, "config_for", lambda columns, itemsize, wave: Config(128, 16 // itemsize, 1, 256))


# --- the oracle -----------------------------------------------------------------------------------------------------------------


def rows_in(program: Program) -> list[tuple[type, list[str]]]:
    """The classes of a program's parameters, in the order of the vector, with the names of theirs (a term's coefficient first)."""
    terms = [(RULES[n], ["coef", *RULES[n].parameter_names()]) for n in program.terms]
    return terms + [(WEIGHTS[n], list(WEIGHTS[n].parameter_names())) for n, _ in program.weights]


def default_params(program: Program, clamp: float = 20.0, **override: float) -> torch.Tensor:
    values = [-clamp, clamp]
    for i, (cls, names) in enumerate(rows_in(program)):
        defaults = {"coef": (1.0, 0.04, 0.01, 0.3)[i % 4], **cls().parameters(), **override}
        values += [defaults[name] for name in names]
    return torch.tensor(values, dtype=torch.float32)


@dataclasses.dataclass
class Batch:
    logits: torch.Tensor
    ids: torch.Tensor
    temperature: torch.Tensor
    head: Head
    inputs: RowInputs
    program: Program
    params: torch.Tensor


def distribution(batch: Batch, dtype: torch.dtype):
    """Leaf logits ``[N, V]`` in ``dtype`` and, differentiably, logp, entropy, log Σp², lse and the maximum of x, for usable rows only."""
    head, n = batch.head, batch.ids.numel()
    z = batch.logits.detach()[..., : head.vocab_size].reshape(n, head.vocab_size).to(dtype).requires_grad_()
    dead = z == -math.inf
    x = head.softcap * torch.tanh(z / head.softcap) if math.isfinite(head.softcap) else z
    x = torch.where(dead, -math.inf, x) / batch.temperature.to(dtype).view(-1, 1)
    logits_logp = torch.log_softmax(x, -1)
    finite = torch.where(dead, 0, logits_logp)
    p = finite.exp().masked_fill(dead, 0)
    local = batch.ids - head.vocab_start
    inside = (local >= 0) & (local < head.vocab_size) & (batch.ids < head.total())
    logp = logits_logp.gather(-1, torch.where(inside, local, 0)[:, None])[:, 0]
    stats = {
        "logp": torch.where(inside, logp, -math.inf),
        "entropy": -(p * finite).sum(-1),
        "lse": torch.logsumexp(x, -1),
        "log_sum_p_sq": torch.logsumexp(2 * logits_logp, -1),
        "max_logp": logits_logp.amax(-1),
    }
    return z, stats, inside, local


def oracle(batch: Batch, dtype: torch.dtype):
    """Rows of LOSS_ROWS and the derivative by log_sum_p_sq, by autograd, all maths in ``dtype``."""
    stats = distribution(batch, dtype)[1]
    xp, inputs = TorchNamespace(dtype), batch.inputs
    keep = batch.ids != OUT
    logp, entropy, p_sq = (torch.where(keep, stats[k], 0).detach().requires_grad_() for k in ("logp", "entropy", "log_sum_p_sq"))
    old = logp.detach() if inputs.old_logp is None else inputs.old_logp.to(dtype)
    params = iter(batch.params.tolist())
    low, high = next(params), next(params)
    stored = {"adv": inputs.adv, "ref_logp": inputs.ref_logp, "sampling_logp": inputs.sampling_logp}
    t = SimpleNamespace(logp=logp, entropy=entropy, log_sum_p_sq=p_sq, old_logp=old, log_ratio=(logp - old).clamp(low, high))
    t.__dict__.update({k: v.to(dtype) for k, v in stored.items() if v is not None})
    made = [(dict(zip(names, (next(params) for _ in names), strict=True)), cls) for cls, names in rows_in(batch.program)]
    terms, weights = made[: len(batch.program.terms)], made[len(batch.program.terms) :]
    us = [(cls(**fields).weight(xp, t, None).detach(), scope) for (fields, cls), (_, scope) in zip(weights, batch.program.weights, strict=True)]
    loss = weighted = torch.zeros_like(logp)
    for k, (fields, cls) in enumerate(terms):
        factor = torch.full_like(logp, fields.pop("coef"))
        for u, scope in us:
            factor = factor * u if k == 0 or scope == "all" else factor
        w = inputs.weights[k].to(dtype)
        chosen = keep & (w * factor != 0)
        value = cls(**fields).loss(xp, t)
        loss = loss + torch.where(chosen, factor * value, 0)
        weighted = weighted + torch.where(chosen, w * factor * value, 0)
    by_logp, by_entropy, by_p_sq = torch.autograd.grad(weighted.sum(), [logp, entropy, p_sq], allow_unused=True, materialize_grads=True)
    rows = torch.stack([logp, entropy, weighted, loss, by_logp, by_entropy]).detach()
    return rows, by_p_sq.detach()


def flow(batch: Batch, dtype: torch.dtype, coefs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient by the logits, by autograd in ``dtype``, of row statistics with these derivatives (0 where a row is out)."""
    z, stats, _, _ = distribution(batch, dtype)
    keep = (batch.ids >= 0) & (batch.ids < batch.head.total())
    outputs = [torch.where(stats[k].isfinite() & keep, stats[k], 0) for k in coefs]  # a target of -inf has no slope of its own
    return torch.autograd.grad(outputs, z, [torch.where(keep, c, 0).to(dtype) for c in coefs.values()])[0]


# --- the criterion --------------------------------------------------------------------------------------------------------------


def assert_close(what: str, got: torch.Tensor, truth: torch.Tensor, yardstick: torch.Tensor, floor: torch.Tensor) -> None:
    """``got`` errs at most 1.5 times as much as ``yardstick``, in maximum and in rms, plus ``floor`` (elementwise)."""
    error, allowed = (got.double() - truth).abs() - floor, (yardstick.double() - truth).abs()
    assert got.isfinite().all(), f"{what}: {(~got.isfinite()).sum()} values are not finite"
    if not error.numel():
        return
    worst = int(error.argmax())
    assert error.max() <= 1.5 * allowed.max(), (
        f"{what}: element {worst} is {got.flatten()[worst]}, not {truth.flatten()[worst]}; over the floor {error.max():.2e}, torch {allowed.max():.2e}"
    )
    rms = error.clamp(min=0).square().mean().sqrt()
    assert rms <= 1.5 * allowed.square().mean().sqrt(), f"{what}: rms {rms:.2e}, torch {allowed.square().mean().sqrt():.2e}"


def check_gradient(batch: Batch, got: torch.Tensor, truth: torch.Tensor, yardstick: torch.Tensor, scale: torch.Tensor) -> None:
    """``scale``: the sum of the absolute coefficients of each row."""
    v, n, dtype = batch.head.vocab_size, batch.ids.numel(), batch.logits.dtype
    flat = got.reshape(n, got.size(-1))
    assert torch.equal(flat[:, v:], torch.zeros_like(flat[:, v:])), "columns of padding have a gradient"
    flat = flat[:, :v]
    usable = (batch.ids >= 0) & (batch.ids < batch.head.total())
    assert torch.equal(flat[~usable], torch.zeros_like(flat[~usable])), "a row that is out has a gradient"
    # The floor of the criterion, and below fp16's and bf16's normal range half a unit of the subnormals.
    floor = (4 * U * scale / batch.temperature.double().view(-1)).expand(n)[:, None].expand(n, v) + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    target = torch.zeros(n, v, dtype=torch.bool)
    local = batch.ids - batch.head.vocab_start
    inside = usable & (local >= 0) & (local < v)
    target[inside, local[inside]] = True
    for what, where in {"target": target, "other columns": ~target & usable[:, None]}.items():
        assert_close(f"gradient, {what}", flat[where], truth[where], yardstick[where].to(dtype), floor[where])


def check_loss_grad(batch: Batch, in_place: bool = False) -> torch.Tensor:
    truth, by_p_sq = oracle(batch, torch.float64)
    yardstick = oracle(batch, torch.float32)[0]
    rows, out = run_loss_grad(batch, in_place)
    bad = (batch.ids != OUT) & ((batch.ids < 0) | (batch.ids >= batch.head.total()))
    assert rows[:, bad].isnan().all()
    # What half a unit in the last place of logp, entropy and the inputs does: the slope of each row's outputs times |logp| + |entropy|.
    bent = sum((oracle(nudged, torch.float64)[0] - truth).abs() for nudged in nudges(batch))
    for i, name in enumerate(LOSS_ROWS):
        floor = 4 * U * (1 + truth[i].abs()) + bent[i]
        assert_close(name, rows[i, ~bad], truth[i, ~bad], yardstick[i, ~bad], floor[~bad])
    assert torch.equal(rows[:, batch.ids == OUT], torch.zeros_like(rows[:, batch.ids == OUT]))
    coefs = {"logp": rows[4].double(), "entropy": rows[5].double(), "log_sum_p_sq": by_p_sq}
    grads = [flow(batch, dtype, coefs) for dtype in (torch.float64, torch.float32)]
    check_gradient(batch, out, *grads, sum(c.abs() for c in coefs.values()))
    return rows


def nudges(batch: Batch):
    """The batch with the stored log-probs moved by as much as rounding ``logp`` and the row sums moves it."""
    for name in ("old_logp", "ref_logp"):
        x = getattr(batch.inputs, name)
        if x is not None:
            moved = x.double() + 4 * U * (4 + x.double().abs())
            yield dataclasses.replace(batch, inputs=batch.inputs._replace(**{name: moved}))


def run_loss_grad(batch: Batch, in_place: bool = False):
    to = lambda x: None if x is None else x.to(DEVICE)  # noqa: E731
    logits = batch.logits.to(DEVICE, copy=in_place)
    out = logits if in_place else torch.full(logits.shape, math.nan, dtype=logits.dtype, device=DEVICE)
    inputs = RowInputs(*map(to, batch.inputs))
    rows = backend.token_loss_grad(logits, to(batch.ids), to(batch.temperature), batch.head, inputs, batch.program, to(batch.params), out)
    return rows.cpu(), out.cpu()


def check_stats(batch: Batch) -> dict[str, torch.Tensor]:
    truth, yard = (distribution(batch, dtype)[1] for dtype in (torch.float64, torch.float32))
    got = backend.token_stats(batch.logits.to(DEVICE), batch.ids.to(DEVICE), batch.temperature.to(DEVICE), batch.head, STATS).cpu()
    keep = (batch.ids >= 0) & (batch.ids < batch.head.total())
    assert torch.equal(got[:, batch.ids == OUT], torch.zeros_like(got[:, batch.ids == OUT]))
    assert got[:, (batch.ids != OUT) & ~keep].isnan().all()
    result = dict(zip(STATS, got, strict=True))
    for name in STATS:
        have, want, yardstick = (x[keep].detach() for x in (result[name], truth[name], yard[name]))
        infinite = want == -math.inf
        assert (have[infinite] == -math.inf).all()
        have, want, yardstick = have[~infinite], want[~infinite], yardstick[~infinite]
        assert_close(name, have, want, yardstick, 4 * U * (1 + want.abs()))
    return result


def check_grad(batch: Batch, names: tuple[str, ...] = COEFS, in_place: bool = False) -> None:
    """token_grad from exact statistics rounded to fp32; the yardstick is fp32 torch from the same ones (the contract's formula)."""
    stats = {k: v.detach().float() for k, v in distribution(batch, torch.float64)[1].items()}
    g = torch.Generator().manual_seed(1)
    n = batch.ids.numel()
    coefs = {name: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.8) if name in names else None for name in COEFS}
    used = {name: c for name, c in coefs.items() if c is not None}
    given = {k: v.to(DEVICE) for k, v in stats.items() if k in ("logp", "lse") or k in used}
    logits = batch.logits.to(DEVICE, copy=True)
    out = logits if in_place else torch.full(logits.shape, math.nan, dtype=logits.dtype, device=DEVICE)
    by = {k: None if c is None else c.to(DEVICE) for k, c in coefs.items()}
    backend.token_grad(logits, batch.ids.to(DEVICE), batch.temperature.to(DEVICE), batch.head, given, by, out)
    truth = flow(batch, torch.float64, used)
    yardstick = torch.empty(batch.logits.shape, dtype=torch.float32)
    of_reference = dataclasses.replace(batch, logits=batch.logits.float())
    reference.token_grad(of_reference.logits, batch.ids, batch.temperature, batch.head, stats, coefs, yardstick)
    check_gradient(batch, out.cpu(), truth, yardstick.reshape(n, -1)[:, : batch.head.vocab_size], sum(c.double().abs() for c in used.values()))


# --- batches --------------------------------------------------------------------------------------------------------------------


def make(dtype=torch.float32, n=40, v=400, program=RICH, seed=0, **change) -> Batch:
    """Logits with outliers, targets with real mass, both sides of the clip, both sides of the clamp."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, v, generator=g) * 2.5).to(dtype)
    ids = torch.randint(0, v, (n,), generator=g)
    ids[::2] = logits[::2].float().argmax(-1)
    logits[0, ids[0]] = 40.0  # p = 1 to fp32
    logits[1] *= 4
    batch = Batch(logits, ids, torch.tensor([0.8]), Head(v), None, program, default_params(program))
    batch = dataclasses.replace(batch, **change)
    n = batch.ids.numel()
    with torch.no_grad():
        logp = torch.nan_to_num(distribution(batch, torch.float32)[1]["logp"], neginf=-30.0)
    drift = 0.3 * torch.randn(n, generator=g)
    drift[-2:] = torch.tensor([100.0, -100.0])
    if batch.inputs is None:
        adv = torch.randn(n, generator=g)
        adv[2] = 0.0
        weights = torch.rand(len(batch.program.terms), n, generator=g) / n
        weights[0, 3] = 0.0
        others = (logp + 0.3 * torch.randn(n, generator=g) for _ in range(2))
        batch.inputs = RowInputs(weights, logp - drift, adv, *others)
    return batch


def strided(dtype) -> Batch:
    """Two leading dimensions, sliced out of a larger tensor full of NaN, with padding columns: every stride matters."""
    batch = make(dtype)
    big = torch.full((3, 21, 500), math.nan, dtype=dtype)
    view = big[1:, :20, 4:444]
    view[..., :400] = batch.logits.view(2, 20, 400)
    return dataclasses.replace(batch, logits=view)


def masked(dtype) -> Batch:
    batch = make(dtype)
    batch.ids[[1, 4]] = OUT
    batch.ids[5], batch.ids[6] = 400, -7
    batch.logits[1] = math.nan
    batch.inputs.adv[1] = math.nan
    return batch


def minus_infinity(dtype) -> Batch:
    """Whole tiles and the first tile of -inf, single columns, and all but one."""
    batch = make(dtype)
    keep = torch.zeros(40, 400, dtype=torch.bool)
    keep[torch.arange(40), batch.ids] = True
    dead = torch.rand(40, 400, generator=torch.Generator().manual_seed(3)) < 0.3
    dead[0, :300] = dead[3, 100:] = dead[7] = True
    logits = torch.where(dead & ~keep, -math.inf, batch.logits.float()).to(dtype)
    return make(dtype, logits=logits, ids=batch.ids)


CONDITIONS = {
    "plain": lambda dtype: make(dtype),
    "strides, padding and poison": strided,
    "rows that are out": masked,
    "-inf": minus_infinity,
    "softcap": lambda dtype: make(dtype, head=Head(400, softcap=5.0)),
    "softcap and -inf": lambda dtype: make(dtype, logits=minus_infinity(dtype).logits, ids=minus_infinity(dtype).ids, head=Head(400, softcap=30.0)),
    "a temperature each row": lambda dtype: make(dtype, temperature=torch.linspace(0.3, 2.5, 40)),
    "a large common shift": lambda dtype: make(dtype, logits=make(dtype).logits + 300),
    "padded vocabulary": lambda dtype: make(dtype, head=Head(350), ids=make(dtype).ids % 350),
    "an odd vocabulary": lambda dtype: make(dtype, v=397),
    "a tiny vocabulary": lambda dtype: make(dtype, v=3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions(condition, dtype, small_tiles):
    check_stats(CONDITIONS[condition](dtype))
    check_grad(CONDITIONS[condition](dtype))
    check_loss_grad(CONDITIONS[condition](dtype))


@pytest.mark.parametrize("name", sorted(own_rules()))
def test_rules(name):
    terms = (name,) if own_rules()[name].kind == "surrogate" else ("reinforce", name)
    check_loss_grad(make(program=Program(terms)))


@pytest.mark.parametrize("program", [Program(("clip", "k1", "k2", "entropy_bonus")), Program(("cispo", "k3_corrected"), (("truncated_importance", "surrogate"),))])
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
    batch = make(program=Program(("clip",)))
    batch.inputs = batch.inputs._replace(old_logp=None)
    rows = check_loss_grad(batch)
    assert torch.equal(rows[3], -batch.inputs.adv * (batch.inputs.weights[0] != 0))
    stats = backend.token_stats(batch.logits.to(DEVICE), batch.ids.to(DEVICE), batch.temperature.to(DEVICE), batch.head, ("logp",)).cpu()
    batch.inputs = batch.inputs._replace(old_logp=stats[0])
    assert torch.equal(run_loss_grad(batch)[0], rows)


# --- what must be bitwise -------------------------------------------------------------------------------------------------------


def split(monkeypatch, yes: bool) -> None:
    monkeypatch.setattr(backend, "_processors", lambda device: 10**6 if yes else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_splitting_rows_changes_no_bit(dtype, small_tiles, monkeypatch):
    results = []
    for yes in (False, True):
        split(monkeypatch, yes)
        launched = []
        launch = backend._launch
        monkeypatch.setattr(backend, "_launch", lambda kernel, *a, **k: (launched.append(kernel), launch(kernel, *a, **k))[1])  # noqa: B023
        stats = backend.token_stats(*(x.to(DEVICE) for x in (make(dtype).logits, make(dtype).ids, make(dtype).temperature)), Head(400), STATS)
        results.append((stats, *run_loss_grad(make(dtype))))
        assert (backend.kernels.partial_kernel in launched) == yes
        monkeypatch.setattr(backend, "_launch", launch)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_row_is_the_same_bits_wherever_it_stands(small_tiles):
    batch = make(torch.bfloat16)
    rows, out = run_loss_grad(batch)
    order = torch.tensor([7, 2, 2, 9, 0])
    inputs = RowInputs(*(None if x is None else x[..., order].contiguous() for x in batch.inputs))
    moved = dataclasses.replace(batch, logits=batch.logits[order], ids=batch.ids[order], inputs=inputs)
    moved_rows, moved_out = run_loss_grad(moved)
    assert torch.equal(moved_rows, rows[:, order])
    assert torch.equal(moved_out, out[order])


def test_both_verbs_give_the_same_logp(small_tiles):
    batch = make(torch.bfloat16, head=Head(400, softcap=20.0))
    stats = backend.token_stats(batch.logits.to(DEVICE), batch.ids.to(DEVICE), batch.temperature.to(DEVICE), batch.head, ("logp", "entropy")).cpu()
    assert torch.equal(stats, run_loss_grad(batch)[0][:2])
    alone = backend.token_stats(batch.logits.to(DEVICE), batch.ids.to(DEVICE), batch.temperature.to(DEVICE), batch.head, ("logp",)).cpu()
    assert torch.equal(alone[0], stats[0])


# --- sick rows, shards, nothing to do ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sickness", ["nan", "+inf", "all -inf", "nan in the last tile"])
@pytest.mark.parametrize("softcap", [math.inf, 30.0])
def test_a_sick_row_is_nan_and_alone(sickness, softcap, small_tiles):
    batch = make(n=8, head=Head(400, softcap=softcap))
    healthy, healthy_out = run_loss_grad(batch)
    batch.logits = batch.logits.clone()
    if sickness == "all -inf":
        batch.logits[4] = -math.inf
    else:
        batch.logits[4, 399 if "last" in sickness else 17] = math.inf if sickness == "+inf" else math.nan
    rows, out = run_loss_grad(batch)
    assert rows[:, 4].isnan().all()
    assert out[4].isnan().all()
    others = torch.arange(8) != 4
    assert torch.equal(rows[:, others], healthy[:, others])
    assert torch.equal(out[others], healthy_out[others])
    stats = backend.token_stats(batch.logits.to(DEVICE), batch.ids.to(DEVICE), batch.temperature.to(DEVICE), batch.head, STATS).cpu()
    assert stats[:, 4].isnan().all()
    assert stats[:, others].isfinite().all()


def test_a_target_of_minus_infinity():
    batch = make(program=Program(("reinforce", "entropy_bonus")))
    batch.logits = batch.logits.clone()
    batch.logits[5, batch.ids[5]] = -math.inf
    rows, out = run_loss_grad(batch)
    assert rows[0, 5] == -math.inf
    assert out[5, batch.ids[5]] == 0
    assert out[5].isfinite().all()
    truth = flow(batch, torch.float64, {"logp": torch.zeros(40), "entropy": rows[5]})
    truth[5] -= rows[4, 5] * torch.softmax(batch.logits[5].double() / 0.8, -1) / 0.8
    usable = torch.arange(400) != batch.ids[5]
    assert torch.allclose(out[5, usable].double(), truth[5, usable], rtol=1e-5, atol=1e-9)


def test_two_shards_are_one_vocabulary():
    batch = make(v=600)
    whole = check_stats(batch)
    halves = []
    for start, stop in ((0, 256), (256, 600)):
        head = Head(stop - start, vocab_start=start, vocab_total=600)
        part = dataclasses.replace(batch, logits=batch.logits[:, start:stop], head=head)
        stats = check_stats(part)
        assert torch.equal(stats["logp"] == -math.inf, (batch.ids < start) | (batch.ids >= stop))
        halves.append((part, stats))
    # token_grad of a shard, from the statistics of the whole
    g = torch.randn(40, generator=torch.Generator().manual_seed(2))
    outs = []
    for part, _ in [(batch, None), *halves]:
        out = torch.full(part.logits.shape, math.nan, device=DEVICE)
        given = {k: v.to(DEVICE) for k, v in whole.items()}
        coefs = {"logp": g.to(DEVICE), "entropy": -g.to(DEVICE)}
        backend.token_grad(part.logits.to(DEVICE), batch.ids.to(DEVICE), batch.temperature.to(DEVICE), part.head, given, coefs, out)
        outs.append(out.cpu())
    assert torch.allclose(outs[0], torch.cat(outs[1:], -1), rtol=0, atol=16 * U)


def test_no_rows_and_no_live_rows():
    empty = torch.empty(0, 8, device=DEVICE)
    ids, t = torch.empty(0, dtype=torch.int64, device=DEVICE), torch.ones(1, device=DEVICE)
    assert backend.token_stats(empty, ids, t, Head(8), STATS).shape == (len(STATS), 0)
    inputs = RowInputs(torch.empty(1, 0, device=DEVICE), adv=torch.empty(0, device=DEVICE))
    rows = backend.token_loss_grad(empty, ids, t, Head(8), inputs, Program(("reinforce",)), default_params(Program(("reinforce",))).to(DEVICE), empty)
    assert rows.shape == (len(LOSS_ROWS), 0)
    batch = make(program=Program(("clip",)))
    batch.inputs = batch.inputs._replace(weights=torch.zeros(1, 40))
    rows, out = run_loss_grad(batch)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(rows[2:], torch.zeros_like(rows[2:]))


def test_dead_rows_are_not_read_by_token_grad():
    batch = make()
    batch.logits = torch.full_like(batch.logits, math.nan)
    zeros = {k: torch.zeros(40, device=DEVICE) for k in ("logp", "lse", "entropy", "log_sum_p_sq")}
    out = torch.full(batch.logits.shape, math.nan, device=DEVICE)
    backend.token_grad(batch.logits.to(DEVICE), batch.ids.to(DEVICE), batch.temperature.to(DEVICE), batch.head, zeros, dict.fromkeys(COEFS, zeros["logp"]), out)
    assert torch.equal(out.cpu(), torch.zeros(40, 400))


# --- user rules -----------------------------------------------------------------------------------------------------------------


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

    program = Program(("soft_gate", "k3"), (("rarity", "surrogate"),))
    check_loss_grad(make(program=program))
    assert len(list(tmp_path.glob("programs/*.py"))) == 1

    @rule("soft_gate")  # noqa: F811: a notebook cell that runs again
    class SoftGate(Rule):
        def loss(self, xp, t):
            return -t.adv * t.logp * t.entropy

    check_loss_grad(make(program=Program(("soft_gate",))))
    assert len(list(tmp_path.glob("programs/*.py"))) == 2


def test_the_cache_mends_a_short_file_and_serves_many_processes(tmp_path):
    text = program_py(RICH) + "\n# of this test alone\n"
    module = triton_programs.load_source(text, tmp_path)
    path = next(tmp_path.glob("programs/*.py"))
    path.write_text(text[:40])
    del sys.modules[module.__name__]
    assert triton_programs.load_source(text, tmp_path).program is not module.program
    assert path.read_text() == text
    path.unlink()
    del sys.modules[module.__name__]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=triton_programs.load_source, args=(text, tmp_path)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    assert [p.name for p in (tmp_path / "programs").iterdir() if p.is_file()] == [path.name]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("REWEIGHT_OPS_CACHE", str(tmp_path))
    assert triton_programs.cache_folder() == tmp_path
    monkeypatch.delenv("REWEIGHT_OPS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert triton_programs.cache_folder().name == "reweight_ops"


# --- reasons and launch shapes --------------------------------------------------------------------------------------------------


def test_reasons():
    request = Request("token_stats", torch.device(DEVICE), torch.float32)
    assert backend.BACKEND.unsupported_reason(request) is None
    assert "float64" in backend.BACKEND.unsupported_reason(dataclasses.replace(request, dtype=torch.float64))
    assert "xpu" in backend.BACKEND.unsupported_reason(dataclasses.replace(request, device=torch.device("xpu"))) or backend.interpreted()


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("wave", [32, 64])
@pytest.mark.parametrize("columns", [1, 1000, 32000, 151936, 1 << 21])
def test_launch_shapes(columns, itemsize, wave):
    config = config_for(columns, itemsize, wave)
    assert config.vector * itemsize == 16
    assert config.block & (config.block - 1) == 0
    assert config.segment % config.block == 0
    assert config.warps * wave <= 1024
    assert config.block % (config.warps * wave * config.vector) == 0


def test_alignment_classes():
    base = torch.zeros(4096, dtype=torch.bfloat16)
    assert backend._alignment(base.view(4, 1024)) == 16
    assert backend._alignment(base[2:2050].view(2, 1024)) == 4
    assert backend._alignment(base[1:2049].view(2, 1024)) == 2
    assert backend._alignment(base[:1002].view(2, 501)) == 2
    assert backend._alignment(base[:1000].view(2, 500), base[1:1001].view(2, 500)) == 2
    assert backend._alignment(base.float()[1:1001].view(2, 500)) == 4
