"""Wrong calls are errors of the right class that say what was got, what was expected,
and what to do (docs/api.md).
"""

import pytest
import torch

import reweight_ops as rw
from reweight_ops._core.calls.keywords import (
    ALIASES,
    LMHeadKeywords,
    PolicyKeywords,
    PolicyOptions,
    SoftmaxKeywords,
    SoftmaxOptions,
)

Z = torch.randn(2, 3, 7)
IDS = torch.randint(7, (2, 3))
ADV = torch.randn(2, 3)


def policy(z=Z, ids=IDS, adv=ADV, spec="grpo", **options):
    return rw.policy_loss(z, ids, adv, spec=spec, **options)


WRONG = {
    "advantages (2, 4)": (dict(adv=torch.ones(2, 4)), r"advantages has shape \(2, 4\).*expected \(2, 3\) per token, or \(2,\) or \(2, 1\) per sequence.*\[logits \(2, 3, 7\) fp32 cpu"),
    "advantages (3,)": (dict(adv=torch.ones(3)), "advantages has shape"),
    "advantages (1, 3)": (dict(adv=torch.ones(1, 3)), "advantages has shape"),
    "advantages missing": (dict(adv=None), "'clip' reads advantages"),
    "advantages missing for a ratio": (dict(adv=None, spec=rw.methods.sft().replace(ratio=rw.BatchMeanRatio(negative_only=True))), "the spec reads advantages, which is None"),
    "advantages a list": (dict(adv=[1, 2]), "advantages is a list"),
    "one position more": (dict(z=torch.randn(2, 4, 7)), r"logits has 4 positions, completion_ids 3: pass drop_last=True \(no copy in backward\), or logits\[:, :-1\]"),
    "drop_last for nothing": (dict(drop_last=True), "they match already"),
    "rank": (dict(z=torch.randn(6, 7)), "logits has shape"),
    "no rows dimension": (dict(z=torch.randn(7), ids=torch.tensor(1)), "no dimension"),
    "float ids": (dict(ids=IDS.float()), "completion_ids are torch.float32, expected int32 or int64"),
    "int logits": (dict(z=Z.long()), "logits are torch.int64"),
    "logits a list": (dict(z=[1.0]), "logits is a list"),
    "transposed": (dict(z=torch.randn(2, 7, 3).transpose(1, 2)), "last dimension of logits is not contiguous"),
    "vocab_size": (dict(vocab_size=8), "vocab_size is 8, logits have 7 columns"),
    "temperature 0": (dict(temperature=0.0), r"temperature is 0.0, expected a number in \(0, inf\)"),
    "temperature shape": (dict(temperature=torch.ones(5)), "temperature has shape"),
    "softcap": (dict(softcap=-1.0), "softcap is -1.0"),
    "bf16 old": (dict(old_per_token_logps=ADV.bfloat16()), r"old_per_token_logps is torch.bfloat16.*\.float\(\)"),
    "old with grad": (dict(old_per_token_logps=ADV.clone().requires_grad_()), "old_per_token_logps requires grad"),
    "ratio with grad": (dict(importance_sampling_ratio=ADV.clone().requires_grad_()), "importance_sampling_ratio requires grad"),
    "mask shape": (dict(completion_mask=torch.ones(2, 1)), r"completion_mask has shape \(2, 1\), expected \(2, 3\)"),
    "denominator shape": (dict(denominator_mask=torch.ones(6)), "denominator_mask has shape"),
    "no reference": (dict(spec=rw.methods.grpo(beta=0.1)), "the penalty 'k3' needs ref_per_token_logps"),
    "no sampling": (dict(spec=rw.methods.grpo().with_weight(rw.weights.TruncatedImportance())), "truncated_importance.*needs sampling_per_token_logps"),
    "no sequences": (dict(z=Z.view(6, 7), ids=IDS.view(6), adv=ADV.view(6), spec="gspo"), "SequenceRatio needs sequences|SequenceMean needs sequences"),
    "no horizon": (dict(z=Z.view(6, 7), ids=IDS.view(6), adv=1.0, spec="dr_grpo", cu_seqlens=torch.tensor([0, 6])), "no padded length: give horizon"),
    "no segments": (dict(spec=rw.methods.gspo().replace(ratio=rw.SegmentRatio())), "SegmentRatio needs segment_ids"),
    "num_items with a sequence mean": (dict(num_items_in_batch=3), "SequenceMean divides by num_sequences_in_batch; num_items_in_batch would have no effect"),
    "num_sequences with a token mean": (dict(spec="dapo", num_sequences_in_batch=3), "TokenMean divides by num_items_in_batch; num_sequences_in_batch would have no effect"),
    "num_items with a sum": (dict(spec=rw.methods.dapo().replace(reduction=rw.TokenSum()), num_items_in_batch=3), "TokenSum has no divisor"),
    "num_items shape": (dict(spec="dapo", num_items_in_batch=torch.ones(2)), "num_items_in_batch has shape"),
    "loss_scale shape": (dict(loss_scale=torch.ones(2, 3)), "loss_scale has shape"),
    "cu and ids": (dict(cu_seqlens=torch.tensor([0, 6]), sequence_ids=IDS, num_sequences=2), "not both"),
    "sequence_ids alone": (dict(sequence_ids=IDS), "go together"),
    "cu with padded rows": (dict(cu_seqlens=torch.tensor([0, 3, 6])), "packed rows"),
    "cu dtype": (dict(z=Z.view(6, 7), ids=IDS.view(6), adv=1.0, cu_seqlens=torch.tensor([0.0, 6.0])), "cu_seqlens must be int32 or int64"),
    "S == N": (dict(z=Z.view(6, 7), ids=IDS.view(6), adv=1.0, cu_seqlens=torch.arange(7), token_weights=torch.ones(7)), "token_weights has shape"),
    "unknown method": (dict(spec="dappo"), "no policy loss 'dappo'. Did you mean 'dapo'"),
    "spec a dict": (dict(spec={}), "expected a PolicyLossSpec or the name"),
    "plan": (dict(plan="three_pass"), "plan is 'three_pass', expected one of auto, one_pass, two_pass"),
    "backend": (dict(backend="tpu"), "unknown backend 'tpu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    options, message = WRONG[name]
    with pytest.raises(rw.InvalidCall, match=message):
        policy(**options)


def test_classes_derive_from_what_a_caller_would_catch():
    assert (
        issubclass(rw.InvalidCall, ValueError)
        and issubclass(rw.UnsupportedRequest, NotImplementedError)
        and issubclass(rw.BackendUnavailable, ImportError)
    )
    assert all(
        issubclass(c, rw.ReweightOpsError)
        for c in (rw.InvalidCall, rw.UnsupportedRequest, rw.BackendUnavailable)
    )


def test_per_sequence_values_where_sequences_are_as_many_as_rows():
    """[S] is refused when S == N because it could be per token; this op reads it as per
    token.
    """
    z, ids = Z.view(6, 7), IDS.view(6)
    per_row = torch.arange(6.0)
    out = rw.policy_loss(z, ids, per_row, spec="reinforce", cu_seqlens=torch.arange(7))
    torch.testing.assert_close(out.per_token_loss, -per_row * out.per_token_logps)


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ("old_log_prob", "Here it is old_per_token_logps"),
        ("response_mask", "Here it is completion_mask"),
        ("epsilon", "methods.grpo"),
        ("loss_type", "methods.trl"),
        ("tempreature", "Did you mean temperature"),
        ("inplace", "consume_logits"),
        ("zzz", r"argument 'zzz'\.$"),
    ],
)
def test_unknown_keywords_name_ours(keyword, hint):
    with pytest.raises(TypeError, match=hint):
        policy(**{keyword: 1})


def test_unknown_keywords_of_the_other_ops():
    for op, args in (
        (rw.token_logps, (Z, IDS)),
        (rw.token_stats, (Z, IDS)),
        (rw.explain, (rw.policy_loss, Z, IDS, ADV)),
    ):
        with pytest.raises(TypeError, match="Did you mean temperature"):
            op(*args, temperatur=1.0, **({"spec": "grpo"} if op is rw.explain else {}))
    with pytest.raises(
        TypeError, match="policy_loss_from_logps.*unexpected keyword argument 'temperature'"
    ):
        rw.policy_loss_from_logps(ADV, ADV, spec="grpo", temperature=1.0)


def test_keyword_tables_agree():
    assert set(SoftmaxKeywords.__annotations__) == set(SoftmaxOptions.__dataclass_fields__)
    assert set(PolicyKeywords.__annotations__) == set(PolicyOptions.__dataclass_fields__)
    known = {
        *SoftmaxKeywords.__annotations__,
        *PolicyKeywords.__annotations__,
        *LMHeadKeywords.__annotations__,
        "completion_ids",
        "spec",
        "advantages",
        "per_token_logps",
        "hidden",
        "lm_head_weight",
    }
    assert all(
        target.split("=")[0].split(",")[0] in known for target in ALIASES.values()
    ) and not known & set(ALIASES)


def test_a_named_backend_never_falls_back():  # docs/semantics.md: S18
    with pytest.raises(
        (rw.BackendUnavailable, rw.UnsupportedRequest), match="'cuda' was asked for"
    ):
        policy(backend="cuda")


def test_the_environment_names_a_backend(monkeypatch):
    monkeypatch.setenv("REWEIGHT_OPS_BACKEND", "reference")
    assert policy().backend == "reference"
    monkeypatch.setenv("REWEIGHT_OPS_BACKEND", "cuda")
    with pytest.raises((rw.BackendUnavailable, rw.UnsupportedRequest), match="cuda"):
        policy()


def test_impossible_plans_say_why():
    for spec, why in (
        ("gspo", "sequence level"),
        ("top_entropy", "batch statistics"),
        (rw.methods.grpo().replace(reduction=rw.NoReduction()), "not reduced"),
    ):
        with pytest.raises(rw.UnsupportedRequest, match=why):
            policy(Z.clone().requires_grad_(), spec=spec, plan="one_pass")


def test_tensor_subclasses_are_refused():
    class Sub(torch.Tensor):
        pass

    with pytest.raises(rw.UnsupportedRequest, match="logits is a Sub"):
        policy(Z.as_subclass(Sub))
    policy(torch.nn.Parameter(Z))


def test_process_group_is_not_ignored():
    with pytest.raises(
        rw.InvalidCall, match="process_group is a object, expected a torch.distributed.ProcessGroup"
    ):
        policy(process_group=object())


def test_wrong_specs():
    clip, k3 = rw.rules.surrogates.Clip(), rw.rules.penalties.K3()
    for fields, why in (
        (dict(surrogate=k3), "is a penalty"),
        (dict(surrogate=clip, penalties=(rw.Penalty(clip, 1.0),)), "kind 'penalty'"),
        (dict(surrogate=clip, penalties=(k3,)), "expected Penalty"),
        (dict(surrogate=clip, weights=(k3,)), "expected a TokenWeight"),
        (dict(surrogate=clip, ratio="token"), "expected a Ratio"),
        (dict(surrogate=clip, reduction="mean"), "expected a Reduction"),
        (
            dict(
                surrogate=clip,
                reduction=rw.NoReduction(),
                penalties=(rw.Penalty(k3, 1.0, rw.TokenMean()),),
            ),
            "exclude each other",
        ),
    ):
        with pytest.raises(rw.InvalidCall, match=why):
            rw.PolicyLossSpec(**fields)
    for make, why in (
        (lambda: rw.SequenceMean(per="mean"), "per is 'mean'"),
        (lambda: rw.SequenceMean(count="some"), "count is 'some'"),
        (lambda: rw.SequenceMean(horizon=3), "horizon has no effect"),
        (lambda: rw.SequenceRatio(gradient="none"), "gradient is 'none'"),
        (lambda: rw.weights.TopEntropy(scope="kl"), "scope is 'kl'"),
        (lambda: rw.methods.trl("vespoo"), "loss_type is 'vespoo'"),
        (lambda: rw.methods.trl("dr_grpo"), "max_completion_length"),
        (lambda: rw.methods.verl("clip_cow"), "loss_mode is 'clip_cow'"),
        (lambda: rw.methods.verl(loss_agg_mode="mean"), "loss_agg_mode is 'mean'"),
        (lambda: rw.methods.verl(loss_scale_factor=8), "no effect"),
        (lambda: rw.methods.verl(use_kl_loss=True, kl_loss_type="k4"), "kl_loss_type is 'k4'"),
        (lambda: rw.methods.lopti("middle"), "half is 'middle'"),
        (lambda: rw.methods.lopti(split="median"), "split is 'median'"),
        (lambda: rw.schedules.lopti("random"), "order is 'random'"),
        (lambda: rw.methods.advantage_reweighting(probabilities="new"), "probabilities is 'new'"),
        (lambda: rw.methods.dapo().replace(epsilon=1), "has no field 'epsilon'"),
        (lambda: rw.methods.dapo().replace(**{"penalties.0.coef": 1}), "not a position"),
    ):
        with pytest.raises(rw.InvalidCall, match=why):
            make()


def test_stats_are_checked():
    for stats in (("logp",), (), "logps"):
        with pytest.raises(rw.InvalidCall, match="expected some of"):
            rw.token_stats(Z, IDS, stats=stats)


def test_from_function_must_return_a_number():
    with pytest.raises(rw.InvalidCall, match="expected one number"):
        policy(
            spec=rw.methods.grpo().replace(
                reduction=rw.FromFunction(lambda loss, mask: loss.sum(-1))
            )
        )


def test_explain_runs_nothing_and_takes_meta_tensors():
    z = torch.empty(4, 8, 1 << 17, device="meta", requires_grad=True)
    ids = torch.empty(4, 8, dtype=torch.long, device="meta")
    one = rw.explain(rw.policy_loss, z, ids, 1.0, spec="grpo", device="cpu")
    two = rw.explain(rw.policy_loss, z, ids, 1.0, spec="gspo", device="cpu")
    assert (
        one.plan == "one_pass"
        and one.one_pass_unsupported_reason is None
        and "one_pass" in str(one)
    )
    assert (
        two.plan == "two_pass"
        and "sequence level" in two.one_pass_unsupported_reason
        and "sequence level" in str(two)
    )
    assert set(one.backends) == set(rw.BACKENDS) and one.backends["cuda"]
    assert rw.explain(rw.token_logps, z, ids, return_entropy=True, device="cpu").plan == "two_pass"
    with pytest.raises(
        rw.InvalidCall, match="expected one of distillation_loss, linear_distillation_loss"
    ):
        rw.explain(print, z)
