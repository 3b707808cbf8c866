"""Finite differences of the fp64 reference. What a loss holds constant stays constant
in them.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .._core.formula.namespace import TorchNamespace
from .._core.losses.policy import policy_loss
from .._core.spec.policy import PolicyLossSpec
from ..errors import InvalidCall


def gradcheck(spec: PolicyLossSpec, batch: dict[str, Any], **options: Any) -> bool:
    """``torch.autograd.gradcheck`` of the fp64 reference.

    The values that ``stop_gradient`` and detached weights hold are recorded on the
    first call and replayed afterwards. Plain gradcheck differentiates them numerically
    and fails.
    """
    if batch["logits"].dtype != torch.float64:
        raise InvalidCall(
            f"gradcheck: logits are {batch['logits'].dtype}; finite differences need fp64."
        )
    tape = _Tape()
    logits = batch["logits"].detach().clone().requires_grad_()

    def loss(z: Tensor) -> Tensor:
        with tape.playing():
            return policy_loss(
                **{**batch, "logits": z}, spec=spec, backend="reference", plan="two_pass", **options
            ).loss

    return torch.autograd.gradcheck(loss, (logits,), atol=1e-7, rtol=1e-5)


class _Tape:
    """Detached values in call order. They are recorded once and then replayed, so that
    they stay constant under finite differences.
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.recorded = False

    def playing(self) -> Any:
        position = 0
        original = Tensor.detach

        def detach(x: Tensor) -> Tensor:
            nonlocal position
            if not self.recorded:
                self.values.append(original(x).clone())
                return original(x)
            position += 1
            return self.values[position - 1]

        def straight_through(xp: TorchNamespace, slope: Tensor, value: Tensor) -> Tensor:
            return slope + (value - slope).detach()  # the detached part of the sum stays constant

        @contextlib.contextmanager
        def play() -> Any:
            with (
                mock.patch.object(Tensor, "detach", detach),
                mock.patch.object(TorchNamespace, "straight_through", straight_through),
            ):
                yield
            self.recorded = True

        return play()
