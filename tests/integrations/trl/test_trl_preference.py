"""Preference losses against TRL's own code: the trainers' loss functions on log-probs
that a stand-in for the model returns.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import reweight_ops as rw
from reweight_ops import preference

pytest.importorskip("trl")
B, T = 6, 5


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(3)
    mask = torch.arange(T) < torch.tensor([5, 1, 3, 4, 2, 5])[:, None]

    def logps():
        return torch.where(mask, -3 * torch.rand(B, T, generator=g, dtype=torch.float64) - 0.1, 0)

    return {
        "mask": mask,
        "logps": logps().requires_grad_(),
        "ref": logps(),
        "kl": logps(),
        "ref_kl": logps() - 0.3 * mask,
    }


def same(ours, theirs, leaf):
    torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-12, atol=1e-14)
    (a,), (b,) = (torch.autograd.grad(x, leaf, retain_graph=True) for x in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    assert b.abs().sum() > 1e-3


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("labels", [[1, 0, 0, 1, 1, 0], [1, 0, 1, 1, 1, 1]])
def test_kto_is_the_trainers_loss(data, loss_type, labels):
    from trl import KTOTrainer

    label = torch.tensor(labels, dtype=torch.bool)
    mask = torch.nn.functional.pad(data["mask"], (1, 0)).long()
    ones = torch.ones_like(mask)
    inputs = {
        "input_ids": ones,
        "attention_mask": ones,
        "completion_mask": mask,
        "label": label,
        "ref_logps": data["ref"].sum(1),
        "ref_KL_logps": data["ref_kl"].sum(1),
    }

    def model(**kwargs):
        return SimpleNamespace(
            log_probs=data["logps"] * data["mask"],
            entropy=torch.zeros(B, T),
            mean_logits=torch.zeros(B, T),
        )

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x
        ),
        calculate_KL=loss_type == "kto",
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_type=loss_type,
        beta=0.7,
        desirable_weight=1.3,
        undesirable_weight=0.6,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda model, batch: data["kl"].sum(1),
    )
    theirs = KTOTrainer._compute_loss(trainer, model, inputs, False)
    kl = (
        preference.kto_baseline(data["kl"], data["ref_kl"], data["mask"])
        if loss_type == "kto"
        else 0.0
    )
    assert loss_type != "kto" or kl > 0.01
    spec = rw.methods.kto(0.7, 1.3, 0.6, kl=kl)
    ours = rw.policy_loss_from_logps(
        data["logps"],
        label.double(),
        spec=spec,
        completion_mask=data["mask"],
        ref_per_token_logps=data["ref"],
    ).loss
    same(ours, theirs, data["logps"])


def cpo(data, **options):
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu"), **options
    )
    means = (data["logps"] * data["mask"]).sum(1) / data["mask"].sum(1)
    return CPOTrainer.cpo_loss(trainer, means[: B // 2], means[B // 2 :])[0].mean()


@pytest.mark.parametrize("alpha", [0.25, -0.5, 0.0])
def test_alpha_po_is_the_cpo_trainers(data, alpha):
    theirs = cpo(data, alpha=alpha, beta=1.5, simpo_gamma=0.6, loss_type="simpo")
    ours = rw.preference_loss_from_logps(
        data["logps"], spec=preference.alpha_po(alpha, 1.5, 0.6), completion_mask=data["mask"]
    ).loss
    same(ours, theirs, data["logps"])


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "tpo-l"])
def test_tpo_is_the_trainers_loss(loss_type):
    from trl.experimental.tpo import TPOTrainer

    g = torch.Generator().manual_seed(5)
    logits = torch.randn(B, T + 1, 7, generator=g, dtype=torch.float64).requires_grad_()
    ids = torch.randint(7, (B, T + 1), generator=g)
    mask = torch.nn.functional.pad(
        torch.arange(T) < torch.tensor([5, 1, 3, 4, 2, 5])[:, None], (1, 0)
    ).long()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x
        ),
        tpo_alpha=0.7,
        tpo_l_gamma=0.4,
        loss_type=loss_type,
        beta=0.8,
        label_smoothing=0.1 if loss_type in ("sigmoid", "tpo-l") else 0.0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": ids, "completion_mask": mask, "attention_mask": torch.ones_like(mask)}
    theirs = TPOTrainer._compute_loss(
        trainer, lambda **kwargs: SimpleNamespace(logits=logits), inputs, False
    )
    own = {"gamma": 0.4} if loss_type == "tpo-l" else {}
    spec = preference.tpo(
        loss_type, beta=0.8, alpha=0.7, label_smoothing=trainer.label_smoothing, **own
    )
    out = rw.preference_loss(
        logits[:, :-1], ids[:, 1:], spec=spec, completion_mask=mask[:, 1:], backend="reference"
    )
    torch.testing.assert_close(out.loss, theirs.to(out.loss), rtol=1e-6, atol=1e-8)
    (a,), (b,) = (torch.autograd.grad(x, logits) for x in (out.loss, theirs))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert b.abs().sum() > 1e-3 and out.chosen_logps.shape == (2,)
