"""Both TRL hooks against TRL's own code on the same batch. Offline, CPU."""

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")

import trl
from oracles import trl as oracle
from transformers import Gemma2Config, Gemma2ForCausalLM
from trl_common import TINY, B, T, assert_same, clip_settings, configure, current, make_inputs, run

from reweight_ops.integrations.trl import ReweightGRPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.mark.parametrize("dims", [1, 2], ids=["adv_B", "adv_BT"])
@pytest.mark.parametrize("sequence", [False, True], ids=["token", "sequence"])
@pytest.mark.parametrize("loss_type", oracle.LOSS_TYPES)
def test_every_loss_type(trio, loss_type, sequence, dims):
    """TRL, both hooks and the oracle: loss, gradient, metrics."""
    settings = clip_settings(loss_type, sequence)
    configure(trio, current_gradient_accumulation_steps=3, args_steps_per_generation=4, **settings)
    inputs = make_inputs(trio["stock"], dims)
    stock = run(trio["stock"], inputs)
    assert_same(stock, run(trio["token"], inputs))
    assert_same(stock, run(trio["fused"], inputs))
    assert trio["token"].delegated_calls == trio["fused"].delegated_calls == {}

    logp, entropies = current(trio["stock"], inputs)
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
def test_entropy_bonus_and_mask(trio, loss_type, coef, quantile):
    """The bonus has its own mean and accumulation, over the masked tokens only."""
    settings = clip_settings(loss_type, False)
    configure(
        trio,
        top_entropy_quantile=quantile,
        entropy_coef=coef,
        _entropy_bonus_enabled=bool(coef),
        current_gradient_accumulation_steps=3,
        **settings,
    )
    inputs = make_inputs(trio["stock"])
    stock = run(trio["stock"], inputs)
    for name in ("token", "fused"):
        assert_same(stock, run(trio[name], inputs))
    assert ("policy_loss" in stock[2]) == bool(coef)

    logp, entropies = current(trio["stock"], inputs)
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
        steps_per_generation=trio["stock"].args.steps_per_generation,
    )
    assert loss.item() == pytest.approx(stock[0], abs=1e-6)


@pytest.mark.parametrize("shape", [(B, 1), (B, T)], ids=["sequence", "token"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "luspo"])
def test_sampler_correction(trio, loss_type, shape):
    """vLLM's importance ratio multiplies the surrogate, not the KL; a zero drops a sequence."""
    configure(trio, use_vllm=True, vllm_importance_sampling_correction=True, **clip_settings(loss_type, False))
    inputs = make_inputs(trio["stock"])
    inputs["importance_sampling_ratio"] = torch.rand(shape, generator=torch.Generator().manual_seed(1)).mul(2)
    inputs["importance_sampling_ratio"][0] = 0
    stock = run(trio["stock"], inputs)
    for name in ("token", "fused"):
        assert_same(stock, run(trio[name], inputs))


@pytest.mark.parametrize("change", ["on_policy", "no_tool_mask", "plain_kl", "no_kl", "all_masked", "evaluation"])
def test_variants(trio, change):
    settings = clip_settings("dapo", False)
    inputs = make_inputs(trio["stock"])
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
    configure(trio, current_gradient_accumulation_steps=3, args_steps_per_generation=4, **settings)
    if change == "evaluation":
        for trainer in trio.values():
            trainer.model.eval()
    with torch.set_grad_enabled(change != "evaluation"):
        stock, token, fused = (run(trio[name], inputs) for name in ("stock", "token", "fused"))
    if change == "all_masked":
        # A differentiable zero; TRL's extrema over no sequence are NaN.
        assert stock[0] == token[0] == fused[0] == 0.0
        assert not fused[1].any() and not token[1].any()
        return
    assert_same(stock, token)
    assert_same(stock, fused)


def test_log_probs_and_entropies(trio):
    """The default hook alone: values, zeros where masked, chunking, entropy gradient, nothing computed that was not asked for."""
    inputs = make_inputs(trio["stock"])
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    results = {}
    for name in ("stock", "token"):
        trainer, rows = trio[name], []
        handle = trainer.model.model.register_forward_hook(lambda module, args, out, rows=rows: rows.append(len(out.last_hidden_state)))
        logps, entropies, aux = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, T, batch_size=3, compute_entropy=True)
        grads = torch.autograd.grad(entropies.square().sum() + logps.sum(), list(trainer.model.parameters()))
        results[name] = logps, entropies, torch.cat([g.flatten() for g in grads])
        handle.remove()
        assert aux is None and rows == [3, 3, 2]
    for a, b in zip(*results.values(), strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-6 * a.norm()
    logps, entropies, _ = results["token"]
    assert not logps[inputs["completion_mask"] == 0].any() and not entropies[inputs["completion_mask"] == 0].any()
    logps, entropies, aux = trio["token"]._get_per_token_logps_and_entropies(trio["token"].model, ids, mask, T)
    assert entropies is None and aux is None


def test_softcapped_model(make_trainer):
    """Gemma 2 caps its logits; the temperature applies after the cap."""
    pair = []
    for cls, ours in ((trl.GRPOTrainer, {}), (ReweightGRPOTrainer, {"fuse_loss": True})):
        torch.manual_seed(0)
        config = Gemma2Config(**TINY, head_dim=16, final_logit_softcapping=0.5, attn_implementation="eager")
        pair.append(make_trainer(cls, Gemma2ForCausalLM(config), ours))
    inputs = make_inputs(pair[0])
    assert_same(*(run(trainer, inputs) for trainer in pair))


def test_fp32_head_under_autocast(make_trainer):
    """``cast_lm_head_to_fp32`` in bf16 training: the head's matmul leaves autocast in both hooks, as it does in TRL."""
    pair = []
    for cls in (trl.GRPOTrainer, ReweightGRPOTrainer):
        trainer = make_trainer(cls, bf16=True, cast_lm_head_to_fp32=True, ours={"fuse_loss": True} if cls is ReweightGRPOTrainer else {})
        assert trainer.accelerator.mixed_precision == "bf16"
        pair.append(trainer)
    inputs = make_inputs(trainer)
    assert_same(*(run(trainer, inputs) for trainer in pair))


def test_consume_logits_changes_nothing(make_trainer, trio):
    consuming = make_trainer(ReweightGRPOTrainer, ours={"fuse_loss": True, "consume_logits": True})
    inputs = make_inputs(trio["stock"])
    assert_same(run(trio["stock"], inputs), run(consuming, inputs))
