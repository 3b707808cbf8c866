"""A published loss as Tinker's custom loss.

The script prints the inputs of one datum and the graph that is uploaded.

    python examples/tinker_loss.py

It runs without Tinker. With Tinker, pass ``loss`` to
``ServiceClient.create_custom_loss(loss, input_ranks=loss.input_ranks)``.
"""

import torch

import reweight_ops as rw
from reweight_ops.integrations.tinker import custom_loss, token_weights


def main() -> tuple[float, str]:
    spec = rw.methods.advantage_reweighting(alpha=0.3)
    loss = custom_loss(spec)
    print("inputs:", ", ".join(loss.input_ranks))
    # two data with masked prompts
    masks = [torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1])]
    (weights, _) = token_weights(spec, masks)
    logprobs = torch.tensor([-2.0, -0.5, -1.0, -3.0])
    value, metrics = loss(logprobs, torch.full((4,), 0.7), logprobs - 0.1, weights)
    code = str(torch.fx.symbolic_trace(loss).code)
    print(
        f"the first datum's share of the loss: {value:.4f}, "
        f"{ ({k: int(v) for k, v in metrics.items()}) }"
    )
    print(code)
    return float(value), code


if __name__ == "__main__":
    main()
