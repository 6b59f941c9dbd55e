"""Sizes and times in words, and words into bytes: KIB, MIB, GIB are powers of two, kB, MB, GB powers of ten.

"15GiB" --parse_size()--> 16106127360 --file_size()--> "16.11 GB"
"""

import re


def percent(part: int, whole: int) -> str:
    """`part` of `whole` in percent, rounded down, so that 100 means all."""
    return f"{100 * part // whole if whole else 100:3d} %"


def file_size(count: int) -> str:
    """Bytes of a file or of a disk: 12.35 GB, 4.3 MB, 740.0 kB (1 GB = 10**9 bytes)."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def memory_size(count: int) -> str:
    """Bytes of memory: 12.35 GiB, 4.3 MiB (1 GiB = 2**30 bytes)."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 2 else f"{count / MIB:.1f} MiB"


def amount(part: int, whole: int) -> str:
    """`part` of `whole` bytes in the unit that fits `whole` (1 GB = 10**9 bytes, as disks and networks count)."""
    unit, name = (1e9, "GB") if whole >= 1e9 else (1e6, "MB") if whole >= 1e6 else (1e3, "kB")
    return f"{part / unit:.2f} of {whole / unit:.2f} {name}"


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds, or hours:minutes:seconds."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


KIB, MIB, GIB = 2**10, 2**20, 2**30


MOST_BYTES = 2**60
"""No GPU and no disk has more; beyond it, numbers of bytes leave the range of a float."""

_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "kb": 10**3, "mb": 10**6, "gb": 10**9}


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b|b|)\s*", re.IGNORECASE)


def parse_size(size: int | float | str) -> int:
    """Bytes of a size given as a number of bytes or in words ("15GiB", "500 MB").

    Raises:
        ValueError: the text is no size, or the size is negative, infinite or beyond MOST_BYTES.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if not match:
            raise ValueError(f"{size!r} is no memory size; write it as '15GiB', '800 MiB', '16 GB' or in bytes")
        size = float(match[1]) * _UNITS[match[2].lower()]
    if not isinstance(size, int | float) or isinstance(size, bool) or not 0 <= size <= MOST_BYTES:
        raise ValueError(f"{shown(size)} is no memory size: it must be a number of bytes, zero or more, at most 2**60")
    return int(size)


def shown(value: object) -> str:
    """A value as it was given, for a message; of a whole number without end, how long it is."""
    if isinstance(value, int) and abs(value) > 10**40:
        return f"a number of {value.bit_length()} bits"
    return repr(value)
