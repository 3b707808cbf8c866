"""Cases: shapes, dtypes and jobs, and the checks of their results.

``loss`` is a clipped policy loss and its gradient by the logits. ``logps`` is log-probs
alone. ``logps+grad`` is log-probs and their gradient for an upstream gradient per row,
the cost of a two-pass loss. ``grad`` is that gradient alone, with known statistics.
With ``entropy`` the loss has an entropy bonus with its gradient, and log-probs come
with entropies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from reweight_ops import _C
from reweight_ops._core.calls.consumed import forget
from reweight_ops.testing import ERROR_FLOOR, ERROR_RATIO

from .device import FLUSH_BYTES, GPU_SHAPES

ENTROPY_COEF = 0.01
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Allowed error of a baseline. It may compute in 16 bits: the check only shows that the
#: function is the same.
SAME_FUNCTION = 0.05
GATE_ROWS = 16


@dataclass(frozen=True)
class Case:
    job: str
    rows: int
    vocab: int
    dtype: str
    entropy: bool = False
    device: str = "cpu"

    @property
    def name(self) -> str:
        return (
            f"{self.job} {self.rows}x{self.vocab} {self.dtype}{' +entropy' if self.entropy else ''}"
        )

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * ITEM[self.dtype]

    def least_bytes(self) -> int:
        """Least number of bytes to move.

        They are the logits read once and their gradient written once. The logits are
        read once more if the loss is known only later.
        """
        return self.logits_bytes * {"logps": 1, "loss": 2, "grad": 2, "logps+grad": 3}[self.job]

    def data(self) -> Data:
        return replace(_tensors(self.rows, self.vocab, self.dtype, self.device), case=self)


CPU_SHAPES = ((256, 32000), (128, 151936), (512, 151936))


def cases(device: str = "cpu", tiny: bool = False) -> list[Case]:
    """All cases of a kind of device.

    ``tiny`` gives the GPU's cases in shapes that only show that everything runs.
    """
    if device == "cpu" and not tiny:
        return [
            Case(job, rows, vocab, dtype, entropy, device)
            for rows, vocab in CPU_SHAPES
            for dtype in ITEM
            for job, entropy in (("loss", False), ("loss", True), ("logps", False))
        ]
    return [
        Case(job, rows, vocab, dtype, entropy, device)
        for dtype in ("bfloat16", "float32")
        for rows, vocab in (((64, 320),) if tiny else GPU_SHAPES)
        for job in ("loss", "logps", "logps+grad", "grad")
        for entropy in (False, True)
    ]


@dataclass(kw_only=True)
class Scratch:
    """Logits [B, T, V] that a job may overwrite.

    ``restore`` fills them again and leaves nothing of them in a cache (the code stays
    warm).
    """

    logits: Tensor
    pristine: Tensor
    spare: Tensor | None = None

    def restore(self) -> None:
        self.logits.copy_(self.pristine)
        forget(self.logits)
        if self.spare is not None:
            self.spare.zero_()
        else:
            for t in (self.logits, self.pristine):
                _C.stream("flush", t.data_ptr(), 0, t.nbytes // 4, torch.get_num_threads())

    def limits(self) -> dict[str, Callable[[], Any]]:
        """Speeds of the memory: read the logits once, update them in place, copy them.

        The clock of the providers measures them too.
        """
        z, other = self.logits, self.pristine
        if z.is_cuda:
            return {
                "read": lambda: z.view(torch.int32).max(),
                "update": lambda: z.neg_(),
                "copy": lambda: z.copy_(other),
            }
        n, threads = z.nbytes // 4, torch.get_num_threads()
        one = {
            kind: (lambda kind=kind: _C.stream(kind, z.data_ptr(), other.data_ptr(), n, threads))
            for kind in ("read", "update")
        }
        return one | {"copy": lambda: _C.stream("copy", other.data_ptr(), z.data_ptr(), n, threads)}


def spare(device: str) -> Tensor | None:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None


@dataclass(kw_only=True)
class Data(Scratch):
    """The tensors of one case."""

    case: Case
    ids: Tensor
    advantages: Tensor  # one per sequence, repeated at each of its tokens
    old: Tensor

    def row_loss(self, logps: Tensor, entropies: Tensor | None) -> Tensor:
        """The case's loss from log-probs and entropies, in their dtype."""
        adv = self.advantages.to(logps.dtype).view(logps.shape)
        if self.case.job == "loss":
            ratio = torch.exp(logps - self.old.to(logps.dtype).view(logps.shape))
            loss = -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
        else:
            loss = -logps * adv
        if self.case.entropy:
            assert entropies is not None
            loss = loss - ENTROPY_COEF * entropies
        return loss.mean()

    def error(self, exact: bool, value: Any, grad: Tensor | None) -> float:
        """Error of a run on the first rows, divided by the allowed error; <= 1 passes.

        ``exact`` applies the package's criterion.
        """
        rows = slice(0, GATE_ROWS)
        truth, single = self._truth(rows, torch.float64), self._truth(rows, torch.float32)
        if grad is not None:
            rounded = single["grad"].to(grad.dtype)
            return _share(
                exact,
                grad.detach().flatten(0, -2)[rows],
                truth["grad"],
                rounded,
                ERROR_FLOOR * truth["size"][:, None],
            )
        shares = []
        for name, got in zip(
            ("logps", "entropies"), value if isinstance(value, tuple) else (value,), strict=False
        ):
            shares.append(
                _share(
                    exact,
                    got.detach().flatten()[rows],
                    truth[name],
                    single[name],
                    ERROR_FLOOR * (1 + truth[name].abs().max()),
                )
            )
        return max(shares)

    def _truth(self, rows: slice, dtype: torch.dtype) -> dict[str, Tensor]:
        """Values and gradients of some rows by autograd in the given dtype, from the
        pristine logits.

        ``size`` has the absolute coefficients of a row.
        """
        z = self.pristine.flatten(0, 1)[rows].to(dtype).requires_grad_()
        ids, adv, old = (x.flatten()[rows] for x in (self.ids, self.advantages, self.old))
        logp_all = torch.log_softmax(z, -1)
        logp, entropy = (
            logp_all.gather(-1, ids[:, None])[:, 0],
            -(logp_all.exp() * logp_all).sum(-1),
        )
        few = replace(self, ids=ids, advantages=adv, old=old)
        (grad,) = torch.autograd.grad(few.row_loss(logp, entropy) * len(ids) / self.case.rows, z)
        ratio = (
            torch.exp(logp - old.to(dtype)) if self.case.job == "loss" else torch.ones_like(logp)
        )
        size = (
            (ratio * adv.to(dtype)).abs() + (ENTROPY_COEF if self.case.entropy else 0)
        ) / self.case.rows
        return {
            "logps": logp.detach(),
            "entropies": entropy.detach(),
            "grad": grad,
            "size": size.detach(),
        }


def _share(exact: bool, got: Tensor, truth: Tensor, rounded: Tensor, floor: Tensor) -> float:
    error = (got.double() - truth).abs()
    if exact:
        return float((error / (ERROR_RATIO * (rounded.double() - truth).abs().max() + floor)).max())
    return float(error.norm() / truth.norm() / SAME_FUNCTION)


@lru_cache(maxsize=1)  # cases of one shape are consecutive
def _tensors(rows: int, vocab: int, dtype: str, device: str) -> Data:
    g = torch.Generator(device).manual_seed(0)
    t = min(rows, 1024 if device == "cuda" else 64)
    shape = (rows // t, t)
    ids = torch.randint(0, vocab, shape, generator=g, device=device)
    logits = torch.empty(*shape, vocab, dtype=getattr(torch, dtype), device=device)
    logp = torch.empty(shape, device=device)
    # in parts: the fp32 draft must not take most of the memory
    for b in range(shape[0]):
        z = torch.randn(t, vocab, generator=g, device=device) * 3
        # targets from rare to nearly certain
        z.scatter_add_(-1, ids[b, :, None], torch.rand(t, 1, generator=g, device=device) * 12)
        logits[b] = z
        logp[b] = torch.log_softmax(logits[b].float(), -1).gather(-1, ids[b, :, None])[:, 0]
    old = logp + 0.3 * torch.randn(shape, generator=g, device=device)
    advantages = torch.randn(shape[0], 1, generator=g, device=device).expand(shape).contiguous()
    case = Case("loss", rows, vocab, dtype, device=device)
    scratch = dict(logits=logits, pristine=logits.clone(), spare=spare(device))
    return Data(case=case, **scratch, ids=ids, advantages=advantages, old=old)
