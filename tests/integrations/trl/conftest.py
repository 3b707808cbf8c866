"""Fixtures of the TRL tests. TRL is imported when one is used: that takes seconds, and
it may be missing.
"""

import copy
import functools

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def make_trainer(tmp_path_factory):
    """:func:`trl_common.make_trainer` with an output directory."""
    from trl_common import make_trainer

    return functools.partial(make_trainer, str(tmp_path_factory.mktemp("trainer")))


@pytest.fixture(scope="module")
def trainers(make_trainer):
    """TRL's own trainer, and our two hooks, without logits (the default) and with them,
    on equal models.
    """
    from trl import GRPOTrainer

    from reweight_ops.integrations.trl import ReweightGRPOTrainer

    return {
        "stock": make_trainer(GRPOTrainer),
        "token": make_trainer(ReweightGRPOTrainer),
        "fused": make_trainer(ReweightGRPOTrainer, ours={"fuse_loss": True}),
        "token_logits": make_trainer(ReweightGRPOTrainer, ours={"lm_head": "logits"}),
        "fused_logits": make_trainer(
            ReweightGRPOTrainer, ours={"fuse_loss": True, "lm_head": "logits"}
        ),
    }


@pytest.fixture(autouse=True)
def restore(request):
    """Attributes that a test sets on the shared trainers are set back."""
    if "trainers" not in request.fixturenames:
        yield
        return
    trainers = request.getfixturevalue("trainers").values()
    saved = [(t, dict(t.__dict__), copy.copy(t.args)) for t in trainers]
    yield
    for trainer, attributes, args in saved:
        trainer.__dict__.clear()
        trainer.__dict__.update(attributes, args=args)
        trainer.model.train()
        if hasattr(trainer, "_reweight_hooks"):
            trainer._reweight_hooks.counts.clear()
