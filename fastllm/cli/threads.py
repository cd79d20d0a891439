"""How the threads of a command wait for each other; decided before torch is loaded."""

from __future__ import annotations

import os
from pathlib import Path

# A thread that spins at a barrier takes the core from the one it waits for as soon as the machine
# does other work too: with OpenMP's default (some milliseconds) a step then takes several times as
# long. One that sleeps at once has to be woken for every op. GNU's OpenMP can spin for about 0.1
# ms, the usual gap between two ops, and costs no more than sleeping where the cores are taken.
SETTINGS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
_OWN_SETTINGS = (*SETTINGS, "KMP_BLOCKTIME")

_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


def settle() -> None:
    """Set what OpenMP and the tokenizers read when they are loaded, unless the user has."""
    if not any(name in os.environ for name in _OWN_SETTINGS):
        os.environ.update(SETTINGS)
    if "OMP_NUM_THREADS" in os.environ:  # a list: one number for each level of nesting
        first = os.environ["OMP_NUM_THREADS"].split(",")[0].strip()
        os.environ.setdefault("RAYON_NUM_THREADS", first)


def wait_policy() -> str:
    """What a waiting thread does, and who says so."""
    given = {name: os.environ[name] for name in _OWN_SETTINGS if name in os.environ}
    if not given:
        return "OpenMP's own (nothing is set)"
    values = ", ".join(f"{name}={value}" for name, value in given.items())
    if given == SETTINGS:
        return f"sleeps after about 0.1 ms ({values}; set by fastllm)"
    return f"as the environment says ({values})"


def allocator() -> str:
    """Which malloc serves this process, and the settings of glibc's that the environment has."""
    maps = Path("/proc/self/maps")
    mapped = maps.read_text(errors="replace") if maps.exists() else ""
    kind = next((name for name in _ALLOCATORS if f"lib{name}" in mapped), "the system's")
    tuned = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _tunes(name)]
    return f"{kind} ({', '.join(tuned)})" if tuned else kind


def _tunes(name: str) -> bool:
    return name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")
