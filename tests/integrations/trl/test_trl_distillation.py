"""``patch_trl(heads=True)`` and ``DistillationTrainer``: its divergence and loss
against TRL's own code, gradients and all. Offline, CPU.
"""

import math

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")

import trl
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.trainer import distillation_trainer as module
from trl_common import TINY, make_tokenizer

import reweight_ops as rw
from reweight_ops.integrations.trl import divergence, patch_trl

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

#: TRL 1.15's kernel needs a GPU.
by_name = pytest.mark.skipif(
    not hasattr(module, "ChunkedDivergenceFunction"),
    reason="TRL 1.15 has no torch version of its kernel",
)

N, V, D = 9, 41, 12
LOSSES = {
    "forward KL": (0.0, 1.0, 1.0, None, 1.0, None),
    "reverse KL": (1.0, 0.7, 1.0, None, 1.0, None),
    "JSD": (0.5, 1.3, 1.0, None, 1.0, None),
    "JSD, near the teacher": (0.9, 0.8, 1.0, None, 1.0, None),
    "student scaled, teacher capped": (0.0, 0.9, 0.25, None, 2.0, 5.0),
    "student capped, teacher scaled": (1.0, 0.9, 1.5, 4.0, 0.5, None),
    "both capped, JSD": (0.3, 0.9, 1.5, 4.0, 0.5, 7.0),
}


def heads(dtype=torch.float32, bias=True, rows=N):
    """Student, and a wider teacher that has no gradient."""
    g = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    student = [
        make(rows, D).requires_grad_(),
        (0.4 * make(V, D)).requires_grad_(),
        make(V).requires_grad_() if bias else None,
    ]
    return student, [make(rows, 2 * D), 0.3 * make(V, 2 * D), make(V) if bias else None]


def both(call):
    """By TRL and by us: ``(divergence, entropy, gradients of the student...)``; and the
    patch.
    """
    results = []
    for patched in (False, True):
        patch = patch_trl(heads=True) if patched else None
        try:
            results.append(call())
        finally:
            if patch is not None:
                patch.undo()
    return (*results, patch)


def apply(student, teacher, options):
    def call():
        found, entropy = module.ChunkedDivergenceFunction.apply(*student, *teacher, *options)
        upstream = torch.linspace(-1, 2, len(found))
        return (
            found,
            entropy,
            *torch.autograd.grad((found * upstream).sum(), [x for x in student if x is not None]),
        )

    return call


def truth(student, teacher, options):
    """The same in fp64, from the definition."""
    beta, temperature, *scales_and_caps = options
    double = [None if x is None else x.detach().double() for x in (*student, *teacher)]
    leaves = [x.requires_grad_() for x in double[:3] if x is not None]

    def logp(hidden, weight, bias, scale, cap):
        z = scale * (hidden @ weight.T + (0 if bias is None else bias))
        return ((z if cap is None else cap * torch.tanh(z / cap)) / temperature).log_softmax(-1)

    s, t = logp(*double[:3], *scales_and_caps[:2]), logp(*double[3:], *scales_and_caps[2:])
    # of JSD only
    m = torch.logaddexp(s + math.log(1 - beta or 1), t + math.log(beta or 1))
    of_teacher, of_student = (
        (x.exp() * (x - y)).sum(-1)
        for x, y in ((t, s if beta == 0 else m), (s, t if beta == 1 else m))
    )
    found = (
        of_teacher
        if beta == 0
        else of_student
        if beta == 1
        else beta * of_teacher + (1 - beta) * of_student
    )
    upstream = torch.linspace(-1, 2, len(found)).double()
    return (
        found.detach(),
        -(s.exp() * s).sum(-1).detach(),
        *torch.autograd.grad((found * upstream).sum(), leaves),
    )


def assert_same(stock, ours, bound=1e-6):
    for a, b in zip(stock, ours, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).norm() <= bound * a.norm()


@by_name
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_divergence_is_trls(name, bias):
    student, teacher = heads(bias=bias)
    stock, ours, patch = both(apply(student, teacher, LOSSES[name]))
    exact = truth(student, teacher, LOSSES[name])
    assert exact[0].abs().max() > 0.1
    assert_same(exact, [x.double() for x in ours])
    # TRL's own rounding: its gradient of reverse KL and of JSD is up to 1.3e-6 away
    assert_same(exact, [x.double() for x in stock], 2e-6)
    assert (
        not ours[1].requires_grad
        and patch.fused_calls == {"linear_token_divergence": 1}
        and patch.delegated_calls == {}
    )


@by_name
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_has_fp32_logits(autocast):
    """bf16 states, and fp32 ones under autocast beside an fp32 head: logits are not
    rounded, gradients once, to the tensor's dtype.
    """
    student, teacher = heads(torch.float32 if autocast else torch.bfloat16, bias=not autocast)

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return apply(student, teacher, LOSSES["JSD"])()

    stock, ours, _ = both(call)
    assert_same(stock[:2], ours[:2], 1e-5)
    # TRL rounds the logits' gradient to bf16 before the GEMMs.
    assert_same(stock[2:], ours[2:], 1e-2)


@by_name
def test_no_row_and_no_gradient():
    student, teacher = heads(rows=0)
    stock, ours, _ = both(apply(student, teacher, LOSSES["forward KL"]))
    assert_same(stock, ours)
    student, teacher = heads()
    with torch.no_grad():
        stock, ours, _ = both(
            lambda: module.ChunkedDivergenceFunction.apply(
                *student, *teacher, *LOSSES["reverse KL"]
            )
        )
    assert_same(stock, ours)


@by_name
@pytest.mark.parametrize("change", ["ds_id", "vocabulary", "bias"])
def test_what_is_left_to_trl_is_counted(change):
    student, teacher = heads()
    if change == "ds_id":
        teacher[1].ds_id = 3
    elif change == "bias":
        teacher[0] = teacher[0].bfloat16()
    else:
        teacher[1], teacher[2] = (
            torch.cat([teacher[1], teacher[1][:3]]),
            torch.cat([teacher[2], teacher[2][:3]]),
        )
    with pytest.warns(
        UserWarning,
        match="leaves this to TRL: (DeepSpeed ZeRO-3|heads of different vocabularies|a head.s bias)",
    ):
        stock, ours, patch = both(apply(student, teacher, LOSSES["forward KL"]))
    assert all(torch.equal(a, b) for a, b in zip(stock, ours, strict=True))
    assert sum(patch.delegated_calls.values()) == 1 and patch.fused_calls == {}


def test_a_moved_function_is_refused(monkeypatch):
    class Moved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, student, teacher):
            return student

    monkeypatch.setattr(module, "ChunkedDivergenceFunction", Moved, raising=False)
    with pytest.raises(
        rw.BackendUnavailable, match=r"ChunkedDivergenceFunction\.forward has the signature"
    ):
        patch_trl(heads=True)


def test_without_a_kernel_to_import_there_is_none_to_replace(monkeypatch):
    """TRL 1.15 without Triton."""

    def missing(name):
        raise ImportError(name)

    monkeypatch.delattr(module, "ChunkedDivergenceFunction", raising=False)
    monkeypatch.setattr(divergence.importlib, "import_module", missing)
    assert divergence.divergence_replacements("auto", None) == []


def distillation(out, **settings):
    """A trainer with a wider teacher."""

    def model(seed, **wider):
        torch.manual_seed(seed)
        # As far from each other as trained models: of nearly equal distributions fp32
        # knows the KL to few digits.
        return Qwen2ForCausalLM(Qwen2Config(**(TINY | {"initializer_range": 0.3} | wider)))

    fields = {
        "per_device_train_batch_size": 4, "max_steps": 2, "max_completion_length": 8, "seed": 1, "temperature": 0.9,
        "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    args = trl.DistillationConfig(output_dir=out, **(fields | settings))
    rows = Dataset.from_list([{"prompt": f"{a} + {b} ="} for a in range(3, 9) for b in range(3, 9)])
    teacher = model(1, hidden_size=48, num_attention_heads=3)
    return trl.DistillationTrainer(
        model=model(0),
        teacher_model=teacher,
        args=args,
        train_dataset=rows,
        processing_class=make_tokenizer(),
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return distillation(str(tmp_path_factory.mktemp("distillation")))


@by_name
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_trainers_loss(trainer, beta):
    """Loss, all gradients and the logged entropy of a micro-batch with masked tokens;
    ignored rows are not projected.
    """
    trainer.beta = beta
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, TINY["vocab_size"], (4, 13), generator=g)
    mask = (torch.arange(8) < torch.tensor([8, 3, 0, 5])[:, None]).long()
    batch = {
        "prompt_ids": ids[:, :5],
        "prompt_mask": torch.ones(4, 5, dtype=torch.long),
        "completion_ids": ids[:, 5:],
        "completion_mask": mask,
        "num_items_in_batch": torch.tensor(40),
    }

    def call():
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        grads = torch.cat(
            [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        )
        return loss.detach(), grads, torch.tensor(trainer._metrics["train"]["entropy"][-1])

    stock, ours, patch = both(call)
    assert stock[1].norm() > 1e-4
    assert_same(stock, ours)
    assert patch.fused_calls == {"linear_token_divergence": 1} and patch.delegated_calls == {}


@by_name
def test_a_training_run(trainer):
    """Generation and two steps under the patch; nothing is left to TRL."""
    trainer.beta = 0.5
    with patch_trl(heads=True) as patch:
        trainer.train()
    assert patch.fused_calls["linear_token_divergence"] == 2 and patch.delegated_calls == {}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
