"""One batch, divided among ranks by data, vocabulary and sequence, and the ranks'
results put together again.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist

import reweight_ops as rw
from reweight_ops.testing import make_batch
from reweight_ops.testing.criterion import judge, value_error

B, T, V = 4, 16, 257


def columns_of(v, vocab, padding=0):
    """Uneven shards: ``(start, stop)`` of each rank's columns.

    With padding, the last ranks have columns beyond the vocabulary.
    """
    even = -(-(vocab + padding) // v)
    edges = [min(i * even + (7 * i) % 5 * (0 < i < v), vocab + padding) for i in range(v)] + [
        vocab + padding
    ]
    return list(itertools.pairwise(edges))


def positions_of(s, length, layout):
    """The positions of each rank's part of a sequence. A part is one run, or the i-th
    run from the start and from the end of 2·s runs.
    """
    runs = torch.arange(length).tensor_split(s if layout == "contiguous" else 2 * s)
    if layout == "contiguous":
        return list(runs)
    return [torch.cat([runs[i], runs[2 * s - 1 - i]]) for i in range(s)]


@dataclass
class Split:
    """The division of a batch, and this rank's part."""

    data: int = 1
    vocab: int = 1
    sequence: int = 1
    layout: str = "contiguous"
    padding: int = 0

    def place(self, ranks):
        at, groups = ranks.axes(self.data, self.vocab, self.sequence)
        self.at = at
        self.groups = {
            "process_group": groups[1] if self.vocab > 1 else None,
            "sequence_group": groups[2] if self.sequence > 1 else None,
        }
        self.rows = torch.arange(B).chunk(self.data)[at[0]]
        self.columns = slice(*columns_of(self.vocab, V, self.padding)[at[1]])
        self.positions = positions_of(self.sequence, T, self.layout)[at[2]]
        return self

    def of(self, x):
        """This rank's rows of ``[B, T, ...]``, or of one number per sequence."""
        x = x[self.rows]
        return x if x.dim() < 2 or x.size(1) == 1 else x[:, self.positions]

    def whole(self, x, columns=False):
        """The whole ``[B, T(, V)]`` from every rank's part."""
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, (self.at, self.rows, self.positions, self.columns, x))
        out = None
        for _, rows, positions, part, value in found:
            if out is None:
                out = torch.full(
                    (B, T, *((V + self.padding,) if columns else ())),
                    float("nan"),
                    dtype=value.dtype,
                )
            out[
                (rows[:, None], positions[None], part)
                if columns
                else (rows[:, None], positions[None])
            ] = value
        assert not out.isnan().any()
        return out

    def total(self, x):
        """The sum over the ranks that have rows of their own."""
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, (self.at, x))
        return sum(value for (_, vocab, _), value in found if vocab == 0)


PER_SEQUENCE = ("group_ids", "num_groups")


def split_loss(spec, batch, split, **options):
    """``(gradient by the whole logits, results)`` of a policy loss that all ranks
    compute together from their parts.
    """
    z = batch["logits"].detach()
    if split.padding:
        z = torch.cat([z, torch.full((B, T, split.padding), 1e4, dtype=z.dtype)], -1)
        options["vocab_size"] = V
    local = split.of(z)[..., split.columns].clone().requires_grad_()
    rest = {
        name: split.of(x)
        if isinstance(x, torch.Tensor) and x.dim() and name not in PER_SEQUENCE
        else x
        for name, x in batch.items()
        if name != "logits"
    }
    groups = {name: group for name, group in split.groups.items() if group is not None}
    out = rw.policy_loss(local, **rest, spec=spec, **groups, **options)
    out.loss.backward()
    results = SimpleNamespace(
        loss=split.total(out.loss.detach()),
        per_token_logps=split.whole(out.per_token_logps),
        entropies=split.whole(out.entropies),
        plan=out.plan,
        backend=out.backend,
    )
    grad = split.whole(local.grad, columns=True)
    assert (grad[..., V:] == 0).all()
    return grad[..., :V], results


def errors_of(spec, split, dtype=torch.float32, divisors=(), backend="auto", **options):
    """Violations of the criterion, as a list of strings."""
    batch = make_batch(spec, (B, T), V, dtype)
    batch |= {
        name: {
            "num_items_in_batch": float(batch["completion_mask"].sum()),
            "num_sequences_in_batch": B,
        }[name]
        for name in divisors
    }
    grad, results = split_loss(spec, batch, split, backend=backend, **options)
    found = judge(spec, batch, grad, results, **options)
    return [] if found.passed else [str(found)]


def outputs_and_gradients(function, leaves, **options):
    """The results of a call, and the gradient of a fixed weighted sum of them by every
    leaf.
    """
    outputs = [x for x in function(leaves, **options) if x is not None]
    g = torch.Generator().manual_seed(7)
    weights = [torch.rand(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in outputs]
    wanted = {
        name: x for name, x in leaves.items() if isinstance(x, torch.Tensor) and x.requires_grad
    }
    total = sum(
        (w * x)[x.isfinite()].sum()
        for w, x in zip(weights, outputs, strict=True)
        if x.requires_grad
    )
    grads = torch.autograd.grad(total, list(wanted.values())) if wanted else ()
    return [x.detach() for x in outputs], dict(zip(wanted, grads, strict=True))


def leaf(x, dtype, part=None, dim=0):
    """A tensor's columns ``part`` as a separate leaf. Anything else is unchanged."""
    if not isinstance(x, torch.Tensor):
        return x
    own = x.detach() if part is None else x.detach().narrow(dim, part.start, part.stop - part.start)
    own = own.to(dtype) if x.is_floating_point() else own
    return own.contiguous().clone().requires_grad_(x.requires_grad)


def padded(x, dim, columns):
    """Add columns to a vocabulary. None of them may be read."""
    dim %= x.dim()
    return torch.cat(
        [x.detach(), x.new_full((*x.shape[:dim], columns, *x.shape[dim + 1 :]), 3.0)], dim
    ).requires_grad_(x.requires_grad)


def differences(function, tensors, vocab, split, dtype=torch.float64, **options):
    """Differences between a call of several ranks and one process's call, as strings.

    ``function(tensors, **options)`` returns tensors. ``vocab`` names the vocabulary
    dimension of tensors that have one. ``split`` is ``(group, rank, world, padding)``.
    In fp32 the package's criterion compares the errors of both against fp64.
    """
    group, rank, world, padding = split
    truth, truth_grads = outputs_and_gradients(
        function, {name: leaf(x, torch.float64) for name, x in tensors.items()}
    )
    alone, alone_grads = outputs_and_gradients(
        function, {name: leaf(x, dtype) for name, x in tensors.items()}, **options
    )
    size = next(tensors[name].size(dim) for name, dim in vocab.items())
    part = slice(*columns_of(world, size, padding)[rank])
    own = slice(min(part.start, size), min(part.stop, size))
    parts = {
        name: leaf(padded(x, vocab[name], padding), dtype, part, vocab[name])
        if name in vocab
        else leaf(x, dtype)
        for name, x in tensors.items()
    }
    got, grads = outputs_and_gradients(
        function, parts, process_group=group, **options, **({"vocab_size": size} if padding else {})
    )
    wrong = []

    def compare(what, found, single, exact):
        odd = ~exact.isfinite()
        if not torch.equal(
            found.double()[odd].nan_to_num(7.0), exact.double()[odd].nan_to_num(7.0)
        ):
            wrong.append(f"{what}: {found[odd]} of {exact[odd]}")
        found, single, exact = (x[~odd].double() for x in (found, single, exact))
        if not exact.numel():
            return
        if dtype == torch.float64:
            if not torch.allclose(found, exact, rtol=1e-9, atol=1e-9):
                wrong.append(
                    f"{what}: {(found - exact).abs().max():.3g} of {exact.abs().max():.3g}"
                )
        elif (error := value_error(found, single, exact)) > 1:
            wrong.append(f"{what}: {error:.3g} times what is allowed")

    for i, (found, single, exact) in enumerate(zip(got, alone, truth, strict=True)):
        compare(f"output {i}", found, single, exact)
    for name, exact in truth_grads.items():
        found, single = grads[name], alone_grads[name]
        if name in vocab:
            dim = vocab[name]
            if (
                found.narrow(
                    dim, own.stop - own.start, part.stop - part.start - own.stop + own.start
                )
                != 0
            ).any():
                wrong.append(f"gradient of the padding of {name}")
            # the errors of one process are those of the whole tensor
            others = exact.clone()
            others.narrow(dim, own.start, own.stop - own.start).copy_(
                found.narrow(dim, 0, own.stop - own.start)
            )
            found = others
        compare(f"gradient of {name}", found, single, exact)
    return wrong
