"""The result of a policy loss: the loss, detached per-row results, and metrics.

Results that cost extra work are computed when they are first read. That raises if a
tensor from which they are computed has been written in place since the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from ...errors import UnsupportedRequest
from ..calls.policy import STATISTICS, LossCall
from ..formula.namespace import TorchNamespace
from ..once import computed_once, outside_of_modes
from ..transforms import in_transform
from .diagnostics import policy_diagnostics
from .distillation import DistillationLossOutput
from .metrics import Metrics, policy_metrics
from .versions import Versions

Derivatives = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TokenStats:
    """Per-row statistics, shape R, fp32 (fp64 for fp64 logits), 0 in ignored rows. A
    statistic that was not requested is None.

    ``logps`` log-prob of the id · ``entropies`` · ``lse`` log-sum-exp of the scaled
    logits · ``log_sum_p_sq`` log Σp² · ``max_logp`` log-prob of the likeliest token ·
    ``is_top1`` bool: the id is a likeliest token · ``log1m_p`` log(1 - p) of the id,
    from its log-prob (so its error is an fp32 rounding over 1 - p) · ``mean_logits``
    mean of the scaled logits over the vocabulary (``-inf`` if a column is) ·
    ``selected_logps`` ``R + (K,)`` log-probs of ``selected_ids`` · ``topk_logps`` and
    ``topk_ids`` ``R + (k,)`` the ``top_k`` likeliest ids, likeliest first (of equal
    ones the lowest where the ``cpu`` backend finds them, and else any), ids of ``-100``
    in ignored rows. The first three, ``selected_logps`` and ``topk_logps`` are
    differentiable.
    """

    logps: Tensor | None = None
    entropies: Tensor | None = None
    lse: Tensor | None = None
    log_sum_p_sq: Tensor | None = None
    max_logp: Tensor | None = None
    is_top1: Tensor | None = None
    log1m_p: Tensor | None = None
    mean_logits: Tensor | None = None
    selected_logps: Tensor | None = None
    topk_logps: Tensor | None = None
    topk_ids: Tensor | None = None


@dataclass(frozen=True)
class PolicyLossOutput:
    """The result of a policy loss. All fields but ``loss`` are detached in both plans
    (unless ``differentiable_outputs=True``).

    These have shape R, are fp32 (fp64 for fp64 logits), and are 0 in ignored rows:
    ``per_token_logps``; ``entropies`` (None if unknown); ``per_token_loss``, which is
    ``Σ_k coef_k·u_k·ℓ_k``, before the row weights of reduction, ``loss_scale``,
    ``token_weights`` and ``importance_sampling_ratio``; ``ratio`` (at the spec's level,
    clamped); ``coef`` (∂loss/∂logp of the total); ``is_clipped`` (bool).
    """

    loss: Tensor
    per_token_logps: Tensor
    entropies: Tensor | None
    plan: str
    backend: str
    _call: LossCall = field(repr=False)
    _leaves: dict[str, Tensor] = field(repr=False)  # [N], detached
    _loss: Tensor = field(repr=False)  # [N], detached
    #: The loss's derivatives by logp and entropy if known, or what finds them.
    _by: Derivatives | Callable[[], Derivatives] | None = field(repr=False)
    #: More metrics (sums), from the loss's derivatives by logp and entropy.
    _more: Callable[[Derivatives], dict[str, Any]] | None = field(repr=False)
    #: The versions of the tensors that the properties read, and of those that only the
    #: derivatives read.
    _versions: tuple[Versions, Versions] | None = field(repr=False)
    #: The divergences from a teacher, if the loss has a term of them. ``loss`` includes
    #: that term. Everything else here belongs to the spec alone.
    teacher: DistillationLossOutput | None = None
    #: What row kernels have evaluated beside the loss, which metrics read.
    _table: Tensor | None = field(default=None, repr=False)

    @classmethod
    def later(
        cls, loss: Tensor, plan: str, backend: str, rest: Callable[[], PolicyLossOutput]
    ) -> PolicyLossOutput:
        """Return a result whose loss alone is known yet.

        ``rest`` returns the complete result. It is called when anything else is read.
        """
        out = object.__new__(cls)
        out.__dict__.update(loss=loss, plan=plan, backend=backend, _rest=rest)
        return out

    def __getattr__(self, name: str) -> Any:
        rest = self.__dict__.get("_rest")
        # another thread has read it in the meantime
        if rest is None and name in self.__dict__:
            return self.__dict__[name]
        if rest is None or name not in self.__dataclass_fields__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.__dict__.update(vars(outside_of_modes(rest)))
        self.__dict__.pop("_rest", None)
        return self.__dict__[name]

    def _unchanged(self, what: str, derivatives: bool = False) -> None:
        if torch.compiler.is_compiling() or self._versions is None:
            return
        self._versions[0].check(what)
        if derivatives and not isinstance(self._by, tuple):
            self._versions[1].check(what)

    @computed_once
    def per_token_loss(self) -> Tensor:
        return self._call.rows.unflatten(self._loss)

    @computed_once
    def ratio(self) -> Tensor:
        self._unchanged("ratio")
        rows = self._call.rows
        return rows.unflatten(
            torch.where(rows.keep, self._call.log_ratio(self._leaves["logp"]).detach().exp(), 0)
        )

    @computed_once
    def is_clipped(self) -> Tensor:
        self._unchanged("is_clipped")
        rows, leaves = self._call.rows, self._call.safe_leaves(self._leaves)
        clipped = (
            self._call.terms(self._leaves).terms[0].rule.clipped(TorchNamespace(rows.dtype), leaves)
        )
        nothing = torch.zeros_like(rows.keep)
        return rows.unflatten(nothing if clipped is None else (clipped[0] | clipped[1]) & rows.keep)

    @computed_once
    def _derivatives(self) -> Derivatives:
        if _without_autograd() and not isinstance(self._by, tuple):
            raise self._call.rows.unsupported(
                "autograd does not run in inference_mode, so there is no coef of this loss: "
                "use torch.no_grad()."
            )
        if self._by is not None:
            return self._by() if callable(self._by) else self._by
        if torch.compiler.is_exporting():
            raise self._call.rows.unsupported(
                "torch.export has no derivatives of two_pass, so there is no coef: return the "
                "loss and the other results that you need."
            )
        return coefficients(self._call, self._leaves)

    @computed_once
    def coef(self) -> Tensor:
        self._unchanged("coef", derivatives=True)
        return self._call.rows.unflatten(self._derivatives[0])

    @computed_once
    def metrics(self) -> Metrics:
        self._unchanged("metrics", derivatives=True)
        known = isinstance(self._by, tuple)
        unknown = not known and (
            _without_autograd() or (self._by is None and torch.compiler.is_exporting())
        )
        by = None if unknown else self._derivatives
        more = {} if self._more is None or by is None else self._more(by)
        return policy_metrics(self._call, self._leaves, by, more, self._table)

    @computed_once
    def diagnostics(self) -> Metrics:
        """Diagnostics: which tokens the gradient comes from, how far off the sampler
        is, and how the update changes the entropy.

        They are apart from :attr:`metrics`, and are computed when first read.
        """
        if "_call" not in self.__dict__ and "_rest" not in self.__dict__:
            raise UnsupportedRequest(
                "diagnostics are not among the outputs of a compiled graph: read them in the "
                "function that is compiled."
            )
        self._unchanged("diagnostics", derivatives=True)
        return policy_diagnostics(self._call, self._leaves, self._derivatives)


def _without_autograd() -> bool:
    # torch.compile does not trace the question, and no graph runs in that mode
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def coefficients(call: LossCall, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``[N]`` derivatives of the total loss by logp and by entropy."""
    known = {name: leaves[name].detach() for name in STATISTICS if name in leaves}
    transform = torch.compiler.is_compiling() or in_transform()
    d_logp, d_entropy = (
        _transformed_gradients(call, known) if transform else _gradients(call, known)
    )
    zero = torch.zeros_like(leaves["logp"])
    return (zero if d_logp is None else d_logp), (zero if d_entropy is None else d_entropy)


def _transformed_gradients(
    call: LossCall, known: dict[str, Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    # Transforms nest, and torch.compile traces them. Neither is true of autograd.grad.
    found = torch.func.grad(lambda probes: call.token_losses(probes).weighted_loss.sum())(known)
    return found.get("logp"), found.get("entropy")


def _gradients(call: LossCall, known: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    with torch.enable_grad():
        probes = {name: x.clone().requires_grad_() for name, x in known.items()}
        total = call.token_losses(probes).weighted_loss.sum()
        found = (
            torch.autograd.grad(total, list(probes.values()), allow_unused=True)
            if total.requires_grad
            else [None] * len(probes)
        )
    by = dict(zip(probes, found, strict=True))
    return by.get("logp"), by.get("entropy")


_ROWS = ("per_token_logps", "entropies", "per_token_loss", "ratio", "coef", "is_clipped")


def _flatten(out: PolicyLossOutput) -> tuple[list[Any], Any]:
    taught = [] if out.teacher is None else [out.teacher]
    return [out.loss, *(getattr(out, name) for name in _ROWS), out.metrics.sums, *taught], (
        out.plan,
        out.backend,
        out.metrics.names,
    )


def _unflatten(values: Any, context: Any) -> PolicyLossOutput:
    out = object.__new__(PolicyLossOutput)
    loss, rows, (sums, *taught) = values[0], values[1 : 1 + len(_ROWS)], values[1 + len(_ROWS) :]
    plan, backend, names = context
    for name, value in zip(
        ("loss", *_ROWS, "teacher"), (loss, *rows, *(taught or [None])), strict=True
    ):
        out.__dict__[name] = value
    out.__dict__.update(plan=plan, backend=backend, metrics=Metrics(names, sums))
    return out


_pytree.register_pytree_node(
    PolicyLossOutput, _flatten, _unflatten, serialized_type_name="reweight_ops.PolicyLossOutput"
)
