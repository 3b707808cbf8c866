"""The divergence of TRL's ``DistillationTrainer`` from the hidden states of student and
teacher, on our op.

It is ``ChunkedDivergenceFunction``, which TRL 1.16 has by name in the trainer's module
and 1.15 imports from its kernels at every call.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor
from trl.trainer import distillation_trainer

from ..._core.calls.dtensors import has_dtensors
from ..._core.calls.keywords import HiddenLogits
from ..._core.losses.linear import linear_token_stats
from ..._core.losses.linear_distillation import linear_token_divergence
from ..patching import Counts, Replacement

_PARAMETERS = (
    "ctx",
    "student_hidden",
    "student_weight",
    "student_bias",
    "teacher_hidden",
    "teacher_weight",
    "teacher_bias",
    "beta",
    "temperature",
    "student_logit_scale",
    "student_final_logit_softcapping",
    "teacher_logit_scale",
    "teacher_final_logit_softcapping",
)


class ChunkedDivergence:
    """A replacement of TRL's autograd function: ``apply`` with the same arguments and
    results, counted.
    """

    def __init__(self, backend: str, counts: Counts, original: Any) -> None:
        self.backend = backend
        self.counts = counts
        self.original = original

    def apply(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(divergence, the student's entropy)``, ``[N]`` fp32 each; the gradient
        flows to the student, the entropy has none.

        ``beta`` 0: KL(teacher ‖ student), 1: KL(student ‖ teacher), between:
        ``β·KL(teacher ‖ m) + (1-β)·KL(student ‖ m)`` with
        ``m = (1-β)·student + β·teacher``. Logits are fp32, as TRL's; the entropy is one
        projection of the student more.
        """
        student_head, teacher_head = (
            (student_hidden, student_weight, student_bias),
            (teacher_hidden, teacher_weight, teacher_bias),
        )
        reason = _unsupported_reason(student_head, teacher_head)
        if reason is not None:
            self.counts.left(reason)
            result: tuple[Tensor, Tensor] = self.original.apply(
                student_hidden,
                student_weight,
                student_bias,
                teacher_hidden,
                teacher_weight,
                teacher_bias,
                beta,
                temperature,
                student_logit_scale,
                student_final_logit_softcapping,
                teacher_logit_scale,
                teacher_final_logit_softcapping,
            )
            return result
        self.counts.ran("linear_token_divergence")
        kinds: dict[float, dict[str, Any]] = {
            0.0: {"kind": "forward_kl"},
            1.0: {"kind": "reverse_kl"},
        }
        kind = kinds.get(float(beta), {"kind": "generalized_jsd", "beta": beta})
        hidden, weight, bias = _projected(*student_head)
        teacher = _projected(*(None if x is None else x.detach() for x in teacher_head))  # type: ignore[arg-type]
        student: dict[str, Any] = {
            "lm_head_bias": bias,
            "logit_scale": student_logit_scale,
            "softcap": student_final_logit_softcapping,
            "temperature": temperature,
            "logits_dtype": torch.float32,
            "backend": self.backend,
        }
        with torch.autocast(hidden.device.type, enabled=False):
            other = HiddenLogits(
                *teacher, logit_scale=teacher_logit_scale, logits_dtype=torch.float32
            )
            divergence = linear_token_divergence(
                hidden,
                weight,
                other,
                other_softcap=teacher_final_logit_softcapping,
                **kind,
                **student,
            )
            with torch.no_grad():
                any_token = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
                found = linear_token_stats(
                    hidden, weight, any_token, stats=("entropies",), **student
                )
        return divergence, found.entropies  # type: ignore[return-value]


_Head = tuple[Tensor, Tensor, Tensor | None]


def _dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which TRL projects: autocast's, or that of the
    hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _projected(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Head:
    dtype = _dtype(hidden)
    return hidden.to(dtype), weight.to(dtype), bias


def _unsupported_reason(*heads: _Head) -> str | None:
    """Why TRL has to compute this, or None."""
    if any(hasattr(weight, "ds_id") for _, weight, _ in heads):
        return "DeepSpeed ZeRO-3, which frees a head's weight before backward"
    if has_dtensors(heads):
        return "hidden states or a head that are DTensors"
    if len({len(weight) for _, weight, _ in heads}) > 1:
        return "heads of different vocabularies, of which TRL reads the student's columns"
    if any(bias is not None and bias.dtype != _dtype(hidden) for hidden, _, bias in heads):
        return "a head's bias in another dtype than its projection, which TRL adds to fp32 logits"
    return None


def divergence_replacements(backend: str, counts: Counts) -> list[Replacement]:
    """Return the replacements: the function, and the devices that drop masked positions
    before it.

    TRL 1.16 drops them on Triton's devices; here CPUs do too.
    """
    owner: Any = distillation_trainer
    name = "ChunkedDivergenceFunction"
    if not hasattr(owner, name):
        # without Triton TRL 1.15 has no such trainer
        with contextlib.suppress(ImportError):
            owner = importlib.import_module("trl.kernels.chunked_divergence")
        if not hasattr(owner, name):
            return []
    stand_in = ChunkedDivergence(backend, counts, getattr(owner, name))
    replacements = [Replacement(owner, name, stand_in, _PARAMETERS, read_from="forward")]
    on_triton = getattr(distillation_trainer, "_use_triton", None)
    if on_triton is not None:

        def compacts(device: torch.device) -> bool:
            return device.type == "cpu" or on_triton(device)

        replacements.append(Replacement(distillation_trainer, "_use_triton", compacts, ("device",)))
    return replacements
