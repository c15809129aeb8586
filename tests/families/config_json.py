"""Reads config.json as publishers wrote it, as transformers writes it, and with values changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from splitserve.models.config import ModelConfig
from splitserve.weights.checkpoint import read_config


def read(directory: Path, values: dict[str, Any]) -> ModelConfig:
    """The model's shape from a directory that has only a config.json of these values."""
    (directory / "config.json").write_text(json.dumps(values))
    return read_config(directory)


def rewritten(published: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a published config: its own names for keys, and all of them."""
    values = {key: value for key, value in published.items() if key != "auto_map"}
    config = AutoConfig.for_model(**values)
    return json.loads(config.to_json_string(use_diff=False))


def changed(config: PretrainedConfig, **values: object) -> dict[str, Any]:
    """A config as transformers saves it with a model, but for some values."""
    model = AutoModelForCausalLM._model_mapping[type(config)]
    return json.loads(config.to_json_string()) | {"architectures": [model.__name__]} | values
