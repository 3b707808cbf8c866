"""Metrics of a policy loss, under TRL's names.

They are computed from ``[N]`` vectors after the pass, on the device and without a
synchronisation.

Each metric is a numerator and a denominator (or an extremum), so that micro-batches and
ranks combine exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidCall
from ..calls.policy import LossCall
from ..formula.namespace import TorchNamespace
from ..formula.trace import trace_rule
from ..once import keeps
from ..rows.constants import number_like, parameter_vector
from ..spec.ratio import SequenceRatio

#: Metrics that are a minimum or maximum, and those that are sums; all others are means.
_EXTREMA = {
    "clip_ratio/low_min": "min",
    "clip_ratio/high_max": "max",
    "ratio/max": "max",
    "sampling/sampling_logp_difference/max": "max",
    "sampling/sampling_prob_difference/max": "max",
    "sampling/importance_sampling_ratio/min": "min",
    "sampling/importance_sampling_ratio/max": "max",
}
_SUMS = (
    "entropy_change",
    "tokens",
    "sequences",
    "rows_skipped",
    "rows_dropped_forward",
    "rows_dropped_backward",
)

#: verl's names of the metrics that tell how far off the sampler is.
_ROLLOUT = {
    "sampling/kl": "/rollout_corr/kl",
    "sampling/k3_kl": "/rollout_corr/k3_kl",
    "sampling/eff_sample_size": "/rollout_corr/rollout_is_eff_sample_size",
    # its differences are of probabilities, not of log-probs
    "sampling/sampling_prob_difference/mean": "/training/rollout_probs_diff_mean",
    "sampling/sampling_prob_difference/max": "/training/rollout_probs_diff_max",
    **{
        f"sampling/importance_sampling_ratio/{x}": f"/rollout_corr/rollout_is_{x}"
        for x in ("min", "mean", "max")
    },
}
#: Maps a library to the prefix of its names, and to its names of the same numbers. A
#: metric without one keeps its name. A name that begins with a slash is complete and
#: gets no prefix.
NAMINGS: dict[str, tuple[str, dict[str, str]]] = {
    "trl": ("", {}),
    "verl": (
        "actor/",
        {
            "clip_ratio/region_mean": "pg_clipfrac",
            "approx_kl": "ppo_kl",
            "kl": "kl_loss",
            **_ROLLOUT,
        },
    ),
}


class Metrics(Mapping[str, Tensor]):
    """A mapping from names to 0-d tensors without a gradient.

    They are shown, or set a coefficient (``schedules.AdaptiveEntropy``). As a term of a
    loss a metric is a constant, without a warning: an entropy bonus is a penalty of the
    spec, and ``differentiable_outputs=True`` keeps ``entropies`` in the graph.

    ``sums`` is one ``[M, 2]`` tensor of numerators and denominators (value and 1 for an
    extremum).
    """

    def __init__(self, names: tuple[str, ...], sums: Tensor, values: Tensor | None = None) -> None:
        self.names = names
        self.sums = sums
        self._values = values  # [M], divided already

    def __getitem__(self, name: str) -> Tensor:
        try:
            at = self.names.index(name)
        except ValueError:
            raise KeyError(f"{name!r}; this call has: {', '.join(self.names)}") from None
        return self.all_values[at]

    @property
    def all_values(self) -> Tensor:
        """Return ``[M]``: all values. They are divided together when the
        first is read."""
        if self._values is None:
            sums = self.sums
            means = tuple(0.0 if name in _EXTREMA or name in _SUMS else 1.0 for name in self.names)
            divided = parameter_vector(means, sums.dtype, sums.device) != 0
            values = sums[:, 0] / torch.where(divided, sums[:, 1].clamp(min=1e-30), 1)
            if not keeps(sums):
                return values
            self._values = values
        return self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self.names)})"

    @staticmethod
    def combine(parts: Iterable[Metrics]) -> Metrics:
        """Return the metrics of several micro-batches as those of one. Numerators and
        denominators add, extrema compare.
        """
        parts = list(parts)
        if not parts or any(p.names != parts[0].names for p in parts):
            raise InvalidCall(
                "Metrics.combine: expected metrics of calls with one spec, the same names in each."
            )
        stacked = torch.stack([p.sums for p in parts])
        low, high = _neutral(stacked, math.inf).amin(0), _neutral(stacked, -math.inf).amax(0)
        return Metrics(parts[0].names, _reduced(parts[0].names, stacked.sum(0), low, high))

    def all_reduce(self, group: Any = None) -> Metrics:
        """Return the metrics over all ranks of ``group``."""
        import torch.distributed as dist

        results = []
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX):
            # NaN means that there is no row here. It must not win an extremum.
            neutral = {dist.ReduceOp.MIN: math.inf, dist.ReduceOp.MAX: -math.inf}.get(op)
            value = self.sums.clone() if neutral is None else _neutral(self.sums, neutral)
            dist.all_reduce(value, op=op, group=group)
            results.append(value)
        return Metrics(self.names, _reduced(self.names, *results))

    def as_floats(self, names: str = "trl", prefix: str | None = None) -> dict[str, float]:
        """Return plain numbers. This is the only synchronisation. ``names`` is
        ``"trl"`` or ``"verl"``.

        ``prefix`` is put before every name. The default is that of the library: none
        for TRL, ``actor/`` for verl.
        """
        if names not in NAMINGS:
            raise InvalidCall(
                f"Metrics.as_floats: names is {names!r}, expected "
                f"{' or '.join(map(repr, NAMINGS))}."
            )
        usual, known = NAMINGS[names]
        before = usual if prefix is None else prefix
        values = self.all_values.tolist() if self.names else []
        named = [known.get(name, name) for name in self.names]
        return {
            x[1:] if x.startswith("/") else before + x: value
            for x, value in zip(named, values, strict=True)
        }


def _neutral(sums: Tensor, neutral: float) -> Tensor:
    return torch.where(sums.isnan(), neutral, sums)


def _extremum(values: Tensor, there: Tensor, which: str) -> Tensor:
    """Return the least or greatest of the existing values.

    It is NaN without any, which a trainer's mean over steps leaves out (TRL).
    """
    end = math.inf if which == "min" else -math.inf
    ended = torch.cat([torch.where(there, values, end), values.new_full((1,), end)])
    return torch.where(there.any(), ended.amin() if which == "min" else ended.amax(), math.nan)


def _reduced(names: tuple[str, ...], total: Tensor, low: Tensor, high: Tensor) -> Tensor:
    low, high = (
        torch.where(low == math.inf, math.nan, low),
        torch.where(high == -math.inf, math.nan, high),
    )
    rows = [
        {"min": low, "max": high}[_EXTREMA[name]][i] if name in _EXTREMA else total[i]
        for i, name in enumerate(names)
    ]
    return torch.stack(rows) if rows else total


@torch.no_grad()
def policy_metrics(
    call: LossCall,
    leaves: dict[str, Tensor],
    by: tuple[Tensor, Tensor] | None,
    more: dict[str, Any] | None = None,
) -> Metrics:
    """Return the metrics of a call from its row statistics.

    ``by`` are the loss's derivatives by logp and entropy, if known. ``more`` has sums
    to add.
    """
    rows, spec = call.rows, call.spec
    if (fused := _fused(call, leaves, by)) is not None:
        return _with_sums(fused, more) if more else fused
    xp, t, known = TorchNamespace(rows.dtype), call.safe_leaves(leaves), call.leaves(leaves)
    keep = rows.keep.to(rows.dtype)
    count = keep.sum()
    found: dict[str, tuple[Tensor, Any]] = {}
    if "entropy" in leaves:
        found["entropy"] = ((t.entropy * keep).sum(), count)
    terms = call.terms(leaves).terms
    for penalty, bound in zip(spec.penalties, terms[1:], strict=True):
        if "ref_logp" in known and "ref_logp" in trace_rule(type(penalty.rule)).leaves:
            found["kl"] = ((bound.rule.loss(xp, t) * keep).sum(), count)
            break
    clipped = terms[0].rule.clipped(xp, t)
    if clipped is not None:
        low, high = (c.to(rows.dtype) * keep for c in clipped)
        found |= _clip_metrics(call, low, high, count)
    if "log_ratio" in spec.requires:
        ratio = t.log_ratio.exp()
        found["ratio/mean"] = ((ratio * keep).sum(), count)
        found["ratio/max"] = (_extremum(ratio, rows.keep, "max"), 1)
        found["approx_kl"] = (((t.old_logp - t.logp) * keep).sum(), count)
    if call.factor is not None:
        found["weight/mean"] = ((torch.where(rows.keep, call.factor, 0)).sum(), count)
    found["tokens"] = (count, 1)
    if rows.sequences is not None:
        found["sequences"] = ((rows.sequences.sum(keep) > 0).sum(), 1)
        if rows.across is not None:  # every rank counts all of them, and metrics add
            found["sequences"] = (found["sequences"][0] / rows.across.world, 1)
    if by is not None:
        found["rows_skipped"] = ((rows.keep & (by[0] == 0) & (by[1] == 0)).sum(), 1)
    found |= {name: (value, 1) for name, value in (more or {}).items()}
    numbers = {
        x: number_like(x, keep)
        for pair in found.values()
        for x in pair
        if not isinstance(x, Tensor)
    }
    flat = [
        number_like(x, keep) if isinstance(x, Tensor) else numbers[x]
        for pair in found.values()
        for x in pair
    ]
    return Metrics(tuple(found), torch.stack(flat).view(-1, 2))


#: Maps the name of a metric to the name of what a kernel computes.
_FUSED = {
    "kl": "kl",
    "entropy": "entropy",
    "ratio/mean": "ratio",
    "ratio/max": "largest ratio",
    "approx_kl": "approx_kl",
    "weight/mean": "weight",
    "tokens": "tokens",
    "sequences": "sequences",
    "rows_skipped": "skipped",
    "clip_ratio/low_min": "low_min",
    "clip_ratio/high_max": "high_max",
}


def _with_sums(metrics: Metrics, more: dict[str, Any]) -> Metrics:
    """Return the metrics and further sums."""
    values = torch.stack([number_like(x, metrics.sums) for x in more.values()])
    sums = torch.stack([values, torch.ones_like(values)], -1)
    return Metrics(
        (*metrics.names, *more),
        torch.cat([metrics.sums, sums]),
        torch.cat([metrics.all_values, values]),
    )


def _fused(
    call: LossCall, leaves: dict[str, Tensor], by: tuple[Tensor, Tensor] | None
) -> Metrics | None:
    """Return the metrics from a backend's kernels, or None if they cannot
    compute them."""
    rows, spec = call.rows, call.spec
    monitor = spec.monitor
    if (
        rows.primitives is None
        or rows.masked is None
        or monitor is None
        or by is None
        or torch.compiler.is_compiling()
    ):
        return None
    if rows.primitives.metrics is None:
        return None
    found = {name: _FUSED[name] for name in ("entropy",) if name in leaves}
    if monitor.kl is not None and call.ref_logp is not None:
        found["kl"] = "kl"
    if monitor.clip is not None:
        found |= _clip_names(call)
    if "log_ratio" in spec.requires:
        found |= {name: _FUSED[name] for name in ("ratio/mean", "ratio/max", "approx_kl")}
    if call.factor is not None:
        found["weight/mean"] = "weight"
    sequences = () if rows.sequences is None else ("sequences",)
    found |= {name: _FUSED[name] for name in ("tokens", *sequences, "rows_skipped")}
    known = {**call.stored(), **leaves, "d_logp": by[0], "d_entropy": by[1]}
    known.setdefault("old_logp", leaves["logp"])
    if call.factor is not None:
        known["factor"] = call.factor
    params = call.params
    if (averaged := call.averaged(leaves["logp"], params)) is not None:
        assert rows.primitives.ratio is not None
        known["log_ratio"], _ = rows.primitives.ratio(rows.masked, averaged)
    elif spec.ratio.one_pass_unsupported_reason is not None:
        known["log_ratio"] = call.log_ratio(leaves["logp"])
    return Metrics(
        tuple(found),
        *rows.primitives.metrics(rows.masked, monitor, params, known, tuple(found.values())),
    )


def _clip_names(call: LossCall) -> dict[str, str]:
    """Return what a kernel computes for each clip metric; see :func:`_clip_metrics`."""
    cispo, sequences = call.spec.surrogate.name == "cispo", call.rows.sequences is not None
    names = (
        {"cispo_clip_ratio": "high"}
        if cispo
        else {f"clip_ratio/{kind}_mean": kind for kind in ("low", "high", "region")}
    )
    if sequences and isinstance(call.spec.ratio, SequenceRatio) and call.adv_per_sequence:
        names = {name: f"sequence {kind}" for name, kind in names.items()}
    extrema = ("clip_ratio/low_min", "clip_ratio/high_max") if sequences and not cispo else ()
    return names | {name: _FUSED[name] for name in extrema}


def _clip_metrics(
    call: LossCall, low: Tensor, high: Tensor, count: Tensor
) -> dict[str, tuple[Tensor, Any]]:
    rows = call.rows
    cispo = call.spec.surrogate.name == "cispo"
    kinds = {"low": low, "high": high, "region": torch.maximum(low, high)}
    names = (
        {"high": "cispo_clip_ratio"}
        if cispo
        else {kind: f"clip_ratio/{kind}_mean" for kind in kinds}
    )
    if rows.sequences is None:
        return {name: (kinds[kind].sum(), count) for kind, name in names.items()}
    lengths = rows.sequences.sum(rows.keep.to(rows.dtype))
    per_sequence = {kind: rows.sequences.sum(x) / lengths for kind, x in kinds.items()}
    found: dict[str, tuple[Tensor, Any]]
    if isinstance(call.spec.ratio, SequenceRatio) and call.adv_per_sequence:
        # With one ratio and one advantage per sequence, TRL counts sequences instead of
        # tokens.
        found = {
            name: (per_sequence[kind].nan_to_num(0).sum(), rows.sequences.count)
            for kind, name in names.items()
        }
    else:
        found = {name: (kinds[kind].sum(), count) for kind, name in names.items()}
    if not cispo:
        found["clip_ratio/low_min"] = (_extremum(per_sequence["low"], lengths > 0, "min"), 1)
        found["clip_ratio/high_max"] = (_extremum(per_sequence["high"], lengths > 0, "max"), 1)
    return found
