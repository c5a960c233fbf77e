"""What comes in: the checkpoint to be quantized, the calibration text, and synthetic ones of both."""
