"""Checks of tests/backends/triton/test_triton.py: they run batches and judge the three
primitives against fp64.

They use the criterion (tests/support/criterion.py). The reference shares nothing with a
kernel: autograd through log_softmax (tests/support/kernel_oracle.py) and through the
rules' own formulas. No primitive receives the results of another (except statistics
under a softcap): the gradient of ``token_loss_grad`` is judged from the logits on, with
the derivatives that fp64 finds.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import torch
import triton
from criterion import assert_gradient, assert_values
from kernel_oracle import gradient, lse_low, statistics

from reweight_ops._core.backends import triton_launch
from reweight_ops._core.backends import triton_token as backend
from reweight_ops._core.backends.base import DERIVATIVES, LOSS_ROWS, STATS, RowInputs, SoftmaxParams
from reweight_ops._core.formula.loss_program import Program
from reweight_ops._core.formula.namespace import TorchNamespace
from reweight_ops._core.formula.text import write_formula
from reweight_ops._core.formula.trace import trace_rule, trace_weight
from reweight_ops._core.rows.groups import IGNORE_INDEX
from reweight_ops.rules import RULES, WEIGHTS
from reweight_ops.triton_kernels.config import Config, Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fuse_multiply_add() -> None:
    """Make Triton's interpreter round ``tl.fma`` once.

    Before 3.9 it rounds twice, which no GPU does, and the kernels rely on one rounding.
    (The product of two fp32 numbers is exact in fp64. The sum is rounded there first,
    which changes hardly any fp32 result.)
    """
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self, x, y, z):
        dtype = z.data.dtype
        wide = (v.data.astype(numpy.float64) for v in (x, y))
        return TensorHandle((numpy.multiply(*wide) + z.data).astype(dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = fma


if triton_launch.interpreted() and tuple(int(n) for n in triton.__version__.split(".")[:2]) < (
    3,
    9,
):
    fuse_multiply_add()


def small_config(columns: int, itemsize: int, capped: bool) -> Config:
    """Tiles of 128 columns and segments of 256: several of both at sizes that suit the
    interpreter.
    """
    return Config(
        64 * itemsize // 16,
        2,
        16 // itemsize,
        256,
        Launch(32, 64),
        Launch(32, 64, 2),
        Launch(64 * itemsize // 16, 64),
        2,
    )


def rows_in(program: Program) -> list[tuple[type, list[str]]]:
    """The classes of a program's parameters in the order of the vector, with their
    names (a term's coefficient first).
    """
    rules = {write_formula(trace_rule(cls)): cls for cls in RULES.values()}
    weights = {
        write_formula(t): cls for cls in WEIGHTS.values() if not (t := trace_weight(cls)).uses_batch
    }
    terms = [(rules[text], ["coef", *rules[text].parameter_names()]) for text in program.terms]
    return terms + [
        (weights[text], list(weights[text].parameter_names())) for text, _ in program.weights
    ]


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
    softmax: SoftmaxParams
    inputs: RowInputs
    program: Program
    params: torch.Tensor

    @property
    def usable(self) -> torch.Tensor:
        return (self.ids >= 0) & (self.ids < self.softmax.total())

    @property
    def bad(self) -> torch.Tensor:
        return ~self.usable & (self.ids != IGNORE_INDEX)

    def in_dtype(self, dtype: torch.dtype) -> tuple:
        """The rows and the head as tests/support/kernel_oracle.py takes them."""
        n = self.ids.numel()
        rows = (
            self.logits.detach()[..., : self.softmax.vocab_size]
            .reshape(n, self.softmax.vocab_size)
            .to(dtype)
        )
        return rows, self.ids, self.temperature.to(dtype).expand(n)

    def statistics(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return statistics(*self.in_dtype(dtype), self.softmax.softcap, self.softmax.vocab_start)

    def gradient(self, dtype: torch.dtype, derivatives: dict[str, torch.Tensor]) -> torch.Tensor:
        return gradient(
            *self.in_dtype(dtype), derivatives, self.softmax.softcap, self.softmax.vocab_start
        )


# --- token_stats ----------------------------------------------------------------------


def run_stats(batch: Batch, names: tuple[str, ...] = STATS) -> dict[str, torch.Tensor]:
    to = (x.to(DEVICE) for x in (batch.logits, batch.ids, batch.temperature))
    return dict(zip(names, backend.token_stats(*to, batch.softmax, names).cpu(), strict=True))


def check_stats(batch: Batch) -> dict[str, torch.Tensor]:
    got = run_stats(batch)
    judge_stats(batch, got)
    return got


def judge_stats(batch: Batch, got: dict[str, torch.Tensor]) -> None:
    truth, fp32 = batch.statistics(torch.float64), batch.statistics(torch.float32)
    for name, ours in got.items():
        assert torch.equal(
            ours[batch.ids == IGNORE_INDEX], torch.zeros(int((batch.ids == IGNORE_INDEX).sum()))
        )
        assert ours[batch.bad].isnan().all()
        if name == "lse_low":
            continue  # meaningful only together with lse
        infinite = batch.usable & (truth[name] == -math.inf)
        assert (ours[infinite] == -math.inf).all()
        finite = batch.usable & ~infinite
        assert_values(ours[finite], fp32[name][finite], truth[name][finite], name)
    # the two numbers are as exact as the distance from the largest logit
    if "lse_low" in got and batch.softmax.softcap == math.inf:
        rows, _, temperature = batch.in_dtype(torch.float64)
        below = (rows.amax(-1) / temperature - got["lse"].double() - got["lse_low"].double())[
            batch.usable
        ]
        assert_values(
            below, fp32["max_logp"][batch.usable], truth["max_logp"][batch.usable], "lse_low"
        )


# --- token_grad -----------------------------------------------------------------------


def random_derivatives(n: int, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Derivatives of these statistics. Every fifth is 0."""
    g = torch.Generator().manual_seed(1)
    every = {
        name: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.8)
        for name in DERIVATIVES
    }
    return {name: every[name] for name in names}


def run_grad(
    batch: Batch,
    stats: dict[str, torch.Tensor],
    derivatives: dict[str, torch.Tensor],
    in_place: bool = False,
) -> torch.Tensor:
    logits = batch.logits.to(DEVICE, copy=True)
    out = (
        logits
        if in_place
        else torch.full(logits.shape, math.nan, dtype=logits.dtype, device=DEVICE)
    )
    given = {
        name: x.to(DEVICE)
        for name, x in stats.items()
        if name in ("logp", "lse", "lse_low") or name in derivatives
    }
    by = {
        name: derivatives[name].to(DEVICE) if name in derivatives else None for name in DERIVATIVES
    }
    backend.token_grad(
        logits, batch.ids.to(DEVICE), batch.temperature.to(DEVICE), batch.softmax, given, by, out
    )
    return out.cpu()


def check_grad(batch: Batch, names: tuple[str, ...] = DERIVATIVES, in_place: bool = False) -> None:
    """Check the gradient from exact statistics, rounded to fp32.

    Under a softcap it uses the backend's own statistics: the log-sum-exp must then be
    that of the capped logits as its kernels round them, as in fp32 PyTorch.
    """
    exact = batch.statistics(torch.float64)
    stats = {name: x.float() for name, x in exact.items()} | {"lse_low": lse_low(exact["lse"])}
    if batch.softmax.softcap < math.inf:
        stats = run_stats(batch)
    derivatives = random_derivatives(batch.ids.numel(), names)
    judge_grad(batch, stats, derivatives, run_grad(batch, stats, derivatives, in_place))


def judge_grad(
    batch: Batch,
    stats: dict[str, torch.Tensor],
    derivatives: dict[str, torch.Tensor],
    got: torch.Tensor,
) -> None:
    truth, fp32 = (
        batch.gradient(dtype, of_usable_rows(batch, derivatives))
        for dtype in (torch.float64, torch.float32)
    )
    judge_gradient(batch, got, derivatives, truth, fp32)


def of_usable_rows(batch: Batch, derivatives: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.where(batch.usable, c, 0) for name, c in derivatives.items()}


def judge_gradient(
    batch: Batch,
    got: torch.Tensor,
    derivatives: dict[str, torch.Tensor],
    truth: torch.Tensor,
    fp32: torch.Tensor,
) -> None:
    """Check for exact zeros in ignored rows and padding columns, and the criterion
    everywhere else.
    """
    v, n, usable = batch.softmax.vocab_size, batch.ids.numel(), batch.usable
    rows = got.reshape(n, got.size(-1))
    assert torch.equal(rows[:, v:], torch.zeros_like(rows[:, v:])), (
        "columns of padding have a gradient"
    )
    assert torch.equal(rows[~usable], torch.zeros_like(rows[~usable])), (
        "an ignored row has a gradient"
    )
    size = sum(c.abs().double() for c in derivatives.values()) / batch.temperature.double()
    columns = batch.ids - batch.softmax.vocab_start
    assert_gradient(rows[usable, :v], fp32[usable], truth[usable], size[usable], columns[usable])


# --- token_loss_grad ------------------------------------------------------------------


def program_rows(
    batch: Batch, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Rows of LOSS_ROWS, the derivatives, and the scales of rounding of the two losses,
    by autograd in ``dtype``.
    """
    stats = batch.statistics(dtype)
    xp, inputs, keep = TorchNamespace(dtype), batch.inputs, batch.ids != IGNORE_INDEX
    leaves = {
        name: torch.where(keep, stats[name], 0).detach().requires_grad_()
        for name in ("logp", "entropy", "log_sum_p_sq")
    }
    logp = leaves["logp"]
    old = logp.detach() if inputs.old_logp is None else inputs.old_logp.to(dtype)
    params = iter(batch.params.tolist())
    low, high = next(params), next(params)
    stored = {"adv": inputs.adv, "ref_logp": inputs.ref_logp, "sampling_logp": inputs.sampling_logp}
    t = SimpleNamespace(**leaves, old_logp=old, log_ratio=(logp - old).clamp(low, high))
    t.__dict__.update({k: v.to(dtype) for k, v in stored.items() if v is not None})
    made = [
        (dict(zip(names, (next(params) for _ in names), strict=True)), cls)
        for cls, names in rows_in(batch.program)
    ]
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
        w = inputs.row_weights[k].to(dtype)
        chosen = keep & (w * factor != 0)
        value = cls(**fields).loss(xp, t)
        loss = loss + torch.where(chosen, factor * value, 0)
        weighted = weighted + torch.where(chosen, w * factor * value, 0)

    def derivatives_of(x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(
            x.sum(),
            list(leaves.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(leaves, found, strict=True))

    def size(x: torch.Tensor) -> torch.Tensor:
        """Size of a loss and of its slopes times their factors, as in the package
        (reweight_ops/testing/criterion.py), per row.
        """
        return (
            x.abs()
            + sum(d.abs() * (1 + leaves[name].abs()) for name, d in derivatives_of(x).items())
        ).detach()

    derivatives = derivatives_of(weighted)
    rows = [logp, leaves["entropy"], weighted, loss, derivatives["logp"], derivatives["entropy"]]
    sizes = {"weighted_loss": size(weighted), "loss": size(loss)}
    return dict(zip(LOSS_ROWS, (x.detach() for x in rows), strict=True)), derivatives, sizes


def run_loss_grad(batch: Batch, in_place: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    to = lambda x: None if x is None else x.to(DEVICE)  # noqa: E731
    logits = batch.logits.to(DEVICE, copy=in_place)
    out = (
        logits
        if in_place
        else torch.full(logits.shape, math.nan, dtype=logits.dtype, device=DEVICE)
    )
    inputs = RowInputs(*map(to, batch.inputs))
    rows = backend.token_loss_grad(
        logits,
        to(batch.ids),
        to(batch.temperature),
        batch.softmax,
        inputs,
        batch.program,
        to(batch.params),
        out,
    )
    return rows.cpu(), out.cpu()


def check_loss_grad(batch: Batch, in_place: bool = False) -> torch.Tensor:
    rows, out = run_loss_grad(batch, in_place)
    judge_loss_grad(batch, rows, out)
    return rows


def judge_loss_grad(batch: Batch, rows: torch.Tensor, out: torch.Tensor) -> None:
    truth, derivatives, sizes = program_rows(batch, torch.float64)
    fp32, derivatives32, _ = program_rows(batch, torch.float32)
    assert rows[:, batch.bad].isnan().all()
    assert torch.equal(
        rows[:, batch.ids == IGNORE_INDEX], torch.zeros_like(rows[:, batch.ids == IGNORE_INDEX])
    )
    usable = batch.usable
    for name, ours in zip(LOSS_ROWS, rows, strict=True):
        scale = sizes[name][usable] if name in sizes else None
        assert_values(ours[usable], fp32[name][usable], truth[name][usable], name, scale)
    derivatives, derivatives32 = (
        of_usable_rows(batch, derivatives),
        of_usable_rows(batch, derivatives32),
    )
    judge_gradient(
        batch,
        out,
        derivatives,
        batch.gradient(torch.float64, derivatives),
        batch.gradient(torch.float32, derivatives32),
    )
