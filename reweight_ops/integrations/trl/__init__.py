"""TRL's ``GRPOTrainer`` (1.15 and later) on our ops, as a subclass or a patch.

Two hooks. The default one computes per-token log-probs and entropies and keeps every
loss, metric and scaling of TRL. ``fuse_loss=True`` computes the whole loss and thereby
any of our methods::

    trainer = ReweightGRPOTrainer(
        model=..., reward_funcs=..., args=GRPOConfig(...), train_dataset=...
    )
    # TRL's loss, fused
    trainer = ReweightGRPOTrainer(..., fuse_loss=True)
    # TRL's loss, reweighted
    weight = rw.weights.AdvantageReweighting(alpha=0.3)
    trainer = ReweightGRPOTrainer(..., reweight=weight)
    # another loss
    trainer = ReweightGRPOTrainer(..., spec=rw.methods.gspo_token())
    # one loss for each pass of GRPOConfig(num_iterations=2)
    lopti = [rw.methods.lopti("low"), rw.methods.lopti("high")]
    trainer = ReweightGRPOTrainer(..., spec=lopti)
    # all that a paper trains with
    trainer = ReweightGRPOTrainer(..., recipe="canon")
    # TRL's loss, other advantages
    trainer = ReweightGRPOTrainer(..., advantages="qae")

    with patch_trl(fuse_loss=True):      # scripts that build GRPOTrainer themselves
        main()
    # any trainer: the head that GRPO, RLOO, DPO, KTO, SFT and AsyncGRPO share, and
    # that of distillation
    with patch_trl(heads=True):
        main()

Both work from hidden states and the head's weight (``rw.linear_token_logps``,
``rw.linear_policy_loss``), so that ``[B, T, V]`` logits never exist, as in stock TRL.
Heads that are more than a weight (``lm_head="auto"``: any that the linear ops do not
know) go through their logits. A LoRA adapter on the head, which TRL refuses because its
fused head would ignore it, is trained.

**What it leaves to TRL** is never silent: ``trainer.delegated_calls`` counts it by
reason, ``trainer.fused_calls`` counts what ran here, and each reason is reported once
by a warning. With ``spec=`` or ``reweight=`` handing over would train another method,
so it is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._core.catalogue.recipes import Recipe
from ..._core.engine.output import PolicyLossOutput
from ..._core.formula.base import TokenWeight
from ..._core.losses.linear import linear_policy_loss, linear_token_logps
from ..._core.losses.policy import policy_loss, policy_loss_from_logps
from ..._core.losses.statistics import token_logps
from ..._core.spec.policy import PolicyLossSpec
from ...errors import BackendUnavailable, InvalidCall, UnsupportedRequest
from ...rules.penalties import EntropyBonus
from ..patching import Counts, Patch, Replacement, check_signature, source_digest
from ..trainers import check_version
from .spec import (
    Normalized,
    normalize,
    resolve_passes,
    spec_of_trainer,
    with_weights,
    without_bonus,
)

try:
    import trl
    from trl.trainer.grpo_trainer import GRPOTrainer
except ImportError as error:
    raise BackendUnavailable(
        "reweight_ops.integrations.trl needs TRL: pip install 'trl>=1.15'"
    ) from error

from .divergence import divergence_replacements
from .head import (
    HeadOutput,
    adapters_on_head_allowed,
    adapts_head,
    choose_head,
    fused_forward,
    linear_unsupported_reason,
    logits_of,
)
from .heads import head_replacements
from .probe import Form, Prober
from .rollout import Rollout, choose_recipe, settled

#: The leading parameters of the two methods that are overridden; any further one must
#: be optional.
_SIGNATURES = {
    "_get_per_token_logps_and_entropies": (
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ),
    "_compute_loss": ("self", "model", "inputs"),
}

#: The signatures of the further methods that a recipe needs.
_ROLLOUT_SIGNATURES = {
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("self", "inputs"),
}

#: Source of the ``_compute_loss`` that ``fuse_loss=True`` reproduces: TRL 1.15.0 and
#: 1.16.0.
_KNOWN_LOSSES = ("80295546bbdbf6f7",)

#: The loss's metrics in TRL's log.
_METRICS = (
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_max",
    "cispo_clip_ratio",
)

_MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def check_signatures(trainer_class: type) -> None:
    """Raise :class:`BackendUnavailable` if TRL's methods are not the ones that this
    module overrides.
    """
    for name, expected in (_SIGNATURES | _ROLLOUT_SIGNATURES).items():
        check_signature(f"TRL {trl.__version__}", trainer_class, name, expected)


#: The installed version, for messages.
LIBRARY = check_version("TRL")
check_signatures(GRPOTrainer)


@dataclass(frozen=True)
class Options:
    """See :class:`ReweightGRPOTrainer`."""

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
            and source_digest(original_loss) not in _KNOWN_LOSSES
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
        reason = _token_unsupported_reason(compute_aux_loss, multimodal)
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
        reason = _loss_unsupported_reason(trainer, inputs, own_spec=own_spec)
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
        _log(trainer, "train" if train else "eval", out)
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
            _log_bonus(trainer, "train" if train else "eval", policy.loss)
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


def _token_unsupported_reason(compute_aux_loss: bool, multimodal: dict[str, Any]) -> str | None:
    if compute_aux_loss:
        return "the MoE auxiliary loss"
    given = [name for name, value in multimodal.items() if value is not None]
    return f"multimodal inputs ({', '.join(given)})" if given else None


def _loss_unsupported_reason(trainer: Any, inputs: dict[str, Any], own_spec: bool) -> str | None:
    """Return why TRL has to compute this loss, or None."""
    if trainer.aux_loss_enabled:
        return "the MoE auxiliary loss"
    given = [name for name in _MULTIMODAL if inputs.get(name) is not None]
    if given:
        return f"multimodal inputs ({', '.join(given)})"
    if trainer.off_policy_mask_threshold is not None:
        return "off_policy_mask_threshold"
    if own_spec:
        return None
    if trainer.loss_type == "vespo":
        return "loss_type='vespo'"
    if trainer.use_adaptive_entropy:
        return "use_adaptive_entropy"
    if trainer.top_entropy_quantile < 1 and trainer.accelerator.num_processes > 1:
        return "top_entropy_quantile over several processes"
    return None


def _log(trainer: Any, mode: str, out: PolicyLossOutput) -> None:
    """Log TRL's metrics of the loss, over all processes."""
    metrics = out.metrics if trainer.accelerator.num_processes == 1 else out.metrics.all_reduce()
    values = metrics.as_floats()
    for name in _METRICS:
        if name in values:
            trainer._metrics[mode][name].append(values[name])


def _log_bonus(trainer: Any, mode: str, policy: Tensor) -> None:
    """Log what TRL also logs with an entropy bonus: the loss without it, and its
    coefficient.
    """
    trainer._metrics[mode]["policy_loss"].append(
        trainer.accelerator.gather(policy.detach()).nanmean().item()
    )
    if mode == "train" and trainer.accelerator.sync_gradients:
        trainer._metrics[mode]["entropy_coef"].append(trainer.entropy_coef)


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


def _grpo_replacements(options: Options, total: Counts) -> list[Replacement]:
    logps, loss = (getattr(GRPOTrainer, name) for name in _SIGNATURES)

    def hooks(trainer: Any) -> Hooks:
        if "_reweight_hooks" not in trainer.__dict__:
            trainer._reweight_hooks = Hooks(trainer, options, loss, total)
        return trainer._reweight_hooks  # type: ignore[no-any-return]

    @functools.wraps(logps)
    def patched_logps(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        # reached through super(): it has its own hooks
        if isinstance(trainer, ReweightGRPOTrainer):
            return logps(trainer, *args, **kwargs)
        return hooks(trainer).token_logps(trainer, logps.__get__(trainer), *args, **kwargs)

    # a subclass of ours still finds by it whether it knows TRL's loss
    @functools.wraps(loss)
    def patched_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Any:
        if isinstance(trainer, ReweightGRPOTrainer):
            return loss(trainer, model, inputs)
        return hooks(trainer).loss(trainer, loss.__get__(trainer), model, inputs)

    functions = zip(_SIGNATURES.items(), (patched_logps, patched_loss), strict=True)
    return [
        Replacement(GRPOTrainer, name, function, expected)
        for (name, expected), function in functions
    ]


def patch_trl(
    *,
    heads: bool = False,
    fuse_loss: bool = False,
    spec: PolicyLossSpec | str | Sequence[PolicyLossSpec | str] | None = None,
    reweight: TokenWeight | Sequence[TokenWeight] = (),
    backend: str = "auto",
    consume_logits: bool = False,
    lm_head: str = "auto",
) -> Patch:
    """Put the hooks of :class:`ReweightGRPOTrainer` into ``GRPOTrainer`` itself, for
    scripts that build it.

    ``heads=True`` replaces the head function that all of TRL's trainers share instead,
    and the divergence of its distillation trainer; it takes ``backend`` only. The two
    are independent: enter both patches for GRPO's hooks and the others' head.

    Returns a patch with ``undo()``, ``fused_calls`` and ``delegated_calls``, also a
    context manager. Subclasses that override a hooked method keep theirs. TRL's
    constructor still refuses an adapter on the head.

    Raises:
        InvalidCall: an option that ``heads=True`` does not read, or TRL is patched
            already.
        BackendUnavailable: TRL's functions are not the ones that are replaced here.
    """
    options = Options(fuse_loss, spec, reweight, backend, consume_logits, lm_head)
    total = Counts("TRL")
    if not heads:
        return Patch(LIBRARY, _grpo_replacements(options, total), total)
    ignored = [
        f.name
        for f in dataclasses.fields(options)
        if f.name != "backend" and getattr(options, f.name) != f.default
    ]
    if ignored:
        raise InvalidCall(
            f"patch_trl: heads=True does not read {', '.join(ignored)}, which are GRPO's: enter "
            "a second patch_trl(...) for them."
        )
    return Patch(
        LIBRARY,
        [*head_replacements(backend, total), *divergence_replacements(backend, total)],
        total,
    )
