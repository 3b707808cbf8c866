"""The TRL trainer and patch: our own methods, what is left to TRL, undoing, and a short
real training run. Offline, CPU.
"""

import warnings

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")

import trl
from oracles import papers
from oracles import trl as oracle
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl_common import OURS, TINY, assert_same, configure, current, make_inputs, run

import reweight_ops as rw
from reweight_ops.integrations.trl import ReweightGRPOTrainer, library, patch_trl

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


# --- our own methods ------------------------------------------------------------------
def test_reweighting_on_top_of_trl(make_trainer):
    trainer = make_trainer(
        ReweightGRPOTrainer, ours={"reweight": rw.weights.AdvantageReweighting(alpha=0.3)}
    )
    inputs = make_inputs(trainer)
    logp, _ = current(trainer, inputs)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    expected = papers.advantage_reweighting(
        lambda A: oracle.grpo_loss(
            logp, A, mask, old_logps=inputs["old_per_token_logps"], num_items_in_batch=123
        )[0],
        inputs["advantages"],
        inputs["old_per_token_logps"],
    )
    assert run(trainer, inputs)[0] == pytest.approx(expected.item(), abs=1e-6)
    assert trainer.fused_calls == {"linear_policy_loss": 1}


def test_lopti_alternates_over_the_passes(make_trainer):
    """The first pass over a rollout trains the unlikely tokens, the
    second the others."""
    halves = rw.schedules.lopti(eta=0.003)
    trainer = make_trainer(
        ReweightGRPOTrainer, ours={"spec": halves}, num_iterations=2, gradient_accumulation_steps=2
    )
    trainer.current_gradient_accumulation_steps = 2
    inputs = make_inputs(trainer)
    inputs["num_items_in_batch"] = (inputs["completion_mask"] * inputs["tool_mask"]).sum()
    logp, _ = current(trainer, inputs)
    ratio, A = torch.exp(logp - inputs["old_per_token_logps"]), inputs["advantages"][:, None]
    terms = -torch.minimum(ratio * A, ratio.clip(0.8, 1.2) * A)
    expected = papers.lopti(
        terms,
        inputs["old_per_token_logps"],
        inputs["completion_mask"] * inputs["tool_mask"],
        eta=0.003,
    )
    # two micro-batches a pass, one window of accumulation each
    for step, half in enumerate([0, 0, 1, 1, 0]):
        trainer._step = step
        assert run(trainer, inputs)[0] == pytest.approx(expected[half].item(), abs=1e-6), step
    assert min(e.abs() for e in expected) > 1e-3


def test_window_and_micro_batch_normalization_mix(make_trainer):
    """A penalty with another normalization than the surrogate's keeps its own, either
    way round.
    """
    surrogate = rw.rules.surrogates.Reinforce()
    bonus = rw.rules.penalties.EntropyBonus()
    for own, penalty in ((rw.TokenMean(), rw.SequenceMean()), (rw.SequenceMean(), rw.TokenMean())):
        spec = rw.PolicyLossSpec(
            surrogate=surrogate, reduction=own, penalties=(rw.Penalty(bonus, 0.1, penalty),)
        )
        trainer = make_trainer(ReweightGRPOTrainer, ours={"spec": spec})
        trainer.current_gradient_accumulation_steps = 4
        inputs = make_inputs(trainer)
        logp, H = current(trainer, inputs)
        mask = (inputs["completion_mask"] * inputs["tool_mask"]).float()

        def reduced(x, reduction, mask=mask, steps=trainer.args.steps_per_generation):
            if isinstance(reduction, rw.TokenMean):
                return (x * mask).sum() / (123 * 4 / steps)
            return ((x * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean() / 4

        expected = reduced(-inputs["advantages"][:, None] * logp, own) - 0.1 * reduced(H, penalty)
        assert run(trainer, inputs)[0] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("ours", "config", "message"),
    [
        ({"spec": "dapo"}, {"loss_type": "grpo"}, "loss_type='grpo'"),
        ({"spec": "dapo"}, {"epsilon_high": 0.3}, "epsilon_high=0.3"),
        ({"spec": "dapo"}, {"beta": 0.1}, "beta=0.1 would have no effect"),
        ({"spec": rw.methods.grpo(beta=0.04)}, {}, "reference log-probs"),
        ({"spec": ["dapo", "grpo"]}, {}, "num_iterations is 1"),
        ({"spec": "dappo"}, {}, "no policy loss 'dappo'"),
        ({"spec": 3.0}, {}, "expected a PolicyLossSpec"),
    ],
)
def test_contradictions_are_errors(make_trainer, tmp_path, ours, config, message):
    model = None
    if "beta" in config:  # TRL loads its reference from the model's path
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**TINY)).save_pretrained(tmp_path)
        model = str(tmp_path)
    with pytest.raises((rw.InvalidCall, TypeError), match=message):
        make_trainer(ReweightGRPOTrainer, model, ours, **config)


# --- what is left to TRL --------------------------------------------------------------
def test_delegation_is_counted_and_warned_once(trainers):
    configure(trainers, loss_type="vespo")
    inputs = make_inputs(trainers["stock"])
    with pytest.warns(UserWarning, match="leaves this to TRL: loss_type='vespo'"):
        assert_same(run(trainers["stock"], inputs), run(trainers["fused"], inputs))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: pytest.fail("warned twice"))
        run(trainers["fused"], inputs)
    assert trainers["fused"].delegated_calls == {"loss_type='vespo'": 2}


@pytest.mark.parametrize(
    ("settings", "extra", "reason"),
    [
        ({"off_policy_mask_threshold": 0.1}, {}, "off_policy_mask_threshold"),
        ({"use_adaptive_entropy": True}, {}, "use_adaptive_entropy"),
        ({"aux_loss_enabled": True}, {}, "the MoE auxiliary loss"),
        ({}, {"pixel_values": torch.zeros(1)}, "multimodal inputs (pixel_values)"),
    ],
)
def test_delegation_reasons(trainers, monkeypatch, settings, extra, reason):
    configure(trainers, **settings)
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", lambda self, model, inputs: "TRL's")
    with pytest.warns(UserWarning):
        assert (
            trainers["fused"]._compute_loss(
                trainers["fused"].model, make_inputs(trainers["stock"]) | extra
            )
            == "TRL's"
        )
    assert trainers["fused"].delegated_calls[reason] == 1


def test_multimodal_log_probs_are_left_to_trl(trainers, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        trl.GRPOTrainer,
        "_get_per_token_logps_and_entropies",
        lambda self, *args, **kwargs: seen.update(kwargs),
    )
    with pytest.warns(UserWarning, match="multimodal"):
        trainers["token"]._get_per_token_logps_and_entropies(
            trainers["token"].model, None, None, 1, batch_size=2, pixel_values="pixels"
        )
    assert seen["pixel_values"] == "pixels" and seen["batch_size"] == 2


def test_own_method_is_never_left_to_trl(make_trainer):
    trainer = make_trainer(
        ReweightGRPOTrainer, ours={"reweight": rw.weights.AdvantageReweighting()}, loss_type="vespo"
    )
    with pytest.raises(rw.UnsupportedRequest, match="vespo"):
        run(trainer, make_inputs(trainer))


def test_signatures_are_checked():
    class Moved:
        def _get_per_token_logps_and_entropies(self, model, batch):
            pass

    class Fewer(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs, required):
            pass

    library.check_signatures(trl.GRPOTrainer)
    with pytest.raises(
        rw.BackendUnavailable,
        match=r"Moved._get_per_token_logps_and_entropies has the signature \(self, model, batch\)",
    ):
        library.check_signatures(Moved)
    with pytest.raises(rw.BackendUnavailable, match=r"Fewer\._compute_loss"):
        library.check_signatures(Fewer)


def test_unknown_loss_source_is_reported(make_trainer, monkeypatch):
    monkeypatch.setattr(library, "KNOWN_LOSSES", ())
    with pytest.warns(UserWarning, match="was not checked against"):
        make_trainer(ReweightGRPOTrainer, ours={"fuse_loss": True})


def test_a_known_loss_is_known_under_a_patch_too(make_trainer):
    """The subclass finds TRL's loss behind the patch, so it warns only where TRL's own
    is another one.
    """
    with patch_trl(), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*was not checked against")
        make_trainer(ReweightGRPOTrainer, ours={"fuse_loss": True})


# --- patch_trl ------------------------------------------------------------------------
def test_patch_and_undo(make_trainer, trainers):
    originals = {name: getattr(trl.GRPOTrainer, name) for name in library.SIGNATURES}
    inputs = make_inputs(trainers["stock"])
    stock = run(trainers["stock"], inputs)
    with patch_trl(fuse_loss=True) as patch:
        patched = make_trainer(trl.GRPOTrainer)
        assert_same(stock, run(patched, inputs))
        assert patched.fused_calls == {"linear_policy_loss": 1}
        # A subclass of ours under a patch keeps its own hooks, also when it leaves a
        # loss to TRL.
        assert_same(stock, run(trainers["token"], inputs))
        assert trainers["token"].fused_calls == {"linear_token_logps": 1}
        trainers["fused"].loss_type = "vespo"
        with pytest.warns(UserWarning):
            run(trainers["fused"], inputs)
        assert trainers["fused"].delegated_calls == {"loss_type='vespo'": 1}
        with pytest.raises(rw.InvalidCall, match="patched already"):
            patch_trl()
    assert {name: getattr(trl.GRPOTrainer, name) for name in originals} == originals
    patch.undo()
    assert_same(stock, run(patched, inputs))
    assert patched.fused_calls == {"linear_policy_loss": 1}


# --- a real training run --------------------------------------------------------------
@pytest.fixture(scope="module")
def train(make_trainer):
    """``train(cls, ours) -> (trainer, how far its parameters moved, its log)``."""

    def run(cls, ours):
        trainer = make_trainer(
            cls,
            ours=ours,
            max_steps=6,
            num_iterations=2,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=4,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            entropy_coef=0.01,
            logging_steps=1,
        )
        start = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).clone()
        trainer.train()
        timings = ("time", "runtime", "per_second")
        log = [
            {k: v for k, v in entry.items() if not any(t in k for t in timings)}
            for entry in trainer.state.log_history
        ]
        return (
            trainer,
            torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - start,
            log,
        )

    return run


@pytest.fixture(scope="module")
def stock_run(train):
    return train(trl.GRPOTrainer, {})


@pytest.mark.parametrize(
    "ours",
    [{}, {"fuse_loss": True}, {"lm_head": "logits"}, {"fuse_loss": True, "lm_head": "logits"}],
    ids=OURS,
)
def test_training_run(train, stock_run, ours):
    """Generation, accumulation and two passes a rollout: six steps of SGD lead to the
    same parameters (1e-5 of the way moved) and logs.
    """
    _, stock, stock_log = stock_run
    trainer, moved, log = train(ReweightGRPOTrainer, ours)
    assert stock.norm() > 0.1
    assert (moved - stock).norm() <= 1e-5 * stock.norm()
    assert len(log) == len(stock_log)
    for theirs, our in zip(stock_log, log, strict=True):
        assert our == pytest.approx(theirs, abs=1e-5, rel=1e-4)
    op = ("" if "lm_head" in ours else "linear_") + (
        "policy_loss" if "fuse_loss" in ours else "token_logps"
    )
    assert trainer.delegated_calls == {} and trainer.fused_calls[op] > 0
