"""KV blocks: layout, keys, the paged pool, and the store client with its transports."""
