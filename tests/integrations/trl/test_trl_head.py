"""The head of a TRL model without logits: model families, adapters on the head, what it
refuses. Offline, CPU.
"""

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")
pytest.importorskip("peft")

import peft
import transformers
import trl
from oracles import trl as oracle
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl_common import TINY, T, assert_same, current, make_inputs, run

import reweight_ops as rw
from reweight_ops.integrations.trl import ReweightGRPOTrainer, patch_trl
from reweight_ops.integrations.trl import head as trl_head

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
HOOKS = [{}, {"fuse_loss": True}]


def family(name, **config):
    """A tiny model of a family, always the same weights. ``bias`` gives it a head with
    a bias.
    """
    torch.manual_seed(0)
    config = {"pad_token_id": 0, **TINY, **config}
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**config)
    )
    if name == "Phi":
        torch.nn.init.normal_(model.lm_head.bias)
    return model


FAMILIES = {
    "softcap": (
        "Gemma2",
        {"head_dim": 16, "final_logit_softcapping": 0.5, "attn_implementation": "eager"},
    ),
    "logit_scale": ("Cohere", {"logit_scale": 0.3}),
    "logits_scaling": ("Granite", {"logits_scaling": 4.0}),
    "tied": ("Qwen2", {"tie_word_embeddings": True}),
    "bias": ("Phi", {}),
}


@pytest.mark.parametrize("ours", HOOKS, ids=["token", "fused"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(make_trainer, name, ours):
    """Scale, soft cap, bias and tied weights of the family's config, as TRL has them
    and as the model's own forward has them.
    """
    kind, config = FAMILIES[name]
    stock, mine = (
        make_trainer(cls, family(kind, **config), own)
        for cls, own in ((trl.GRPOTrainer, {}), (ReweightGRPOTrainer, ours))
    )
    inputs = make_inputs(stock)
    assert_same(run(stock, inputs), run(mine, inputs))
    logps, _, _ = log_probs(mine, inputs)
    expected, _ = current(mine, inputs)  # through the model's own logits
    mask = inputs["completion_mask"] != 0
    torch.testing.assert_close(logps[mask], expected[mask])
    assert all(name.startswith("linear_") for name in mine.fused_calls)


def log_probs(trainer, inputs, **options):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, T, **options)


@pytest.mark.parametrize("ours", HOOKS, ids=["token", "fused"])
def test_the_head_is_called_by_the_probe_only(make_trainer, ours, monkeypatch):
    trainer = make_trainer(ReweightGRPOTrainer, ours=ours)
    inputs = make_inputs(trainer)
    run(trainer, inputs)
    linear, weight = torch.nn.functional.linear, trainer.model.lm_head.weight

    def watched(x, w, b=None):
        return pytest.fail("logits were built") if w is weight else linear(x, w, b)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    run(trainer, inputs)
    with pytest.raises(pytest.fail.Exception, match="logits were built"):
        current(trainer, inputs)


def test_the_models_forward_is_given_back(make_trainer):
    trainer = make_trainer(ReweightGRPOTrainer)
    forward, inputs = trainer.model.forward, make_inputs(trainer)
    run(trainer, inputs)
    assert trainer.model.forward is forward
    inputs["completion_ids"][0, 0] = 10**6
    with pytest.raises((rw.InvalidCall, IndexError)):
        run(trainer, inputs)
    assert trainer.model.forward is forward


@pytest.mark.parametrize("ours", HOOKS, ids=["token", "fused"])
def test_gradient_checkpointing(make_trainer, ours):
    stock, mine = (
        make_trainer(cls, ours=own, gradient_checkpointing=True)
        for cls, own in ((trl.GRPOTrainer, {}), (ReweightGRPOTrainer, ours))
    )
    for trainer in (stock, mine):
        trainer.model.gradient_checkpointing_enable()
    inputs = make_inputs(stock)
    assert_same(run(stock, inputs), run(mine, inputs))


# --- adapters -------------------------------------------------------------------------
def with_adapter(**config):
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Qwen2ForCausalLM(Qwen2Config(**TINY)), peft.LoraConfig(r=4, lora_alpha=6, **config)
    )
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def expected_run(trainer, inputs):
    """Loss and gradient by the oracle, from the logits of the model's own forward."""
    trainer.model.zero_grad()
    logp, _ = current(trainer, inputs)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    loss, _ = oracle.grpo_loss(
        logp,
        inputs["advantages"],
        mask,
        old_logps=inputs["old_per_token_logps"],
        num_items_in_batch=123,
        steps_per_generation=trainer.args.steps_per_generation,
    )
    loss.backward()
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), grads


@pytest.mark.parametrize("lm_head", ["linear", "logits"])
@pytest.mark.parametrize("ours", HOOKS, ids=["token", "fused"])
def test_lora_on_the_head(make_trainer, ours, lm_head):
    """TRL refuses it; here loss and gradient are those of the model's own logits, the
    factors on the head included.
    """
    trainer = make_trainer(
        ReweightGRPOTrainer,
        with_adapter(target_modules=["q_proj", "lm_head"]),
        {**ours, "lm_head": lm_head},
    )
    inputs = make_inputs(trainer)
    loss, grads = expected_run(trainer, inputs)
    assert run(trainer, inputs)[0] == pytest.approx(loss, abs=1e-6)
    on_head = [name for name in grads if "lm_head" in name]
    assert len(on_head) == 2 and all(grads[name].norm() > 1e-3 for name in on_head)
    for name, p in trainer.model.named_parameters():
        if name in grads:
            assert (p.grad - grads[name]).norm() <= 2e-6 * grads[name].norm(), name
    with trainer.model.disable_adapter(), torch.no_grad():
        logps = log_probs(trainer, inputs)[0]
        want, _ = current(trainer, inputs)
    mask = inputs["completion_mask"] != 0
    torch.testing.assert_close(logps[mask], want[mask])


@pytest.mark.parametrize("ours", HOOKS, ids=["token", "fused"])
def test_modules_to_save(make_trainer, ours):
    """A trained copy of the head, as TRL computes it; with the adapter off, the
    original.
    """
    stock, mine = (
        make_trainer(cls, with_adapter(target_modules=["q_proj"], modules_to_save=["lm_head"]), own)
        for cls, own in (
            (trl.GRPOTrainer, {}),
            (ReweightGRPOTrainer, {**ours, "lm_head": "linear"}),
        )
    )
    inputs = make_inputs(stock)
    assert_same(run(stock, inputs), run(mine, inputs))
    saved = mine.model.get_base_model().lm_head.modules_to_save["default"].weight
    assert saved.grad.norm() > 1e-3
    with mine.model.disable_adapter(), torch.no_grad():
        logps = log_probs(mine, inputs)[0]
        want, _ = current(mine, inputs)
    mask = inputs["completion_mask"] != 0
    torch.testing.assert_close(logps[mask], want[mask])


UNSUPPORTED = {
    "dora": (dict(use_dora=True), "the LoRA variant DoraLinearVariant"),
    "dropout": (dict(lora_dropout=0.1), "lora_dropout"),
    "bias": (dict(lora_bias=True), "lora_bias"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_adapters_need_logits(make_trainer, name):
    config, reason = UNSUPPORTED[name]
    make = lambda **ours: make_trainer(  # noqa: E731
        ReweightGRPOTrainer, with_adapter(target_modules=["lm_head"], **config), ours
    )
    trainer = make(lm_head="linear")
    inputs = make_inputs(trainer)
    with pytest.raises(
        rw.UnsupportedRequest, match=f"lm_head='linear' is impossible with {reason}"
    ):
        run(trainer, inputs)
    trainer = make()
    with pytest.warns(UserWarning, match=f"builds the logits: {reason}"):
        run(trainer, inputs)
    assert trainer.fused_calls == {"token_logps": 1}


def test_a_head_of_another_class_needs_logits(make_trainer):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Qwen2ForCausalLM(Qwen2Config(**TINY))
    model.lm_head.__class__ = Doubled
    trainer = make_trainer(ReweightGRPOTrainer, model)
    inputs = make_inputs(trainer)
    with pytest.warns(UserWarning, match="Doubled, which is not a plain nn.Linear"):
        logps = log_probs(trainer, inputs)[0]
    mask = inputs["completion_mask"] != 0
    torch.testing.assert_close(logps[mask], current(trainer, inputs)[0][mask])


def test_an_adapter_on_the_head_is_never_left_to_trl(make_trainer):
    trainer = make_trainer(
        ReweightGRPOTrainer,
        with_adapter(target_modules=["lm_head"]),
        {"fuse_loss": True},
        loss_type="vespo",
    )
    with pytest.raises(rw.UnsupportedRequest, match="would ignore the adapter on lm_head"):
        run(trainer, make_inputs(trainer))


def test_trls_own_refusals_stand(make_trainer):
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32|Applying a PEFT adapter"):
        make_trainer(
            ReweightGRPOTrainer, with_adapter(target_modules=["lm_head"]), cast_lm_head_to_fp32=True
        )
    with pytest.raises(ValueError, match="Applying a PEFT adapter"):
        make_trainer(trl.GRPOTrainer, with_adapter(target_modules=["lm_head"]))
    with patch_trl(), pytest.raises(ValueError, match="Applying a PEFT adapter"):
        make_trainer(trl.GRPOTrainer, with_adapter(target_modules=["lm_head"]))


def test_options():
    assert trl_head.choose_head("auto", consume_logits=True) == "logits"
    with pytest.raises(
        rw.InvalidCall, match="lm_head is 'fast', expected one of auto, linear, logits"
    ):
        trl_head.choose_head("fast", False)
    with pytest.raises(rw.InvalidCall, match="needs logits to consume"):
        trl_head.choose_head("linear", True)


def test_training_step_with_lora_on_the_head(make_trainer):
    """A real step: the adapter on the head moves, and the reward function's completions
    came from the adapted head.
    """
    model = with_adapter(target_modules=["q_proj", "lm_head"])
    trainer = make_trainer(
        ReweightGRPOTrainer,
        model,
        {"lm_head": "linear", "fuse_loss": True},
        max_steps=2,
        optim="sgd",
        learning_rate=1.0,
    )
    before = {
        n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lm_head.lora" in n
    }
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert len(before) == 2 and all((after[n] - p).norm() > 1e-4 for n, p in before.items())
    assert trainer.delegated_calls == {} and trainer.fused_calls["linear_policy_loss"] == 2


@pytest.mark.parametrize("ours", HOOKS, ids=["token", "fused"])
def test_bf16_autocast(make_trainer, ours):
    """Operands in bf16, as TRL's: one rounding of each logit and of each logit's
    gradient apart.
    """
    stock, mine = (
        make_trainer(cls, ours=own, bf16=True)
        for cls, own in ((trl.GRPOTrainer, {}), (ReweightGRPOTrainer, ours))
    )
    inputs = make_inputs(stock)
    a, b = run(stock, inputs), run(mine, inputs)
    assert b[0] == pytest.approx(a[0], abs=1e-6)
    assert (b[1] - a[1]).norm() <= torch.finfo(torch.bfloat16).eps / 2 * a[1].norm()
