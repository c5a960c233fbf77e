"""mmq: dequant, awq, restore - hybrid int4/fp8 checkpoints of very large mixture-of-experts models."""

__version__ = "0.1.0"
