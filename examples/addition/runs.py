"""The demo's runs: a trainer for each, its log, and the comparison of one rollout with
TRL's own loss.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import reweight_ops as rw
from reweight_ops.integrations.trl import ReweightGRPOTrainer

from . import task
from .mechanism import TokenGradients, token_gradients
from .memory import most_alive

# updates per rollout: the second is off-policy, so that clipping has an effect
PASSES = 2
RECORD_EVERY = 5  # rollouts


class RecordingTrainer(ReweightGRPOTrainer):
    """Trainer that records the gradient norms of some rollouts' tokens, outside of the
    measured time.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorded: list[TokenGradients] = []
        self.recording_seconds = 0.0

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self._step % (PASSES * RECORD_EVERY) == 0:
            start = time.perf_counter()
            self.recorded.append(token_gradients(model, inputs, self.temperature))
            self.recording_seconds += time.perf_counter() - start
        return super()._compute_loss(model, inputs)


class Progress(TrainerCallback):
    def __init__(self, on_step: Callable[[], None]) -> None:
        self.on_step = on_step

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.on_step()


@dataclass
class Run:
    """Log of one training run: one reward per rollout, the other values per update."""

    name: str
    seed: int
    seconds_per_update: float
    peak_bytes: int
    fused_calls: dict[str, int]
    delegated_calls: dict[str, int]
    log: list[dict[str, float]] = field(repr=False)

    def series(self, key: str) -> list[float]:
        return [entry[key] for entry in self.log if entry.get(key) is not None]

    def clip_fraction(self) -> float:
        """Mean over the off-policy updates."""
        off_policy = self.series("clip_ratio/region_mean")[1::PASSES]
        return sum(off_policy) / max(len(off_policy), 1)


@dataclass(frozen=True)
class Kind:
    """Settings of a run's trainer."""

    name: str
    trainer: type[GRPOTrainer]
    options: dict[str, Any]


STOCK = Kind("stock TRL", GRPOTrainer, {})
FUSED = Kind("fused", RecordingTrainer, {"fuse_loss": True})
REWEIGHTED = Kind(
    "fused + AR", ReweightGRPOTrainer, {"reweight": rw.weights.AdvantageReweighting(alpha=0.3)}
)
LOPTI = Kind(
    "fused, Lopti",
    ReweightGRPOTrainer,
    {"spec": [rw.methods.lopti("low"), rw.methods.lopti("high")]},
)


def make_trainer(
    kind: Kind,
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    seed: int,
    out: str,
    lm_head: str,
) -> GRPOTrainer:
    """Build a trainer on a copy of the model.

    A rollout has 32 prompts x 8 completions; the loss is TRL's default (dapo).
    ``lm_head`` selects the head of the fused trainers.
    """
    options = kind.options if kind is STOCK else {**kind.options, "lm_head": lm_head}
    config = GRPOConfig(
        output_dir=out,
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=256,
        num_generations=8,
        num_iterations=PASSES,
        max_completion_length=task.ANSWER_TOKENS,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = kind.trainer(
        model=copy.deepcopy(model),
        reward_funcs=task.exact_match,
        args=config,
        train_dataset=task.make_prompts(8192, seed=2),
        processing_class=tokenizer,
        **options,
    )
    trainer.pop_callback(PrinterCallback)
    return trainer


def train(kind: Kind, trainer: GRPOTrainer, on_step: Callable[[], None], peak_bytes: int) -> Run:
    """Train and collect the log."""
    trainer.add_callback(Progress(on_step))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start - getattr(trainer, "recording_seconds", 0.0)
    calls = (dict(getattr(trainer, name, {})) for name in ("fused_calls", "delegated_calls"))
    return Run(
        kind.name,
        trainer.args.seed,
        seconds / trainer.args.max_steps,
        peak_bytes,
        *calls,
        trainer.state.log_history,
    )


@dataclass(frozen=True)
class Agreement:
    """One update, computed by TRL and by the fused op."""

    update: int
    loss: float
    loss_difference: float
    gradient_difference: float  # relative


def compare(stock: GRPOTrainer, fused: ReweightGRPOTrainer) -> list[Agreement]:
    """Loss and gradient of the updates on one rollout, by TRL's own code and by the
    fused op.

    Both start from the same parameters.
    """
    for trainer in (stock, fused):
        # only the training loop sets it
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
    rollout = stock._prepare_inputs(next(iter(stock.get_train_dataloader())))
    optimizer = torch.optim.Adam(stock.model.parameters(), lr=3e-4)
    found = []
    for update in range(1, PASSES + 1):
        fused.model.load_state_dict(stock.model.state_dict())
        (loss, gradient), (other, other_gradient) = (
            _loss_and_gradient(trainer, rollout) for trainer in (stock, fused)
        )
        relative = ((other_gradient - gradient).norm() / gradient.norm()).item()
        found.append(Agreement(update, loss, abs(other - loss), relative))
        optimizer.step()
    for trainer in (stock, fused):
        trainer._metrics["train"].clear()
    return found


def _loss_and_gradient(trainer: GRPOTrainer, rollout: dict[str, Any]) -> tuple[float, Tensor]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(rollout))
    loss.backward()
    return loss.item(), torch.cat(
        [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    )


def peak_memory(trainer: GRPOTrainer) -> int:
    """Peak of the bytes alive during one forward, loss and backward on a rollout, above
    the start.
    """
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    rollout = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    peak = most_alive(lambda: trainer._compute_loss(trainer.model, dict(rollout)).backward())
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    return peak
