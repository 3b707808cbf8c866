"""Random policy losses against the fp64 reference by the package's criterion, and
changes that must not affect the result.
"""

import math

import pytest
import torch
from drawn_calls import BACKENDS, PolicyCall, fuzz, lengths, policy_calls

import reweight_ops as rw
from reweight_ops.testing import compare

COMPILED = [b for b in BACKENDS if b != "triton"]


def result(call: PolicyCall, batch, **options):
    """A call's results and its gradient."""
    z = batch["logits"].detach().requires_grad_()
    given = {**call.head(), **options}
    logits = z * 1 if given.get("consume_logits") else z
    out = rw.policy_loss(
        **{**batch, "logits": logits}, spec=call.spec, plan=call.plan, backend=call.backend, **given
    )
    (grad,) = torch.autograd.grad(out.loss.sum(), z)
    return {
        "loss": out.loss.detach(),
        "grad": grad,
        "logps": out.per_token_logps,
        "entropies": out.entropies.detach(),
        "per_token_loss": out.per_token_loss,
        "ratio": out.ratio,
        "coef": out.coef,
        "metrics": out.metrics.sums,
    }


def assert_same(found, expected, what):
    for name, value in found.items():
        assert torch.equal(value.nan_to_num(7.5), expected[name].nan_to_num(7.5)), (
            f"{what}: {name} {value} instead of {expected[name]}"
        )


def meets_the_criterion(call: PolicyCall):
    found = compare(call.spec, call.batch(), backend=call.backend, plan=call.plan, **call.head())
    assert found.passed, found


def layouts(z):
    """The same logits at other strides."""
    *rows, v = z.shape
    yield "a longer row", torch.full((*rows, v + 3), 9.0, dtype=z.dtype)[..., 1 : v + 1].copy_(z)
    yield (
        "every second row",
        torch.full((2 * rows[0], *rows[1:], v), 9.0, dtype=z.dtype)[::2].copy_(z),
    )
    if len(rows) == 2:
        yield (
            "transposed",
            torch.full((rows[1], rows[0], v), 9.0, dtype=z.dtype).transpose(0, 1).copy_(z),
        )


def ignores_what_it_should(call: PolicyCall):
    """Strides, what ignored rows hold, where the gradient is written, and whether the
    call was made before.
    """
    batch = call.batch()
    expected = result(call, batch)
    assert_same(result(call, batch), expected, "again")
    assert_same(result(call, batch, consume_logits=True), expected, "in place")
    for name, z in layouts(batch["logits"]):
        assert_same(result(call, {**batch, "logits": z}), expected, name)
        assert_same(
            result(call, {**batch, "logits": z}, consume_logits=True), expected, f"{name}, in place"
        )
    out = rows_out(batch)
    assert (
        not expected["grad"][out].any()
        and not expected["logps"][out].any()
        and not expected["entropies"][out].any()
    )
    with_nan = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    with_nan["logits"][out] = math.nan
    for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
        if name in with_nan:
            with_nan[name][out] = math.inf
    found, metrics = result(call, with_nan), expected.pop("metrics")
    assert_same(
        {name: x for name, x in found.items() if name in expected},
        expected,
        "with NaN in ignored rows",
    )
    assert torch.equal(found["metrics"].nan_to_num(7.5), metrics.nan_to_num(7.5))


def rows_out(batch):
    out = batch["completion_ids"] == -100
    return out | (batch["completion_mask"] == 0) if "completion_mask" in batch else out


def keeps_nan_rows_apart(call: PolicyCall):
    """A row that holds NaN or +inf, or nothing but -inf: NaN there, and the bits of the
    others.
    """
    batch = call.batch()
    rows = (~rows_out(batch)).nonzero()
    if not len(rows):
        return
    before, z = result(call, batch), batch["logits"].clone()
    at = tuple(rows[call.seed % len(rows)].tolist())
    kind, columns = call.seed % 3, dict(call.options).get("vocab_size", call.vocab)
    z[(*at, slice(None) if kind == 2 else call.seed % columns)] = (math.nan, math.inf, -math.inf)[
        kind
    ]
    after = result(call, {**batch, "logits": z})
    for name in ("logps", "entropies"):
        assert after[name][at].isnan()
    others = torch.ones(batch["completion_ids"].shape, dtype=torch.bool)
    others[at] = False
    for name in (
        "logps",
        "entropies",
        *(("grad", "per_token_loss", "coef") if call.plan == "one_pass" else ()),
    ):
        assert torch.equal(after[name][others], before[name][others]), name
    selected = before["coef"][at] != 0 or before["grad"][at].any()
    if call.plan == "one_pass" and selected:
        assert after["grad"][at][:columns].isnan().all() and after["loss"].isnan()


@pytest.mark.parametrize("examples, repeatable", lengths(30, 3000))
@pytest.mark.parametrize(
    "check", [meets_the_criterion, ignores_what_it_should, keeps_nan_rows_apart]
)
def test_compiled_and_reference(check, examples, repeatable):
    fuzz(check, policy_calls(COMPILED), examples, repeatable)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton is not installed")
@pytest.mark.parametrize(
    "check, examples, repeatable",
    [
        pytest.param(meets_the_criterion, 2, True, id="criterion-short"),
        pytest.param(keeps_nan_rows_apart, 1, True, id="nan-short"),
        pytest.param(meets_the_criterion, 100, False, id="criterion-long", marks=pytest.mark.slow),
        pytest.param(keeps_nan_rows_apart, 100, False, id="nan-long", marks=pytest.mark.slow),
        pytest.param(ignores_what_it_should, 20, False, id="layouts-long", marks=pytest.mark.slow),
    ],
)
def test_triton(check, examples, repeatable):
    """In the interpreter, a second or more a call; other layouts are many calls."""
    fuzz(check, policy_calls(["triton"]), examples, repeatable)
