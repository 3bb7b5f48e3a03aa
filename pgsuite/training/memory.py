"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
from pathlib import Path

STATM = Path("/proc/self/statm")  # of Linux: sizes of the process in pages, of which the second is resident


class FreedMemory:
    """Gives freed memory back to the system when a process has become half as large again.

    The allocator of glibc keeps what was freed, and rather than fill the gaps that are left between aligned blocks it
    asks for more: compiled learning from images in bfloat16 would grow by gigabytes.  Does nothing with another C
    library, or where the size of the process cannot be read.
    """

    def __init__(self) -> None:
        self.pages = 0  # resident when it was last given back
        self.trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if STATM.exists() else None

    def give_back(self) -> None:
        if self.trim is not None and resident_pages() > 1.5 * self.pages:
            self.trim(0)
            self.pages = resident_pages()


def resident_pages() -> int:
    return int(STATM.read_text().split()[1])


freed_memory = FreedMemory()  # of this process
