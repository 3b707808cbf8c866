"""Packed sequences and losses of log-probs on a device: the row kernels against the
padded layout, in a CUDA graph, and on offsets that nobody has read.
"""

import pytest
import torch
from places import DRY, captured, sized, synchronize

import reweight_ops as rw

pytestmark = pytest.mark.gpu

SPECS = {
    "dapo": rw.methods.dapo(),
    "grpo": rw.methods.grpo(beta=0.04),
    "gspo": rw.methods.gspo(),
    "ctpo": rw.methods.ctpo(),  # bounds and a ratio that run along sequences
    "opsm": rw.methods.opsm(threshold=0.05),  # a weight of sequences
    "m2po": rw.methods.m2po(),  # bounds of the whole batch, by its order
    "bounds of rows": rw.methods.opsm(threshold=0.05),  # and a clip bound for each row
    "disco": rw.methods.disco(),  # reductions that couple the sequences of a prompt
    "drpo": rw.methods.drpo(max_length=300),
    "real": rw.methods.real(),
    "runs of a prompt": rw.methods.scale_rl(group_size=2),
    "prompts": rw.methods.scale_rl(),
    "vapo": rw.methods.vapo(),
    "weighted sequences": rw.methods.dapo().replace(
        reduction=rw.SequenceMean(weight=rw.weights.SignWeight(positive=2.0, negative=0.5))
    ),
}
#: Losses in stages, whose kernels add in one order.
STAGED = ["ctpo", "opsm", "m2po", "bounds of rows"]
OPTIONS = {"unused": "ignore"}


def padded(place, vocab):
    """Sequences of several lengths, one of them empty, padded at their ends."""
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor(sized([300, 0, 1, 77], [5, 0, 1, 3]))
    shape = (len(lengths), int(lengths.max()))
    batch = {
        "logits": torch.randn(*shape, vocab, generator=g),
        "completion_ids": torch.randint(vocab, shape, generator=g),
        "completion_mask": torch.arange(shape[1]) < lengths[:, None],
        "old_per_token_logps": -2 - torch.rand(shape, generator=g),
        "ref_per_token_logps": -2 - torch.rand(shape, generator=g),
        "bounds": torch.rand(shape, generator=g) / 2,
        "group_ids": torch.tensor([1, 0, 1, 2]),
    }
    # a prompt has completions of both signs, also after a roll of the lengths
    advantages = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]) * torch.rand(
        len(lengths), 1, generator=g
    )
    return lengths, {k: v.to(place.device) for k, v in batch.items()}, advantages.to(place.device)


def packed(batch, lengths, after=2):
    """The same rows without padding, and ``after`` rows of no sequence."""
    keep = batch["completion_mask"]
    per_row = [k for k in batch if k not in ("completion_mask", "group_ids")]
    rows = {k: batch[k][keep][None] for k in per_row}
    rows = {k: torch.cat([v, v[:, :after]], 1) for k, v in rows.items()}
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
    return rows | {"cu_seqlens": offsets.to(keep.device), "group_ids": batch["group_ids"]}


def run(place, spec, batch, advantages, logps=None):
    data = {**batch, "advantages": advantages, "spec": SPECS[spec], **OPTIONS}
    bounds = data.pop("bounds")
    if spec == "bounds of rows":
        data["spec"] = SPECS[spec].replace(**{"surrogate.epsilon_low": bounds})
    if SPECS[spec].reads_groups:
        data["num_groups"] = 4
    else:
        del data["group_ids"]
    if logps is None:
        z = data.pop("logits").detach().requires_grad_()
        out = rw.policy_loss(z, backend=place.backend, **data)
    else:
        z = logps.detach().requires_grad_()
        data.pop("logits"), data.pop("completion_ids")
        out = rw.policy_loss_from_logps(z, **data)
    (grad,) = torch.autograd.grad(out.loss, z)
    return out, grad


@pytest.mark.parametrize("spec", SPECS)
def test_packed_is_padded_without_padding(place, spec):
    lengths, batch, advantages = padded(place, sized(4099, 17))
    want, expected = run(place, spec, batch, advantages)
    got, grad = run(place, spec, packed(batch, lengths), advantages)
    n = int(lengths.sum())
    torch.testing.assert_close(got.loss, want.loss, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(
        grad[0, :n], expected[batch["completion_mask"]], rtol=2e-4, atol=1e-7
    )
    assert not grad[0, n:].any()
    metrics = want.metrics.as_floats()
    assert got.metrics.as_floats() == pytest.approx(metrics, rel=1e-4, abs=1e-6, nan_ok=True)
    stored, _ = run(place, spec, batch, advantages, want.per_token_logps)
    torch.testing.assert_close(stored.loss, want.loss, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("from_logps", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_packed_sequences_in_a_graph(place, spec, from_logps):
    """Loss, backward and metrics, replayed with other offsets and values."""
    lengths, batch, advantages = padded(place, sized(4099, 17))
    rows = packed(batch, lengths)
    logps = -rows["old_per_token_logps"].abs() if from_logps else None

    def step():
        out, grad = run(place, spec, rows, advantages, logps)
        return out.loss.detach(), grad, out.metrics.sums

    replay, held = captured(step)
    before = [x.clone() for x in held]
    rows["cu_seqlens"].copy_(packed(batch, lengths.roll(2))["cu_seqlens"])
    advantages.neg_()
    for per_row in (logps if from_logps else rows["logits"], rows["bounds"]):
        per_row.mul_(0.9)
    replay()
    synchronize()
    got = [x.clone() for x in held]
    assert got[0] != 0 and not torch.equal(before[0], got[0])
    for a, b in zip(got, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("spec", STAGED)
def test_steps_of_training_in_a_graph(place, spec):
    """Loss, backward, metrics and an update in one graph: three replays, each with new
    data, give the bits of three eager steps.
    """
    lengths, batch, advantages = padded(place, sized(4099, 17))
    rows, first = packed(batch, lengths), advantages.clone()
    logits = rows["logits"].clone()

    def step():
        out, grad = run(place, spec, rows, advantages)
        found = out.loss.detach(), grad, out.metrics.sums
        rows["logits"].sub_(grad, alpha=50.0)
        return found

    def steps(one):
        found = []
        rows["logits"].copy_(logits)
        for k in range(3):
            rows["cu_seqlens"].copy_(packed(batch, lengths.roll(k))["cu_seqlens"])
            rows["bounds"].copy_(packed(batch, lengths)["bounds"] * (k + 1) / 3)
            advantages.copy_(first * (-1) ** k)
            found += [x.clone() for x in one()]
        synchronize()
        return [*found, rows["logits"].clone()]

    replay, held = captured(step)
    got, want = steps(lambda: (replay(), held)[1]), steps(step)
    assert not torch.equal(got[-1], logits)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(DRY, reason="the CPU reads offsets, and raises")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bad", [[0, 9, 3, 5, 8], [0, 1, 10**8, 2, 3], [-(10**8), 1, 2, 3, 4]])
def test_malformed_offsets_are_nan_and_touch_no_other_memory(place, spec, bad):
    lengths, batch, advantages = padded(place, sized(4099, 17))
    rows = packed(batch, lengths)
    rows["cu_seqlens"].copy_(torch.tensor(bad, dtype=torch.int32))
    out, grad = run(place, spec, rows, advantages)
    assert out.loss.isnan() and grad[grad != 0].isnan().all()
    stored, _ = run(place, spec, rows, advantages, rows["old_per_token_logps"])
    assert stored.loss.isnan()
    synchronize()
