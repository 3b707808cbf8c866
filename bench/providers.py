"""Who is measured. A provider turns a case's data into a function that does the job once and returns ``(loss or log-probs, gradient or None)``.

Logits are what a model's head would hand over: not a leaf, owned by nobody else, their gradient caught where the head would receive it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import ENTROPY_COEF, Case, Data

Job = Callable[[], tuple[Tensor, Tensor | None]]


class Absent(Exception):
    """This provider cannot run the case here; the message says why."""


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[Data], Job]
    jobs: tuple[str, ...] = ("loss", "logps")
    in_place: bool = False
    ours: bool = False
    exact: bool = False  # held to the package's accuracy criterion; others only have to compute the same function

    def serves(self, case: Case) -> bool:
        return case.job in self.jobs


class _Head(torch.autograd.Function):
    """Stands for the model below the logits."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, data: Data, caught: list[Tensor | None]) -> Tensor:
        ctx.caught = caught
        z = data.logits
        # The same memory, but for autograd a tensor of its own, as a head's output is: a view of something must not be overwritten.
        return torch.empty(0, dtype=z.dtype, device=z.device).set_(z.untyped_storage(), z.storage_offset(), z.shape, z.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.caught.append(grad)
        return None, None, None


def _through_autograd(data: Data, loss: Callable[[Tensor], Tensor]) -> Job:
    anchor = torch.zeros((), requires_grad=True, device=data.logits.device)

    def job() -> tuple[Tensor, Tensor | None]:
        caught: list[Tensor | None] = []
        value = loss(_Head.apply(anchor, data, caught))
        value.backward()
        return value.detach(), caught[0]

    return job


def _without_grad(data: Data, logps: Callable[[Tensor], Tensor]) -> Job:
    @torch.no_grad()
    def job() -> tuple[Tensor, Tensor | None]:
        return logps(data.logits), None

    return job


def _eager_loss(data: Data) -> Callable[[Tensor], Tensor]:
    from reweight_ops.testing import eager_policy_loss

    coef = ENTROPY_COEF if data.case.entropy else 0.0
    return lambda z: eager_policy_loss(z, data.ids, data.advantages, old_per_token_logps=data.old, entropy_coef=coef)


def _eager_logps(data: Data) -> Callable[[Tensor], Tensor]:
    return lambda z: torch.log_softmax(z.float(), -1).gather(-1, data.ids.unsqueeze(-1)).squeeze(-1)


def eager(data: Data) -> Job:
    return _through_autograd(data, _eager_loss(data)) if data.case.job == "loss" else _without_grad(data, _eager_logps(data))


def compiled(data: Data) -> Job:
    torch._dynamo.reset()
    if data.case.job == "loss":
        return _through_autograd(data, torch.compile(_eager_loss(data), dynamic=False))
    return _without_grad(data, torch.compile(_eager_logps(data), dynamic=False))


def trl(data: Data) -> Job:
    try:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax
    except ImportError as error:
        raise Absent(f"TRL is not installed ({error})") from error

    def loss(z: Tensor) -> Tensor:
        logps = selective_log_softmax(z, data.ids)
        ratio = torch.exp(logps - data.old)
        value = -torch.min(ratio * data.advantages, ratio.clamp(0.8, 1.2) * data.advantages)
        if data.case.entropy:
            value = value - ENTROPY_COEF * entropy_from_logits(z)
        return value.mean()

    return _through_autograd(data, loss) if data.case.job == "loss" else _without_grad(data, lambda z: selective_log_softmax(z, data.ids))


def chunked(data: Data, rows: int = 8) -> Job:
    """Eager PyTorch that never holds more than a few rows in fp32, writing each chunk's gradient into the whole."""
    from reweight_ops.testing import eager_policy_loss

    flat = [x.flatten(0, 1) for x in (data.logits, data.ids, data.advantages, data.old)]
    coef, total = ENTROPY_COEF if data.case.entropy else 0.0, data.case.rows

    def loss_job() -> tuple[Tensor, Tensor | None]:
        grad, value = torch.empty_like(flat[0]), torch.zeros((), device=flat[0].device)
        for i in range(0, total, rows):
            z, ids, adv, old = (x[i : i + rows] for x in flat)
            leaf = z.detach().requires_grad_()
            part = eager_policy_loss(leaf, ids, adv, old_per_token_logps=old, entropy_coef=coef) * (len(ids) / total)
            (grad[i : i + rows],) = torch.autograd.grad(part, leaf)
            value += part.detach()
        return value, grad.view_as(data.logits)

    @torch.no_grad()
    def logps_job() -> tuple[Tensor, Tensor | None]:
        parts = [
            torch.log_softmax(flat[0][i : i + rows].float(), -1).gather(-1, flat[1][i : i + rows, None])[:, 0]
            for i in range(0, total, rows)
        ]
        return torch.cat(parts).view(data.ids.shape), None

    return loss_job if data.case.job == "loss" else logps_job


def _spec(data: Data) -> Any:
    import reweight_ops as rw

    return rw.methods.ppo(0.2, entropy_coef=ENTROPY_COEF if data.case.entropy else 0.0)


def _public(backend: str, consume: bool, plan: str = "one_pass") -> Callable[[Data], Job]:
    """rw.policy_loss and rw.token_logps, as a trainer calls them."""

    def make(data: Data) -> Job:
        import reweight_ops as rw
        from reweight_ops.backends.base import Request
        from reweight_ops.backends.select import why_not

        reason = why_not(backend, Request("token_stats", data.logits.device, data.logits.dtype))
        if reason is not None:
            raise Absent(reason)
        if data.case.job == "logps":
            return _without_grad(data, lambda z: rw.token_logps(z, data.ids, backend=backend))
        spec = _spec(data)
        return _through_autograd(
            data,
            lambda z: rw.policy_loss(
                z, data.ids, data.advantages, spec=spec, old_per_token_logps=data.old, consume_logits=consume, plan=plan, backend=backend
            ).loss,
        )  # fmt: skip

    return make


def _verbs(backend: str, in_place: bool) -> Callable[[Data], Job]:
    """The kernels alone, without autograd, metrics or allocation of the result."""

    def make(data: Data) -> Job:
        from reweight_ops import kernels
        from reweight_ops.backends.base import Request, RowInputs
        from reweight_ops.backends.select import why_not

        reason = why_not(backend, Request("token_stats", data.logits.device, data.logits.dtype))
        if reason is not None:
            raise Absent(reason)
        z, ids, one = data.logits, data.ids.flatten(), torch.ones(1, device=data.logits.device)
        if data.case.job == "logps":
            return lambda: (kernels.token_stats(z, ids, one, stats=("logp",), backend=backend)[0].view(data.ids.shape), None)
        program = _spec(data).program
        coefs = [-20.0, 20.0, 1.0, 0.2, 0.2, float("inf"), *([ENTROPY_COEF] if data.case.entropy else [])]
        params = torch.tensor(coefs, device=z.device)
        weights = torch.full((1, data.case.rows), 1 / data.case.rows, device=z.device).expand(len(program.terms), -1)
        inputs = RowInputs(weights, data.old.flatten(), data.advantages.flatten())
        out = z if in_place else torch.zeros_like(z)

        def job() -> tuple[Tensor, Tensor | None]:
            rows, grad = kernels.token_loss_grad(z, ids, one, inputs, program, params, out=out, backend=backend)
            return rows[2].sum(), grad

        return job

    return make


def providers(backends: tuple[str, ...]) -> list[Provider]:
    """Baselines first, then each of our backends: through the public API (in place, and as a drop-in that makes a new gradient), and the kernels alone."""
    found = [
        Provider("eager", eager),
        Provider("TRL", trl),
        Provider("torch.compile", compiled),
        Provider("chunked eager", chunked),
    ]
    for b in backends:
        found += [
            Provider(f"{b} drop-in", _public(b, consume=False), ours=True, exact=True),
            Provider(f"{b} drop-in two_pass", _public(b, consume=False, plan="two_pass"), jobs=("loss",), ours=True, exact=True),
            Provider(f"{b} in place", _public(b, consume=True), jobs=("loss",), in_place=True, ours=True, exact=True),
            Provider(f"{b} kernel, reused output", _verbs(b, in_place=False), jobs=("loss",), ours=True, exact=True),
            Provider(f"{b} kernel in place", _verbs(b, in_place=True), jobs=("loss",), in_place=True, ours=True, exact=True),
            Provider(f"{b} kernel", _verbs(b, in_place=False), jobs=("logps",), ours=True, exact=True),
        ]
    return found
