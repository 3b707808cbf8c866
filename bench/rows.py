"""Other jobs on rows, with gradients. They are log-probs of several ids, kept sets, and
statistics from hidden states.

``picked`` is log-probs of the row's id, of 8 given ids and of the 20 likeliest, for an
upstream gradient per row. ``kept`` is the clipped policy loss over 64 kept ids per row.
``linear stats`` is log-probs and entropies from hidden states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reweight_ops.testing import ERROR_FLOOR

from . import cases as of_logits
from . import linear
from .cases import GATE_ROWS, SAME_FUNCTION, Case, Data, _share
from .linear import LinearCase, LinearData, job_of
from .providers import Job, Provider, serving, through_autograd

GIVEN, TOP, KEPT = 8, 20, 64
LINEAR = "linear stats"
JOBS = ("picked", "kept", LINEAR)


@dataclass(frozen=True)
class RowsCase(Case):
    """A case from logits."""

    def least_bytes(self) -> int:
        """Least number of bytes to move.

        ``picked`` reads the logits twice and writes their gradient once. ``kept``
        writes the gradient, which is 0 nearly everywhere.
        """
        return self.logits_bytes * {"picked": 3, "kept": 1}[self.job]

    def data(self) -> RowsData:
        base = of_logits._tensors(self.rows, self.vocab, self.dtype, self.device)
        return RowsData(**{**_fields(base), "case": self})


@dataclass(frozen=True)
class StatsCase(LinearCase):
    """A case from hidden states."""

    def data(self) -> StatsData:
        base = linear._tensors(self.rows, self.hidden, self.vocab, self.dtype, self.device, False)
        return StatsData(**{**_fields(base), "case": self})


def _fields(x: Any) -> dict[str, Any]:
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}


def rows_cases(device: str, tiny: bool = False) -> list[Case | LinearCase]:
    on_cpu = device == "cpu" and not tiny
    shape, head = (
        ((64, 320), linear.TINY_SHAPE)
        if tiny
        else ((256, 32000), (256, 1024, 32000))
        if on_cpu
        else ((8192, 151936), linear.GPU_SHAPE)
    )
    dtypes = ("float32", "bfloat16") if on_cpu else ("bfloat16",)
    found: list[Case | LinearCase] = [
        RowsCase(job, *shape, dtype, device=device) for dtype in dtypes for job in JOBS[:2]
    ]
    return [*found, *(StatsCase(LINEAR, *head, dtype, device) for dtype in dtypes)]


@dataclass(kw_only=True)
class RowsData(Data):
    """Logits, and the picked or kept ids of each row. The row's own id comes first."""

    def listed(self, count: int) -> Tensor:
        """Distinct ids ``[B, T, count]``."""
        vocab = self.case.vocab
        steps = torch.arange(count, device=self.ids.device) * (vocab // count)
        return (self.ids[..., None] + steps) % vocab

    def of(self, log_p: Tensor) -> Tensor:
        """The loss of a run from log-probs of the whole vocabulary or of the kept ids,
        in a row's own dtype.
        """
        if self.case.job == "kept":
            return self.clipped(log_p[..., 0])
        own, given = (log_p.gather(-1, ids) for ids in (self.ids[..., None], self.listed(GIVEN)))
        return self.upstream(own[..., 0], given, log_p.topk(TOP).values)

    def clipped(self, logps: Tensor) -> Tensor:
        adv, old = (x.to(logps.dtype) for x in (self.advantages, self.old))
        ratio = torch.exp(logps - old)
        return -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()

    def upstream(self, own: Tensor, given: Tensor, top: Tensor) -> Tensor:
        return (self.advantages.to(own.dtype) * (own + given.mean(-1) + 0.5 * top.mean(-1))).mean()

    def error(self, exact: bool, value: Any, grad: Tensor | None) -> float:
        """Error of a gradient in the first rows, divided by the allowed error."""
        assert grad is not None
        truth, single = (self._by_logits(d) for d in (torch.float64, torch.float32))
        size = 3 * self.advantages.flatten()[:GATE_ROWS, None].abs() / self.case.rows
        found, single = grad.detach().flatten(0, -2)[:GATE_ROWS], single.to(grad.dtype)
        if self.case.job == "picked":
            found, truth, single = (x.masked_fill(self._tied(), 0) for x in (found, truth, single))
        return _share(exact, found, truth, single, ERROR_FLOOR * size)

    def _tied(self) -> Tensor:
        """Return the columns as likely as the last of the likeliest ids, in the first
        rows. A provider is free to choose among them.
        """
        z = self.pristine.flatten(0, 1)[:GATE_ROWS]
        return z == z.topk(TOP).values[:, -1:]

    def _by_logits(self, dtype: torch.dtype) -> Tensor:
        rows = {
            name: getattr(self, name).flatten()[:GATE_ROWS] for name in ("ids", "advantages", "old")
        }
        few = dataclasses.replace(self, **rows)
        z = self.pristine.flatten(0, 1)[:GATE_ROWS].to(dtype).requires_grad_()
        x = z.gather(-1, few.listed(KEPT)) if self.case.job == "kept" else z
        (grad,) = torch.autograd.grad(
            few.of(torch.log_softmax(x, -1)) * len(few.ids) / self.case.rows, z
        )
        return grad


@dataclass
class StatsData(LinearData):
    """The hidden states of a linear case, for log-probs and entropies."""

    def total(self, logps: Tensor, entropies: Tensor) -> Tensor:
        return (self.advantages.to(logps.dtype) * logps + 0.1 * entropies).mean()

    def error(self, exact: bool, value: Any, grads: tuple[Tensor, Tensor]) -> float:
        """Error of the gradient by a few hidden states. The rounding of 16-bit logits
        dominates it.
        """
        h = self.hidden.detach().flatten(0, 1)[:GATE_ROWS].double().requires_grad_()
        few = dataclasses.replace(
            self,
            ids=self.ids.flatten()[:GATE_ROWS],
            advantages=self.advantages.flatten()[:GATE_ROWS],
        )
        total = (
            few.total(*eager_statistics(h @ self.weight.detach().double().t(), few.ids))
            * len(h)
            / self.case.rows
        )
        (truth,) = torch.autograd.grad(total, h)
        return float(
            (grads[0].flatten(0, -2)[:GATE_ROWS].double() - truth).norm()
            / truth.norm()
            / SAME_FUNCTION
        )


# ---- providers


def eager_statistics(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(z, -1)
    return log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def eager(data: Any) -> Job:
    """Eager PyTorch. For ``kept`` it sets the other logits to ``-inf``, as usual code
    does.
    """
    if isinstance(data, StatsData):
        return job_of(
            data,
            lambda: data.total(
                *eager_statistics(F.linear(data.hidden, data.weight).float(), data.ids)
            ),
        )
    if data.case.job == "picked":
        return through_autograd(data, lambda z: data.of(torch.log_softmax(z.float(), -1)))
    out = torch.ones(data.logits.shape, dtype=torch.bool, device=data.logits.device).scatter_(
        -1, data.listed(KEPT), False
    )

    def loss(z: Tensor) -> Tensor:
        return data.clipped(
            torch.log_softmax(z.float().masked_fill(out, -torch.inf), -1).gather(
                -1, data.ids[..., None]
            )[..., 0]
        )

    return through_autograd(data, loss)


def gathered(data: RowsData) -> Job:
    """Only the kept logits are read. Every row keeps the same number."""
    kept = data.listed(KEPT)
    return through_autograd(
        data, lambda z: data.of(torch.log_softmax(z.gather(-1, kept).float(), -1))
    )


def ours(backend: str, plan: str) -> Callable[[Any], Job]:
    def make(data: Any) -> Job:
        import reweight_ops as rw

        serving(backend, data.hidden if isinstance(data, StatsData) else data.logits)
        if isinstance(data, StatsData):

            def statistics() -> Tensor:
                found = rw.linear_token_stats(data.hidden, data.weight, data.ids, backend=backend)
                return data.total(found.logps, found.entropies)

            return job_of(data, statistics)
        if data.case.job == "picked":
            asked = dict(
                stats=("logps", "selected_logps", "topk_logps"),
                selected_ids=data.listed(GIVEN),
                top_k=TOP,
                backend=backend,
            )

            def picked(z: Tensor) -> Tensor:
                found = rw.token_stats(z, data.ids, **asked)
                return data.upstream(found.logps, found.selected_logps, found.topk_logps)

            return through_autograd(data, picked)
        ids, rows = data.listed(KEPT).int(), data.ids.numel()
        kept = rw.SamplingMask(ids.flatten(), torch.arange(rows + 1, device=ids.device) * KEPT)
        call = dict(
            old_per_token_logps=data.old,
            sampling_mask=kept,
            spec=rw.methods.ppo(0.2),
            plan=plan,
            backend=backend,
        )
        return through_autograd(
            data, lambda z: rw.policy_loss(z, data.ids, data.advantages, **call).loss
        )

    return make


def rows_providers(backends: tuple[str, ...]) -> list[Provider]:
    found = [Provider("eager", eager, JOBS), Provider("eager, gathered", gathered, ("kept",))]
    for b in backends:
        found.append(
            Provider(f"{b} one_pass", ours(b, "one_pass"), ("kept",), ours=True, exact=True)
        )
        found.append(
            Provider(f"{b} two_pass", ours(b, "two_pass"), JOBS[:2], ours=True, exact=True)
        )
        found.append(Provider(f"{b} chunked", ours(b, "two_pass"), (LINEAR,), ours=True))
    return found
