"""TRL's SFT and DPO trainers on this package's op, with the numbers of stock TRL.

    python examples/trl_heads.py [--steps 4]

A tiny model learns sums of two numbers. Each trainer runs twice from the same weights,
once with stock TRL and once under ``patch_trl(heads=True)``. It prints the calls of
each.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from reweight_ops.integrations.trl import patch_trl

SUMS = [(f"{a} + {b} =", f"{a + b}", f"{a} {b}") for a in range(3, 9) for b in range(3, 9)]
ROWS = {
    "SFT": [{"prompt": p, "completion": good} for p, good, _ in SUMS],
    "DPO": [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in SUMS],
}
CLASSES = {"SFT": (trl.SFTTrainer, trl.SFTConfig), "DPO": (trl.DPOTrainer, trl.DPOConfig)}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *map(str, range(20)), "+", "="]
    words_to_ids = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    words_to_ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_to_ids, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def losses(name: str, steps: int) -> list[float]:
    """The logged losses of a short training."""
    trainer_class, config = CLASSES[name]
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=1,
            seed=1,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        more: dict[str, Any] = {"ref_model": model()} if name == "DPO" else {}
        trainer = trainer_class(
            model=model(),
            args=args,
            train_dataset=Dataset.from_list(ROWS[name]),
            processing_class=tokenizer(),
            **more,
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(
    arguments: list[str] | None = None,
) -> dict[str, tuple[list[float], list[float], dict[str, int]]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    steps = parser.parse_args(arguments).steps
    results = {}
    for name in CLASSES:
        stock = losses(name, steps)
        with patch_trl(heads=True) as patch:
            ours = losses(name, steps)
        print(f"{name}: stock TRL {stock}")
        print(
            f"{name}: on our op {ours}, {dict(patch.fused_calls)}, left to TRL: "
            f"{dict(patch.delegated_calls)}"
        )
        results[name] = (stock, ours, dict(patch.delegated_calls))
    return results


if __name__ == "__main__":
    main()
