"""Methods with a teacher's log-probs of the sampled tokens: pass them as
``ref_per_token_logps``.
"""

from __future__ import annotations

from .._core.catalogue.registry import published
from .._core.formula.base import Rule, rule
from .._core.ranges import NonNegative, NonNegativeOrInf, Number, Positive
from .._core.spec.policy import Penalty, PolicyLossSpec
from .._core.spec.reduction import SequenceMean, TokenMean
from ..rules.surrogates import Clip
from ..weights.credit import PrefixDiscrepancy


@rule("gated_distillation", kind="penalty")
class GatedDistillation(Rule):
    """``sg(σ(gate_beta·d))·d``, ``d = ref_logp - logp``. SDAR, arXiv:2605.15155.

    It pulls towards the teacher, more strongly where the teacher is more certain.
    """

    gate_beta: Positive[Number] = 5.0

    def loss(self, xp, t):
        # a teacher's log-prob of -inf closes the gate, and 0·inf is NaN
        d = xp.maximum(t.ref_logp - t.logp, -1e4)
        return xp.stop_gradient(xp.sigmoid(self.gate_beta * d)) * d


@rule("teacher_reinforce")
class TeacherReinforce(Rule):
    """``-(ref_logp - old_logp)·logp``. It does not read advantages.

    This is REINFORCE for the reverse KL: its advantage is the teacher's log-prob minus
    the sampler's.
    """

    def loss(self, xp, t):
        return -(t.ref_logp - t.old_logp) * t.logp


@published(
    "SDAR: self-distilled agentic RL",
    paper="Self-Distilled Agentic Reinforcement Learning",
    arxiv="2605.15155",
    certainty="secondary",
)
def sdar(
    coef: NonNegative[Number] = 0.1,
    gate_beta: Positive[Number] = 5.0,
    epsilon_low: NonNegativeOrInf[Number] = 0.2,
    epsilon_high: NonNegativeOrInf[Number] = 0.2,
) -> PolicyLossSpec:
    """GRPO plus ``coef·mean_t sg(σ(gate_beta·d))·d``, ``d = log p_T - log p``:
    distillation on the tokens of which the teacher is more certain.

    The mean is over all tokens of the call. Differs from the paper: transcribed from
    ms-swift's ``sdar_loss_coef``, a port of the authors' code; 0.1 is the value that it
    names, 0.01 for ALFWorld.
    """
    clip = Clip(epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    gate = Penalty(GatedDistillation(gate_beta=gate_beta), coef, TokenMean(per_call=True))
    return PolicyLossSpec(surrogate=clip, penalties=(gate,), reduction=SequenceMean())


@published(
    "On-policy distillation as policy gradient",
    paper="On-Policy Distillation",
    arxiv="unknown",
    certainty="secondary",
)
def opd() -> PolicyLossSpec:
    """``-(log p_T - log p_old)·logp``, token mean. It does not read advantages.

    This is the policy gradient of the reverse KL to the teacher, on sampled tokens.

    Thinking Machines (a blog post, 2025). ``old_per_token_logps`` are the sampler's.
    The full distributions' KL is ``distillation_loss``.
    """
    return PolicyLossSpec(surrogate=TeacherReinforce())


@published(
    "Importance-Weighted On-Policy Distillation (IW-OPD)",
    paper="On the Position Bias of On-Policy Distillation",
    arxiv="2606.22600",
    certainty="secondary",
    level="token",
)
def iw_opd(gamma: NonNegative[Number] = 1.0) -> PolicyLossSpec:
    """``-w_t·a_t·logp_t``, token mean, ``a = log p_T - log p_old``,
    ``w_t = 1 + γ·(1 - Σ_{s<t}|a_s|/Σ_s|a_s|)``: earlier disagreements count more.

    It does not read advantages. Differs from the paper: transcribed from TRL's
    ``IWOPDTrainer``.
    """
    return PolicyLossSpec(surrogate=TeacherReinforce(), weights=(PrefixDiscrepancy(gamma=gamma),))
