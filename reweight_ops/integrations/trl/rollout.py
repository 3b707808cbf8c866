"""A recipe in ``GRPOTrainer``: rewards and advantages of a whole rollout, and the spec
of each mini-batch of it.

The lines before the updates see the completions of all processes, as TRL's own
advantages do, and each process keeps its rows. Their results travel with the
completions (TRL shuffles and splits them together), so a spec that reads stored
entropies gets those of its mini-batch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core.catalogue.lines import reads, run
from ..._core.catalogue.lookup import recipe as lookup
from ..._core.catalogue.recipes import Recipe
from ...errors import InvalidCall, UnsupportedRequest
from .spec import check_updates

#: The quantities that a trainer has itself.
_HAS = (
    "rewards",
    "rewards_per_func",
    "group_size",
    "lengths",
    "completion_ids",
    "completion_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "entropies",
    "mean_entropies",
    "step",
    "total_steps",
)
#: The quantities that a reward function of that name can return: one number per
#: completion.
_COLUMNS = ("correct", "reference_rewards", "greedy_rewards", "labels", "returns", "start_values")


def choose_recipe(recipe: Recipe | str | None, **lines: str | None) -> Recipe | None:
    """The recipe, by itself or by name, with the lines that are given in place of its
    own: each a line, or the name of the recipe whose line it is.

    Raises:
        InvalidCall: there is no such recipe, or it has no such line.
        UnsupportedRequest: the recipe is not of this trainer.
    """
    named = {
        text
        for text in lines.values()
        if text is not None and text.replace("-", "_").isidentifier()
    }
    own = {
        stage: getattr(lookup(text), stage) if text in named else text
        for stage, text in lines.items()
        if text is not None
    }
    for stage, text in own.items():
        if not text:
            raise InvalidCall(
                f"recipe {lines[stage]!r} has no {stage}: give a line, or a recipe that has."
            )
    if recipe is None and not own:
        return None
    base = (
        Recipe(name="your own")
        if recipe is None
        else lookup(recipe)
        if isinstance(recipe, str)
        else recipe
    )
    chosen = dataclasses.replace(base, **own)  # type: ignore[arg-type]
    if chosen.loss:
        raise UnsupportedRequest(
            f"recipe {chosen.name!r} is not of GRPOTrainer: its loss is {chosen.loss}. Its "
            "to_own_loop() runs."
        )
    if chosen.setup:
        state = ", ".join(chosen.setup)
        raise UnsupportedRequest(
            f"recipe {chosen.name!r} keeps a state from step to step ({state}), which "
            "GRPOTrainer has no place for."
        )
    return chosen


def settled(config: Any, recipe: Recipe | None) -> Any:
    """Return GRPOConfig with the recipe's ``num_iterations`` and ``beta`` where these
    were left alone. The given one is not changed.
    """
    if config is None or recipe is None or not recipe.spec:
        return config
    config = copy.copy(config)
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    updates = recipe.stand_ins()
    coefficients = [p.coef for p in updates[0].penalties if "ref_logp" in updates[0].requires]
    for name, value in (
        ("num_iterations", len(updates)),
        ("beta", coefficients[0] if coefficients else 0.0),
    ):
        if getattr(config, name) == defaults[name]:
            setattr(config, name, value)
    return config


class Rollout:
    """A recipe in one trainer.

    Raises:
        InvalidCall: the recipe reads what this trainer does not have, or GRPOConfig
            sets what would have no effect.
    """

    def __init__(self, trainer: Any, recipe: Recipe) -> None:
        self.recipe = recipe
        self._rewards: Tensor | None = None
        self._schedules: dict[str, Any] = {}
        columns = [name for name in recipe.reads if name not in _HAS]
        for name in columns:
            if name not in _COLUMNS:
                raise UnsupportedRequest(
                    f"recipe {recipe.name!r} reads {name}, which GRPOTrainer does not have. Its "
                    "to_own_loop() runs."
                )
            if name not in trainer.reward_func_names:
                raise InvalidCall(
                    f"recipe {recipe.name!r} reads {name}: give a reward function of that name, "
                    "of weight 0 in reward_weights if it is not a reward."
                )
        self._columns = columns
        if recipe.advantages:
            defaults = {f.name: f.default for f in dataclasses.fields(trainer.args)}
            ignored = [
                n
                for n in ("scale_rewards", "multi_objective_aggregation")
                if getattr(trainer.args, n) != defaults[n]
            ]
            if ignored:
                raise InvalidCall(
                    f"GRPOConfig's {', '.join(ignored)} would have no effect: the advantages "
                    f"are {recipe.advantages}."
                )
        if recipe.spec:
            check_updates(recipe.stand_ins(), trainer.args)
        before = {name for line in recipe.stages.values() for name in reads(line)}
        self._reads = before | {
            name
            for line in (recipe.spec, *recipe.keywords.values())
            if line
            for name in reads(line)
        }
        # A spec that reads old log-probs does without on-policy, where TRL does not
        # compute them; a line needs their numbers.
        self._measured = bool(
            before & {"old_per_token_logps"} or self._reads & {"entropies", "mean_entropies"}
        )

    # --- a whole rollout --------------------------------------------------------------
    def keep_rewards(self, rewards_per_func: Tensor) -> Tensor:
        """Keep the rewards of all processes that TRL's ``_calculate_rewards`` has
        returned.
        """
        self._rewards = rewards_per_func
        return rewards_per_func

    def complete(self, trainer: Any, output: dict[str, Any]) -> dict[str, Any]:
        """Return TRL's rollout with the results of the recipe."""
        mode = "train" if trainer.model.training else "eval"
        mask = _mask(output)
        stored = self._stored(trainer, output, mask)
        own = {name: output[name] for name in _HAS if isinstance(output.get(name), Tensor)} | stored
        own |= {"completion_mask": mask, "lengths": mask.sum(-1)}
        everywhere = {name: _gathered(trainer, x) for name, x in own.items() if name in self._reads}
        values: dict[str, Any] = {**everywhere, **self._rewarded(trainer), **_progress(trainer)}
        values["group_size"] = (
            trainer.num_generations if mode == "train" else trainer.num_generations_eval
        )
        with torch.no_grad():
            made = self.recipe.prepare(**values)
        self._schedules[mode] = made.pop("schedule", None)
        made.pop("rewards", None)
        rows, width = len(mask), mask.size(1)
        start = trainer.accelerator.process_index * rows
        for name, x in made.items():
            if not torch.is_tensor(x) or len(x) != rows * trainer.accelerator.num_processes:
                raise InvalidCall(
                    f"recipe {self.recipe.name!r}: its {name} are not a tensor with one number "
                    "per completion."
                )
            if name == "advantages":
                # A completion without a score has no effect, as in TRL.
                unscored = values["rewards"].isnan()
                x = torch.where(unscored if x.dim() == 1 else unscored[:, None], 0, x)
                _log_advantages(trainer, x)
            x = x[start : start + rows]
            output[name] = (x if x.dim() == 1 else x[:, :width]).float()
        return output | {name: x for name, x in stored.items() if name != "mean_entropies"}

    def _stored(self, trainer: Any, output: dict[str, Any], mask: Tensor) -> dict[str, Tensor]:
        """Return log-probs and entropies of the policy that sampled. This takes one
        more forward if a line reads them.
        """
        if not self._measured:
            return {}
        if output.get("pixel_values") is not None:
            raise UnsupportedRequest(
                f"recipe {self.recipe.name!r} reads the rollout's statistics, which are not "
                "computed with images."
            )
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        args = trainer.args
        batch = (
            args.per_device_train_batch_size
            if trainer.model.training
            else args.per_device_eval_batch_size
        )
        with torch.no_grad():
            logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model,
                ids,
                attention,
                output["completion_ids"].size(1),
                batch_size=batch,
                compute_entropy=True,
            )
        mean = (entropies * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        return {
            "old_per_token_logps": output.get("old_per_token_logps", logps),
            "entropies": entropies,
            "mean_entropies": mean,
        }

    def _rewarded(self, trainer: Any) -> dict[str, Tensor]:
        """Return the rewards of all processes by their names in lines. A function of
        weight 0 is not a reward.
        """
        assert self._rewards is not None
        by_function, weights = self._rewards, trainer.reward_weights.to(self._rewards.device)
        total = (by_function * weights).nansum(1)
        total[by_function.isnan().all(1)] = torch.nan
        columns = {
            name: by_function[:, trainer.reward_func_names.index(name)] for name in self._columns
        }
        return {"rewards": total, "rewards_per_func": by_function[:, weights != 0], **columns}

    # --- a mini-batch of it -----------------------------------------------------------
    def values(self, trainer: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values that lines read of a mini-batch."""
        mode = "train" if trainer.model.training else "eval"
        mask = _mask(inputs)
        return {
            **{name: x for name, x in inputs.items() if isinstance(x, Tensor)},
            **_progress(trainer),
            "completion_mask": mask,
            "lengths": mask.sum(-1),
            "schedule": self._schedules.get(mode),
        }

    def specs(self, trainer: Any, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the specs of the updates from a mini-batch's values."""
        return self.recipe.specs(**self.values(trainer, inputs))

    def keywords(self, trainer: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the further keywords of the loss."""
        lines = self.recipe.keywords or (
            {"token_weights": "sample_weights"} if self.recipe.sample_weights else {}
        )
        values = self.values(trainer, inputs)
        return {name: run(line, values) for name, line in lines.items()}


def _mask(inputs: Mapping[str, Any]) -> Tensor:
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _progress(trainer: Any) -> dict[str, int]:
    return {"step": trainer.state.global_step, "total_steps": trainer.state.max_steps}


def _gathered(trainer: Any, x: Tensor) -> Tensor:
    """Return the completions of all processes, padded to the longest."""
    if trainer.accelerator.num_processes == 1:
        return x
    x = trainer.accelerator.pad_across_processes(x, dim=1) if x.dim() > 1 else x
    return trainer.accelerator.gather(x)  # type: ignore[no-any-return]


def _log_advantages(trainer: Any, advantages: Tensor) -> None:
    """In place of TRL's own, which are the last that its log has; a completion with one
    a token has their sum.
    """
    log = trainer._logs["advantages"]
    for _ in range(min(len(advantages), len(log))):
        log.pop()
    log.extend((advantages if advantages.dim() == 1 else advantages.sum(-1)).tolist())
