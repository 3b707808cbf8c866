"""The sets that a sampler keeps, computed from its logits, against a transcription of
vLLM's sampler.
"""

import pytest
import torch
from sampling_rows import kept_batch

import reweight_ops as rw


def vllm(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """vLLM's order of a request's settings, one row at a time: temperature, min-p,
    top-k, top-p.

    Ids whose logits stay finite may be sampled.
    """
    kept = []
    for i, z in enumerate(logits.float()):
        t, k, p, m = (
            x if not isinstance(x, torch.Tensor) else x[i]
            for x in (temperature, top_k, top_p, min_p)
        )
        z = z / t
        if m is not None:
            probability = z.softmax(-1)
            z[probability < probability.max() * m] = -torch.inf
        order = sorted(range(len(z)), key=lambda v: z[v].item())  # ascending and stable
        if k is not None and int(k) > 0:
            kth = z[order[len(order) - min(int(k), len(order))]]
            z[z < kth] = -torch.inf
            order = sorted(range(len(z)), key=lambda v: z[v].item())
        if p is not None:
            cumulative = z[order].softmax(-1).cumsum(-1)
            limit = 1 - torch.as_tensor(p, dtype=torch.float32)
            for at, v in enumerate(order[:-1]):
                if cumulative[at] <= limit:
                    z[v] = -torch.inf
        kept.append(z > -torch.inf)
    return torch.stack(kept)


def dense(kept, shape, vocab):
    mask = torch.zeros(*shape, vocab, dtype=torch.bool).view(-1, vocab)
    for i, (a, b) in enumerate(zip(kept.offsets[:-1], kept.offsets[1:], strict=True)):
        assert kept.token_ids[a:b].diff().gt(0).all()  # ascending, like vLLM's
        mask[i, kept.token_ids[a:b].long()] = True
    return mask


def rows(n, vocab, ties, dtype):
    g = torch.Generator().manual_seed(n)
    z = 2 * torch.randn(n, vocab, generator=g)
    z = (z * 2).round() / 2 if ties else z
    z[1, ::3] = -torch.inf
    return z.to(dtype)


SETTINGS = [
    {"top_k": 5}, {"top_k": 1}, {"top_k": 0}, {"top_k": 99}, {"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 1e-6}, {"top_p": 1e-9}, {"top_p": 1.0}, {"min_p": 0.2},
    {"min_p": 0.0}, {"top_k": 7, "top_p": 0.8, "min_p": 0.05, "temperature": 0.6},
    {"top_k": torch.tensor([1, 3, -1, 20, 4, 2]), "top_p": torch.tensor([1.0, 0.5, 0.9, 0.2, 1.0, 0.7]), "min_p": torch.linspace(0, 0.5, 6),
     "temperature": torch.linspace(0.4, 1.6, 6)},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_as_vllm(settings, ties, dtype, monkeypatch):
    # four rows at a time
    monkeypatch.setitem(rw._core.calls.sampled._BLOCK, "cpu", 4 * 23)
    z = rows(6, 23, ties, dtype)
    kept = rw.SamplingMask.from_logits(z, **settings)
    assert dense(kept, (6,), 23).equal(vllm(z, **settings))


def test_of_two_that_tie_at_the_cut_the_smaller_id_goes():
    z = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]])
    assert rw.SamplingMask.from_logits(z, top_p=0.5).token_ids.tolist() == [2, 3]
    assert rw.SamplingMask.from_logits(z, top_k=2).token_ids.tolist() == [1, 2, 3]


def test_shapes_padding_and_gradients():
    z, ids, _ = kept_batch(dtype=torch.float32)
    kept = rw.SamplingMask.from_logits(z.requires_grad_(), top_k=13, vocab_size=9)
    assert kept.offsets.tolist() == list(range(0, 109, 9)) and kept.token_ids.dtype == torch.int32
    per_row = torch.full(ids.shape, 2)
    assert rw.SamplingMask.from_logits(z, top_k=per_row).token_ids.equal(
        rw.SamplingMask.from_logits(z, top_k=2).token_ids
    )
    logps = rw.token_logps(z, z.argmax(-1), sampling_mask=rw.SamplingMask.from_logits(z, top_k=1))
    assert not logps.any()
    assert rw.SamplingMask.from_logits(z[:0], top_k=1).offsets.tolist() == [0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": -2}, "top_k is -2, expected a count, or 0 or -1 for all"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0 and at most 1"),
        (
            {"top_p": torch.tensor([0.5, 1.5, 0.2])},
            "top_p has a value that is not above 0 and at most 1",
        ),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"temperature": 0}, "temperature is 0, expected a positive number"),
        (
            {"top_k": torch.tensor([1, 2])},
            r"top_k is \(2,\) torch.int64 on cpu, expected .* one per row, \(3,\)",
        ),
        ({"top_k": torch.ones(3)}, "top_k is .* torch.float32"),
        ({"vocab_size": 5}, "vocab_size is 5, logits have 4 columns"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(rw.InvalidCall, match=message):
        rw.SamplingMask.from_logits(torch.zeros(3, 4), **settings)
