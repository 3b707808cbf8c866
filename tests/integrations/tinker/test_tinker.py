"""A spec as Tinker's custom loss: traced, checked and run by Tinker's own code, beside
the op. CPU.
"""

import dataclasses

import pytest
import torch
from trainers import trainer

import reweight_ops as rw
from reweight_ops.integrations.tinker import INPUTS, custom_loss, token_weights

LENGTHS = (7, 4, 9)
OP_NAMES = {
    "old_logprobs": "old_per_token_logps",
    "ref_logprobs": "ref_per_token_logps",
    "sampling_logprobs": "sampling_per_token_logps",
}
SPECS = {
    "dapo": rw.methods.dapo(), "grpo, k3": rw.methods.grpo(beta=0.05), "dr_grpo": rw.methods.dr_grpo(horizon=20), "cispo": rw.methods.cispo(),
    "sapo": rw.methods.sapo(), "dppo_tv": rw.methods.dppo_tv(divergence_low=0.02, divergence_high=0.03), "dro": rw.methods.dro(beta=0.3),
    "dppo_kl": rw.methods.dppo_kl(divergence_low=0.002, divergence_high=0.003), "gpg": rw.methods.gpg(), "dual clip": rw.methods.dual_clip_ppo(clip_ratio_c=1.2),
    "advantage_reweighting": rw.methods.advantage_reweighting(alpha=0.3), "lopti": rw.methods.lopti("low", eta=0.3), "sft": rw.methods.sft(),
    "sampler": rw.methods.dapo().with_weight(rw.weights.MaskedImportance(ratio_min=0.8, ratio_max=1.2)),
    "straight through": rw.methods.verl("vanilla", use_kl_loss=True, kl_loss_type="k3+"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tinker():
    return trainer(
        "tinker",
        "tinker.lib.public_interfaces.custom_loss",
        "tinker.types",
        missing=("distro", "pyqwest", "sniffio", "zstandard"),
    )


@pytest.fixture
def data():
    """Three data: what formulas read, ``[T]`` each, with masked tokens whose log-probs
    are NaN.
    """
    g = torch.Generator().manual_seed(0)
    masks = [torch.rand(n, generator=g) > 0.2 for n in LENGTHS]
    logps = [(-3 * torch.rand(n, generator=g) - 1e-3).requires_grad_() for n in LENGTHS]
    inputs = {
        name: [
            lp.detach() + 0.4 * torch.randn(n, generator=g)
            for lp, n in zip(logps, LENGTHS, strict=True)
        ]
        for name in OP_NAMES
    }
    inputs["advantages"] = [torch.randn(n, generator=g) for n in LENGTHS]
    for name in OP_NAMES:
        inputs[name][0][~masks[0]] = float("nan")
    return masks, logps, inputs


def by_the_op(spec, data):
    masks, logps, inputs = data
    pad = lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # noqa: E731
    stored = {name: pad(inputs[ours]) for ours, name in OP_NAMES.items()}
    advantages = pad(inputs["advantages"]) if "adv" in spec.requires else None
    out = rw.policy_loss_from_logps(
        pad(logps), advantages, spec=spec, completion_mask=pad(masks), unused="ignore", **stored
    )
    return out.loss.detach(), torch.autograd.grad(out.loss, logps)


@pytest.mark.parametrize("name", SPECS)
def test_tinker_runs_the_spec(tinker, data, name):
    """Traced by ``trace_loss``, encoded for the server, and run by ``run_loss_handle``
    on the data: loss and gradients of the op.
    """
    module, types = tinker
    spec = SPECS[name]
    masks, logps, inputs = data
    loss = custom_loss(spec)
    handle = module.trace_loss(loss, loss.input_ranks, "session")
    nodes = module.encode_graph(handle).nodes
    assert (
        all(
            n.target.split(".")[0] in ("torch", "operator")
            for n in nodes
            if n.op == "call_function"
        )
        and len(nodes) > 4
    )
    inputs = {**inputs, "weights": token_weights(spec, masks)}
    batch = [
        types.Datum(
            model_input=types.ModelInput.from_ints([1] * n),
            loss_fn_inputs={
                key: types.TensorData.from_torch(value)
                for key, value in {
                    "target_tokens": torch.ones(n, dtype=torch.int64),
                    **{k: inputs[k][i] for k in handle.input_names},
                }.items()
            },
        )
        for i, n in enumerate(LENGTHS)
    ]
    module.check_loss_inputs(handle, batch)
    total, metrics = module.run_loss_handle(handle, batch, logps)
    expected, gradients = by_the_op(spec, data)
    torch.testing.assert_close(total.detach(), expected, rtol=1e-6, atol=1e-6)
    for ours, op in zip(torch.autograd.grad(total, logps), gradients, strict=True):
        assert op.norm() > 1e-3 and (ours - op).norm() <= 1e-6 * op.norm()
    assert metrics["custom/tokens:sum"] == sum(int(m.sum()) for m in masks)


def test_clipped_tokens_are_counted(data):
    masks, logps, inputs = data
    spec = rw.methods.dapo()
    weights = token_weights(spec, masks)
    loss = custom_loss(spec)
    counted = sum(
        loss(lp, inputs["advantages"][i], inputs["old_logprobs"][i], weights[i])[1][
            "custom/clipped:sum"
        ]
        for i, lp in enumerate(logps)
    )
    pad = lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # noqa: E731
    out = rw.policy_loss_from_logps(
        pad(logps),
        pad(inputs["advantages"]),
        spec=spec,
        old_per_token_logps=pad(inputs["old_logprobs"]),
        completion_mask=pad(masks),
    )
    share = out.metrics["clip_ratio/region_mean"].item()
    assert counted > 0 and counted.item() == pytest.approx(share * sum(int(m.sum()) for m in masks))


def test_inputs_are_those_that_are_read():
    assert list(custom_loss("gpg").input_ranks) == ["logprobs", "advantages", "weights"]
    assert list(custom_loss("dapo").input_ranks) == [
        "logprobs",
        "advantages",
        "old_logprobs",
        "weights",
    ]
    assert list(custom_loss(rw.methods.grpo(beta=0.1)).input_ranks) == [
        "logprobs",
        "advantages",
        "old_logprobs",
        "ref_logprobs",
        "weights",
    ]
    assert custom_loss("sft").__name__ == "sft" and set(INPUTS.values()) > set(OP_NAMES)


def test_divisors_of_a_larger_batch(data):
    masks = data[0]
    alone, part = token_weights("dapo", masks), token_weights("dapo", masks, num_items_in_batch=100)
    n = sum(int(m.sum()) for m in masks)
    assert torch.cat(alone).sum().item() == pytest.approx(1) and torch.cat(
        part
    ).sum().item() == pytest.approx(n / 100)
    assert [w.numel() for w in alone] == list(LENGTHS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (rw.methods.gspo(), "it couples tokens"),
        (rw.methods.top_entropy(), "it couples tokens"),
        (rw.methods.dapo(entropy_coef=0.1), "it reads entropy, and Tinker passes log-probs only"),
        (rw.methods.dapo(epsilon_high=torch.tensor(0.3)), "hyper-parameter that is a tensor"),
        (rw.methods.grpo(beta=torch.tensor(0.3)), "coefficient that is a tensor"),
        (rw.methods.disco(kl_strength=0.0), "it couples tokens"),
        (rw.methods.verl("sapo", use_kl_loss=True), "its terms have different reductions"),
        (
            dataclasses.replace(rw.methods.dapo(), reduction=rw.NoReduction()),
            "its reduction, NoReduction",
        ),
        (
            dataclasses.replace(
                rw.methods.dapo(), reduction=rw.TokenMean(weight=rw.weights.SignWeight())
            ),
            "its reduction, TokenMean",
        ),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(rw.UnsupportedRequest, match=message):
        custom_loss(spec)
