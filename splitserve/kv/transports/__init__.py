"""The ways a KV block travels between a worker and the store."""
