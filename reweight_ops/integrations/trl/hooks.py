"""The two hooks: log-probs with entropies, and the whole loss."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor

from ..._core.catalogue.recipes import Recipe
from ..._core.engine.output import PolicyLossOutput
from ..._core.formula.base import TokenWeight
from ..._core.losses.linear import linear_policy_loss, linear_token_logps
from ..._core.losses.policy import policy_loss, policy_loss_from_logps
from ..._core.losses.statistics import token_logps
from ..._core.spec.policy import PolicyLossSpec
from ...errors import InvalidCall, UnsupportedRequest
from ...rules.penalties import EntropyBonus
from ..patching import Counts, source_digest
from . import library
from .delegated import loss_unsupported_reason, token_unsupported_reason
from .head import (
    HeadOutput,
    adapts_head,
    choose_head,
    fused_forward,
    linear_unsupported_reason,
    logits_of,
)
from .metrics import log, log_bonus
from .probe import Form, Prober
from .rollout import Rollout
from .spec import (
    Normalized,
    normalize,
    resolve_passes,
    spec_of_trainer,
    with_weights,
    without_bonus,
)


@dataclass(frozen=True)
class Options:
    """See :class:`~.trainer.ReweightGRPOTrainer`."""

    fuse_loss: bool = False
    spec: PolicyLossSpec | str | Sequence[PolicyLossSpec | str] | None = None
    reweight: TokenWeight | Sequence[TokenWeight] = ()
    backend: str = "auto"
    consume_logits: bool = False
    lm_head: str = "auto"
    recipe: Recipe | None = None

    @property
    def weights(self) -> tuple[TokenWeight, ...]:
        return (self.reweight,) if isinstance(self.reweight, TokenWeight) else tuple(self.reweight)

    @property
    def own_method(self) -> bool:
        """Return whether the loss is not TRL's."""
        of_recipe = self.recipe is not None and bool(
            self.recipe.spec or self.recipe.sample_weights or self.recipe.keywords
        )
        return self.spec is not None or bool(self.weights) or of_recipe


class Hooks:
    """The two hooks for one trainer. ``original`` is TRL's method, bound."""

    def __init__(
        self,
        trainer: Any,
        options: Options,
        original_loss: Callable[..., Any],
        total: Counts | None = None,
    ) -> None:
        if options.spec is not None and options.recipe is not None and options.recipe.spec:
            raise InvalidCall(
                f"spec= and recipe {options.recipe.name!r} both set the loss; give one of them."
            )
        self.options = options
        self.rollout = None if options.recipe is None else Rollout(trainer, options.recipe)
        self.fused = options.fuse_loss or options.own_method
        self.passes = () if options.spec is None else resolve_passes(options.spec, trainer.args)
        self.head = choose_head(options.lm_head, options.consume_logits)
        self.prober = Prober()
        self.counts = Counts("TRL", total)
        trainer.fused_calls, trainer.delegated_calls = (
            self.counts.fused_calls,
            self.counts.delegated_calls,
        )
        if (
            self.fused
            and not self.passes
            and self._of_recipe is None
            and source_digest(original_loss) not in library.KNOWN_LOSSES
        ):
            warnings.warn(
                f"TRL {trl.__version__} has a loss that fuse_loss=True was not checked against: "
                "it may lack what TRL added. "
                "The default hook (fuse_loss=False) keeps TRL's own loss.",
                stacklevel=3,
            )

    # --- log-probs and entropies ------------------------------------------------------
    def token_logps(
        self,
        trainer: Any,
        original: Callable[..., Any],
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return ``[B,T]`` log-probs and entropies of the last ``logits_to_keep``
        tokens, 0 where masked. Both are differentiable.
        """
        reason = token_unsupported_reason(compute_aux_loss, multimodal)
        chunks = {"batch_size": batch_size, "compute_entropy": compute_entropy}
        if reason is not None:
            self._leave_to_trl(trainer, model, reason)
            return original(  # type: ignore[no-any-return]
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                **chunks,
                compute_aux_loss=compute_aux_loss,
                **multimodal,
            )
        form = self._linear_form(trainer, model)
        if form is not None:
            self.counts.ran("linear_token_logps")
            mask = attention_mask[:, -logits_to_keep:]
            batches = iter(
                zip(
                    *(
                        torch.split(x, batch_size or len(x))
                        for x in (input_ids[:, -logits_to_keep:], mask)
                    ),
                    strict=True,
                )
            )

            def compute(hidden: Tensor, head: dict[str, Any]) -> HeadOutput:
                ids, mask = next(batches)
                options = {
                    "completion_mask": mask,
                    "return_entropy": compute_entropy,
                    **self._head_options(trainer),
                }
                found = linear_token_logps(
                    hidden, head.pop("lm_head_weight"), ids, compact_rows=True, **head, **options
                )
                return HeadOutput(
                    log_probs=found[0] if compute_entropy else found,
                    entropy=found[1] if compute_entropy else None,
                )

            with fused_forward(trainer, model, logits_to_keep, form, compute):
                return original(model, input_ids, attention_mask, logits_to_keep, **chunks)  # type: ignore[no-any-return]
        self.counts.ran("token_logps")
        parts = []
        for ids, mask in zip(
            *(torch.split(x, batch_size or len(x)) for x in (input_ids, attention_mask)),
            strict=True,
        ):
            parts.append(
                token_logps(
                    logits_of(trainer, model, ids, mask, logits_to_keep),
                    ids[:, -logits_to_keep:],
                    completion_mask=mask[:, -logits_to_keep:],
                    return_entropy=True,
                    drop_last=True,
                    consume_logits=self.options.consume_logits,
                    **self._head_options(trainer),
                )
            )
        logps, entropies = (torch.cat(x) for x in zip(*parts, strict=True))
        return logps, entropies if compute_entropy else None, None

    # --- the loss ---------------------------------------------------------------------
    def loss(
        self, trainer: Any, original: Callable[..., Any], model: Any, inputs: dict[str, Any]
    ) -> Tensor:
        """Return the loss of one micro-batch, scaled as TRL scales it, and log TRL's
        metrics.
        """
        if not self.fused:
            return original(model, inputs)  # type: ignore[no-any-return]
        own_spec = bool(self.passes) or self._of_recipe is not None
        reason = loss_unsupported_reason(trainer, inputs, own_spec=own_spec)
        if reason is not None:
            if self.options.own_method:
                raise UnsupportedRequest(
                    f"spec=, reweight= or recipe= cannot be combined with {reason}; TRL alone "
                    "would train another method."
                )
            self._leave_to_trl(trainer, model, reason)
            return original(model, inputs)  # type: ignore[no-any-return]
        train = trainer.model.training
        spec, scaling = self._normalized(trainer, self._spec(trainer, inputs), inputs, train)
        mask = inputs["completion_mask"]
        data = {
            "completion_mask": mask * inputs["tool_mask"] if "tool_mask" in inputs else mask,
            "old_per_token_logps": inputs.get("old_per_token_logps"),
            "ref_per_token_logps": inputs.get("ref_per_token_logps"),
            "sampling_per_token_logps": inputs.get("sampling_per_token_logps"),
            "unused": "ignore",  # TRL passes what it has
        }
        if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
            data["importance_sampling_ratio"] = inputs["importance_sampling_ratio"]
        if self.rollout is not None:
            data |= self.rollout.keywords(trainer, inputs)
        options = {"spec": spec, **self._head_options(trainer), **data, **scaling}
        out = self._policy_loss(trainer, model, inputs, options)
        log(trainer, "train" if train else "eval", out)
        if any(isinstance(p.rule, EntropyBonus) for p in spec.penalties):
            bare, scaling = self._normalized(trainer, without_bonus(spec), inputs, train)
            scaling.pop("loss_scale", None)
            policy = policy_loss_from_logps(
                out.per_token_logps,
                inputs["advantages"],
                spec=bare,
                entropies=out.entropies,
                **data,
                **scaling,
            )
            log_bonus(trainer, "train" if train else "eval", policy.loss)
        return out.loss

    def _policy_loss(
        self, trainer: Any, model: Any, inputs: dict[str, Any], options: dict[str, Any]
    ) -> PolicyLossOutput:
        """Return the loss of the completions, without logits if the head allows it."""
        ids, advantages = inputs["completion_ids"], inputs["advantages"]
        all_ids = torch.cat([inputs["prompt_ids"], ids], dim=1)
        all_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        form = self._linear_form(trainer, model)
        if form is None:
            self.counts.ran("policy_loss")
            logits = logits_of(trainer, model, all_ids, all_mask, ids.size(1))
            return policy_loss(
                logits,
                ids,
                advantages,
                drop_last=True,
                consume_logits=self.options.consume_logits,
                **options,
            )
        self.counts.ran("linear_policy_loss")
        found: list[PolicyLossOutput] = []

        def compute(hidden: Tensor, head: dict[str, Any]) -> HeadOutput:
            found.append(
                linear_policy_loss(
                    hidden,
                    head.pop("lm_head_weight"),
                    ids,
                    advantages,
                    compact_rows=True,
                    **head,
                    **options,
                )
            )
            return HeadOutput(loss=found[0].loss)

        with (
            fused_forward(trainer, model, ids.size(1), form, compute),
            trainer.accelerator.autocast(),
        ):
            loss = model(input_ids=all_ids, attention_mask=all_mask, fused_lm_head=True).loss
        # This is the loss as the wrapped model returns it. DDP and FSDP may have put
        # their own node around it.
        return dataclasses.replace(found[0], loss=loss)

    def _linear_form(self, trainer: Any, model: Any) -> Form | None:
        """Return how the head's logits follow from hidden states, or None if the logits
        are built.

        The facts that decide it may change between calls (adapters are switched off for
        the reference).
        """
        if self.head == "logits":
            return None
        reason = linear_unsupported_reason(trainer, model)
        form = (
            Form(unsupported_reason=reason)
            if reason is not None
            else self.prober.form(trainer, model)
        )
        if form.unsupported_reason is None:
            return form
        if self.head == "linear":
            raise UnsupportedRequest(
                f"lm_head='linear' is impossible with {form.unsupported_reason}; lm_head='auto' "
                "or 'logits' builds the logits."
            )
        self.counts.warn_once(f"reweight_ops builds the logits: {form.unsupported_reason}.")
        return None

    def _head_options(self, trainer: Any) -> dict[str, Any]:
        return {"temperature": trainer.temperature, "backend": self.options.backend}

    @property
    def _of_recipe(self) -> Rollout | None:
        """Return the rollout whose recipe has a spec."""
        return self.rollout if self.rollout is not None and self.rollout.recipe.spec else None

    def _spec(self, trainer: Any, inputs: dict[str, Any]) -> PolicyLossSpec:
        passes = self.passes if self._of_recipe is None else self._of_recipe.specs(trainer, inputs)
        if passes:
            spec = passes[trainer._step // trainer.args.steps_per_generation % len(passes)]
        else:
            spec = spec_of_trainer(trainer)
        return with_weights(spec, self.options.weights) if self.options.weights else spec

    @staticmethod
    def _normalized(
        trainer: Any, spec: PolicyLossSpec, inputs: dict[str, Any], train: bool
    ) -> Normalized:
        return normalize(
            spec,
            accumulation_steps=trainer.current_gradient_accumulation_steps if train else 1,
            num_items=inputs["num_items_in_batch"],
            num_processes=trainer.accelerator.num_processes,
            steps_per_generation=trainer.args.steps_per_generation if train else 1,
        )

    def _leave_to_trl(self, trainer: Any, model: Any, reason: str) -> None:
        if adapts_head(trainer, model):
            raise UnsupportedRequest(
                f"{reason} is left to TRL, whose fused head would ignore the adapter on lm_head."
            )
        self.counts.left(reason)
