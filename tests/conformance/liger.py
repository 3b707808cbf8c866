"""Liger's losses from hidden states (PyTorch in chunks, without torch.compile): GRPO's
relatives, pairs, distillation; and its Triton GRPO on logits,
without a GPU in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch

import reweight_ops as rw

from .batch import batch, logits
from .table import Case, result
from .trl_losses import LOSS_TYPES, TOKENS

EXTRAS = {
    "": {},
    "kl": dict(beta=0.04),
    "kl corrected": dict(beta=0.04, use_bias_correction_kl=True),
    "delta": dict(delta=1.3),
    "sampler's ratio": dict(ratio=True),
}
LUSPO = "Liger's luspo has no element mask: ignored tokens are in its sum (TRL's had the same until its #6654)"
KERNEL_LUSPO = "Liger's kernel weighs luspo's tokens by their number over the padded length, and divides by both; TRL sums them"
OVERFLOWS = "a ratio that overflows in an ignored token"
OVERFLOW = "Liger multiplies by the mask after exp: a ratio that overflows in an ignored token makes the loss NaN"


def grpo() -> Iterator[Case]:
    """From hidden states."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    def run(b, settings: dict, given: dict, items: dict):
        names = {"eps_low": "epsilon_low", "eps_high": "epsilon_high"}
        fields = {names.get(name, name): value for name, value in settings.items()}
        head = LigerFusedLinearGRPOLoss(
            compiled=False, use_ref_model=settings["beta"] != 0, chunk_size=2, **fields
        )
        more = {
            "bias": b.bias,
            "ref_per_token_logps": given["ref"] if settings["beta"] else None,
            "old_per_token_logps": given["old"],
        }
        return head(
            b.hidden,
            b.weight,
            b.ids,
            b.mask,
            b.advantages,
            vllm_is_ratio=given["ratio"],
            **more,
            **items,
        )[0]

    yield from _losses("Liger GRPO", run)


def kernel() -> Iterator[Case]:
    """From logits, which have one position more than ids."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def run(b, settings: dict, given: dict, items: dict):
        z = torch.nn.functional.pad(logits(b), (0, 0, 0, 1))
        more = {"vllm_is_ratio": given["ratio"], "inplace": False, "reduce": True}
        return triton_grpo_loss(
            z, given["old"], given["ref"], b.ids, b.advantages, b.mask, **settings, **items, **more
        )[0]

    yield from _losses("Liger kernel", run)


def _losses(peer: str, run: Callable[..., torch.Tensor]) -> Iterator[Case]:
    for loss_type, level, (name, extra) in itertools.product(
        LOSS_TYPES, ("token", "sequence"), EXTRAS.items()
    ):
        if loss_type in ("cispo", "sapo", "vespo") and (level == "sequence" or "delta" in extra):
            continue  # refused, or not read
        if loss_type == "vespo" and extra.get("ratio"):
            # folded into its weight, from the sampler's log-probs: TRL's test has it
            continue
        # else a sequence's number stands for its tokens
        per_token = level == "token" or "beta" in extra or "ratio" in extra
        luspo = KERNEL_LUSPO if peer == "Liger kernel" else LUSPO if per_token else ""
        yield _grpo(
            peer, run, loss_type, level, name, dict(extra), luspo if loss_type == "luspo" else ""
        )
    yield _grpo(peer, run, "dapo", "token", OVERFLOWS, {}, OVERFLOW if peer == "Liger GRPO" else "")


def _grpo(
    peer: str,
    run: Callable[..., torch.Tensor],
    loss_type: str,
    level: str,
    name: str,
    extra: dict,
    because: str,
) -> Case:
    b, weighted, beta = batch(temperature=0.9), extra.pop("ratio", False), extra.pop("beta", 0.0)
    high = 1.15 if loss_type == "cispo" else 0.28
    old = torch.where(b.mask == 0, -math.inf, b.old) if name == OVERFLOWS else b.old
    items = {"num_items_in_batch": TOKENS} if loss_type in ("dapo", "cispo", "vespo") else {}

    def theirs():
        settings = dict(
            beta=beta,
            eps_low=0.2,
            eps_high=high,
            loss_type=loss_type,
            max_completion_length=16,
            importance_sampling_level=level,
            temperature=0.9,
            **extra,
        )
        given = {"old": old, "ref": b.ref, "ratio": b.ratio if weighted else None}
        return result(run(b, settings, given, items), *b.leaves)

    def ours():
        spec = rw.methods.trl(
            loss_type,
            importance_sampling_level=level,
            max_completion_length=16,
            epsilon_high=high,
            beta=beta,
            unused="ignore",
            **{"use_bias_correction_kl": False, **extra},
        )
        out = rw.linear_policy_loss(
            b.hidden,
            b.weight,
            b.ids,
            b.advantages,
            spec=spec,
            lm_head_bias=b.bias,
            temperature=0.9,
            completion_mask=b.mask,
            old_per_token_logps=old,
            ref_per_token_logps=b.ref,
            unused="ignore",
            **({"importance_sampling_ratio": b.ratio} if weighted else {}),
            **items,
        )
        return result(out.loss, *b.leaves)

    return Case(peer, " ".join(filter(None, (loss_type, level, name))), theirs, ours, because)


DPO = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)


def pairs() -> Iterator[Case]:
    """Halves, as in TRL; the pair without a token is left out, for Liger
    divides by it."""
    from liger_kernel import chunked_loss

    for loss_type in DPO:
        smoothing = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
        head = chunked_loss.LigerFusedLinearDPOLoss(
            compiled=False, loss_type=loss_type, **smoothing
        )
        yield _pair(
            f"dpo {loss_type}", head, rw.preference.trl(loss_type, **smoothing), reference=True
        )
    yield _pair(
        "simpo",
        chunked_loss.LigerFusedLinearSimPOLoss(compiled=False, beta=2.0, compute_nll_loss=False),
        rw.preference.simpo(beta=2.0, gamma=0.5),
    )


def _pair(name: str, head, spec, reference: bool = False) -> Case:
    b, other = batch(), batch(seed=1)
    mask = torch.arange(b.mask.size(1)) < torch.tensor([9, 3, 4, 5, 2, 9])[:, None]
    labels = torch.where(mask, b.ids, -100)

    def theirs():
        more = (
            {
                "ref_input": other.hidden.detach(),
                "ref_weight": other.weight.detach(),
                "ref_bias": other.bias.detach(),
            }
            if reference
            else {}
        )
        loss, *_ = head(b.weight, b.hidden, labels, b.bias, **more)
        return result(loss, *b.leaves)

    def ours():
        more = {}
        if reference:
            with torch.no_grad():
                more["ref_per_token_logps"] = rw.linear_token_logps(
                    other.hidden, other.weight, b.ids, lm_head_bias=other.bias
                )
        out = rw.linear_preference_loss(
            b.hidden, b.weight, labels, spec=spec, lm_head_bias=b.bias, **more
        )
        return result(out.loss, *b.leaves)

    return Case("Liger pairs", name, theirs, ours)


def distillation() -> Iterator[Case]:
    """The mean over tokens that are in, for the soft loss alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    for beta, temperature in itertools.product((0.0, 0.3, 1.0), (1.0, 2.0)):
        b, other = batch(), batch(seed=1)
        flat, labels = b.hidden.flatten(0, 1), torch.where(b.mask.bool(), b.ids, -100).flatten()
        teacher = (other.hidden.detach().flatten(0, 1), other.weight.detach(), other.bias.detach())
        kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "generalized_jsd")

        def theirs(
            b=b, flat=flat, labels=labels, teacher=teacher, beta=beta, temperature=temperature
        ):
            head = LigerFusedLinearJSDLoss(
                weight_hard_loss=0.0,
                weight_soft_loss=1.0,
                beta=beta,
                temperature=temperature,
                compiled=False,
                chunk_size=16,
            )
            return result(head(flat, b.weight, *teacher[:2], labels, b.bias, teacher[2]), *b.leaves)

        def ours(
            b=b,
            flat=flat,
            labels=labels,
            teacher=teacher,
            beta=beta,
            temperature=temperature,
            kind=kind,
        ):
            out = rw.linear_distillation_loss(
                flat,
                b.weight,
                rw.HiddenLogits(*teacher),
                kind=kind,
                beta=beta if kind == "generalized_jsd" else None,
                temperature=temperature,
                lm_head_bias=b.bias,
                completion_mask=labels != -100,
            )
            return result(out.loss, *b.leaves)

        yield Case("Liger JSD", f"beta {beta} temperature {temperature}", theirs, ours)
