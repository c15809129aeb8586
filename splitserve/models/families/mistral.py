"""Mistral: Llama's layers, with a sliding window in some versions."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import ModelConfig
from splitserve.models.families import llama
from splitserve.models.families.reading import read_head_dim, read_layers, read_rope
from splitserve.models.family import Family

DEFAULT_WINDOW: Final = 4096


def read(fields: Fields) -> ModelConfig:
    """From config.json."""
    rope = read_rope(fields, read_head_dim(fields))
    # Left out, it is not what null is: this is Hugging Face's default.
    given = "sliding_window" in fields.names()
    window = fields.optional_integer("sliding_window") if given else DEFAULT_WINDOW
    return replace(
        llama.read(fields),
        architecture="MistralForCausalLM",
        layers=read_layers(fields, rope, window=window),
    )


FAMILY: Final = Family("Mistral", ("MistralForCausalLM",), read)
