"""Repeated calls have the results and messages of the first call, whatever has changed
since.
"""

import gc
import itertools
import sys
import threading

import pytest
import torch
from kept_calls import SHAPE, VOCAB, assert_equal, batch_of, fresh, result

import reweight_ops as rw
from reweight_ops._core.backends import select
from reweight_ops._core.calls.specs import METHODS
from reweight_ops._core.catalogue.registry import published
from reweight_ops._core.engine import kept
from reweight_ops.errors import BackendUnavailable, ReweightOpsError

pytest.importorskip("reweight_ops._C", exc_type=ImportError)


SPECS = {
    "dapo": rw.methods.dapo(),
    "grpo": rw.methods.grpo(beta=0.04),
    "gspo": rw.methods.gspo(),
    "cispo": rw.methods.cispo(),
    "reinforce": rw.methods.reinforce(),
    "vapo": rw.methods.vapo(),
    "grad_diff": rw.methods.grad_diff(0.5),
    "runs of a prompt": rw.methods.scale_rl(group_size=3),
    "a coupled reduction": rw.methods.disco(group_size=3),
}
OPTIONS = [
    {},
    {"temperature": 0.7, "loss_scale": 3.0},
    {"temperature": torch.full(SHAPE, 1.3), "loss_scale": torch.tensor(0.5)},
    {"token_weights": torch.rand(SHAPE), "importance_sampling_ratio": torch.rand(SHAPE[0])},
    {"advantages": 0.3, "softcap": 9.0, "vocab_size": VOCAB - 1},
    {"backend": "reference"},
]


@pytest.mark.parametrize("plan", ["auto", "one_pass", "two_pass"])
@pytest.mark.parametrize("name", SPECS)
def test_kept_calls_give_what_first_ones_give(kept_calls, name, plan):
    spec = SPECS[name]
    if plan == "one_pass" and spec.one_pass_unsupported_reason:
        pytest.skip("takes two passes")
    for options in OPTIONS:
        batches = [batch_of(spec, seed) for seed in (1, 2, 3)]
        if "vocab_size" in options:
            for batch in batches:
                batch["completion_ids"] = batch["completion_ids"].clamp(max=VOCAB - 2)
        result(batches[0], spec=spec, plan=plan, **options)
        size = len(kept_calls)
        assert size == 0 or options.get("backend") != "reference"
        for batch in batches[1:]:
            found = result(batch, spec=spec, plan=plan, **options)
            assert_equal(
                found,
                fresh(kept_calls, lambda b=batch, o=options: result(b, spec=spec, plan=plan, **o)),
            )
        assert len(kept_calls) == size, "the same signature"
        kept_calls._calls.clear()


PLACES = {
    "cu_seqlens": [torch.tensor(x) for x in ([0, 4, 15], [0, 9, 12], [0, 0, 15])],
    "sequence_ids": [torch.randint(2, (1, 15), generator=torch.Generator().manual_seed(i)) for i in range(3)],
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo"])
def test_kept_calls_of_packed_sequences(kept_calls, name, place):
    """Their places are data: other ones are the same call, and malformed ones the same
    error.
    """
    spec, options = SPECS[name], {"num_sequences": 2} if place == "sequence_ids" else {}
    batches = [batch_of(spec, seed, (1, 15)) for seed in (1, 2, 3)]
    for i, batch in enumerate(batches):
        data = batch | {"advantages": torch.tensor([[0.5], [-0.3]]), place: PLACES[place][i]}
        found = result(data, spec=spec, **options)
        assert len(kept_calls) == 1, "the same signature"
        want = fresh(kept_calls, lambda d=data: result(d, spec=spec, **options))
        assert_equal(found, want)
    bad = PLACES[place][0].clone()
    bad[..., 0 if place == "sequence_ids" else -1] = 16  # the last row may be ignored
    with pytest.raises(rw.InvalidCall, match=rf"{place}\[\d+\].* is 16"):
        result(data | {place: bad}, spec=spec, **options)
    assert_equal(result(data, spec=spec, **options), want)


@pytest.mark.parametrize("place", [None, *PLACES])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_kept_calls_of_prompts(kept_calls, plan, place):
    """The prompts of sequences are data, and their number is not."""
    spec, shape, rows = rw.methods.scale_rl(), SHAPE, {}
    groups = [torch.tensor(x) for x in ([0, 1, 0], [2, 2, 2], [1, 0, 3])]
    if place is not None:
        shape, groups = (1, 15), [x[:2] for x in groups]
        rows = {place: PLACES[place][0]} | ({"num_sequences": 2} if "ids" in place else {})
    options = {"spec": spec, "plan": plan, "num_groups": 4}
    batches = [batch_of(spec, seed, shape) | rows for seed in (1, 2, 3)]
    for ids, batch in zip(groups, batches, strict=True):
        data = batch | {"advantages": torch.tensor([[0.5], [-0.3], [0.1]])[: len(ids)]}
        found = result(data, group_ids=ids, **options)
        assert len(kept_calls) == 1, "the same signature"
        assert_equal(
            found,
            fresh(kept_calls, lambda d=data, i=ids: result(d, group_ids=i, **options)),
        )
    with pytest.raises(rw.InvalidCall, match=r"group_ids\[1\] \(flat\) is 4, .*logits"):
        result(data, group_ids=torch.tensor([0, 4, 1])[: len(ids)], **options)
    result(data, group_ids=ids, **{**options, "num_groups": 5})
    assert len(kept_calls) == 2


def from_logps(batch, **options):
    """The results of a loss of log-probs, with its gradients and metrics."""
    names = ("old_per_token_logps", "ref_per_token_logps", "advantages", "completion_mask")
    data = {name: batch[name] for name in names if name in batch}
    x = (-1 - batch["logits"][..., 0].abs()).float().requires_grad_()
    out = rw.policy_loss_from_logps(x, **{**data, **options})
    rows = (out.per_token_logps, out.per_token_loss, out.ratio, out.coef, out.metrics.sums)
    return [out.plan, out.backend, out.loss.detach(), *rows, *torch.autograd.grad(out.loss, x)]


@pytest.mark.parametrize("name", SPECS)
def test_kept_losses_of_log_probs(kept_calls, name):
    spec = SPECS[name]
    for options in ({}, {"loss_scale": 3.0, "token_weights": torch.rand(SHAPE)}):
        kept_calls._calls.clear()
        for seed in (1, 2, 3):
            batch = batch_of(spec, seed)
            found = from_logps(batch, spec=spec, **options)
            assert len(kept_calls) == 1, "the same signature"
            want = fresh(kept_calls, lambda b=batch, o=options: from_logps(b, spec=spec, **o))
            assert_equal(found, want)
    assert found[1] == "cpu"
    other = from_logps(batch, spec=spec, entropies=torch.rand(SHAPE))
    assert len(kept_calls) == 2 and not torch.equal(other[-2], found[-2])


@pytest.mark.parametrize(
    "wrong",
    [
        {"old_per_token_logps": torch.zeros(2, 2)},
        {"loss_scale": float("nan")},
        {"num_items_in_batch": 0},
        {"entropies": torch.zeros(2, 2)},
        {"log_sum_p_sq": torch.zeros(SHAPE)},
        {"temperature": 0.5},
    ],
    ids=lambda x: next(iter(x)),
)
def test_messages_of_losses_of_log_probs_stay(kept_calls, wrong):
    spec = SPECS["dapo"]
    batch, fine = batch_of(spec, 0), {"loss_scale": 2.0, "num_items_in_batch": 3}
    messages = []
    for known in (False, True):
        if known:
            from_logps(batch, spec=spec, **fine)
        assert len(kept_calls) == known
        with pytest.raises((ReweightOpsError, TypeError)) as error:
            from_logps(batch, spec=spec, **{**fine, **wrong})
        messages.append(str(error.value))
    assert messages[0] == messages[1] and len(kept_calls) == 1


def host_work(call):
    """``(Python calls, calls of PyTorch)`` that a call makes."""
    found = {"call": 0, "torch": 0}

    def count(frame, event, argument):
        if event == "call":
            found["call"] += 1
        elif event == "c_call":
            module = (
                getattr(argument, "__module__", None)
                or type(getattr(argument, "__self__", None)).__module__
            )
            found["torch"] += str(module).startswith("torch")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found["call"], found["torch"]


#: A loss, and the maximum of functions of Python and of PyTorch that one more call
#: runs, backward included.
WORK = {"one_pass": (95, 55), "two_pass": (350, 195)}


@pytest.mark.parametrize("plan", WORK)
def test_a_warm_call_does_little(kept_calls, plan):
    spec = rw.methods.dapo()
    batch = batch_of(spec, 0)
    batch["logits"] = batch["logits"].clone().requires_grad_()

    def call():
        rw.policy_loss(**batch, spec=spec, plan=plan).loss.backward()

    cold = host_work(call)
    call()
    python, torch_calls = host_work(call)
    assert python <= WORK[plan][0] and torch_calls <= WORK[plan][1], (python, torch_calls, cold)
    kept_calls._calls.clear()
    assert python < host_work(call)[0]


def test_what_a_call_is_told_apart_by(kept_calls):
    """After a call is kept, calls that differ from it in one argument each."""
    spec = rw.methods.dapo()
    batch = batch_of(spec, 0)
    result(batch, spec=spec)
    result(batch, spec=spec)
    assert len(kept_calls) == 1

    def strided(t):
        return torch.stack([t, t], -1)[..., 0]

    wide = torch.cat([batch["logits"], batch["logits"]], -1)[..., :VOCAB]
    changed = {
        "logits in bf16": {"logits": batch["logits"].bfloat16()},
        "logits in fp16": {"logits": batch["logits"].half()},
        "logits in fp64": {"logits": batch["logits"].double()},
        "rows apart": {"logits": wide},
        "ids in int32": {"completion_ids": batch["completion_ids"].int()},
        "ids apart": {"completion_ids": strided(batch["completion_ids"])},
        "another mask": {"completion_mask": strided(batch["completion_mask"].float())},
        "no mask": {"completion_mask": None},
        "advantages of sequences": {"advantages": batch["advantages"][:, 0]},
        "a number": {"advantages": 0.5},
        "stored in fp64": {"old_per_token_logps": batch["old_per_token_logps"].double()},
        "on-policy": {"old_per_token_logps": None},
        "advantages with a gradient": {"advantages": batch["advantages"].clone().requires_grad_()},
        "a plan": {"plan": "two_pass"},
        "a backend": {"backend": "reference"},
        "a spec": {"spec": rw.methods.reinforce(), "unused": "ignore"},
        "a name": {"spec": "dr_grpo"},
        "what is not used": {
            "ref_per_token_logps": batch["old_per_token_logps"],
            "unused": "ignore",
        },
        "one row": {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in batch.items()},
        "fewer columns": {"vocab_size": int(batch["completion_ids"].max()) + 1},
        "outputs in the graph": {"differentiable_outputs": True},
        "without sequences": {
            k: v.reshape(-1, *v.shape[2:]) for k, v in batch.items() if k != "advantages"
        }
        | {"advantages": 1.0},
    }
    for name, change in changed.items():
        options = {"spec": spec, **change}
        for _ in range(3):
            found = result(batch, **options)
            assert_equal(found, fresh(kept_calls, lambda o=options: result(batch, **o))), name


MODES = {
    "without gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomalies": torch.autograd.detect_anomaly,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", MODES)
def test_modes(kept_calls, mode):
    spec = rw.methods.grpo(beta=0.1)
    batch = batch_of(spec, 0)
    result(batch, spec=spec)
    for _ in range(2):
        with MODES[mode]():
            found = result(batch, spec=spec)
            expected = fresh(kept_calls, lambda: result(batch, spec=spec))
        assert_equal(found, expected)
        assert_equal(result(batch, spec=spec), fresh(kept_calls, lambda: result(batch, spec=spec)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_leaves_in_modes_without_gradients(kept_calls, mode):
    spec = rw.methods.dapo()
    batch = batch_of(spec, 0)
    batch["logits"] = batch["logits"].clone().requires_grad_()
    for _ in range(2):
        assert rw.policy_loss(**batch, spec=spec).plan == "one_pass"
        with mode():
            out = rw.policy_loss(**batch, spec=spec)
        assert (
            out.plan == "two_pass"
            and not out.loss.requires_grad
            and out.loss.is_inference() == (mode is torch.inference_mode)
        )


def test_defaults_of_the_process(kept_calls):
    spec = rw.methods.grpo(beta=0.1)
    batch = batch_of(spec, 0)
    before = result(batch, spec=spec)
    try:
        torch.set_default_dtype(torch.float64)
        assert_equal(result(batch, spec=spec), before)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(True)
        assert_equal(result(batch, spec=spec), before)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    with torch.device("meta"):
        assert_equal(result(batch, spec=spec), before)


def test_another_backend(kept_calls, monkeypatch):
    spec = rw.methods.dapo()
    batch = batch_of(spec, 0)
    for _ in range(2):
        assert result(batch, spec=spec)[1] == "cpu"
    with monkeypatch.context() as patch:
        patch.setenv("REWEIGHT_OPS_BACKEND", "reference")
        assert result(batch, spec=spec)[1] == "reference"
    with monkeypatch.context() as patch:
        patch.setitem(select._loaded, "cpu", BackendUnavailable("broken"))
        assert result(batch, spec=spec)[1] == "reference"
    assert result(batch, spec=spec)[1] == "cpu"


def test_fp16_gradients_need_their_scale(kept_calls):
    spec = rw.methods.dapo()
    batch = batch_of(spec, 0, dtype=torch.float16)
    for scale, plan in itertools.islice(
        itertools.cycle(
            [(1.0, "two_pass"), (1024.0, "one_pass"), (2, "one_pass"), (1, "two_pass")]
        ),
        12,
    ):
        assert result(batch, spec=spec, loss_scale=scale)[0] == plan


def test_a_method_defined_again(kept_calls):
    def define(low):
        @published("Test", name="kept_test", paper="none", arxiv="unknown", kind="policy_loss")
        def kept_test():
            """Test."""
            return rw.methods.dapo(epsilon_low=low, epsilon_high=low)

    batch = batch_of(rw.methods.dapo(), 0)
    try:
        for low in (0.1, 1e-4, 0.1):
            define(low)
            want = result(batch, spec=rw.methods.dapo(epsilon_low=low, epsilon_high=low))
            for _ in range(2):
                assert_equal(result(batch, spec="kept_test"), want)
    finally:
        METHODS.pop("kept_test", None)


def test_a_rule_defined_again(kept_calls):
    batch = batch_of(rw.methods.reinforce(), 0)
    for factor in (1.0, 2.0, 3.0):

        @rw.rules.rule("kept_rule")
        class KeptRule(rw.rules.Rule):
            def loss(self, xp, t, factor=factor):
                return -factor * t.adv * t.logp

        for _ in range(2):
            loss = result(batch, spec=rw.PolicyLossSpec(surrogate=KeptRule()))[3]
            torch.testing.assert_close(loss, factor * result(batch, spec="reinforce")[3])
    rw.rules.RULES.pop("kept_rule")


def test_a_spec_that_is_gone(kept_calls):
    """Another spec may have its place in memory by now."""
    batch = batch_of(rw.methods.dapo(), 0)
    spec = rw.methods.dapo(epsilon_low=0.1)
    result(batch, spec=spec)
    (call,) = kept_calls._calls.values()
    assert call.loss.spec() is spec
    del spec
    gc.collect()
    assert call.loss.spec() is None
    assert call.bind(batch["logits"], {k: v for k, v in batch.items() if k != "logits"}) is None


WRONG = {
    "an id": lambda b: {"completion_ids": torch.full(SHAPE, VOCAB)},
    "a negative id": lambda b: {"completion_ids": torch.full(SHAPE, -7)},
    "a temperature": lambda b: {"temperature": 0.0},
    "a temperature in a tensor": lambda b: {"temperature": torch.tensor(-1.0)},
    "a shape": lambda b: {"old_per_token_logps": torch.zeros(2, 2)},
    "a keyword": lambda b: {"epsilon": 0.2},
    "log-probs with a gradient": lambda b: {
        "old_per_token_logps": torch.zeros(SHAPE, requires_grad=True)
    },
    "log-probs in 16 bits": lambda b: {"old_per_token_logps": torch.zeros(SHAPE).half()},
    "a plan": lambda b: {"plan": "three_pass"},
    "a leaf to consume": lambda b: {
        "consume_logits": True,
        "logits": b["logits"].clone().requires_grad_(),
    },
    "a divisor": lambda b: {"num_sequences_in_batch": 3},
    "a mask": lambda b: {"completion_mask": torch.ones(2, 2)},
    "no tensor": lambda b: {"completion_ids": [1, 2]},
    "a setting": lambda b: {"vocab_size": VOCAB + 1},
    "more rows of logits": lambda b: {"logits": torch.cat([b["logits"], b["logits"][:1]])},
    "columns apart": lambda b: {"logits": b["logits"].transpose(1, 2).contiguous().transpose(1, 2)},
    "a list": lambda b: {"backend": ["cpu"]},
}


@pytest.mark.parametrize("what", WRONG)
def test_messages_stay(kept_calls, what):
    spec = rw.methods.dapo()
    batch = batch_of(spec, 0)
    numbers = {"temperature": 1.0} if what == "a temperature" else {}
    if what == "a temperature in a tensor":
        numbers = {"temperature": torch.tensor(1.0)}
    change = WRONG[what](batch)

    def message():
        with pytest.raises((ReweightOpsError, TypeError, ValueError)) as error:
            rw.policy_loss(**{**batch, **numbers, **change}, spec=spec)
        return type(error.value), str(error.value)

    expected = message()
    assert len(kept_calls) == 0
    for _ in range(2):
        rw.policy_loss(**{**batch, **numbers}, spec=spec)
    assert len(kept_calls) == 1
    assert message() == expected
    assert len(kept_calls) == 1


def test_consumed_logits(kept_calls):
    spec = rw.methods.dapo()
    batch = batch_of(spec, 0)

    def call(z):
        return rw.policy_loss(**{**batch, "logits": z}, spec=spec, consume_logits=True)

    leaf = batch["logits"].clone().requires_grad_()
    for _ in range(2):
        call(leaf * 1.0)
    assert len(kept_calls) == 1
    with pytest.raises(rw.InvalidCall, match="a leaf that requires grad"):
        call(leaf)
    z = leaf * 1.0
    call(z).loss.backward()
    with pytest.raises(rw.InvalidCall, match="were consumed"):
        call(z)


def test_the_number_of_kept_calls_is_bounded(kept_calls, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 8)
    specs = [rw.methods.dapo(epsilon_low=0.1 + i / 100) for i in range(20)]
    batch = batch_of(specs[0], 0)
    for spec in specs:
        rw.policy_loss(**batch, spec=spec)
        rw.policy_loss(**batch, spec=specs[0])
        assert len(kept_calls) <= 8
    assert len(kept_calls) == 8
    assert any(call.loss.spec() is specs[0] for call in kept_calls._calls.values()), (
        "the one in use is dropped last"
    )


def holds_a_tensor(thing, seen):
    if (
        id(thing) in seen
        or isinstance(thing, type)
        or (callable(thing) and not hasattr(thing, "__dict__"))
    ):
        return False
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return True
    parts = []
    if isinstance(thing, dict):
        parts = [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set, frozenset)):
        parts = list(thing)
    elif type(thing).__module__.startswith("reweight_ops") and hasattr(thing, "__dict__"):
        parts = list(vars(thing).values())
    return any(holds_a_tensor(part, seen) for part in parts)


def test_no_tensor_is_kept(kept_calls):
    for spec in SPECS.values():
        batch = batch_of(spec, 0)
        result(
            batch,
            spec=spec,
            temperature=torch.tensor(1.5),
            loss_scale=torch.tensor(2.0),
            num_items_in_batch=None,
        )
    packed = batch_of(SPECS["gspo"], 0, (1, 15)) | {"cu_seqlens": torch.tensor([0, 4, 15])}
    result(packed | {"advantages": torch.ones(2, 1)}, spec=SPECS["gspo"])
    from_logps(batch_of(SPECS["dapo"], 0), spec=SPECS["dapo"])
    assert len(kept_calls) == len(SPECS) + 2
    for key, call in kept_calls._calls.items():
        seen = {id(call.loss.rows.primitives), *(id(x) for x in select._loaded.values())}
        assert not holds_a_tensor(key, seen) and not holds_a_tensor(call, seen)
    assert holds_a_tensor({"x": [torch.ones(1)]}, set())


def test_traced_and_transformed_calls_are_not_kept(kept_calls):
    spec = rw.methods.dapo()
    batch = batch_of(spec, 0)
    result(batch, spec=spec)
    assert len(kept_calls) == 1
    kept_calls._calls.clear()
    rest = {k: v for k, v in batch.items() if k != "logits"}

    def loss(z):
        return rw.policy_loss(logits=z, **rest, spec=spec).loss

    torch.func.grad(loss)(batch["logits"])
    torch.func.vmap(loss)(torch.stack([batch["logits"]] * 2))
    torch.compile(loss, backend="eager", fullgraph=True)(batch["logits"].clone().requires_grad_())
    with torch._subclasses.FakeTensorMode() as mode:
        rw.policy_loss(
            **{
                k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
                for k, v in batch.items()
            },
            spec=spec,
        )
    rw.policy_loss(
        **{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in batch.items()},
        spec=spec,
    )
    assert len(kept_calls) == 0
    result(batch, spec=spec)
    expected = loss(batch["logits"])
    torch.testing.assert_close(
        torch.func.vmap(loss)(torch.stack([batch["logits"]] * 2))[0], expected
    )
    assert_equal(result(batch, spec=spec), fresh(kept_calls, lambda: result(batch, spec=spec)))


def test_threads(kept_calls, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 3)
    specs = [rw.methods.dapo(epsilon_low=0.1 + i / 20) for i in range(5)]
    batches = [batch_of(specs[0], seed) for seed in range(4)]
    expected = {
        (i, j): result(b, spec=s)[3] for i, s in enumerate(specs) for j, b in enumerate(batches)
    }
    wrong = []

    def work(start):
        for k in range(60):
            i, j = (start + k) % len(specs), (start * k) % len(batches)
            if not torch.equal(result(batches[j], spec=specs[i])[3], expected[i, j]):
                wrong.append((i, j))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and len(kept_calls) <= 3 + len(threads)
