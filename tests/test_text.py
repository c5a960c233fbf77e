"""Numbers as people read them."""

from __future__ import annotations

import pytest

from mmq.text import bytes_text, duration_text, gib_text, plain_number


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.034789, "0.03479"), (4174.6332, "4,175"), (1.53e-6, "1.53e-6"), (131072, "131,100"), (2e9, "2e9")],
)
def test_plain_number(value: float, text: str) -> None:
    assert plain_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.158, "0.16 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (75, "1 min 15 s"),
        (3599.7, "1 h 00 min"),
        (11220, "3 h 07 min"),
    ],
)
def test_duration_text(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.5 kB"), (224_735_330_304, "224.7 GB"), (1.5e12, "1.50 TB")],
)
def test_bytes_text(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.0 MiB"), (2**20, "1.0 MiB"), (2**30 // 5, "0.2 GiB"), (48 * 2**30, "48.0 GiB")]
)
def test_gib_text(size: int, text: str) -> None:
    assert gib_text(size) == text
