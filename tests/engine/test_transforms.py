"""``torch.func``'s transforms and forward-mode differentiation of every public op agree
with autograd of the torch formula.
"""

import pytest
import torch
from op_calls import CALLS
from op_calls import LOGITS as ROUNDED
from torch.autograd import forward_ad

LOGITS = ROUNDED.double()
DIRECTION = torch.randn(
    LOGITS.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
)
TWO = torch.stack([LOGITS, LOGITS.flip(1)])


def forward_mode(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(LOGITS.clone(), DIRECTION))).tangent


#: Transforms of a function to a number: the transform, and the same value from the
#: function's values and gradients at two points.
TRANSFORMS = {
    "grad": (lambda f: torch.func.grad(f)(LOGITS), lambda values, grads: grads[0]),
    "vjp": (
        lambda f: torch.func.vjp(f, LOGITS)[1](torch.ones((), dtype=torch.float64))[0],
        lambda values, grads: grads[0],
    ),
    "jvp": (
        lambda f: torch.func.jvp(f, (LOGITS,), (DIRECTION,))[1],
        lambda values, grads: (grads[0] * DIRECTION).sum(),
    ),
    "forward mode": (forward_mode, lambda values, grads: (grads[0] * DIRECTION).sum()),
    "vmap": (lambda f: torch.vmap(f)(TWO), lambda values, grads: values),
    "vmap of grad": (lambda f: torch.vmap(torch.func.grad(f))(TWO), lambda values, grads: grads),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", CALLS)
def test_transforms(op, transform):
    for call in CALLS[op]:

        def f(z, call=call):
            out = call(z)
            return (out[0] if isinstance(out, tuple) else out).sum()

        values, grads = [], []
        for x in TWO:
            z = x.clone().requires_grad_()
            values.append(f(z))
            grads += torch.autograd.grad(values[-1], z)
        run, expect = TRANSFORMS[transform]
        torch.testing.assert_close(run(f), expect(torch.stack(values).detach(), torch.stack(grads)))
