"""The GPU work of a call other than its vocabulary-sized kernels. It copies nothing
from the host and waits for nothing.
"""

import functools

import pytest
import torch
from launches import Counted, HostCopy, NoHostCopies, moved, on_meta
from public_calls import calls

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.rows import constants


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
    def once():
        with Counted() as found:
            out = rw.policy_loss(**call)
            torch.autograd.grad(out.loss, call["logits"])
            before = found.beside
            if metrics:
                dict(out.metrics)
        return found, found.beside - before

    once()
    return once()


DAPO, GRPO = rw.methods.dapo(), rw.methods.grpo(beta=0.04)

#: Losses, and the maximum of their launches other than vocabulary-sized kernels.
GOALS = {
    "one pass": (DAPO, "one_pass", {"num_items_in_batch": 7.0}, 6),
    "one pass, a penalty, means of sequences": (GRPO, "one_pass", {}, 6),
    "one pass, a divisor of its own": (DAPO, "one_pass", {}, 6),
    "one pass, factors": (
        DAPO,
        "one_pass",
        {"token_weights": torch.empty(4, 32, device="meta")},
        6,
    ),
    "two passes": (DAPO, "two_pass", {"num_items_in_batch": 7.0}, 7),
    "two passes, a penalty, means of sequences": (GRPO, "two_pass", {}, 7),
    "sequence level": (rw.methods.gspo(), "auto", {}, 9),
}


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("name", GOALS)
def test_few_launches(meta, name, tensors):
    spec, plan, options, most = GOALS[name]
    if tensors and "num_items_in_batch" in options:
        options = {"num_items_in_batch": torch.empty((), dtype=torch.long, device="meta")}
    if "ref_logp" not in spec.requires:
        options = {**options, "ref_per_token_logps": None}
    call = trl_call(tensors, spec=spec, plan=plan, **options)
    found, _ = launches(call)
    # A tensor temperature may be not positive: one operation then makes it NaN, and the
    # goal allows none.
    assert 0 < found.beside <= most + tensors, found
    found, more = launches(call, metrics=True)
    assert 0 < more <= 6, found


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
