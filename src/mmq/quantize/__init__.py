"""One decoder layer in memory: attention and routing, the search for scales, rounding, KV scales."""
