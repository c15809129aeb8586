"""Checkpoint readers: safetensors directories and GGUF files."""

from splitserve.weights.checkpoint import Checkpoint, open_checkpoint, read_config

__all__ = ["Checkpoint", "open_checkpoint", "read_config"]
