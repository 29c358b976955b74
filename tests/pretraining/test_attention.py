from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softprompts.pretraining.attention import register_blocked_attention


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("length", [7, 128, 300])
def test_blocked_attention_is_plain_attention(kv_heads: int, length: int) -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        use_cache=False,
    )
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config)
    plain.set_attn_implementation("eager")
    ids = torch.randint(0, 50, (2, length))
    expected = plain(input_ids=ids).logits
    expected.square().mean().backward()
    gradients = [p.grad.clone() for p in plain.parameters() if p.grad is not None]
    plain.zero_grad()
    plain.set_attn_implementation(register_blocked_attention())
    got = plain(input_ids=ids).logits
    got.square().mean().backward()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
