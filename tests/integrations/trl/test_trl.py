"""Both TRL hooks against TRL's own code on the same batch. Offline, CPU."""

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")

import trl
from oracles import trl as oracle
from transformers import Gemma2Config, Gemma2ForCausalLM
from trl_common import (
    OURS,
    TINY,
    B,
    T,
    assert_same,
    clip_settings,
    configure,
    current,
    make_inputs,
    run,
)

from reweight_ops.integrations.trl import ReweightGRPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.mark.parametrize("dims", [1, 2], ids=["adv_B", "adv_BT"])
@pytest.mark.parametrize("sequence", [False, True], ids=["token", "sequence"])
# which the hooks leave to TRL: test_trl_trainer.py
@pytest.mark.parametrize("loss_type", [t for t in oracle.LOSS_TYPES if t != "vespo"])
def test_every_loss_type(trainers, loss_type, sequence, dims):
    """TRL, both hooks and the oracle: loss, gradient, metrics."""
    settings = clip_settings(loss_type, sequence)
    configure(
        trainers, current_gradient_accumulation_steps=3, args_steps_per_generation=4, **settings
    )
    inputs = make_inputs(trainers["stock"], dims)
    stock = run(trainers["stock"], inputs)
    for name in OURS:
        assert_same(stock, run(trainers[name], inputs))
        assert trainers[name].delegated_calls == {} and len(trainers[name].fused_calls) == 1

    logp, entropies = current(trainers["stock"], inputs)
    loss, metrics = oracle.grpo_loss(
        logp,
        inputs["advantages"],
        inputs["completion_mask"] * inputs["tool_mask"],
        entropies=entropies,
        old_logps=inputs["old_per_token_logps"],
        ref_logps=inputs["ref_per_token_logps"],
        loss_type=loss_type,
        importance_sampling_level="sequence" if sequence else "token",
        epsilon=settings["epsilon_low"],
        epsilon_high=settings["epsilon_high"],
        delta=settings.get("args_delta"),
        beta=0.04,
        max_completion_length=T,
        num_items_in_batch=123,
        accumulation_steps=3,
        steps_per_generation=4,
    )
    assert loss.item() == pytest.approx(stock[0], abs=1e-6)
    assert metrics == pytest.approx(stock[2], abs=1e-6)
    if "clip_ratio/low_mean" in metrics:
        assert metrics["clip_ratio/low_mean"] > 0.01 and metrics["clip_ratio/high_mean"] > 0.01


@pytest.mark.parametrize("quantile", [1.0, 0.4], ids=["all", "top_entropy"])
@pytest.mark.parametrize("coef", [0.0, 0.1], ids=["", "bonus"])
@pytest.mark.parametrize("loss_type", oracle.LOSS_TYPES)
def test_entropy_bonus_and_mask(trainers, loss_type, coef, quantile):
    """The bonus has its own mean and accumulation, over the masked tokens only."""
    settings = clip_settings(loss_type, False)
    configure(
        trainers,
        top_entropy_quantile=quantile,
        entropy_coef=coef,
        _entropy_bonus_enabled=bool(coef),
        current_gradient_accumulation_steps=3,
        **settings,
    )
    inputs = make_inputs(trainers["stock"])
    stock = run(trainers["stock"], inputs)
    for name in OURS:
        assert_same(stock, run(trainers[name], inputs))
    assert ("policy_loss" in stock[2]) == bool(coef)

    logp, entropies = current(trainers["stock"], inputs)
    loss, _ = oracle.grpo_loss(
        logp,
        inputs["advantages"],
        inputs["completion_mask"] * inputs["tool_mask"],
        entropies=entropies,
        old_logps=inputs["old_per_token_logps"],
        ref_logps=inputs["ref_per_token_logps"],
        loss_type=loss_type,
        epsilon_high=settings["epsilon_high"],
        delta=settings.get("args_delta"),
        beta=0.04,
        top_entropy_quantile=quantile,
        entropy_coef=coef,
        max_completion_length=T,
        num_items_in_batch=123,
        accumulation_steps=3,
        steps_per_generation=trainers["stock"].args.steps_per_generation,
    )
    assert loss.item() == pytest.approx(stock[0], abs=1e-6)


@pytest.mark.parametrize("shape", [(B, 1), (B, T)], ids=["sequence", "token"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "luspo"])
def test_sampler_correction(trainers, loss_type, shape):
    """vLLM's importance ratio multiplies the surrogate, not the KL; a zero drops a
    sequence.
    """
    configure(
        trainers,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        **clip_settings(loss_type, False),
    )
    inputs = make_inputs(trainers["stock"])
    inputs["importance_sampling_ratio"] = torch.rand(
        shape, generator=torch.Generator().manual_seed(1)
    ).mul(2)
    inputs["importance_sampling_ratio"][0] = 0
    stock = run(trainers["stock"], inputs)
    for name in OURS:
        assert_same(stock, run(trainers[name], inputs))


@pytest.mark.parametrize(
    "change", ["on_policy", "no_tool_mask", "plain_kl", "no_kl", "all_masked", "evaluation"]
)
def test_variants(trainers, change):
    settings = clip_settings("dapo", False)
    inputs = make_inputs(trainers["stock"])
    if change == "on_policy":
        del inputs["old_per_token_logps"]
    elif change == "no_tool_mask":
        del inputs["tool_mask"]
    elif change == "plain_kl":
        settings["args_use_bias_correction_kl"] = False
    elif change == "no_kl":
        settings["beta"] = 0.0
        del inputs["ref_per_token_logps"]
    elif change == "all_masked":
        inputs["tool_mask"] = torch.zeros(B, T, dtype=torch.long)
    configure(
        trainers, current_gradient_accumulation_steps=3, args_steps_per_generation=4, **settings
    )
    if change == "evaluation":
        for trainer in trainers.values():
            trainer.model.eval()
    with torch.set_grad_enabled(change != "evaluation"):
        stock, *ours = (run(trainers[name], inputs) for name in ("stock", *OURS))
    if change == "all_masked":
        # A differentiable zero; TRL's extrema over no sequence are NaN.
        assert stock[0] == 0.0 and all(loss == 0.0 and not grad.any() for loss, grad, _ in ours)
        return
    for one in ours:
        assert_same(stock, one)


def test_log_probs_and_entropies(trainers):
    """The default hook alone: values, zeros where masked, chunking, entropy gradient,
    nothing computed that was not asked for.
    """
    inputs = make_inputs(trainers["stock"])
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    results = {}
    for name in ("stock", "token", "token_logits"):
        trainer, rows = trainers[name], []
        handle = trainer.model.model.register_forward_hook(
            lambda module, args, out, rows=rows: rows.append(len(out.last_hidden_state))
        )
        logps, entropies, aux = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, T, batch_size=3, compute_entropy=True
        )
        grads = torch.autograd.grad(
            entropies.square().sum() + logps.sum(), list(trainer.model.parameters())
        )
        results[name] = logps, entropies, torch.cat([g.flatten() for g in grads])
        handle.remove()
        # the probe has one row
        assert aux is None and [n for n in rows if n > 1] == [3, 3, 2]
    for name in ("token", "token_logits"):
        for a, b in zip(results["stock"], results[name], strict=True):
            assert a.shape == b.shape
            assert (a - b).norm() <= 1e-6 * a.norm()
        logps, entropies, _ = results[name]
        assert (
            not logps[inputs["completion_mask"] == 0].any()
            and not entropies[inputs["completion_mask"] == 0].any()
        )
        logps, entropies, aux = trainers[name]._get_per_token_logps_and_entropies(
            trainers[name].model, ids, mask, T
        )
        assert entropies is None and aux is None


def test_softcapped_model(make_trainer):
    """Gemma 2 caps its logits; the temperature applies after the cap."""
    pair = []
    for cls, ours in ((trl.GRPOTrainer, {}), (ReweightGRPOTrainer, {"fuse_loss": True})):
        torch.manual_seed(0)
        config = Gemma2Config(
            **TINY, head_dim=16, final_logit_softcapping=0.5, attn_implementation="eager"
        )
        pair.append(make_trainer(cls, Gemma2ForCausalLM(config), ours))
    inputs = make_inputs(pair[0])
    assert_same(*(run(trainer, inputs) for trainer in pair))


def test_fp32_head_under_autocast(make_trainer):
    """``cast_lm_head_to_fp32`` in bf16 training: the head's matmul leaves autocast in
    both hooks, as it does in TRL.
    """
    pair = []
    for cls in (trl.GRPOTrainer, ReweightGRPOTrainer):
        trainer = make_trainer(
            cls,
            bf16=True,
            cast_lm_head_to_fp32=True,
            ours={"fuse_loss": True} if cls is ReweightGRPOTrainer else {},
        )
        assert trainer.accelerator.mixed_precision == "bf16"
        pair.append(trainer)
    inputs = make_inputs(trainer)
    assert_same(*(run(trainer, inputs) for trainer in pair))


def test_consume_logits_changes_nothing(make_trainer, trainers):
    consuming = make_trainer(ReweightGRPOTrainer, ours={"fuse_loss": True, "consume_logits": True})
    inputs = make_inputs(trainers["stock"])
    assert_same(run(trainers["stock"], inputs), run(consuming, inputs))
