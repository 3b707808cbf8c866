"""Evaluates golden rows. It makes the call of an entry, and measures how far its
numbers are from those that were worked out by hand.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._core.catalogue.registry import CATALOGUE
from .._core.formula.base import TokenWeight
from .._core.losses.policy import policy_loss_from_logps
from .._core.losses.preference import preference_loss_from_logps
from .._core.spec.pairs import PairSpec
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.reduction import NoReduction
from ..rules.likelihood import NLL
from .golden_ops import GOLDEN_OPS
from .golden_row import Built, Golden

#: How far a result may be off, in roundings of a number of its row's size. A call does
#: a few operations on a few numbers.
ROUNDINGS = 16
_STORED = {
    "old_logp": "old_per_token_logps",
    "ref_logp": "ref_per_token_logps",
    "sampling_logp": "sampling_per_token_logps",
}


def golden_error(
    row: Golden, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> float:
    """The worst error of a row's numbers, as a multiple of what is allowed: <= 1
    passes. It is ``inf`` where a number is missing, where there are too many, and where
    only one of result and row is NaN.
    """
    got, expected = result_of(row, dtype, device), list(_numbers(row.expected, row))
    if len(got) != len(expected):
        return math.inf
    size = 1 + max(abs(x) for x in expected if not math.isnan(x))
    errors = (
        0.0 if got_one == x or (math.isnan(got_one) and math.isnan(x)) else abs(got_one - x)
        for got_one, x in zip(got, expected, strict=True)
    )
    return max(
        math.inf if math.isnan(error) else error / (ROUNDINGS * torch.finfo(dtype).eps * size)
        for error in errors
    )


def result_of(
    row: Golden, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> list[float]:
    """Every number that the row's call returns, in order."""
    result = build(row, dtype, device)
    if row.updates:
        options = {"dtype": dtype, "device": device}
        state = result.init(
            *row.init,
            **{k: v for k, v in options.items() if k in inspect.signature(result.init).parameters},
        )
        seen = []
        for given in row.updates:
            state, weights = result.update(state, _argument(given, dtype, device))
            seen.append(weights)
        result = seen
    return list(_numbers(result, row, dtype, device))


def build(
    row: Golden, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Any:
    """What the row's call returns: numbers, or the object that gives them."""
    function = GOLDEN_OPS[row.name] if row.kind == "op" else CATALOGUE[row.kind][row.name].function
    return function(**{name: _argument(x, dtype, device) for name, x in row.arguments.items()})


def _argument(value: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    if isinstance(value, Built):
        return value.function(
            **{name: _argument(x, dtype, device) for name, x in value.arguments.items()}
        )
    if not isinstance(value, list):
        return value
    return torch.tensor(value, dtype=dtype if _has_float(value) else None, device=device)


def token_weights(
    weights: tuple[TokenWeight, ...], tokens: dict[str, Any], shape: tuple[int, int], **options: Any
) -> Tensor:
    """The weights ``[B, T]`` as the op applies them: per-token losses of ``-u·logp``,
    divided by ``-logp``. ``tokens`` holds numbers for all tokens, or lists.
    """

    def tensor(value: Any) -> Tensor:
        return torch.as_tensor(value, **options).expand(math.prod(shape)).reshape(shape)

    given = {"logp": -math.log(2), "entropy": 0.0, **tokens}
    logps, mask = tensor(given["logp"]), tensor(given.get("completion_mask", 1.0))
    stored: dict[str, Any] = {
        name: tensor(given[leaf]) for leaf, name in _STORED.items() if leaf in given
    }
    spec = PolicyLossSpec(surrogate=NLL(), weights=weights, reduction=NoReduction())
    advantages = tensor(given["adv"]) if "adv" in given else None
    out = policy_loss_from_logps(
        logps,
        advantages,
        spec=spec,
        entropies=tensor(given["entropy"]),
        completion_mask=mask,
        unused="ignore",
        **stored,
    )
    return out.loss / -logps


def pair_numbers(
    spec: PairSpec, tokens: dict[str, Any], dtype: torch.dtype, device: torch.device | str
) -> list[Tensor]:
    """The loss of pairs, and its gradient by the log-prob of every token.

    ``tokens`` has arguments of :func:`~reweight_ops.preference_loss_from_logps`.
    """
    given = {name: _argument(x, dtype, device) for name, x in tokens.items()}
    logps = given.pop("per_token_logps").requires_grad_()
    loss = preference_loss_from_logps(logps, spec=spec, **given).loss
    return [loss.detach(), torch.autograd.grad(loss, logps)[0]]


def _has_float(value: Any) -> bool:
    return any(map(_has_float, value)) if isinstance(value, list) else isinstance(value, float)


def _numbers(
    value: Any, row: Golden, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Iterator[float]:
    if isinstance(value, PairSpec):
        value = pair_numbers(value, row.tokens, dtype, device)
    if isinstance(value, PolicyLossSpec | TokenWeight):
        weights = value.weights if isinstance(value, PolicyLossSpec) else (value,)
        count = max(len(x) for x in row.tokens.values() if isinstance(x, list))
        value = token_weights(weights, row.tokens, (1, count), dtype=dtype, device=device)
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    if isinstance(value, list | tuple):
        for x in value:
            yield from _numbers(x, row, dtype, device)
    else:
        yield float(value)
