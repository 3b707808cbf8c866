"""The accuracy criterion. It measures a kernel's error against fp64 in units of the
error of PyTorch's own fp32 maths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._core.engine.output import PolicyLossOutput, coefficients
from .._core.losses.policy import policy_loss
from .._core.spec.policy import PolicyLossSpec
from .batches import double_batch, double_spec
from .yardstick import yardstick

#: A kernel's error may be this multiple of the error of fp32 PyTorch maths rounded once
#: to the same dtype ...
ERROR_RATIO = 1.5
#: ... plus this many times (|d_logp| + |d_entropy|) / T. That is four roundings of an
#: fp32 number of that size.
ERROR_FLOOR = 4 * 2.0**-24


@dataclass(frozen=True)
class Comparison:
    """Errors against fp64.

    Each is a multiple of what the accuracy criterion allows, so <= 1 passes. The
    gradient has a maximum and an rms error for target columns, and the same for the
    other columns. ``worst`` names the worst gradient element.
    """

    loss: float
    logps: float
    entropies: float
    grad_target: float
    grad_rest: float
    grad_target_rms: float
    grad_rest_rms: float
    worst: str
    plan: str
    backend: str

    @property
    def grad(self) -> float:
        return max(self.grad_target, self.grad_rest, self.grad_target_rms, self.grad_rest_rms)

    @property
    def passed(self) -> bool:
        return all(error <= 1 for error in (self.grad, self.loss, self.logps, self.entropies))


def _gradient(spec: PolicyLossSpec, batch: dict[str, Any], **options: Any) -> tuple[Tensor, Any]:
    logits = batch["logits"].detach().clone().requires_grad_()
    probe = logits * 1 if options.get("consume_logits") else logits
    out = policy_loss(**{**batch, "logits": probe}, spec=spec, **options)
    loss = out.loss if out.loss.dim() == 0 else out.loss.sum()
    (grad,) = torch.autograd.grad(loss, logits)
    return grad, out


def compare(
    spec: PolicyLossSpec,
    batch: dict[str, Any],
    *,
    backend: str = "auto",
    plan: str = "auto",
    **options: Any,
) -> Comparison:
    """Compare the loss and the gradient of a backend and plan with the fp64 reference,
    by the criterion of the package. ``sampling_mask`` among the options is a bool mask.

    The gradient's error is divided by what is allowed. Allowed is 1.5 times the error
    of ``torch.log_softmax`` in fp32 rounded once to the logits' dtype, plus a floor.
    The floor is four fp32 roundings of ``(|d_logp| + |d_entropy|)/T``, and of what four
    roundings of the other rows' statistics make of the coefficients.
    """
    return judge(
        spec, batch, *_gradient(spec, batch, backend=backend, plan=plan, **options), **options
    )


def judge(
    spec: PolicyLossSpec, batch: dict[str, Any], got: Tensor, out: Any, **options: Any
) -> Comparison:
    """Compare the results of a call and its gradient by the batch's logits, however
    they were found. The criterion is that of :func:`compare`.
    """
    common = {k: v for k, v in options.items() if k != "consume_logits"}
    truth, exact = _gradient(
        double_spec(spec), double_batch(batch), backend="reference", plan="two_pass", **common
    )
    single = (
        {**batch, "logits": batch["logits"].float()}
        if batch["logits"].dtype != torch.float64
        else batch
    )
    _, resolved = _gradient(spec, single, backend="reference", plan="two_pass", **common)
    head = {
        name: common[name]
        for name in (
            "temperature",
            "softcap",
            "vocab_size",
            "drop_last",
            "sampling_mask",
            "entropy_over",
        )
        if name in common
    }
    fp32 = yardstick(resolved, single["logits"], single["completion_ids"], **head)
    floor = _floor(exact, common)
    ids = batch["completion_ids"].clamp(min=0)[..., None]
    is_target = torch.zeros(truth.shape, dtype=torch.bool, device=truth.device)
    is_target[..., : ids.shape[-2], :].scatter_(-1, ids, True)
    parts, worst = gradient_errors(got, fp32.grad, truth, floor, is_target)
    return Comparison(
        loss=value_error(out.loss, fp32.loss, exact.loss, _loss_size(exact)),
        logps=value_error(out.per_token_logps, fp32.per_token_logps, exact.per_token_logps),
        entropies=value_error(out.entropies, fp32.entropies, exact.entropies),
        grad_target=parts["target"][0],
        grad_rest=parts["rest"][0],
        grad_target_rms=parts["target"][1],
        grad_rest_rms=parts["rest"][1],
        worst=worst,
        plan=out.plan,
        backend=out.backend,
    )


def gradient_errors(
    got: Tensor, rounded: Tensor, truth: Tensor, floor: Tensor, is_target: Tensor
) -> tuple[dict[str, tuple[float, float]], str]:
    """A gradient's maximum and rms error as multiples of what is allowed, for target
    columns and for the rest, and the worst element. ``rounded`` is the gradient by fp32
    maths.
    """
    parts, worst = {}, ""
    for name, where in (("target", is_target), ("rest", ~is_target)):
        if not where.any():  # a shard without targets, a vocabulary of one
            parts[name] = 0.0, 0.0
            continue
        error, base = (got.double() - truth).abs(), (rounded.to(got.dtype).double() - truth).abs()
        e, b, f = error[where], base[where], floor.expand_as(truth)[where]
        share = e / (ERROR_RATIO * b.max() + f)
        rms = e.square().mean().sqrt() / (ERROR_RATIO * b.square().mean().sqrt() + f.max())
        parts[name] = float(share.max()), float(rms)
        if parts[name][0] >= max(p[0] for p in parts.values()):
            at = torch.unravel_index(torch.where(where, error, -1).argmax(), error.shape)
            index = tuple(int(i) for i in at)
            worst = (
                f"{name} column {index}: got {float(got[index]):.9g}, exact "
                f"{float(truth[index]):.9g}"
            )
    return parts, worst


def _conditioning(exact: PolicyLossOutput) -> tuple[Tensor, Tensor]:
    """How much four roundings of every row's statistics change each row's coefficients
    (``[N]``) where rows depend on each other, and how much they change the loss.

    A sequence's ratio, or a batch's maximum, sums or selects over many log-probs. Its
    coefficients are as wrong as those log-probs make them. Where every row stands
    alone, this change of the coefficients is 0. The criterion then asks for the
    coefficient itself to four roundings.
    """
    call, leaves = exact._call, exact._leaves
    d_logp, loss = (
        torch.zeros_like(leaves["logp"]),
        torch.zeros((), dtype=torch.float64, device=leaves["logp"].device),
    )
    known, value = exact._derivatives, call.token_losses(leaves).weighted_loss.sum()
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        moved = {
            name: x
            + ERROR_FLOOR
            * (1 + x.abs())
            * (torch.rand(x.shape, generator=g, dtype=torch.float64, device="cpu") * 2 - 1)
            .sign()
            .to(x.device)
            for name, x in leaves.items()
        }
        moved = {name: torch.where(call.rows.keep, moved[name], x) for name, x in leaves.items()}
        if call.spec.couples_rows:
            change = [(a - b).abs() for a, b in zip(coefficients(call, moved), known, strict=True)]
            d_logp = torch.maximum(d_logp, change[0] + change[1])
        loss = torch.maximum(
            loss, (call.token_losses(moved).weighted_loss.sum() - value).abs().double()
        )
    return d_logp, loss


def _loss_size(exact: PolicyLossOutput) -> Tensor:
    """The size that the loss's roundings are relative to. It is the sum of the sizes of
    its terms, and of their slopes times the log-probs that they are read at.

    Some formulas stop a gradient (CISPO's weight, a detached token weight). Their
    slopes say less than the value depends on. Their size is what four roundings of the
    statistics make of the loss.
    """
    call, leaves = exact._call, exact._leaves
    terms = call.token_losses(leaves).weighted_loss.abs().sum()
    by_size = exact._derivatives[0].abs() * (1 + leaves["logp"].abs()) + exact._derivatives[
        1
    ].abs() * (1 + leaves["entropy"])
    reach, moved = by_size.sum(), _conditioning(exact)[1] / ERROR_FLOOR
    return terms + (reach + moved if call.spec.couples_rows else torch.maximum(reach, moved))


def value_error(got: Tensor, fp32: Tensor, truth: Tensor, scale: Tensor | None = None) -> float:
    """The largest error, as a multiple of what is allowed. Allowed is 1.5 times fp32's
    own error plus four roundings of a number of the values' size. A difference of
    log-sum-exps is of that size.

    ``scale`` replaces that size by one number for all values, or by one for each. All
    errors, fp32's too, are then relative to it.
    """
    got, fp32, truth = got.detach().double(), fp32.detach().double(), truth.detach()
    if not truth.numel():  # a call without rows
        return 0.0
    size = truth.abs().max() + 1 if scale is None else scale
    error, base = (((x - truth).abs() / (size + 1e-300)).max() for x in (got, fp32))
    return float(error / (ERROR_RATIO * base + ERROR_FLOOR))


def _floor(exact: Any, options: dict[str, Any]) -> Tensor:
    temperature = options.get("temperature", 1.0)
    d_logp, d_entropy = exact._derivatives
    size = exact._call.rows.unflatten(
        d_logp.abs() + d_entropy.abs() + _conditioning(exact)[0] / ERROR_FLOOR
    )
    scale = (
        temperature
        if not isinstance(temperature, Tensor) or temperature.shape == size.shape
        else temperature.reshape(*temperature.shape, 1)
    )
    floor = ERROR_FLOOR * size / scale
    if options.get("drop_last"):
        floor = torch.cat([floor, floor.new_zeros(*floor.shape[:-1], 1)], -1)
    result: Tensor = (floor + 1e-300)[..., None]
    return result
