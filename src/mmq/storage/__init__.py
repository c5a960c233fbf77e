"""Files: atomic writes, safetensors shards and checkpoint folders. Nothing here knows of quantization."""
