"""The functions on logits that old trainers import by name: against transcriptions of
TRL 1.9's and 1.14's, and in modules that hold them.
"""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

import reweight_ops as rw
from reweight_ops.integrations import trainers
from reweight_ops.integrations.logits import patch_logits_functions


# --- TRL 1.9.0 and 1.14.2, trl/trainer/utils.py, without the loops that save memory ---
def selective_log_softmax_1_9(logits, index):
    squeeze = index.ndim == logits.ndim - 1
    index = index.unsqueeze(-1) if squeeze else index
    found = logits.log_softmax(-1).gather(-1, index)
    return found.squeeze(-1) if squeeze else found


def entropy_from_logits(logits, chunk_size=128):
    logps = F.log_softmax(logits, dim=-1)
    return -(torch.exp(logps) * logps).sum(-1)


def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
    found = selective_log_softmax_1_9(logits / temperature, index)
    return found if row_mask is None else found.masked_fill(row_mask == 0, 0.0)


def selective_log_softmax_and_entropy(
    logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None
):
    found = selective_log_softmax(logits, index, temperature, row_mask)
    with torch.set_grad_enabled(entropy_requires_grad):
        entropy = entropy_from_logits(logits / temperature)
    return found, entropy if row_mask is None else entropy.masked_fill(row_mask == 0, 0.0)


OLD = {
    "selective_log_softmax": selective_log_softmax_1_9,
    "entropy_from_logits": entropy_from_logits,
}
NEW = OLD | {
    "selective_log_softmax": selective_log_softmax,
    "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
}


def module(name, functions):
    made = types.ModuleType(name)
    vars(made).update(functions)
    return made


@pytest.fixture
def trainer(monkeypatch):
    """Modules as TRL 1.14 has them: the functions' own, and two trainers' that imported
    them by name.
    """
    modules = [
        module(name, NEW)
        for name in ("trl.trainer.utils", "trl.trainer.grpo_trainer", "someone.elses_trainer")
    ]
    modules.append(module("a.fork", {"selective_log_softmax": lambda logits, index: "its own"}))
    for each in modules:
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return modules


def batch(layout="padded", dtype=torch.float32):
    """Logits as trainers slice them: the last position predicts nothing, so rows have
    gaps between batches; or packed ``[1, nnz, V]``.
    """
    g = torch.Generator().manual_seed(0)
    shape = (3, 8, 37) if layout == "padded" else (1, 22, 37)
    full = (3 * torch.randn(*shape, generator=g)).to(dtype).requires_grad_()
    logits = full[:, :-1]
    return (
        full,
        logits,
        torch.randint(37, logits.shape[:-1], generator=g),
        (torch.rand(logits.shape[:-1], generator=g) > 0.3).long(),
    )


def grads(found, full):
    upstream = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape) for x in found]
    return torch.autograd.grad(found, full, upstream)[0]


def assert_same(stock, ours, full, bound):
    for a, b in zip(stock, ours, strict=True):
        assert (a - b).norm() <= bound * a.norm()
    a, b = (
        grads([x for x in stock if x.requires_grad], full),
        grads([x for x in ours if x.requires_grad], full),
    )
    assert a.norm() > 0.1 and (a - b).norm() <= bound * a.norm()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("functions", [OLD, NEW], ids=["1.9", "1.14"])
def test_log_probs_and_entropies(layout, functions):
    held = module("held", functions)
    full, logits, index, _ = batch(layout)
    stock = held.selective_log_softmax(logits, index), held.entropy_from_logits(logits)
    with patch_logits_functions(held) as patch:
        ours = (
            held.selective_log_softmax(logits, index),
            held.entropy_from_logits(logits, chunk_size=1),
        )
    assert_same(stock, ours, full, 1e-6)
    assert patch.fused_calls == {"token_logps": 1, "token_stats": 1} and patch.delegated_calls == {}
    assert held.selective_log_softmax is functions["selective_log_softmax"], "undone"


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_both_in_one_read_with_a_temperature_and_a_mask(masked, with_grad):
    held = module("held", NEW)
    full, logits, index, mask = batch()
    options = {
        "entropy_requires_grad": with_grad,
        "temperature": 0.7,
        "row_mask": mask if masked else None,
    }
    stock = held.selective_log_softmax_and_entropy(logits, index, **options)
    alone = held.selective_log_softmax(logits, index, temperature=0.7, row_mask=options["row_mask"])
    with patch_logits_functions(held) as patch:
        ours = held.selective_log_softmax_and_entropy(logits, index, **options)
        torch.testing.assert_close(
            held.selective_log_softmax(logits, index, 0.7, options["row_mask"]), alone
        )
    assert ours[1].requires_grad == stock[1].requires_grad == with_grad
    assert_same(stock, ours, full, 1e-6)
    assert patch.fused_calls == {"token_logps": 2}


def test_a_trainer_may_write_into_what_it_gets():
    """TRL's DPO writes zeros where a token is masked."""
    held = module("held", NEW)
    full, logits, index, mask = batch()

    def masked():
        found = [
            held.selective_log_softmax(logits, index),
            held.entropy_from_logits(logits),
            *held.selective_log_softmax_and_entropy(logits, index),
        ]
        for x in found:
            x[mask == 0] = 0.0
        return found

    stock = masked()
    with patch_logits_functions(held):
        assert_same(stock, masked(), full, 1e-6)


def test_16_bit_logits_are_not_rounded_again():
    """TRL's log-probs of bf16 logits are bf16; ours are fp32, and those of the same
    logits in fp64 to fp32's rounding.
    """
    held = module("held", OLD)
    _, logits, index, _ = batch(dtype=torch.bfloat16)
    with patch_logits_functions(held):
        logps, entropies = (
            held.selective_log_softmax(logits, index),
            held.entropy_from_logits(logits),
        )
    exact = (
        held.selective_log_softmax(logits.double(), index),
        held.entropy_from_logits(logits.double()),
    )
    for found, truth in zip((logps, entropies), exact, strict=True):
        assert found.dtype == torch.float32 and (found - truth).norm() <= 1e-6 * truth.norm()
    assert (held.selective_log_softmax(logits, index) - exact[0]).norm() > 1e-4 * exact[0].norm()


def test_every_loaded_module_that_has_them_from_trl(trainer):
    home, grpo, other, fork = trainer
    with patch_logits_functions() as patch:
        assert all(
            m.selective_log_softmax is not selective_log_softmax for m in (home, grpo, other)
        )
        assert fork.selective_log_softmax(None, None) == "its own"
        for each in (grpo, other):
            each.selective_log_softmax(*batch()[1:3])
        with pytest.raises(
            rw.InvalidCall, match=r"trl\.trainer\.utils\.selective_log_softmax is patched already"
        ):
            patch_logits_functions()
        with pytest.raises(
            rw.InvalidCall, match="grpo_trainer.selective_log_softmax is patched already"
        ):
            patch_logits_functions("trl.trainer.grpo_trainer")
    assert patch.fused_calls == {"token_logps": 2}
    assert all(
        vars(m)[name] is function for m in (home, grpo, other) for name, function in NEW.items()
    )


def test_by_name_only_where_asked(trainer):
    home, grpo, *_ = trainer
    with patch_logits_functions("trl.trainer.grpo_trainer"):
        assert (
            grpo.entropy_from_logits is not entropy_from_logits
            and home.entropy_from_logits is entropy_from_logits
        )


LEFT = {
    "several tokens per position": lambda held, logits, index: held.selective_log_softmax(
        logits, index.unsqueeze(-1).expand(-1, -1, 3)
    ),
    "last dimension is not contiguous": lambda held, logits, index: held.entropy_from_logits(
        logits.transpose(1, 2)
    ),
    "the arguments reduction": lambda held, logits, index: held.selective_log_softmax(
        logits, index, reduction="none"
    ),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_to_trl_is_counted(reason):
    seen = []

    def with_more(logits, index, reduction=None):
        seen.append(reduction)
        return selective_log_softmax_1_9(logits, index)

    held = module(
        "held", NEW | ({"selective_log_softmax": with_more} if "arguments" in reason else {})
    )
    _, logits, index, _ = batch()
    stock = LEFT[reason](held, logits, index)
    with (
        patch_logits_functions(held) as patch,
        pytest.warns(UserWarning, match=f"leaves this to TRL: .*{reason}"),
    ):
        assert torch.equal(LEFT[reason](held, logits, index), stock)
    assert sum(patch.delegated_calls.values()) == 1 and patch.fused_calls == {}
    assert seen in ([], ["none", "none"])


def test_a_dtensor_is_left_to_trl(monkeypatch):
    class DTensor(torch.Tensor):
        pass

    monkeypatch.setattr(torch.distributed.tensor, "DTensor", DTensor)
    held = module("held", NEW)
    _, logits, index, _ = batch()
    sharded = logits.detach().as_subclass(DTensor)
    with patch_logits_functions(held) as patch, pytest.warns(UserWarning, match="a DTensor"):
        held.selective_log_softmax_and_entropy(sharded, index)
    assert patch.fused_calls == {}


def test_refusals(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", module("trl.trainer.utils", {}))
    with pytest.raises(rw.InvalidCall, match="no loaded module has selective_log_softmax"):
        patch_logits_functions()
    with pytest.raises(rw.InvalidCall, match="math has none of selective_log_softmax"):
        patch_logits_functions("math")
    with pytest.raises(rw.BackendUnavailable, match="No module named 'no_such_trainer'"):
        patch_logits_functions("no_such_trainer")
    with pytest.raises(
        rw.BackendUnavailable, match=r"selective_log_softmax has the signature \(logits, labels\)"
    ):
        patch_logits_functions(
            module("moved", {"selective_log_softmax": lambda logits, labels: None})
        )


def test_a_newer_trl_warns_once(trainer, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    monkeypatch.setattr(trainers, "_reported", set())
    with pytest.warns(
        UserWarning,
        match=r"TRL by logits 99\.0 is newer than any that reweight_ops was tested with",
    ) as seen:
        for _ in range(2):
            patch_logits_functions().undo()
    assert len(seen) == 1
