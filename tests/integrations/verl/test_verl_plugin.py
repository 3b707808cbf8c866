"""Our losses under verl's registry, and its fused head, against verl's
own code. CPU."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
import tomllib
import torch
import verl_common
from paths import ROOT
from trainers import FOLDER
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl_common import (
    GLOBAL,
    LOCAL,
    assert_same,
    batch,
    config,
    core_algos,
    monkey_patch,
    policy_config,
    run,
    torch_functional,
    worker_losses,
)

import reweight_ops as rw
from reweight_ops.integrations import verl as integration
from reweight_ops.integrations.hosted import agg_mode
from reweight_ops.integrations.verl.losses import method_unsupported_reason

AGG = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
#: A mode of verl's registry, and the options of ours that say the same.
MODES = {
    "vanilla": {"clip_ratio_c": 3.0}, "gspo": {}, "sapo": {}, "gpg": {}, "cispo": {}, "dppo_tv": {"clip_ratio_c": 3.0}, "dppo_kl": {"clip_ratio_c": 3.0},
    "kl_cov": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.3}, "clip_cov": {"clip_cov_ratio": 0.4, "clip_cov_lb": 0.4}, "dro": {"dro_beta": 0.5},
    "geo_mean": {},
}  # fmt: skip


@pytest.fixture
def registry_restored():
    saved = dict(core_algos.POLICY_LOSS_REGISTRY)
    yield
    core_algos.POLICY_LOSS_REGISTRY.clear()
    core_algos.POLICY_LOSS_REGISTRY.update(saved)


def comparable(mode, agg, info):
    """Whatever the configuration says, verl reduces sapo in one way, and geo_mean over
    this call's sequences.
    """
    return mode not in ("sapo", "geo_mean") or (
        agg == "seq-mean-token-mean" and (mode == "sapo" or not info)
    )


CASES = [(m, a, i) for m in MODES for a in AGG for i in (LOCAL, GLOBAL) if comparable(m, a, i)]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "rollout_is"])
@pytest.mark.parametrize(
    ("mode", "agg", "info"),
    CASES,
    ids=[f"{m} {a} {'global' if i else 'local'}" for m, a, i in CASES],
)
def test_every_mode_of_verl_as_a_registered_spec(mode, agg, info, weighted, registry_restored):
    """``methods.verl`` under our registered function, beside verl's registered function
    of that mode.
    """
    data = batch(per_sequence=mode == "geo_mean")
    bounds = (
        {}
        if mode in ("gpg", "sapo", "dro", "kl_cov")
        else {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15}
    )
    policy = {
        name: value
        for name, value in MODES[mode].items()
        if name.startswith(("kl_cov", "clip_cov", "ppo_kl", "dro"))
    }
    theirs = run(
        core_algos.get_policy_loss_fn(mode),
        data,
        info,
        weighted,
        agg,
        policy_loss=policy_config(**policy),
        **bounds,
    )
    spec = rw.methods.verl(mode, loss_agg_mode=agg, unused="ignore", **bounds, **MODES[mode])
    (name,) = integration.register({"mine": spec})
    ours = run(core_algos.get_policy_loss_fn(name), data, info, weighted, agg)
    assert_same(theirs, ours)
    if mode in ("vanilla", "gspo") and not weighted:
        assert ours[2]["actor/ppo_kl"] == pytest.approx(theirs[2]["actor/ppo_kl"], rel=1e-5)
    if mode == "dppo_tv":
        assert ours[2]["actor/pg_clipfrac"] == pytest.approx(theirs[2]["actor/pg_clipfrac"])


def test_the_batch_meets_the_branches():
    """Clips, dropped and chosen tokens, or the comparison above would prove little."""
    data = batch()
    for mode in ("vanilla", "dppo_tv", "dppo_kl", "clip_cov"):
        policy = policy_config(clip_cov_ratio=0.4, clip_cov_lb=0.4)
        metrics = run(
            core_algos.get_policy_loss_fn(mode),
            data,
            clip_ratio_low=0.1,
            clip_ratio_high=0.15,
            policy_loss=policy,
        )[2]
        assert metrics["actor/pg_clipfrac"] > 0.01, mode
    candidates = core_algos.get_policy_loss_fn("clip_cov")
    torch.manual_seed(0)
    one = run(
        candidates,
        data,
        policy_loss=policy_config(clip_cov_ratio=0.4, clip_cov_lb=0.4),
        clip_ratio_low=0.1,
        clip_ratio_high=0.15,
    )
    torch.manual_seed(1)
    other = run(
        candidates,
        data,
        policy_loss=policy_config(clip_cov_ratio=0.4, clip_cov_lb=0.4),
        clip_ratio_low=0.1,
        clip_ratio_high=0.15,
    )
    assert torch.equal(one[1], other[1]), "verl's draw was random: the comparison above is of luck"


def test_every_method_of_a_token_or_sequence_has_a_name_or_a_reason(registry_restored):
    names = integration.register()
    reasons = integration.left_out()
    assert {n.removeprefix("rw_") for n in names} | set(reasons) == set(rw.METHODS) and len(
        names
    ) >= 15
    assert {"rw_dapo", "rw_gspo", "rw_gmpo", "rw_advantage_reweighting", "rw_opsm"} - set(
        names
    ) == {"rw_opsm"}
    for name, reason in {
        "opsm": "no default for threshold",
        "disco": "level group",
        "top_entropy": "reads entropy",
        "sft": "does not read advantages",
        "npo": "reads ref_logp",
        "clip_cov": "level batch",
    }.items():
        assert reason in reasons[name], (name, reasons[name])


@pytest.mark.parametrize(
    "name", sorted(n for n, e in rw.METHODS.items() if method_unsupported_reason(e) is None)
)
def test_every_registered_method_trains(name, registry_restored):
    """Called as verl calls it, by the counts of a global batch; the loss is the op's,
    and so is its gradient.
    """
    integration.register()
    spec = rw.METHODS[name].build()
    data = batch(per_sequence=name == "gmpo")
    agg = agg_mode(spec.reduction)
    loss, grad, metrics = run(
        core_algos.get_policy_loss_fn(f"rw_{name}"),
        data,
        {**GLOBAL, "loss_scale_factor": None},
        agg=agg,
    )
    weights = data["rollout_is_weights"]
    if name == "gmpo":
        mask = data["response_mask"]
        weights = torch.exp(
            (weights.log() * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        )
    advantages = data["advantages"][:, 0] if name == "gmpo" else data["advantages"]
    out = rw.policy_loss_from_logps(
        data["log_prob"],
        advantages,
        spec=spec,
        old_per_token_logps=data["old_log_prob"],
        completion_mask=data["response_mask"],
        importance_sampling_ratio=weights,
        unused="ignore",
        **(
            {"num_items_in_batch": 38.5} if agg == "token-mean" else {"num_sequences_in_batch": 5.5}
        ),
    )
    torch.testing.assert_close(loss, out.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        grad, torch.autograd.grad(out.loss, data["log_prob"])[0], rtol=1e-6, atol=1e-9
    )
    assert all(isinstance(v, float) for v in metrics.values())


@pytest.mark.parametrize(
    ("spec", "call", "error", "message"),
    [
        (rw.methods.grpo(beta=0.1), {}, rw.UnsupportedRequest, "it has penalties, and verl adds its own"),
        (rw.methods.disco(kl_strength=0.0), {}, rw.UnsupportedRequest, "its reduction"),
        (rw.methods.sft(), {}, rw.UnsupportedRequest, "does not read advantages"),
        (rw.methods.dapo(), {"agg": "token-sum"}, rw.InvalidCall, "set actor.loss_agg_mode=token-mean"),
        (rw.methods.dapo(), {"clip_ratio_high": 0.28}, rw.InvalidCall, "clip_ratio_high=0.28 would have no effect"),
        (rw.methods.dapo(), {"info": {"dp_size": 2}}, rw.InvalidCall, "the count of tokens over all 2 ranks is missing"),
        (rw.methods.dr_grpo(horizon=9), {"info": GLOBAL, "agg": "seq-mean-token-sum-norm"}, rw.InvalidCall, "divides by 9, actor.loss_scale_factor is 32"),
    ],
)  # fmt: skip
def test_refusals(spec, call, error, message):
    with pytest.raises(error, match=message):
        run(integration.loss_fn(spec), batch(), **call)


def test_nothing_is_registered_where_one_cannot_be(registry_restored):
    with pytest.raises(rw.UnsupportedRequest):
        integration.register({"good": rw.methods.dapo(), "bad": rw.methods.sft()})
    assert "good" not in core_algos.POLICY_LOSS_REGISTRY


def test_ppo_loss_of_the_worker(registry_restored):
    """verl's worker computes its whole loss with ours in it: entropy and KL are verl's,
    and its metric objects take our metrics.
    """
    integration.register({"rw_clip": rw.methods.verl("vanilla", clip_ratio=0.2)})
    data, g = batch(), torch.Generator().manual_seed(3)
    entropy, ref = (
        torch.rand(6, 10, generator=g),
        data["old_log_prob"] + 0.2 * torch.randn(6, 10, generator=g),
    )
    # What no_padding_2_padding makes of the engine's jagged outputs is tested by verl;
    # here they are padded already.
    fields = {
        "response_mask": data["response_mask"],
        "old_log_probs": data["old_log_prob"],
        "advantages": data["advantages"],
        "ref_log_prob": ref,
        "rollout_is_weights": data["rollout_is_weights"],
    }
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_losses, "no_padding_2_padding", lambda x, data: x)
        for mode in ("vanilla", "rw_clip"):
            td = verl_common.TensorDict(fields, batch_size=6)
            for key, value in (("dp_size", 2), ("batch_num_tokens", 77), ("global_batch_size", 11)):
                td.set_non_tensor(key, value)
            actor = config(
                policy_loss=policy_config(loss_mode=mode),
                use_kl_loss=True,
                kl_loss_coef=0.1,
                entropy_coeff=0.01,
            )
            loss, metrics = worker_losses.ppo_loss(
                actor, {"log_probs": data["log_prob"], "entropy": entropy}, td
            )
            results.append((loss.detach(), torch.autograd.grad(loss, data["log_prob"])[0], metrics))
    assert_same(*results)
    for name in ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_loss", "kl_loss"):
        assert name in results[1][2], name


# --- the fused head -------------------------------------------------------------------
class FusedQwen2(Qwen2ForCausalLM):
    """verl replaces the forward of a model's class: of this one, which no other test
    has.
    """


def qwen():
    torch.manual_seed(0)
    model = FusedQwen2(
        Qwen2Config(
            vocab_size=515,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    monkey_patch.patch_forward_with_backends(
        model, use_fused_kernels=True, fused_kernels_backend="torch"
    )
    return model


def through_the_model(model, temperature):
    ids = torch.randint(0, 515, (1, 40), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    # two packed sequences
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    out = model(
        input_ids=ids,
        attention_mask=None,
        position_ids=positions,
        return_dict=True,
        temperature=temperature,
        use_cache=False,
    )
    g = torch.linspace(-1, 1, 40)[None]
    ((out.log_probs * g).sum() + 0.3 * (out.entropy * g.flip(-1)).sum()).backward()
    return (
        out.log_probs.detach(),
        out.entropy.detach(),
        torch.cat([p.grad.flatten() for p in model.parameters()]),
    )


def test_fused_linear():
    model = qwen()
    stock = through_the_model(model, 0.7)
    with integration.patch_fused_linear() as patch:
        ours = through_the_model(model, 0.7)
        assert patch.fused_calls == {"linear_token_logps": 1} and patch.delegated_calls == {}
        # verl takes one temperature for all; the op one a row.
        rows = through_the_model(model, torch.full((1, 40), 0.7))
    for other in (ours, rows):
        for a, b in zip(stock, other, strict=True):
            assert a.norm() > 1e-3 and (a - b).norm() <= 1e-6 * a.norm()
    through_the_model(model, 0.7)
    assert patch.fused_calls == {"linear_token_logps": 2}


def test_fused_linear_of_the_liger_backend_and_two_dimensions():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 16, generator=g), torch.randn(40, 16, generator=g)
    ids = torch.randint(40, (9,), generator=g, dtype=torch.int32)
    stock = torch_functional.FusedLinearForPPO().forward(hidden, weight, ids, 0.8)
    with integration.patch_fused_linear(backend="reference"):
        ours = torch_functional.FusedLinearForPPO(impl_backend="liger").forward(
            hidden, weight, ids, 0.8
        )
    for a, b in zip(stock, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_moved_head_is_refused(monkeypatch):
    monkeypatch.setattr(
        torch_functional.FusedLinearForPPO, "forward", lambda self, hidden, weight: None
    )
    with pytest.raises(
        rw.BackendUnavailable, match=r"FusedLinearForPPO\.forward has the signature"
    ):
        integration.patch_fused_linear()


# --- the entry point ------------------------------------------------------------------
LOADS = """
import sys, warnings
sys.path.append({folder!r}); sys.path.append({support!r})
warnings.simplefilter("error", UserWarning)
from trainers import stand_ins
with stand_ins("ray"):
    import verl
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
print(get_policy_loss_fn("rw_dapo").__module__, get_policy_loss_fn("likely_tokens_first").__module__, FusedLinearForPPO.forward.__module__)
print(get_adv_estimator_fn("rw_qae").__module__)
"""


def test_verl_loads_the_plugin_by_its_entry_point(tmp_path):
    """In a process of its own, while verl itself is being imported; so is the example's
    module.
    """
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "verl.plugins"
    ]
    info = tmp_path / "plugin-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[verl.plugins]\n" + "".join(f"{k} = {v}\n" for k, v in points.items())
    )
    paths = [str(ROOT), str(tmp_path), str(ROOT / "examples")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "VERL_USE_EXTERNAL_MODULES": "verl_external",
    }
    code = LOADS.format(folder=str(FOLDER), support=str(ROOT / "tests" / "support"))
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    ours = "reweight_ops.integrations.verl"
    assert result.stdout.split() == [
        f"{ours}.losses",
        f"{ours}.losses",
        ours,
        f"{ours}.advantages",
    ], result.stderr
    for value in points.values():
        assert importlib.metadata.EntryPoint("reweight_ops", value, "verl.plugins").load()
