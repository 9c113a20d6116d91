"""One value → the text of a cell: significant digits, units, thousands separated, – for what is absent."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

ABSENT = "–"


def is_number(value: object) -> TypeGuard[float]:
    """Whether the value is a real number other than NaN; infinities are."""
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def number(value: Any, digits: int = 4) -> str:
    """A number to so many significant digits, thousands separated; integers in full.

    >>> number(1234567), number(0.000012345), number(-0.5), number(None)
    ('1,234,567', '1.234e−05', '−0.5000', '–')
    """
    if not is_number(value):
        return ABSENT
    if isinstance(value, Integral):
        text = f"{int(value):,}"
    elif math.isinf(value):
        text = "∞" if value > 0 else "-∞"
    elif value == 0:
        text = "0"
    elif not 1e-4 <= abs(value) < 1e15:
        text = f"{value:.{digits - 1}e}"
    else:
        text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return text.replace("-", "−")


def aligned(values: Sequence[Any], digits: int = 4) -> list[str]:
    """Numbers of one column with the same decimals: none for whole ones, else as many as the largest needs."""
    known = [abs(value) for value in values if is_number(value) and not math.isinf(value) and value != 0]
    if not known or max(known) >= 1e15:
        return [number(value) for value in values]
    decimals = min(6, max(0, digits - 1 - math.floor(math.log10(max(known)))))
    if all(float(value).is_integer() for value in known):
        decimals = 0
    if min(known) < 10.0**-decimals:
        return [number(value) for value in values]
    texts = [f"{value:,.{decimals}f}" if is_number(value) else ABSENT for value in values]
    return [text.replace("-", "−").replace("inf", "∞") for text in texts]


def plain(value: Any) -> str:
    """A setting as it was written: floats to six digits, booleans as words, long lists by their length."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "none" if len(value) <= 12 else f"{len(value):,} values"
    if isinstance(value, Integral):
        return number(value)
    return f"{value:.6g}" if isinstance(value, Real) else str(value)


def percent(part: Any, whole: Any = 1) -> str:
    """A share in per cent; only exactly nothing is 0 %, only exactly everything is 100 %."""
    if not (is_number(part) and is_number(whole)) or whole == 0 or math.isinf(part) or math.isinf(whole):
        return ABSENT
    share = 100 * part / whole
    if 0 < share < 0.05:
        return "<0.1 %"
    return ">99.9 %" if 99.95 <= share < 100 else f"{share:.1f} %"


def duration(seconds: Any) -> str:
    """Seconds as a person says them.

    >>> duration(0.456), duration(75), duration(7500)
    ('0.46 s', '1 min 15 s', '2 h 05 min')
    """
    if not is_number(seconds) or math.isinf(seconds):
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def size(num_bytes: Any) -> str:
    """Bytes in binary units."""
    if not is_number(num_bytes):
        return ABSENT
    power = min(4, int(math.log2(num_bytes) // 10)) if num_bytes >= 1 else 0
    return f"{num_bytes / 1024**power:,.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def text_of(value: Any) -> str:
    """Any name as text."""
    text = "" if value is None else str(value)
    return text or ABSENT


def signed(value: Any, decimals: int = 3) -> str:
    """A number with its sign and fixed decimals."""
    if not is_number(value) or math.isinf(value):
        return number(value)
    text = f"{value:+,.{decimals}f}"
    return text.replace("-", "−") if float(value) else text[1:]


def one_decimal(value: Any) -> str:
    """A length, with one decimal."""
    return f"{value:,.1f}".replace("-", "−") if is_number(value) and not math.isinf(value) else number(value)


def exact(value: Any) -> str:
    """A number with all its digits, to compare and to copy."""
    return repr(float(value)) if is_number(value) else ABSENT


UNITS = {"h": 3600, "min": 60, "s": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def sort_key(text: str) -> str:
    """The number that a cell shows, for sorting; empty where it shows none. Of several the first.

    >>> sort_key("1,234"), sort_key("−0.5 to 2"), sort_key("<0.1 %"), sort_key("1 min 15 s"), sort_key("–")
    ('1234.0', '-0.5', '0.1', '75.0', '')
    """
    plain_text = text.replace("−", "-").replace(",", "")
    if "∞" in plain_text:
        return "-Infinity" if "-∞" in plain_text else "Infinity"
    parts = re.findall(r"([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?: (h|min|s|B|KiB|MiB|GiB|TiB)\b)?", plain_text)
    if not parts:
        return ""
    if not parts[0][1]:
        return str(float(parts[0][0]))
    return str(sum(float(value) * UNITS[unit] for value, unit in parts if unit))


def cell(value: Any) -> str:
    """One value as text: numbers to four digits."""
    return number(value) if is_number(value) else plain(value)
