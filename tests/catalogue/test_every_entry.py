"""Every entry has a formula, a paper, a certainty, numbers worked out by hand, an
independent transcription, a name that finds it, and a recipe.
"""

import functools
import re
from pathlib import Path

import catalogue_rows
import pytest
import torch

import reweight_ops as rw
from reweight_ops import advantages as adv
from reweight_ops import preference, rewards, schedules
from reweight_ops import sample_weights as sw
from reweight_ops._core.catalogue.papers import paper_of
from reweight_ops._core.catalogue.registry import CATALOGUE
from reweight_ops._core.catalogue.search import exact
from reweight_ops.recipes import RECIPES
from reweight_ops.testing import golden_rules
from reweight_ops.testing.checks import by_hand
from reweight_ops.testing.golden_rows import GOLDEN, GOLDEN_KINDS

ENTRIES = [entry for kind in CATALOGUE.values() for entry in kind.values()]
TESTS = Path(__file__).resolve().parents[1]
#: Where formulas are written again: in loops, from papers, or as the code of a trainer
#: or of the authors has them.
TRANSCRIBERS = (
    "oracles/*.py", "catalogue/test_advantages.py", "catalogue/test_best_of_k.py", "catalogue/test_every_entry.py",
    "catalogue/test_named_methods.py", "catalogue/test_objectives.py", "catalogue/test_rewards.py", "catalogue/test_sample_weights.py",
    "catalogue/test_schedules.py", "losses/test_composites.py", "losses/test_coupled_losses.py", "losses/test_divergences.py",
    "losses/test_losses.py", "losses/test_parity.py", "losses/test_preference.py", "losses/test_preference_methods.py",
    "losses/test_preference_combined.py", "losses/test_trainers_methods.py", "spec/test_weights.py",
    "integrations/verl/test_verl_baselines.py",
)  # fmt: skip
#: Papers that are not on arXiv, or whose id no source that could be read prints: blog
#: posts, a note, a journal of 1992, names in a trainer's code.
WITHOUT_ARXIV = {
    "reinforce", "opd", "divergence_gate", "tis", "icepop", "sequence_tis", "mis", "geometric_mask", "kl_dro", "cdpo",
}  # fmt: skip
#: What trainers and the survey papers name beside the surveys' own tables: each is a
#: part of a recipe.
IN_RECIPES = {
    key
    for table in (catalogue_rows.FIELD, catalogue_rows.NAMED)
    for keys in table.values()
    if not isinstance(keys, str)
    for key in keys
}


@functools.cache
def transcriptions():
    return "\n".join(
        path.read_text() for pattern in TRANSCRIBERS for path in sorted(TESTS.glob(pattern))
    )


@functools.cache
def used_by_recipes():
    lines = {entry.call for recipe in RECIPES.values() for entry in recipe.entries}
    notes = " ".join(note for recipe in RECIPES.values() for note in recipe.rollout)
    return lines | set(re.findall(r"rw\.[a-z_]+\.\w+", notes))


def built(entry):
    """The spec of a loss by its defaults and its example."""
    return entry.function(**entry.example)


def has_golden_rows(entry):
    if entry.kind in GOLDEN_KINDS and entry.name in by_hand(entry.kind):
        return any((row.kind, row.name) == (entry.kind, entry.name) for row in GOLDEN)
    if entry.kind == "policy_loss":  # of its parts
        spec = built(entry)
        rules = {row.rule for row in golden_rules.ROWS}
        return {spec.surrogate.name, *(p.rule.name for p in spec.penalties)} <= rules
    # pairs and full distributions: `check` compares them with the reference, and the
    # transcription beneath decides
    return True


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.kind}/{e.name}")
def test_an_entry_is_as_the_others(entry):
    assert "``" in entry.formula.partition("\n\nArgs")[0], "a formula"
    assert entry.paper and paper_of(entry).year
    assert (entry.arxiv == "unknown") == (entry.name in WITHOUT_ARXIV)
    assert entry.certainty in ("verified", "secondary", "derived")
    assert has_golden_rows(entry)
    names = {entry.name, entry.function.__name__} | OTHER_NAMES.get(entry.name, set())
    assert any(re.search(rf"\b{name}\b", transcriptions()) for name in names), (
        "a transcription that shares no code with it"
    )
    acronyms = re.findall(r"\(([A-Za-z][\w*/-]+)\)", entry.full_name)
    for text in (entry.name, *acronyms):
        assert entry.call in [hit.call for hit, _ in exact(text)], text
    if f"{entry.kind}/{entry.name}" in IN_RECIPES:
        assert entry.call in used_by_recipes(), "a part of a recipe"


#: What transcriptions of trainers call them: pair losses as TRL's ``DPOTrainer``, and
#: options of TRL's and verl's policy losses.
OTHER_NAMES = {
    "nca": {"nca_pair"},
    "bco": {"bco_pair"},
    "sppo": {"sppo_hard"},
    "exo": {"exo_pair"},
    "robust_dpo": {"robust"},
    "dual_clip_ppo": {"clip_ratio_c"},
    "top_entropy": {"top_entropy_quantile"},
}


# --- transcriptions of what no other test writes again --------------------------------
@pytest.fixture
def rows():
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {
        "r": draw(6),
        "ref": draw(6),
        "right": [1.0, 0, 0, 1, 1, 0],
        "groups": [range(3), range(3, 6)],
        "draw": draw,
    }


def same(got, expected):
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_advantages_written_again(rows):
    r, ref = rows["r"].tolist(), rows["ref"].tolist()
    mean = {i: sum(r[j] for j in group) / 3 for group in rows["groups"] for i in group}
    aapo = [r[i] - mean[i] + min(max(r[i] - ref[i], -0.2), 0.28) for i in range(6)]
    same(adv.aapo(rows["r"], rows["ref"], group_size=3), aapo)
    of_reference = rows["draw"](2, 4)
    pvpo = [r[i] - sum(of_reference[i // 3].tolist()) / 4 for i in range(6)]
    same(adv.pvpo(rows["r"], of_reference, group_size=3), pvpo)
    share = {i: sum(rows["right"][j] for j in group) / 3 for group in rows["groups"] for i in group}
    hard = [(r[i] - mean[i]) * 2.718281828459045 ** (1.5 * (1 - share[i])) for i in range(6)]
    same(
        adv.difficulty_prior(
            rows["r"], torch.tensor(rows["right"], dtype=torch.float64), slope=1.5, group_size=3
        ),
        hard,
    )


def test_rewards_and_sample_weights_written_again(rows):
    e = 2.718281828459045
    of_members = rows["draw"](6, 3)
    lines = of_members.tolist()
    uwo = [sum(x) / 3 - 0.1 * sum((y - sum(x) / 3) ** 2 for y in x) / 2 for x in lines]
    same(rewards.uwo(of_members), uwo)
    right, form, lengths = (
        torch.tensor(rows["right"], dtype=torch.float64),
        rows["draw"](6),
        10 * rows["draw"](6),
    )
    traac = [
        4 * c + f + c / (1 + e ** -((5 - n) / 2))
        for c, f, n in zip(rows["right"], form.tolist(), lengths.tolist(), strict=True)
    ]
    same(
        rewards.traac(right, form, lengths, torch.full((6,), 5.0, dtype=torch.float64), scale=2.0),
        traac,
    )
    tilt = [e ** (x / 0.5) for x in rows["r"].tolist()]
    expected = [
        3 * tilt[i] / sum(tilt[j] for j in group) for group in rows["groups"] for i in group
    ]
    same(sw.kl_tilt(rows["r"], beta=0.5, group_size=3), expected)
    same(sw.focal(rows["r"]), [(1 + (1 - p) ** 5) / 2 for p in rows["r"].tolist()])
    gains = (rows["r"] - rows["ref"]).tolist()
    line = [e ** ((x - min(gains)) / (max(gains) - min(gains)) / 0.1) for x in gains]
    same(sw.trajectory_aw(rows["r"], rows["ref"]), [6 * x / sum(line) for x in line])
    same(sw.trajectory_rw(rows["r"] - rows["ref"]), [6 * x / sum(line) for x in line])
    kept = [
        0.01 * (r in sorted((rows["r"].tolist()[j] for j in group), reverse=True)[:2])
        for group in rows["groups"]
        for r in rows["r"][group].tolist()
    ]
    same(sw.selective_rehearsal(rows["r"], keep=2, group_size=3), kept)


def test_token_weights_written_again(rows):
    """TR-GRPO's weight of every token, and the mask of sequences by the geometric mean
    of their ratios: of one that passes and one that does not.
    """
    logps = -2 * rows["draw"](2, 3)
    sampling = logps + torch.tensor([[0.1, -0.1, 0.02], [0.4, 0.3, -0.1]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    ones = torch.ones(2, dtype=torch.float64)
    for weight, stored, expected in (
        (
            rw.weights.TokenRegulation(alpha=2.0, tau=0.7, mu=0.4, lower=0.5, upper=0.9),
            {},
            [
                [
                    min(
                        max(
                            2
                            * (
                                1 / (1 + 2.718281828459045 ** (-(2.718281828459045**x) / 0.7)) - 0.4
                            ),
                            0.5,
                        ),
                        0.9,
                    )
                    for x in row
                ]
                for row in logps.tolist()
            ],
        ),
        (
            rw.weights.GeometricSequenceMask(ratio_min=0.9, ratio_max=1.1),
            {"old_per_token_logps": logps, "sampling_per_token_logps": sampling},
            [[1.0] * 3, [0.0] * 3],
        ),  # means of log r: -0.02 / 3 and -0.7 / 2
    ):
        spec = rw.methods.reinforce().with_weight(weight).replace(reduction=rw.TokenSum())
        out = rw.policy_loss_from_logps(
            logps.clone().requires_grad_(),
            ones,
            spec=spec,
            completion_mask=mask,
            **stored,
        )
        same(-out.coef, (torch.tensor(expected, dtype=torch.float64) * mask).tolist())


def test_schedules_written_again():
    """CANON's two schedules as its authors' code has them, over the whole training;
    HAPO's temperature from its definition.
    """
    from math import cos, log, pi

    def annealed(epoch, top, floor):
        if epoch < 30:
            return top * (epoch + 1) / 30
        epoch, cycle = epoch - 30, (150 - 30) // 3
        return floor + 0.5 * (top - floor) * (1 + cos(pi * (epoch % cycle) / cycle))

    for step in range(150):
        assert schedules.canon(step) == pytest.approx(1 - annealed(step, 0.6, 0.0))
        assert schedules.canon(step, order="inter_first") == pytest.approx(
            1 - (1 - annealed(step, 1.0, 0.4))
        )
    with pytest.raises(rw.InvalidCall, match="'intra_first' or 'inter_first'"):
        schedules.canon(0, order="cosine")
    with pytest.raises(rw.InvalidCall, match="too few for 3 cycles"):
        schedules.canon(0, total_steps=32)
    g = torch.Generator().manual_seed(1)
    before, mask = (
        torch.rand(4, 5, generator=g, dtype=torch.float64) + 0.1,
        torch.arange(5) < torch.tensor([[5], [3], [4], [1]]),
    )
    now = torch.tensor([0.01, 0.3, 0.7, 5.0], dtype=torch.float64)
    seen = sorted(log(x) for x in before[mask].tolist())
    middle = seen[round(0.8 * (len(seen) - 1))]
    sides = [
        (log(x) - middle) / ((seen[-1] - middle) if log(x) > middle else (middle - seen[0]))
        for x in now.tolist()
    ]
    same(
        schedules.hapo_temperature(now, before, mask, temperature=0.7),
        [0.7 * (1 + 0.1 * min(max(h, -1), 1)) for h in sides],
    )
    with pytest.raises(rw.InvalidCall, match="completion_mask has shape"):
        schedules.hapo_temperature(now, before, mask[0])
    weights = sw.dynamic_loss_reweighting(
        now, temperature=schedules.dynamic_loss_reweighting(3, temperature=0.4)
    )
    same(weights, [1.0] * 4)


def test_pairs_by_their_names_are_the_types_of_trl():
    """``nca``, ``bco``, ``sppo`` and the others, which the transcription has under
    TRL's names.
    """
    logps, ref = (
        -torch.rand(4, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        for k in (1, 2)
    )
    for name in ("nca", "bco", "sppo"):
        (kind,) = OTHER_NAMES[name]
        ours, theirs = (
            rw.preference_loss_from_logps(logps, spec=spec, ref_per_token_logps=ref).loss
            for spec in (getattr(preference, name)(), preference.trl(kind))
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
