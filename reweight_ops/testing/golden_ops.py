"""Golden rows of ops and modules, worked out by hand. They have statistics, heads,
teachers and kept ids, and gradients by logits, temperatures and stored log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor

from .._core.calls.keywords import HiddenLogits, Teacher, TopKLogps
from .._core.calls.sampling_mask import SamplingMask
from .._core.engine.output import TokenStats
from .._core.losses.distillation import distillation_loss, token_divergence
from .._core.losses.linear import linear_policy_loss, linear_token_logps, linear_token_stats
from .._core.losses.linear_distillation import linear_distillation_loss, linear_token_divergence
from .._core.losses.policy import policy_loss
from .._core.losses.statistics import token_stats
from ..nn import FusedLinearLogProbs, FusedLinearPolicyLoss
from .golden_row import LN2, LN3, Built, Golden

#: What a gradient is taken by, where a row has it as a tensor. It is the logits or the
#: weight of a head, and whatever else the row has of these.
_FIELDS = ("logits", "lm_head_weight", "temperature", "old_per_token_logps")


def _called(op: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """Every number of the op's result, and the gradient of the sum of the numbers that
    have one.
    """

    def run(**arguments: Any) -> list[Tensor]:
        leaves = {
            name: x.requires_grad_()
            for name, x in arguments.items()
            if name in _FIELDS and isinstance(x, Tensor)
        }
        found = op(**{**arguments, **leaves})
        if isinstance(found, TokenStats):
            values = [getattr(found, name) for name in arguments["stats"]]
        else:
            values = [found if isinstance(found, Tensor) else found.loss]
        total = torch.stack([x.sum() for x in values if x.requires_grad]).sum()
        return [x.detach() for x in values] + list(
            torch.autograd.grad(total, list(leaves.values()))
        )

    return run


def _module(kind: Any, **settings: Any) -> Callable[..., list[Tensor]]:
    """The result of a module with a head's weight, and the gradient by that weight."""

    def run(lm_head_weight: Tensor, **arguments: Any) -> list[Tensor]:
        linear = torch.nn.Linear(
            lm_head_weight.size(1), lm_head_weight.size(0), bias=False, device="meta"
        )
        linear.weight = torch.nn.Parameter(lm_head_weight)
        head = kind.from_linear(linear, **settings)
        found = head(**arguments)
        value = found if isinstance(found, Tensor) else found.loss
        return [value.detach(), *torch.autograd.grad(value.sum(), linear.weight)]

    return run


#: What the rows of an op call.
GOLDEN_OPS: dict[str, Callable[..., list[Tensor]]] = {
    "token_stats": _called(token_stats),
    "linear_token_logps": _called(linear_token_logps),
    "linear_token_stats": _called(linear_token_stats),
    "token_divergence": _called(token_divergence),
    "distillation_loss": _called(distillation_loss),
    "linear_token_divergence": _called(linear_token_divergence),
    "linear_distillation_loss": _called(linear_distillation_loss),
    "policy_loss": _called(policy_loss),
    "linear_policy_loss": _called(linear_policy_loss),
    "FusedLinearLogProbs": _module(FusedLinearLogProbs),
    "FusedLinearPolicyLoss": _module(FusedLinearPolicyLoss, spec="reinforce"),
}


def _op(name: str, expected: Any, **arguments: Any) -> Golden:
    return Golden("op", name, arguments, expected)


#: Logits of p = (1/6, 1/3, 1/2), the same logits as a head over one feature of 1, and
#: their entropy.
THREE, HEAD = [[0.0, LN2, LN3]], {"hidden": [[1.0]], "lm_head_weight": [[0.0], [LN2], [LN3]]}
P3 = (1 / 6, 1 / 3, 1 / 2)
H3 = (LN2 + LN3) / 6 + LN3 / 3 + LN2 / 2
#: Logits of p = (1/4, 3/4) and of q = (1/2, 1/2), and heads that give them.
TWO, TWO_HEAD = [[0.0, LN3]], {"hidden": [[1.0]], "lm_head_weight": [[0.0], [LN3]]}
EVEN = Built(HiddenLogits, {"hidden": [[1.0]], "lm_head_weight": [[0.0], [0.0]]})
#: Their divergences are KL(q‖p) and KL(p‖q). The gradient of the first is p - q, and
#: that of the second is p·(log p - log q - KL).
FORWARD, REVERSE = LN2 + log(4 / 3) / 2 - LN2, LN2 - (LN2 / 2 + 3 / 4 * log(4 / 3))
BY_FORWARD, BY_REVERSE = [-1 / 4, 1 / 4], [1 / 4 * (-LN2 - REVERSE), 3 / 4 * (LN3 - LN2 - REVERSE)]
#: The mixture is m = (3/8, 5/8), and JSD = (KL(q‖m) + KL(p‖m))/2. Its gradient is
#: p·(log p - log m - KL(p‖m))/2.
OF_M = (log(2 / 3), log(6 / 5))
P_TO_M, Q_TO_M = OF_M[0] / 4 + 3 / 4 * OF_M[1], (log(4 / 3) + log(4 / 5)) / 2
JSD, BY_JSD = (P_TO_M + Q_TO_M) / 2, [1 / 8 * (OF_M[0] - P_TO_M), 3 / 8 * (OF_M[1] - P_TO_M)]
#: The teacher gives the third id 1/4 and the student gives it 1/2, so there are two
#: buckets. The derivative by log p of that id is -(1/4 - 3/4) = 1/2, and the logits
#: move that by (-1/6, -1/3, 1/2).
LISTED = Built(TopKLogps, {"token_ids": [[2]], "logps": [[log(1 / 4)]]})
BUCKETS, BY_BUCKETS = -LN2 / 4 + 3 / 4 * log(3 / 2), [-1 / 12, -1 / 6, 1 / 4]

EVERY = {
    "logps": -LN3,
    "entropies": H3,
    "lse": LN2 + LN3,
    "log_sum_p_sq": log(7 / 18),
    "max_logp": -LN2,
    "is_top1": 0,
    "log1m_p": log(2 / 3),
    "mean_logits": (LN2 + LN3) / 3,
    "selected_logps": [-LN2, -LN2 - LN3, 0],
    "topk_logps": [-LN2, -LN3],
    "topk_ids": [2, 1],
}
#: The gradients of the statistics are (-1/6, 2/3, -1/2) of logps, (1/6, 1/3, 1/2) of
#: lse, (2/3, -2/3, 0) of the two selected ids, and (-1/3, 1/3, 0) of the two likeliest.
#: The gradient of the entropy is -p·(log p + H).
BY_EVERY = [a - p * (log(p) + H3) for a, p in zip((1 / 3, 2 / 3, 0), P3, strict=True)]
ASKED: dict[str, Any] = {
    "completion_ids": [1],
    "stats": tuple(EVERY),
    "selected_ids": [[2, 0, -100]],
    "top_k": 2,
}
#: The last two of three ids are kept. Their probabilities are 2/5 and 3/5.
KEPT = Built(SamplingMask, {"token_ids": [2, 1], "offsets": [0, 2]})
MASKED: dict[str, Any] = {
    "completion_ids": [1],
    "stats": ("logps", "entropies"),
    "sampling_mask": KEPT,
}
#: The gradient of the kept entropy is -p·(log p + H), with p over the kept ids.
H2 = 2 / 5 * log(5 / 2) + 3 / 5 * log(5 / 3)
BY_KEPT = [0, 3 / 5 - 2 / 5 * (log(2 / 5) + H2), -3 / 5 - 3 / 5 * (log(3 / 5) + H2)]
BY_WHOLE = [a - p * (log(p) + H3) for a, p in zip((0, 3 / 5, -3 / 5), P3, strict=True)]
#: At T = 1/2, x is z/T. The gradient by z is twice that by x. The gradient by T is -(x
#: - Σp·x)/T of the id.
HALF = [[0.0, LN2 / 2, LN3 / 2]]
MEAN_X = LN2 / 3 + LN3 / 2
#: REINFORCE has A = 2 and an id with p = 3/4. Its gradient by the logits is -2·(1[v =
#: id] - p). One row also has half of KL(p‖q).
REINFORCE: dict[str, Any] = {"completion_ids": [1], "advantages": [2.0]}
BY_REINFORCE = [1 / 2, -1 / 2]

ROWS = (
    _op("token_stats", [*EVERY.values(), BY_EVERY], logits=THREE, **ASKED),
    _op("linear_token_stats", [*EVERY.values(), BY_EVERY], **HEAD, **ASKED),
    _op("token_stats", [log(2 / 5), H2, BY_KEPT], logits=THREE, **MASKED),
    _op("linear_token_stats", [log(2 / 5), H2, BY_KEPT], **HEAD, **MASKED),
    _op(
        "token_stats", [log(2 / 5), H3, BY_WHOLE], logits=THREE, **MASKED, entropy_over="vocabulary"
    ),
    _op(
        "linear_token_stats",
        [log(2 / 5), H3, BY_WHOLE],
        **HEAD,
        **MASKED,
        entropy_over="vocabulary",
    ),
    _op(
        "token_stats",
        [-LN3, [-1 / 3, 4 / 3, -1], -2 * (LN2 - MEAN_X)],
        logits=HALF,
        temperature=[0.5],
        completion_ids=[1],
        stats=("logps",),
    ),
    _op("linear_token_logps", [-LN3, [-1 / 6, 2 / 3, -1 / 2]], **HEAD, completion_ids=[1]),
    _op("FusedLinearLogProbs", [-LN3, [-1 / 6, 2 / 3, -1 / 2]], **HEAD, completion_ids=[1]),
    *(
        _op(
            name,
            [value, by],
            kind=kind,
            **first,
            **{teacher: EVEN if "lm_head_weight" in first else [[0.0, 0.0]]},
        )
        for name, teacher, first in (
            ("distillation_loss", "teacher_logits", {"logits": TWO}),
            ("linear_token_divergence", "other", TWO_HEAD),
            ("linear_distillation_loss", "teacher", TWO_HEAD),
        )
        for kind, value, by in (
            ("forward_kl", FORWARD, BY_FORWARD),
            ("reverse_kl", REVERSE, BY_REVERSE),
            ("generalized_jsd", JSD, BY_JSD),
        )
    ),
    _op("token_divergence", [BUCKETS, BY_BUCKETS], logits=THREE, other_logits=LISTED),
    _op("distillation_loss", [BUCKETS, BY_BUCKETS], logits=THREE, teacher_logits=LISTED),
    _op("linear_token_divergence", [BUCKETS, BY_BUCKETS], **HEAD, other=LISTED),
    _op("linear_distillation_loss", [BUCKETS, BY_BUCKETS], **HEAD, teacher=LISTED),
    _op("FusedLinearPolicyLoss", [2 * log(4 / 3), BY_REINFORCE], **TWO_HEAD, **REINFORCE),
    _op(
        "linear_policy_loss",
        [
            2 * log(4 / 3) + REVERSE / 2,
            [a + b / 2 for a, b in zip(BY_REINFORCE, BY_REVERSE, strict=True)],
        ],
        **TWO_HEAD,
        **REINFORCE,
        spec="reinforce",
        teacher=Built(Teacher, {"logits": EVEN, "coef": 0.5}),
    ),
    # A ratio of 2 at A = -1 is not clipped. The loss is the ratio, and the old log-prob
    # moves it the other way.
    _op(
        "policy_loss",
        [2, [2 * -1 / 4, 2 / 4], -2],
        logits=TWO,
        completion_ids=[1],
        advantages=[-1.0],
        old_per_token_logps=[log(3 / 8)],
        spec="ppo",
        differentiable_inputs=True,
    ),
)
