"""A loss of pairs as an objective: from log-probs of tokens to the loss, in torch on
small vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from ..calls.keywords import PairOptions
from ..calls.pairs import check_inputs, pair_inputs, sequence_inputs, token_inputs
from ..rows.pairs import Pairs, Sequences, Side
from ..rows.rows import Rows
from ..spec.compiled import with_tensors
from ..spec.pairs import PairSpec
from .metrics import Metrics
from .plan import Choice
from .source import MoreMetrics, SourceInfo


@dataclass(frozen=True)
class PreferenceLossOutput:
    """The result of a pair loss. All fields but ``loss`` are detached.

    ``per_pair_loss`` ``[P]`` has the weighted terms, 0 in ignored pairs. ``weights`` is
    ``[P]`` or None. ``chosen_rewards`` and ``rejected_rewards`` ``[P]`` are
    ``β·(log π - log π_ref)`` of the sequence, or ``β·log π`` without a reference.
    ``chosen_logps`` and ``rejected_logps`` are ``[P]``, and ``per_token_logps`` has
    shape R.

    ``metrics`` has TRL's names ``rewards/chosen rewards/rejected rewards/margins
    rewards/accuracies logps/chosen logps/rejected``, and
    ``weight/mean tokens sequences``. ``logps/accuracies`` tells how often the chosen
    sequence is the likelier one (the ranking accuracy of arXiv:2405.19534).
    """

    loss: Tensor
    per_pair_loss: Tensor
    weights: Tensor | None
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    per_token_logps: Tensor
    metrics: Metrics = field(repr=False)
    backend: str = "torch"


_TENSORS = (
    "loss",
    "per_pair_loss",
    "weights",
    "chosen_rewards",
    "rejected_rewards",
    "chosen_logps",
    "rejected_logps",
    "per_token_logps",
)


def _flatten(out: PreferenceLossOutput) -> tuple[list[Any], Any]:
    return [*(getattr(out, name) for name in _TENSORS), out.metrics.sums], (
        out.metrics.names,
        out.backend,
    )


def _unflatten(values: Any, context: Any) -> PreferenceLossOutput:
    *tensors, sums = values
    return PreferenceLossOutput(
        **dict(zip(_TENSORS, tensors, strict=True)),
        metrics=Metrics(context[0], sums),
        backend=context[1],
    )


_pytree.register_pytree_node(
    PreferenceLossOutput,
    _flatten,
    _unflatten,
    serialized_type_name="reweight_ops.PreferenceLossOutput",
)


@dataclass(frozen=True)
class PairCall:
    """A resolved call: everything except the current policy's statistics."""

    spec: PairSpec
    rows: Rows
    options: PairOptions
    tokens: dict[str, Tensor]
    given: dict[str, Tensor]

    @property
    def pairs(self) -> int:
        return self.rows.need_sequences("a pair loss").count // self.spec.group_size


def resolve_pairs(rows: Rows, spec: PairSpec, options: PairOptions) -> PairCall:
    """Check a call's inputs against its spec."""
    spec = with_tensors(spec, rows.dtype, rows.device)
    check_inputs(rows, spec, options)
    for name in ("loss_scale", "num_pairs_in_batch"):
        value = getattr(options, name)
        if isinstance(value, Tensor) and value.dim() != 0:
            raise rows.error(
                f"{name} has shape {tuple(value.shape)}, expected a number or a 0-d tensor."
            )
    return PairCall(
        spec, rows, options, token_inputs(rows, options), sequence_inputs(rows, options)
    )


@dataclass(frozen=True)
class PairObjective:
    """A pair spec bound to a call's data."""

    call: PairCall

    program = None

    @property
    def reads(self) -> tuple[str, ...]:
        requires, options = self.call.spec.requires, self.call.options
        kl = ("kl",) if options.ref_logits is not None else ()
        return ("logp", *(("log_sum_p_sq",) if "log_sum_p_sq" in requires else ()), *kl)

    def one_pass_unsupported_reason(self, info: SourceInfo, requested: bool) -> str:
        return "a pair's loss depends on all tokens of both sequences"

    def work(self) -> Any:
        raise NotImplementedError("a loss of pairs takes two passes")

    def from_one_pass(
        self, loss: Tensor, table: Tensor, choice: Choice, more: MoreMetrics | None
    ) -> PreferenceLossOutput:
        raise NotImplementedError("a loss of pairs takes two passes")

    def from_statistics(
        self, statistics: dict[str, Tensor], choice: Choice, more: MoreMetrics | None
    ) -> PreferenceLossOutput:
        known = {name: value for name, value in statistics.items() if name != "lse"}
        return pair_loss(self.call, known, choice.backend)


def pair_loss(call: PairCall, statistics: dict[str, Tensor], backend: str) -> PreferenceLossOutput:
    """Evaluate the loss from ``statistics``. Gradients flow to all of them.

    They are ``logp`` ``[N]``, and ``log_sum_p_sq`` and ``kl`` if the spec reads them.
    """
    spec, rows = call.spec, call.rows
    tokens = {
        name: torch.where(rows.keep, value, 0)
        for name, value in {**call.tokens, **statistics}.items()
    }
    if rows.trust is not None:
        tokens["logp"] = torch.where(rows.keep, tokens["logp"] + rows.trust, 0)
    s = Sequences(
        tokens,
        call.given,
        rows.keep,
        rows.need_sequences("a pair loss"),
        call.options.pairs,
        spec.group_size,
    )
    pairs = _pairs(call, s)
    total = sum(
        (term.coef * term.loss.loss(pairs) for term in spec.terms), torch.zeros_like(pairs.margins)
    )
    weight = None
    for w in spec.weights:
        factor = w.weight(pairs).detach()
        weight = factor if weight is None else weight * factor
    if weight is not None:
        total = torch.where(weight == 0, 0, weight * total)
    per_pair = torch.where(pairs.keep, total, 0)
    count = call.options.num_pairs_in_batch
    rows.check_divisor("num_pairs_in_batch", count)
    # Without a pair in the call the loss is 0, whatever the divisor is.
    divisor = (
        pairs.keep.sum().clamp(min=1)
        if count is None
        else count + (~pairs.keep.any()).to(per_pair.dtype)
    )
    loss = per_pair.sum() / divisor
    scale = call.options.loss_scale
    if not (isinstance(scale, (int, float)) and scale == 1):
        loss = loss * scale
    return _output(rows, pairs, rows.trusted(loss), per_pair, weight, backend)


def _pairs(call: PairCall, s: Sequences) -> Pairs:
    score = call.spec.score
    sums = {"logps": score.sums(s, "logp"), "sums": s.sum(s.tokens["logp"]), "lengths": s.lengths}
    for field_name, name in (("ref_logps", "ref_logp"), ("old_logps", "old_logp")):
        if name in s.given or name in s.tokens:
            sums[field_name] = score.sums(s, name)
    sums["scores"] = score.scores(s, sums["logps"], sums.get("ref_logps"))
    per_side = {name: s.split(value).unbind() for name, value in sums.items()}
    sides = tuple(
        Side(**{name: value[k] for name, value in per_side.items()})
        for k in range(call.spec.group_size)
    )
    keep = s.split(s.lengths).sum(0) > 0
    return Pairs(call.spec.beta, sides, keep, s, pair_inputs(call.rows, call.options, call.pairs))


@torch.no_grad()
def _output(
    rows: Rows, p: Pairs, loss: Tensor, per_pair: Tensor, weight: Tensor | None, backend: str
) -> PreferenceLossOutput:
    chosen, rejected = (
        torch.where(p.keep, p.beta * (side.logps if side.ref_logps is None else side.logratios), 0)
        for side in (p.chosen, p.rejected)
    )
    count, keep = p.keep.sum(), p.keep.to(loss.dtype)
    found = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(loss.dtype),
        "logps/accuracies": (p.chosen.logps > p.rejected.logps).to(loss.dtype),
        "logps/chosen": p.chosen.logps,
        "logps/rejected": p.rejected.logps,
    }
    if weight is not None:
        found["weight/mean"] = weight
    table = {name: (torch.where(p.keep, value, 0).sum(), count) for name, value in found.items()}
    table["tokens"] = (rows.keep.sum(), count)
    table["sequences"] = ((p.sequences.lengths > 0).sum(), count)
    sums = torch.stack([torch.stack([x.to(loss.dtype) for x in pair]) for pair in table.values()])
    return PreferenceLossOutput(
        loss,
        per_pair.detach(),
        None if weight is None else weight * keep,
        chosen,
        rejected,
        p.chosen.logps.detach(),
        p.rejected.logps.detach(),
        rows.unflatten(p.sequences.tokens["logp"].detach()),
        Metrics(tuple(table), sums),
        backend,
    )
