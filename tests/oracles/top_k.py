"""Divergences from a teacher's K stored log-probs, one row at a time. Sources: TRL
1.16, ``trl/experimental/server_distillation``, ``_add_tail_bucket`` and
``_jsd_divergence``; verl 0.9, ``verl/trainer/distillation/fsdp/losses.py``,
``kl_divergence``. Written from the sums, without a log-sum-exp.
"""

from __future__ import annotations

from torch import Tensor


def row(
    logits: Tensor, ids: list[int], teacher: list[float], tail: str, beta: float = 0.5
) -> dict[str, Tensor]:
    """Every divergence of a row of fp64 logits ``[V]`` from probabilities of listed
    ids.
    """
    everything = logits.softmax(-1)
    p, q = [everything[i] for i in ids], [logits.new_tensor(x) for x in teacher]
    mass_p, mass_q = sum(p), sum(q)
    if tail == "bucket":
        others = [i for i in range(logits.numel()) if i not in ids]
        p, q = [*p, everything[others].sum()], [*q, 1 - mass_q]
    elif tail == "renormalize":
        p, q = [x / mass_p for x in p], [x / mass_q for x in q]
    mix = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
    entropy_p, entropy_q = -sum(a * a.log() for a in p), -sum(b * b.log() for b in q)
    cross, reverse_cross = (
        -sum(b * a.log() for a, b in zip(p, q, strict=True)),
        -sum(a * b.log() for a, b in zip(p, q, strict=True)),
    )
    return {
        "forward_kl": cross - entropy_q,
        "reverse_kl": reverse_cross - entropy_p,
        "jeffreys": cross - entropy_q + reverse_cross - entropy_p,
        "cross_entropy": cross,
        "reverse_cross_entropy": reverse_cross,
        "symmetric_cross_entropy": (cross + reverse_cross) / 2,
        "generalized_jsd": sum(
            beta * b * (b / m).log() + (1 - beta) * a * (a / m).log()
            for a, b, m in zip(p, q, mix, strict=True)
        ),
    }
