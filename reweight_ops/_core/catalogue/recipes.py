"""Recipes. A recipe is one record of everything that a paper trains with, from rewards
to the loss.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ...errors import InvalidCall
from .lines import functions, reads, renamed, run, wrapped
from .papers import Paper, paper_of
from .registry import CATALOGUE, Entry

#: The attributes of a batch of rollouts that the lines of a recipe may read. There are
#: B completions of T tokens. The completions of a prompt are consecutive.
QUANTITIES = {
    "rewards": "`[B]`, one per completion",
    "rewards_per_func": "`[B, K]`, one column for each of K rewards",
    "group_size": "a number: the consecutive completions that answer one prompt",
    "lengths": "`[B]`, valid tokens of each completion",
    "correct": "`[B]`, 1 where the answer is right, else 0",
    "chosen_options": "`[B, K]`, nonzero where a completion chose that option of a question "
    "with K options",
    "right_options": "`[B, K]`, nonzero where that option is right",
    "completion_ids": "`[B, T]`, the sampled tokens",
    "completion_mask": "`[B, T]`, 1 where a token is valid, else 0",
    "old_per_token_logps": "`[B, T]`, log-probs under the policy that sampled, kept while the "
    "batch is trained on",
    "ref_per_token_logps": "`[B, T]`, log-probs under the reference policy",
    "sampling_per_token_logps": "`[B, T]`, log-probs that the sampler reported",
    "log_sum_p_sq": "`[B, T]`, from `rw.token_stats`, under the policy of `old_per_token_logps`",
    "entropies": "`[B, T]`, entropies under the policy that sampled",
    "mean_entropies": "`[B]`, their mean over a completion's valid tokens",
    "reference_rewards": "rewards of the reference policy's completions",
    "greedy_rewards": "`[B]`, the reward of the prompt's greedy completion",
    "values": "`[B, T]`, the critic's values; for SPO, the values at the cuts, `[B, S]`, or of "
    "the tree's nodes, `[B]`",
    "segments": "`rw.advantages.spo_segments(old_per_token_logps, completion_mask)`",
    "parents": "`[B]`, the row of each node's parent, -1 for a root",
    "episode_rewards": "`[E]`, one per episode",
    "step_returns": "`[B]`, the discounted return of each step",
    "episode_ids": "`[B]`, the episode of a step",
    "anchor_ids": "`[B]`, the state from which a step was taken, in `[0, num_anchors)`",
    "num_anchors": "a number",
    "labels": "`[B]`, negative for a text to forget, positive for one to retain",
    "returns": "`[B]`, the return of each trajectory of the data set",
    "start_values": "`[B]`, the value of the first state of a trajectory",
    "teacher_logits": "`[B, T, V]`, logits of the teacher or the reference, or of the policy on "
    "the original text",
    "vocab_size": "a number",
    "class_counts": "`[V]`, how often each token is a target in the data set; 1 for a token "
    "that never is",
    "source_ids": "`[B]`, which source a sample is from",
    "source_counts": "`[K]`, how many samples each source has",
    "augmented": "another batch: augmented texts without labels",
    "lambdas": "`[B, T]`, each token's own λ, kept with its example",
    "metrics": "K numbers: the validation metrics after the step",
    "gradients": "`[K, P]`, the flattened gradients of the objectives in some layers",
    "step": "a number: the optimizer steps so far",
    "total_steps": "a number: the optimizer steps of the whole training",
}

#: The lines that run on a whole batch of rollouts before the updates, in this order.
#: Each makes the value of its name.
STAGES = ("schedule", "rewards", "advantages", "sample_weights")

#: Maps a leaf that a formula reads to the keyword of a policy loss.
_STORED = {
    "log_ratio": "old_per_token_logps",
    "old_logp": "old_per_token_logps",
    "ref_logp": "ref_per_token_logps",
    "sampling_logp": "sampling_per_token_logps",
}


class Setting(NamedTuple):
    """A hyper-parameter as published.

    ``source`` names where it was published, or says that it is an example because
    nothing was.
    """

    name: str
    value: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that one paper trains with, from rewards to the loss.

    Every line is an expression over ``rw``, the package, and a batch of rollouts.

    Example:
        >>> import reweight_ops as rw
        >>> rw.recipe("HAPO").advantages
        'rw.advantages.hapo(rewards, lengths, group_size=group_size)'
        >>> loop = rw.recipe("dr_grpo").to_own_loop()
        >>> loop.splitlines()[2]
        'spec = rw.methods.dr_grpo()'
    """

    name: str
    entry: str = ""
    spec: str = ""
    schedule: str = ""
    rewards: str = ""
    advantages: str = ""
    sample_weights: str = ""
    loss: str = ""
    keywords: Mapping[str, str] = field(default_factory=dict)
    setup: Mapping[str, str] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
    rollout: tuple[str, ...] = ()

    @property
    def stages(self) -> dict[str, str]:
        """Return the existing lines for a whole batch of rollouts, by the value that
        they make.
        """
        return {name: getattr(self, name) for name in STAGES if getattr(self, name)}

    @property
    def lines(self) -> tuple[str, ...]:
        """Return all lines in the order in which they run. Those of :attr:`after` are
        last.
        """
        first = (
            *self.setup.values(),
            *self.stages.values(),
            self.spec,
            self.loss,
            *self.keywords.values(),
            *self.after.values(),
        )
        return tuple(line for line in first if line)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Return the entries of the catalogue that it uses."""
        by_call = {
            entry.call: entry for of_kind in CATALOGUE.values() for entry in of_kind.values()
        }
        found = dict.fromkeys(name for line in self.lines for name in functions(line))
        return tuple(by_call[name] for name in found if name in by_call)

    @property
    def paper(self) -> str:
        """Return the title of its paper."""
        return self._entry.paper

    @property
    def arxiv(self) -> str:
        """Return the arXiv id of its paper, or ``unknown``."""
        return self._entry.arxiv

    @property
    def publication(self) -> Paper:
        """Return its paper: title, arXiv id, year, the authors' repository."""
        return paper_of(self._entry)

    @property
    def certainty(self) -> str:
        """Return the lowest certainty among its paper's entries; see
        ``docs/methods.md``.
        """
        of_paper = {entry.certainty for entry in self.entries if entry.paper == self.paper}
        return next(c for c in ("derived", "secondary", "verified") if c in of_paper)

    @property
    def _entry(self) -> Entry:
        found = [entry for entry in self.entries if entry.call == self.entry]
        if not found:
            raise InvalidCall(
                f"recipe {self.name!r}: no line of it calls its entry, {self.entry!r}."
            )
        return found[0]

    @property
    def reads(self) -> tuple[str, ...]:
        """Return the attributes of a batch of rollouts that it reads: names of
        :data:`QUANTITIES`.
        """
        return self._given(*self.lines, self._loss())

    def _given(self, *lines: str) -> tuple[str, ...]:
        """Return the names that these lines read and no earlier line makes."""
        targets = {
            name.strip() for target in (*self.setup, *self.after) for name in target.split(",")
        }
        made = {*self.stages, *targets, "spec", "policy", "batch"}
        # A reward transform reads the rewards that it replaces.
        made -= {"rewards"} & set(reads(self.rewards or "0"))
        return tuple(
            dict.fromkeys(name for line in lines for name in reads(line) if name not in made)
        )

    def prepare(self, **values: Any) -> dict[str, Any]:
        """Return the values that the lines before the updates make of a whole batch of
        rollouts, by the names in :attr:`stages`.

        Raises:
            InvalidCall: a value that a line reads is missing.
        """
        made: dict[str, Any] = {}
        for name, line in self.stages.items():
            made[name] = run(line, ChainMap(made, values))
        return made

    def specs(self, **values: Any) -> tuple[Any, ...]:
        """Return the specs of the updates over one batch, or over a mini-batch, with
        these values.

        Raises:
            InvalidCall: the recipe has no spec, or a value that it reads is missing.
        """
        if not self.spec:
            raise InvalidCall(f"recipe {self.name!r} has no spec: its loss is {self.loss}.")
        found = run(self.spec, values)
        return tuple(found) if isinstance(found, tuple) else (found,)

    @property
    def requires(self) -> frozenset[str]:
        """Return the leaves that the spec's formulas read.

        ``log_ratio`` is the ratio to the old policy. A ratio to the reference reads
        ``ref_logp``.
        """
        specs = self.stand_ins() if self.spec and not self.loss else ()
        return frozenset().union(
            *(
                spec.requires - ({"log_ratio"} if spec.ratio.against == "ref" else set())
                for spec in specs
            )
        )

    def stand_ins(self) -> tuple[Any, ...]:
        """Return the specs with zeros in place of a batch. They tell what the specs
        read, and how many there are.
        """
        values: dict[str, Any] = {name: torch.zeros(1, 1) for name in QUANTITIES} | {
            "step": 0,
            "total_steps": 1,
            "vocab_size": 2,
            "group_size": 1,
        }
        if self.schedule:
            values["schedule"] = run(self.schedule, values)
        return self.specs(**values)

    def loss_keywords(self) -> dict[str, str]:
        """Return the keywords of the policy loss, each with its line."""
        stored = {name: name for leaf, name in _STORED.items() if leaf in self.requires}
        weights = {"token_weights": "sample_weights"} if self.sample_weights else {}
        return {"completion_mask": "completion_mask", **stored, **(self.keywords or weights)}

    def _loss(self) -> str:
        if self.loss:
            return self.loss
        advantages = "advantages" if "adv" in self.requires else "None"
        keywords = ", ".join(f"{name}={line}" for name, line in self.loss_keywords().items())
        return (
            f"rw.policy_loss(policy(batch), completion_ids, {advantages}, spec=spec, "
            f"{keywords}).loss"
        )

    def to_own_loop(self) -> str:
        """Return a training loop in Python.

        It runs if ``policy(batch)`` returns logits ``[B, T, V]`` of the completions'
        tokens, ``optimizer`` is one of PyTorch's, and every batch of ``rollouts`` has
        the attributes in :attr:`reads`.
        """
        read = self.reads
        in_loop = {
            name: name if name in ("step", "total_steps") else f"batch.{name}" for name in read
        }
        by_name = {**in_loop, **{name: name for name in self.stages}}

        def line(text: str, own: str = "") -> str:
            # The line that makes the rewards reads the rewards of the batch.
            return renamed(
                text,
                lambda name: in_loop.get(name, name) if name == own else by_name.get(name, name),
            )

        fixed = bool(self.spec) and not reads(self.spec)
        passes = len(self.stand_ins()) if self.spec else 1
        several = "specs" if fixed else line(self.spec or "None")
        before = [f"{target} = {text}" for target, text in self.setup.items()]
        before += [f"{'specs' if passes > 1 else 'spec'} = {line(self.spec)}"] if fixed else []
        before += ["total_steps = len(rollouts)"] if "total_steps" in read else []
        before += [
            "for step, batch in enumerate(rollouts):"
            if "step" in read
            else "for batch in rollouts:"
        ]
        batch = [f"{name} = {line(text, name)}" for name, text in self.stages.items()]
        batch += (
            [f"for spec in {several}:"]
            if passes > 1
            else []
            if fixed or not self.spec
            else [f"spec = {line(self.spec)}"]
        )
        update = [
            f"loss = {line(self._loss())}",
            "loss.backward()",
            "optimizer.step()",
            "optimizer.zero_grad()",
        ]
        after = [f"{target} = {line(text)}" for target, text in self.after.items()]
        indented = (
            (before, ""),
            (batch, "    "),
            (update, "        " if passes > 1 else "    "),
            (after, "    "),
        )
        return "\n".join(
            [
                "import reweight_ops as rw",
                "",
                *(wrapped(row, indent) for rows, indent in indented for row in rows),
            ]
        )


#: The recipes by name. Importing the package fills it.
RECIPES: dict[str, Recipe] = {}


def register(*recipes: Recipe) -> None:
    """Add recipes to those that :func:`recipe` finds.

    Raises:
        InvalidCall: a name is taken, or a line reads a name that no batch has.
    """
    for each in recipes:
        unknown = [name for name in each._given(*each.lines) if name not in QUANTITIES]
        if unknown:
            raise InvalidCall(
                f"recipe {each.name!r} reads {', '.join(unknown)}, which no batch has and no "
                "line before makes."
            )
        if each.name in RECIPES:
            raise InvalidCall(f"there is a recipe {each.name!r} already.")
        RECIPES[each.name] = each


def recipes_of(entries: Iterable[Entry]) -> list[Recipe]:
    """Return the recipes of the papers of these entries."""
    papers = {entry.paper for entry in entries}
    return [each for each in RECIPES.values() if each.paper in papers]
