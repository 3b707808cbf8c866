"""The cases of ``reweight-ops check`` for ops outside the catalogue.

They compare statistics, heads, teachers and gradients by other inputs with plain
PyTorch. From hidden states the logits are also those of a batch: the hidden states are
the rows of an identity, and the weight of the head is the transposed logits. Every GEMM
is then exact, and the gradient of the weight is that of the logits. Therefore a case
judges the op alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.calls.keywords import HiddenLogits, Teacher, TopKLogps
from .._core.engine.output import TokenStats
from .._core.losses.distillation import distillation_loss, token_divergence
from .._core.losses.linear import linear_policy_loss, linear_token_logps, linear_token_stats
from .._core.losses.linear_distillation import linear_distillation_loss, linear_token_divergence
from .._core.losses.policy import policy_loss
from .._core.losses.statistics import token_stats
from .._core.spec.policy import PolicyLossSpec
from .._core.spec.reduction import TokenMean
from ..methods import grpo
from ..nn import FusedLinearLogProbs, FusedLinearPolicyLoss
from .batches import double_batch, make_batch, make_sampling_mask
from .criterion import ERROR_FLOOR, Comparison, gradient_errors, value_error
from .pairs import make_divergence

#: Every statistic of a row.
STATISTICS = tuple(TokenStats.__dataclass_fields__)
#: How many ids are picked of a row, and how many the stored teacher lists.
PICKED, LISTED = 6, 8
_CHUNK_ROWS = 24
#: Temperature of a student beside a stored teacher. If the student is sure of the list,
#: a bucket of the rest says nothing.
_HEAT = 4.0
_CLIP, _BETA, _COEF = 0.2, 0.04, 0.3
_KINDS = ("forward_kl", "reverse_kl", "generalized_jsd")


def _spec() -> PolicyLossSpec:
    spec: PolicyLossSpec = grpo(epsilon_low=_CLIP, epsilon_high=_CLIP, beta=_BETA).replace(
        reduction=TokenMean()
    )
    return spec


class Judged(NamedTuple):
    """``ours(batch, backend)`` and ``plain(batch)`` give the same numbers,
    differentiable by ``batch[by]``.

    The roundings of the values are relative to ``size`` times the size of the values.
    Those of the gradient are relative to ``reach(batch)`` ``[*R]``, for an upstream of
    1.
    """

    ours: Callable[[dict[str, Any], str], Tensor]
    plain: Callable[[dict[str, Any]], Tensor]
    by: str = "logits"
    size: float = 1.0
    reach: Callable[[dict[str, Any]], Tensor] = lambda batch: torch.ones_like(batch["temperature"])


# ---- batches


@lru_cache(maxsize=3)  # the cases of the three dtypes follow each other
def make_op_batch(
    shape: tuple[int, ...], vocab: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The batch of :func:`~.testing.make_batch` with more for ops.

    It has other logits, temperatures, and a sampling mask. It has ids to pick of a row:
    one is the row's own, one occurs twice, and one is padding. It has a teacher's
    likeliest ids and their log-probs.
    """
    batch, g = make_batch(_spec(), shape, vocab, dtype, device), torch.Generator().manual_seed(2)
    batch["other_logits"] = make_divergence(shape, vocab, dtype, device)["other_logits"]
    row = torch.float64 if dtype == torch.float64 else torch.float32
    batch["temperature"] = (
        torch.rand(shape, generator=g, dtype=torch.float64, device="cpu") + 0.5
    ).to(device, row)
    picked = torch.randint(0, vocab, (*shape, PICKED), generator=g, device="cpu").to(device)
    picked[..., 1], picked[..., 2], picked[..., 3] = batch["completion_ids"], picked[..., 0], -100
    batch["picked"] = picked
    # The teacher is flat. Beside a mass of nearly 1 its bucket would say nothing.
    top = torch.log_softmax(batch["other_logits"].double() / 3, -1).topk(min(LISTED, vocab // 2))
    return batch | {
        "teacher_ids": top.indices,
        "teacher_logps": top.values.to(row),
        "kept": make_sampling_mask(batch),
    }


def _head(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight whose product is these logits exactly."""
    rows = logits.shape[:-1].numel()
    eye = torch.eye(rows, dtype=logits.dtype, device=logits.device)
    return eye.view(*logits.shape[:-1], rows), logits.reshape(rows, -1).t()


def _masked(value: Tensor, batch: dict[str, Any]) -> Tensor:
    keep = batch["completion_mask"].bool()
    return torch.where(keep.view(*keep.shape, *(1,) * (value.dim() - keep.dim())), value, 0)


# ---- statistics


def _log_p(batch: dict[str, Any], name: str = "logits") -> Tensor:
    return torch.log_softmax(batch[name], -1)


def _own(log_p: Tensor, batch: dict[str, Any]) -> Tensor:
    return log_p.gather(-1, batch["completion_ids"][..., None])[..., 0]


def _plain_selected(batch: dict[str, Any]) -> Tensor:
    listed = batch["picked"] >= 0
    return torch.where(listed, _log_p(batch).gather(-1, batch["picked"].clamp(min=0)), 0)


def _top(batch: dict[str, Any]) -> int:
    return min(PICKED, int(batch["logits"].size(-1)))


def _distinct(z: Tensor) -> Tensor:
    """Return logits in which repeated values are among the lowest, all but the first.

    Backends may order equal logits as they like, and the gradient follows that order.
    """
    order, columns = z.detach().sort(dim=-1, descending=True, stable=True)
    repeated = torch.zeros_like(columns, dtype=torch.bool)
    repeated[..., 1:] = order.diff(dim=-1) == 0
    again = torch.zeros_like(repeated).scatter(-1, columns, repeated)
    return torch.where(again, (-50 - again.cumsum(-1)).to(z.dtype), z)


#: The statistics by PyTorch, from logits. ``topk_ids`` gives the logits at those ids,
#: since equal ones may come in any order.
_PLAIN: dict[str, Callable[[dict[str, Any]], Tensor]] = {
    "logps": lambda b: _own(_log_p(b), b),
    "entropies": lambda b: -(_log_p(b).exp() * _log_p(b)).sum(-1),
    "lse": lambda b: b["logits"].logsumexp(-1),
    "log_sum_p_sq": lambda b: (2 * _log_p(b)).logsumexp(-1).detach(),
    "max_logp": lambda b: _log_p(b).amax(-1).detach(),
    "is_top1": lambda b: (_own(b["logits"], b) == b["logits"].amax(-1)).to(_log_p(b).dtype),
    "log1m_p": lambda b: torch.log(-torch.expm1(_own(_log_p(b), b))).detach(),
    "mean_logits": lambda b: b["logits"].mean(-1).detach(),
    "selected_logps": _plain_selected,
    "topk_logps": lambda b: _log_p(b).topk(_top(b)).values,
    "topk_ids": lambda b: b["logits"].topk(_top(b)).values.detach(),
}


def _statistic(name: str, hidden: bool) -> Judged:
    def of(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "logits": _distinct(batch["logits"])} if name.startswith("topk") else batch

    def ours(batch: dict[str, Any], backend: str) -> Tensor:
        batch = of(batch)
        rest: dict[str, Any] = {
            "stats": (name,),
            "completion_mask": batch["completion_mask"],
            "backend": backend,
        }
        if name == "selected_logps":
            rest["selected_ids"] = batch["picked"]
        if name.startswith("topk"):
            rest["top_k"] = _top(batch)
        if hidden:
            found = linear_token_stats(
                *_head(batch["logits"]), batch["completion_ids"], chunk_rows=_CHUNK_ROWS, **rest
            )
        else:
            found = token_stats(batch["logits"], batch["completion_ids"], **rest)
        value: Tensor = getattr(found, name)
        if name == "topk_ids":
            value = torch.where(
                value < 0, 0, batch["logits"].detach().gather(-1, value.clamp(min=0))
            )
        return value if value.is_floating_point() else value.to(batch["temperature"].dtype)

    return Judged(ours, lambda batch: _masked(_PLAIN[name](of(batch)), batch))


def _masked_statistic(name: str, over: str, hidden: bool) -> Judged:
    """A statistic of kept sets, renormalised. The entropy is over those or over the
    vocabulary.
    """

    def ours(batch: dict[str, Any], backend: str) -> Tensor:
        rest = {"stats": (name,), "completion_mask": batch["completion_mask"], "backend": backend}
        rest |= {"sampling_mask": batch["kept"], "entropy_over": over}
        if hidden:
            found = linear_token_stats(
                *_head(batch["logits"]), batch["completion_ids"], chunk_rows=_CHUNK_ROWS, **rest
            )
        else:
            found = token_stats(batch["logits"], batch["completion_ids"], **rest)
        value: Tensor = getattr(found, name)
        return value

    def plain(batch: dict[str, Any]) -> Tensor:
        log_p = torch.log_softmax(torch.where(batch["kept"], batch["logits"], -math.inf), -1)
        if name == "logps":
            return _masked(_own(log_p, batch), batch)
        if over == "vocabulary":
            return _masked(_PLAIN[name](batch), batch)
        return _masked(-(log_p.exp() * torch.where(batch["kept"], log_p, 0)).sum(-1), batch)

    return Judged(ours, plain)


def _by_temperature(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        **batch,
        "logits": batch["logits"].to(batch["temperature"].dtype) / batch["temperature"][..., None],
    }


def _temperature(name: str) -> Judged:
    """The gradient by a temperature of each row."""

    def ours(batch: dict[str, Any], backend: str) -> Tensor:
        rest = {
            "completion_mask": batch["completion_mask"],
            "temperature": batch["temperature"],
            "backend": backend,
        }
        value: Tensor = getattr(
            token_stats(batch["logits"], batch["completion_ids"], stats=(name,), **rest), name
        )
        return value

    return Judged(
        ours, lambda batch: _masked(_PLAIN[name](_by_temperature(batch)), batch), "temperature"
    )


# ---- divergences


def _kl(of: Tensor, to: Tensor) -> Tensor:
    return (of.exp() * (of - to)).sum(-1)


def _plain_divergence(kind: str, batch: dict[str, Any]) -> Tensor:
    log_p, log_q = _log_p(batch), _log_p(batch, "other_logits")
    if kind == "forward_kl":
        return _kl(log_q, log_p)
    if kind == "reverse_kl":
        return _kl(log_p, log_q)
    mix = torch.logaddexp(log_p, log_q) - math.log(2)
    return (_kl(log_q, mix) + _kl(log_p, mix)) / 2


def _plain_listed(batch: dict[str, Any]) -> Tensor:
    return _buckets(_listed(batch), batch)


def _listed(batch: dict[str, Any]) -> Tensor:
    return torch.log_softmax(batch["logits"] / _HEAT, -1).gather(-1, batch["teacher_ids"])


def _buckets(log_p: Tensor, batch: dict[str, Any]) -> Tensor:
    """KL(q‖p) over the listed ids and one bucket of all others. The student's log-probs
    are those of the listed ids.
    """
    log_q = batch["teacher_logps"].to(batch["temperature"].dtype)
    tails = (torch.log(-torch.expm1(x.logsumexp(-1, keepdim=True))) for x in (log_q, log_p))
    return _kl(*(torch.cat([x, tail], -1) for x, tail in zip((log_q, log_p), tails, strict=True)))


def _reach_of_buckets(batch: dict[str, Any]) -> Tensor:
    """The derivatives by the listed log-probs, and what four roundings of those make of
    them. Beside a small bucket that is much.
    """
    exact = _listed(batch).detach()

    def slopes(log_p: Tensor) -> Tensor:
        log_p = log_p.requires_grad_()
        return torch.autograd.grad(_buckets(log_p, batch).sum(), log_p)[0]

    known, g = slopes(exact.clone()), torch.Generator().manual_seed(0)
    change = torch.zeros_like(known[..., 0])
    for _ in range(4):
        signs = (
            (torch.rand(exact.shape, generator=g, dtype=torch.float64, device="cpu") - 0.5)
            .sign()
            .to(exact.device)
        )
        moved = slopes(exact + ERROR_FLOOR * (1 + exact.abs()) * signs)
        change = torch.maximum(change, (moved - known).abs().sum(-1))
    return known.abs().sum(-1) + change / ERROR_FLOOR


def _divergence(op: Any, kind: str, hidden: bool) -> Judged:
    listed, is_loss = (
        kind == TopKLogps.__name__,
        op in (distillation_loss, linear_distillation_loss),
    )

    def ours(batch: dict[str, Any], backend: str) -> Tensor:
        rest: dict[str, Any] = {
            "completion_mask": batch["completion_mask"],
            "backend": backend,
            "kind": "forward_kl" if listed else kind,
        }
        rest |= {"temperature": _HEAT} if listed else {}
        other: Any = (
            TopKLogps(batch["teacher_ids"], batch["teacher_logps"])
            if listed
            else batch["other_logits"]
        )
        if not hidden:
            found = op(batch["logits"], other, **rest)
        else:
            found = op(
                *_head(batch["logits"]),
                other if listed else HiddenLogits(*_head(other)),
                chunk_rows=_CHUNK_ROWS,
                **rest,
            )
        return found if isinstance(found, Tensor) else found.loss

    def plain(batch: dict[str, Any]) -> Tensor:
        value = _masked(_plain_listed(batch) if listed else _plain_divergence(kind, batch), batch)
        return value.sum() / batch["completion_mask"].sum() if is_loss else value

    def reach(batch: dict[str, Any]) -> Tensor:
        each = _reach_of_buckets(batch) if listed else torch.full_like(batch["temperature"], 2)
        return each / batch["completion_mask"].sum() if is_loss else each

    return Judged(ours, plain, size=2.0, reach=reach)


# ---- policy losses, and modules


def _stored(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: batch[name]
        for name in ("completion_mask", "old_per_token_logps", "ref_per_token_logps")
    }


def _plain_policy(batch: dict[str, Any], coef: float = 0.0) -> Tensor:
    """The clipped loss with k3 of :func:`_spec` over the tokens that are not masked,
    and ``coef`` times KL(p‖q) to the other logits.
    """
    logps, adv = _own(_log_p(batch), batch), batch["advantages"]
    ratio, d = torch.exp(logps - batch["old_per_token_logps"]), batch["ref_per_token_logps"] - logps
    loss = -torch.min(ratio * adv, ratio.clamp(1 - _CLIP, 1 + _CLIP) * adv) + _BETA * (
        torch.exp(d) - d - 1
    )
    if coef:
        loss = loss + coef * _plain_divergence("reverse_kl", batch)
    mean: Tensor = _masked(loss, batch).sum() / batch["completion_mask"].sum()
    return mean


def _policy_reach(batch: dict[str, Any]) -> Tensor:
    """How large the coefficients of a row are at most. They are those of the clipped
    ratio and the penalty, and twice those of the teacher's divergence.
    """
    logps = _own(_log_p(batch), batch).detach()
    ratio, against = (
        torch.exp(logps - batch["old_per_token_logps"]),
        torch.exp(batch["ref_per_token_logps"] - logps),
    )
    reach: Tensor = (
        (ratio * batch["advantages"]).abs() + _BETA * (1 + against) + 2 * _COEF
    ) / batch["completion_mask"].sum()
    return reach


def _taught(plan: str) -> Judged:
    def ours(batch: dict[str, Any], backend: str) -> Tensor:
        teacher = Teacher(HiddenLogits(*_head(batch["other_logits"])), _COEF)
        rest = {
            **_stored(batch),
            "spec": _spec(),
            "teacher": teacher,
            "chunk_rows": _CHUNK_ROWS,
            "backend": backend,
            "plan": plan,
        }
        loss: Tensor = linear_policy_loss(
            *_head(batch["logits"]), batch["completion_ids"], batch["advantages"], **rest
        ).loss
        return loss

    return Judged(ours, lambda batch: _plain_policy(batch, _COEF), reach=_policy_reach)


def _by_stored(name: str) -> Judged:
    def ours(batch: dict[str, Any], backend: str) -> Tensor:
        rest = {
            **_stored(batch),
            "spec": _spec(),
            "differentiable_inputs": True,
            "backend": backend,
        }
        loss: Tensor = policy_loss(
            batch["logits"], batch["completion_ids"], batch["advantages"], **rest
        ).loss
        return loss

    return Judged(ours, _plain_policy, name)


def _module(kind: Any, batch: dict[str, Any], **settings: Any) -> tuple[Any, Tensor]:
    """A head of a kind, and the hidden states. The weight of the head is that of these
    logits and stays in their graph.
    """
    hidden, weight = _head(batch["logits"])
    head = kind(weight.size(1), weight.size(0), device="meta", chunk_rows=_CHUNK_ROWS, **settings)
    del head.weight
    head.weight = weight
    return head, hidden


def _log_prob_module(batch: dict[str, Any], backend: str) -> Tensor:
    head, hidden = _module(FusedLinearLogProbs, batch, backend=backend)
    logps: Tensor = head(hidden, batch["completion_ids"], completion_mask=batch["completion_mask"])
    return logps


def _policy_loss_module(batch: dict[str, Any], backend: str) -> Tensor:
    head, hidden = _module(FusedLinearPolicyLoss, batch, spec=_spec(), backend=backend)
    loss: Tensor = head(hidden, batch["completion_ids"], batch["advantages"], **_stored(batch)).loss
    return loss


def _linear_logps(batch: dict[str, Any], backend: str) -> Tensor:
    rest = {
        "completion_mask": batch["completion_mask"],
        "chunk_rows": _CHUNK_ROWS,
        "backend": backend,
    }
    logps: Tensor = linear_token_logps(*_head(batch["logits"]), batch["completion_ids"], **rest)
    return logps


_LOGPS = _statistic("logps", False).plain
_TOP = TopKLogps.__name__

_KEPT = (("logps", "kept"), ("entropies", "kept"), ("entropies", "vocabulary"))


def _kept(hidden: bool) -> dict[str, Judged]:
    return {
        f"{name}, sampling_mask, entropy_over {over}": _masked_statistic(name, over, hidden)
        for name, over in _KEPT
    }


#: What is compared of each op and module.
OPS: dict[str, dict[str, Judged]] = {
    "token_stats": {
        **{name: _statistic(name, False) for name in STATISTICS},
        **{f"{name}, by temperature": _temperature(name) for name in ("logps", "entropies", "lse")},
        **_kept(False),
    },
    "linear_token_logps": {"": Judged(_linear_logps, _LOGPS)},
    "linear_token_stats": {**{name: _statistic(name, True) for name in STATISTICS}, **_kept(True)},
    # An entry of the catalogue compares the other kinds.
    "token_divergence": {
        kind: _divergence(token_divergence, kind, False) for kind in ("generalized_jsd", _TOP)
    },
    "distillation_loss": {
        kind: _divergence(distillation_loss, kind, False) for kind in (*_KINDS, _TOP)
    },
    "linear_token_divergence": {
        kind: _divergence(linear_token_divergence, kind, True) for kind in (*_KINDS, _TOP)
    },
    "linear_distillation_loss": {
        kind: _divergence(linear_distillation_loss, kind, True) for kind in (*_KINDS, _TOP)
    },
    "policy_loss": {
        f"differentiable_inputs, by {name}": _by_stored(name)
        for name in ("old_per_token_logps", "ref_per_token_logps")
    },
    "linear_policy_loss": {f"teacher, {plan}": _taught(plan) for plan in ("one_pass", "two_pass")},
    "FusedLinearLogProbs": {"": Judged(_log_prob_module, _LOGPS)},
    "FusedLinearPolicyLoss": {"": Judged(_policy_loss_module, _plain_policy, reach=_policy_reach)},
}


# ---- the judgement


def compare_op(
    judged: Judged, batch: dict[str, Any], *, backend: str = "auto", loss_scale: float = 1.0
) -> Comparison:
    """Compare the values, and the gradient of their sum with random weights, with those
    of PyTorch in fp64. The criterion is that of :func:`~.testing.compare`.
    """
    single = {
        name: x.float() if isinstance(x, Tensor) and x.dtype.itemsize == 2 else x
        for name, x in batch.items()
    }
    single["completion_mask"] = batch["completion_mask"]
    runs = (
        (lambda b: judged.ours(b, backend), batch),
        (judged.plain, single),
        (judged.plain, double_batch(batch)),
    )
    (value, got), (fp32, rounded), (exact, truth) = (
        _with_gradient(run, b, judged.by, loss_scale) for run, b in runs
    )
    of_values = value_error(value, fp32, exact, judged.size * (exact.abs().max() + 1))
    if judged.by != "logits":
        of_gradient = value_error(got, rounded, truth)
        return Comparison(
            of_values, 0.0, 0.0, 0.0, of_gradient, 0.0, 0.0, judged.by, "two_pass", backend
        )
    is_target = torch.zeros(truth.shape, dtype=torch.bool, device=truth.device)
    is_target.scatter_(-1, batch["completion_ids"][..., None], True)
    up, reach = _upstream(exact, loss_scale).abs(), judged.reach(double_batch(batch))
    floor = ERROR_FLOOR * reach * (up.reshape(*reach.shape, -1).sum(-1) if up.dim() else up)
    parts, worst = gradient_errors(got, rounded, truth, floor[..., None] + 1e-300, is_target)
    return Comparison(
        of_values,
        0.0,
        0.0,
        parts["target"][0],
        parts["rest"][0],
        parts["target"][1],
        parts["rest"][1],
        worst,
        "two_pass",
        backend,
    )


def _upstream(value: Tensor, loss_scale: float) -> Tensor:
    """An upstream gradient with the same numbers in every run."""
    g = torch.Generator().manual_seed(3)
    drawn = (
        torch.randn(value.shape, generator=g, dtype=torch.float64, device="cpu")
        if value.dim()
        else torch.ones((), dtype=torch.float64)
    )
    return loss_scale * drawn.to(value.device, value.dtype)


def _with_gradient(
    run: Callable[[dict[str, Any]], Tensor], batch: dict[str, Any], by: str, loss_scale: float
) -> tuple[Tensor, Tensor]:
    leaf = batch[by].detach().clone().requires_grad_()
    value = run(
        {**{k: x.detach() if isinstance(x, Tensor) else x for k, x in batch.items()}, by: leaf}
    )
    if not value.requires_grad:
        return value, torch.zeros_like(leaf)
    (grad,) = torch.autograd.grad((value * _upstream(value, loss_scale)).sum(), leaf)
    return value.detach(), grad
