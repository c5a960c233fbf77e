"""The computer that a run has: its device, its memory, its threads."""
