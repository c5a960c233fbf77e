"""Numbers, sizes and times as people read them."""

from __future__ import annotations

Unit = tuple[float, str]

UNITS_OF_BYTES: tuple[Unit, ...] = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
DIGITS_OF_BYTES = {"B": 0, "TB": 2}
UNITS_OF_COUNTS: tuple[Unit, ...] = ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
UNITS_OF_TIME: tuple[Unit, ...] = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))


def unit_for(largest: float, units: tuple[Unit, ...]) -> Unit:
    """The largest unit of which there is one at least; else the smallest."""
    return next((unit for unit in units if largest >= unit[0]), units[-1])


def bytes_text(count: float) -> str:
    """1536 -> '1.5 kB', 1.5e12 -> '1.50 TB'."""
    size, name = unit_for(count, UNITS_OF_BYTES)
    return f"{count / size:.{DIGITS_OF_BYTES.get(name, 1)}f} {name}"


def gib_text(size: int) -> str:
    """Bytes -> '28.4 GiB', as GPUs are told by; small sizes in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def duration_text(seconds: float) -> str:
    """0.16 -> '0.16 s', 75 -> '1 min 15 s', 11220 -> '3 h 07 min'."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def count_text(count: int, singular: str, plural: str = "") -> str:
    """(1, 'layer') -> '1 layer', (1500, 'layer') -> '1,500 layers'."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def range_text(low: str, high: str) -> str:
    """('49 %', '63 %') -> '49 % to 63 %'; one of them where they are the same."""
    return low if low == high else f"{low} to {high}"


def plain_number(value: float, digits: int = 4) -> str:
    """Significant digits, with an exponent where the number is very large or small: 0.03479, 366,482, 1.5e-6."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{float(f'{value:.{digits}g}'):,.10g}"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def short_count(count: int) -> str:
    """228700000000 -> '228.7B', 2234384 -> '2.2M', 512 -> '512'."""
    size, name = unit_for(count, UNITS_OF_COUNTS)
    return f"{count / size:.1f}{name}" if name else str(count)
