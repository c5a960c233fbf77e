"""How each model family is wired, as tables, and what follows from a table and config.json: no tensors, no torch."""
