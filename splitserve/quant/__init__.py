"""Weights and KV in fewer bits: codes and scales, quantisers, and products that read codes."""
