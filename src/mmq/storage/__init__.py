"""Checkpoint folders on disk: shards, index, atomic and hashed files; nothing of quantization."""
