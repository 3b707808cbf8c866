"""An example of every entry of the catalogue, for its docstring. It is a golden row or
the entry's own arguments, and what the call returns.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor

import reweight_ops as rw

from .._core.catalogue.registry import CATALOGUE, Entry
from .._core.catalogue.surface import parts
from .._core.formula.base import TokenWeight
from .._core.losses.explain import PREPARED
from .._core.spec.pairs import PairSpec
from .._core.spec.policy import PolicyLossSpec
from ..errors import InvalidCall
from ..testing.golden_row import Built, Golden
from ..testing.golden_rows import GOLDEN

_HEAD = '''"""Examples of all entries, by kind and name. ``reweight_ops.codegen`` writes them."""

EXAMPLES: dict[str, tuple[str, str]] = {
'''


#: The lines that make an example of a part, where a call without arguments is not
#: enough. The last line is shown.
_LOSS = "out = rw.policy_loss(torch.zeros(1, 2, 4), torch.tensor([[1, 2]]), 1.0, spec='grpo')"
PART_CALLS: dict[str, list[str]] = {
    "DistillationLossOutput": [
        "out = rw.distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2))",
        "out.teacher_entropies",
    ],
    "Explanation": [
        "ids = torch.tensor([0])",
        "rw.explain(rw.token_logps, torch.zeros(1, 2), ids, backend='reference').backend",
    ],
    "FromFunction": [
        "mean = rw.FromFunction(lambda loss, mask: (loss * mask).sum() / mask.sum())",
        "spec = rw.methods.grpo().replace(reduction=mean)",
        "ids = torch.tensor([[1, 2]])",
        "rw.policy_loss(torch.zeros(1, 2, 4), ids, 1.0, spec=spec).loss",
    ],
    "HiddenLogits": ["rw.HiddenLogits(torch.zeros(1, 3), torch.ones(4, 3)).logit_scale"],
    "Lora": ["rw.Lora(torch.zeros(1, 3), torch.zeros(4, 1)).scale"],
    "Metrics": [_LOSS, "sorted(out.metrics)[:2]"],
    "PairSpec": [
        "term = rw.preference.PairTerm(loss=rw.preference.Sigmoid())",
        "rw.PairSpec(terms=(term,)).beta",
    ],
    "Penalty": [
        "penalty = rw.Penalty(rule=rw.rules.penalties.K3(), coef=0.04)",
        "rw.methods.dapo().replace(penalties=(penalty,)).penalties[0].coef",
    ],
    "PolicyLossOutput": [_LOSS, "out.per_token_logps"],
    "PolicyLossSpec": [
        "spec = rw.PolicyLossSpec(surrogate=rw.methods.dapo().surrogate, name='mine')",
        "spec.ratio",
    ],
    "PreferenceLossOutput": [
        "logps, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([-1.5, -1.5])",
        "rw.preference_loss_from_logps(logps, spec='dpo', ref_sequence_logps=ref).chosen_rewards",
    ],
    "Teacher": ["rw.Teacher(torch.zeros(1, 2, 4), coef=0.1).kind"],
    "TokenStats": [
        "logits, ids = torch.zeros(1, 4), torch.tensor([2])",
        "rw.token_stats(logits, ids, stats=('entropies',)).entropies",
    ],
    "TopKLogps": ["rw.TopKLogps(torch.tensor([[0, 1]]), torch.tensor([[-0.5, -1.5]])).tail"],
    "method": ["rw.method('dapo', epsilon_high=0.3).surrogate.epsilon_high"],
    "advantages.Gae": ["rw.advantages.Gae(torch.ones(1, 2), torch.zeros(1, 2)).returns"],
    "advantages.SpoSegments": [
        "logps = torch.tensor([[-0.1, -2.0, -0.1]])",
        "rw.advantages.spo_segments(logps, torch.ones(1, 3)).segment_ids",
    ],
    "advantages.spo_segments": [
        "logps = torch.tensor([[-0.1, -2.0, -0.1]])",
        "rw.advantages.spo_segments(logps, torch.ones(1, 3)).cuts",
    ],
    "advantages.discounted_returns": [
        "rewards, mask = torch.tensor([[0.0, 1.0]]), torch.ones(1, 2)",
        "rw.advantages.discounted_returns(rewards, mask, gamma=0.5)",
    ],
    "advantages.whiten": ["rw.advantages.whiten(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2))"],
    "methods.trl": ["rw.methods.trl('dapo', epsilon_high=0.28).surrogate.epsilon_high"],
    "methods.verl": ["rw.methods.verl('vanilla', loss_agg_mode='token-mean').reduction"],
    "objectives.LagrangeState": [
        "rw.objectives.LagrangeState(torch.ones(2), torch.zeros(2)).momentum"
    ],
    "objectives.RecapState": ["rw.objectives.RecapState(torch.ones(4, 2), torch.tensor(0)).seen"],
    "objectives.gradient_influences": [
        "rw.objectives.gradient_influences(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))"
    ],
    "preference.AlphaLikelihood": ["rw.preference.AlphaLikelihood(alpha=0.25)"],
    "preference.MarginAdaptive": [
        "rw.preference.MarginAdaptive(c_min=0.5, c_max=2.0, lambda_=1.0, tau=1.0)"
    ],
    "preference.MaskNorm": ["rw.preference.MaskNorm(mask='reward_mask')"],
    "preference.PairTerm": ["rw.preference.PairTerm(loss=rw.preference.Hinge())"],
    "preference.Side": [
        "logps, length = torch.tensor([-2.0]), torch.tensor([2])",
        "side = rw.preference.Side(logps=logps, sums=logps, lengths=length, scores=logps)",
        "side.mean_logps",
    ],
    "preference.SquaredNash": ["rw.preference.SquaredNash(eta=1.0, tau=0.5)"],
    "rewards.weighted_sum": [
        "rewards = torch.tensor([[1.0, 2.0]])",
        "rw.rewards.weighted_sum(rewards, torch.tensor([0.5, 1.0]))",
    ],
    "schedules.AdaptiveEntropyState": [
        "rw.schedules.AdaptiveEntropyState(torch.tensor(0.01)).coef"
    ],
    "schedules.BetaDpoState": ["rw.schedules.BetaDpoState(torch.tensor(0.0)).gap_mean"],
    "schedules.D3sBudget": ["rw.schedules.D3sBudget(num_samples=4, token_fraction=0.2)"],
    "schedules.ReliftState": ["rw.schedules.ReliftState(buffered=3)"],
    "schedules.all_failed": [
        "rw.schedules.all_failed(torch.tensor([0.0, 0.0, 1.0, 0.0]), group_size=2)"
    ],
    "schedules.lopti_updates": [
        "updates = rw.schedules.lopti_updates(['a', 'b'])",
        "[(spec.name, batch) for spec, batch in updates]",
    ],
    "weights.PositionBound": ["rw.weights.PositionBound(base=0.9).name"],
    "weights.Precomputed": ["rw.weights.Precomputed(values=torch.ones(1, 2)).name"],
    "weights.StareState": [
        "state = rw.weights.StareState(*torch.tensor([1.1, 0.9, 1.0]))",
        "state.gate",
    ],
    "weights.stare_state": ["rw.weights.stare_state().amplify"],
    "weights.stare_update": [
        "state = rw.weights.stare_state()",
        "state, weight = rw.weights.stare_update(state, torch.tensor(0.5))",
        "state.gate",
    ],
}
_PUBLIC = (
    rw,
    rw.advantages,
    rw.divergences,
    rw.methods,
    rw.objectives,
    rw.preference,
    rw.rewards,
    rw.sample_weights,
    rw.schedules,
    rw.weights,
)


def _part_examples() -> list[str]:
    lines = []
    for module in _PUBLIC:
        for name, value in parts(module, PREPARED):
            found = (
                None
                if ">>> " in (value.__doc__ or "").partition("\nExample:\n")[0]
                else _part(name, value)
            )
            if found is not None:
                lines.append(f"    {f'part/{name}'!r}: {('', found)!r},\n")
    return lines


def _part(name: str, value: Any) -> str | None:
    """The lines of a doctest, or None for a part that nobody makes by hand."""
    calls = PART_CALLS.get(name)
    if calls is None:
        gate = "threshold=0.1" if "threshold" in inspect.signature(value).parameters else ""
        shown = ".name" if inspect.isclass(value) and issubclass(value, TokenWeight) else ""
        calls = [f"rw.{name}({gate}){shown}"]
    calls = [call.replace("'", '"') for call in calls]
    uses_torch = any("torch." in call for call in calls)
    calls = [f"import {'torch, ' if uses_torch else ''}reweight_ops as rw", *calls]
    scope: dict[str, Any] = {"torch": torch}
    try:
        for call in calls[:-1]:
            exec(call, scope)
        result = repr(eval(calls[-1], scope))
    except (TypeError, InvalidCall):  # nobody makes one by hand: a base, a formula's argument
        return None
    if " at 0x" in result:
        return None
    result = re.sub(r"grad_fn=<.*?>", "grad_fn=<...>", result)
    return "\n".join([*(f">>> {call}" for call in calls), result])


def examples_module() -> str:
    """The text of ``_core/catalogue/examples.py``."""
    lines = _part_examples()
    for kind, entries in CATALOGUE.items():
        for name, entry in entries.items():
            if not entry.function.__module__.startswith("reweight_ops."):
                continue
            found = next(
                (x for row in _rows(entry) if (x := _example(entry, row)) is not None), None
            )
            if found is not None:
                lines.append(f"    {f'{kind}/{name}'!r}: {found!r},\n")
    return f"{_HEAD}{''.join(lines)}}}\n"


def _rows(entry: Entry) -> list[Golden]:
    rows = [row for row in GOLDEN if (row.kind, row.name) == (entry.kind, entry.name)]
    return [*rows, Golden(entry.kind, entry.name, entry.example, None)]


def _text(value: Any) -> str:
    """An argument as a user writes it. It raises KeyError if nobody would write it."""
    if isinstance(value, Tensor):
        value = value.tolist()
        return f"torch.tensor({_rounded(value)})"
    if isinstance(value, list):
        return f"torch.tensor({_rounded(value)})".replace("nan", "math.nan").replace(
            "inf", "math.inf"
        )
    if isinstance(value, Built):
        namespace = value.function.__module__.split(".")[1]
        arguments = ", ".join(f"{name}={_text(x)}" for name, x in value.arguments.items())
        return f"rw.{namespace}.{value.function.__name__}({arguments})"
    if isinstance(value, (bool, int, str, float, tuple)) or value is None:
        return repr(round(value, 4) if isinstance(value, float) else value)
    raise KeyError


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return round(value, 4) if isinstance(value, float) else value


def _example(entry: Entry, row: Golden) -> tuple[str, str] | None:
    """The shape of the result, and the lines of a doctest. It is None if the row makes
    none.
    """
    scope: dict[str, Any] = {"torch": torch}
    try:
        call = (
            f"{entry.call}({', '.join(f'{name}={_text(x)}' for name, x in row.arguments.items())})"
        )
        given = [_text(x) for x in (*row.init, *row.updates[:1])]
    except KeyError:
        return None
    needs_math = "math." in call or any("math." in x for x in given)
    lines = [
        f"import {'math, ' if needs_math else ''}torch, reweight_ops as rw"
        if "torch." in "".join([call, *given])
        else "import reweight_ops as rw"
    ]
    if row.updates:
        lines += [
            f"step = {call}",
            f"state, result = step.update(step.init({', '.join(given[:-1])}), {given[-1]})",
        ]
        shown = "result"
    else:
        shown = call
    try:
        for line in lines:
            exec(line, scope)
        result = eval(shown, scope)
        if isinstance(result, (PolicyLossSpec, PairSpec, TokenWeight)):
            shown, shape = f"{shown}.name", ""
        elif isinstance(result, tuple) and all(isinstance(x, PolicyLossSpec) for x in result):
            shown, shape = f"[spec.name for spec in {shown}]", ""
        else:
            shape = _shape(result, row, scope)
        shown_result = repr(eval(shown, scope))
    except (TypeError, ValueError, NameError, AttributeError):
        return None
    # Such prints differ between versions.
    if re.search(r"object at|e-0[7-9]|e-[1-9]\d|\binf\b", shown_result):
        return None
    lines.append(shown)
    return shape, "\n".join([*(f">>> {line}" for line in lines), shown_result])


def _shape(result: Any, row: Golden, scope: dict[str, Any]) -> str:
    if isinstance(result, tuple):
        names = getattr(result, "_fields", None) or [f"result {i}" for i in range(len(result))]
        parts = [
            f"``{name}``: {said}"
            for name, x in zip(names, result, strict=True)
            if (said := _shape(x, row, scope))
        ]
        return "; ".join(parts)
    if isinstance(result, (int, float)):
        return "a number"
    if not isinstance(result, Tensor):
        return ""
    if result.dim() == 0:
        return "0-d"
    for name, value in (
        *row.arguments.items(),
        *(("argument of update", x) for x in row.updates[:1]),
    ):
        if isinstance(value, list) and torch.tensor(value).shape == result.shape:
            return f"that of ``{name}``" if name.isidentifier() else f"that of the {name}"
    shapes = [
        f"{name} {list(torch.tensor(x).shape)}"
        for name, x in row.arguments.items()
        if isinstance(x, list)
    ]
    return f"``{list(result.shape)}`` of {', '.join(f'``{x}``' for x in shapes)} in the example"
