"""The language-model head of a TRL model in two ways: its logits, or its hidden states
and weight without logits.

The second way replaces the model's ``forward`` for the duration of one call, as TRL's
own fused head replaces it for good: the loss is computed inside the wrapped model's
forward, so that what DDP, FSDP, PEFT and autocast do around a forward is done here too.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate.utils.other import is_compiled_module
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils.generic import ModelOutput
from trl.trainer import grpo_trainer

from ..._core.calls.keywords import Lora
from ...errors import InvalidCall
from ..layouts import predicting
from ..sharding import whole

try:
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils.other import ModulesToSaveWrapper
except ImportError:  # without PEFT there are no adapters

    class LoraLinear:  # type: ignore[no-redef]
        pass

    class ModulesToSaveWrapper:  # type: ignore[no-redef]
        pass


HEADS = ("auto", "linear", "logits")


@dataclass
class HeadOutput(ModelOutput):
    """The output of a model instead of logits, with the fields that TRL reads."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None


def base_model(trainer: Any, model: Any) -> Any:
    """Return the causal language model under wrappers and adapters."""
    base = trainer.accelerator.unwrap_model(model)
    return base.get_base_model() if hasattr(base, "get_base_model") else base


def linear_unsupported_reason(trainer: Any, model: Any) -> str | None:
    """Return why this model's head needs logits, or None."""
    if is_deepspeed_zero3_enabled():  # type: ignore[no-untyped-call]
        return "DeepSpeed ZeRO-3, which frees the head's weight before backward"
    if is_compiled_module(trainer.accelerator.unwrap_model(model, keep_torch_compile=True)):
        return "a compiled model, whose forward cannot be replaced"
    return _module_unsupported_reason(base_model(trainer, model).get_output_embeddings())


def adapts_head(trainer: Any, model: Any) -> bool:
    """Return whether the head has an adapter that TRL's own fused head would ignore."""
    return isinstance(base_model(trainer, model).get_output_embeddings(), LoraLinear)


@contextlib.contextmanager
def adapters_on_head_allowed(cast_lm_head_to_fp32: bool) -> Iterator[None]:
    """Allow an adapter on the head. TRL's constructor refuses it because TRL's fused
    head would ignore it; ours does not.

    Its refusal of an adapter under ``cast_lm_head_to_fp32`` stands: that replaces the
    head's forward.
    """
    if cast_lm_head_to_fp32 or not hasattr(grpo_trainer, "BaseTunerLayer"):
        yield
        return
    original = grpo_trainer.BaseTunerLayer
    # TRL uses the name only for this check.
    grpo_trainer.BaseTunerLayer = type("NoTunerLayer", (), {})
    try:
        yield
    finally:
        grpo_trainer.BaseTunerLayer = original


def _module_unsupported_reason(head: Any) -> str | None:
    if isinstance(head, ModulesToSaveWrapper):
        return _module_unsupported_reason(_saved_module(head))
    if isinstance(head, LoraLinear):
        return _module_unsupported_reason(head.base_layer) or _lora_unsupported_reason(head)
    kind = type(head)
    if (
        not isinstance(head, torch.nn.Linear)
        or kind.forward is not torch.nn.Linear.forward
        or not head.weight.is_floating_point()
    ):
        return (
            f"a head of class {kind.__module__}.{kind.__qualname__}, which is not a plain nn.Linear"
        )
    return "a head that is offloaded" if head.weight.is_meta else None


def _lora_unsupported_reason(head: Any) -> str | None:
    if head.disable_adapters or head.merged:
        return None  # the base layer alone
    active = _active_adapters(head)
    if len(active) > 1:
        return f"{len(active)} active adapters on the head"
    for name in active:
        if name in head.lora_variant:
            return f"the LoRA variant {type(head.lora_variant[name]).__name__} on the head"
        if head.training and getattr(head.lora_dropout[name], "p", 0) > 0:
            return "lora_dropout on the head"
        if head.lora_B[name].bias is not None:
            return "lora_bias on the head"
    return None


def _active_adapters(head: Any) -> list[str]:
    return [name for name in head.active_adapters if name in head.lora_A]


def _saved_module(wrapper: Any) -> Any:
    """The copy of the head that a ``modules_to_save`` adapter trains, or the original
    where adapters are off.
    """
    active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return (
        wrapper.original_module
        if wrapper.disable_adapters or not active
        else wrapper.modules_to_save[active[0]]
    )


def decoder(base: Any) -> Any:
    """Return the module whose last hidden states the head takes."""
    config = base.config.get_text_config()
    old_multimodal = config is not base.config and int(transformers.__version__.split(".")[0]) < 5
    return base.model if old_multimodal else base.base_model


def head_keywords(base: Any, hidden: Tensor, form: Any) -> dict[str, Any]:
    """Return the head as the keywords of the linear ops, ``lm_head_weight`` included,
    with the scale and soft cap of ``form``.
    """
    head = base.get_output_embeddings()
    lora = None
    if isinstance(head, ModulesToSaveWrapper):
        head = _saved_module(head)
    if isinstance(head, LoraLinear):
        active = [] if head.disable_adapters or head.merged else _active_adapters(head)
        if active:
            # PEFT may keep adapters in fp32 beside a 16-bit head; the linear ops take
            # factors in hidden's dtype or a wider one.
            factors: list[Any] = [head.lora_A[active[0]], head.lora_B[active[0]]]
            a, b = (
                whole(f.weight).to(torch.promote_types(f.weight.dtype, hidden.dtype))
                for f in factors
            )
            lora = Lora(a, b, float(head.scaling[active[0]]))
        head = head.base_layer
    return {
        "lm_head_weight": whole(head.weight),
        "lm_head_bias": whole(head.bias),
        "lora": lora,
        "logit_scale": form.scale,
        "softcap": form.softcap,
    }


def scale_and_softcap(config: Any) -> tuple[float, float | None]:
    """Return the number by which a model multiplies its logits, under the names of
    model families, and its soft cap.
    """
    # Cohere, Muse Glimmer, Falcon-H1
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        # MPT has names here, which its forward ignores
        if isinstance(scale, (int, float)):
            break
    else:
        # Granite and MiniCPM3 divide, HyperCLOVA X multiplies
        scale = getattr(config, "logits_scaling", None)
        scale = 1.0 if scale is None else scale if config.model_type == "hyperclovax" else 1 / scale
    return float(scale), getattr(config, "final_logit_softcapping", None)


@contextlib.contextmanager
def fused_forward(
    trainer: Any,
    model: Any,
    keep: int,
    form: Any,
    compute: Callable[[Tensor, dict[str, Any]], HeadOutput],
) -> Iterator[None]:
    """While this is entered, ``model(..., fused_lm_head=True)`` returns
    ``compute(hidden, head keywords)``: the hidden states ``[B, keep, D]``
    that predict the last ``keep`` tokens."""
    base = base_model(trainer, model)
    original = base.__dict__.get("forward")
    fp32 = trainer.args.cast_lm_head_to_fp32

    def forward(*args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return (original or type(base).forward.__get__(base))(*args, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        hidden = predicting(decoder(base)(*args, **kwargs).last_hidden_state, keep)
        hidden = hidden.to(base.get_output_embeddings().weight.device)
        with (
            torch.autocast(hidden.device.type, enabled=False) if fp32 else contextlib.nullcontext()
        ):
            hidden = hidden.float() if fp32 else hidden
            return compute(hidden, head_keywords(base, hidden, form))

    base.forward = forward
    try:
        yield
    finally:
        if original is None:
            del base.forward
        else:
            base.forward = original


def logits_of(
    trainer: Any, model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int
) -> Tensor:
    """``[B, keep + 1, V]`` by the model's original forward; the last position predicts
    nothing (``drop_last=True``).
    """
    base = base_model(trainer, model)
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "use_cache": False,
    }
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        inputs["logits_to_keep"] = keep + 1
    # TRL patches forward with its fused head; without `fused_lm_head=True` that is the
    # original forward.
    with trainer.accelerator.autocast(), fp32_head(base, trainer.args.cast_lm_head_to_fp32):
        logits: Tensor = model(**inputs).logits
    # A slice of everything would still cost a copy in backward.
    return logits if logits.size(1) == keep + 1 else logits[:, -(keep + 1) :]


@contextlib.contextmanager
def fp32_head(base: Any, enabled: bool) -> Iterator[None]:
    """TRL's ``cast_lm_head_to_fp32`` under autocast, which would cast the head's matmul
    back; TRL's fused head leaves autocast too.
    """
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


def choose_head(wanted: str, consume_logits: bool) -> str:
    """The ``lm_head=`` option, checked."""
    if wanted not in HEADS:
        raise InvalidCall(f"lm_head is {wanted!r}, expected one of {', '.join(HEADS)}.")
    if consume_logits and wanted == "linear":
        raise InvalidCall("consume_logits=True needs logits to consume; lm_head='linear' has none.")
    return "logits" if consume_logits else wanted
