"""A one-pass loss of which everything is known but its tensors: what the engine asks of a backend for a call that is made again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..formula.loss_program import Program
from ..rows.primitives import Masked, Weighing
from .base import SoftmaxParams

#: What a row of a loss is given, by the names of a call's arguments; the last two are factors of its weight.
INPUTS = (
    "advantages", "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio", "token_weights",
)  # fmt: skip


class OnePassPlan(NamedTuple):
    """``terms``: of the loss, all of which have the same row weight but for the factors. ``run``: rows of a sequence, or that are counted together."""

    softmax: SoftmaxParams
    program: Program
    params: tuple[float, ...]
    weighing: Weighing
    terms: int
    run: int


class OnePassArguments(NamedTuple):
    """The arguments of one call. ``logits``: ``[N, V]`` or ``[S, run, V]``; ids and masks of the shape of its rows; ``inputs``: in the order of
    :data:`INPUTS`, each None, a number or a tensor of that shape, of a number a sequence, or of one number."""

    logits: Tensor
    ids: Tensor
    mask: Tensor | None
    denominator: Tensor | None
    inputs: tuple[Any, ...]
    temperature: float
    divisor: float
    scale: float


class OnePassRows(Protocol):
    """What a call found of its rows. ``table``: as ``token_loss_grad`` returns it. The rest is made when somebody reads it."""

    @property
    def table(self) -> Tensor: ...

    def masked(self) -> Masked: ...

    def given(self, name: str) -> Tensor | None:
        """An input as ``[N]``; ``"token_weights"``: the product of both factors."""


#: Runs a call whose arguments have the layouts of the first, and writes the gradient; None, with nothing written, if an id is no token.
Prepared = Callable[[OnePassArguments, Tensor], OnePassRows | None]

#: A call that is to be made again; None if the backend's kernel does not take arguments of such layouts. It keeps no tensor.
Prepare = Callable[[OnePassPlan, OnePassArguments], Prepared | None]
