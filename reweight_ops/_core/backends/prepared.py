"""One-pass losses that are known except for their tensors.

This is the interface through which the engine asks a backend for a repeated call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..formula.loss_program import Program
from ..rows.primitives import Masked, Weighing
from .base import SoftmaxParams

#: The inputs of a row of a loss, by the names of a call's arguments. The last two are
#: factors of its weight.
INPUTS = (
    "advantages",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
    "token_weights",
)


class OnePassPlan(NamedTuple):
    """The plan of a one-pass loss.

    ``terms`` is the number of terms of the loss. All have the same row weight except
    for the factors. ``run`` is the number of rows of a sequence, or of rows that are
    counted together.
    """

    softmax: SoftmaxParams
    program: Program
    params: tuple[float, ...]
    weighing: Weighing
    terms: int
    run: int


class OnePassArguments(NamedTuple):
    """The arguments of one call.

    ``logits`` is ``[N, V]`` or ``[S, run, V]``. Ids and masks have the shape of its
    rows. ``inputs`` are in the order of :data:`INPUTS`. Each is None, a number, or a
    tensor of that shape, of one number per sequence, or of one number.
    """

    logits: Tensor
    ids: Tensor
    mask: Tensor | None
    denominator: Tensor | None
    inputs: tuple[Any, ...]
    temperature: float
    divisor: float
    scale: float


class OnePassRows(Protocol):
    """The rows that a call has computed.

    ``table`` is what ``token_loss_grad`` returns. The rest is made when it is read.
    """

    @property
    def table(self) -> Tensor: ...

    def masked(self) -> Masked: ...

    def given(self, name: str) -> Tensor | None:
        """Return an input as ``[N]``. ``"token_weights"`` is the product of both
        factors.
        """


#: Runs a call whose arguments have the layouts of the first, and writes the gradient.
#: Returns None, with nothing written, if an id is not a token.
Prepared = Callable[[OnePassArguments, Tensor], OnePassRows | None]

#: Prepares a repeated call. Returns None if the backend's kernel does not take
#: arguments of such layouts. It keeps no tensor.
Prepare = Callable[[OnePassPlan, OnePassArguments], Prepared | None]
