"""Measures calls from hidden states. The head's three GEMMs with the loss between them
are compared to the bare GEMMs.

``linear`` is a clipped policy loss. ``linear ce`` is its special case for kernels that
only compute the mean cross entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import GATE_ROWS, ITEM, SAME_FUNCTION, spare
from .peers import import_or_absent, needs_gpu
from .providers import Job, Provider, serving


@dataclass(frozen=True)
class LinearCase:
    job: str
    rows: int
    hidden: int
    vocab: int
    dtype: str
    device: str
    zero_advantages: bool = False  # 40 % of the sequences have advantage 0

    @property
    def name(self) -> str:
        return (
            f"{self.job} {self.rows}x{self.hidden}x{self.vocab} "
            f"{self.dtype}{' 40% zero' if self.zero_advantages else ''}"
        )

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * ITEM[self.dtype]

    @property
    def gradient_bytes(self) -> int:
        return (self.rows + self.vocab) * self.hidden * ITEM[self.dtype]

    def least_flops(self) -> int:
        return 6 * self.rows * self.hidden * self.vocab

    def data(self) -> LinearData:
        return replace(
            _tensors(
                self.rows, self.hidden, self.vocab, self.dtype, self.device, self.zero_advantages
            ),
            case=self,
        )


CPU_SHAPES = ((256, 4096, 32000), (2048, 1024, 151936))
GPU_SHAPE = (8192, 4096, 151936)
TINY_SHAPE = (64, 32, 320)


def linear_cases(device: str, tiny: bool = False) -> list[LinearCase]:
    """Cases of a device; ``tiny`` gives the GPU's cases in a shape that only shows that
    everything runs.
    """
    if device == "cpu" and not tiny:
        return [
            LinearCase("linear", *shape, dtype, device, zero)
            for shape in CPU_SHAPES
            for dtype in ("bfloat16", "float32")
            for zero in (False, True)
        ]
    return [
        LinearCase(job, *(TINY_SHAPE if tiny else GPU_SHAPE), "bfloat16", device)
        for job in ("linear", "linear ce")
    ]


@dataclass
class LinearData:
    """Leaves ``hidden [B, T, D]`` and ``weight [V, D]`` that require grad, and ``lse
    [B, T]`` of the logits for checks.
    """

    case: LinearCase
    hidden: Tensor
    weight: Tensor
    ids: Tensor
    advantages: Tensor
    old: Tensor
    lse: Tensor
    spare: Tensor | None

    def restore(self) -> None:
        if self.spare is not None:
            self.spare.zero_()

    def row_loss(self, logps: Tensor) -> Tensor:
        """The case's loss from the log-probs of all rows, in their dtype."""
        if self.case.job == "linear ce":
            return -logps.mean()
        adv, old = (x.to(logps.dtype).view(logps.shape) for x in (self.advantages, self.old))
        ratio = torch.exp(logps - old)
        return -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()

    def limits(self) -> dict[str, Callable[[], Any]]:
        """The three GEMMs alone, for all rows at once: logits, and the gradients of
        hidden and weight.

        They return new memory, as every function that returns a gradient must (on a CPU
        its pages cost as much as a GEMM). The second limit writes into existing memory.
        """
        h, w = self.hidden.detach().flatten(0, 1), self.weight.detach()
        z, dh, dw = h.new_empty(h.size(0), w.size(0)), torch.empty_like(h), torch.empty_like(w)

        def gemms() -> tuple[Tensor, Tensor, Tensor]:
            z = torch.mm(h, w.t())
            return z, torch.mm(z, w), torch.mm(z.t(), h)

        def reused() -> None:
            torch.mm(h, w.t(), out=z)
            torch.mm(z, w, out=dh)
            torch.mm(z.t(), h, out=dw)

        return {"gemms": gemms, "gemms, reused output": reused}

    def error(self, exact: bool, value: Any, grads: tuple[Tensor, Tensor]) -> float:
        """Error of both gradients in a few rows with a gradient, divided by the allowed
        error.

        The rounding of 16-bit logits dominates it, so that all providers have the same
        bound.
        """
        got_h, got_w = (g.detach() for g in grads)
        h, w, ids = (
            self.hidden.detach().flatten(0, 1).double(),
            self.weight.detach(),
            self.ids.flatten(),
        )
        lse = self.lse.flatten().double()
        chosen = (h * w[ids].double()).sum(-1) - lse
        logps = chosen.requires_grad_()
        (d_logp,) = torch.autograd.grad(self.row_loss(logps), logps)

        def d_logits(z: Tensor, rows: Any, columns: Tensor) -> Tensor:
            p = torch.exp(z - lse[rows, None])
            return d_logp[rows, None] * ((ids[rows, None] == columns).double() - p)

        rows = d_logp.nonzero()[:GATE_ROWS, 0]
        columns = ids[rows].unique()
        of_h = torch.zeros(len(rows), h.size(1), dtype=torch.float64, device=h.device)
        every = torch.arange(w.size(0), device=h.device)
        for part in every.split(16384):
            block = w[part].double()
            of_h += d_logits(h[rows] @ block.t(), rows, part) @ block
        of_w = d_logits(h @ w[columns].double().t(), slice(None), columns).t() @ h
        pairs = ((got_h.flatten(0, -2)[rows], of_h), (got_w[columns], of_w))
        return max(
            float((got.double() - truth).norm() / truth.norm() / SAME_FUNCTION)
            for got, truth in pairs
        )


@lru_cache(maxsize=1)
def _tensors(
    rows: int, hidden: int, vocab: int, dtype: str, device: str, zero_advantages: bool
) -> LinearData:
    g = torch.Generator(device).manual_seed(0)
    t = min(rows, 1024) if device == "cuda" else rows // 32
    shape = (rows // t, t)
    h = torch.randn(*shape, hidden, generator=g, device=device).to(getattr(torch, dtype))
    w = (torch.randn(vocab, hidden, generator=g, device=device) * (3 / hidden**0.5)).to(h.dtype)
    ids = torch.randint(0, vocab, shape, generator=g, device=device)
    lse = torch.stack([torch.logsumexp((x @ w.t()).float(), -1) for x in h])
    logp = (h.float() * w[ids].float()).sum(-1) - lse
    # 5 % of the ratios are beyond a bound, which clips half of them. They are too few
    # for dropping their rows; otherwise all rows would not mean all.
    old = logp + 0.1 * torch.randn(shape, generator=g, device=device)
    advantages = torch.randn(shape[0], 1, generator=g, device=device).expand(shape).contiguous()
    # scattered over all chunks: a chunk with only such rows would cost nothing
    if zero_advantages:
        advantages[
            torch.randperm(shape[0], generator=g, device=device)[: round(0.4 * shape[0])]
        ] = 0
    case = LinearCase("linear", rows, hidden, vocab, dtype, device)
    return LinearData(
        case, h.requires_grad_(), w.requires_grad_(), ids, advantages, old, lse, spare(device)
    )


# ---- providers


def job_of(data: LinearData, loss: Callable[[], Tensor]) -> Job:
    def job() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        value = loss()
        return value.detach(), torch.autograd.grad(value, (data.hidden, data.weight))

    return job


def _eager(data: LinearData) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        logp_all = torch.log_softmax(F.linear(data.hidden, data.weight).float(), -1)
        return data.row_loss(logp_all.gather(-1, data.ids.unsqueeze(-1)).squeeze(-1))

    return loss


def eager(data: LinearData) -> Job:
    return job_of(data, _eager(data))


def compiled(data: LinearData) -> Job:
    torch._dynamo.reset()
    return job_of(data, torch.compile(_eager(data), dynamic=False))


def _call(data: LinearData) -> dict[str, Any]:
    """Keywords of the case's loss in this package."""
    import reweight_ops as rw
    from reweight_ops.rules.surrogates import Reinforce

    if data.case.job == "linear ce":
        return dict(
            spec=rw.PolicyLossSpec(surrogate=Reinforce()),
            advantages=torch.ones_like(data.advantages),
        )
    return dict(spec=rw.methods.ppo(0.2), advantages=data.advantages, old_per_token_logps=data.old)


def materialised(data: LinearData) -> Job:
    """All logits at once, and this package's loss in place on them."""
    import reweight_ops as rw

    call = _call(data)
    return job_of(
        data,
        lambda: (
            rw.policy_loss(
                F.linear(data.hidden, data.weight), data.ids, consume_logits=True, **call
            ).loss
        ),
    )


def ours(backend: str, plan: str, chunk_rows: int | None = None) -> Callable[[LinearData], Job]:
    def make(data: LinearData) -> Job:
        import reweight_ops as rw

        serving(backend, data.hidden)
        call = dict(plan=plan, backend=backend, chunk_rows=chunk_rows, **_call(data))
        return job_of(
            data, lambda: rw.linear_policy_loss(data.hidden, data.weight, data.ids, **call).loss
        )

    return make


def trl(data: LinearData) -> Job:
    function = import_or_absent("trl.kernels", "ChunkedLogProbFunction")
    chunk = import_or_absent("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")

    def loss() -> Tensor:
        logps = function.apply(
            data.hidden.flatten(0, 1),
            data.weight,
            None,
            data.ids.flatten(),
            1.0,
            chunk,
            None,
            1.0,
            (),
        )[0]
        return data.row_loss(logps)

    return job_of(data, loss)


def liger(data: LinearData) -> Job:
    module = import_or_absent("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    options = {
        "beta": 0.0,
        "use_ref_model": False,
        "loss_type": "bnpo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "temperature": 1.0,
    }
    # its chunks are whole sequences: as many as give 256 rows
    if not data.hidden.is_cuda:
        options |= {"compiled": False, "chunk_size": max(256 // data.ids.size(1), 1)}
    of = module(**options)
    mask, advantages = torch.ones_like(data.ids), data.advantages[:, 0].contiguous()
    return job_of(
        data,
        lambda: of(
            data.hidden, data.weight, data.ids, mask, advantages, old_per_token_logps=data.old
        )[0],
    )


def cce(data: LinearData) -> Job:
    of = import_or_absent("cut_cross_entropy", "linear_cross_entropy")
    needs_gpu(data.hidden)
    return job_of(
        data, lambda: data.row_loss(-of(data.hidden, data.weight, data.ids, reduction="none"))
    )


def quack(data: LinearData) -> Job:
    of = import_or_absent("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    needs_gpu(data.hidden)
    return job_of(
        data,
        lambda: of(data.hidden.flatten(0, 1), data.weight, data.ids.flatten(), reduction="mean"),
    )


def linear_providers(backends: tuple[str, ...], chunk_rows: tuple[int, ...] = ()) -> list[Provider]:
    """Baselines, and this package: with chunks of its own choice, and of ``chunk_rows``
    rows.
    """
    both = ("linear", "linear ce")
    found = [
        Provider("F.linear, then policy_loss", materialised, both),
        Provider("eager", eager, both),
        Provider("torch.compile", compiled, both),
        Provider("TRL chunked", trl, both),
        Provider("Liger chunked GRPO", liger, ("linear",)),
        Provider("CCE", cce, both),
        Provider("QuACK linear CE", quack, ("linear ce",)),
    ]
    for b in backends:
        found += [
            Provider(f"{b} {plan}", ours(b, plan), both, ours=True)
            for plan in ("one_pass", "two_pass")
        ]
        found += [
            Provider(f"{b} chunks of {n}", ours(b, "one_pass", n), both, ours=True)
            for n in chunk_rows
        ]
    return found
