"""Every method that the plan names is found: as an entry of the catalogue, or among
those left out, with a reason that the command line shows.
"""

import pytest
from typer.testing import CliRunner

import reweight_ops as rw
from reweight_ops import cli
from reweight_ops._core.catalogue.left_out import LEFT_OUT

#: What trainers ship, in the plan's words; a pair has its own, and what it leads to.
TRAINERS = (
    "DPPO-KL", "DRO", "TOPR", "GLM-5", "Kimi k1.5", "OPMD", "REC (ring", "Kimi K2.5", "IPO mask", "decoupled PPO", "M2PO", "Clip-Cov", "KL-Cov", "TIS",
    "IcePop", "MIS", "geometric mask", "sequence TIS", "divergence-gated", "TRM", "FIPO", "IW-OPD", "CTPO", "RLSD", "SDAR", "STAPO", "TR-GRPO",
    "Straight-through KL", "VAPO", "two-sided clip", "adaptive entropy control", "CISPO", "ScaleRL", "Lite PPO", "DFT", "A*-PO", "MaxRL", "pass@k",
    "OTB", "TIR-OTB", "KTO", "TPO", "AlphaPO", "f-DPO", "AOT", "IRPO", "MPO", "REAL", "GPG", "on-policy distillation", "SDPO", "SDFT", "GOLD",
    "OPSD", "stable_reinforce", "Lp-Reg", "CaSP", "DVP", "VCPO", "SofT-GRPO",
)  # fmt: skip
#: What the survey papers name beside their own methods.
SURVEYS = (
    "deferred re-weighting", "class-balanced", "Even your Teacher Needs Guidance", "Distilling the Knowledge", "Upsample or Upweight", "Cooldown",
    "Bradley-Terry", "beta-DPO", "PSR-NSR", "AdaWAC", "ShrinkMatch", "WEAT", "KaLM", "LongAlign", "GSR", "RENT", "coreset", "RewardFusion", "ConvexDA",
    "WARM", "Ctrl-U", "Data Mixing Agent", "Aioli", "SuperHF", "GA + KL", "guided error correction", "soft reward", "question-answer inversion",
    "CANON", "burn-in", "dynamic sampling", "difficulty bands", "all-correct groups", "HAPO temperature", "Regret-loss", "Infra", "RICL",
)  # fmt: skip
#: What the abstracts of papers with an entry name beside the loss.
LEFT_OUT_BESIDES = (
    "BT",
    "LARICL",
    "DWS",
    "WorldPM",
    "DMoERM",
    "on-policy KL gradient",
    "2506.09477",
    "pre-sampling",
    "value pre-training",
    "gradient-free search",
    "bilevel updates",
    "⊥Grad",
    "compression",
)
#: Words of both lists that name a method in another way, and the call that each leads
#: to first; none of them is left out.
OTHERWISE = {
    "DPPO": "rw.methods.dppo_kl", "quadratic DRO": "rw.methods.dro", "DRO (quadratic)": "rw.methods.dro",
    "rollout_is": "rw.methods.glm5", "double-sided rollout mask": "rw.methods.glm5", "A2PO": "rw.methods.a_star_po",
    "sequence-masked TIS": "rw.weights.SequenceMaskedImportance", "seq-mask-TIS": "rw.weights.SequenceMaskedImportance",
    "geometric TIS": "rw.weights.GeometricSequenceMask", "binary-KL gate": "rw.weights.divergence_gate", "TV gate": "rw.weights.divergence_gate",
    "FlashREINFORCE": "rw.weights.divergence_gate", "VAPO's positive NLL": "rw.methods.vapo", "unpaired preference": "rw.methods.kto",
    "optimal token baseline": "rw.advantages.otb", "Upsample": "rw.sample_weights.upweight", "scalarisation": "rw.sample_weights.upweight",
    "first-inter-later-intra": "rw.schedules.canon", "adaptive temperature sampling": "rw.schedules.hapo_temperature",
    "Advantage Model": "rw.sample_weights.selective_rehearsal", "LDAM-DRW": "rw.schedules.drw", "SuperHF": "rw.divergences.superhf",
    "GRPO-SG": "rw.weights.TokenRegulation", "NPO + retain": "rw.methods.npo", "ScaleBiO": "rw.sample_weights.source_weights",
}  # fmt: skip
#: Left out: each has a line of LEFT_OUT. All others have an entry.
WITHOUT_ENTRY = {
    "REC (ring", "Straight-through KL", "SDPO", "SDFT", "GOLD", "OPSD", "stable_reinforce", "Lp-Reg", "CaSP", "DVP", "VCPO", "SofT-GRPO",
    "Even your Teacher Needs Guidance", "Bradley-Terry", "AdaWAC", "ShrinkMatch", "WEAT", "KaLM", "LongAlign", "GSR", "RENT", "coreset", "RewardFusion",
    "ConvexDA", "WARM", "Ctrl-U", "Data Mixing Agent", "Aioli", "GA + KL", "guided error correction", "question-answer inversion", "difficulty bands",
    "all-correct groups", "Regret-loss", "Infra", "RICL", "Cooldown", *LEFT_OUT_BESIDES,
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINERS + SURVEYS + LEFT_OUT_BESIDES)
def test_a_name_of_the_plan_is_found(name):
    hits = rw.find(name)
    if name in WITHOUT_ENTRY:
        (line,) = {line for line in LEFT_OUT if name.lower() in line.lower()}
        assert len(LEFT_OUT[line]) > 20
        assert [hit for hit in hits if not hit.call and LEFT_OUT[line] in hit.full_name], (
            "find shows the reason"
        )
    else:
        assert hits and hits[0].call and hits[0].why != "the nearest spelling"


@pytest.mark.parametrize("name", OTHERWISE)
def test_another_name_leads_to_its_entry(name):
    first = rw.find(name)[0]
    assert first.call == OTHERWISE[name] and first.why != "the nearest spelling"


def test_self_distillation_is_a_mixture_two_methods_and_a_weight_that_is_left_out():
    hits = rw.find("self-distillation")
    found = ["rw.methods.sdar", "rw.weights.SelfDistilledEvidence", "rw.divergences.kd"]
    assert [hit.call for hit in hits[:3]] == found
    assert [hit for hit in hits if not hit.call and "closed-form weight" in hit.full_name]


def test_the_command_line_shows_the_reason(monkeypatch):
    monkeypatch.setattr(cli, "console", cli.Console(width=400))
    found = CliRunner().invoke(cli.app, ["find", "AdaWAC"])
    assert found.exit_code == 0 and LEFT_OUT["AdaWAC"][:40] in found.stdout


def test_the_page_of_a_method_without_an_entry_is_the_reason(monkeypatch):
    monkeypatch.setattr(cli, "console", cli.Console(width=400))
    for name in ("AdaWAC", "Bradley-Terry", "GSR"):
        shown = CliRunner().invoke(cli.app, ["show", name])
        (reason,) = {LEFT_OUT[line] for line in LEFT_OUT if name in line}
        assert shown.exit_code == 0 and reason in shown.stdout
    unknown = CliRunner().invoke(cli.app, ["show", "xqzzt"])
    assert unknown.exit_code and "no entry" in unknown.output


#: Acronyms that other entries could take.
OWN = {
    "A*-PO": "rw.methods.a_star_po",
    "A*PO": "rw.methods.a_star_po",
    "APO": "rw.preference.apo",
    "M2PO": "rw.methods.m2po",
    "TOPR": "rw.methods.topr",
}


@pytest.mark.parametrize("name", OWN)
def test_an_acronym_leads_to_its_own_entry(name):
    assert rw.find(name)[0].call == OWN[name]
