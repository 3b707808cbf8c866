"""Two-digit addition for a tiny language model: tokenizer, model, prompts, reward, and
a warm start on noisy answers.

Numbers are written least significant digit first (``21+43=640`` is 12 + 34 = 046), so
each digit depends on few others. The warm start trains on answers in which 30 % of the
digits are random. The model can then add, but it is unsure: RL can improve it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TOKENS = ["<pad>", "<eos>", "<unk>", *"0123456789", "+", "="]  # 15 real tokens
VOCAB_SIZE = 64  # columns of the model's head
NOISE = 0.3
ANSWER_TOKENS = 4  # three digits and <eos>


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with one token per character."""
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # no spaces between characters
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2ForCausalLM:
    """A Qwen2 of half a million parameters."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def written(number: int, digits: int) -> str:
    return f"{number:0{digits}d}"[::-1]


def prompt(a: int, b: int) -> str:
    return f"{written(a, 2)}+{written(b, 2)}="


def make_prompts(count: int, seed: int) -> Dataset:
    """Random problems with their answers."""
    rng = random.Random(seed)
    pairs = [(rng.randrange(100), rng.randrange(100)) for _ in range(count)]
    return Dataset.from_list(
        [{"prompt": prompt(a, b), "answer": written(a + b, 3)} for a, b in pairs]
    )


def exact_match(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Reward: 1 for the right answer, otherwise 0."""
    return [
        float(completion == right) for completion, right in zip(completions, answer, strict=True)
    ]


def noisy_batches(
    tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int
) -> Iterator[torch.Tensor]:
    """Token ids ``[batch_size, 10]`` of problems whose answers' digits are random with
    probability :data:`NOISE`.
    """
    rng = random.Random(seed)
    while True:
        rows = []
        for _ in range(batch_size):
            a, b = rng.randrange(100), rng.randrange(100)
            answer = "".join(
                str(rng.randrange(10)) if rng.random() < NOISE else digit
                for digit in written(a + b, 3)
            )
            rows.append([*tokenizer.encode(prompt(a, b) + answer), tokenizer.eos_token_id])
        yield torch.tensor(rows)


def warm_start(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    on_step: Callable[[], None],
) -> None:
    """Next-token training on noisy answers, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1
    )
    model.train()
    for _, ids in zip(range(steps), noisy_batches(tokenizer, 64, seed=1), strict=False):
        labels = ids.clone()
        labels[:, :-ANSWER_TOKENS] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step()
