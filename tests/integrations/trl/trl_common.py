"""What the TRL tests share: a tiny model, a discriminating batch, one
call of the loss."""

import random

import pytest
import torch
import trl
from datasets import Dataset
from oracles import trl as oracle
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

B, P, T, V = 8, 5, 12, 300
# without logits, and with them
OURS = ("token", "fused", "token_logits", "fused_logits")
TINY = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip


def make_tokenizer():
    words = ["<pad>", "<eos>", "<unk>", *(str(i) for i in range(97)), "+", "="]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_trainer(output_dir, cls, model=None, ours=None, **config):
    """A trainer of class ``cls`` with our options ``ours``; without a model, a new tiny
    Qwen2, always the same.
    """
    if model is None:
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**TINY))
    rng = random.Random(0)
    rows = [{"prompt": f"{rng.randrange(97)} + {rng.randrange(97)} ="} for _ in range(64)]
    fields = {
        "output_dir": output_dir, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": T, "temperature": 0.9,
        "max_steps": 1, "seed": 1, "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True,
    }  # fmt: skip
    arguments = {
        "reward_funcs": lambda completions, **_: [random.Random(c).random() for c in completions],
        "args": trl.GRPOConfig(**(fields | config)),
        "train_dataset": Dataset.from_list(rows),
        "processing_class": make_tokenizer(),
    }
    trainer = cls(model=model, **(arguments | (ours or {})))
    trainer.current_gradient_accumulation_steps = 1  # set by the training loop only
    trainer.model.train()
    return trainer


def make_inputs(trainer, dims=1, seed=0):
    """A discriminating batch: ragged masks, an empty sequence, tool tokens, off-policy
    log-probs on both sides of the clip bounds.
    """
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([T, 3, 7, 0, 9, 1, T, 5])
    inputs = {
        "prompt_ids": torch.randint(3, V, (B, P), generator=g),
        "prompt_mask": (torch.arange(P) >= torch.randint(0, P, (B, 1), generator=g)).long(),
        "completion_ids": torch.randint(3, V, (B, T), generator=g),
        "completion_mask": (torch.arange(T) < lengths[:, None]).long(),
        "tool_mask": (torch.rand(B, T, generator=g) > 0.2).long(),
        "advantages": torch.randn((B, T) if dims == 2 else (B,), generator=g),
        "num_items_in_batch": torch.tensor(123),
    }
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
    return (
        loss.item(),
        torch.cat(grads) if grads else None,
        {name: values[-1] for name, values in trainer._metrics[mode].items()},
    )


def assert_same(stock, ours):
    """1e-6 in loss, gradient (relative) and metrics: fp32 rounding, well under any term
    of the loss.
    """
    assert ours[0] == pytest.approx(stock[0], abs=1e-6, rel=1e-6)
    if stock[1] is not None:
        assert stock[1].norm() > 1e-3
        assert (ours[1] - stock[1]).norm() <= 1e-6 * stock[1].norm()
    assert ours[2] == pytest.approx(stock[2], abs=1e-6, rel=1e-6)


def configure(trainers, *, sequence=False, **settings):
    """Set trainer attributes, and GRPOConfig fields as ``args_...``, on all of them."""
    for trainer in trainers.values():
        trainer.importance_sampling_level = "sequence" if sequence else "token"
        for name, value in settings.items():
            setattr(
                trainer.args if name.startswith("args_") else trainer,
                name.removeprefix("args_"),
                value,
            )


def clip_settings(loss_type, sequence):
    """Bounds between which the batch has ratios on both sides; means of a sequence's
    log-ratios move less.
    """
    low, high = (0.05, 0.06) if sequence else (0.2, 0.28)
    settings = {
        "loss_type": loss_type,
        "sequence": sequence,
        "epsilon_low": low,
        "epsilon_high": high,
        "beta": 0.04,
    }
    if loss_type == "cispo":
        settings["epsilon_high"] = 1.06
    elif loss_type != "sapo":
        settings["args_delta"] = 1.1 if sequence else 1.5
    return settings
