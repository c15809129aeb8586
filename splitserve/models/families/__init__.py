"""All families. A new one is a file here and a line below."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from splitserve.models.families import (
    bloom,
    cohere,
    falcon,
    gemma,
    gemma2,
    gemma3,
    glm4,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gpt_oss,
    gptj,
    llama,
    mistral,
    mixtral,
    mpt,
    olmo2,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    stablelm,
    starcoder2,
)
from splitserve.models.family import Family

FAMILIES: Final = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    gpt_oss.FAMILY,
    mixtral.FAMILY,
    qwen3_moe.FAMILY,
    bloom.FAMILY,
    falcon.FAMILY,
    gpt_bigcode.FAMILY,
    gptj.FAMILY,
    mpt.FAMILY,
    opt.FAMILY,
    stablelm.FAMILY,
    starcoder2.FAMILY,
    qwen3.FAMILY,
    gemma.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    gemma3.NESTED,
    phi3.FAMILY,
    olmo2.FAMILY,
    cohere.FAMILY,
    cohere.SLIDING,
    glm4.FIRST,
    glm4.FAMILY,
)

BY_ARCHITECTURE: Final[Mapping[str, Family]] = MappingProxyType(
    {architecture: family for family in FAMILIES for architecture in family.architectures}
)
