"""Tensor parallelism: one worker as a group of ranks that compute one model together."""
