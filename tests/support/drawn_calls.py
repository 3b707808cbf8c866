"""Calls of the public ops that hypothesis draws: shapes, layouts, dtypes, masks,
options and values.

A draw is a few words and a seed, so that hypothesis can shrink it; the numbers come
from the seed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import reweight_ops as rw
from reweight_ops._core.backends.base import Request
from reweight_ops._core.backends.select import unsupported_reason
from reweight_ops._core.spec.ratio import SegmentRatio

BACKENDS = [
    b
    for b in ("reference", "cpu", "triton")
    if unsupported_reason(b, Request("token_stats", torch.device("cpu"), torch.float32)) is None
]
#: Every method. Packed sequences have no padded length, so that methods that divide by
#: one receive it.
SPECS = {name: entry.build() for name, entry in sorted(rw.METHODS.items())}
SPECS |= {"drpo": rw.methods.drpo(max_length=8), "dr_grpo": rw.methods.dr_grpo(horizon=8)}
METHODS = list(SPECS)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: These select tokens by rank. If tokens tie except for rounding (sure or uniform
#: ones), two precisions may select different ones.
BY_RANK = ("clip_cov", "kl_cov", "top_entropy")
#: Rows without such ties.
DISTINCT = ("plain", "masked")

#: Penalties that any policy loss accepts in addition to its own.
PENALTIES = {
    "none": None,
    "k1": rw.Penalty(rw.rules.penalties.K1(), 0.1),
    "k3": rw.Penalty(rw.rules.penalties.K3(), 0.05),
    "entropy": rw.Penalty(rw.rules.penalties.EntropyBonus(), 0.02),
}

#: Kinds of logits. The first is like a language model's. In each, the target may be any
#: column that is not masked.
ROWS = ("plain", "sure", "wide", "far", "equal", "tiny", "huge", "masked", "lowest")


def logits_of(
    kind: str,
    rows: tuple[int, ...],
    vocab: int,
    dtype: torch.dtype,
    ids: Tensor,
    g: torch.Generator,
) -> Tensor:
    """``rows + (vocab,)`` of one kind."""
    z = 2 * torch.randn((*rows, vocab), generator=g, dtype=torch.float64)
    lift = 12 * torch.rand(rows, generator=g, dtype=torch.float64)
    if kind == "sure":
        lift = 20 + 2 * lift
    z.scatter_add_(-1, ids[..., None], lift[..., None])
    largest = torch.finfo(dtype).max
    if kind == "wide":
        z *= 50
    elif kind == "far":
        z += 3e4 if dtype == torch.float16 else 1e5
    elif kind == "equal":
        z[:] = 1.5
    elif kind == "tiny":
        z *= torch.finfo(dtype).tiny / 4  # subnormal
    elif (
        kind == "huge"
        # Only the target's logit is huge. A log-prob of -1e30 has no neighbours that a
        # ratio could be of.
    ):
        z.scatter_(-1, ids[..., None], min(1e30, largest / 4))
    elif kind in ("masked", "lowest"):
        out = torch.rand(z.shape, generator=g) < 0.6
        out.scatter_(-1, ids[..., None], False)
        z[out] = -math.inf if kind == "masked" else -largest
    return z.to(dtype)


@dataclass(frozen=True)
class PolicyCall:
    """A policy loss on one backend by one plan."""

    seed: int
    method: str
    penalty: str
    backend: str
    plan: str
    dtype: str
    shape: tuple[int, int]
    vocab: int
    kinds: tuple[str, ...]
    mask: str
    packed: bool
    per_row_advantage: bool
    old: str
    options: tuple[tuple[str, Any], ...]

    @property
    def spec(self) -> rw.PolicyLossSpec:
        spec, penalty = SPECS[self.method], PENALTIES[self.penalty]
        return (
            spec
            if penalty is None or any(r.coupled for r in spec.reductions)
            else spec.with_penalty(penalty)
        )

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def head(self) -> dict[str, Any]:
        """Keywords of the softmax, the loss's scale and the backend."""
        found = dict(self.options)
        shape = self.shape if not self.packed else (math.prod(self.shape),)
        if found.get("temperature") == "row":
            found["temperature"] = torch.linspace(0.5, 2.0, math.prod(shape) or 1)[
                : math.prod(shape)
            ].reshape(shape)
        return found

    def batch(self) -> dict[str, Any]:
        """The other keywords: contiguous logits, rows ``[S, T]`` or packed."""
        g, (s, t), spec, dtype = (
            self.generator,
            self.shape,
            self.spec,
            DTYPES.get(self.dtype, torch.float64),
        )
        columns = dict(self.options).get("vocab_size", self.vocab)
        row = torch.float64 if dtype == torch.float64 else torch.float32
        ids = torch.randint(0, columns, self.shape, generator=g)
        which = torch.randint(0, len(self.kinds), self.shape, generator=g)
        z = torch.zeros(s, t, self.vocab, dtype=dtype)
        for k, kind in enumerate(self.kinds):
            z = torch.where(
                (which == k)[..., None], logits_of(kind, self.shape, self.vocab, dtype, ids, g), z
            )
        head = {
            name: self.head()[name] for name in ("temperature", "softcap") if name in self.head()
        }
        if "temperature" in head and isinstance(head["temperature"], Tensor):
            head["temperature"] = head["temperature"].reshape(*self.shape, 1).double()
        logp = log_probs(z.double(), ids, columns, **head)

        def near(spread: float) -> Tensor:
            return (
                (logp + spread * torch.randn(self.shape, generator=g, dtype=torch.float64))
                .clamp(max=-1e-4)
                .to(row)
            )

        size = self.shape if self.per_row_advantage and not spec.ratio.one_advantage else (s, 1)
        adv = torch.randn(size, generator=g, dtype=torch.float64).to(row)
        batch: dict[str, Any] = {
            "logits": z,
            "completion_ids": ids,
            "advantages": adv if "adv" in spec.requires else None,
        }
        if self.mask == "ids":
            batch["completion_ids"] = torch.where(
                torch.rand(self.shape, generator=g) < 0.4, -100, ids
            )
        elif self.mask != "none":
            batch["completion_mask"] = mask_of(self.mask, self.shape, g)
        reads_old = "old_logp" in spec.requires or (
            "log_ratio" in spec.requires and spec.ratio.against == "old"
        )
        if reads_old and self.old != "none":
            batch["old_per_token_logps"] = near(30.0 if self.old == "far" else 0.4)
        for name in ("ref", "sampling"):
            if f"{name}_logp" in spec.requires:
                batch[f"{name}_per_token_logps"] = near(0.5)
        if any(r.reads_groups for r in spec.reductions):
            batch |= {"group_ids": torch.arange(s) * 2 // max(s, 1), "num_groups": 2 if s else 0}
            batch["advantages"] = (1.0 - 2.0 * (torch.arange(s) % 2))[:, None].to(row) * adv[
                :, :1
            ].abs()
        if isinstance(spec.ratio, SegmentRatio):
            batch["segment_ids"] = (torch.arange(t) // 3).expand(self.shape).contiguous()
        return packed(batch, self.shape) if self.packed else batch


def log_probs(
    z: Tensor, ids: Tensor, columns: int, temperature: Any = 1.0, softcap: float | None = None
) -> Tensor:
    """Log-probs of the ids by plain PyTorch."""
    x = z[..., :columns]
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    return (
        torch.log_softmax(x / temperature, -1).gather(-1, ids[..., None])[..., 0]
        if x.numel()
        else z.new_zeros(ids.shape)
    )


def mask_of(kind: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """A mask: ``random`` and ``ragged`` with three dtypes, or ``empty`` without any
    row.
    """
    if kind == "empty":
        return torch.zeros(shape, dtype=torch.bool)
    if kind == "ragged":
        return (
            torch.arange(shape[-1]) < torch.randint(0, shape[-1] + 1, (*shape[:-1], 1), generator=g)
        ).to(torch.int64)
    found = torch.rand(shape, generator=g) < 0.6
    return found.float() * 0.5 if kind == "numbers" else found


def packed(batch: dict[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    """The same rows, one sequence after another, as ``[N]`` with offsets. Every row
    stays, even an ignored one.
    """
    (s, t), n = shape, math.prod(shape)
    found = {"cu_seqlens": torch.arange(s + 1) * t}
    for name, value in batch.items():
        per_sequence = name == "advantages" and t == 1
        if isinstance(value, Tensor) and value.shape[:2] == shape and not per_sequence:
            found[name] = value.reshape(n, *value.shape[2:])
        else:
            found[name] = value
    return found


def _options() -> st.SearchStrategy:
    return st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.5, 1.7, "row"]),
            "softcap": st.sampled_from([3.0, 30.0]),
            "vocab_size": st.just(11),
            "loss_scale": st.sampled_from([64.0, 1024.0]),
        },
    ).map(lambda found: tuple(sorted(found.items())))


def policy_calls(
    backends: list[str], dtypes: tuple[str, ...] = tuple(DTYPES), methods: list[str] = METHODS
) -> st.SearchStrategy:
    """Any policy loss. The interpreter that runs Triton here is slow, so that its calls
    are small.
    """

    @st.composite
    def drawn(draw: Callable) -> PolicyCall:
        backend, method = draw(st.sampled_from(backends)), draw(st.sampled_from(methods))
        small = backend == "triton"
        # There are enough rows that the error of fp32 PyTorch, the measure, is not
        # small by luck, or there are none.
        shape = draw(
            st.sampled_from(
                [(4, 3), (0, 3), (3, 0)]
                if small
                else [(4, 3), (3, 9), (12, 2), (2, 33), (24, 1), (0, 3), (3, 0)]
            )
        )
        plans = (
            ["two_pass"] if SPECS[method].one_pass_unsupported_reason else ["one_pass", "two_pass"]
        )
        dtype = draw(st.sampled_from(dtypes))
        return PolicyCall(
            seed=draw(st.integers(0, 2**16)),
            method=method,
            penalty=draw(st.sampled_from(sorted(PENALTIES, key=lambda name: name != "none"))),
            backend=backend,
            plan=draw(st.sampled_from(plans)),
            dtype=dtype,
            shape=shape,
            vocab=draw(st.sampled_from([17, 16, 33] if small else [17, 11, 64, 129, 1000])),
            kinds=tuple(
                draw(
                    st.lists(
                        st.sampled_from(DISTINCT if method in BY_RANK else ROWS),
                        min_size=1,
                        max_size=3,
                        unique=True,
                    )
                )
            ),
            mask=draw(st.sampled_from(["none", "random", "ragged", "numbers", "ids", "empty"])),
            # offsets have at least one sequence
            packed=draw(st.booleans()) and shape[0] > 0,
            per_row_advantage=draw(st.booleans()) or method in BY_RANK,
            # a ratio of e^20 has no gradient in fp16
            old=draw(st.sampled_from(["near", "none", "far"][: 2 if dtype == "fp16" else 3])),
            options=draw(_options()),
        )

    return drawn()


def fuzz(
    check: Callable[[Any], None], calls: st.SearchStrategy, examples: int, repeatable: bool
) -> None:
    """Run ``check`` on ``examples`` calls, the same ones each time if ``repeatable``.

    A failure prints the smallest call that fails.
    """
    run = settings(
        max_examples=examples,
        derandomize=repeatable,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )(given(calls)(check))
    run()


def lengths(short: int, long: int) -> list[Any]:
    """Parameters of a test: a few examples in the normal run, many new ones with the
    slow mark.

    ``REWEIGHT_OPS_FUZZ`` multiplies the latter.
    """
    import pytest

    many = int(long * float(os.environ.get("REWEIGHT_OPS_FUZZ", "1")))
    return [
        pytest.param(short, True, id="short"),
        pytest.param(many, False, id="long", marks=pytest.mark.slow),
    ]
