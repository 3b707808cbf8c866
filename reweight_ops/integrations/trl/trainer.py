"""``GRPOTrainer`` with the hooks, as a subclass."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from ..._core.catalogue.recipes import Recipe
from ..._core.formula.base import TokenWeight
from ..._core.spec.policy import PolicyLossSpec
from .head import adapters_on_head_allowed
from .hooks import Hooks, Options
from .rollout import choose_recipe, settled


class ReweightGRPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` on our ops; takes all of its arguments, and these.

    Args:
        fuse_loss: compute the whole loss instead of log-probs and entropies only.
        spec: train with this loss instead of TRL's: a spec, a method's name, or one for
            each of ``num_iterations`` passes over a rollout. GRPOConfig's options of
            TRL's own loss must then be left alone; ``beta`` must be the spec's
            coefficient (TRL computes reference log-probs by it). A ``TokenMean``
            divides by the tokens of the accumulation window, as TRL's dapo does.
        reweight: token weights on top of the loss. Both ``spec`` and ``reweight`` imply
            ``fuse_loss``.
        recipe: train with a :class:`reweight_ops.Recipe`, or one by name: its reward
            transform, advantages, sample weights, schedule and spec. It sets
            GRPOConfig's ``num_iterations`` and ``beta`` where they are the defaults.
            What it reads beside what TRL has (``correct``, ``reference_rewards``, ...)
            are the columns of reward functions of these names; one of weight 0 is not a
            reward.
        rewards, advantages, sample_weights: such a line in place of the recipe's, or
            without one: of a recipe by name (``advantages="qae"``), or by itself
            (``advantages="rw.advantages.qae(rewards, quantile=0.6,
            group_size=group_size)"``).
        backend: as in :func:`reweight_ops.policy_loss`.
        lm_head: ``"linear"``: from hidden states and the head's weight, without logits;
            ``"logits"``: through the model's logits; ``"auto"``: linear where the head
            is a plain ``nn.Linear`` (also one that ``modules_to_save`` trains) with at
            most one plain LoRA adapter, and a probe of the model's own forward finds
            its logits to be the head's (scaled and soft-capped at most).
        consume_logits: write the gradient over the logits (so ``lm_head="logits"``);
            saves one tensor of their size. For models whose forward does not need its
            own logits in backward (autograd raises otherwise).

    Attributes:
        fused_calls: a Counter of the calls that ran here, by op.
        delegated_calls: a Counter of the calls that were left to TRL, by reason.
    """

    def __init__(
        self,
        *args: Any,
        fuse_loss: bool = False,
        spec: PolicyLossSpec | str | Sequence[PolicyLossSpec | str] | None = None,
        reweight: TokenWeight | Sequence[TokenWeight] = (),
        backend: str = "auto",
        consume_logits: bool = False,
        lm_head: str = "auto",
        recipe: Recipe | str | None = None,
        rewards: str | None = None,
        advantages: str | None = None,
        sample_weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        chosen = choose_recipe(
            recipe, rewards=rewards, advantages=advantages, sample_weights=sample_weights
        )
        given = inspect.signature(GRPOTrainer.__init__).bind_partial(self, *args, **kwargs)
        config = settled(given.arguments.get("args"), chosen)
        if config is not None:
            given.arguments["args"] = config
        with adapters_on_head_allowed(getattr(config, "cast_lm_head_to_fp32", False)):
            super().__init__(*given.args[1:], **given.kwargs)
        options = Options(fuse_loss, spec, reweight, backend, consume_logits, lm_head, chosen)
        self._reweight_hooks = Hooks(self, options, GRPOTrainer._compute_loss)

    def _get_per_token_logps_and_entropies(
        self, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self._reweight_hooks.token_logps(
            self, super()._get_per_token_logps_and_entropies, *args, **kwargs
        )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        found = super()._calculate_rewards(*args, **kwargs)
        rollout = self._reweight_hooks.rollout
        return found if rollout is None else rollout.keep_rewards(found)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        rollout = self._reweight_hooks.rollout
        return output if rollout is None else rollout.complete(self, output)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return self._reweight_hooks.loss(self, super()._compute_loss, model, inputs)
