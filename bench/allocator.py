"""The allocator's settings, the same for every contender.

glibc gives large blocks back to the system when they are freed, and faults them in again page by
page when the next is wanted. A long training run is better off keeping them, and so are the
peers: measured under the defaults, a tuned program would win for a reason that is not its own.
"""

from __future__ import annotations

import os
import platform
import sys

KEEP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


def settle(choice: str, argv: list[str]) -> None:
    """Start this program again under the settings, which the C library reads when it starts.

    Returns where they hold already, or where another library allocates.
    """
    if choice != "tuned" or platform.libc_ver()[0] != "glibc":
        return
    if any(name not in os.environ for name in KEEP):
        os.environ.update(KEEP)
        os.execv(sys.executable, [sys.executable, "-m", "bench", *argv])
