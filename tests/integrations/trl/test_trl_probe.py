"""Heads that are more than ``weight @ hidden``: the probe finds them, whatever hides
them. Offline, CPU.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")

import transformers
from test_trl_head import log_probs
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl_common import TINY, current, make_inputs, run

import reweight_ops as rw
from reweight_ops.integrations.trl import ReweightGRPOTrainer
from reweight_ops.integrations.trl import head as trl_head
from reweight_ops.integrations.trl.probe import Form, Prober

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def qwen():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**TINY))


class Scaled(Qwen2ForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out


def with_forward_hook():
    model = qwen()
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    return model


def with_pre_hook():
    model = qwen()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    return model


def with_replaced_forward():
    model = qwen()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: torch.tanh(forward(x))
    return model


def with_hook_on_the_model():
    def double(module, args, out):
        out.logits = out.logits * 2
        return out

    model = qwen()
    model.register_forward_hook(double)
    return model


def with_accelerate_hook():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Half(ModelHook):
        def post_forward(self, module, output):
            return output * 0.5

    model = qwen()
    add_hook_to_module(model.lm_head, Half())
    return model


def subclass():
    torch.manual_seed(0)
    return Scaled(Qwen2Config(**TINY))


def soft_cap_on_large_logits_alone():
    """A cap that small logits do not show."""
    model = qwen()
    model.lm_head.register_forward_hook(lambda module, args, out: 30 * torch.tanh(out / 30))
    return model


DIFFERENT = (
    subclass,
    with_forward_hook,
    with_pre_hook,
    with_replaced_forward,
    with_hook_on_the_model,
    with_accelerate_hook,
    soft_cap_on_large_logits_alone,
)


def assert_right(trainer, inputs):
    logps = log_probs(trainer, inputs)[0]
    mask = inputs["completion_mask"] != 0
    torch.testing.assert_close(logps[mask], current(trainer, inputs)[0][mask])


@pytest.mark.parametrize("make", DIFFERENT, ids=[make.__name__ for make in DIFFERENT])
def test_what_changes_logits_is_found(make_trainer, make):
    trainer = make_trainer(ReweightGRPOTrainer, make())
    inputs = make_inputs(trainer)
    with pytest.warns(UserWarning, match="builds the logits: logits that are more than"):
        assert_right(trainer, inputs)
    assert trainer.fused_calls == {"token_logps": 1}


def test_a_hook_that_changes_nothing_stays_linear(make_trainer):
    model = qwen()
    model.lm_head.register_forward_hook(lambda module, args, out: None)
    trainer = make_trainer(ReweightGRPOTrainer, model)
    assert_right(trainer, make_inputs(trainer))
    assert trainer.fused_calls == {"linear_token_logps": 1}


def test_it_is_asked_once_and_again_when_something_changes(make_trainer):
    trainer = make_trainer(ReweightGRPOTrainer, qwen())
    inputs, lengths = make_inputs(trainer), []
    trainer.model.model.register_forward_hook(
        lambda module, args, out: lengths.append(out.last_hidden_state.size(1))
    )
    run(trainer, inputs)
    run(trainer, inputs)
    assert lengths.count(8) == 1
    handle = trainer.model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.warns(UserWarning, match="builds the logits"):
        assert_right(trainer, inputs)
    handle.remove()
    calls = trainer.fused_calls["linear_token_logps"]
    assert_right(trainer, inputs)
    assert trainer.fused_calls["linear_token_logps"] == calls + 1
    with torch.no_grad():
        trainer.model.lm_head.weight = torch.nn.Parameter(trainer.model.lm_head.weight * 1.0)
    lengths.clear()
    assert_right(trainer, inputs)
    assert lengths.count(8) == 1


#: Family: (class of the model, its config, the reason that is expected, or the soft
#: cap).
FAMILIES = {
    "RecurrentGemma": (
        "RecurrentGemmaForCausalLM",
        dict(logits_soft_cap=2.0, lru_width=16, attention_window_size=8, num_key_value_heads=1),
        2.0,
    ),
    "xLSTM": ("xLSTMForCausalLM", dict(num_heads=2, num_blocks=1, output_logit_soft_cap=3.0), 3.0),
    "Mpt": (
        "MptForCausalLM",
        dict(d_model=16, n_heads=2, n_layers=1, max_seq_len=64, logit_scale="inv_sqrt_d_model"),
        None,
    ),
    "ModernBertDecoder": (
        "ModernBertDecoderForCausalLM",
        dict(bos_token_id=1),
        "more than the head's weight",
    ),
    "Bert": ("BertLMHeadModel", dict(is_decoder=True), "more than the head's weight"),
    "Roberta": ("RobertaForCausalLM", dict(is_decoder=True), "more than the head's weight"),
    "Electra": (
        "ElectraForCausalLM",
        dict(is_decoder=True, embedding_size=32),
        "more than the head's weight",
    ),
    "Inkling": (
        "InklingForCausalLM",
        dict(logits_mup_width_multiplier=2.0, unpadded_vocab_size=290),
        "logits of shape",
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    kind, config, expected = FAMILIES[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"this version of transformers has no {kind}")
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{"pad_token_id": 0, **TINY, **config}))
    accelerator = SimpleNamespace(
        unwrap_model=lambda m, **kwargs: m, autocast=contextlib.nullcontext
    )
    trainer = SimpleNamespace(
        accelerator=accelerator, args=SimpleNamespace(cast_lm_head_to_fp32=False)
    )
    unsupported_reason = trl_head.linear_unsupported_reason(trainer, model)
    form = (
        Prober().form(trainer, model)
        if unsupported_reason is None
        else Form(unsupported_reason=unsupported_reason)
    )
    if isinstance(expected, str):
        assert (
            expected in form.unsupported_reason
            or "not a plain nn.Linear" in form.unsupported_reason
        )
        return
    assert form == Form(1.0, expected)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = trl_head.decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
        head = trl_head.head_keywords(model, hidden, form)
        got = rw.linear_token_logps(hidden, head.pop("lm_head_weight"), ids, **head)
    torch.testing.assert_close(
        got, torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    )
