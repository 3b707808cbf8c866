"""verl's FSDP engine for a step on two processes (gloo, CPU), with its own loss and
head and with ours.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl_common import core_algos

RANKS = 2
assert core_algos  # this module is skipped where verl is not there


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verl")
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=False, **sizes)).save_pretrained(
        folder / "model"
    )
    paths = [str(ROOT), str(ROOT / "tests" / "support")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("verl_worker.py")
    command = [sys.executable, str(script), str(folder / "model"), str(folder)]
    ranks = [
        subprocess.Popen(
            [*command, str(r), str(RANKS)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(RANKS)
    ]
    for process in ranks:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    return torch.load(folder / "found.pt")


def assert_same(theirs, ours):
    for name, gradient in theirs["gradients"].items():
        assert (
            gradient.norm() > 1e-4
            and (gradient - ours["gradients"][name]).norm() <= 1e-6 * gradient.norm()
        ), name
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


@pytest.mark.slow
def test_our_loss_in_the_engine(found):
    assert_same(found["stock"], found["loss"])
    assert {"actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/entropy_loss"} <= set(
        found["loss"]["metrics"]
    )


@pytest.mark.slow
def test_our_head_too(found):
    """FSDP2 shards the head apart, and verl's fused models read its weight outside of
    its forward: verl's own head fails there.
    """
    assert_same(found["stock"], found["loss and head"])
    assert found["loss and head"]["counts"] == {"linear_token_logps": 2}


@pytest.mark.slow
def test_another_loss_moves_the_parameters_otherwise(found):
    stock, other = (
        torch.cat([p.flatten() for p in found[n]["parameters"].values()])
        for n in ("stock", "another loss")
    )
    assert (stock - other).norm() > 1e-3 * stock.norm()
