"""The contract of a backend for two logits tensors, and which one serves a call.

p is the softmax of ``logits``, q that of ``other``; each has its own temperature and soft cap, both have ``vocab_size`` columns. Rows, ids (only ``OUT`` or not
matters here) and strides are as in :mod:`reweight_ops._core.backends.base`. Only ``logits`` gets a gradient.

``-inf`` logits are probabilities of 0: ``0·log(0/x) = 0``; KL(q‖p) is ``inf`` iff a column has p = 0 and q > 0, KL(p‖q) iff one has q = 0 and p > 0. A row in
which either tensor has no finite logit, or a NaN or ``+inf``: NaN.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import BackendUnavailable, UnsupportedRequest
from .base import Head
from .select import candidates

#: Rows of the table that ``stats`` returns. A log-sum-exp is a pair of numbers, value and what its rounding lost: from one fp32 number alone
#: probabilities would lose digits when all logits share an offset.
TABLE = ("forward_kl", "reverse_kl", "entropy", "other_entropy", "lse", "lse_low", "other_lse", "other_lse_low")

#: The statistics that have a gradient, in the order of coefficients: KL(q‖p), KL(p‖q), H(p).
COEFS = ("forward_kl", "reverse_kl", "entropy")


class Two(NamedTuple):
    """The two tensors of a call and how each becomes distributions. ``temperature``: 1 or N elements."""

    logits: Tensor
    other: Tensor
    ids: Tensor
    temperature: Tensor
    other_temperature: Tensor
    head: Head
    other_head: Head


@dataclass(frozen=True)
class DivergenceBackend:
    """* ``stats(two) -> Tensor [len(TABLE), N]``, 0 in rows that are out.
    * ``grad(two, table, coefs [3, N], out) -> None``: writes, per row and column, with ``c`` the coefficients in the order of :data:`COEFS`,
      ``1/T · slope · [c_0·(p - q) + p·(c_1·(log p - log q - KL(p‖q)) - c_2·(log p + H(p)))]``; 0 on ``-inf`` logits, in rows that are out and in rows whose
      coefficients are all 0 (which are not read); NaN in a row with ``c_1 ≠ 0`` and an infinite KL(p‖q). ``out`` may be ``logits`` itself.
    * ``loss_grad(two, constants [3], weights [N], out) -> Tensor [len(TABLE), N]``: both at once, with ``c_k = weights·constants_k``.
    """

    name: str
    unsupported_reason: Callable[[torch.device, torch.dtype, torch.dtype], str | None]
    stats: Callable[[Two], Tensor]
    grad: Callable[[Two, Tensor, Tensor, Tensor], None]
    loss_grad: Callable[[Two, Tensor, Tensor, Tensor], Tensor]


def load(name: str) -> DivergenceBackend:
    """The backend of that name; :class:`BackendUnavailable` if it is not installed or has no kernels for two tensors."""
    try:
        found: DivergenceBackend = importlib.import_module(f"{__package__}.{name}").BACKEND
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.{name}":
            raise
        raise BackendUnavailable(f"backend {name!r} has no kernels for a second logits tensor.") from None
    return found


@torch.compiler.assume_constant_result
def choose(op: str, device: torch.device, dtype: torch.dtype, other_dtype: torch.dtype, name: str) -> str:
    """The first candidate that can serve the call. One asked for by name never falls back."""
    reasons = {}
    for candidate in candidates(device.type, name):
        try:
            reason = load(candidate).unsupported_reason(device, dtype, other_dtype)
        except BackendUnavailable as error:
            reason = str(error)
        if reason is None:
            return candidate
        reasons[candidate] = reason
    raise UnsupportedRequest(f"{op}: no backend can run this: " + "; ".join(f"{k}: {v}" for k, v in reasons.items()))
