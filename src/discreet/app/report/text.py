"""From values to text that is safe inside a page, and figures that never flatter."""

from __future__ import annotations

import html
import math
import unicodedata

LONGEST = 160
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def safe(value: object) -> str:
    """Any value as text for a page: no markup, no control or direction characters, of bounded length.

    **Guarantees.** The result holds ``< > & " '`` only as entities, no character of category Cc, Cf, Cs, Co, Cn, Zl or
    Zp, and at most `LONGEST` characters of the value.
    """
    text = str(value)
    shown = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    plain = "".join("�" if unicodedata.category(letter) in _HIDDEN else letter for letter in shown)
    return html.escape(plain, quote=True)


def named(value: object) -> str:
    """A name from the data or the user, escaped, and kept apart from the direction of the text around it."""
    return f"<bdi>{safe(value)}</bdi>"


def upward(value: float | None, *, digits: int = 3) -> str:
    """An upper bound such as epsilon, rounded up so that the page never states less than was spent."""
    if value is None:
        return "unknown"
    if math.isinf(value):
        return "∞"
    if value > 1e6:
        return scientific(value)
    scale = 10**digits
    return f"{math.ceil(value * scale - 1e-9) / scale:.{digits}f}"


def scientific(value: float | None, *, digits: int = 2) -> str:
    """``1.07 × 10⁻⁵``, rounded up in the last digit shown."""
    if value is None:
        return "unknown"
    if value == 0 or math.isinf(value):
        return "0" if value == 0 else "∞"
    exponent = math.floor(math.log10(abs(value)))
    scale = 10**digits
    mantissa = math.ceil(value / 10.0**exponent * scale - 1e-9) / scale
    if mantissa >= 10:
        mantissa, exponent = mantissa / 10, exponent + 1
    return f"{mantissa:.{digits}f} × 10{str(exponent).translate(_SUPERSCRIPT)}"


def plain(value: float | None) -> str:
    """A number as people write it: whole ones with thin spaces, others with four significant digits."""
    if value is None or math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "∞"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return scientific(value)
    return f"{value:.4g}"


def percent(value: float | None, *, digits: int = 1) -> str:
    """A share between 0 and 1 as a percentage."""
    return "unknown" if value is None else f"{100 * value:.{digits}f}\u202f%"


def duration(seconds: float | None) -> str:
    """Seconds as ``4.2 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds is None or math.isinf(seconds) or seconds < 0:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    shown = f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
    return shown.replace(" ", "\u00a0")


def storage(count: float) -> str:
    """Bytes as ``0.6 MiB`` or ``1.5 GiB``."""
    shown = f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
    return shown.replace(" ", "\u00a0")


def wilson(share: float, *, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share seen in ``count`` trials (Wilson 1927): it stays inside [0, 1] for every share."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(max(share * (1 - share), 0.0) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
