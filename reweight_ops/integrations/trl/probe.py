"""A probe that asks the model itself, once, on a few positions, whether its logits are
what the linear ops make of its hidden states.

No list of model families can know that one scales its logits, cuts padded columns, caps
them under its own name or transforms hidden states before the head, or what a hook
does. The probe is repeated when hooks, adapters, modes or the identity of modules and
parameters change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core.calls.keywords import Lora
from .head import base_model, decoder, fp32_head, head_keywords, scale_and_softcap

#: The probe's logits reach this size, where a soft cap shows.
_LARGEST = 60.0
_POSITIONS = 8
#: Names that model families have for a soft cap on logits.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Form(NamedTuple):
    """How a model's logits follow from ``weight @ hidden``: ``cap·tanh(scale·z/cap)``;
    or why they do not.
    """

    scale: float = 1.0
    softcap: float | None = None
    unsupported_reason: str | None = None


class Prober:
    """The forms of a trainer's models (the policy and a reference), each found once."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[tuple[Any, ...], Form]] = {}

    def form(self, trainer: Any, model: Any) -> Form:
        base = base_model(trainer, model)
        state = (*_state(base), torch.is_autocast_enabled(), trainer.args.cast_lm_head_to_fp32)
        known = self._found.get(id(base))
        if known is None or known[0] != state:
            known = self._found[id(base)] = (state, _probe(trainer, model))
        return known[1]


def _state(base: Any) -> tuple[Any, ...]:
    """Return the state that decides the form. It is read at every call, so it contains
    no value of a tensor.
    """
    modules = [base, decoder(base), *base.get_output_embeddings().modules()]
    found: list[Any] = [base.training]
    for module in modules:
        found += [id(module), type(module), module.training, id(module.__dict__.get("forward"))]
        found += [
            tuple((key, id(hook)) for key, hook in hooks.items())
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        found += [
            module.__dict__.get("_disable_adapters"),
            str(getattr(module, "_active_adapter", None)),
            str(module.__dict__.get("merged_adapters")),
        ]
        if module is not base and module is not modules[1]:
            found += [id(p) for p in module.parameters(recurse=False)]
    return (
        *found,
        str(
            [
                getattr(base.config.get_text_config(), name, None)
                for name in (*_CAPS, "logit_scale", "logits_scaling")
            ]
        ),
    )


def _candidates(config: Any) -> Iterator[Form]:
    """What the config says first; then, for it may say what the forward
    ignores, less."""
    scale, cap = scale_and_softcap(config)
    caps = [cap, *(getattr(config, name, None) for name in _CAPS), None]
    numbers = [
        c for c in dict.fromkeys(caps) if c is None or (isinstance(c, (int, float)) and c > 0)
    ]
    for s in dict.fromkeys((scale, 1.0)):
        for c in numbers:
            yield Form(s, c)


def _probe(trainer: Any, model: Any) -> Form:
    base = base_model(trainer, model)
    seen: list[Tensor] = []

    def enlarge(module: Any, args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        z = _linear(hidden, head_keywords(base, hidden, Form()))
        output.last_hidden_state = hidden * (_LARGEST / z.abs().max().clamp(min=1e-6)).to(
            hidden.dtype
        )
        seen.append(output.last_hidden_state)
        return output

    weight = base.get_output_embeddings().weight
    ids = (
        torch.arange(1, _POSITIONS + 1, device=weight.device)
        % base.get_input_embeddings().weight.size(0)
    )[None]
    devices = [weight.device] if weight.device.type == "cuda" else []
    fp32 = trainer.args.cast_lm_head_to_fp32
    handle = decoder(base).register_forward_hook(enlarge)
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            trainer.accelerator.autocast(),
            fp32_head(base, fp32),
        ):
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits
            if len(seen) != 1:
                return Form(
                    unsupported_reason=f"a forward that calls its decoder {len(seen)} times"
                )
            with torch.autocast(
                weight.device.type,
                enabled=torch.is_autocast_enabled(weight.device.type) and not fp32,
            ):
                hidden = seen[0].to(weight.device)
                hidden = hidden.float() if fp32 else hidden
                z = _linear(hidden, head_keywords(base, hidden, Form()))
    except Exception as error:  # whatever a model's own code raises
        return Form(
            unsupported_reason=f"a forward that could not be probed ({type(error).__name__}: "
            f"{error})"
        )
    finally:
        handle.remove()
    if logits.shape != z.shape:
        return Form(
            unsupported_reason=f"logits of shape {tuple(logits.shape)} where the head's weight "
            f"gives {tuple(z.shape)}"
        )
    narrow = min((logits.dtype, z.dtype), key=lambda t: t.itemsize)
    for form in _candidates(base.config.get_text_config()):
        if _agree(logits, z, form, narrow):
            return form
    return Form(
        unsupported_reason="logits that are more than the head's weight times the hidden states "
        "(found by a probe of the model's own forward)"
    )


def _agree(logits: Tensor, z: Tensor, form: Form, dtype: torch.dtype) -> bool:
    want = z.float() * form.scale
    want = want if form.softcap is None else form.softcap * torch.tanh(want / form.softcap)
    # A rounding each of product, bias, scale and cap.
    bound = max(4 * torch.finfo(dtype).eps, 1e-5) * want.abs().max()
    return bool(((logits.float() - want).abs() <= bound).all())


def _linear(hidden: Tensor, head: dict[str, Any]) -> Tensor:
    z = F.linear(hidden, head["lm_head_weight"], head["lm_head_bias"])
    lora: Lora | None = head["lora"]
    if lora is None:
        return z
    return z + lora.scale * F.linear(F.linear(hidden.to(lora.a.dtype), lora.a), lora.b).to(z.dtype)
