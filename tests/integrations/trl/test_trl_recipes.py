"""Recipes in ``GRPOTrainer``: every part of one against the same lines in an own loop,
real training steps, and what does not fit. Offline, CPU.
"""

import dataclasses
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")

from oracles import trl as oracle
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl_common import TINY

import reweight_ops as rw
from reweight_ops.integrations.trl import ReweightGRPOTrainer
from reweight_ops.integrations.trl.rollout import Rollout, choose_recipe
from reweight_ops.recipes import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def correct(completions, **_):
    return [float(random.Random(c).random() < 0.5) for c in completions]


def style(completions, **_):
    return [random.Random(f"{c}!").random() for c in completions]


def reference_rewards(completions, **_):
    return [random.Random(f"{c}?").random() for c in completions]


def greedy_rewards(completions, **_):
    return [0.4 for _ in completions]


#: The reward functions that only carry inputs have weight 0.
FUNCTIONS = {"reward_funcs": [correct, style, reference_rewards, greedy_rewards]}
WEIGHTS = [1.0, 0.5, 0.0, 0.0]
#: Recipes that GRPOTrainer can run, and those that the normal run trains with: each
#: shows another part.
FIT = [r.name for r in RECIPES.values() if not r.loss and not r.setup and not set(r.reads) & {
    "values", "segments", "parents", "episode_rewards", "log_sum_p_sq", "sampling_per_token_logps", "labels", "returns"
} and r.name not in ("pvpo", "a_star_po")]  # fmt: skip
SHOWN = ("ar_lopti", "hapo", "d3s", "capo", "grpo_lead", "lens", "gdpo")


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """TRL loads its reference from the model's path."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**TINY)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def build(make_trainer, saved_model):
    def build(ours, **config):
        return make_trainer(
            ReweightGRPOTrainer, saved_model, FUNCTIONS | ours, reward_weights=WEIGHTS, **config
        )

    return build


def logits_of(trainer, inputs, gradients=False):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    keep = inputs["completion_ids"].size(1)
    with torch.set_grad_enabled(gradients):
        return trainer.model(input_ids=ids, attention_mask=mask, logits_to_keep=keep + 1).logits[
            :, :-1
        ]


def current(trainer, inputs):
    """Log-probs and entropies by the oracle, from the model's logits."""
    return oracle.logps_and_entropies(
        logits_of(trainer, inputs), inputs["completion_ids"], trainer.temperature
    )


def rollout(trainer):
    """One batch of completions: the trainer's, and all that a line may read of it."""
    rows = [trainer.train_dataset[i // 4] for i in range(8)]
    inputs = trainer._generate_and_score_completions([dict(row) for row in rows])
    rewards, mask = trainer._reweight_hooks.rollout._rewards, inputs["completion_mask"]
    logps, entropies = current(trainer, inputs)
    values = {
        "rewards": rewards[:, 0] + 0.5 * rewards[:, 1], "rewards_per_func": rewards[:, :2], "correct": rewards[:, 0], "group_size": 4,
        "reference_rewards": rewards[:, 2], "greedy_rewards": rewards[:, 3], "completion_mask": mask, "lengths": mask.sum(-1),
        "old_per_token_logps": logps, "entropies": entropies, "mean_entropies": (entropies * mask).sum(-1) / mask.sum(-1),
        "step": trainer.state.global_step, "total_steps": trainer.state.max_steps,
    }  # fmt: skip
    return inputs, values


def spread(entropies):
    """HAPO divides logarithms of entropies by their spread. That of an untrained model
    is a few roundings, which differ from backend to backend.
    """
    return entropies * torch.linspace(0.5, 1.5, entropies.numel()).view_as(entropies)


@pytest.fixture
def short(monkeypatch):
    """Completions of several lengths: the tiny model hardly ever ends one."""
    generate = ReweightGRPOTrainer._generate

    def cut(self, prompts):
        found = list(generate(self, prompts))
        found[1] = [ids[: 3 + i % 4] for i, ids in enumerate(found[1])]
        return tuple(found)

    monkeypatch.setattr(ReweightGRPOTrainer, "_generate", cut)


@pytest.mark.parametrize(
    "name", [n if n in SHOWN else pytest.param(n, marks=pytest.mark.slow) for n in FIT]
)
def test_the_loss_is_the_own_loops(build, short, name):
    """Advantages, weights, masks and the spec of every update, by the recipe's lines
    and ``rw.policy_loss``; and two real steps.
    """
    r = rw.recipe(name)
    updates = len(r.stand_ins())
    trainer = build({"recipe": name}, max_steps=2 * updates)
    trainer.state.max_steps, trainer.state.global_step = 10, 4
    inputs, values = rollout(trainer)
    made = r.prepare(**values)
    if "entropies" in inputs:
        torch.testing.assert_close(
            inputs["entropies"] * values["completion_mask"],
            values["entropies"] * values["completion_mask"],
        )
        inputs["entropies"] = values["entropies"] = spread(inputs["entropies"])
    for part in ("advantages", "sample_weights"):
        if part in made:
            torch.testing.assert_close(inputs[part], made[part], rtol=1e-5, atol=1e-5)
    assert inputs["advantages"].abs().max() > 0.01
    g = torch.Generator().manual_seed(1)
    # off-policy, on both sides of the bounds
    for stored in ("old_per_token_logps", "ref_per_token_logps"):
        if stored in r.reads:
            inputs[stored] = values[stored] = values["old_per_token_logps"] + 0.3 * torch.randn(
                inputs["completion_ids"].shape, generator=g
            )
    values |= made
    values["schedule"] = made.get("schedule")
    logits = logits_of(trainer, inputs)
    for update, spec in enumerate(r.specs(**values)):
        trainer._step = update * trainer.args.steps_per_generation
        keywords = {n: eval(line, {"rw": rw}, values) for n, line in r.loss_keywords().items()}
        expected = rw.policy_loss(
            logits,
            inputs["completion_ids"],
            values["advantages"] if "adv" in spec.requires else None,
            spec=spec,
            temperature=0.9,
            backend="reference",
            **keywords,
        )
        loss = trainer._compute_loss(trainer.model, dict(inputs))
        assert loss.item() == pytest.approx(expected.loss.item(), abs=2e-6, rel=1e-5), update
    trainer._step, trainer.state.max_steps = 0, 2 * updates
    trainer.train()
    assert trainer.delegated_calls == {} and all(
        torch.isfinite(p).all() for p in trainer.model.parameters()
    )
    assert trainer.fused_calls["linear_policy_loss"] == 3 * updates


@pytest.mark.parametrize("name", ["ar_lopti", "hapo", "d3s"])
def test_the_steps_are_an_own_loops(build, short, name):
    """Two updates of a rollout, stored entropies, a schedule: SGD on a copy of the
    model, with ``rw.policy_loss`` of its logits, ends at the same parameters.
    """
    r = rw.recipe(name)
    updates = len(r.stand_ins())
    sgd = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    trainer = build({"recipe": name}, max_steps=2 * updates, **sgd)
    # TRL's forward stays behind
    own = SimpleNamespace(
        model=Qwen2ForCausalLM(trainer.model.config), temperature=trainer.temperature
    )
    own.model.load_state_dict(trainer.model.state_dict())
    optimizer = torch.optim.SGD(own.model.parameters(), lr=0.5)
    start = torch.cat([p.detach().flatten() for p in own.model.parameters()]).clone()
    compute, calls = trainer._compute_loss, []

    def watched(model, inputs):
        if "entropies" in inputs:
            inputs = {**inputs, "entropies": spread(inputs["entropies"])}
        values = trainer._reweight_hooks.rollout.values(trainer, inputs)
        spec = r.specs(**values)[len(calls) % updates]
        calls.append(spec)
        keywords = {n: eval(line, {"rw": rw}, values) for n, line in r.loss_keywords().items()}
        advantages = values["advantages"] if "adv" in spec.requires else None
        logits = logits_of(own, inputs, gradients=True)
        options = {"spec": spec, "temperature": own.temperature, "backend": "reference", **keywords}
        rw.policy_loss(logits, inputs["completion_ids"], advantages, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return compute(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    ours, theirs = (
        torch.cat([p.detach().flatten() for p in m.parameters()]) - start
        for m in (trainer.model, own.model)
    )
    assert len(calls) == 2 * updates and ours.norm() > 1e-3
    assert (ours - theirs).norm() <= 1e-5 * ours.norm()


def test_stored_values_travel_with_their_completions(build, short):
    """A micro-batch has the entropies, log-probs and weights of its own rows, after
    TRL's shuffle.
    """
    stored = dataclasses.replace(rw.recipe("steer"), sample_weights="1 + lengths")
    trainer = build(
        {"recipe": stored},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    seen = []
    compute = ReweightGRPOTrainer._compute_loss

    def watched(self, model, inputs):
        seen.append((inputs, current(self, inputs)))
        return compute(self, model, inputs)

    trainer._compute_loss = watched.__get__(trainer)
    trainer.train()
    assert len(seen) == 2
    for inputs, (logps, entropies) in seen:
        mask = inputs["completion_mask"].bool()
        assert inputs["entropies"].shape[0] == 4
        torch.testing.assert_close(inputs["entropies"][mask], entropies[mask], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            inputs["old_per_token_logps"][mask], logps[mask], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(inputs["sample_weights"], 1.0 + mask.sum(-1))
    assert not torch.equal(seen[0][0]["entropies"], seen[1][0]["entropies"])


def test_a_schedule_follows_the_step(build):
    """D3S keeps 4 of 8 samples at the first step and more later; the fraction of tokens
    grows with it.
    """
    trainer = build({"recipe": "d3s"})
    trainer.state.max_steps = 10
    for step, samples, fraction in ((0, 4, 0.2), (5, 6, 0.6), (10, 8, 1.0)):
        trainer.state.global_step = step
        inputs, _ = rollout(trainer)
        assert inputs["sample_weights"].sum() == samples
        (spec,) = trainer._reweight_hooks.rollout.specs(trainer, inputs)
        assert spec.weights[0].fraction == pytest.approx(fraction)


def test_estimators_alone_keep_trls_loss(build):
    """By name, by line; and beside a spec. TRL computes its own loss of them."""
    for ours in (
        {"advantages": "qae"},
        {"advantages": "rw.advantages.qae(rewards, quantile=0.6, group_size=group_size)"},
    ):
        trainer = build(ours)
        inputs, values = rollout(trainer)
        quantile = 0.6 if "0.6" in ours["advantages"] else 0.4
        expected = rw.advantages.qae(values["rewards"], quantile=quantile, group_size=4)
        torch.testing.assert_close(inputs["advantages"], expected)
        assert list(trainer._logs["advantages"])[-8:] == pytest.approx(expected.tolist())
        trainer._compute_loss(trainer.model, inputs)
        assert trainer.fused_calls == {"linear_token_logps": 1}
    trainer = build({"advantages": "qae", "rewards": "grpo_lead", "spec": "dapo"})
    inputs, values = rollout(trainer)
    lead = rw.rewards.grpo_lead_length(values["correct"], values["lengths"], group_size=4)
    torch.testing.assert_close(inputs["advantages"], rw.advantages.qae(lead, group_size=4))


def test_a_completion_without_a_score_moves_nothing(make_trainer):
    def some(completions, **_):
        return [None if i == 2 else float(i) for i in range(len(completions))]

    trainer = make_trainer(
        ReweightGRPOTrainer, ours={"advantages": "dr_grpo", "reward_funcs": some}
    )
    inputs = trainer._generate_and_score_completions(
        [dict(trainer.train_dataset[i // 4]) for i in range(8)]
    )
    assert inputs["advantages"].tolist() == pytest.approx(
        [-4 / 3, -1 / 3, 0, 5 / 3, -1.5, -0.5, 0.5, 1.5]
    )


def test_the_config_follows_the_recipe(build):
    args = build({"recipe": "ar_lopti"}).args
    assert (args.num_iterations, args.beta) == (2, 0.001)
    assert build({"recipe": "canon"}).args.num_iterations == 1


@pytest.mark.parametrize(
    ("ours", "config", "message"),
    [
        (
            {"recipe": "dpo_gamma"},
            {},
            "recipe 'dpo_gamma' is not of GRPOTrainer: its loss is rw.preference_loss",
        ),
        ({"recipe": "hypervolume_reward_weighting"}, {}, "keeps a state from step to step"),
        ({"recipe": "gae"}, {}, "reads values, which GRPOTrainer does not have"),
        ({"recipe": "trajectory_rw"}, {}, "reads returns: give a reward function of that name"),
        ({"recipe": "canon", "spec": "dapo"}, {}, "both set the loss"),
        ({"recipe": "canon"}, {"scale_rewards": "batch"}, "scale_rewards would have no effect"),
        ({"recipe": "canon"}, {"epsilon": 0.3}, "epsilon=0.3 would have no effect"),
        ({"recipe": "ar_lopti"}, {"beta": 0.5}, "beta=0.5 would have no effect"),
        ({"recipe": "ar_lopti"}, {"num_iterations": 3}, "num_iterations is 3"),
        (
            {"recipe": "ar_lopti"},
            {"steps_per_generation": 1, "gradient_accumulation_steps": 2},
            "end with an optimizer step",
        ),
        ({"recipe": "nothing"}, {}, "no recipe 'nothing'"),
        ({"advantages": "sft"}, {}, "recipe 'sft' has no advantages"),
        (
            {"sample_weights": "rw.sample_weights.raft(lenghts, group_size=group_size)"},
            {},
            "reads lenghts, which GRPOTrainer does not have",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(build, ours, config, message):
    with pytest.raises((rw.InvalidCall, rw.UnsupportedRequest), match=message):
        build(ours, **config)


def test_what_a_recipe_cannot_have_is_never_left_to_trl(build):
    trainer = build({"sample_weights": "lengths / lengths.float().mean()"})
    inputs, _ = rollout(trainer)
    with pytest.raises(
        rw.UnsupportedRequest, match=r"recipe= cannot be combined with multimodal inputs"
    ):
        trainer._compute_loss(trainer.model, inputs | {"pixel_values": torch.zeros(1)})


def test_two_processes_share_a_group():
    """A process has half of every tensor; lines see all of it, and it keeps its rows
    and its width.
    """
    rewards = torch.tensor([[1.0], [0], [0], [4], [2], [0], [1], [1]])
    masks = [torch.ones(4, 3), torch.ones(4, 5)]

    def gather(x):
        return (
            torch.cat([torch.nn.functional.pad(masks[0], (0, 2)), x])
            if x.dim() > 1
            else torch.cat([x.new_full((4,), 3), x])
        )

    accelerator = SimpleNamespace(
        num_processes=2, process_index=1, gather=gather, pad_across_processes=lambda x, dim: x
    )
    trainer = SimpleNamespace(
        accelerator=accelerator,
        num_generations=8,
        reward_weights=torch.ones(1),
        reward_func_names=["r"],
        model=torch.nn.Linear(1, 1),
        state=SimpleNamespace(global_step=0, max_steps=1),
        _logs={"advantages": []},
        args=SimpleNamespace(),
    )
    recipe = choose_recipe(
        None, sample_weights="rw.advantages.hapo(rewards, lengths, group_size=group_size)"
    )
    hooks = Rollout(trainer, recipe)
    hooks.keep_rewards(rewards)
    output = hooks.complete(trainer, {"completion_mask": masks[1]})
    everyone = rw.advantages.hapo(rewards[:, 0], torch.tensor([3.0] * 4 + [5] * 4), group_size=8)
    torch.testing.assert_close(output["sample_weights"], everyone[4:])
    per_token = dataclasses.replace(recipe, sample_weights="completion_mask * rewards[:, None]")
    hooks = Rollout(trainer, per_token)
    hooks.keep_rewards(rewards)
    torch.testing.assert_close(
        hooks.complete(trainer, {"completion_mask": masks[1]})["sample_weights"],
        rewards[4:].expand(4, 5),
    )


@pytest.mark.slow
def test_two_real_processes_share_a_group(tmp_path):
    script = Path(__file__).with_name("two_process_recipes.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(" agrees") == 6
