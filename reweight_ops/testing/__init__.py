"""What tests, benchmarks and ``reweight-ops check`` share: meaningful batches, fp64 truth, and the accuracy criterion."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._core.engine.output import PolicyLossOutput, coefficients
from .._core.losses.policy import policy_loss
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.ratio import SegmentRatio
from ..errors import InvalidCall
from .yardstick import yardstick

#: A kernel's error may be this multiple of the error of fp32 PyTorch maths rounded once to the same dtype ...
ERROR_RATIO = 1.5
#: ... plus this many times (|coef| + |ent_coef|) / T: four roundings of an fp32 number of that size.
ERROR_FLOOR = 4 * 2.0**-24


def make_batch(
    spec: PolicyLossSpec,
    shape: tuple[int, ...] = (4, 16),
    vocab: int = 257,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    on_policy: bool = False,
) -> dict[str, Any]:
    """Keyword arguments for ``policy_loss(**batch, spec=spec)`` that exercise the spec: outlier logits, targets with real mass, a ragged
    mask, log-ratios on both sides of any clip. The logits are a non-leaf slice of a larger tensor and require grad.

    >>> import reweight_ops as rw
    >>> batch = make_batch(rw.methods.grpo())
    >>> rw.policy_loss(**batch, spec="grpo").plan in ("one_pass", "two_pass")
    True
    """
    g = torch.Generator().manual_seed(seed)
    row = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64, device="cpu")

    ids = torch.randint(0, vocab, shape, generator=g, device="cpu")
    z = normal(*shape, vocab) * 2

    def uniform(size: tuple[int, ...]) -> Tensor:
        return torch.rand(size, generator=g, dtype=torch.float32, device="cpu")

    z += 8.0 * (uniform(z.shape) < 4 / vocab)  # outliers: without them every p is about 1/V
    lift = uniform(shape) * 12
    z.scatter_add_(-1, ids[..., None], lift.to(z.dtype)[..., None])  # targets from rare to nearly certain
    buffer = torch.zeros(*shape[:-1], shape[-1] + 1, vocab + 3, dtype=dtype, device="cpu")
    buffer[..., :-1, :vocab] = z.to(dtype)
    leaf = buffer.to(device).requires_grad_()
    logits = (leaf * 1)[..., :-1, :vocab]
    logp = torch.log_softmax(logits.detach().double().cpu(), -1).gather(-1, ids[..., None])[..., 0]

    lengths = torch.randint(1, shape[-1] + 1, shape[:-1], generator=g, device="cpu")
    mask = torch.arange(shape[-1], device="cpu") < lengths[..., None]
    mask[..., 0] = True
    batch: dict[str, Any] = {
        "logits": logits,
        "completion_ids": ids.to(device),
        "advantages": normal(*shape).to(device, row) if "adv" in spec.requires else None,
        "completion_mask": mask.to(device),
    }
    old = (logp + 0.4 * normal(*shape)).clamp(max=-1e-4).to(device, row)  # drawn always: what is drawn after it does not depend on the spec
    if not on_policy and ("old_logp" in spec.requires or ("log_ratio" in spec.requires and spec.ratio.against == "old")):
        batch["old_per_token_logps"] = old
    if "ref_logp" in spec.requires:
        batch["ref_per_token_logps"] = (logp + 0.5 * normal(*shape)).clamp(max=-1e-4).to(device, row)
    if "sampling_logp" in spec.requires:
        batch["sampling_per_token_logps"] = (logp + 0.5 * normal(*shape)).clamp(max=-1e-4).to(device, row)
    if any(r.reads_groups for r in spec.reductions):
        sequences = math.prod(shape[:-1])
        batch["group_ids"], batch["num_groups"] = (torch.arange(sequences, device="cpu") * 2 // sequences).to(device), 2
        sign = (1.0 - 2.0 * (torch.arange(sequences, dtype=torch.float64, device="cpu") % 2)).view(
            *shape[:-1], 1
        )  # both labels in both groups
        batch["advantages"] = (normal(*shape).abs() * sign).to(device, row)
    if isinstance(spec.ratio, SegmentRatio):
        batch["segment_ids"] = (torch.arange(shape[-1], device="cpu") // 3).expand(shape).contiguous().to(device)
    _assert_meaningful(spec, batch, logp)
    return batch


def _assert_meaningful(spec: PolicyLossSpec, batch: dict[str, Any], logp: Tensor) -> None:
    p = logp.exp()
    assert (p > 0.5).any() and (p < 0.05).any(), "no target with real mass, or none without"
    if "old_per_token_logps" in batch and logp.numel() >= 32:
        ratio = (logp - batch["old_per_token_logps"].double().cpu()).exp()
        assert (ratio > 1.3).any() and (ratio < 0.7).any(), "the ratio is active on one side only"


def eager_policy_loss(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    temperature: float = 1.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> Tensor:
    """The policy loss that a user would write in PyTorch (clip, token mean, k3, entropy bonus): the baseline of benchmarks.

    Not ``backend="reference"``, which is truth and may be slow.
    """
    logp_all = torch.log_softmax(logits.float() / temperature, dim=-1)
    logps = logp_all.gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)
    old = logps.detach() if old_per_token_logps is None else old_per_token_logps
    ratio = torch.exp(logps - old)
    adv = advantages if advantages.shape == logps.shape else advantages.unsqueeze(-1)
    loss = -torch.min(ratio * adv, torch.clamp(ratio, 1 - epsilon_low, 1 + epsilon_high) * adv)
    if beta:
        assert ref_per_token_logps is not None
        d = ref_per_token_logps - logps
        loss = loss + beta * (torch.exp(d) - d - 1)
    if entropy_coef:
        loss = loss + entropy_coef * (logp_all.exp() * logp_all).sum(-1)
    mask = torch.ones_like(loss) if completion_mask is None else completion_mask.to(loss.dtype)
    return (loss * mask).sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class Comparison:
    """Errors against fp64, each as a multiple of what the accuracy criterion allows (<= 1 passes); the gradient's for target and non-target
    columns apart, maximum and rms. ``worst`` names the worst gradient element."""

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


def double_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its floating-point tensors in fp64."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def double_spec(spec: PolicyLossSpec) -> PolicyLossSpec:
    """The spec with its tensors in fp64: constants are exact in fp64 already."""

    def double(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.double() if x.is_floating_point() else x
        if isinstance(x, tuple):
            return tuple(double(y) for y in x)
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return dataclasses.replace(x, **{f.name: double(getattr(x, f.name)) for f in dataclasses.fields(x)})
        return x

    result: PolicyLossSpec = double(spec)
    return result


def compare(spec: PolicyLossSpec, batch: dict[str, Any], *, backend: str = "auto", plan: str = "auto", **options: Any) -> Comparison:
    """Loss and gradient of a backend and plan against the fp64 reference, by the criterion of the package.

    The gradient's error is divided by 1.5 times the error of ``torch.log_softmax`` in fp32 rounded once to the logits' dtype, plus a floor of four fp32
    roundings of ``(|coef| + |ent_coef|)/T``, and of what four roundings of the other rows' statistics make of the coefficients.
    """
    got, out = _gradient(spec, batch, backend=backend, plan=plan, **options)
    common = {k: v for k, v in options.items() if k != "consume_logits"}
    truth, exact = _gradient(double_spec(spec), double_batch(batch), backend="reference", plan="two_pass", **common)
    single = {**batch, "logits": batch["logits"].float()} if batch["logits"].dtype != torch.float64 else batch
    _, resolved = _gradient(spec, single, backend="reference", plan="two_pass", **common)
    head = {name: common[name] for name in ("temperature", "softcap", "vocab_size", "drop_last") if name in common}
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
    """A gradient's maximum and rms error over what is allowed, for target columns and the rest, and the worst element. ``rounded``: by fp32 maths."""
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
            worst = f"{name} column {index}: got {float(got[index]):.9g}, exact {float(truth[index]):.9g}"
    return parts, worst


def _conditioning(exact: PolicyLossOutput) -> tuple[Tensor, Tensor]:
    """How much four roundings of every row's statistics change each row's coefficients (``[N]``), and the loss, where rows depend on each other.

    A sequence's ratio, or a batch's maximum, sums or selects over many log-probs, so its coefficients are as wrong as those make them. Where
    every row stands alone this is 0: there the criterion asks for the coefficient itself to four roundings.
    """
    call, leaves = exact._call, exact._leaves
    coef, loss = torch.zeros_like(leaves["logp"]), torch.zeros((), dtype=torch.float64, device=leaves["logp"].device)
    if not call.spec.couples_rows:
        return coef, loss
    known, value = exact._derivatives, call.evaluate(leaves).weighted_loss.sum()
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        moved = {
            name: x
            + ERROR_FLOOR
            * (1 + x.abs())
            * (torch.rand(x.shape, generator=g, dtype=torch.float64, device="cpu") * 2 - 1).sign().to(x.device)
            for name, x in leaves.items()
        }
        moved = {name: torch.where(call.rows.keep, moved[name], x) for name, x in leaves.items()}
        change = [(a - b).abs() for a, b in zip(coefficients(call, moved), known, strict=True)]
        coef = torch.maximum(coef, change[0] + change[1])
        loss = torch.maximum(loss, (call.evaluate(moved).weighted_loss.sum() - value).abs().double())
    return coef, loss


def _loss_size(exact: PolicyLossOutput) -> Tensor:
    """What the loss's roundings are relative to: the sum of its terms' sizes, and of their slopes times the log-probs they are read at."""
    call, leaves = exact._call, exact._leaves
    terms = call.evaluate(leaves).weighted_loss.abs().sum()
    slopes = exact._derivatives[0].abs() * (1 + leaves["logp"].abs()) + exact._derivatives[1].abs() * (1 + leaves["entropy"])
    return terms + slopes.sum() + _conditioning(exact)[1] / ERROR_FLOOR


def value_error(got: Tensor, fp32: Tensor, truth: Tensor, scale: Tensor | None = None) -> float:
    """The largest error over 1.5 times fp32's own plus four roundings of a number of the values' size (a difference of log-sum-exps is of that
    size). ``scale``: that size instead, one for all or one each; errors, fp32's too, are then relative to it."""
    got, fp32, truth = got.detach().double(), fp32.detach().double(), truth.detach()
    size = truth.abs().max() + 1 if scale is None else scale
    error, base = (((x - truth).abs() / (size + 1e-300)).max() for x in (got, fp32))
    return float(error / (ERROR_RATIO * base + ERROR_FLOOR))


def _floor(exact: Any, options: dict[str, Any]) -> Tensor:
    temperature = options.get("temperature", 1.0)
    by_logp, by_entropy = exact._derivatives
    size = exact._call.rows.unflatten(by_logp.abs() + by_entropy.abs() + _conditioning(exact)[0] / ERROR_FLOOR)
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


def gradcheck(spec: PolicyLossSpec, batch: dict[str, Any], **options: Any) -> bool:
    """``torch.autograd.gradcheck`` of the fp64 reference, with what ``stop_gradient`` and detached weights hold recorded on the first call and
    replayed: plain gradcheck differentiates them numerically and fails.
    """
    if batch["logits"].dtype != torch.float64:
        raise InvalidCall(f"gradcheck: logits are {batch['logits'].dtype}; finite differences need fp64.")
    tape = _Tape()
    logits = batch["logits"].detach().clone().requires_grad_()

    def loss(z: Tensor) -> Tensor:
        with tape.playing():
            return policy_loss(**{**batch, "logits": z}, spec=spec, backend="reference", plan="two_pass", **options).loss

    return torch.autograd.gradcheck(loss, (logits,), atol=1e-7, rtol=1e-5)


class _Tape:
    """Detached values in call order: recorded once, then replayed, so that they stay constant under finite differences."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.recorded = False

    def playing(self) -> Any:
        import contextlib
        from unittest import mock

        position = 0
        original = Tensor.detach

        def detach(x: Tensor) -> Tensor:
            nonlocal position
            if not self.recorded:
                self.values.append(original(x).clone())
                return original(x)
            position += 1
            return self.values[position - 1]

        @contextlib.contextmanager
        def play() -> Any:
            with mock.patch.object(Tensor, "detach", detach):
                yield
            self.recorded = True

        return play()
