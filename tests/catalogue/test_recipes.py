"""Every recipe is executed, line by line and as the printed loop, and every paper that
needs a recipe has one.
"""

import ast
import dataclasses

import pytest
import torch
from recipe_rollouts import B, Policy, T, make_rollout
from typer.testing import CliRunner

import reweight_ops as rw
from reweight_ops import cli
from reweight_ops._core.catalogue.papers import REPOSITORIES, paper_of, papers
from reweight_ops._core.catalogue.recipes import recipes_of
from reweight_ops._core.catalogue.registry import CATALOGUE
from reweight_ops.recipes import RECIPES, Recipe, register


def loop(name, batches=3):
    """The printed loop, executed: ``(parameters before, after, what the loop left, the
    rollouts)``.
    """
    policy = Policy()
    before = policy.table.detach().clone()
    rollouts = [make_rollout(policy, name, seed) for seed in range(batches)]
    names = {
        "policy": policy,
        "optimizer": torch.optim.SGD(policy.parameters(), lr=0.5),
        "rollouts": rollouts,
    }
    exec(compile(rw.recipe(name).to_own_loop(), f"<the loop of {name}>", "exec"), names)
    return before, policy.table.detach(), names, rollouts


@pytest.mark.parametrize("name", RECIPES)
def test_the_printed_loop_runs(name):
    """The loss is finite, and the policy moves by finite steps."""
    before, after, names, _ = loop(name)
    assert torch.isfinite(names["loss"])
    assert torch.isfinite(after).all() and (after != before).any(), "no gradient"


@pytest.mark.parametrize("name", RECIPES)
def test_the_lines_are_the_loop(name):
    """``prepare`` and ``specs`` give what the loop computes by the same names."""
    r = rw.recipe(name)
    if r.setup or not r.spec:
        return
    _, _, names, rollouts = loop(name, batches=1)
    values = vars(rollouts[0]) | {"step": 0, "total_steps": 1}
    made = r.prepare(**values)
    assert list(made) == list(r.stages)
    for stage, value in made.items():
        torch.testing.assert_close(value, names[stage], rtol=0, atol=0)
    specs = r.specs(**(values | made))
    assert [repr(spec) for spec in specs] == [
        repr(spec) for spec in names.get("specs", (names["spec"],))
    ]
    assert all(isinstance(spec, (rw.PolicyLossSpec, rw.PairSpec)) for spec in specs)


def test_ar_and_lopti_together_as_their_authors():
    low, high = rw.recipe("ar_lopti").specs()
    for spec in (low, high):
        clip = spec.surrogate
        assert (clip.epsilon_low, clip.epsilon_high, clip.clip_ratio_c) == (0.2, 0.24, 10.0)
        (k3,) = spec.penalties
        assert (k3.rule.name, k3.coef) == ("k3", 0.001)
        assert spec.weights[1].alpha == 0.3
    assert (low.weights[0].upper, high.weights[0].lower) == (0.5, 0.5)
    alone, _ = rw.recipe("lopti").specs()
    assert alone.weights[0].upper == 0.4 and len(alone.weights) == 1
    (reweighting,) = rw.recipe("advantage_reweighting").specs()
    assert reweighting.weights[0].alpha == 0.2
    published = {(s.name, s.value) for s in rw.recipe("ar_lopti").settings}
    assert {
        ("num_generations", "8"),
        ("temperature", "0.7"),
        ("learning_rate", "1e-6"),
    } <= published


def test_every_paper_with_several_entries_and_every_estimator_has_one():
    assert not [paper for paper, of in papers().items() if len(of) > 1 and not recipes_of(of)]
    used = {entry.call for r in RECIPES.values() for entry in r.entries}
    assert not [e.call for e in CATALOGUE["advantage"].values() if e.call not in used]


def test_a_paper_is_one_title_one_id_one_year():
    by_id = {}
    for title, of in papers().items():
        (arxiv,) = {entry.arxiv for entry in of}
        assert paper_of(of[0]).year, f"{title} needs a year"
        if arxiv != "unknown":
            assert by_id.setdefault(arxiv, title) == title
    assert not set(REPOSITORIES) - set(by_id), "a repository of no paper of the catalogue"
    paper = rw.recipe("hapo").publication
    assert (paper.year, paper.url) == (2025, "https://github.com/starriver030515/HAPO")
    assert paper.source.endswith(
        "Nature, 2025, arXiv:2509.16591, https://github.com/starriver030515/HAPO"
    )


def test_old_log_probs_are_given_wherever_a_ratio_is_read():
    for r in RECIPES.values():
        if "log_ratio" in r.requires:
            # the sampler's may stand for them
            given = r.loss_keywords()["old_per_token_logps"]
            assert (
                given in ("old_per_token_logps", "sampling_per_token_logps") and given in r.reads
            ), r.name


@pytest.mark.parametrize(
    "text",
    [
        "HAPO",
        "hapo",
        "2509.16591",
        "arXiv:2509.16591",
        "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature",
    ],
)
def test_a_recipe_is_found_like_an_entry(text):
    assert rw.recipe(text).name == "hapo"


def test_what_is_not_found_says_what_there_is():
    with pytest.raises(
        rw.InvalidCall, match="several recipes: ar_lopti, lopti, advantage_reweighting"
    ):
        rw.recipe("2505.12929")
    with pytest.raises(rw.InvalidCall, match="no recipe 'nothing'.*hapo"):
        rw.recipe("nothing")


def test_find_shows_recipes_last():
    hits = rw.find("GRPO-LEAD")
    assert hits[-1].call == "rw.recipe('grpo_lead')" and eval(hits[-1].call) is rw.recipe(
        "grpo_lead"
    )
    assert not [hit for hit in rw.find("GRPO-LEAD", "advantage") if "recipe" in hit.call]


def test_a_recipe_of_ones_own():
    mine = Recipe(
        name="mine",
        entry="rw.methods.dapo",
        advantages="rw.advantages.rloo(rewards, group_size=group_size)",
        spec="rw.methods.dapo()",
    )
    made = mine.prepare(rewards=torch.tensor([3.0, 1, 1]), group_size=3)
    assert made["advantages"].tolist() == pytest.approx([2, -1, -1])
    with pytest.raises(rw.InvalidCall, match="reads rewards, group_size: pass it"):
        mine.prepare()
    with pytest.raises(rw.InvalidCall, match="reads lenghts, which no batch has"):
        register(dataclasses.replace(mine, sample_weights="lenghts"))
    register(mine)
    try:
        with pytest.raises(rw.InvalidCall, match="there is a recipe 'mine' already"):
            register(mine)
    finally:
        del RECIPES["mine"]


def test_lines_reach_nothing_but_the_package():
    with pytest.raises(rw.InvalidCall, match="reads open: pass it"):
        dataclasses.replace(rw.recipe("hapo"), advantages="open('file')").prepare()
    for r in RECIPES.values():
        for line in r.lines:
            ast.parse(line, mode="eval")


def test_the_command_line_prints_them():
    listed = CliRunner().invoke(cli.app, ["recipes"])
    assert listed.exit_code == 0 and all(
        name[:8] in listed.output for name in ("ar_lopti", "hapo", "dr_grpo")
    )
    entry = CliRunner().invoke(cli.app, ["show", "canon"])
    assert (
        "reweight-ops recipe canon" in entry.output
        and "https://github.com/biuboomc/CANON" in entry.output
    )
    shown = CliRunner().invoke(cli.app, ["recipe", "GRPO-LEAD"])
    assert (
        shown.exit_code == 0
        and rw.recipe("grpo_lead").to_own_loop() in shown.output
        and "midpoint" in shown.output
    )


def test_shapes_of_the_batch():
    batch = make_rollout(Policy(), "hapo")
    assert batch.completion_mask.shape == (B, T) and batch.rewards.shape == (B,)
