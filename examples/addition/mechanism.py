"""The mechanism of advantage reweighting: the tokens that the gradient comes from.

The loss's gradient by one token's logits is ``coef * (onehot - p)``, with norm ``|coef|
* sqrt(1 - 2 p_y + sum p^2)``, which is large for unlikely tokens. AR (arXiv:2505.12929)
multiplies coef by ``alpha p_y + 1 - alpha``, which reduces their share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import reweight_ops as rw

PLAIN = rw.methods.trl("dapo")
REWEIGHTED = PLAIN.with_weight(rw.weights.AdvantageReweighting(alpha=0.3))


class TokenGradients(NamedTuple):
    """For each token with an advantage: its probability, and the norm of the gradient
    by its logits.
    """

    probability: Tensor
    plain: Tensor
    reweighted: Tensor


@torch.no_grad()
def token_gradients(model: Any, rollout: dict[str, Any], temperature: float) -> TokenGradients:
    """Gradients of a rollout's tokens under the current model."""
    ids, mask = rollout["completion_ids"], rollout["completion_mask"]
    logits = model(
        input_ids=torch.cat([rollout["prompt_ids"], ids], 1),
        attention_mask=torch.cat([rollout["prompt_mask"], mask], 1),
        logits_to_keep=ids.size(1) + 1,
    ).logits
    stats = rw.token_stats(
        logits,
        ids,
        stats=("logps", "log_sum_p_sq"),
        completion_mask=mask,
        temperature=temperature,
        drop_last=True,
    )
    p = stats.logps.exp()
    direction = (1 - 2 * p + stats.log_sum_p_sq.exp()).clamp(min=0).sqrt() / temperature

    def norms(spec: rw.PolicyLossSpec) -> Tensor:
        out = rw.policy_loss_from_logps(
            stats.logps,
            rollout["advantages"],
            spec=spec,
            completion_mask=mask,
            num_items_in_batch=mask.sum(),
        )
        return out.coef.abs() * direction

    plain, reweighted = norms(PLAIN), norms(REWEIGHTED)
    moving = (mask != 0) & (plain > 0)
    return TokenGradients(p[moving], plain[moving], reweighted[moving])


class QuartileShares(NamedTuple):
    """For each quartile of token probability: its upper bound, and its share of the
    summed norms.
    """

    upper: list[float]
    plain: list[float]
    reweighted: list[float]


def quartile_shares(parts: list[TokenGradients]) -> QuartileShares:
    probability, plain, reweighted = (torch.cat(column) for column in zip(*parts, strict=True))
    if len(probability) < 4:
        raise SystemExit(
            "No group of completions had different rewards, so no token has a gradient: set "
            "--warm-start to more steps."
        )
    quarters = probability.argsort().tensor_split(4)

    def shares(norm: Tensor) -> list[float]:
        return [(norm[quarter].sum() / norm.sum()).item() for quarter in quarters]

    return QuartileShares(
        [probability[quarter].max().item() for quarter in quarters],
        shares(plain),
        shares(reweighted),
    )
