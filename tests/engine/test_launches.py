"""The GPU work of a call other than its vocabulary-sized kernels. It copies nothing
from the host and waits for nothing.
"""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from launches import Counted, HostCopy, NoHostCopies, moved, on_meta
from public_calls import calls

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.backends.mean_logit import MEAN_LOGIT
from reweight_ops._core.backends.shards import VocabShards
from reweight_ops._core.calls.specs import METHODS
from reweight_ops._core.rows import constants
from reweight_ops._core.rows.batch import BatchStatistics
from reweight_ops.testing import make_batch


@pytest.fixture
def meta(monkeypatch):
    """Calls on meta tensors. Their vectors of numbers are kept until the end of the
    test, like those of a GPU.
    """
    monkeypatch.setattr(constants, "_kept", constants.OrderedDict())
    monkeypatch.setattr(constants, "lasts", lambda vector: type(vector) is torch.Tensor)
    with on_meta():
        yield


def test_the_door_closes():
    before = dict(select.ORDER), dict(select._loaded)
    with on_meta():
        assert select.ORDER["meta"][0] == "triton" and select.load("triton") is not before[1].get(
            "triton"
        )
    assert (dict(select.ORDER), dict(select._loaded)) == before


def test_operations_of_torch_and_kernels_are_counted(meta):
    x = torch.empty(4, 8, device="meta")
    with Counted() as found:
        y = x.view(8, 4)[1:].t()  # nothing
        torch.where(y > 0, y, 0)  # a comparison, a zero on the device, a selection
    assert found.beside == 3, found
    with Counted() as found:
        rw.token_logps(
            torch.empty(4, 8, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
        )
    assert found.kernels == {"mask_kernel": 1, "stats_kernel": 1}, found


def test_copies_from_the_host_are_noticed():
    for copy in (
        lambda: torch.tensor(1.0, device="meta"),
        lambda: torch.as_tensor(2, device="meta"),
        lambda: torch.zeros(3).to("meta"),
        lambda: torch.zeros(3, device="meta").copy_(torch.zeros(3)),
        lambda: torch.zeros(3, device="meta").new_tensor([1.0, 2.0]),
        lambda: torch.zeros(()).to("meta"),
    ):
        with pytest.raises(HostCopy), NoHostCopies():
            copy()


def test_waiting_raises_on_meta_tensors():
    with pytest.raises(RuntimeError):
        torch.zeros((), device="meta").item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.zeros((), device="meta"))


EVERY = {
    name: call
    for name, call in calls(["triton"]).items()
    if not name.startswith("policy_loss clamp")
}


@pytest.mark.parametrize("kind", sorted({name.split()[0] for name in EVERY}))
def test_no_call_copies_from_the_host_or_waits(meta, kind):
    for call in (call for name, call in EVERY.items() if name.split()[0] == kind):
        call = functools.partial(call.func, *moved(list(call.args)), **moved(call.keywords))
        with Counted():
            call()  # the first use may
        with NoHostCopies(), Counted() as found:
            call()
        assert found.operations, "nothing was counted"


def leaf(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=True)


def trl_call(tensors, **options):
    """A batch as TRL passes it, with numbers or tensors for divisors and factors."""
    rows = torch.empty(4, 32, device="meta")
    one = (lambda: torch.empty((), device="meta")) if tensors else (lambda: 0.5)
    integers = torch.empty(4, 33, dtype=torch.long, device="meta")[:, 1:]
    return {
        "logits": leaf(4, 32, 64), "completion_ids": integers, "completion_mask": integers, "advantages": torch.empty(4, device="meta"),
        "old_per_token_logps": rows, "ref_per_token_logps": rows, "loss_scale": one(), "temperature": one(), **options,
    }  # fmt: skip


def launches(call, metrics=False):
    upstream = torch.empty((), device="meta")  # the caller makes it

    def once():
        with Counted() as found:
            out = rw.policy_loss(**call)
            torch.autograd.grad(out.loss, call["logits"], upstream)
            before = found.beside
            if metrics:
                dict(out.metrics)
        return found, found.beside - before

    once()
    return once()


DAPO, GRPO = rw.methods.dapo(), rw.methods.grpo(beta=0.04)

#: Losses, and the maximum of their launches other than vocabulary-sized kernels. A
#: tensor of the temperature takes one more, to become one for each row.
GOALS = {
    "one pass": (DAPO, "one_pass", {"num_items_in_batch": 7.0}, 4),
    "one pass, a penalty, means of sequences": (GRPO, "one_pass", {}, 4),
    "one pass, a divisor of its own": (DAPO, "one_pass", {}, 4),
    "one pass, factors": (
        DAPO,
        "one_pass",
        {"token_weights": torch.empty(4, 32, device="meta")},
        4,
    ),
    # TRL's temperature is a number.
    "one pass, TRL's entropy bonus": (
        rw.methods.trl(loss_type="dapo", beta=0.04, entropy_coef=0.01),
        "one_pass",
        {"num_items_in_batch": 7.0, "temperature": 0.9},
        4,
    ),
    "two passes": (DAPO, "two_pass", {"num_items_in_batch": 7.0}, 5),
    "two passes, a penalty, means of sequences": (GRPO, "two_pass", {}, 5),
    "sequence level": (rw.methods.gspo(), "auto", {}, 7),
    "sequence level, clipped tokens": (rw.methods.gmpo(), "auto", {}, 7),
    "sums up to each token": (
        DAPO.replace(ratio=rw.CumulativeRatio(clamp=(-math.inf, 10.0))),
        "auto",
        {},
        7,
    ),
}


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("name", GOALS)
def test_few_launches(meta, name, tensors):
    spec, plan, options, most = GOALS[name]
    if tensors and "num_items_in_batch" in options:
        divisor = torch.empty((), dtype=torch.long, device="meta")
        options = {**options, "num_items_in_batch": divisor}
    if "ref_logp" not in spec.requires:
        options = {**options, "ref_per_token_logps": None}
    call = trl_call(tensors, spec=spec, plan=plan, **options)
    found, _ = launches(call)
    assert 0 < found.beside <= most + (tensors and "temperature" not in options), found
    found, more = launches(call, metrics=True)
    assert 0 < more <= 6, found


#: Losses that PyTorch forms in part, and the maxima of their launches before the
#: metrics and for them.
IN_PART = {
    "a mean of the batch": (DAPO.replace(ratio=rw.BatchMeanRatio()), 23, 29),
    "a formula with a gradient": (
        DAPO.with_weight(rw.weights.AdvantageReweighting(detach=False)),
        101,
        255,
    ),
}


@pytest.mark.parametrize("name", IN_PART)
def test_launches_of_losses_that_pytorch_forms_in_part(meta, name):
    spec, most, of_metrics = IN_PART[name]
    options = {"ref_per_token_logps": None}
    found, more = launches(trl_call(False, spec=spec, **options), metrics=True)
    assert 0 < found.beside - more <= most and more <= of_metrics, found


def rows_of(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


#: How trainers hand the arguments of a call.
LAYOUTS = {
    "advantages in bf16": {"advantages": rows_of(4, dtype=torch.bfloat16)},
    "advantages in fp64, strided": {"advantages": rows_of(4, 33, dtype=torch.float64)[:, 1:]},
    "a ratio for each sequence": {"importance_sampling_ratio": rows_of(4, 1)},
    "log-probs without the first token": {"old_per_token_logps": rows_of(4, 33)[:, 1:]},
    "a temperature for each row": {"temperature": rows_of(4, 32)},
    "one position more": {"logits": leaf(4, 33, 64), "drop_last": True},
    "a mask of its own": {"denominator_mask": rows_of(4, 32, dtype=torch.bool)},
    "numbers": {"advantages": 1.0, "token_weights": 0.5},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_few_launches_in_every_layout(meta, name):
    call = trl_call(False, spec=DAPO, plan="one_pass", ref_per_token_logps=None)
    found, more = launches(call | LAYOUTS[name], metrics=True)
    # the masks bring the advantages, and another dtype or layout takes one operation
    most = 6 if name == "numbers" else 4 if "advantages" in name else 5
    assert 0 < found.beside - more <= most and more <= 6, found


#: Methods that take more than 4 launches: their reductions measure the rows first. A
#: mean over what weights select evaluates them and adds them up, in a launch each. The
#: prompts are a launch, and what it finds of them is added to the loss.
OTHER_REDUCTIONS = {"vapo": 6, "grad_diff": 6, "scale_rl": 6}
ONE_PASS = [name for name in METHODS if METHODS[name].build().one_pass_unsupported_reason is None]


@pytest.mark.parametrize("name", ONE_PASS)
def test_methods_of_one_pass_take_few_launches(meta, name):
    spec = METHODS[name].build()
    options = {"group_ids": rows_of(4, dtype=torch.long), "num_groups": 2}
    call = trl_call(False, spec=spec, plan="one_pass", unused="ignore", **options)
    for option in options if not spec.reads_groups else ():
        del call[option]
    if "sampling_logp" in spec.requires:
        call["sampling_per_token_logps"] = call["ref_per_token_logps"]
    found, more = launches(call, metrics=True)
    assert 0 < found.beside - more <= OTHER_REDUCTIONS.get(name, 4), found
    assert more <= 6, found


MEASURED = {
    "vapo": (rw.methods.vapo(), {"measure_kernel": 1, "weigh_kernel": 1}),
    "grad_diff": (rw.methods.grad_diff(0.5), {"measure_kernel": 1, "weigh_kernel": 1}),
    "means of sequences": (rw.methods.npo(gamma=0.5), {"measure_kernel": 1, "weigh_kernel": 1}),
    "prompts": (rw.methods.scale_rl(), {"regroup_kernel": 1, "weigh_kernel": 1}),
    "runs": (rw.methods.scale_rl(group_size=2), {"weigh_kernel": 1}),
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("name", MEASURED)
def test_measured_reductions_take_a_launch_each(meta, name, plan, packed):
    """Beside the evaluation of a token weight, which is PyTorch's."""
    spec, kernels = MEASURED[name]
    if plan == "one_pass" and spec.one_pass_unsupported_reason is not None:
        pytest.skip("takes two passes")
    shape = (1, 128) if packed else (4, 32)
    rows, ids = rows_of(*shape), rows_of(*shape, dtype=torch.long)
    call = {
        "logits": leaf(*shape, 64), "completion_ids": ids, "completion_mask": ids, "advantages": rows_of(4, 1), "old_per_token_logps": rows,
        "ref_per_token_logps": rows, "spec": spec, "plan": plan, "unused": "ignore", **(PACKED["offsets"]() if packed else {}),
    }  # fmt: skip
    if spec.reads_groups:
        call |= {"group_ids": rows_of(4, dtype=torch.int32), "num_groups": 2}
    found, _ = launches(call)
    assert {k: n for k, n in found.kernels.items() if k in kernels} == kernels
    if not any(r.weight for r in spec.reductions):
        # the loss is a sum with what the device finds of the groups and the sequences,
        # and the runs of packed sequences are two operations
        beside = {"prompts": 6 + packed, "runs": 5 + 3 * packed}[name]
        assert found.beside <= beside + (plan == "two_pass"), found


#: Losses of two passes that take more than 8 launches, and their metrics where these
#: take more than 3. Batch statistics of an order are sorts of PyTorch, coupled
#: reductions are three kernels more, and their prompts one.
OTHER_TWO_PASS = {
    "top_entropy": 9, "kl_cov": 28, "hapo": 31, "clip_cov": 46, "m2po": 49,
    "real": 11, "disco": 11, "drpo": 11,
}  # fmt: skip
OTHER_METRICS = {"grpo_guard": 4}


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_two_passes_take_few_launches(meta, name):
    spec = METHODS[name].build()
    call = trl_call(False, spec=spec, plan="two_pass", unused="ignore")
    if spec.reads_groups:
        call |= {"group_ids": rows_of(4, dtype=torch.long), "num_groups": 2}
    if "sampling_logp" in spec.requires:
        call["sampling_per_token_logps"] = call["ref_per_token_logps"]
    found, more = launches(call, metrics=True)
    assert 0 < found.beside - more <= OTHER_TWO_PASS.get(name, 8), found
    assert 0 < more <= OTHER_METRICS.get(name, 3), found


def test_row_weights_of_several_reductions():
    """Terms whose reductions alternate, with a factor of the first, as PyTorch forms
    them.
    """
    pytest.importorskip("reweight_ops._C", exc_type=ImportError)
    spec = rw.methods.trl(loss_type="grpo", beta=0.04, entropy_coef=0.5)
    batch = make_batch(spec, (3, 4), 11)
    batch["completion_mask"][1, 2:] = 0
    factor, found = torch.rand(3, 4), {}
    for backend in ("cpu", "reference"):
        z = batch["logits"].detach().clone().requires_grad_()
        data = {**batch, "logits": z, "token_weights": factor, "loss_scale": 3.0}
        out = rw.policy_loss(**data, spec=spec, plan="one_pass", backend=backend)
        weights = out._call.row_weights()
        found[backend] = (weights, *torch.autograd.grad(out.loss, z))
    assert len(set(spec.reduction_of_term)) == 2 < len(spec.reduction_of_term)
    for got, want in zip(found["cpu"], found["reference"], strict=True):
        torch.testing.assert_close(got, want)


PACKED = {
    "offsets": lambda: {"cu_seqlens": rows_of(5, dtype=torch.int32)},
    "ids": lambda: {"sequence_ids": rows_of(1, 128, dtype=torch.long), "num_sequences": 4},
}


#: Statistics of a weight, and how many launches each takes.
STATISTICS = {
    **dict.fromkeys(("sum", "mean", "min", "max"), 2),
    **dict.fromkeys(("seq_sum", "seq_mean", "seq_min", "seq_max"), 1),
    **dict.fromkeys(("seq_cumsum", "seq_suffix_sum"), 1),
}


@pytest.mark.parametrize("layout", ["padded", *PACKED])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_of_a_batch_take_few_launches(meta, name, layout):
    call = trl_call(False, spec=DAPO, ref_per_token_logps=None)
    if layout != "padded":
        call = {
            name: x.reshape(1, 128, *x.shape[2:]) if torch.is_tensor(x) and x.dim() > 1 else x
            for name, x in call.items()
        } | {"advantages": 1.0, **PACKED[layout]()}
    with Counted():
        batch, x = BatchStatistics(rw.policy_loss(**call)._call.rows), rows_of(128)
    for decay in (
        ((0.9,), (torch.empty((), device="meta"),))
        if name.startswith(("seq_c", "seq_suf"))
        else ((),)
    ):
        with Counted():
            getattr(batch, name)(x, *decay)  # the first use fills a vector with the decay
        with Counted() as found:
            getattr(batch, name)(x, *decay)
        assert found.beside == STATISTICS[name], found


def test_numbers_of_another_device_are_pytorchs(meta):
    """PyTorch takes a tensor of one number from the host, and no kernel may read it."""
    one = torch.tensor(0.5)
    with Counted() as found:
        call = trl_call(False, spec=DAPO, ref_per_token_logps=None)
        batch = BatchStatistics(rw.policy_loss(**call)._call.rows)
        found.kernels.clear()
        batch.seq_cumsum(rows_of(128), one)
        batch.sum(one)
    assert not found.kernels, found


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("place", PACKED)
@pytest.mark.parametrize(
    "name, plan, most",
    [
        ("dapo", "one_pass", 6),
        ("grpo", "one_pass", 6),
        ("dapo", "two_pass", 8),
        ("gspo", "auto", 9),
        ("gmpo", "auto", 9),
    ],
)
def test_packed_rows_take_few_launches(meta, name, plan, most, place, tensors):
    """Advantages are one for each sequence, and one launch spreads them."""
    spec = METHODS[name].build(**({"beta": 0.04} if name == "grpo" else {}))
    rows, ids = rows_of(1, 128), rows_of(1, 128, dtype=torch.long)
    one = torch.empty((), device="meta") if tensors else 0.5
    call = {
        "logits": leaf(1, 128, 64), "completion_ids": ids, "completion_mask": ids, "advantages": rows_of(4, 1, dtype=torch.bfloat16),
        "old_per_token_logps": rows, "spec": spec, "plan": plan, "temperature": one, "loss_scale": one, **PACKED[place](),
    }  # fmt: skip
    if "ref_logp" in spec.requires:
        call["ref_per_token_logps"] = rows
    found, more = launches(call, metrics=True)
    # a tensor of the temperature becomes one for each row
    assert 0 < found.beside - more <= most + tensors and 0 < more <= 6, found


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name, most", [("dapo", 7), ("grpo", 7), ("gspo", 9), ("gmpo", 9)])
def test_losses_of_log_probs_take_few_launches(meta, name, most, packed):
    spec, rows = METHODS[name].build(), rows_of(1, 128) if packed else rows_of(4, 32)
    logps = torch.empty_like(rows).requires_grad_()
    data = {"advantages": rows_of(4, 1), "old_per_token_logps": rows, "completion_mask": rows}
    data |= PACKED["offsets"]() if packed else {}

    def once():
        with Counted() as found:
            out = rw.policy_loss_from_logps(logps, spec=spec, **data)
            torch.autograd.grad(out.loss, logps, torch.empty((), device="meta"))
            before = found.beside
            dict(out.metrics)
        return found, before

    once()
    found, before = once()
    # advantages are spread, and the loss is a sum with what is found of the offsets
    assert 0 < before <= most + 2 * packed and found.beside - before <= 3, found


@pytest.mark.parametrize("name, most", [("dapo", 14), ("grpo", 14), ("gspo", 14)])
def test_losses_from_hidden_states_take_few_launches(meta, name, most):
    """Three GEMMs among them, and without the products of more chunks."""
    hidden, weight, rows = leaf(4, 32, 16), leaf(64, 16), rows_of(4, 32)
    ids = rows_of(4, 32, dtype=torch.long)

    def once():
        with Counted() as found:
            out = rw.linear_policy_loss(
                hidden, weight, ids, rows_of(4), spec=name, old_per_token_logps=rows
            )
            torch.autograd.grad(out.loss, (hidden, weight), torch.empty((), device="meta"))
            before = found.beside
            dict(out.metrics)
        return found, before

    once()
    found, before = once()
    assert found.operations["mm"] == 3 and before <= most and found.beside - before <= 10, found


def test_a_mean_over_shards_copies_nothing(meta):
    states = rows_of(2, 4, dtype=torch.float64)
    share = SimpleNamespace(empty=states.bool(), lse=states[0])
    shards = SimpleNamespace(columns=(3, 2), total=5)

    def mean():
        return VocabShards._statistic(shards, MEAN_LOGIT, {MEAN_LOGIT: states}, share, states.dtype)

    with Counted():
        mean()  # the first use may
    with NoHostCopies(), Counted():
        mean()


def test_log_probs_take_few_launches(meta):
    logits, ids = leaf(4, 32, 64), torch.empty(4, 32, dtype=torch.long, device="meta")

    def once():
        with Counted() as found:
            both = rw.token_logps(logits, ids, completion_mask=ids, return_entropy=True)
            torch.autograd.grad(both, logits, [torch.empty(4, 32, device="meta")] * 2)
        return found

    once()
    found = once()
    assert 0 < found.beside <= 4 and found.kernels["stats_kernel"] == 1, found


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_a_number_of_the_host_is_at_hand_as_a_tensor_too(meta, plan):
    """As in PyTorch's own operations. No kernel gets the address of such a tensor."""
    host = torch.tensor
    for number in (float, host):
        spec = DAPO.replace(**{"surrogate.epsilon_low": number(0.1)})
        call = trl_call(False, spec=spec, plan=plan, ref_per_token_logps=None)
        call |= {"loss_scale": number(2.0), "temperature": number(0.5)}
        found, _ = launches(call | {"num_items_in_batch": number(7.0)})
        read = found.operations.pop("_local_scalar_dense", 0)  # by the host, from the host
        assert read == (0 if number is float else 5), found
        assert found.beside <= 4 + (plan == "two_pass"), found
    coupled = rw.methods.disco(tau=host(3.0), kl_bound=host(0.1), group_size=2)
    found, _ = launches(trl_call(False, spec=coupled, loss_scale=host(2.0), unused="ignore"))
    del found.operations["_local_scalar_dense"]
    assert found.beside <= 12, found  # the weights of two terms are scaled apart
    with pytest.raises(rw.InvalidCall, match=r"temperature is -1.0, expected a positive number"):
        launches(trl_call(False, spec=DAPO, unused="ignore") | {"temperature": host(-1.0)})


def test_numbers_that_change_copy_nothing(meta):
    def step(x):
        ids, rows = (
            torch.empty(2, 4, dtype=torch.long, device="meta"),
            torch.empty(2, 4, device="meta"),
        )
        spec = rw.methods.grpo(beta=x, epsilon_low=x / 2)
        data = {
            "old_per_token_logps": rows,
            "ref_per_token_logps": rows,
            "num_sequences_in_batch": 8 * x,
            "loss_scale": x,
        }
        out = rw.policy_loss(leaf(2, 4, 16), ids, 1.0, spec=spec, temperature=1 + x, **data)
        out.loss.backward()
        return out.metrics, rw.distillation_loss(
            leaf(2, 4, 16), leaf(2, 4, 16).detach(), temperature=1 + x, loss_scale=x
        ).loss.backward()

    with Counted():
        step(0.1)  # the first use may
    with NoHostCopies(), Counted():
        for i in range(2, 5):
            step(i / 10)


def test_vectors_of_numbers_are_bounded():
    for i in range(2 * constants.MOST):
        constants.parameter_vector((1.0, i / 7), torch.float32, torch.device("cpu"))
    assert len(constants._kept) == constants.MOST
    assert constants.parameter_vector(
        (1.0, 3 / 7), torch.float32, torch.device("cpu")
    ).tolist() == pytest.approx([1.0, 3 / 7])


def test_no_cache_keeps_a_tensor_without_elements():
    def call(device):
        return rw.policy_loss(
            torch.zeros(2, 3, 5, device=device),
            torch.zeros(2, 3, dtype=torch.long, device=device),
            1.0,
            spec="dapo",
            temperature=1.37,
        )

    call("cpu")
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        call("cpu")  # the real device has kept its vectors
    call("meta")
    from_logits = rw.policy_loss(
        torch.zeros(2, 3, 5, requires_grad=True),
        torch.zeros(2, 3, dtype=torch.long),
        1.0,
        spec="dapo",
        plan="two_pass",
    )
    assert from_logits.loss.isfinite()
    assert all(
        type(t) is torch.Tensor and t.device.type != "meta" for t in constants._kept.values()
    )
    assert call("cpu").loss.isfinite()


def test_bounds_that_are_tensors_take_one_launch_more(meta):
    """They become one vector with the numbers, for the ratio and for its metrics."""
    bounds = {name: torch.empty((), device="meta") for name in ("epsilon_low", "epsilon_high")}
    call = trl_call(False, spec=rw.methods.gmpo(**bounds), ref_per_token_logps=None)
    found, _ = launches(call)
    assert 0 < found.beside <= 9, found
    found, more = launches(call, metrics=True)
    assert 0 < more <= 4, found
