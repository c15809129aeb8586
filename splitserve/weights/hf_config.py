"""Reads a model's shape from a Hugging Face config.json."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from splitserve.errors import CheckpointError
from splitserve.fields import Fields
from splitserve.models.config import ModelConfig
from splitserve.models.families import BY_ARCHITECTURE


def read_hf_config(directory: Path) -> ModelConfig:
    """The model's shape from config.json, with the ends of generation_config.json if there is one.

    Raises `CheckpointError` for an unknown family, for code that would have to be run, and for
    whatever would change the arithmetic and is not implemented.
    """
    fields = Fields.from_json_file(directory / "config.json")
    return read_family_config(fields, _generation_config(directory))


def read_family_config(fields: Fields, generation: Fields) -> ModelConfig:
    """The config of the family that `architectures` names. `generation` may name other ends."""
    family = BY_ARCHITECTURE.get(_architecture(fields))
    if "auto_map" in fields and not (family and family.ships_code):
        raise fields.error("auto_map", "names code to run; models that carry code are refused")
    if family is None:
        known = ", ".join(sorted(BY_ARCHITECTURE))
        raise fields.error(
            "architectures", f"{_architecture(fields)!r} is not supported; supported: {known}"
        )
    bos = generation if "bos_token_id" in generation else fields
    eos = generation if "eos_token_id" in generation else fields
    try:
        return replace(
            family.read(fields),
            bos_token_id=bos.optional_integer("bos_token_id"),
            eos_token_ids=frozenset(eos.integers("eos_token_id")),
        )
    except CheckpointError as exc:
        if exc.message.startswith(str(fields.source.parent)):
            raise
        raise CheckpointError(f"{fields.source}: {exc.message}") from exc


def _generation_config(directory: Path) -> Fields:
    path = directory / "generation_config.json"
    return Fields.from_json_file(path) if path.is_file() else Fields(path, {})


def _architecture(fields: Fields) -> str:
    names = fields.texts("architectures")
    if len(names) != 1:
        raise fields.error("architectures", f"must name one architecture, has {len(names)}")
    return names[0]
