"""Loss programs of the emulated CUDA kernels: random rules, programs wider than a warp,
in both kernels, under every schedule.
"""

from __future__ import annotations

import itertools
import math

import contract
import pytest
import torch
from cuda_emulation.fixtures import SCHEDULES, emulated
from kernel_oracle import rows
from random_losses import check_one_pass

from reweight_ops._core.backends import reference_token as reference
from reweight_ops._core.backends.base import RowInputs, SoftmaxParams
from reweight_ops._core.formula.loss_program import Program, loss_graph
from reweight_ops._core.formula.table import build_table
from reweight_ops.errors import InvalidCall


@pytest.fixture(scope="module")
def kernels():
    return emulated()


@pytest.fixture(params=["auto", "streaming"])
def cuda(request, kernels):
    module, native = kernels
    module.set_kernel(request.param)
    yield native
    module.set_kernel("auto")


@pytest.fixture(params=SCHEDULES)
def schedule(request, kernels):
    kernels[0].set_schedule(request.param, 3)


def test_random_rules(cuda, schedule):
    """A user's rules have the same results in every order of the warp's lanes."""
    check_one_pass(cuda, range(20))


def test_a_level_wider_than_a_warp(cuda, schedule):
    """Also more row weights than the lanes load at once."""
    terms = 31
    program = Program.of(("clip", *["k2", "k3"] * 4, *["entropy_bonus"] * 22))
    table = build_table(loss_graph(program))
    ends = [0, *table.levels]
    assert max(b - a for a, b in itertools.pairwise(ends)) > 32
    params = [
        -20.0,
        20.0,
        1.0,
        0.2,
        0.2,
        math.inf,
        *[0.1, 20.0, 0.2, 20.0, 10.0] * 4,
        *[0.01 * k for k in range(22)],
    ]
    z, ids = rows(6, 300, torch.float32, "plain")
    g = torch.Generator().manual_seed(0)
    old, adv, ref = (
        torch.randn(6, generator=g) * 0.1 - 6,
        torch.randn(6, generator=g),
        torch.randn(6, generator=g) * 0.3 - 6,
    )
    inputs = RowInputs(torch.rand(terms, 6, generator=g), old, adv, ref)
    assert_like_the_reference(cuda, z, ids, inputs, program, params)


def test_on_policy(cuda, schedule):
    """Without old log-probs the ratio is exactly 1, and nothing of the preceding row
    remains.
    """
    z, ids = rows(6, 300, torch.float32, "plain")
    inputs = RowInputs(
        torch.ones(1, 6), None, torch.randn(6, generator=torch.Generator().manual_seed(0))
    )
    assert_like_the_reference(
        cuda, z, ids, inputs, Program.of(("clip",)), [-20.0, 20.0, 1.0, 0.2, 0.2, math.inf]
    )


def assert_like_the_reference(cuda, z, ids, inputs, program, params):
    found = []
    for primitives in (cuda, reference):
        out = torch.full_like(z, math.nan)
        found.append(
            (
                primitives.token_loss_grad(
                    z,
                    ids,
                    contract.ONE,
                    SoftmaxParams(300),
                    inputs,
                    program,
                    torch.tensor(params),
                    out,
                ),
                out,
            )
        )
    torch.testing.assert_close(found[0], found[1], rtol=2e-5, atol=2e-6)


def test_more_registers_than_fit_are_refused(cuda):
    many = Program.of(("k3",) * 100)
    assert "registers, one pass holds 320" in cuda.program_unsupported_reason(many)
    with pytest.raises(InvalidCall, match="registers"):
        contract.loss_grad(
            cuda, *rows(2, 30, torch.float32, "plain"), program=(many, torch.zeros(2 + 300))
        )
