"""What a server is told and needs: config.json's quantization, memory, and the plugin for vLLM."""
