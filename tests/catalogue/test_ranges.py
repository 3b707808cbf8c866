"""Numbers out of range are refused: every public hyper-parameter states its range,
which is checked and documented.
"""

import inspect
import math
from typing import Annotated

import numpy
import pytest
import torch

import reweight_ops as rw
from reweight_ops._core import ranges as ranges_module
from reweight_ops._core.calls.keywords import (
    LMHeadOptions,
    PairOptions,
    PolicyOptions,
    SoftmaxOptions,
)
from reweight_ops._core.catalogue.registry import CATALOGUE
from reweight_ops._core.catalogue.signatures import collected_by
from reweight_ops._core.formula.base import RULES, WEIGHTS
from reweight_ops._core.ranges import Flag, Interval, Kind, ranged, ranges_of
from reweight_ops.preference import losses, scores, weights

NAMESPACES = (
    rw.weights,
    rw.advantages,
    rw.rewards,
    rw.objectives,
    rw.sample_weights,
    rw.schedules,
    rw.preference,
    rw.divergences,
)
#: Groups are counted by the resolver of group arguments; the others are data, a number
#: for every row.
COUNTED = {"group_size", "num_groups", "advantages", "token_weights"}
#: Of records, which state their ranges themselves (below).
SHARED = {
    name
    for record in (SoftmaxOptions, PolicyOptions, LMHeadOptions, PairOptions)
    for name in record.NAMES
}
#: ... and of :func:`token_divergence`, which checks them for the losses that are one.
SHARED |= {"other_temperature", "other_softcap"}


def surface():
    """Every public function and dataclass that may have hyper-parameters, by a name for
    messages.
    """
    found = {
        f"{kind}: {name}": entry.function
        for kind, entries in CATALOGUE.items()
        for name, entry in entries.items()
    }
    for table in (RULES, WEIGHTS):
        found |= {
            cls.__qualname__: cls
            for cls in table.values()
            if cls.__module__.startswith("reweight_ops.")
        }
    for module in (*NAMESPACES, losses, scores, weights, rw):
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            if (
                (inspect.isclass(value) or hasattr(module, "__all__"))
                and callable(value)
                and getattr(value, "__module__", "").startswith("reweight_ops.")
            ):
                found[f"{module.__name__.rpartition('.')[2]}.{name}"] = value
    found |= {"methods.trl": rw.methods.trl, "methods.verl": rw.methods.verl}
    return {name: value for name, value in found.items() if not is_result(value)}


def is_result(value):
    """Records that the package fills itself: results, states, explanations."""
    return inspect.isclass(value) and (
        issubclass(value, (tuple, Exception))
        or value.__name__.endswith(
            ("Output", "Stats", "Explanation", "Statistics", "Pairs", "Sequences", "Side")
        )
    )


def numeric(parameter):
    default, text = parameter.default, str(parameter.annotation)
    if isinstance(default, bool) or parameter.kind is parameter.VAR_KEYWORD:
        return False
    return (
        isinstance(default, (int, float))
        or "float" in text.split("[")[0]
        or text.split(" ")[0] in ("int", "float")
    )


SURFACE = surface()
PARAMETERS = [
    (owner, name)
    for owner, value in SURFACE.items()
    for name, p in inspect.signature(value).parameters.items()
    if numeric(p) and name not in COUNTED | (SHARED & collected_by(value))
]
STATED = [
    (owner, name, allowed)
    for owner, value in SURFACE.items()
    for name, allowed in vars(value).get("__ranges__", {}).items()
]
RANGED = [(owner, name) for owner, name, allowed in STATED if not isinstance(allowed, (Flag, Kind))]
FLAGS = [(owner, name) for owner, name, allowed in STATED if isinstance(allowed, Flag)]
OF_A_KIND = [(owner, name) for owner, name, allowed in STATED if isinstance(allowed, Kind)]


def test_all_that_can_be_checked_is_checked():
    """A flag or a word is checked too where there is no number beside it."""
    # Ops check their words and records; these check what they are given.
    own = (rw.PolicyLossSpec, rw.Recipe, rw.rule)
    unchecked = {
        owner: names
        for owner, value in SURFACE.items()
        if value not in own
        and (
            names := {*ranges_of(value)}
            - SHARED
            - {"plan", "kind"}
            - {*vars(value).get("__ranges__", ())}
        )
    }
    assert not unchecked, unchecked


def test_every_number_states_its_range():
    without = [f"{owner}({name})" for owner, name in PARAMETERS if not stated(owner, name)]
    assert not without, without
    assert len(RANGED) > 300


@pytest.mark.parametrize("kind", CATALOGUE)
def test_every_example_of_the_catalogue_is_in_range_and_every_number_has_one(kind):
    for name, entry in CATALOGUE[kind].items():
        ranges = vars(entry.function).get("__ranges__", {})
        for parameter, value in entry.example.items():
            assert parameter in ranges and ranges[parameter].interval.has(value), (name, parameter)


def stated(owner, name):
    """Whether it says more than ``float``."""
    allowed = vars(SURFACE[owner]).get("__ranges__", {}).get(name)
    return allowed is not None and allowed.interval is not ranges_module.PLAIN


def refused(owner, name, value):
    with pytest.raises(rw.InvalidCall, match=rf"{name} is "):
        SURFACE[owner](**{name: value})


@pytest.mark.parametrize(("owner", "name"), FLAGS)
def test_what_is_neither_true_nor_false_is_refused(owner, name):
    for value in (1, 0, 1.0, "no", math.nan, numpy.True_):
        refused(owner, name, value)


@pytest.mark.parametrize(("owner", "name"), OF_A_KIND)
def test_what_is_no_string_or_no_tensor_is_refused(owner, name):
    for value in (1, math.nan, True, ["a"], numpy.ones(2), torch.tensor(1j)):
        refused(owner, name, value)
    assert SURFACE[owner].__ranges__[name].has("a") == (
        "a string" in str(SURFACE[owner].__ranges__[name])
    )


@pytest.mark.parametrize(("owner", "name"), RANGED)
def test_what_is_no_number_in_the_range_is_refused(owner, name):
    interval = SURFACE[owner].__ranges__[name].interval
    for value in (math.nan, "0.2", True, False, [1.0], 1j, 10**400):
        refused(owner, name, value)
    for value in (torch.tensor(True), torch.tensor(1j)):
        refused(owner, name, value)
    if interval.text:
        low, high = interval.text[1:-1].split(", ")
        outside = [float(low) - 1, float(high) + 1]
        outside += [float(low)] if interval.text[0] == "(" else []
        outside += [float(high)] if interval.text[-1] == ")" else []
        for value in outside:
            # infinity, and one more, may be in it
            if not interval.low <= value <= interval.high:
                refused(owner, name, value)
        assert not interval.has(float(low)) or interval.text[0] == "["
    if not SURFACE[owner].__ranges__[name].optional:
        refused(owner, name, None)
    if SURFACE[owner].__doc__:
        assert f"``{name}``" in inspect.getdoc(SURFACE[owner]).rpartition("Ranges: ")[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rw.methods.grpo(epsilon_low=-0.2), r"grpo: epsilon_low is -0.2, expected a number in \[0, inf\]\."),
        (lambda: rw.methods.grpo(epsilon_high=None), "grpo: epsilon_high is None, expected a number"),
        (lambda: rw.methods.grpo(beta=-1), r"grpo: beta is -1, expected a number in \[0, inf\)"),
        (lambda: rw.methods.grpo(beta=math.inf), "grpo: beta is inf"),
        (lambda: rw.methods.dapo(-0.1), "dapo: epsilon_low is -0.1"),
        (lambda: rw.weights.AdvantageReweighting(alpha=2), r"AdvantageReweighting: alpha is 2, expected a number in \[0, 1\]"),
        (lambda: rw.methods.advantage_reweighting(interval=(0.0, "1")), "interval is .* expected a tuple of numbers"),
        (lambda: rw.methods.trl(epsilon=-1), "trl: epsilon is -1"),
        (lambda: rw.methods.verl(clip_ratio_c=0.5), r"verl: clip_ratio_c is 0.5, expected a number in \[1, inf\)"),
        (lambda: rw.TokenRatio(clamp=-1.0), "TokenRatio: clamp is -1.0"),
        (lambda: rw.methods.grpo().replace(**{"surrogate.epsilon_low": -1.0}), "Clip: epsilon_low is -1.0"),
        (lambda: rw.methods.grpo().replace(ratio=rw.SequenceRatio(clamp=math.nan)), "SequenceRatio: clamp is nan"),
        (lambda: rw.Penalty(rw.methods.grpo(beta=0.1).penalties[0].rule, math.nan), "Penalty: coef is nan"),
        (lambda: rw.methods.trl(loss_type=["grpo"]), r"trl: loss_type is \['grpo'\], expected a string\."),
        (lambda: rw.methods.hapo(entropies=0.5), "hapo: entropies is 0.5, expected a Tensor or a TokenWeight or None"),
        (lambda: rw.preference.trl(5), "loss_type is 5, expected some of sigmoid"),
        (lambda: rw.preference.trl([["sigmoid"]]), "loss_type is .*, expected some of sigmoid"),
        (lambda: rw.preference.trl("sigmoid", loss_weights=0.5), "loss_weights is 0.5, expected a number for every loss type"),
        (lambda: rw.preference.rank_list(3, skips=1), "rank_list: skips is 1, expected 'all' or a tuple of whole numbers"),
        (lambda: rw.preference.rank_list(3, skips=(1.5,)), r"rank_list: skips is \(1.5,\)"),
        (lambda: rw.schedules.d3s(0.5, num_samples=(1.5, 2), token_fraction=(0.1, 0.2)), "num_samples is .* whole numbers"),
        (lambda: rw.sample_weights.raft(torch.ones(4), keep=1.5, group_size=2), "raft: keep is 1.5, expected a whole number"),
        (lambda: rw.sample_weights.raft(torch.ones(4), keep=torch.tensor(1), group_size=2), r"raft: keep is tensor\(1\)"),
    ],
)  # fmt: skip
def test_what_it_says(call, message):
    with pytest.raises(rw.InvalidCall, match=message):
        call()


@pytest.mark.parametrize(
    "value",
    [
        0.1,
        0,
        1,
        numpy.float32(0.5),
        numpy.float64(0.5),
        torch.tensor(7.0),
        torch.tensor(0.5, requires_grad=True),
    ],
)
def test_what_is_taken(value):
    assert rw.weights.AdvantageReweighting(alpha=value).alpha is value
    assert rw.methods.grpo(epsilon_low=value).surrogate.epsilon_low is value


def test_formulas_stand_for_numbers():
    bound = rw.weights.HapoLower()
    assert rw.methods.grpo(epsilon_low=bound).surrogate.epsilon_low is bound


Z, IDS, LOGPS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), -1.0)
OPS = {
    "policy_loss": (lambda **k: rw.policy_loss(Z, IDS, 1.0, spec="dapo", **k), (SoftmaxOptions, PolicyOptions)),
    "policy_loss_from_logps": (lambda **k: rw.policy_loss_from_logps(LOGPS, 1.0, spec="dapo", **k), (PolicyOptions,)),
    "linear_policy_loss": (lambda **k: rw.linear_policy_loss(Z, torch.zeros(4, 5), IDS, 1.0, spec="dapo", **k), (SoftmaxOptions, PolicyOptions, LMHeadOptions)),
    "token_logps": (lambda **k: rw.token_logps(Z, IDS, **k), (SoftmaxOptions,)),
    "preference_loss": (lambda **k: rw.preference_loss(Z, IDS, spec="simpo", **k), (SoftmaxOptions, PairOptions)),
    "distillation_loss": (lambda **k: rw.distillation_loss(Z, Z, **k), (SoftmaxOptions,)),
    "token_divergence": (lambda **k: rw.token_divergence(Z, Z, **k), (SoftmaxOptions,)),
}  # fmt: skip
OWN = {
    "distillation_loss": (
        "num_items_in_batch",
        "loss_scale",
        "teacher_temperature",
        "teacher_softcap",
    ),
    "token_divergence": ("beta", "other_temperature"),
}


@pytest.mark.parametrize("op", OPS)
def test_keywords_of_the_ops(op):
    call, records = OPS[op]
    names = [name for record in records for name in record.__ranges__] + list(OWN.get(op, ()))
    for name in names:
        for value in (math.nan, "0.2", True, -1.0, -1):
            with pytest.raises(rw.InvalidCall, match=rf"{op}: {name} is {value!r}, expected"):
                call(**{name: value})
    if SoftmaxOptions in records:
        with pytest.raises(rw.InvalidCall, match="temperature is 0"):
            call(temperature=0)


def test_divisors():
    call = OPS["policy_loss"][0]
    for value in (0, -1, math.inf):
        with pytest.raises(rw.InvalidCall, match="num_items_in_batch is"):
            call(num_items_in_batch=value)
    # a tensor is not read
    assert call(num_items_in_batch=torch.tensor(-2.0)).loss.isfinite()
    assert call(loss_scale=0).loss == 0


@pytest.mark.parametrize(
    "name", ["token_weights", "old_per_token_logps", "importance_sampling_ratio"]
)
def test_a_number_for_every_row(name):
    for value in (math.nan, "1", True):
        with pytest.raises(rw.InvalidCall, match=name):
            OPS["policy_loss"][0](**{name: value})


def test_every_numeric_keyword_of_the_records_has_a_range():
    counted = {"num_sequences", "num_groups"}
    # A tensor, or one number for every row, which is checked where it becomes one.
    data = {
        "old_per_token_logps",
        "ref_per_token_logps",
        "sampling_per_token_logps",
        "importance_sampling_ratio",
        "token_weights",
    }
    for record in (SoftmaxOptions, PolicyOptions, LMHeadOptions, PairOptions):
        for name, p in inspect.signature(record).parameters.items():
            assert not numeric(p) or name in record.__ranges__ or name in counted | data, name


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        (Interval("[0, inf)"), (0, 0.0, -0.0, 1e308), (-1e-300, math.inf)),
        (Interval("(0, inf]"), (5e-324, math.inf), (0, 0.0)),
        (Interval("(0, 1)"), (0.5, 1 - 2**-53), (0, 1, 1.0)),
        (
            Interval("[1, inf)", whole=True),
            (1, 10**9, numpy.int64(3)),
            (1.0, 2.5, numpy.float64(2.5)),
        ),
        (Interval("(0, inf)", words=("std",)), (1.0, "std"), ("mean", "")),
        (Interval(entries="[0, 1]"), ((0, 1), (0.5,), ()), (0.5, (2.0,), (None, 1), ("a",))),
        (
            Interval("(0, inf]", entries="[-inf, inf]"),
            (1.0, (-math.inf, 10.0)),
            (-1.0, (math.nan, 1.0)),
        ),
    ],
)
def test_intervals(interval, inside, outside):
    assert all(map(interval.has, inside)) and not any(
        map(interval.has, (*outside, math.nan, True, None))
    )


def test_a_users_rule(registry):
    """A bare ``float`` accepts any number; NaN, strings and booleans are
    not numbers."""

    @rw.rule
    class Powered(rw.Rule):
        power: float = 1.0

        def loss(self, xp, t):
            return -t.adv * t.logp * self.power

    assert Powered(power=-3).power == -3 and Powered(power=math.inf).power == math.inf
    for value in (math.nan, "1", True, None):
        with pytest.raises(rw.InvalidCall, match="Powered: power is"):
            Powered(power=value)


def test_a_default_is_in_its_range():
    def f(x: Annotated[float, Interval("[0, 1]")] = -1.0) -> None: ...

    with pytest.raises(rw.InvalidCall, match="f: x is -1.0"):
        ranged(f)
