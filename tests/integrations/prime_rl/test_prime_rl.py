"""prime-rl's custom loss and fused head on our ops, against a transcription of what
prime-rl has around them. CPU.
"""

import importlib

import prime_rl_oracle as oracle
import pytest
import tomllib
import torch
from paths import ROOT

import reweight_ops as rw
from reweight_ops.rules.off_policy import DriftK2
from reweight_ops.rules.penalties import K3
from reweight_ops.rules.surrogates import Clip, DppoTV

PAGE = (ROOT / "docs" / "trainers" / "prime_rl.md").read_text()
LENGTHS = (19, 5, 32)


@pytest.fixture(scope="module")
def prime():
    with pytest.MonkeyPatch.context() as patch:
        oracle.install(patch)
        from reweight_ops.integrations import prime_rl

        yield prime_rl


def sample_streams(weighted=False):
    """Three packed samples, masked tokens whose sampler log-probs are NaN, and at least
    one masked token a sample.
    """
    g = torch.Generator().manual_seed(3)
    drawn = lambda scale=1.0: [scale * torch.randn(n, generator=g) for n in LENGTHS]  # noqa: E731
    logprobs = [(-1.5 * torch.rand(n, generator=g) - 0.05).requires_grad_() for n in LENGTHS]
    masks = [torch.rand(n, generator=g) > 0.25 for n in LENGTHS]
    masks[0][0] = masks[1][0] = masks[2][0] = False
    near = lambda: [  # noqa: E731
        (x.detach() + 0.5 * e).clamp(max=-1e-3) for x, e in zip(logprobs, drawn(), strict=True)
    ]
    weights = (
        [torch.rand(n, generator=g) * (torch.rand(n, generator=g) > 0.3) for n in LENGTHS]
        if weighted
        else None
    )
    return {
        "logprobs": logprobs,
        "inference": near(),
        "ref": near(),
        "advantages": drawn(),
        "masks": masks,
        "weights": weights,
    }


def run(fn, streams):
    value, metrics = oracle.compute_loss(fn, **streams, scale=57)
    return value.detach(), torch.cat(torch.autograd.grad(value, streams["logprobs"])), metrics


def assert_same(theirs, ours, value=True):
    assert theirs[1].norm() > 1e-3 and (theirs[1] - ours[1]).norm() <= 1e-6 * theirs[1].norm()
    if value:
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "rl_weights"])
def test_their_example_of_a_custom_loss(prime, weighted):
    """``my_module.ppo_clip_loss`` of prime-rl's page, by method and options."""
    streams = sample_streams(weighted)
    theirs = run(oracle.ppo_clip_loss, streams)
    ours = run(lambda inputs: prime.loss(inputs, method="ppo", options={"epsilon": 0.2}), streams)
    assert_same(theirs, ours)
    assert (
        ours[2]["clip_ratio/region_mean"].shape == (3,)
        and ours[2]["clip_ratio/region_mean"].max() > 0
    )
    assert "tokens" not in ours[2]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "rl_weights"])
def test_their_default_loss(prime, weighted):
    """``DefaultLossConfig``: the gradient; the value has the log-prob where theirs has
    the ratio.
    """
    spec = rw.PolicyLossSpec(
        surrogate=DppoTV(ratio_max=float("inf")),
        penalties=(rw.Penalty(DriftK2(), 2e-3, rw.TokenMean()),),
        name="default",
    )
    streams = sample_streams(weighted)
    theirs = run(oracle.default_loss, streams)
    assert theirs[2]["is_masked"].max() > 0
    assert_same(theirs, run(prime.loss_fn(spec), streams), value=False)


def test_sampler_log_probs_that_are_no_numbers_where_nothing_is_trained(prime):
    streams = sample_streams()
    clean = run(prime.loss_fn("dapo"), streams)
    streams["inference"] = [
        torch.where(m, x, torch.nan)
        for m, x in zip(streams["masks"], streams["inference"], strict=True)
    ]
    spoiled = run(prime.loss_fn("dapo"), streams)
    assert torch.equal(clean[0], spoiled[0]) and torch.equal(clean[1], spoiled[1])


def test_a_sample_without_tokens(prime):
    streams = sample_streams()
    streams["masks"][1] = torch.zeros(5, dtype=torch.bool)
    assert_same(run(oracle.ppo_clip_loss, streams), run(prime.loss_fn("ppo"), streams))


def test_a_sequence_ratio_and_the_references_log_probs(prime):
    """A sample is a sequence; penalties of the spec are the only ones."""
    spec = rw.PolicyLossSpec(
        surrogate=Clip(),
        ratio=rw.SequenceRatio(),
        penalties=(rw.Penalty(K3(), 0.1),),
        name="gspo_token_mean",
    )
    streams = sample_streams(weighted=True)

    def theirs(inputs):
        mask, d = inputs.loss_mask, inputs.ref_logprobs - inputs.trainer_logprobs
        drift = (
            torch.where(mask, inputs.trainer_logprobs - inputs.inference_logprobs, 0).sum()
            / mask.sum()
        )
        ratio = drift.exp()
        pg = -torch.min(ratio * inputs.advantages, ratio.clamp(0.8, 1.2) * inputs.advantages)
        return oracle.LossOutputs(
            ((pg + 0.1 * (d.exp() - 1 - d)) * inputs.loss_weights)[mask].sum(), {}
        )

    assert_same(run(theirs, streams), run(prime.loss_fn(spec), streams))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: p.loss_fn("grpo"),
            "prime-rl cannot train grpo: its reduction is not a token mean",
        ),
        (lambda p: p.loss_fn("decoupled_ppo"), "it reads sampling_logp beside old_logp"),
        (
            lambda p: p.loss_fn(rw.methods.dapo(entropy_coef=0.01)),
            "it reads entropy, which prime-rl does not pass to a loss",
        ),
        (lambda p: p.loss_fn("sft"), "it does not read advantages"),
        (
            lambda p: p.loss(None, method="kl_cov"),
            "it is of level batch, and one sample is not the batch",
        ),
        (
            lambda p: run(
                p.loss_fn(rw.methods.dapo().with_penalty(rw.Penalty(K3(), 0.1))),
                sample_streams() | {"ref": None},
            ),
            "the algorithm provides none",
        ),
    ],
)
def test_refusals(prime, make, message):
    with pytest.raises(rw.UnsupportedRequest, match=message):
        make(prime)


def test_unknown_options_are_errors(prime):
    with pytest.raises(TypeError, match="epsilon_higher"):
        run(
            lambda inputs: prime.loss(inputs, method="dapo", options={"epsilon_higher": 0.3}),
            sample_streams(),
        )


# --- the head -------------------------------------------------------------------------
def through(head, entropy_too=False):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 17, 24, generator=g).requires_grad_()
    labels, temperature = (
        torch.randint(51, (2, 17), generator=g),
        0.5 + torch.rand(2, 17, generator=g),
    )
    with torch.no_grad():
        head.weight.copy_(torch.randn(51, 24, generator=g))
    out = head(hidden, labels, temperature=temperature)
    share = torch.linspace(-1, 1, 34).view(2, 17)
    loss = (out["logprobs"] * share).sum() + (
        0.3 * (out["entropy"] * share.flip(-1)).sum() if entropy_too else 0
    )
    return out, torch.cat([x.flatten() for x in torch.autograd.grad(loss, (hidden, head.weight))])


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "gemma"])
def test_the_fused_head(prime, capped):
    head = (
        oracle.GemmaFusedOutputLinear(24, 51, 8, 5.0)
        if capped
        else oracle.FusedOutputLinear(24, 51, 8)
    )
    stock, grad = through(head)
    with prime.patch_head() as patch:
        ours, our_grad = through(head)
        assert patch.fused_calls == {"linear_token_logps": 1} and not patch.delegated_calls
        through(head, entropy_too=True)
        with pytest.raises(AssertionError, match="requires labels"):
            head(torch.zeros(1, 1, 24))
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(ours[name].detach(), stock[name].detach(), rtol=1e-6, atol=2e-6)
    assert grad.norm() > 1e-3 and (grad - our_grad).norm() <= 1e-6 * grad.norm()
    through(head)
    assert patch.fused_calls == {"linear_token_logps": 2}


def test_a_sharded_head_is_left_to_prime_rl_and_counted(prime, monkeypatch):
    head = oracle.FusedOutputLinear(24, 51, 8)
    stock, _ = through(head)
    monkeypatch.setattr(prime, "is_sharded", lambda weight: weight is head.weight)
    with (
        prime.patch_head() as patch,
        pytest.warns(UserWarning, match="leaves this to prime-rl: a head that is a DTensor"),
    ):
        ours, _ = through(head)
    assert patch.delegated_calls == {"a head that is a DTensor": 1} and not patch.fused_calls
    assert torch.equal(ours["logprobs"], stock["logprobs"])


def test_a_moved_head_is_refused(prime, monkeypatch):
    monkeypatch.setattr(oracle.FusedOutputLinear, "forward", lambda self, hidden: None)
    with pytest.raises(
        rw.BackendUnavailable, match=r"FusedOutputLinear\.forward has the signature"
    ):
        prime.patch_head()


# --- what the page says ---------------------------------------------------------------
def test_the_pages_configuration(prime):
    """Resolved as ``setup_rl_loss_fn`` does."""
    block = PAGE.split("```toml\n")[1].split("```")[0]
    config = tomllib.loads(block)["trainer"]["loss"]
    fn = oracle.import_object(config["import_path"])
    streams = sample_streams()
    ours = run(lambda inputs: fn(inputs, **config["kwargs"]), streams)
    assert_same(run(prime.loss_fn(rw.methods.advantage_reweighting(alpha=0.3)), streams), ours)


def test_the_example(prime, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("prime_rl_loss")
    try:
        assert oracle.import_object("prime_rl_loss.loss") is example.loss
        assert run(example.loss, sample_streams())[1].norm() > 1e-3
        through(oracle.FusedOutputLinear(24, 51, 8))
        assert example.PATCH.fused_calls == {"linear_token_logps": 1}
    finally:
        example.PATCH.undo()
