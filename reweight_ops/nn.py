"""The LM head and its log-probs or policy loss as one module. FSDP2, DDP and
checkpointing treat it as any module.

The parameters are ``weight [V, D]`` and ``bias [V]``, so a state dict is that of the
``nn.Linear`` that it replaces.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import nn as torch_nn
from typing_extensions import Self, Unpack

from ._core.calls.keywords import (
    LinearPolicyLossKeywords,
    LMHeadKeywords,
    LMHeadOptions,
    SoftmaxOptions,
    parse,
)
from ._core.calls.specs import named_spec
from ._core.engine.output import PolicyLossOutput
from ._core.losses.linear import linear_policy_loss, linear_token_logps
from ._core.ranges import Count, ranged
from ._core.spec.policy import PolicyLossSpec
from .errors import InvalidCall

__all__ = ["FusedLinearLogProbs", "FusedLinearPolicyLoss"]

#: Keywords that are not settings, and why.
_NO_SETTINGS = {
    "lm_head_bias": "pass bias=True, and the module has its own",
    "lora": "pass it with the call, because its factors are parameters of another module",
    "row_index": "pass it with the call",
    "sampling_mask": "pass it with the call",
    "consume_logits": "the logits are the module's own",
    "drop_last": "the logits are the module's own",
}


class _FusedHead(torch_nn.Module):
    """An LM head that never returns its logits. ``settings`` are keywords of the op. A
    call may override them.
    """

    _OWN: ClassVar[tuple[str, ...]] = ()

    in_features: Count[int]
    out_features: Count[int]
    weight: torch_nn.Parameter
    bias: torch_nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        settings: dict[str, Any],
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for key in settings:
            if key in _NO_SETTINGS:
                raise InvalidCall(f"{name}: {key} is not a setting: {_NO_SETTINGS[key]}.")
        parse(
            name,
            {k: v for k, v in settings.items() if k not in self._OWN},
            SoftmaxOptions,
            LMHeadOptions,
            own=self._OWN,
        )
        self.settings = settings
        self._take(torch_nn.Linear(in_features, out_features, bias, device=device, dtype=dtype))

    def _take(self, linear: torch_nn.Linear) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        parameters = dict(linear.named_parameters())
        self.register_parameter("weight", parameters["weight"])
        self.register_parameter("bias", parameters.get("bias"))

    @classmethod
    def from_linear(cls, linear: torch_nn.Linear, **keywords: Any) -> Self:
        """Return the module over the parameters of ``linear``.

        The parameters are shared: an embedding's tied weight stays tied, and nothing is
        copied.

        Raises:
            InvalidCall: the head is more than ``F.linear`` of its weight: quantised
                (bitsandbytes, FP8), adapted, parametrised, with forward hooks, or
                another class.
        """
        reason = _more_than_linear(linear)
        if reason is not None:
            raise InvalidCall(
                f"{cls.__name__}: the head is {reason}: dequantise or merge it, or pass "
                "head(hidden) to the op that takes logits."
            )
        head = cls(linear.in_features, linear.out_features, device="meta", **keywords)
        head._take(linear)
        return head

    def extra_repr(self) -> str:
        """Return the sizes as ``nn.Linear`` shows them, and the settings."""
        shown = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            **self.settings,
        }
        return ", ".join(
            f"{name}={value.name if isinstance(value, PolicyLossSpec) else value}"
            for name, value in shown.items()
        )

    def _call(self, keywords: dict[str, Any]) -> dict[str, Any]:
        if "lm_head_bias" in keywords:
            raise InvalidCall(f"{type(self).__name__}: lm_head_bias is the module's own bias.")
        return {**self.settings, **keywords, "lm_head_bias": self.bias}


def _more_than_linear(linear: Any) -> str | None:
    kind = type(linear)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not isinstance(linear, torch_nn.Linear) or kind.forward is not torch_nn.Linear.forward:
        return f"a {name}, which is not a plain nn.Linear"
    if "forward" in vars(linear):
        return "an nn.Linear whose forward is replaced"
    if "weight" not in linear._parameters:
        return "parametrised, its weight is computed from other parameters"
    weight = linear.weight
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"quantised, its weight is {weight.dtype}"
    # a DTensor, which FSDP2 gathers around a forward
    sharded = hasattr(weight.data, "full_tensor")
    if not sharded and type(weight.data) is not Tensor:
        return f"quantised, its weight is a {type(weight.data).__name__}"
    # FSDP2's own hooks gather the parameters
    if not sharded and (linear._forward_pre_hooks or linear._forward_hooks):
        return "an nn.Linear with forward hooks"
    return None


@ranged
class FusedLinearLogProbs(_FusedHead):
    """:func:`linear_token_logps` as a module: from hidden states to log-probs, or
    ``(logps, entropies)``.

    Args:
        in_features: D.
        out_features: V.
        bias, device, dtype: as of ``nn.Linear``, whose initialisation it has.
        settings: keywords of :func:`linear_token_logps` that hold for every call
            (temperature, softcap, logit_scale, logits_dtype, chunk_rows, ...).

    Raises:
        InvalidCall, TypeError: a setting that belongs to a call, or that does not
            exist.

    >>> import torch, reweight_ops as rw
    >>> linear = torch.nn.Linear(3, 4)
    >>> head = rw.FusedLinearLogProbs.from_linear(linear, temperature=0.7)
    >>> head(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Unpack[LMHeadKeywords],
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, dict(settings))

    def forward(
        self,
        hidden: Tensor,
        completion_ids: Tensor,
        *,
        completion_mask: Tensor | None = None,
        return_entropy: bool = False,
        **keywords: Unpack[LMHeadKeywords],
    ) -> Any:
        """Take the shapes and keywords of :func:`linear_token_logps`. A keyword
        overrides the setting of its name.
        """
        call = self._call(dict(keywords))
        return linear_token_logps(
            hidden,
            self.weight,
            completion_ids,
            completion_mask=completion_mask,
            return_entropy=return_entropy,
            **call,
        )


@ranged
class FusedLinearPolicyLoss(_FusedHead):
    """:func:`linear_policy_loss` as a module: from hidden states, ids and advantages to
    a :class:`PolicyLossOutput`.

    Args:
        in_features: D.
        out_features: V.
        bias, device, dtype: as of ``nn.Linear``, whose initialisation it has.
        spec: a :class:`PolicyLossSpec` or a method's name.
        plan: as in :func:`linear_policy_loss`.
        settings: keywords of :func:`linear_token_logps` that hold for every call.

    Raises:
        InvalidCall, TypeError: a setting that belongs to a call, or that does not
            exist.

    >>> import torch, reweight_ops as rw
    >>> head = rw.FusedLinearPolicyLoss.from_linear(torch.nn.Linear(3, 4), spec="grpo")
    >>> hidden, ids = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long)
    >>> head(hidden, ids, 1.0).loss.round()
    tensor(-1., grad_fn=<...>)
    """

    _OWN = ("spec", "plan")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        spec: PolicyLossSpec | str,
        plan: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Unpack[LMHeadKeywords],
    ) -> None:
        named = named_spec(type(self).__name__, spec)
        super().__init__(
            in_features,
            out_features,
            bias,
            device,
            dtype,
            {**settings, "spec": named, "plan": plan},
        )

    def forward(
        self,
        hidden: Tensor,
        completion_ids: Tensor,
        advantages: Tensor | float | None,
        **keywords: Unpack[LinearPolicyLossKeywords],
    ) -> PolicyLossOutput:
        """Take the shapes and keywords of :func:`linear_policy_loss`. A keyword
        overrides the setting of its name.
        """
        return linear_policy_loss(
            hidden, self.weight, completion_ids, advantages, **self._call(dict(keywords))
        )
