"""Apple's cut cross entropy: its PyTorch reference (the kernels need a GPU)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from unittest import mock

import torch

import reweight_ops as rw

from .batch import batch
from .table import Case, result


def losses() -> Iterator[Case]:
    with mock.patch(
        "torch.compile", lambda f=None, **_: f if f is not None else (lambda g: g)
    ):  # decorators: the formula, not the compiler
        from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy

    for reduction, softcap, ignored in itertools.product(
        ("mean", "sum", "none"), (None, 5.0), (False, True)
    ):
        b = batch()
        labels = torch.where(b.mask.bool(), b.ids, -100) if ignored else b.ids

        def theirs(b=b, labels=labels, reduction=reduction, softcap=softcap):
            return result(
                torch_compile_linear_cross_entropy(
                    b.hidden, b.weight, labels, softcap=softcap, reduction=reduction
                ),
                b.hidden,
                b.weight,
            )

        def ours(b=b, labels=labels, reduction=reduction, softcap=softcap):
            loss = -rw.linear_token_logps(b.hidden, b.weight, labels, softcap=softcap)
            if reduction != "none":
                loss = loss.sum() / ((labels != -100).sum() if reduction == "mean" else 1)
            return result(loss, b.hidden, b.weight)

        yield Case(
            "CCE",
            f"{reduction} softcap {softcap}{' ignored tokens' if ignored else ''}",
            theirs,
            ours,
        )
