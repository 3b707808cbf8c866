"""TRL's ``GRPOTrainer`` (1.15 and later) on our ops, as a subclass or a patch.

Two hooks. The default one computes per-token log-probs and entropies (``rw.token_logps``) and keeps every loss, metric and scaling of
TRL. ``fuse_loss=True`` computes the whole loss from logits (``rw.policy_loss``) and thereby any of our methods::

    trainer = ReweightGRPOTrainer(model=..., reward_funcs=..., args=GRPOConfig(...), train_dataset=...)
    trainer = ReweightGRPOTrainer(..., fuse_loss=True)                                        # TRL's loss, fused
    trainer = ReweightGRPOTrainer(..., reweight=rw.weights.AdvantageReweighting(alpha=0.3))   # TRL's loss, reweighted
    trainer = ReweightGRPOTrainer(..., spec=rw.methods.gspo_token())                          # another loss
    trainer = ReweightGRPOTrainer(..., spec=[rw.methods.lopti("low"), rw.methods.lopti("high")])   # GRPOConfig(num_iterations=2)

    with patch_trl(fuse_loss=True):      # scripts that build GRPOTrainer themselves
        main()

**What it is for.** Stock TRL fuses the LM head into its log-probs and never builds logits; this drop-in does build them. It is about
exactness, entropy gradients and reweighting, not about memory against stock TRL.

**What it leaves to TRL** is never silent: ``trainer.delegated_calls`` counts it by reason, ``trainer.fused_calls`` counts what ran
here, and each reason is reported once by a warning. With ``spec=`` or ``reweight=`` handing over would train another method, so it is
an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable, InvalidCall, UnsupportedRequest
from ..output import PolicyLossOutput
from ..policy_loss import policy_loss, policy_loss_from_logps, token_logps
from ..rules.base import TokenWeight
from ..rules.penalties import EntropyBonus
from ..spec import PolicyLossSpec
from .trl_spec import Normalized, normalize, resolve_passes, spec_of_trainer, with_weights, without_bonus

try:
    import trl
    from trl.trainer.grpo_trainer import GRPOTrainer
except ImportError as error:
    raise BackendUnavailable("reweight_ops.integrations.trl needs TRL: pip install 'trl>=1.15'") from error

#: The leading parameters of the two methods that are overridden; any further one must be optional.
_SIGNATURES = {
    "_get_per_token_logps_and_entropies": (
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy", "compute_aux_loss",
    ),
    "_compute_loss": ("self", "model", "inputs"),
}  # fmt: skip

#: Source of the ``_compute_loss`` that ``fuse_loss=True`` reproduces: TRL 1.15.0 and 1.16.0.
_KNOWN_LOSSES = ("80295546bbdbf6f7",)

#: The loss's metrics in TRL's log.
_METRICS = (
    "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "clip_ratio/low_min", "clip_ratio/high_max",
    "cispo_clip_ratio",
)  # fmt: skip

_MULTIMODAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes", "token_type_ids",
    "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


def check_signatures(trainer_class: type) -> None:
    """Raise :class:`BackendUnavailable` if TRL's methods are not the ones that this module overrides."""
    for name, expected in _SIGNATURES.items():
        function = getattr(trainer_class, name, None)
        parameters = [] if function is None else list(inspect.signature(function).parameters.values())
        rest = parameters[len(expected) :]
        if tuple(p.name for p in parameters[: len(expected)]) != expected or any(p.default is p.empty for p in rest):
            found = "does not exist" if function is None else f"has the signature {inspect.signature(function)}"
            raise BackendUnavailable(
                f"TRL {trl.__version__}: {trainer_class.__name__}.{name} {found}, expected ({', '.join(expected)}, optional ...); "
                "this integration is for TRL 1.15 and later versions with that signature."
            )


check_signatures(GRPOTrainer)


def loss_digest(function: Callable[..., Any]) -> str:
    """A fingerprint of a function's source."""
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Options:
    """See :class:`ReweightGRPOTrainer`."""

    fuse_loss: bool = False
    spec: PolicyLossSpec | str | Sequence[PolicyLossSpec | str] | None = None
    reweight: TokenWeight | Sequence[TokenWeight] = ()
    backend: str = "auto"
    consume_logits: bool = False

    @property
    def weights(self) -> tuple[TokenWeight, ...]:
        return (self.reweight,) if isinstance(self.reweight, TokenWeight) else tuple(self.reweight)

    @property
    def own_method(self) -> bool:
        """Whether the loss is not TRL's."""
        return self.spec is not None or bool(self.weights)


class Hooks:
    """The two hooks for one trainer. ``original`` is TRL's method, bound."""

    def __init__(self, trainer: Any, options: Options, original_loss: Callable[..., Any]) -> None:
        self.options = options
        self.fused = options.fuse_loss or options.own_method
        self.passes = () if options.spec is None else resolve_passes(options.spec, trainer.args)
        self.warned: set[str] = set()
        trainer.fused_calls = Counter()
        trainer.delegated_calls = Counter()
        if self.fused and not self.passes and loss_digest(original_loss) not in _KNOWN_LOSSES:
            warnings.warn(
                f"TRL {trl.__version__} has a loss that fuse_loss=True was not checked against: it may lack what TRL added. "
                "The default hook (fuse_loss=False) keeps TRL's own loss.",
                stacklevel=3,
            )

    # --- log-probs and entropies ----------------------------------------------------------------------------------------------
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
        """``[B,T]`` log-probs and entropies of the last ``logits_to_keep`` tokens, 0 where masked; both differentiable."""
        reason = _token_obstacle(compute_aux_loss, multimodal)
        if reason is not None:
            self._report(trainer, reason)
            chunks = {"batch_size": batch_size, "compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
            return original(model, input_ids, attention_mask, logits_to_keep, **chunks, **multimodal)  # type: ignore[no-any-return]
        trainer.fused_calls["token_logps"] += 1
        parts = []
        for start in range(0, len(input_ids), batch_size or len(input_ids)):
            ids, mask = (x[start : start + (batch_size or len(x))] for x in (input_ids, attention_mask))
            logits = _logits(trainer, model, ids, mask, logits_to_keep)
            parts.append(
                token_logps(
                    logits,
                    ids[:, -logits_to_keep:],
                    completion_mask=mask[:, -logits_to_keep:],
                    return_entropy=True,
                    temperature=trainer.temperature,
                    drop_last=True,
                    consume_logits=self.options.consume_logits,
                    backend=self.options.backend,
                )
            )
        logps, entropies = (torch.cat(x) for x in zip(*parts, strict=True))
        return logps, entropies if compute_entropy else None, None

    # --- the loss -------------------------------------------------------------------------------------------------------------
    def loss(self, trainer: Any, original: Callable[..., Any], model: Any, inputs: dict[str, Any]) -> Tensor:
        """The loss of one micro-batch, scaled as TRL scales it, with TRL's metrics logged."""
        if not self.fused:
            return original(model, inputs)  # type: ignore[no-any-return]
        reason = _loss_obstacle(trainer, inputs, own_spec=bool(self.passes))
        if reason is not None:
            if self.options.own_method:
                raise UnsupportedRequest(f"spec= or reweight= cannot be combined with {reason}; TRL alone would train another method.")
            self._report(trainer, reason)
            return original(model, inputs)  # type: ignore[no-any-return]
        trainer.fused_calls["policy_loss"] += 1
        train = trainer.model.training
        spec, scaling = self._normalized(trainer, self._spec(trainer), inputs, train)
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        logits = _logits(
            trainer,
            model,
            torch.cat([inputs["prompt_ids"], ids], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            ids.size(1),
        )
        data = {
            "completion_mask": mask * inputs["tool_mask"] if "tool_mask" in inputs else mask,
            "old_per_token_logps": inputs.get("old_per_token_logps"),
            "ref_per_token_logps": inputs.get("ref_per_token_logps"),
            "sampling_per_token_logps": inputs.get("sampling_per_token_logps"),
        }
        if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
            data["importance_sampling_ratio"] = inputs["importance_sampling_ratio"]
        out = policy_loss(
            logits,
            ids,
            inputs["advantages"],
            spec=spec,
            temperature=trainer.temperature,
            drop_last=True,
            consume_logits=self.options.consume_logits,
            backend=self.options.backend,
            **data,
            **scaling,
        )
        _log(trainer, "train" if train else "eval", out)
        if any(isinstance(p.rule, EntropyBonus) for p in spec.penalties):
            bare, scaling = self._normalized(trainer, without_bonus(spec), inputs, train)
            scaling.pop("loss_scale", None)
            policy = policy_loss_from_logps(
                out.per_token_logps, inputs["advantages"], spec=bare, entropies=out.entropies, **data, **scaling
            )
            _log_bonus(trainer, "train" if train else "eval", policy.loss)
        return out.loss

    def _spec(self, trainer: Any) -> PolicyLossSpec:
        if self.passes:
            spec = self.passes[trainer._step // trainer.args.steps_per_generation % len(self.passes)]
        else:
            spec = spec_of_trainer(trainer)
        return with_weights(spec, self.options.weights) if self.options.weights else spec

    @staticmethod
    def _normalized(trainer: Any, spec: PolicyLossSpec, inputs: dict[str, Any], train: bool) -> Normalized:
        return normalize(
            spec,
            accumulation_steps=trainer.current_gradient_accumulation_steps if train else 1,
            num_items=inputs["num_items_in_batch"],
            num_processes=trainer.accelerator.num_processes,
            steps_per_generation=trainer.args.steps_per_generation if train else 1,
        )

    def _report(self, trainer: Any, reason: str) -> None:
        trainer.delegated_calls[reason] += 1
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"reweight_ops leaves this to TRL: {reason}. trainer.delegated_calls counts it.", stacklevel=4)


def _token_obstacle(compute_aux_loss: bool, multimodal: dict[str, Any]) -> str | None:
    if compute_aux_loss:
        return "the MoE auxiliary loss"
    given = [name for name, value in multimodal.items() if value is not None]
    return f"multimodal inputs ({', '.join(given)})" if given else None


def _loss_obstacle(trainer: Any, inputs: dict[str, Any], own_spec: bool) -> str | None:
    """Why TRL has to compute this loss, or None."""
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


def _logits(trainer: Any, model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    """``[B, keep + 1, V]`` by the model's original forward; the last position predicts nothing (``drop_last=True``)."""
    base = trainer.accelerator.unwrap_model(model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        inputs["logits_to_keep"] = keep + 1
    # TRL patches forward with its fused head; without `fused_lm_head=True` that is the original forward.
    with trainer.accelerator.autocast(), _fp32_head(base, trainer.args.cast_lm_head_to_fp32):
        logits: Tensor = model(**inputs).logits
    # A slice of everything would still cost a copy in backward.
    return logits if logits.size(1) == keep + 1 else logits[:, -(keep + 1) :]


@contextlib.contextmanager
def _fp32_head(base: Any, enabled: bool) -> Iterator[None]:
    """TRL's ``cast_lm_head_to_fp32`` under autocast, which would cast the head's matmul back; TRL's fused head leaves autocast too."""
    if not enabled:
        yield
        return
    head = base.get_output_embeddings()
    forward = head.forward

    def without_autocast(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden)  # type: ignore[no-any-return]

    head.forward = without_autocast
    try:
        yield
    finally:
        head.forward = forward


def _log(trainer: Any, mode: str, out: PolicyLossOutput) -> None:
    """TRL's metrics of the loss, over all processes."""
    metrics = out.metrics if trainer.accelerator.num_processes == 1 else out.metrics.all_reduce()
    values = metrics.as_floats()
    for name in _METRICS:
        if name in values:
            trainer._metrics[mode][name].append(values[name])


def _log_bonus(trainer: Any, mode: str, policy: Tensor) -> None:
    """What TRL logs besides when there is an entropy bonus: the loss without it, and its coefficient."""
    trainer._metrics[mode]["policy_loss"].append(trainer.accelerator.gather(policy.detach()).nanmean().item())
    if mode == "train" and trainer.accelerator.sync_gradients:
        trainer._metrics[mode]["entropy_coef"].append(trainer.entropy_coef)


class ReweightGRPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` on our ops; takes all of its arguments, and these.

    Args:
        fuse_loss: compute the whole loss from logits instead of log-probs and entropies only.
        spec: train with this loss instead of TRL's: a spec, a method's name, or one for each of ``num_iterations`` passes over a rollout.
            GRPOConfig's options of TRL's own loss must then be left alone; ``beta`` must be the spec's coefficient (TRL computes
            reference log-probs by it). A ``TokenMean`` divides by the tokens of the accumulation window, as TRL's dapo does.
        reweight: token weights on top of the loss. Both ``spec`` and ``reweight`` imply ``fuse_loss``.
        backend: as in :func:`reweight_ops.policy_loss`.
        consume_logits: write the gradient over the logits; saves one tensor of their size. For models whose forward does not need
            its own logits in backward (autograd raises otherwise).

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
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._reweight_hooks = Hooks(self, Options(fuse_loss, spec, reweight, backend, consume_logits), GRPOTrainer._compute_loss)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self._reweight_hooks.token_logps(self, super()._get_per_token_logps_and_entropies, *args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        return self._reweight_hooks.loss(self, super()._compute_loss, model, inputs)


class TrlPatch:
    """A patched ``GRPOTrainer``; ``undo()``, or leave the ``with`` block, to restore it."""

    def __init__(self, options: Options) -> None:
        if getattr(GRPOTrainer._compute_loss, "_reweight_ops", False):
            raise InvalidCall("TRL is patched already; undo that patch first.")
        self._originals = {name: getattr(GRPOTrainer, name) for name in _SIGNATURES}
        logps, loss = self._originals.values()

        def hooks(trainer: Any) -> Hooks:
            if "_reweight_hooks" not in trainer.__dict__:
                trainer._reweight_hooks = Hooks(trainer, options, loss)
            return trainer._reweight_hooks  # type: ignore[no-any-return]

        def patched_logps(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(trainer, ReweightGRPOTrainer):  # reached through super(): it has hooks of its own
                return logps(trainer, *args, **kwargs)
            return hooks(trainer).token_logps(trainer, logps.__get__(trainer), *args, **kwargs)

        def patched_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Any:
            if isinstance(trainer, ReweightGRPOTrainer):
                return loss(trainer, model, inputs)
            return hooks(trainer).loss(trainer, loss.__get__(trainer), model, inputs)

        patched_loss._reweight_ops = True  # type: ignore[attr-defined]
        for name, function in zip(_SIGNATURES, (patched_logps, patched_loss), strict=True):
            setattr(GRPOTrainer, name, function)

    def undo(self) -> None:
        """Restore TRL's methods; doing it twice does nothing."""
        for name, original in self._originals.items():
            setattr(GRPOTrainer, name, original)

    def __enter__(self) -> TrlPatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def patch_trl(
    *,
    fuse_loss: bool = False,
    spec: PolicyLossSpec | str | Sequence[PolicyLossSpec | str] | None = None,
    reweight: TokenWeight | Sequence[TokenWeight] = (),
    backend: str = "auto",
    consume_logits: bool = False,
) -> TrlPatch:
    """Put the hooks of :class:`ReweightGRPOTrainer` into ``GRPOTrainer`` itself, for scripts that build it.

    Returns a patch with ``undo()``, also a context manager. Subclasses that override a hooked method keep theirs.
    """
    return TrlPatch(Options(fuse_loss, spec, reweight, backend, consume_logits))
