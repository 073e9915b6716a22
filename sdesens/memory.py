"""Peak memory of a piece of work, read off the operating system."""

import contextlib
import ctypes
import gc
import re
from pathlib import Path


class PeakMemory:
    """Bytes that the process's resident memory rises by, at its peak, from the making of this object on (Linux).

    Memory that earlier work freed but the allocator kept is handed back first, so that it does not hide the rise.
    """

    def __init__(self):
        self.start: int | None = None
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
            self.start = self._status("VmHWM")

    def bytes(self) -> int | None:
        """The rise so far, or None where the platform does not tell."""
        return None if self.start is None else max(self._status("VmHWM") - self.start, 0)

    @staticmethod
    def _status(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else 0
