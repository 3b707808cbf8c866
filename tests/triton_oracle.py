"""An fp64 oracle of the three verbs that knows nothing of any kernel, and the accuracy criterion; tests/test_triton.py uses it.

Autograd through log_softmax and the rules' own formulas. Criterion: see :func:`assert_close` and tests/test_triton.py.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import torch

from reweight_ops.backends import reference
from reweight_ops.backends import triton as backend
from reweight_ops.backends.base import COEFS, LOSS_ROWS, OUT, STATS, Head, Program, RowInputs
from reweight_ops.rules import RULES, WEIGHTS
from reweight_ops.rules.namespace import TorchNamespace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
U = 2.0**-24


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
    us = [
        (cls(**fields).weight(xp, t, None).detach(), scope)
        for (fields, cls), (_, scope) in zip(weights, batch.program.weights, strict=True)
    ]
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
        f"{what}: element {worst} is {got.flatten()[worst]}, not {truth.flatten()[worst]}; "
        f"over the floor {error.max():.2e}, torch {allowed.max():.2e}"
    )
    rms = error.clamp(min=0).square().mean().sqrt()
    assert rms <= 1.5 * allowed.square().mean().sqrt(), f"{what}: rms {rms:.2e}, torch {allowed.square().mean().sqrt():.2e}"


def check_gradient(
    batch: Batch, got: torch.Tensor, truth: torch.Tensor, yardstick: torch.Tensor, scale: torch.Tensor, given: torch.Tensor | float = 0.0
) -> None:
    """``scale``: the sum of the absolute coefficients of each row; ``given``: relative error of p that the statistics came with."""
    v, n, dtype = batch.head.vocab_size, batch.ids.numel(), batch.logits.dtype
    flat = got.reshape(n, got.size(-1))
    assert torch.equal(flat[:, v:], torch.zeros_like(flat[:, v:])), "columns of padding have a gradient"
    flat = flat[:, :v]
    usable = (batch.ids >= 0) & (batch.ids < batch.head.total())
    assert torch.equal(flat[~usable], torch.zeros_like(flat[~usable])), "a row that is out has a gradient"
    # The floor of the criterion, and below fp16's and bf16's normal range half a unit of the subnormals.
    floor = (4 * U * scale / batch.temperature.double().view(-1)).expand(n)[:, None].expand(n, v) + torch.finfo(
        dtype
    ).smallest_normal * torch.finfo(dtype).eps
    floor = floor + truth.abs() * torch.as_tensor(given).view(-1, 1)
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
    given = U * torch.minimum(stats["logp"].abs(), stats["lse"].abs()).double()  # log p comes from one of them, each rounded to fp32
    check_gradient(
        batch, out.cpu(), truth, yardstick.reshape(n, -1)[:, : batch.head.vocab_size], sum(c.double().abs() for c in used.values()), given
    )
