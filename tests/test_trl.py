"""Both TRL hooks against TRL's own code on the same batch, and a short real training run. Offline, CPU."""

import copy
import os
import random

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
trl = pytest.importorskip("trl", minversion="1.15")

from datasets import Dataset  # noqa: E402
from oracles import papers  # noqa: E402
from oracles import trl as oracle  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import reweight_ops as rw  # noqa: E402
from reweight_ops.integrations import trl as integration  # noqa: E402
from reweight_ops.integrations.trl import ReweightGRPOTrainer, patch_trl  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

B, P, T, V = 8, 5, 12, 300
TINY = dict(
    vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<eos>", "<unk>", *(str(i) for i in range(97)), "+", "="]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def make_trainer(tokenizer, tmp_path_factory):
    """``make_trainer(cls, model=None, options of ours, **GRPOConfig fields)``; without a model, a new tiny Qwen2, always the same."""

    def make(cls, model=None, ours=None, **config):
        if model is None:
            torch.manual_seed(0)
            model = Qwen2ForCausalLM(Qwen2Config(**TINY))
        rng = random.Random(0)
        rows = [{"prompt": f"{rng.randrange(97)} + {rng.randrange(97)} ="} for _ in range(64)]
        fields = dict(
            output_dir=str(tmp_path_factory.mktemp("out")), per_device_train_batch_size=8, num_generations=4, max_completion_length=T,
            temperature=0.9, report_to=[], use_cpu=True, bf16=False, save_strategy="no", max_steps=1, gradient_checkpointing=False,
            disable_tqdm=True, seed=1,
        )  # fmt: skip
        trainer = cls(
            model=model,
            reward_funcs=lambda completions, **_: [random.Random(c).random() for c in completions],
            args=trl.GRPOConfig(**(fields | config)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **(ours or {}),
        )
        trainer.current_gradient_accumulation_steps = 1  # set by the training loop only
        trainer.model.train()
        return trainer

    return make


@pytest.fixture(scope="module")
def trio(make_trainer):
    """TRL's own trainer, our default hook and our fused one, on equal models."""
    classes = {"stock": trl.GRPOTrainer, "token": ReweightGRPOTrainer, "fused": ReweightGRPOTrainer}
    return {name: make_trainer(cls, ours={"fuse_loss": True} if name == "fused" else {}) for name, cls in classes.items()}


@pytest.fixture(autouse=True)
def restore(request):
    """Attributes that a test sets on the shared trainers are set back."""
    if "trio" not in request.fixturenames:
        yield
        return
    trainers = request.getfixturevalue("trio").values()
    saved = [(t, dict(t.__dict__), copy.copy(t.args)) for t in trainers]
    yield
    for trainer, attributes, args in saved:
        trainer.__dict__.clear()
        trainer.__dict__.update(attributes, args=args)
        trainer.model.train()


def make_inputs(trainer, dims=1, seed=0):
    """A discriminating batch: ragged masks, an empty sequence, tool tokens, off-policy log-probs on both sides of the clip bounds."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([T, 3, 7, 0, 9, 1, T, 5])
    inputs = dict(
        prompt_ids=torch.randint(3, V, (B, P), generator=g),
        prompt_mask=(torch.arange(P) >= torch.randint(0, P, (B, 1), generator=g)).long(),
        completion_ids=torch.randint(3, V, (B, T), generator=g),
        completion_mask=(torch.arange(T) < lengths[:, None]).long(),
        tool_mask=(torch.rand(B, T, generator=g) > 0.2).long(),
        advantages=torch.randn((B, T) if dims == 2 else (B,), generator=g),
        num_items_in_batch=torch.tensor(123),
    )
    with torch.no_grad():
        logp = current(trainer, inputs)[0]
    for name, scale in (("old_per_token_logps", 0.4), ("ref_per_token_logps", 0.3)):
        inputs[name] = logp + scale * torch.randn(B, T, generator=g)
    return inputs


def current(trainer, inputs):
    """Log-probs and entropies by the oracle, from the model's logits."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = trainer.model(input_ids=ids, attention_mask=mask, logits_to_keep=T + 1).logits[:, :-1]
    return oracle.logps_and_entropies(logits, inputs["completion_ids"], trainer.temperature)


def run(trainer, inputs):
    """Loss, flat gradient and the metrics logged by one call."""
    mode = "train" if trainer.model.training else "eval"
    trainer._metrics[mode].clear()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    if loss.requires_grad:
        loss.backward()
    grads = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads) if grads else None, {name: values[-1] for name, values in trainer._metrics[mode].items()}


def assert_same(stock, ours):
    """1e-6 in loss, gradient (relative) and metrics: fp32 rounding, well under any term of the loss."""
    assert ours[0] == pytest.approx(stock[0], abs=1e-6, rel=1e-6)
    if stock[1] is not None:
        assert stock[1].norm() > 1e-3
        assert (ours[1] - stock[1]).norm() <= 1e-6 * stock[1].norm()
    assert ours[2] == pytest.approx(stock[2], abs=1e-6, rel=1e-6)


def configure(trio, *, sequence=False, **settings):
    """Set trainer attributes, and GRPOConfig fields as ``args_...``, on all three."""
    for trainer in trio.values():
        trainer.importance_sampling_level = "sequence" if sequence else "token"
        for name, value in settings.items():
            setattr(trainer.args if name.startswith("args_") else trainer, name.removeprefix("args_"), value)


def clip_settings(loss_type, sequence):
    """Bounds between which the batch has ratios on both sides; means of a sequence's log-ratios move less."""
    low, high = (0.05, 0.06) if sequence else (0.2, 0.28)
    settings = dict(loss_type=loss_type, sequence=sequence, epsilon_low=low, epsilon_high=high, beta=0.04)
    if loss_type == "cispo":
        settings["epsilon_high"] = 1.06
    elif loss_type != "sapo":
        settings["args_delta"] = 1.1 if sequence else 1.5
    return settings


# --- parity with TRL on one batch -----------------------------------------------------------------------------------------------
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
        trio, top_entropy_quantile=quantile, entropy_coef=coef, _entropy_bonus_enabled=bool(coef), current_gradient_accumulation_steps=3, **settings
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
    configure(trio, **settings)
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
        trainer = trio[name]
        logps, entropies, aux = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, T, batch_size=3, compute_entropy=True)
        grads = torch.autograd.grad(entropies.square().sum() + logps.sum(), list(trainer.model.parameters()))
        results[name] = logps, entropies, torch.cat([g.flatten() for g in grads])
        assert aux is None
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


# --- our own methods ------------------------------------------------------------------------------------------------------------
def test_reweighting_on_top_of_trl(make_trainer):
    trainer = make_trainer(ReweightGRPOTrainer, ours={"reweight": rw.weights.AdvantageReweighting(alpha=0.3)})
    inputs = make_inputs(trainer)
    logp, _ = current(trainer, inputs)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    expected = papers.advantage_reweighting(
        lambda A: oracle.grpo_loss(logp, A, mask, old_logps=inputs["old_per_token_logps"], num_items_in_batch=123)[0],
        inputs["advantages"],
        inputs["old_per_token_logps"],
    )
    assert run(trainer, inputs)[0] == pytest.approx(expected.item(), abs=1e-6)
    assert trainer.fused_calls == {"policy_loss": 1}


def test_lopti_alternates_over_the_passes(make_trainer):
    """The first pass over a rollout trains the unlikely tokens, the second the others."""
    halves = [rw.methods.lopti("low", eta=0.003), rw.methods.lopti("high", eta=0.003)]
    trainer = make_trainer(ReweightGRPOTrainer, ours={"spec": halves}, num_iterations=2, gradient_accumulation_steps=2)
    trainer.current_gradient_accumulation_steps = 2
    inputs = make_inputs(trainer)
    inputs["num_items_in_batch"] = (inputs["completion_mask"] * inputs["tool_mask"]).sum()
    logp, _ = current(trainer, inputs)
    ratio, A = torch.exp(logp - inputs["old_per_token_logps"]), inputs["advantages"][:, None]
    terms = -torch.minimum(ratio * A, ratio.clip(0.8, 1.2) * A)
    expected = papers.lopti(terms, inputs["old_per_token_logps"], inputs["completion_mask"] * inputs["tool_mask"], eta=0.003)
    for step, half in enumerate([0, 0, 1, 1, 0]):  # two micro-batches a pass, one window of accumulation each
        trainer._step = step
        assert run(trainer, inputs)[0] == pytest.approx(expected[half].item(), abs=1e-6), step
    assert min(e.abs() for e in expected) > 1e-3


def test_window_and_micro_batch_normalization_mix(make_trainer):
    """A penalty with another normalization than the surrogate's keeps its own, either way round."""
    surrogate = rw.rules.surrogates.Reinforce()
    bonus = rw.rules.penalties.EntropyBonus()
    for own, penalty in ((rw.TokenMean(), rw.SequenceMean()), (rw.SequenceMean(), rw.TokenMean())):
        spec = rw.PolicyLossSpec(surrogate=surrogate, reduction=own, penalties=(rw.Penalty(bonus, 0.1, penalty),))
        trainer = make_trainer(ReweightGRPOTrainer, ours={"spec": spec})
        trainer.current_gradient_accumulation_steps = 4
        inputs = make_inputs(trainer)
        logp, H = current(trainer, inputs)
        mask = (inputs["completion_mask"] * inputs["tool_mask"]).float()

        def reduced(x, reduction, mask=mask):
            if isinstance(reduction, rw.TokenMean):
                return (x * mask).sum() / (123 * 4 / trainer.args.steps_per_generation)
            return ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean() / 4

        expected = reduced(-inputs["advantages"][:, None] * logp, own) - 0.1 * reduced(H, penalty)
        assert run(trainer, inputs)[0] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("ours", "config", "message"),
    [
        ({"spec": "dapo"}, {"loss_type": "grpo"}, "loss_type='grpo'"),
        ({"spec": "dapo"}, {"epsilon_high": 0.3}, "epsilon_high=0.3"),
        ({"spec": "dapo"}, {"beta": 0.1}, "beta=0.1 would have no effect"),
        ({"spec": rw.methods.grpo(beta=0.04)}, {}, "reference log-probs"),
        ({"spec": ["dapo", "grpo"]}, {}, "num_iterations is 1"),
        ({"spec": "dappo"}, {}, "no method 'dappo'"),
        ({"spec": 3.0}, {}, "expected a PolicyLossSpec"),
    ],
)
def test_contradictions_are_errors(make_trainer, tokenizer, tmp_path, ours, config, message):
    model = None
    if "beta" in config:  # TRL loads its reference from the model's path
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**TINY)).save_pretrained(tmp_path)
        model = str(tmp_path)
    with pytest.raises((rw.InvalidCall, TypeError), match=message):
        make_trainer(ReweightGRPOTrainer, model, ours, **config)


# --- what is left to TRL --------------------------------------------------------------------------------------------------------
def test_delegation_is_counted_and_warned_once(trio):
    configure(trio, loss_type="vespo")
    inputs = make_inputs(trio["stock"])
    with pytest.warns(UserWarning, match="leaves this to TRL: loss_type='vespo'"):
        assert_same(run(trio["stock"], inputs), run(trio["fused"], inputs))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: pytest.fail("warned twice"))
        run(trio["fused"], inputs)
    assert trio["fused"].delegated_calls == {"loss_type='vespo'": 2}


@pytest.mark.parametrize(
    ("settings", "extra", "reason"),
    [
        ({"off_policy_mask_threshold": 0.1}, {}, "off_policy_mask_threshold"),
        ({"use_adaptive_entropy": True}, {}, "use_adaptive_entropy"),
        ({"aux_loss_enabled": True}, {}, "the MoE auxiliary loss"),
        ({}, {"pixel_values": torch.zeros(1)}, "multimodal inputs (pixel_values)"),
    ],
)
def test_delegation_reasons(trio, monkeypatch, settings, extra, reason):
    configure(trio, **settings)
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, model, inputs: "TRL's")
    with pytest.warns(UserWarning):
        assert trio["fused"]._compute_loss(None, make_inputs(trio["stock"]) | extra) == "TRL's"
    assert trio["fused"].delegated_calls[reason] == 1


def test_multimodal_log_probs_are_left_to_trl(trio, monkeypatch):
    seen = {}
    monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", lambda self, *args, **kwargs: seen.update(kwargs))
    with pytest.warns(UserWarning, match="multimodal"):
        trio["token"]._get_per_token_logps_and_entropies(None, None, None, 1, batch_size=2, pixel_values="pixels")
    assert seen["pixel_values"] == "pixels" and seen["batch_size"] == 2


def test_own_method_is_never_left_to_trl(make_trainer):
    trainer = make_trainer(ReweightGRPOTrainer, ours={"reweight": rw.weights.AdvantageReweighting()}, loss_type="vespo")
    with pytest.raises(rw.UnsupportedRequest, match="vespo"):
        run(trainer, make_inputs(trainer))


def test_signatures_are_checked():
    class Moved:
        def _get_per_token_logps_and_entropies(self, model, batch):
            pass

    class Fewer(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs, required):
            pass

    integration.check_signatures(trl.GRPOTrainer)
    with pytest.raises(rw.BackendUnavailable, match=r"Moved._get_per_token_logps_and_entropies has the signature \(self, model, batch\)"):
        integration.check_signatures(Moved)
    with pytest.raises(rw.BackendUnavailable, match="Fewer._compute_loss"):
        integration.check_signatures(Fewer)


def test_unknown_loss_source_is_reported(make_trainer, monkeypatch):
    monkeypatch.setattr(integration, "_KNOWN_LOSSES", ())
    with pytest.warns(UserWarning, match="was not checked against"):
        make_trainer(ReweightGRPOTrainer, ours={"fuse_loss": True})


# --- patch_trl ------------------------------------------------------------------------------------------------------------------
def test_patch_and_undo(make_trainer, trio):
    originals = {name: getattr(trl.GRPOTrainer, name) for name in integration._SIGNATURES}
    inputs = make_inputs(trio["stock"])
    stock = run(trio["stock"], inputs)
    with patch_trl(fuse_loss=True) as patch:
        patched = make_trainer(trl.GRPOTrainer)
        assert_same(stock, run(patched, inputs))
        assert patched.fused_calls == {"policy_loss": 1}
        trio["token"].fused_calls.clear()
        assert_same(stock, run(trio["token"], inputs))  # a subclass of ours under a patch keeps its own hooks
        assert trio["token"].fused_calls == {"token_logps": 1}
        with pytest.raises(rw.InvalidCall, match="patched already"):
            patch_trl()
    assert {name: getattr(trl.GRPOTrainer, name) for name in originals} == originals
    patch.undo()
    assert_same(stock, run(patched, inputs))
    assert patched.fused_calls == {"policy_loss": 1}


# --- a real training run ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def train(make_trainer):
    """``train(cls, ours) -> (trainer, how far its parameters moved, its log)``."""

    def run(cls, ours):
        trainer = make_trainer(
            cls, ours=ours, max_steps=6, num_iterations=2, gradient_accumulation_steps=2, per_device_train_batch_size=4, optim="sgd",
            learning_rate=1.0, lr_scheduler_type="constant", entropy_coef=0.01, logging_steps=1,
        )  # fmt: skip
        start = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).clone()
        trainer.train()
        timings = ("time", "runtime", "per_second")
        log = [{k: v for k, v in entry.items() if not any(t in k for t in timings)} for entry in trainer.state.log_history]
        return trainer, torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - start, log

    return run


@pytest.fixture(scope="module")
def stock_run(train):
    return train(trl.GRPOTrainer, {})


@pytest.mark.parametrize("ours", [{}, {"fuse_loss": True}], ids=["token", "fused"])
def test_training_run(train, stock_run, ours):
    """Generation, accumulation and two passes a rollout: six steps of SGD lead to the same parameters (1e-5 of the way moved) and logs."""
    _, stock, stock_log = stock_run
    trainer, moved, log = train(ReweightGRPOTrainer, ours)
    assert stock.norm() > 0.1
    assert (moved - stock).norm() <= 1e-5 * stock.norm()
    assert len(log) == len(stock_log)
    for theirs, our in zip(stock_log, log, strict=True):
        assert our == pytest.approx(theirs, abs=1e-5, rel=1e-4)
    assert trainer.delegated_calls == {} and trainer.fused_calls["policy_loss" if ours else "token_logps"] > 0
