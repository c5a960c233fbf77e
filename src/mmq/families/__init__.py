"""How each model family is wired, as tables, and what follows from a table and config.json: no tensors, no torch."""

from mmq.families.registry import families, register
from mmq.families.table import Architecture, Mlp, SomeLayers, Weight, grouped_query

__all__ = ["Architecture", "Mlp", "SomeLayers", "Weight", "families", "grouped_query", "register"]
