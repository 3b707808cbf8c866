"""The CUDA kernels, run thread by thread on the CPU.

The tests check accuracy by the package's criterion, the rules of backends/base.py, and
every schedule.
"""

import math

import contract
import packed_rows
import pytest
import torch
from built_in import own_rules, own_weights
from contract import ONE, loss_grad, stats_of
from criterion import assert_values
from cuda_emulation.fixtures import SCHEDULES, emulated
from kernel_oracle import STATS, rows, statistics

from reweight_ops._core.backends import reference_token as reference
from reweight_ops._core.backends.base import RowInputs, SoftmaxParams
from reweight_ops._core.formula.loss_program import Program
from reweight_ops._core.rows.groups import IGNORE_INDEX
from reweight_ops.errors import InvalidCall

#: One step of a thread is 4 vectors, and one of a block 320 x 4: the widths go from one
#: column to more than two steps.
WIDTHS = [1, 9, 2563, 11001]


@pytest.fixture(scope="module")
def kernels():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the oracle's tensors are small
    yield emulated()
    torch.set_num_threads(threads)


@pytest.fixture
def cuda(kernels):
    module, native = kernels
    module.set_schedule("random", 1)
    return native


@pytest.fixture(params=SCHEDULES)
def schedule(request, kernels):
    def set_seed(seed):
        kernels[0].set_schedule(request.param, seed)

    set_seed(0)
    return set_seed


@pytest.fixture(params=contract.DTYPES)
def dtype(request):
    return contract.DTYPES[request.param]


@pytest.mark.parametrize(("kind", "softmax"), contract.KINDS)
def test_statistics_and_gradient(cuda, dtype, softmax, kind):
    for v in WIDTHS:
        contract.check_statistics_and_gradient(cuda, dtype, 6, v, softmax, kind)


@pytest.mark.parametrize("bonus", [0.0, 0.05])
@pytest.mark.parametrize("softmax", contract.SOFTMAXES)
def test_token_loss_grad(cuda, dtype, softmax, bonus):
    for v in WIDTHS:
        contract.check_token_loss_grad(cuda, dtype, 12, v, softmax, bonus)


@pytest.mark.parametrize(
    ("name", "weight"), [*zip(own_rules(), [*own_weights()] * 3, strict=False)]
)
def test_every_rule_and_weight(cuda, name, weight):
    """Rows and gradients of the same derivatives, against the reference in fp32."""
    n, v = 8, 700
    z, ids = rows(n, v, torch.float32, "plain")
    g = torch.Generator().manual_seed(1)
    logp = statistics(z, ids, torch.ones(n))["logp"]
    old, ref, sampling = (logp + 0.3 * torch.randn(n, generator=g) for _ in range(3))
    inputs = RowInputs(
        torch.rand(2, n, generator=g), old, torch.randn(n, generator=g), ref, sampling
    )
    program = Program.of((name, "k3"), ((weight, "all"),))
    rule, weight = own_rules()[name], own_weights()[weight]

    def values(cls):
        made = cls() if cls.name != "probability_band" else None
        return [0.01, 2.0] if made is None else [float(x) for x in made.parameters().values()]

    try:
        params = torch.tensor([-20.0, 20.0, 1.0, *values(rule), 0.1, 20.0, 10.0, *values(weight)])
    except TypeError:  # a hyper-parameter without default
        params = torch.tensor(
            [
                -20.0,
                20.0,
                1.0,
                *[0.5] * len(rule.parameter_names()),
                0.1,
                20.0,
                10.0,
                *[0.5] * len(weight.parameter_names()),
            ]
        )
    out, want_out = torch.full_like(z, math.nan), torch.full_like(z, math.nan)
    got = cuda.token_loss_grad(z, ids, ONE, SoftmaxParams(v), inputs, program, params, out)
    want = reference.token_loss_grad(
        z, ids, ONE, SoftmaxParams(v), inputs, program, params, want_out
    )
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(out, want_out, rtol=2e-5, atol=2e-6)
    assert (out != 0).any()


@pytest.mark.parametrize("softcap", [math.inf, 20.0])
def test_minus_infinity_has_no_mass_and_no_gradient(cuda, dtype, softcap):
    contract.check_minus_infinity(cuda, dtype, softcap)


@pytest.mark.parametrize("low", [-1e4, -1e10, -1e30, "lowest"])
def test_masked_by_a_number(cuda, dtype, low):
    contract.check_masked_by_a_number(cuda, dtype, low)


def test_a_masked_target(cuda):
    contract.check_a_masked_target(cuda)


def test_a_sure_row(cuda):
    contract.check_a_sure_row(cuda)


@pytest.mark.parametrize("softcap", [math.inf, 20.0])
@pytest.mark.parametrize("at", [0, 2100, 5002])
def test_a_bad_row_is_nan_and_stays_alone(cuda, dtype, softcap, at):
    contract.check_a_bad_row(cuda, dtype, softcap, at)


def test_ignored_rows_or_invalid_are_never_read(cuda, dtype):
    contract.check_ignored_rows_or_invalid(cuda, dtype)


def test_zero_gradient_rows_get_exact_zeros(cuda, dtype):
    contract.check_zero_gradient_rows(cuda, dtype)


def test_padding_and_shards(cuda, dtype):
    contract.check_padding_and_shards(cuda, dtype)


@pytest.mark.parametrize("v", [1031, 6144])
def test_any_layout_gives_the_same_bits(cuda, dtype, v):
    contract.check_layouts(cuda, dtype, v)


@pytest.mark.parametrize("v", [1, 7, 33, 2563])
def test_a_gradient_at_any_address(cuda, dtype, v):
    contract.check_addresses(cuda, dtype, v)


def test_nothing_is_written_around_rows(cuda, dtype):
    contract.check_nothing_is_written_around_rows(cuda, dtype)


def test_offsets_beyond_two_to_the_31(cuda):
    contract.check_offsets_beyond_two_to_the_31(cuda)


def test_a_row_depends_on_itself_alone(cuda, schedule, dtype):
    """A row has the same bits alone, anywhere in a batch, under every schedule, in
    place or not, for any statistics.
    """
    n, v = 9, 2563  # four or five rows per block
    z, ids = rows(n, v, dtype, "plain")
    t = torch.linspace(0.5, 1.5, n)
    ids[4] = IGNORE_INDEX
    want_rows, want = loss_grad(cuda, z, ids, temperature=t)
    want_stats = stats_of(cuda, z, ids, temperature=t)
    assert torch.equal(want_rows[0], want_stats["logp"]), (
        "one pass and the statistics must agree: the on-policy ratio is exactly 1"
    )
    assert torch.equal(want_rows[1], want_stats["entropy"])
    truth = statistics(z.double(), ids.clamp(min=0), t.double())["logp"]
    assert ((want_stats["logp"] - truth).abs() < 1e-4)[ids != IGNORE_INDEX].all()
    for seed in range(3):
        schedule(seed)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        for name, value in stats_of(cuda, z[order], ids[order], temperature=t[order]).items():
            assert torch.equal(value, want_stats[name][order])
        clone = z.clone()
        got_rows, _ = loss_grad(cuda, clone, ids, out=clone, temperature=t)
        assert torch.equal(clone, want) and torch.equal(got_rows, want_rows)
        out = torch.full_like(z, math.nan)
        derivatives = {"logp": want_rows[4], "entropy": want_rows[5]}
        cuda.token_grad(z, ids, t, SoftmaxParams(v), want_stats, derivatives, out)
        again = z[order].clone()
        cuda.token_grad(
            again,
            ids[order],
            t[order],
            SoftmaxParams(v),
            {k: s[order] for k, s in want_stats.items()},
            {k: c[order] for k, c in derivatives.items()},
            again,
        )
        assert torch.equal(again, out[order]) and not out.isnan().any()
    for names in (("logp",), ("logp", "entropy"), ("lse", "logp")):
        for name, value in stats_of(cuda, z[7:8], ids[7:8], names, temperature=t[7:8]).items():
            assert torch.equal(value, want_stats[name][7:8])


def test_the_target_of_a_sure_row(cuda):
    contract.check_the_target_of_a_sure_row(cuda)


def test_no_bias_from_the_rounded_scale(cuda):
    """log2(e)/T in fp32 sharpens every row by the same factor. The mean error of many
    rows shows what the rounding of each row hides.
    """
    n, v = 64, 2563
    z, ids = rows(n, v, torch.float32, "plain")
    t = max(
        (torch.tensor([1.0 + k / 64]) for k in range(64)),
        key=lambda t: abs(float(torch.tensor(1.44269504) / t) * float(t) / math.log2(math.e) - 1),
    )
    got = stats_of(cuda, z, ids, temperature=t)
    truth = statistics(z.double(), ids, t.double().expand(n))
    for name in ("logp", "lse"):
        error = got[name].double() - truth[name]
        assert error.mean().abs() <= 4 * error.std() / math.sqrt(n), (
            f"{name}: {error.mean():.3g} ± {error.std() / math.sqrt(n):.3g}"
        )


def test_gradients_keep_their_sign_and_order(cuda):
    contract.check_signs_and_order(cuda)


@pytest.mark.parametrize("shape", [(0, 10), (2, 0, 10), (0, 3, 10)])
def test_no_rows(cuda, shape):
    contract.check_no_rows(cuda, shape)


def test_a_long_row(cuda):
    """Qwen's vocabulary, by the criterion."""
    z, ids = rows(2, 151936, torch.bfloat16, "plain")
    exact, single = (
        statistics(z.to(d), ids, torch.ones(2, dtype=d)) for d in (torch.float64, torch.float32)
    )
    got = stats_of(cuda, z, ids)
    for name in STATS:
        assert_values(got[name], single[name], exact[name], name)


def test_a_status_reaches_the_caller(kernels):
    module, native = kernels
    z, ids = rows(2, 10, torch.float32, "plain")
    module.set_status(700)
    try:
        with pytest.raises(AssertionError, match="status 700"):
            stats_of(native, z, ids)
    finally:
        module.set_status(0)


def test_bad_arguments_do_not_reach_the_kernel(cuda):
    z, ids = rows(4, 60, torch.float32, "plain")
    for message, call in {
        "the last dimension": lambda: stats_of(cuda, z.T, torch.zeros(60, dtype=torch.int64)),
        "ids is": lambda: stats_of(cuda, z, ids[:3]),
        "vocab_size is 61": lambda: stats_of(cuda, z, ids, softmax=SoftmaxParams(61)),
        "overwrite each other": lambda: loss_grad(
            cuda, z[:1].expand(4, 60), ids, out=z[:1].expand(4, 60)
        ),
    }.items():
        with pytest.raises(InvalidCall, match=message):
            call()


# --- packed rows


@pytest.mark.parametrize(
    ("kind", "softmax"),
    [
        ("plain", "per_row"),
        ("peaked", "cold"),
        ("shifted", "plain"),
        ("low", "plain"),
        ("plain", "softcap"),
    ],
)
def test_packed_rows_are_as_accurate(cuda, dtype, softmax, kind):
    for v in (1, 9, 2563):
        packed_rows.check_accuracy(cuda, dtype, 6, v, softmax, kind)


def test_each_packed_row_is_as_alone(cuda, dtype, schedule):
    packed_rows.check_each_row_alone(cuda, dtype, many=True)


def test_corners_of_packed_rows(cuda):
    packed_rows.check_corners(cuda, torch.float32)


def test_packed_sure_rows(cuda):
    packed_rows.check_sure_rows(cuda)
