"""Usual torch.compile code with ``fullgraph=True``: changing numbers, specs built
inside, metrics read inside.

A compilation is one graph. torch.compile treats the first value of a number as a
constant. Its second value makes it an input, in a second graph. ``dynamic=True`` makes
all numbers inputs at once.
"""

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

import reweight_ops as rw
from reweight_ops.testing import make_batch
from reweight_ops.testing.pairs import make_pairs

BATCH = make_batch(
    rw.methods.dapo().with_penalty(rw.Penalty(rw.rules.penalties.K3(), 0.1)), (8, 8), 29
)
LOGITS = BATCH.pop("logits").detach()
IDS, ADVANTAGES, MASK = BATCH["completion_ids"], BATCH["advantages"], BATCH["completion_mask"]
STORED = {
    name: BATCH[name]
    for name in BATCH
    if name not in ("completion_ids", "advantages", "ref_per_token_logps")
}
OTHER = LOGITS.roll(1, -1) * 0.7
HIDDEN, WEIGHT = (
    torch.randn(8, 8, 6, generator=torch.Generator().manual_seed(0)),
    LOGITS.reshape(-1)[: 29 * 6].view(29, 6),
)
PAIRS = make_pairs(rw.preference.dpo(), 4, 8, 29)
PAIR_LOGITS, REFERENCE = (
    PAIRS.pop("logits").detach(),
    {"ref_per_token_logps": PAIRS.pop("ref_per_token_logps")},
)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss(z, spec, **options):
    needed = (
        BATCH
        if "ref_logp" in spec.requires
        else STORED | {"completion_ids": IDS, "advantages": ADVANTAGES}
    )
    return rw.policy_loss(z, **needed, spec=spec, **options).loss


def linear(z, x, **options):
    hidden = HIDDEN + z[..., :6]
    return rw.linear_policy_loss(
        hidden, WEIGHT, IDS, ADVANTAGES, spec="dapo", logit_scale=x, completion_mask=MASK, **options
    ).loss


def pairs(z, spec, **stored):
    return rw.preference_loss(PAIR_LOGITS + z, **PAIRS, **stored, spec=spec).loss


def kl(coef):
    return rw.methods.dapo().with_penalty(rw.Penalty(rw.rules.penalties.K3(), coef))


#: Losses of the logits and a number. The numbers of every case lie in (0, 1).
NUMBERS = {
    "temperature": lambda z, x: loss(z, rw.methods.dapo(), temperature=x),
    "temperature, two_pass": lambda z, x: loss(
        z, rw.methods.dapo(), temperature=x, plan="two_pass"
    ),
    "temperature of log-probs": lambda z, x: rw.token_logps(z, IDS, temperature=x).mean(),
    "loss_scale": lambda z, x: loss(z, rw.methods.dapo(), loss_scale=x),
    "num_items_in_batch": lambda z, x: loss(z, rw.methods.dapo(), num_items_in_batch=x),
    "advantages": lambda z, x: rw.policy_loss(z, IDS, x, spec="reinforce").loss,
    "bound of a clip": lambda z, x: loss(z, rw.methods.dapo(epsilon_high=x)),
    "bound of a clip, two_pass": lambda z, x: loss(
        z, rw.methods.dapo(epsilon_low=x), plan="two_pass"
    ),
    "coefficient": lambda z, x: loss(z, kl(x)),
    "coefficient, two_pass": lambda z, x: loss(z, kl(x), plan="two_pass"),
    "replaced": lambda z, x: loss(z, rw.methods.grpo().replace(**{"surrogate.epsilon_low": x})),
    "weight": lambda z, x: loss(z, rw.methods.advantage_reweighting(alpha=x)),
    "weight over the batch": lambda z, x: loss(z, rw.methods.top_entropy(fraction=x)),
    "bound of a ratio": lambda z, x: loss(z, rw.methods.gspo().replace(**{"ratio.clamp": x})),
    "constraint": lambda z, x: loss(
        z,
        rw.methods.disco().replace(**{"penalties.0.reduction.bound": -x}),
        group_ids=torch.arange(8) // 2,
        num_groups=4,
    ),
    "horizon": lambda z, x: loss(z, rw.methods.dr_grpo(horizon=x)),
    "logit_scale": linear,
    "logit_scale, two_pass": lambda z, x: linear(z, x, plan="two_pass"),
    "temperature of a divergence": lambda z, x: rw.token_divergence(z, OTHER, temperature=x).mean(),
    "temperature of a teacher": lambda z, x: (
        rw.distillation_loss(z, OTHER, teacher_temperature=x).loss
    ),
    "mixture": lambda z, x: rw.token_divergence(z, OTHER, kind="generalized_jsd", beta=x).mean(),
    "beta of pairs": lambda z, x: pairs(z, rw.preference.dpo(beta=x), **REFERENCE),
    "target margin of pairs": lambda z, x: pairs(z, rw.preference.simpo(gamma=x)),
}
#: A case takes seconds to trace. The others are slow tests.
USUAL = (
    "temperature",
    "bound of a clip, two_pass",
    "coefficient",
    "weight",
    "logit_scale",
    "temperature of a divergence",
    "beta of pairs",
)
VALUES = (0.3, 0.2, 0.25, 0.4, 0.45)


def compare(function, compiled, *arguments):
    """Compare the loss and gradient of a compiled function with the function itself."""
    found = []
    for call in (function, compiled):
        z = LOGITS.clone().requires_grad_()
        value = call(z, *arguments)
        found.append((value.detach(), *torch.autograd.grad(value, z)))
    torch.testing.assert_close(found[1], found[0])
    return found[1]


def test_twice_is_pytorchs_own():
    """This is PyTorch's own: a plain number that multiplies a tensor is first a
    constant, and an input from its second value on.
    """
    counter = CompileCounter()
    compiled = torch.compile(lambda z, x: z * x, fullgraph=True, backend=counter)
    for x in VALUES:
        torch.testing.assert_close(compiled(LOGITS, x), LOGITS * x)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.slow) for n in NUMBERS]
)
def test_a_number_that_changes_compiles_twice(name):
    counter = CompileCounter()
    compiled = torch.compile(NUMBERS[name], fullgraph=True, backend=counter)
    seen = [compare(NUMBERS[name], compiled, x) for x in VALUES]
    assert counter.frame_count == 2
    assert any(not torch.equal(a[1], seen[0][1]) for a in seen[1:]), "the number has no effect here"


@pytest.mark.parametrize("name", ["bound of a clip, two_pass", "logit_scale"])
def test_numbers_are_inputs_at_once_where_all_are_dynamic(name):
    counter = CompileCounter()
    compiled = torch.compile(NUMBERS[name], fullgraph=True, dynamic=True, backend=counter)
    for x in VALUES:
        compare(NUMBERS[name], compiled, x)
    assert counter.frame_count == 1


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_numbers_through_the_compilers_own_middle(plan):
    """AOTAutograd decomposes and partitions what the counter above only runs."""

    def step(z, x):
        return loss(
            z, rw.methods.dapo(epsilon_high=x), temperature=x + 0.5, loss_scale=x, plan=plan
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for x in VALUES[:2]:
        compare(step, compiled, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in VALUES[2:]:
            compare(step, compiled, x)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("kind", ["numbers", "tensors"])
def test_a_spec_that_is_made_anew_for_each_step(kind, plan):
    """The spec is an argument of the compiled function; with tensors in it nothing is
    compiled again.
    """
    make = torch.tensor if kind == "tensors" else float

    def step(z, spec):
        return loss(z, spec, plan=plan)

    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    # more than the limit of 8
    specs = [
        rw.methods.grpo(epsilon_high=make(x), beta=make(x), entropy_coef=make(x / 10))
        for x in VALUES * 2
    ]
    seen = [compare(step, compiled, spec) for spec in specs]
    assert counter.frame_count == (1 if kind == "tensors" else 2)
    assert not torch.equal(seen[0][1], seen[1][1])


def test_a_spec_that_is_built_inside():
    def step(z):
        return loss(z, rw.methods.dapo())

    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for _ in range(3):
        compare(step, compiled)
    assert counter.frame_count == 1


def test_every_part_of_a_spec_is_built_inside():
    """Penalties, weights, a ratio, separate reductions and a schedule, in one graph."""

    def step(z, alpha):
        spec = rw.PolicyLossSpec(
            surrogate=rw.rules.surrogates.Clip(epsilon_low=0.2, epsilon_high=alpha),
            penalties=(
                rw.Penalty(rw.rules.penalties.K3(), 0.1),
                rw.Penalty(rw.rules.penalties.EntropyBonus(), 0.01, rw.TokenMean(per_call=True)),
            ),
            ratio=rw.SequenceRatio(),
            weights=(
                rw.weights.AdvantageReweighting(alpha=alpha),
                rw.weights.TopEntropy(fraction=0.5),
            ),
            reduction=rw.SequenceMean(),
        )
        return loss(z, spec)

    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for x in VALUES:
        compare(step, compiled, torch.tensor(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_metrics_that_are_read_inside(plan):
    def step(z):
        out = rw.policy_loss(z, **BATCH, spec=kl(0.1), plan=plan)
        return (
            out.loss,
            {
                name: out.metrics[name]
                for name in ("entropy", "kl", "ratio/max", "clip_ratio/low_min", "tokens")
            },
            out.ratio,
            out.is_clipped,
        )

    want = step(LOGITS.clone().requires_grad_())
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for _ in range(2):
        torch.testing.assert_close(compiled(LOGITS.clone().requires_grad_()), want)
    assert counter.frame_count == 1
