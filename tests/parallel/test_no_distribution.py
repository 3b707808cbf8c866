"""Rows of two models that have no distribution, or an infinite divergence: S25 and S26
of docs/semantics.md, the same in every plan and over shards.
"""

import math

import pytest
import torch

import reweight_ops as rw

KINDS = ("forward_kl", "reverse_kl", "jeffreys", "generalized_jsd")
N, V = 8, 10
# what is wrong with rows 1 to 3 is so with rows 5 to 7, which no term selects
WEIGHTS = torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0])


def odd_rows():
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(N, V, generator=g), torch.randn(N, V, generator=g)
    for row in (1, 5):
        z[row, 3] = math.nan
    for row in (2, 6):
        y[row] = -math.inf
    for row in (3, 7):
        z[row] = -math.inf
    y[4, 2] = -math.inf  # KL(p‖q) is infinite
    return z, y


def patterns(kind, z, y, hidden=False, **options):
    """Of every row: whether its gradient is NaN, by each column, and which are 0."""
    found = {}

    def distillation(plan):
        return lambda x: (
            rw.distillation_loss(x, y, kind=kind, token_weights=WEIGHTS, plan=plan, **options).loss
        )

    calls = {
        "two_pass": distillation("two_pass"),
        "per token": lambda x: (rw.token_divergence(x, y, kind=kind, **options) * 1.0).backward(
            WEIGHTS
        ),
    }
    if "process_group" not in options and kind != "generalized_jsd":
        calls["one_pass"] = distillation("one_pass")
    for name, call in calls.items():
        x = z.clone().requires_grad_()
        loss = call(x)
        if loss is not None:
            loss.backward()
        found[name] = x.grad
    return found


def expected(kind):
    """Which rows have a gradient of NaN, in every column."""
    rows = torch.tensor(
        [False, True, True, True, kind in ("reverse_kl", "jeffreys"), False, False, False]
    )
    return rows[:, None].expand(N, V)


def wrong_in(found, kind, columns=slice(None)):
    wrong, nan = [], expected(kind)[:, columns]
    for name, grad in found.items():
        if not torch.equal(grad.isnan(), nan):
            wrong.append(f"{kind}, {name}: {grad.isnan().int().tolist()}")
        if (grad[5:] != 0).any() or not grad[0].any():
            wrong.append(f"{kind}, {name}: {grad[5:]}")
    return wrong


@pytest.mark.parametrize(
    "backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)]
)
def test_every_plan_of_one_process(backend):
    wrong = [
        e for kind in KINDS for e in wrong_in(patterns(kind, *odd_rows(), backend=backend), kind)
    ]
    assert not wrong, "\n".join(wrong)


def over_shards(ranks):
    group, columns = (
        ranks.group(range(4)),
        [slice(0, 2), slice(2, 3), slice(3, 9), slice(9, 10)][ranks.rank],
    )
    z, y = (x[:, columns].contiguous() for x in odd_rows())
    return [
        e
        for backend in ("reference", "cpu")
        for kind in KINDS
        for e in wrong_in(patterns(kind, z, y, backend=backend, process_group=group), kind, columns)
    ]


def test_shards(four):
    four.check(over_shards)
