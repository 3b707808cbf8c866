"""What the installed TRL's configurations of preferences offer, read from its own
source: each choice is served, or refused with its reason.
"""

import dataclasses
import importlib
import inspect
import re

import pytest

pytest.importorskip("trl", minversion="1.15")

import trl.trainer.dpo_trainer
from trl import DPOConfig

import reweight_ops as rw
from reweight_ops import preference


def choices(module, option):
    """The strings that a trainer's source compares an option with, and those of
    ``option in (...)``.
    """
    source = inspect.getsource(module)
    found = re.findall(rf'{option} == "([\w-]+)"', source)
    for group in re.findall(rf"{option} (?:not )?in [\[({{]([^\])}}]*)[\])}}]", source):
        found += re.findall(r'"([\w-]+)"', group)
    return sorted(set(found))


LOSSES = choices(trl.trainer.dpo_trainer, "loss_type")
DIVERGENCES = choices(trl.trainer.dpo_trainer, "f_divergence_type")


def test_the_choices_were_found():
    """That the pattern reads TRL's source: 15 losses and 4 divergences in 1.16."""
    assert {"sigmoid", "aot_unpaired", "sft", "sigmoid_norm"} <= set(LOSSES) and len(LOSSES) >= 15
    assert {"reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"} <= set(DIVERGENCES)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_type_is_served(loss_type):
    smooth = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
    assert isinstance(preference.trl(loss_type, **smooth), rw.PairSpec)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_divergence_is_served_or_refused_as_trl_refuses_it(divergence, loss_type):
    """TRL computes log-ratios by a divergence for the losses of a difference; the
    others read the plain ones.
    """
    smooth = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
    try:
        spec = preference.trl(loss_type, f_divergence_type=divergence, **smooth)
    except rw.InvalidCall as error:
        assert "is defined for" in str(error) and divergence != "reverse_kl"
        assert loss_type in (
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
        )
    else:
        assert isinstance(spec, rw.PairSpec)


def test_every_option_of_the_loss_is_one_of_ours():
    """Those that change the loss: a new one of TRL's would be missing here."""
    ours = set(inspect.signature(preference.trl).parameters)
    source = inspect.getsource(trl.trainer.dpo_trainer.DPOTrainer._compute_loss)
    fields = {f.name for f in dataclasses.fields(DPOConfig)}
    read = set(re.findall(r"self\.(?:args\.)?(\w+)", source)) & fields
    # How, not what; and the auxiliary loss of a mixture of experts, which is the
    # model's own.
    outside = {
        "use_liger_kernel",
        "padding_free",
        "precompute_ref_log_probs",
        "gradient_checkpointing_kwargs",
        "router_aux_loss_coef",
    }
    assert {"beta", "label_smoothing"} <= read
    assert read - outside <= ours, read - outside - ours


#: The trainers beside it: every loss type, and what serves it.
BESIDE = {
    "kto": {"kto": lambda: rw.methods.kto(), "apo_zero_unpaired": lambda: rw.methods.kto(kl=0.0)},
    "cpo": {
        "sigmoid": lambda: preference.cpo(),
        "simpo": lambda: preference.simpo(),
        "alphapo": lambda: preference.alpha_po(alpha=0.25),
    },
    "tpo": {
        name: lambda name=name: preference.tpo(name)
        for name in ("sigmoid", "hinge", "ipo", "tpo-l")
    },
    "orpo": {},
}
#: Refused: the loss types that a trainer itself refuses, and compositions of what there
#: is.
REFUSED = {
    "cpo": {
        "kto_pair": "an error in TRL too: it sends to KTOTrainer",
        "hinge": "a term of one's own: PairSpec of preference.losses.Hinge with the score of `cpo`",
        "ipo": "a term of one's own: PairSpec of preference.losses.Ipo with the score of `cpo`",
    }
}


@pytest.mark.parametrize("name", BESIDE)
def test_every_loss_type_of_the_trainers_beside_it_is_served_or_refused(name):
    trainer = getattr(importlib.import_module(f"trl.experimental.{name}"), f"{name.upper()}Trainer")
    found = set(choices(inspect.getmodule(trainer), "loss_type"))
    assert found <= {*BESIDE[name], *REFUSED.get(name, {})}, found
    for make in BESIDE[name].values():
        assert isinstance(make(), (rw.PairSpec, rw.PolicyLossSpec))
