"""PEFT keeps adapters of a 16-bit model in fp32: the head without logits is no less
exact than the model's own logits.
"""

import pytest
import torch

pytest.importorskip("trl", minversion="1.15")
pytest.importorskip("peft")

import peft
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl_common import TINY, V

import reweight_ops as rw
from reweight_ops.integrations.trl.head import head_keywords
from reweight_ops.integrations.trl.probe import Form


def test_fp32_adapter_on_a_bf16_head():
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**TINY)).bfloat16()
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["lm_head"])
    ).get_base_model()
    head = model.get_output_embeddings()
    factors = head.lora_A["default"].weight, head.lora_B["default"].weight
    assert {x.dtype for x in factors} == {
        torch.float32
    } and head.base_layer.weight.dtype == torch.bfloat16
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in (*factors, head.base_layer.weight):
            x.copy_(0.4 * torch.randn(x.shape, generator=g))
        hidden, ids = (
            torch.randn(256, TINY["hidden_size"], generator=g).bfloat16(),
            torch.randint(V, (256,), generator=g),
        )
        own = torch.log_softmax(head(hidden).float(), -1).gather(-1, ids[:, None])[:, 0]
        a, b, w, h = (x.double() for x in (*factors, head.base_layer.weight, hidden))
        want = torch.log_softmax(h @ w.T + 2 * (h @ a.T) @ b.T, -1).gather(-1, ids[:, None])[:, 0]
        keywords = head_keywords(model, hidden, Form())
        got = rw.linear_token_logps(hidden, keywords.pop("lm_head_weight"), ids, **keywords)
    error, theirs = ((x - want).square().mean().sqrt() for x in (got, own))
    assert error <= theirs
