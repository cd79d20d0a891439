"""Records of a made-up run, one of each kind that the page has a place for."""

from __future__ import annotations

import dataclasses

import pytest

from bench.records import OURS, Document, Record


def contest(section: str, name: str, case: str, dtype: str, ours: float, **peers: float) -> list:
    """Three rounds each, 2 % apart."""
    times = {**peers, OURS: ours}
    return [
        Record(section, name, case, dtype, who, (t, t * 1.02, t * 0.99), 1e9, "FLOP", 0.5)
        for who, t in times.items()
    ]


@pytest.fixture
def document() -> Document:
    records = [
        *contest("roofline", "matrix product", "2048", "float32", 0.1, mm=0.2),
        *contest("ops", "rope forward+backward", "16x4", "float32", 1e-3, eager=6e-3, compile=2e-3),
        *contest("ops", "rope forward", "16x4", "float32", 1e-3, eager=1.01e-3),
        *contest("steps", "RM step", "8 pairs", "float32", 0.1, TRL=0.3),
        Record("steps", "RM step", "8 pairs", "float32", "axolotl <8>", note="not installed"),
    ]
    curves = {"growth": ("SFT step", "length"), "threads": ("RM step", "threads")}
    for section, (name, axis) in curves.items():
        for x in (256, 1024):
            for who in (OURS, "transformers"):
                point = Record(section, name, f"{x}", "float32", who, (x / 1e4,), x, "tokens")
                expected = x / 2e4 if section == "growth" else None
                records.append(dataclasses.replace(point, axis=axis, x=x, expected=expected))
    machine = {
        "device": "A <Fast> Processor",
        "threads": 2,
        "commit": "0123456789abcdef+",
        "allocator": "tuned",
        "versions": {"torch": "2.13.0"},
        "governor": None,
    }
    return Document(machine, records)
