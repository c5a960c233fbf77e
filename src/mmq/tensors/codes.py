"""The numbers of symmetric int4 that every way of computing it shares."""

from __future__ import annotations

Q_MIN, Q_MAX = -8, 7
# Half of the 16 codes on either side of zero: compressed-tensors' symmetric scale is max|w| / 7.5.
HALF_RANGE = 7.5
# Added to a group's largest weight before the group is divided by it, as llmcompressor does.
SMALLEST_GROUP = 1e-6
