"""GRPO with a paper's recipe in TRL's trainer: its rewards, advantages, spec and
schedule, by name.

    python examples/trl_recipe.py [--recipe grpo_lead] [--steps 4]

A tiny model answers sums of two numbers. ``correct`` is both the reward and the input
of that name that recipes read.
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

import reweight_ops as rw
from reweight_ops.integrations.trl import ReweightGRPOTrainer

ANSWERS = {f"{a} + {b} =": str(a + b) for a in range(3, 9) for b in range(3, 9)}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *map(str, range(20)), "+", "="]
    words_to_ids = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    words_to_ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_to_ids, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def correct(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [
        float(ANSWERS[prompt] in completion.split())
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train for some steps; return the calls by op."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="grpo_lead", help="a name of docs/recipes.md")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args(argv)
    recipe = rw.recipe(options.recipe)
    print(f"{recipe.paper}\n\n{recipe.to_own_loop()}\n")
    torch.manual_seed(0)
    words = tokenizer()
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(words), pad_token_id=0, eos_token_id=1, bos_token_id=None, **shape
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        # a recipe with a KL penalty loads the reference from there
        model.save_pretrained(folder)
        config = trl.GRPOConfig(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=6,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            seed=1,
        )
        trainer = ReweightGRPOTrainer(
            model=folder,
            reward_funcs=[correct],
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in ANSWERS]),
            processing_class=words,
            recipe=recipe,
        )
        trainer.train()
    print(
        f"on our ops: {dict(trainer.fused_calls)}; left to TRL: "
        f"{dict(trainer.delegated_calls) or 'nothing'}"
    )
    return {"fused": dict(trainer.fused_calls), "left": dict(trainer.delegated_calls)}


if __name__ == "__main__":
    main()
