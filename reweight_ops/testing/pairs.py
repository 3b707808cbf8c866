"""Pair losses and divergences by the accuracy criterion of :mod:`reweight_ops.testing`.
This module makes batches, and compares a backend with the fp64 reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.calls.pairs import NEEDS
from ..divergences import token_divergence
from ..methods import grpo
from ..preference import PairSpec, PreferenceLossOutput, preference_loss, preference_loss_from_logps
from . import ERROR_FLOOR, Comparison, double_batch, gradient_errors, make_batch, value_error
from .yardstick import row_statistics

PER_PAIR = ("reward_margins", "judge_margins", "consistency", "chosen_values", "rejected_values")


def pair_inputs(
    spec: PairSpec, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random values of what a spec reads beside log-probs of rows ``[S, T]``, by
    keyword. Where the spec may read either of two, the value per token is made.
    """
    pairs = shape[0] // spec.group_size
    sizes = {
        **dict.fromkeys(PER_PAIR, (pairs,)),
        "noise": (pairs + 1,),
        "reward_mask": shape,
        "kl_mask": shape,
        "kl": shape,
    }
    names = [need for need in sizes if need in spec.requires]
    return {
        NEEDS[name][-1]: torch.rand(sizes[name], generator=generator, dtype=dtype, device="cpu")
        for name in names
    }


def make_pairs(
    spec: PairSpec,
    pairs: int = 4,
    length: int = 16,
    vocab: int = 257,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Keyword arguments for ``preference_loss(**batch, spec=spec)`` with the logits,
    targets and ragged mask of :func:`~.testing.make_batch`.
    """
    shape = (pairs * spec.group_size, length)
    policy = make_batch(grpo(beta=0.1), shape, vocab, dtype, device)
    batch = {name: policy[name] for name in ("logits", "completion_ids", "completion_mask")}
    if spec.requires & {"ref", "ref_tokens"}:
        batch["ref_per_token_logps"] = policy["ref_per_token_logps"]
    if "old" in spec.requires:
        batch["old_per_token_logps"] = policy["old_per_token_logps"]
    values = pair_inputs(spec, shape, torch.float64, torch.Generator().manual_seed(1))
    row = torch.float64 if dtype == torch.float64 else torch.float32
    return batch | {name: value.to(device, row) for name, value in values.items()}


def make_divergence(
    shape: tuple[int, ...], vocab: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Logits, targets and mask of :func:`~.testing.make_batch`, and other logits near
    the first ones.
    """
    policy = make_batch(grpo(), shape, vocab, dtype, device)
    batch = {name: policy[name] for name in ("logits", "completion_ids", "completion_mask")}
    noise = 1.5 * torch.randn(
        (*shape, vocab),
        generator=torch.Generator().manual_seed(1),
        dtype=torch.float64,
        device="cpu",
    )
    return batch | {
        "other_logits": (policy["logits"].detach().double().cpu() + noise).to(device, dtype)
    }


def compare_pairs(
    spec: PairSpec, batch: dict[str, Any], *, backend: str = "auto", loss_scale: float = 1.0
) -> Comparison:
    """Compare the loss and the gradient of a pair loss on a backend with the fp64
    reference, as :func:`~.testing.compare` does for a policy loss.
    """

    def run(batch: dict[str, Any], backend: str) -> tuple[Tensor, Any]:
        logits = batch["logits"].detach().clone().requires_grad_()
        out = preference_loss(
            **{**batch, "logits": logits}, spec=spec, backend=backend, loss_scale=loss_scale
        )
        return torch.autograd.grad(out.loss, logits)[0], out

    got, out = run(batch, backend)
    truth, exact = run(double_batch(batch), "reference")
    rounded, fp32 = _yardstick(spec, {**batch, "logits": batch["logits"].float()}, loss_scale)
    d_logp, size = _derivatives_of(spec, double_batch(batch), loss_scale)
    grads = gradient_errors(
        got, rounded, truth, (ERROR_FLOOR * d_logp + 1e-300)[..., None], _targets(batch, truth)
    )
    values = {
        "loss": value_error(out.loss, fp32.loss, exact.loss, size),
        "logps": value_error(out.per_token_logps, fp32.per_token_logps, exact.per_token_logps),
    }
    return _comparison(grads, out.backend, **values)


def _yardstick(
    spec: PairSpec, batch: dict[str, Any], loss_scale: float
) -> tuple[Tensor, PreferenceLossOutput]:
    """The gradient and the loss that ``torch.log_softmax`` and autograd
    give in fp32."""
    rest = {name: x for name, x in batch.items() if name != "logits"}
    logits = batch["logits"].detach().clone().requires_grad_()
    rows = row_statistics(logits, rest["completion_ids"])
    rows = {name: torch.where(rest["completion_mask"].bool(), x, 0) for name, x in rows.items()}
    more: dict[str, Any] = (
        {"log_sum_p_sq": rows["log_sum_p_sq"]} if "log_sum_p_sq" in spec.requires else {}
    )
    rest = _from_logps(spec, rest)
    out = preference_loss_from_logps(rows["logp"], **more, **rest, spec=spec, loss_scale=loss_scale)
    return torch.autograd.grad(out.loss, logits)[0], out


def _from_logps(spec: PairSpec, batch: dict[str, Any]) -> dict[str, Any]:
    """Leave out the ids where a loss from log-probs does not read them."""
    return {
        name: x
        for name, x in batch.items()
        if name != "completion_ids" or spec.tokens != "completion"
    }


def compare_divergence(
    kind: str, batch: dict[str, Any], *, backend: str = "auto", loss_scale: float = 1.0
) -> Comparison:
    """Compare ``token_divergence`` of a kind on a backend with the fp64 reference. What
    is compared is each token's value, and the gradient of their sum.

    The probabilities are those of two softmaxes. Therefore the gradient has the four
    roundings of :func:`~.testing.compare` twice.
    """

    def run(batch: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
        logits = batch["logits"].detach().clone().requires_grad_()
        rest = {name: batch[name] for name in ("other_logits", "completion_mask")}
        value = token_divergence(logits, **rest, kind=kind, backend=backend)
        return torch.autograd.grad(loss_scale * value.sum(), logits)[0], value.detach()

    got, value = run(batch, backend)
    truth, exact = run(double_batch(batch), "reference")
    rounded, fp32 = run(
        {**batch, "logits": batch["logits"].float(), "other_logits": batch["other_logits"].float()},
        "reference",
    )
    floor = torch.full_like(exact, 2 * ERROR_FLOOR * loss_scale)[..., None]
    log_p, log_q = (
        torch.log_softmax(batch[name].detach().double(), -1) for name in ("logits", "other_logits")
    )
    entropies = torch.maximum(*(-(x.exp() * x).sum(-1).max() for x in (log_p, log_q)))
    grads = gradient_errors(got, rounded, truth, floor, _targets(batch, truth))
    return _comparison(
        grads, backend, loss=value_error(value, fp32, exact, exact.abs().max() + entropies + 1)
    )


def _targets(batch: dict[str, Any], like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.bool, device=like.device).scatter_(
        -1, batch["completion_ids"][..., None], True
    )


def _comparison(
    grads: tuple[dict[str, tuple[float, float]], str], backend: str, loss: float, logps: float = 0.0
) -> Comparison:
    parts, worst = grads
    target, rest = parts["target"], parts["rest"]
    return Comparison(
        loss, logps, 0.0, target[0], rest[0], target[1], rest[1], worst, "two_pass", backend
    )


def _derivatives_of(
    spec: PairSpec, batch: dict[str, Any], loss_scale: float
) -> tuple[Tensor, Tensor]:
    """What the roundings of the gradient (a token) and of the loss are relative to.

    For the gradient that is ``dL/dlogp``, and what four roundings of all tokens'
    statistics make of it, since a sum over them decides it. For the loss that is its
    terms, its slopes times the log-probs that they are read at, and what those
    roundings make of it. Detached weights are included.
    """
    rest = {name: x for name, x in batch.items() if name != "logits"}
    keep = rest["completion_mask"].bool()
    log_p = torch.log_softmax(batch["logits"].detach(), -1)
    statistics = {"per_token_logps": log_p.gather(-1, rest["completion_ids"][..., None])[..., 0]}
    if "log_sum_p_sq" in spec.requires:
        statistics["log_sum_p_sq"] = torch.logsumexp(2 * log_p, -1)

    def derivatives_of(leaves: dict[str, Any]) -> tuple[Tensor, PreferenceLossOutput]:
        leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
        out = preference_loss_from_logps(
            **leaves, **_from_logps(spec, rest), spec=spec, loss_scale=loss_scale
        )
        return torch.autograd.grad(out.loss, leaves["per_token_logps"])[0], out

    d_logp, exact = derivatives_of(statistics)
    g, change, loss_change = (
        torch.Generator().manual_seed(0),
        torch.zeros_like(d_logp),
        torch.zeros_like(exact.loss),
    )
    for _ in range(4):
        signs = {
            name: torch.rand(x.shape, generator=g, dtype=torch.float64, device="cpu")
            .sub(0.5)
            .sign()
            .to(x.device)
            for name, x in statistics.items()
        }
        moved, out = derivatives_of(
            {name: x + ERROR_FLOOR * (1 + x.abs()) * signs[name] for name, x in statistics.items()}
        )
        change = torch.maximum(change, (moved - d_logp).abs())
        loss_change = torch.maximum(loss_change, (out.loss - exact.loss).detach().abs())
    reach = d_logp.abs() * (1 + statistics["per_token_logps"].abs())
    terms = exact.per_pair_loss.abs().mean() * loss_scale
    return d_logp.abs() + change / ERROR_FLOOR, terms + torch.where(
        keep, reach, 0
    ).sum() + loss_change / ERROR_FLOOR
