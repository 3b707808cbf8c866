"""Providers: the implementations that are measured.

A provider turns a case's data into a function that does the job once and returns
``(values, gradient or None)``. Logits are like those of a model's head: they are not a
leaf, nothing else owns them, and their gradient is caught where the head would receive
it. This module has the baselines and this package's ops. :mod:`.peers` has the kernels
of other projects, and :mod:`.linear` everything that starts from hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import ENTROPY_COEF, Data

Job = Callable[[], tuple[Any, Any]]
#: Most providers have this form: logits to log-probs and entropies (None if not
#: requested).
Statistics = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Absent(Exception):
    """The provider cannot run the case; the message says why."""


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[Any], Job]
    jobs: tuple[str, ...] = ("loss", "logps", "logps+grad")
    in_place: bool = False
    ours: bool = False
    # must meet the package's accuracy criterion; others must only compute the same
    # function
    exact: bool = False

    def serves(self, case: Any) -> bool:
        return case.job in self.jobs


class _Head(torch.autograd.Function):
    """Stand-in for the model below the logits."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, data: Data, caught: list[Tensor | None]) -> Tensor:
        ctx.caught = caught
        z = data.logits
        # This is the same memory, but a separate tensor for autograd, like a head's
        # output: a view must not be overwritten.
        return torch.empty(0, dtype=z.dtype, device=z.device).set_(
            z.untyped_storage(), z.storage_offset(), z.shape, z.stride()
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.caught.append(grad)
        return None, None, None


def through_autograd(data: Data, loss: Callable[[Tensor], Tensor]) -> Job:
    anchor = torch.zeros((), requires_grad=True, device=data.logits.device)

    def job() -> tuple[Tensor, Tensor | None]:
        caught: list[Tensor | None] = []
        value = loss(_Head.apply(anchor, data, caught))
        value.backward()
        return value.detach(), caught[0]

    return job


def from_statistics(
    statistics: Callable[[Data], Statistics], compiled: bool = False
) -> Callable[[Data], Job]:
    """Make a provider from its log-probs and entropies; the loss on them is torch on
    ``[N]``.
    """

    def make(data: Data) -> Job:
        of = statistics(data)
        if data.case.job == "logps":
            values = torch.compile(of, dynamic=False) if compiled else of

            @torch.no_grad()
            def job() -> tuple[tuple[Tensor, ...], None]:
                return tuple(x for x in values(data.logits) if x is not None), None

            return job
        loss = lambda z: data.row_loss(*of(z))  # noqa: E731
        return through_autograd(data, torch.compile(loss, dynamic=False) if compiled else loss)

    return make


def _eager(data: Data) -> Statistics:
    def of(z: Tensor) -> tuple[Tensor, Tensor | None]:
        logp_all = torch.log_softmax(z.float(), -1)
        logps = logp_all.gather(-1, data.ids.unsqueeze(-1)).squeeze(-1)
        return logps, -(logp_all.exp() * logp_all).sum(-1) if data.case.entropy else None

    return of


def _eager_loss(data: Data) -> Callable[[Tensor], Tensor]:
    from reweight_ops.testing import eager_policy_loss

    coef = ENTROPY_COEF if data.case.entropy else 0.0
    return lambda z: eager_policy_loss(
        z, data.ids, data.advantages, old_per_token_logps=data.old, entropy_coef=coef
    )


def eager(data: Data) -> Job:
    return (
        through_autograd(data, _eager_loss(data))
        if data.case.job == "loss"
        else from_statistics(_eager)(data)
    )


def compiled(data: Data) -> Job:
    torch._dynamo.reset()
    if data.case.job == "loss":
        return through_autograd(data, torch.compile(_eager_loss(data), dynamic=False))
    return from_statistics(_eager, compiled=True)(data)


def trl(data: Data) -> Statistics:
    try:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax
    except ImportError as error:
        raise Absent(f"TRL is not installed ({error})") from error

    return lambda z: (
        selective_log_softmax(z, data.ids),
        entropy_from_logits(z) if data.case.entropy else None,
    )


def chunked(data: Data) -> Job:
    """Eager PyTorch with only a few rows in fp32; it writes each chunk's gradient into
    the whole tensor.
    """
    from reweight_ops.testing import eager_policy_loss

    rows = 1024 if data.logits.is_cuda else 8
    flat = [x.flatten(0, 1) for x in (data.logits, data.ids, data.advantages, data.old)]
    coef, total = ENTROPY_COEF if data.case.entropy else 0.0, data.case.rows

    def loss_job() -> tuple[Tensor, Tensor | None]:
        grad, value = torch.empty_like(flat[0]), torch.zeros((), device=flat[0].device)
        for i in range(0, total, rows):
            z, ids, adv, old = (x[i : i + rows] for x in flat)
            leaf = z.detach().requires_grad_()
            part = eager_policy_loss(leaf, ids, adv, old_per_token_logps=old, entropy_coef=coef) * (
                len(ids) / total
            )
            (grad[i : i + rows],) = torch.autograd.grad(part, leaf)
            value += part.detach()
        return value, grad.view_as(data.logits)

    @torch.no_grad()
    def logps_job() -> tuple[tuple[Tensor, ...], None]:
        parts = []
        for i in range(0, total, rows):
            logp_all = torch.log_softmax(flat[0][i : i + rows].float(), -1)
            entropy = (-(logp_all.exp() * logp_all).sum(-1),) if data.case.entropy else ()
            parts.append((logp_all.gather(-1, flat[1][i : i + rows, None])[:, 0], *entropy))
        return tuple(torch.cat(x).view(data.ids.shape) for x in zip(*parts, strict=True)), None

    return loss_job if data.case.job == "loss" else logps_job


def serving(backend: str, input: Tensor) -> None:
    from reweight_ops._core.backends.base import Request
    from reweight_ops._core.backends.select import unsupported_reason

    reason = unsupported_reason(backend, Request("token_stats", input.device, input.dtype))
    if reason is not None:
        raise Absent(reason)


def _spec(data: Data) -> Any:
    import reweight_ops as rw

    return rw.methods.ppo(0.2, entropy_coef=ENTROPY_COEF if data.case.entropy else 0.0)


def _public(backend: str, consume: bool, plan: str = "one_pass") -> Callable[[Data], Job]:
    """rw.policy_loss and rw.token_logps, as a trainer calls them."""

    def logps(data: Data) -> Statistics:
        import reweight_ops as rw

        options = dict(backend=backend, consume_logits=consume)
        if data.case.entropy:
            return lambda z: rw.token_logps(z, data.ids, return_entropy=True, **options)
        return lambda z: (rw.token_logps(z, data.ids, **options), None)

    def make(data: Data) -> Job:
        import reweight_ops as rw

        serving(backend, data.logits)
        if data.case.job != "loss":
            return from_statistics(logps)(data)
        options = dict(spec=_spec(data), consume_logits=consume, plan=plan, backend=backend)
        return through_autograd(
            data,
            lambda z: (
                rw.policy_loss(
                    z, data.ids, data.advantages, old_per_token_logps=data.old, **options
                ).loss
            ),
        )

    return make


def _primitives(backend: str, in_place: bool) -> Callable[[Data], Job]:
    """The kernels alone, without autograd, metrics or allocation of the result."""

    def make(data: Data) -> Job:
        from reweight_ops import kernels
        from reweight_ops._core.backends.base import RowInputs

        serving(backend, data.logits)
        z, ids, one = data.logits, data.ids.flatten(), torch.ones(1, device=data.logits.device)
        names = ("logp", "entropy") if data.case.entropy else ("logp",)
        if data.case.job == "logps":
            return lambda: (
                tuple(kernels.token_stats(z, ids, one, stats=names, backend=backend).unbind()),
                None,
            )
        out = z if in_place else torch.zeros_like(z)
        if data.case.job == "grad":
            known = ("logp", "lse", "lse_low", *names[1:])
            stats = dict(
                zip(
                    known,
                    kernels.token_stats(
                        data.pristine, ids, one, stats=known, backend=backend
                    ).clone(),
                    strict=True,
                )
            )
            by = {"logp": data.advantages.flatten() / -data.case.rows}
            if data.case.entropy:
                by["entropy"] = torch.full_like(by["logp"], -ENTROPY_COEF / data.case.rows)
            return lambda: (
                None,
                kernels.token_grad(z, ids, one, stats, by, out=out, backend=backend),
            )
        program = _spec(data).program
        numbers = [
            -20.0,
            20.0,
            1.0,
            0.2,
            0.2,
            float("inf"),
            *([ENTROPY_COEF] if data.case.entropy else []),
        ]
        params = torch.tensor(numbers, device=z.device)
        weights = torch.full((1, data.case.rows), 1 / data.case.rows, device=z.device).expand(
            len(program.terms), -1
        )
        inputs = RowInputs(weights, data.old.flatten(), data.advantages.flatten())

        def job() -> tuple[Tensor, Tensor | None]:
            rows, grad = kernels.token_loss_grad(
                z, ids, one, inputs, program, params, out=out, backend=backend
            )
            return rows[2].sum(), grad

        return job

    return make


def baselines() -> list[Provider]:
    return [
        Provider("eager", eager),
        Provider("TRL", from_statistics(trl)),
        Provider("torch.compile", compiled),
        Provider("chunked eager", chunked, jobs=("loss", "logps")),
    ]


def ours(backend: str) -> list[Provider]:
    """Providers of one backend: the public API (in place, and with a new gradient), and
    the kernels alone.
    """

    def provider(
        name: str, make: Callable[[Data], Job], *jobs: str, in_place: bool = False
    ) -> Provider:
        return Provider(f"{backend} {name}", make, jobs, in_place, ours=True, exact=True)

    return [
        provider("drop-in", _public(backend, consume=False), "loss", "logps", "logps+grad"),
        provider("drop-in two_pass", _public(backend, consume=False, plan="two_pass"), "loss"),
        provider("in place", _public(backend, consume=True), "loss", "logps+grad", in_place=True),
        provider("kernel, reused output", _primitives(backend, in_place=False), "loss", "grad"),
        provider(
            "kernel in place", _primitives(backend, in_place=True), "loss", "grad", in_place=True
        ),
        provider("kernel", _primitives(backend, in_place=False), "logps"),
    ]


def providers(backends: tuple[str, ...]) -> list[Provider]:
    """All providers: baselines, then kernels of other projects, then each backend of
    this package.
    """
    from .peers import peers

    return [*baselines(), *peers(), *(p for b in backends for p in ours(b))]
