"""Recipes: known terms with the reduction, bounds and additions that a report trains
with.
"""

from __future__ import annotations

from torch import Tensor

from .._core.catalogue.registry import published
from .._core.ranges import Count, NonNegative, NonNegativeOrInf, Number, PositiveOrInf
from .._core.spec.policy import Penalty, PolicyLossSpec
from .._core.spec.reduction import PromptMean, TokenMean
from ..rules.likelihood import NLL
from ..rules.surrogates import Cispo, Clip
from ..weights.groups import Precomputed
from ..weights.probability import SignWeight


@published(
    "ScaleRL's loss: CISPO with a prompt average",
    paper="The Art of Scaling Reinforcement Learning Compute for LLMs",
    arxiv="2510.13786",
    certainty="secondary",
)
def scale_rl(
    ratio_max: PositiveOrInf[Number] = 5.0, group_size: Count[int] | None = None
) -> PolicyLossSpec:
    """``-sg(min(r, ratio_max))·A·logp``, the mean over all tokens of a prompt's
    responses, then over prompts.

    ``group_size`` consecutive sequences share a prompt, or the call's ``group_ids``
    tell. The rest of the recipe is outside of the loss: advantages over the batch's
    standard deviation (``advantages.grpo(scale_rewards="batch")``), logits in fp32, and
    prompts without variance left out. The default 5.0 is that of TRL's documentation.
    """
    return PolicyLossSpec(
        surrogate=Cispo(ratio_max=ratio_max), reduction=PromptMean(group_size=group_size)
    )


@published(
    "VAPO's policy loss: clip-higher with an NLL of correct responses",
    paper="VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks",
    arxiv="2504.05118",
    certainty="secondary",
)
def vapo(
    mu: NonNegative[Number] = 0.1,
    correct: Tensor | None = None,
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.28,
) -> PolicyLossSpec:
    """Clip, token mean, plus ``mu·NLL``, the mean over the tokens of correct responses.

    ``correct`` is a tensor, 1 for a correct response and 0 otherwise, one per sequence
    or token. None means ``A > 0``, which is the same for advantages by outcome. VAPO's
    own advantages come from a critic (``advantages.decoupled_gae``) and may have either
    sign inside a response: pass ``correct``. Its value loss is not included.
    """
    weight = (
        SignWeight(positive=1.0, negative=0.0) if correct is None else Precomputed(values=correct)
    )
    imitation = Penalty(NLL(), mu, TokenMean(weight=weight))
    return PolicyLossSpec(
        surrogate=Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high), penalties=(imitation,)
    )
