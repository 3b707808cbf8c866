"""What a type checker makes of public calls: mypy reads this file with the package, and
nothing runs it. An unused ``type: ignore`` is an error too.
"""

from torch import Tensor
from typing_extensions import assert_type

import reweight_ops as rw


def hyper_parameters(schedule: Tensor, bound: rw.TokenWeight) -> rw.PolicyLossSpec:
    """A hyper-parameter is a number, a tensor, or a formula, and nothing else."""
    rw.methods.dapo(epsilon_low=0.2, epsilon_high=schedule)
    rw.methods.dapo(epsilon_low="0.2")  # type: ignore[arg-type]
    rw.methods.dual_clip_ppo(clip_ratio_c=None)  # type: ignore[arg-type]
    rw.rules.surrogates.Clip(epsilon_low=schedule, epsilon_high=bound)
    rw.rules.surrogates.Clip(epsilon_low="0.2")  # type: ignore[arg-type]
    rw.preference.dpo(beta=[0.1])  # type: ignore[arg-type]
    return rw.methods.grpo(epsilon_high=bound, beta=schedule)


def results(logits: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor) -> None:
    """An option says what comes back."""
    assert_type(rw.token_logps(logits, ids), Tensor)
    assert_type(rw.token_logps(logits, ids, return_entropy=True), tuple[Tensor, Tensor])
    assert_type(rw.linear_token_logps(hidden, weight, ids, temperature=0.7), Tensor)
    assert_type(
        rw.linear_token_logps(hidden, weight, ids, return_entropy=True), tuple[Tensor, Tensor]
    )
    assert_type(rw.policy_loss(logits, ids, 1.0, spec="grpo").loss, Tensor)


def keywords(logits: Tensor, ids: Tensor) -> None:
    """Every keyword is known by name and type."""
    rw.policy_loss(logits, ids, 1.0, spec="grpo", temprature=1.0)  # type: ignore[call-arg]
    rw.policy_loss(logits, ids, 1.0, spec="grpo", temperature="1")  # type: ignore[arg-type]
    rw.divergences.kd(logits, logits, ids, temperature=1.0)  # type: ignore[call-arg]
