"""Losses whose middle row kernels evaluate on stored rows, against autograd in fp64:
weights of batch statistics, hyper-parameters of rows, coupled reductions, no reduction.
"""

import dataclasses
import math

import pytest
import torch
from stored_losses import LENGTHS, batch_of, found, same

import reweight_ops as rw
from reweight_ops._core.calls.specs import METHODS

pytest.importorskip("reweight_ops._C", exc_type=ImportError)

COUPLED = [name for name in METHODS if METHODS[name].build().is_coupled]


def scaled(batch):
    return {**batch, "loss_scale": 3.5, "token_weights": torch.rand(len(LENGTHS), 8) + 0.5}


@pytest.mark.parametrize("change", [dict, scaled], ids=["plain", "scaled"])
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_reductions(name, change):
    spec = METHODS[name].build()
    same(spec, change(batch_of(spec)))


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_reductions_of_unusual_rows(name):
    """A NaN in one row, an infinite log-prob, prompts of one side only."""
    spec = METHODS[name].build()
    batch = batch_of(spec, advantages=torch.ones(len(LENGTHS), 8))
    same(spec, batch)
    broken = batch_of(spec)
    broken["logits"] = broken["logits"].clone()
    broken["logits"][2, 3] = math.nan
    loss, grad, *_ = found(spec, broken, "cpu", torch.float32)
    _, want, *_ = found(spec, broken, "reference", torch.float64)
    assert loss.isnan() and grad[2, 3].isnan().all()
    assert torch.equal(grad.isnan().any(-1), want.isnan().any(-1))


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_reductions_with_weights(name):
    spec = METHODS[name].build()
    spec = spec.with_weight(rw.weights.CurrentAdvantageReweighting(scope="all"))
    spec = spec.with_weight(rw.weights.SequenceTruncatedImportance())
    same(spec, batch_of(spec))


def test_a_rule_that_does_not_show_a_nan_under_a_coupled_reduction():
    """A clip compares, and no comparison with NaN is true. Its prompt has one side."""
    coupled = rw.GroupContrast(group_size=2)
    spec = rw.methods.grpo().replace(reduction=coupled)
    broken = batch_of(spec)
    broken["logits"] = broken["logits"].clone()
    broken["logits"][4, 3] = math.nan  # both of its prompt have positive advantages
    loss, grad, rows, _ = found(spec, broken, "cpu", torch.float32)
    want, slope, expected, _ = found(spec, broken, "reference", torch.float64)
    assert loss.isnan() and want.isnan() and grad[4, 3].isnan().all()
    assert torch.equal(grad.isnan().any(-1), slope.isnan().any(-1))
    assert torch.equal(rows[:2].isnan(), expected[:2].isnan())


def test_a_penalty_beside_a_coupled_term():
    """Terms of which some are coupled, one with a coefficient of 0."""
    spec = rw.methods.grpo(beta=0.1, entropy_coef=0.3)
    hinge = rw.HingeConstraint(strength=50.0, bound=-3.0)
    penalty = dataclasses.replace(spec.penalties[0], reduction=hinge)
    for coef in (0.7, 0.0):
        with_hinge = dataclasses.replace(
            spec, penalties=(dataclasses.replace(penalty, coef=coef), *spec.penalties[1:])
        )
        assert with_hinge.is_coupled and with_hinge.stored_program is not None
        same(with_hinge, batch_of(with_hinge))


def test_second_derivatives_of_a_coupled_reduction():
    spec = METHODS["real"].build()
    batch, grads = batch_of(spec), []
    for backend in ("cpu", "reference"):
        z = batch["logits"].detach().clone().requires_grad_()
        out = rw.policy_loss(**{**batch, "logits": z}, spec=spec, backend=backend, unused="ignore")
        (slope,) = torch.autograd.grad(out.loss, z, create_graph=True)
        grads.append(torch.autograd.grad(slope.square().sum(), z)[0])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)
    assert grads[0].abs().sum() > 1e-4


@pytest.mark.parametrize("name", ["temperature", "length_temperature"])
@pytest.mark.parametrize("kind", [rw.GroupContrast, rw.GroupClassification])
def test_a_learnt_number_of_a_coupled_reduction(kind, name):
    """No row kernel knows its gradient, which is that of two losses nearby."""
    if kind is rw.GroupClassification and name == "length_temperature":
        pytest.skip("it has none")
    batch = batch_of(rw.methods.reinforce())
    batch["advantages"] = torch.tensor([1.0, -0.5, 0.7, -1.0, 0.3, -0.2])[:, None].expand(-1, 8)
    z = batch["logits"].double()

    def loss(value, backend="reference", logits=z):
        spec = rw.methods.reinforce().replace(reduction=kind(**{name: value}, group_size=6))
        data = {**batch, "logits": logits, "backend": backend, "unused": "ignore"}
        return rw.policy_loss(**data, spec=spec).loss

    slope = (loss(0.7 + 1e-5) - loss(0.7 - 1e-5)) / 2e-5
    assert slope.abs() > 1e-3
    for backend, logits in (("cpu", z.float()), ("reference", z)):
        value = torch.tensor(0.7, dtype=logits.dtype, requires_grad=True)
        (grad,) = torch.autograd.grad(loss(value, backend, logits), value)
        torch.testing.assert_close(grad.double(), slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_contrast_that_prefers_the_shortest_alone(backend):
    """exp(-L/(L_max·λ)) is 0 for every length, and a prompt's weights still sum to
    1.
    """
    batch = batch_of(rw.methods.reinforce())
    batch["advantages"] = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1.0])[:, None].expand(-1, 8)
    z = batch["logits"].detach().requires_grad_()
    contrast = rw.GroupContrast(length_temperature=1e-4, group_size=6)
    spec = rw.methods.sft().replace(reduction=contrast)
    data = {**batch, "logits": z, "backend": backend, "unused": "ignore"}
    (grad,) = torch.autograd.grad(rw.policy_loss(**data, spec=spec).loss, z)
    moved = [bool(rows.any()) for rows in grad]
    assert moved == [False, False, False, True, False, True]  # lengths of 4, 0, 8, 3, 7, 8


@pytest.mark.parametrize("ratio", [rw.TokenRatio(), rw.SequenceRatio()], ids=["token", "sequence"])
def test_no_reduction_takes_an_upstream_for_each_row(ratio):
    spec = rw.methods.grpo(beta=0.1).replace(reduction=rw.NoReduction(), ratio=ratio)
    upstream = torch.randn(len(LENGTHS), 8, generator=torch.Generator().manual_seed(1))
    same(spec, batch_of(spec), upstream)


def test_second_derivatives_without_a_reduction():
    spec = rw.methods.dapo().replace(reduction=rw.NoReduction())
    batch, grads = batch_of(spec), []
    for backend in ("cpu", "reference"):
        z = batch["logits"].detach().clone().requires_grad_()
        out = rw.policy_loss(**{**batch, "logits": z}, spec=spec, backend=backend)
        upstream = torch.linspace(0, 1, out.loss.numel()).view_as(out.loss)
        (slope,) = torch.autograd.grad(out.loss, z, upstream, create_graph=True)
        grads.append(torch.autograd.grad(slope.square().sum(), z)[0])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)
    assert grads[0].abs().sum() > 1e-4


PER_ROW = torch.linspace(0.05, 0.4, len(LENGTHS) * 8).view(len(LENGTHS), 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"surrogate.epsilon_low": PER_ROW},
        {"surrogate.epsilon_high": PER_ROW[:, :1]},
        {"surrogate.epsilon_high": rw.weights.TopEntropy(fraction=0.4)},
        {"surrogate.epsilon_low": rw.weights.Entropy(), "surrogate.epsilon_high": PER_ROW},
    ],
    ids=["tokens", "sequences", "a formula of the batch", "both"],
)
def test_hyper_parameters_of_rows(changes):
    spec = rw.methods.dapo().replace(**changes)
    assert spec.staged is not None
    same(spec, batch_of(spec))


def test_weights_with_hyper_parameters_of_rows_and_both_scopes():
    spec = rw.methods.grpo(beta=0.2, entropy_coef=0.1)
    nested = rw.weights.ProbabilityQuantile(
        quantile=0.3, below=rw.weights.TopEntropy(fraction=0.5), above=0.25
    )
    spec = spec.with_weight(nested)
    spec = spec.with_weight(rw.weights.SequenceTruncatedImportance(scope="all"))
    spec = spec.with_weight(rw.weights.CurrentAdvantageReweighting(scope="all"))
    assert spec.staged is not None and spec.staged.rows > 3
    same(spec, batch_of(spec))


def test_a_reduction_over_a_weight_of_the_batch():
    spec = rw.methods.grpo(entropy_coef=0.2)
    over = rw.TokenMean(weight=rw.weights.TopEntropy(fraction=0.4))
    penalties = (*spec.penalties[:-1], dataclasses.replace(spec.penalties[-1], reduction=over))
    spec = dataclasses.replace(
        spec, penalties=penalties, reduction=rw.SequenceMean(weight=over.weight)
    )
    assert spec.staged_weights is not None and spec.stored_program is not None
    same(spec, batch_of(spec))


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    "ratio", [rw.SequenceRatio(), rw.BatchMeanRatio(clamp=math.inf)], ids=["sequence", "batch"]
)
def test_a_reduction_over_the_ratio_of_other_rows(ratio):
    """Autograd evaluates a loss whose advantages require grad, not its row weights. The
    ratio of the batch is an expanded number.
    """

    @rw.weight
    class Ratio(rw.TokenWeight):
        def weight(self, xp, t, batch):
            return xp.exp(t.log_ratio)

    over = rw.TokenMean(weight=Ratio())
    spec = rw.methods.grpo().replace(ratio=ratio, reduction=over)
    same(spec, batch_of(spec))
    grads = []
    for backend in ("cpu", "reference"):
        batch = batch_of(spec)
        batch["advantages"] = batch["advantages"].clone().requires_grad_()
        out = rw.policy_loss(**batch, spec=spec, backend=backend, unused="ignore")
        grads.append(torch.autograd.grad(out.loss, batch["advantages"])[0])
    torch.testing.assert_close(*grads)


def test_what_only_autograd_can_do():
    """A weight with a gradient, and a hyper-parameter with one."""
    own = dataclasses.replace(rw.weights.OffPolicySequenceMask(threshold=0.1), detach=False)
    learnt = torch.full((len(LENGTHS), 8), 0.2, requires_grad=True)
    for spec in (
        rw.methods.dapo().with_weight(own),
        rw.methods.dapo().replace(**{"surrogate.epsilon_low": learnt}),
    ):
        assert spec.staged is None and spec.stored_program is None


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("ratio", [rw.TokenRatio(), rw.SequenceRatio()], ids=["token", "sequence"])
def test_a_statistic_of_the_ratio_itself(ratio):
    """The kernel forms the ratio of a token in the row, that of a sequence before."""

    @rw.weight
    class BelowMean(rw.TokenWeight):
        def weight(self, xp, t, batch):
            return xp.where(t.log_ratio <= batch.mean(t.log_ratio), 1.5, 0.5)

    spec = rw.methods.grpo().replace(ratio=ratio).with_weight(BelowMean())
    assert spec.staged is not None
    same(spec, batch_of(spec))


@pytest.mark.usefixtures("registry")
def test_what_a_statistic_is_of_keeps_its_gradient_in_the_rule():
    """The rule and its hyper-parameter have a part in common."""

    @rw.weight
    class MeanProbability(rw.TokenWeight):
        def weight(self, xp, t, batch):
            return batch.seq_mean(xp.exp(t.logp)) + xp.exp(t.logp)

    @rw.rule
    class Likelihood(rw.Rule):
        scale: float = 1.0

        def loss(self, xp, t):
            return -t.adv * self.scale * xp.exp(t.logp)

    spec = rw.PolicyLossSpec(surrogate=Likelihood(scale=MeanProbability()), name="likelihood")
    assert spec.staged is not None and spec.staged.rows == 3
    same(spec, batch_of(spec))


@pytest.mark.usefixtures("registry")
def test_a_statistic_takes_another_as_its_number():
    @rw.weight
    class Between(rw.TokenWeight):
        def weight(self, xp, t, batch):
            share = batch.mean(xp.where(t.adv > 0, 0.6, 0.3))
            return xp.where(t.logp < batch.quantile(t.logp, share), 0.5, 1.5) + batch.seq_cumsum(
                t.adv, share
            )

    @rw.weight
    class Computed(rw.TokenWeight):
        def weight(self, xp, t, batch):
            return batch.quantile(t.adv, 1 - batch.mean(xp.exp(-t.entropy)))

    spec = rw.methods.dapo().with_weight(Between())
    assert spec.staged is not None
    same(spec, batch_of(spec))
    computed = rw.methods.dapo().with_weight(Computed())
    assert computed.staged is None  # PyTorch's


@pytest.mark.usefixtures("registry")
def test_a_hyper_parameter_of_rows_that_nothing_reads():
    @rw.weight
    class Unread(rw.TokenWeight):
        a: float = 1.0

        def weight(self, xp, t, batch):
            return xp.exp(0.1 * t.adv)

    weight = Unread(a=PER_ROW)
    for spec in (
        rw.methods.dapo().with_weight(weight),
        rw.methods.dapo().replace(reduction=rw.TokenMean(weight=weight)),
    ):
        same(spec, batch_of(spec))


@pytest.mark.usefixtures("registry")
def test_weights_that_are_a_number():
    @rw.weight
    class Own(rw.TokenWeight):
        a: float = 0.75

        def weight(self, xp, t, batch):
            return self.a

    @rw.weight
    class Half(rw.TokenWeight):
        def weight(self, xp, t, batch):
            return 0.5

    spec = rw.methods.dapo()
    for changed in (
        spec.with_weight(Half()),
        spec.with_weight(Own()).with_weight(rw.weights.TopEntropy()),
        spec.with_weight(Own(a=Half())),
        spec.replace(reduction=rw.SequenceMean(weight=Own())),
        spec.replace(**{"surrogate.epsilon_high": Own(a=0.3)}),
    ):
        same(changed, batch_of(changed))


def test_a_ratio_that_the_rule_does_not_read():
    spec = rw.methods.reinforce().replace(ratio=rw.CenteredRatio(scale="std"))
    batch = batch_of(spec)
    batch["logits"] = batch["logits"].clone()
    batch["logits"][2, 3] = math.nan
    out = rw.policy_loss(**batch, spec=spec, backend="cpu", unused="ignore")
    assert int(out.coef.isnan().sum()) == 1


@pytest.mark.parametrize(
    "ratio", [rw.GeometricMeanRatio(token_advantages=True), rw.BatchMeanRatio(negative_only=True)]
)
def test_a_ratio_that_alone_reads_advantages(ratio):
    spec = rw.methods.sft().replace(ratio=ratio)
    assert "adv" in spec.requires
    same(spec, batch_of(spec))


def test_inference_mode_has_no_derivatives():
    spec = METHODS["real"].build()
    batch = batch_of(spec)
    with torch.inference_mode():
        out = rw.policy_loss(**batch, spec=spec, unused="ignore")
        assert out.loss.isfinite() and "rows_skipped" not in out.metrics
        with pytest.raises(rw.UnsupportedRequest, match="use torch.no_grad"):
            out.coef  # noqa: B018
    with torch.no_grad():
        out = rw.policy_loss(**batch, spec=spec, unused="ignore")
        assert out.coef.abs().sum() > 0 and "rows_skipped" in out.metrics
