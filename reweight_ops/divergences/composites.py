"""Published losses on two logits tensors or with another normaliser, per token. Each is
a few lines on the fused statistics, or a formula in chunks.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from .._core.calls.keywords import (
    DivergenceKeywords,
    SoftmaxKeywords,
    SoftmaxOptions,
    TemperedKeywords,
    parse,
)
from .._core.calls.logits import resolve_logits
from .._core.calls.sampling_mask import refuse_sampling_mask
from .._core.calls.two_logits import resolve_two_logits
from .._core.catalogue.registry import published
from .._core.engine.chunked_rows import FormulaSource, formula_call
from .._core.engine.run import run
from .._core.losses.distillation import token_divergence
from .._core.losses.explain import by_ranks
from .._core.losses.statistics import token_logps, token_stats
from .._core.ranges import Interval, NonNegative, Number, OpenUnit, Positive, Scalar, Unit
from .._core.rows.grouped import floats
from .._core.rows.numerics import log1mexp
from ..errors import InvalidCall

_OWN = ("completion_mask",)


def _options(op: str, keywords: Any, own: tuple[str, ...]) -> SoftmaxOptions:
    options: SoftmaxOptions = parse(op, dict(keywords), SoftmaxOptions, own=own)[0]
    refuse_sampling_mask(op, options, "this loss is over the whole vocabulary")
    return options


def _label(ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``[n, 1]`` columns, and which ids are columns. On a GPU the ids are
    unchecked.
    """
    inside = ids.clamp(0, x.size(-1) - 1)
    return inside[:, None], inside == ids


@published(
    "Symmetric cross-entropy with a mean teacher",
    level="token",
    plan="two passes",
    arxiv="2211.13081",
    paper="Robust Mean Teacher for Continual and Gradual Test-Time Adaptation",
)
def symmetric_cross_entropy(
    logits: Tensor, teacher_logits: Tensor, **keywords: Unpack[DivergenceKeywords]
) -> Tensor:
    """``-½·Σ q·log p - ½·Σ p·log q`` per token, q the (detached) teacher's: R.

    Arguments of :func:`token_divergence`; the paper's form over three views is a mean
    of such terms.
    """
    return token_divergence(logits, teacher_logits, kind="symmetric_cross_entropy", **keywords)


@published(
    "Confidence-masked consistency (UDA)",
    level="token",
    plan="two passes",
    arxiv="1904.12848",
)
def confidence_masked_kl(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    threshold: OpenUnit[float],
    sharpening_temperature: Positive[float],
    completion_mask: Tensor | None = None,
    **keywords: Unpack[SoftmaxKeywords],
) -> Tensor:
    """``1[max_v q₁(v) > threshold]·KL(q_T‖p)`` per token: R. ``q_T`` is the softmax of
    the teacher's logits over ``sharpening_temperature``, ``q₁`` over 1.

    Tokens on which the teacher is not confident get exactly 0. They count in any mean
    that the caller takes, as in the paper. The other arguments are those of
    :func:`token_divergence`. Differs from the paper: it is per token, where the paper
    has one prediction per example.
    """
    kl = token_divergence(
        logits,
        teacher_logits,
        completion_mask=completion_mask,
        other_temperature=sharpening_temperature,
        **keywords,
    )
    passed: dict[str, Any] = {
        name: value
        for name, value in keywords.items()
        if name in ("vocab_size", "process_group", "backend")
    }
    ids = torch.zeros(kl.shape, dtype=torch.int64, device=kl.device)
    rows = teacher_logits[..., : kl.shape[-1], :]
    top = token_stats(
        rows.detach(), ids, stats=("max_logp",), completion_mask=completion_mask, **passed
    ).max_logp
    assert top is not None
    return torch.where(top > math.log(threshold), kl, 0)


@published(
    "Knowledge distillation beside the labels",
    level="token",
    plan="two passes",
    arxiv="1503.02531",
    certainty="secondary",
)
def kd(
    logits: Tensor,
    teacher_logits: Tensor,
    completion_ids: Tensor,
    *,
    alpha: Unit[float] = 0.5,
    kd_temperature: Positive[float] = 2.0,
    completion_mask: Tensor | None = None,
    **keywords: Unpack[TemperedKeywords],
) -> Tensor:
    """``α·(-log p(y)) + (1-α)·T²·KL(q_T‖p_T)`` per token: R. Softmax of both logits
    over ``kd_temperature`` T in the KL, and over 1 in the first term.

    ``vocab_size``, ``softcap`` and ``backend`` are those of :func:`token_divergence`.
    The defaults are ours: the paper gives the first term less weight, in its section
    4.1 "a relative weight of 0.5". The logits are read twice.
    """
    for name in ("temperature", "other_temperature"):
        if name in keywords:
            raise InvalidCall(
                f"kd: {name} is not read: kd_temperature is the temperature of both "
                "distributions in the KL, and that of the labels is 1."
            )
    ce: Tensor = -token_logps(logits, completion_ids, completion_mask=completion_mask, **keywords)
    both: dict[str, Any] = {
        "completion_mask": completion_mask,
        "temperature": kd_temperature,
        "other_temperature": kd_temperature,
        **keywords,
    }
    return alpha * ce + (1 - alpha) * kd_temperature**2 * token_divergence(
        logits, teacher_logits, **both
    )


@published(
    "SuperHF: likelihood of the best completions with a KL prior",
    level="token",
    plan="two passes",
    arxiv="2310.16763",
    paper="SuperHF: Supervised Iterative Learning from Human Feedback",
)
def superhf(
    logits: Tensor,
    reference_logits: Tensor,
    completion_ids: Tensor,
    *,
    beta: NonNegative[Number] = 0.35,
    completion_mask: Tensor | None = None,
    **keywords: Unpack[SoftmaxKeywords],
) -> Tensor:
    """``-log p(y) + beta·KL(p_0‖p)`` per token: R. ``p_0`` is that of
    ``reference_logits``, the model before the training.

    The completions are the best of many (16 in the authors' configuration) by reward:
    ``sample_weights.raft`` gives 1 to them and 0 to the others; times the mask it is
    ``completion_mask``. 0.35 is the authors' ``kl_coefficient``. The other arguments
    are those of :func:`token_divergence`. The logits are read twice.

    Differs from the paper: from the authors' code, where the KL is at the position
    after each token, is a mean over each completion, and is summed over the
    completions of a mini-batch.
    """
    nll: Tensor = -token_logps(logits, completion_ids, completion_mask=completion_mask, **keywords)
    kl = token_divergence(logits, reference_logits, completion_mask=completion_mask, **keywords)
    return nll + beta * kl


@published(
    "Plackett-Luce Distillation",
    level="token",
    plan="composite",
    arxiv="2506.12542",
    certainty="verified",
    paper="PLD: A Choice-Theoretic List-Wise Knowledge Distillation",
)
@by_ranks
def pld(
    logits: Tensor,
    teacher_logits: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    teacher_temperature: Positive[Number] = 1.0,
    **keywords: Unpack[SoftmaxKeywords],
) -> Tensor:
    """``Σ_k q[π_k]·(log Σ_{j≥k} e^(s[π_j]) - s[π_k])`` per token: R.

    π: the label first, then the other tokens by descending teacher logit; q the
    teacher's softmax over ``teacher_temperature``; s the student's logits. With q on
    the label alone it is cross-entropy. A sort and a suffix log-sum-exp of the whole
    vocabulary, in chunks of rows.
    """
    op = "pld"
    call = resolve_two_logits(
        op,
        logits,
        teacher_logits,
        completion_mask,
        _options(op, keywords, (*_OWN, "teacher_temperature")),
        teacher_temperature,
        None,
        {"completion_ids": completion_ids},
    )

    def rows(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        q = torch.softmax(t, -1)
        label, valid = _label(y, t)
        order = t.scatter(-1, label, math.inf).sort(dim=-1, descending=True, stable=True).indices
        s, q = s.gather(-1, order), q.gather(-1, order)
        # The sum runs from the end. A tail of -inf logits has no sum, and its q must be
        # 0.
        tail = torch.logcumsumexp(s.flip(-1), -1).flip(-1)
        losses = torch.where(
            q == 0, 0, q * (torch.where(q == 0, 0, tail) - torch.where(q == 0, 0, s))
        )
        return torch.where(valid, losses.sum(-1), math.nan)

    return run(formula_call(FormulaSource(call, rows, reads_ids=True)))


@published(
    "Dual-Head Knowledge Distillation (the auxiliary head's loss)",
    level="token",
    plan="composite",
    arxiv="2411.08937",
    paper="Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
)
@by_ranks
def dhkd(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    completion_mask: Tensor | None = None,
    temperature: Annotated[float, Interval("(0, inf)", fixed=True)] = 2.0,
    **keywords: Unpack[TemperedKeywords],
) -> Tensor:
    """``T²·Σ_v log cosh((s_v - t_v)/(2T))`` per token: R. ``logits`` s are the
    auxiliary head's; no softmax. Gradient ``T/2·tanh((s-t)/(2T))``.

    It is the released code's ``T²·Σ_v KL(½‖σ(d)) + KL(½‖1-σ(d))``, ``d = (s-t)/T``,
    without its ε. The main head keeps its cross-entropy; T is 2 there.
    """
    op = "dhkd"
    call = resolve_two_logits(
        op,
        logits,
        teacher_logits,
        completion_mask,
        _options(op, keywords, (*_OWN, "temperature")),
        None,
        None,
        {},
    )

    def rows(s: Tensor, t: Tensor) -> Tensor:
        # A column that is masked in both counts as equal.
        masked = (s == -math.inf) & (t == -math.inf)
        u = (torch.where(masked, 0, s - t) / (2 * temperature)).abs()
        return (u + torch.log1p(torch.exp(-2 * u)) - math.log(2)).sum(-1, keepdim=True)

    def value(sums: Tensor) -> Tensor:
        return temperature**2 * sums[:, 0]

    return run(formula_call(FormulaSource(call, rows, value)))


@published(
    "Label-distributionally robust loss (LDR-KL)",
    level="token",
    plan="two passes",
    arxiv="2112.14869",
)
def ldr(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    lambda_: Positive[Scalar] = 1.0,
    margin: NonNegative[Number] = 0.1,
    completion_mask: Tensor | None = None,
    **keywords: Unpack[TemperedKeywords],
) -> Tensor:
    """``λ·log( 1/V·Σ_k exp((c·1[k≠y] + f_k - f_y)/λ) )`` per token: R. c is ``margin``;
    λ = 1 and c = 0 is cross-entropy less log V.

    It equals ``λ·(log(1 + (1/p - 1)·e^(c/λ)) - log V)`` with p the label's probability
    at temperature λ. It therefore needs only the label's log-prob and runs on every
    backend. Where p is 1 in fp32, ``1/p - 1`` counts as 2⁻²⁴, so ``c/λ`` should stay
    below about 10. ``lambda_`` is a number, or one per row (ALDR's state). With
    ``process_group``, ``vocab_size`` is required. Differs from the paper: the released
    code first rescales the logits (softplus over its mean, or over the mean absolute
    value). Here they are not rescaled.
    """
    if "temperature" in keywords:
        raise InvalidCall("ldr: the temperature is called lambda_ here.")
    if keywords.get("process_group") is not None and keywords.get("vocab_size") is None:
        raise InvalidCall(
            "ldr: process_group needs vocab_size: the loss is relative to log V, and a rank "
            "sees only its own columns: pass V."
        )
    logp = token_logps(
        logits, completion_ids, completion_mask=completion_mask, temperature=lambda_, **keywords
    )
    columns = keywords.get("vocab_size") or logits.shape[-1]
    loss = lambda_ * (F.softplus(log1mexp(logp) - logp + margin / lambda_) - math.log(columns))
    keep = completion_ids != -100
    return torch.where(keep if completion_mask is None else keep & (completion_mask != 0), loss, 0)


@published(
    "Adaptive LDR-KL",
    level="sample",
    plan="two passes",
    arxiv="2112.14869",
)
def aldr(
    entropies: Tensor,
    vocab_size: Annotated[int, Interval("[2, inf)", whole=True)],
    *,
    lambda0: Positive[float],
    alpha: Positive[float],
) -> Tensor:
    """The next λ of :func:`ldr` for every row: ``λ ← λ₀ - λ₀·KL(p‖U)/(α·log V)``,
    ``KL(p‖U) = log V - H(p)``.

    ``entropies`` are those of the softmax at the row's current λ
    (``token_logps(..., temperature=lambda_, return_entropy=True)``), in any shape. The
    result is detached. λ is a state of the example: an uncertain row keeps λ₀, and a
    sure one gets a smaller λ. Differs from the paper: the code adds 1e-5 to p before
    its entropy, and a term ``-α·log V/(2·λ₀)·(λ - λ₀)²`` without a gradient to the
    loss.
    """
    log_v = math.log(vocab_size)
    return lambda0 - lambda0 * (log_v - floats("aldr", "entropies", entropies)) / (alpha * log_v)


@published(
    "StableMax cross-entropy",
    level="token",
    plan="composite",
    arxiv="2501.04697",
    paper="Grokking at the Edge of Numerical Stability",
)
@by_ranks
def stablemax(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    completion_mask: Tensor | None = None,
    **keywords: Unpack[SoftmaxKeywords],
) -> Tensor:
    """``-log( s(z_y) / Σ_v s(z_v) )`` per token with ``s(x) = x + 1`` for ``x ≥ 0``,
    else ``1/(1 - x)``: R. Not invariant under shifts of the logits.

    Differs from the paper: in fp32 (fp64 for fp64 logits), where it computes in fp64;
    without its ε of 1e-30.
    """
    op = "stablemax"
    call = resolve_logits(
        op,
        logits,
        completion_ids,
        _options(op, keywords, _OWN),
        {"completion_mask": completion_mask},
    )

    def rows(x: Tensor, y: Tensor) -> Tensor:
        # Each branch sees only arguments of its own sign, so that no gradient is NaN.
        s = torch.where(x >= 0, x.clamp(min=0) + 1, 1 / (1 - x.clamp(max=0)))
        if not x.size(-1):  # a shard without columns
            return s.sum(-1, keepdim=True).expand(-1, 3)
        label, valid = _label(y, x)
        own = torch.where(valid, s.gather(-1, label)[:, 0], 0)
        return torch.stack([s.sum(-1), own, valid.to(x.dtype)], -1)

    def value(sums: Tensor) -> Tensor:
        # A row without a valid id is NaN, and no NaN goes back through a logarithm.
        found = sums[:, 2] > 0
        known = torch.where(found[:, None], sums, 1)
        return torch.where(found, known[:, 0].log() - known[:, 1].log(), math.nan)

    return run(formula_call(FormulaSource(call, rows, value, reads_ids=True)))
