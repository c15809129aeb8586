"""The decoder stack that Llama-like families share.

Rows of all sequences go through the layers as one (rows, hidden_size) tensor; only attention
knows which row belongs to whom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from splitserve.models.config import ModelConfig
from splitserve.models.linear import Linear, gated_silu, rms_norm
from splitserve.models.rope import inverse_frequencies

AttendLayer = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`attend(layer, queries, keys, values)`: stores the new keys and values, returns the mixed
values. Queries and result are (rows, heads, head_dim), keys and values (rows, kv_heads, head_dim).
"""


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Projections that read the same input are stored as one matrix."""

    input_norm: Tensor
    qkv: Linear
    attention_out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class DecoderWeights:
    """A whole model."""

    embedding: Tensor
    layers: list[LayerWeights]
    final_norm: Tensor
    unembedding: Linear


class Decoder:
    """Computes hidden states and logits. Holds no state between calls."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights) -> None:
        self.config = config
        self._weights = weights
        device = weights.embedding.device
        self._inverse_frequencies = torch.from_numpy(inverse_frequencies(config)).to(device)

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and activations."""
        return self._weights.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._weights.embedding.device

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: AttendLayer,
        layer_done: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Normalised hidden states (rows, hidden_size) for (rows,) tokens at (rows,) positions.

        `layer_done(layer)` is called when a layer's keys and values have been stored.
        """
        x = self._weights.embedding[token_ids]
        rotation = self._rotation(positions)
        for index, layer in enumerate(self._weights.layers):
            x = x + self._attention(index, layer, x, rotation, attend)
            if layer_done:
                layer_done(index)
            x = x + self._mlp(layer, x)
        return rms_norm(x, self._weights.final_norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocab_size) in fp32 for (rows, hidden_size)."""
        return self._weights.unembedding(hidden).float()

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        attend: AttendLayer,
    ) -> Tensor:
        config, rows = self.config, x.shape[0]
        normed = rms_norm(x, layer.input_norm, config.rms_norm_eps)
        qkv = layer.qkv(normed).view(rows, -1, config.head_dim)
        rotated_heads = config.num_heads + config.num_kv_heads
        rotated = _rotate(qkv[:, :rotated_heads], rotation)
        mixed = attend(
            index,
            rotated[:, : config.num_heads],
            rotated[:, config.num_heads :],
            qkv[:, rotated_heads:],
        )
        return layer.attention_out(mixed.reshape(rows, -1))

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        normed = rms_norm(x, layer.mlp_norm, self.config.rms_norm_eps)
        return layer.down(gated_silu(layer.gate_up(normed)))

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (rows, 1, head_dim), computed in fp32."""
        angles = positions[:, None].float() * self._inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (Su et al. 2021), dimension i paired with i + head_dim / 2."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
