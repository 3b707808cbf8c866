"""Batches with sampling masks, and their results by a plain masked
log-softmax in fp64."""

import torch

import reweight_ops as rw

SHAPE, VOCAB = (3, 4), 13


def kept_batch(shape=SHAPE, vocab=VOCAB, dtype=torch.float64, share=0.4, seed=0):
    """``(logits, ids, mask)``. Every row keeps its id and some others. One row keeps
    only its id, and one keeps everything.
    """
    g = torch.Generator().manual_seed(seed)
    z = (3 * torch.randn(*shape, vocab, generator=g, dtype=torch.float64)).to(dtype)
    ids = torch.randint(vocab, shape, generator=g)
    mask = torch.rand(*shape, vocab, generator=g) < share
    flat = mask.view(-1, vocab)
    flat[0], flat[-1] = False, True
    return z, ids, mask.scatter(-1, ids[..., None], True)


def shuffled(mask, seed=0):
    """The sets of a bool mask as int64; the ids of a row are in random order."""
    kept = rw.SamplingMask.from_mask(mask)
    g = torch.Generator().manual_seed(seed)
    rows = [kept.token_ids[a:b] for a, b in zip(kept.offsets[:-1], kept.offsets[1:], strict=True)]
    return rw.SamplingMask(
        torch.cat([row[torch.randperm(len(row), generator=g)] for row in rows]).long(), kept.offsets
    )


def scaled(z, temperature=1.0, softcap=None, vocab_size=None):
    x = z[..., :vocab_size].double()
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    t = (
        temperature.reshape(*x.shape[:-1], 1)
        if isinstance(temperature, torch.Tensor) and temperature.dim()
        else temperature
    )
    return x / t


def oracle(z, ids, mask, entropy_over="kept", **softmax):
    """Differentiable statistics by their public names; mask ``None`` means the whole
    vocabulary.
    """
    x = scaled(z, **softmax)
    log_p = torch.where(mask, x, -torch.inf).log_softmax(-1)
    whole = x.log_softmax(-1) if entropy_over == "vocabulary" else log_p
    p = log_p.exp()
    finite = torch.where(whole == -torch.inf, 0, whole)
    logps = log_p.gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    return {
        "logps": logps,
        "entropies": -(whole.exp() * finite).sum(-1),
        "lse": torch.where(mask, x, -torch.inf).logsumexp(-1),
        "log_sum_p_sq": (p * p).sum(-1).log(),
        "max_logp": log_p.amax(-1),
        "log1m_p": torch.log1p(-logps.exp()),
        "is_top1": logps >= log_p.amax(-1),
    }
