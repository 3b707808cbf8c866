"""A policy loss as an objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calls.policy import LossCall
from ..detached import marked
from ..formula.trace import trace_weight
from .inputs import with_derivatives
from .output import Derivatives, PolicyLossOutput
from .plan import Choice
from .source import MoreMetrics, PolicyWork, SourceInfo
from .stored import evaluate_stored
from .versions import versions_of


@dataclass(frozen=True)
class PolicyObjective:
    """A spec bound to a call's data."""

    call: LossCall
    differentiable_outputs: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        return (
            "logp",
            "entropy",
            *(("log_sum_p_sq",) if "log_sum_p_sq" in self.call.spec.requires else ()),
        )

    @property
    def program(self) -> str | None:
        return self.call.spec.program_text

    def one_pass_unsupported_reason(self, info: SourceInfo, requested: bool) -> str | None:
        call = self.call
        if info.backend is None:
            return "the log-probs are there already"
        if not info.needs_grad:
            return "no gradient is needed, so only statistics are computed"
        if call.spec.one_pass_unsupported_reason is not None:
            return call.spec.one_pass_unsupported_reason
        if call.old_logp is None and any(
            r.weight is not None and "old_logp" in trace_weight(type(r.weight)).leaves
            for r in call.spec.reductions
        ):
            return "a reduction is over the old log-probs, which on-policy are the current ones"
        if self.differentiable_outputs:
            return "differentiable_outputs=True puts log-probs and entropies into the graph"
        if any(t is not None and t.requires_grad for t in (call.adv, call.factor)):
            return "advantages or token_weights require grad"
        if call.differentiated() and (
            torch.compiler.is_compiling() or "log_sum_p_sq" in call.spec.requires
        ):
            return "stored log-probs require grad, in a compiled graph or beside Σp²"
        if not requested and info.dtype == torch.float64:
            return "fp64 is for checking, and two_pass is the exact autograd"
        if (
            not requested
            and info.dtype == torch.float16
            and isinstance(call.loss_scale, (int, float))
            and call.loss_scale == 1
        ):
            return "fp16 gradients are rounded in forward: pass GradScaler's factor as loss_scale"
        return None

    def work(self) -> PolicyWork:
        program = self.program
        assert program is not None, "a loss without a program takes two passes"
        return PolicyWork(self.call.inputs(), self.call.params, program)

    def from_one_pass(
        self, loss: Tensor, table: Tensor, choice: Choice, more: MoreMetrics | None
    ) -> PolicyLossOutput:
        rows = self.call.rows
        logp, entropy, _, per_token, d_logp, d_entropy = table.unbind()
        leaves, by = {"logp": logp, "entropy": entropy}, (d_logp, d_entropy)
        loss = with_derivatives(self.call, loss, leaves)
        entropies = marked(rows.unflatten(entropy), loss)
        return PolicyLossOutput(
            rows.trusted(loss),
            rows.unflatten(logp),
            entropies,
            choice.plan,
            choice.backend,
            self.call.without_inputs(),
            leaves,
            per_token,
            by,
            more,
            versions_of(self.call, leaves, per_token),
        )

    def from_statistics(
        self, statistics: dict[str, Tensor], choice: Choice, more: MoreMetrics | None
    ) -> PolicyLossOutput:
        """Evaluate the loss from differentiable row statistics: the second half of
        two_pass, which touches only ``[N]`` tensors.
        """
        rows = self.call.rows
        leaves = {name: value for name, value in statistics.items() if name != "lse"}
        stored = (
            evaluate_stored(self.call, leaves, choice.backend)
            if choice.backend != "torch"
            else None
        )
        if stored is not None:
            shaped = stored.loss if self.call.spec.reduction.scalar else rows.unflatten(stored.loss)
            return self._shown(
                leaves, shaped, stored.per_row, stored.by, choice, more, stored.table
            )
        result = self.call.token_losses(leaves)
        loss = (
            result.weighted_loss.sum()
            if self.call.spec.reduction.scalar
            else rows.unflatten(result.weighted_loss)
        )
        return self._shown(leaves, loss, result.loss.detach(), None, choice, more)

    def _shown(
        self,
        leaves: dict[str, Tensor],
        loss: Tensor,
        per_row: Tensor,
        by: Derivatives | Callable[[], Derivatives] | None,
        choice: Choice,
        more: MoreMetrics | None,
        table: Tensor | None = None,
    ) -> PolicyLossOutput:
        rows = self.call.rows
        detached = {name: value.detach() for name, value in leaves.items()}
        shown = leaves if self.differentiable_outputs else detached
        entropies = rows.unflatten(shown["entropy"]) if "entropy" in shown else None
        if entropies is not None and not self.differentiable_outputs:
            entropies = marked(entropies, loss)
        return PolicyLossOutput(
            rows.trusted(loss),
            rows.unflatten(shown["logp"]),
            entropies,
            choice.plan,
            choice.backend,
            self.call.without_inputs(),
            detached,
            per_row,
            by,
            more,
            versions_of(self.call, detached, per_row),
            _table=table,
        )
