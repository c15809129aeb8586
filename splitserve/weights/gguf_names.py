"""GGUF's tensor names in Hugging Face's terms, and which of them llama.cpp stores permuted."""

from __future__ import annotations

import re
from typing import Final

ROPE_FACTORS: Final = "rope_freqs.weight"

_GLOBAL: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PATTERN: Final = re.compile(
    r"(?:blk\.(?P<layer>0|[1-9]\d{0,4})\.)?(?P<part>[a-z_]+)\.(?P<kind>weight|bias)"
)


def hf_name(gguf_name: str) -> str | None:
    """The Hugging Face name of a Llama-family tensor, None if the family has no such tensor."""
    match = _PATTERN.fullmatch(gguf_name)
    if match is None:
        return None
    layer, part, kind = match["layer"], match["part"], match["kind"]
    if layer is None:
        return f"{_GLOBAL[part]}.{kind}" if part in _GLOBAL else None
    return f"model.layers.{layer}.{_LAYER[part]}.{kind}" if part in _LAYER else None
