"""Kernels of other projects on logits, called as their documentation does.

None is a dependency. The results say which are missing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cases import Data
from .providers import Absent, Job, Provider, Statistics, from_statistics, through_autograd

#: What each is imported as, and the name of its distribution. The extra ``peers`` names
#: all but flash-attn, which has no wheel: it is compiled with the installed PyTorch.
PEERS = {
    "trl": "trl",
    "liger_kernel": "liger-kernel",
    "flash_attn": "flash-attn",
    "quack": "quack-kernels",
    "cut_cross_entropy": "cut-cross-entropy",
}


def import_or_absent(module: str, name: str) -> Any:
    import importlib

    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Absent(f"{module}.{name} cannot be imported ({error})") from error


def needs_gpu(t: Tensor) -> None:
    if not t.is_cuda:
        raise Absent("needs a GPU")


def liger(data: Data) -> Job:
    """Liger's Triton GRPO loss, in place as by its default, without entropy.

    It takes one position more than it scores, so that it computes one row per sequence
    less than the others.
    """
    loss = import_or_absent("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    needs_gpu(data.logits)
    if data.case.entropy:
        raise Absent("its loss has no entropy term")
    old, ids, advantages = (
        data.old[:, :-1].contiguous(),
        data.ids[:, :-1].contiguous(),
        data.advantages[:, 0].contiguous(),
    )
    options = dict(
        temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.2, loss_type="grpo", inplace=True
    )

    def of(z: Tensor) -> Tensor:
        per_token, *_ = loss(z, old, None, ids, advantages, None, **options)
        return per_token.sum() / data.case.rows

    return through_autograd(data, of)


def trl_kernel(data: Data) -> Statistics:
    """TRL's Triton kernel: log-probs and entropies in one read."""
    of = import_or_absent("trl.kernels", "selective_log_softmax_and_entropy")
    needs_gpu(data.logits)
    return lambda z: (lambda logps, entropies: (logps, entropies if data.case.entropy else None))(
        *of(z, data.ids)
    )


def _only_logps(data: Data) -> None:
    needs_gpu(data.logits)
    if data.case.entropy:
        raise Absent("cross entropy only")


def flash_attention(data: Data) -> Statistics:
    of = import_or_absent("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    _only_logps(data)
    ids = data.ids.flatten()
    return lambda z: (-of(z.flatten(0, 1), ids, inplace_backward=True)[0], None)


def quack(data: Data) -> Statistics:
    of = import_or_absent("quack.cross_entropy", "cross_entropy")
    _only_logps(data)
    ids = data.ids.flatten()
    return lambda z: (-of(z.flatten(0, 1), ids, reduction="none", inplace_backward=True), None)


def peers() -> list[Provider]:
    everything = ("loss", "logps", "logps+grad")
    return [
        Provider("Liger GRPO", liger, jobs=("loss",), in_place=True),
        Provider("TRL kernel", from_statistics(trl_kernel), everything),
        Provider("flash-attn CE", from_statistics(flash_attention), everything, in_place=True),
        Provider("QuACK CE", from_statistics(quack), everything, in_place=True),
    ]
