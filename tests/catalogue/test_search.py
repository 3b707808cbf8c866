"""A reader of a paper finds its entry: by acronym as printed, arXiv id, title, or
words.
"""

import pytest
from typer.testing import CliRunner

import reweight_ops as rw
from reweight_ops import cli
from reweight_ops._core.catalogue.search import entries, exact

#: Acronyms as the papers print them, and where each leads.
ACRONYMS = {
    "AR": "methods.advantage_reweighting", "Lopti": "methods.lopti", "GRPO-LEAD": "advantages.grpo_lead", "LENS": "advantages.lens",
    "MAPO": "advantages.mapo_mixed", "AWM": "methods.awm", "AAPO": "advantages.aapo", "RECAP": "objectives.Recap", "LDAM": "methods.ldam",
    "QAE": "advantages.qae", "MADPO": "preference.madpo", "CANON": "advantages.canon", "CAPO": "schedules.capo", "PVPO": "advantages.pvpo",
    "NGRPO": "methods.ngrpo", "STEER": "weights.steer", "SPO": "advantages.spo_chain", "WPO": "preference.wpo", "HAPO": "methods.hapo",
    "GRPO-Guard": "methods.grpo_guard", "μ-PPO": "objectives.ConstrainedRLHF", "ξ-PPO": "objectives.ConstrainedRLHF", "DRPO": "methods.drpo",
    "ReMax": "advantages.remax", "VC-PPO": "advantages.decoupled_gae", "EDGE-GRPO": "advantages.edge_grpo", "GiGPO": "advantages.gigpo",
    "DPO^γ": "preference.dpo_gamma", "RankList": "preference.rank_list", "f-distill": "weights.f_distill", "PLD": "divergences.pld",
    "DHKD": "divergences.dhkd", "TW-GRPO": "weights.tw_grpo", "WAGLE": "methods.grad_diff", "MCTS-DPO": "preference.mcts_dpo",
    "D3S": "sample_weights.d3s", "GLOW": "sample_weights.glow", "SparsePO": "preference.sparse_po", "MaPO": "preference.sparse_po",
    "DatasetEquity": "sample_weights.focal", "ScaleBiO": "sample_weights.source_weights", "DreamPRM": "sample_weights.source_weights",
    "FamO2O": "sample_weights.exponential_advantage", "AWR": "sample_weights.exponential_advantage", "SuperHF": "divergences.superhf",
    "ReLIFT": "schedules.Relift", "SophiaVL-R1": "rewards.trust_grpo", "Trust-GRPO": "rewards.trust_grpo", "TRAAC": "rewards.traac",
    "LDR-KL": "divergences.ldr", "ALDR-KL": "divergences.aldr", "EnsLoss": "preference.ens_loss", "RPO": "preference.rpo",
    "SCIR": "preference.scir", "CREAM": "preference.cream", "INPO": "preference.inpo", "StableMax": "divergences.stablemax",
    "UDA": "divergences.confidence_masked_kl", "TSA": "weights.TrainingSignalAnnealing", "WCO": "rewards.wco", "UWO": "rewards.uwo",
    "GRPO-λ": "rewards.grpo_lambda_length", "RMT": "divergences.symmetric_cross_entropy", "LSC": "rewards.lsc", "RAFT": "sample_weights.raft",
    "DAPO": "methods.dapo", "GSPO": "methods.gspo", "CISPO": "methods.cispo", "DisCO": "methods.disco", "GMPO": "methods.gmpo",
    "M2PO": "methods.m2po", "CTPO": "methods.ctpo", "FIPO": "methods.fipo", "REAL": "methods.real", "RLSD": "weights.SelfDistilledEvidence",
    "SDAR": "methods.sdar", "IW-OPD": "methods.iw_opd", "A*-PO": "methods.a_star_po", "OTB": "advantages.otb", "TIR-OTB": "advantages.tir_otb",
    "KTO": "methods.kto", "TPO": "preference.tpo", "AlphaPO": "preference.alpha_po", "f-DPO": "preference.f_dpo", "LD-DPO": "preference.ld_dpo",
    "AOT": "preference.aot", "IRPO": "preference.irpo", "MPO": "preference.mpo", "MaxRL": "advantages.maxrl", "ScaleRL": "methods.scale_rl",
    "VAPO": "methods.vapo", "Lite PPO": "advantages.lite_ppo", "STAPO": "weights.SpuriousTokens", "TR-GRPO": "weights.TokenRegulation",
    "TRM": "weights.trm", "GLM-5": "methods.glm5", "INTELLECT-2": "methods.two_sided_clip", "Skywork-OR1": "schedules.AdaptiveEntropy",
}  # fmt: skip


@pytest.mark.parametrize("acronym", ACRONYMS)
def test_an_acronym_leads_to_its_entry(acronym):
    for text in (
        acronym,
        acronym.lower(),
        acronym.upper().replace("Λ", "λ").replace("Μ", "μ").replace("Ξ", "ξ"),
        acronym.replace("-", "_"),
    ):
        calls = [hit.call for hit in rw.find(text)]
        assert f"rw.{ACRONYMS[acronym]}" in calls[:4], (text, calls)
        if acronym not in ("MaPO", "ALDR-KL", "A*-PO"):
            assert f"rw.{ACRONYMS[acronym]}" in [entry.call for entry, _ in exact(text)], (
                "show finds it too"
            )


@pytest.mark.parametrize(
    "entry", [e for e in entries() if e.arxiv != "unknown"], ids=lambda e: f"{e.kind}/{e.name}"
)
def test_an_arxiv_id_and_a_title_lead_to_every_entry_of_a_paper(entry):
    for text in (
        entry.arxiv,
        f"arXiv:{entry.arxiv}",
        f"https://arxiv.org/abs/{entry.arxiv}",
        entry.paper,
        entry.paper.upper(),
    ):
        assert entry.call in [hit.call for hit in rw.find(text)], text


def test_words_of_a_title_and_what_is_left_out():
    assert rw.find("low-probability tokens")[0].arxiv == "2505.12929"
    assert "rw.weights.steer" in [hit.call for hit in rw.find("entropy change")]
    (hit,) = [hit for hit in rw.find("DrivingWorld") if not hit.call]
    assert "completion_mask" in hit.full_name and repr(hit).startswith("left out")


def test_entries_come_before_what_is_left_out_and_only_has_the_words():
    for words in ("reward model", "policy gradient", "distillation"):
        has_call = [bool(hit.call) for hit in rw.find(words)]
        assert True in has_call and False in has_call, words
        assert has_call == sorted(has_call, reverse=True), words


def test_a_name_that_is_left_out_comes_before_entries_with_its_words():
    for name in ("stable_reinforce", "GOLD", "WARM"):
        first, *others = rw.find(name)
        assert not first.call and others, name
    # not before an entry of that name
    assert rw.find("EDGE-GRPO")[0].call == "rw.advantages.edge_grpo"


def test_spelling_is_the_last_resort():
    assert [(hit.call, hit.why) for hit in rw.find("dapoo")][:1] == [
        ("rw.methods.dapo", "the nearest spelling")
    ]
    assert rw.find("zzzzqqqq") == []
    assert all(hit.why != "the nearest spelling" for hit in rw.find("dapo"))


def test_kinds_and_empty_texts():
    assert [hit.call for hit in rw.find("hapo", kind="advantage")] == ["rw.advantages.hapo"]
    with pytest.raises(rw.InvalidCall, match="kinds are"):
        rw.find("hapo", kind="loss")
    with pytest.raises(rw.InvalidCall, match="nothing to search for"):
        rw.find(" -- ")


@pytest.mark.parametrize(
    "name, hint",
    [
        ("GRPO", "Did you mean 'grpo'"),
        ("AR", "Did you mean 'advantage_reweighting'"),
        ("dual-clip-ppo", "Did you mean 'dual_clip_ppo'"),
        ("steer", r"with_weight\(rw.weights.steer"),
        ("STEER", r"with_weight\(rw.weights.steer"),
        ("dpo", "rw.preference.dpo is a pair loss"),
        ("canon", "rw.advantages.canon is an advantage"),
        ("zzzzqqqq", "rw.find"),
    ],
)
def test_a_wrong_name_of_a_spec_says_what_was_meant(name, hint):
    with pytest.raises(rw.InvalidCall, match=hint):
        rw.method(name)


@pytest.mark.parametrize(
    ("namespace", "name", "hint"),
    [
        (rw.methods, "AR", "Did you mean 'advantage_reweighting'"),
        (rw.methods, "steer", r"with_weight\(rw.weights.steer"),
        (rw.weights, "Steer", "Did you mean 'steer'"),
        (rw.advantages, "RLOO", "Did you mean 'rloo'"),
        (rw.preference, "DPO", "Did you mean 'dpo'"),
        (rw.divergences, "PLDD", "Did you mean 'pld'"),
        (rw.schedules, "zzzzqqqq", "rw.find"),
        (rw.rewards, "__wrapped__", "attribute '__wrapped__'$"),
    ],
)
def test_a_wrong_attribute_of_a_namespace_says_what_was_meant(namespace, name, hint):
    with pytest.raises(AttributeError, match=hint):
        getattr(namespace, name)


def test_the_name_of_a_recipe_leads_to_it():
    """Also if no entry has that name; then the recipe is the first hit."""
    assert rw.find("ar-lopti")[0].call == "rw.recipe('ar_lopti')"
    assert rw.find("hapo")[0].call == "rw.methods.hapo"
    assert all("recipe" not in hit.call for hit in rw.find("ar_lopti", kind="policy_loss"))
    with pytest.raises(rw.InvalidCall, match="Did you mean 'ar_lopti'"):
        rw.recipe("ar-lopt")


def test_the_command_line(monkeypatch):
    monkeypatch.setattr(cli, "console", cli.Console(width=200))
    runner = CliRunner()
    found = runner.invoke(cli.app, ["find", "low", "probability", "tokens"])
    assert (
        found.exit_code == 0
        and "rw.methods.advantage_reweighting" in found.stdout
        and "2505.12929" in found.stdout
    )
    assert runner.invoke(cli.app, ["find", "zzzzqqqq"]).exit_code == 1
    for text in ("AR", "grpo-lambda", "2510.10150", "Dual-Clip-PPO"):
        assert runner.invoke(cli.app, ["show", text]).exit_code == 0, text
