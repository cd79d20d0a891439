"""`python -m bench`: time every op against PyTorch, print a table and one line of JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fastllm.ops import OPS

from . import harness

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Parse the command line, run the suites, print and perhaps keep the results."""
    options = _options()
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = harness.environment(device)
    print(" | ".join(f"{key} {value}" for key, value in machine.items() if value is not None))
    backend = harness.KERNELS[device.type]
    print(f"{backend}: {harness.serves(backend, device)[1]}")
    results = []
    for op in options.ops:
        for dtype in options.dtypes:
            for record in harness.bench(
                op, device, getattr(torch, dtype), options.quick, options.compile
            ):
                _show(record)
                results.append(record)
    document = {**machine, "results": results}
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{harness.slug(machine['device'])}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"kept in {path}")
    print(json.dumps(document))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=main.__doc__)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16", "float16"),
        default=("float32", "bfloat16"),
    )
    parser.add_argument("--quick", action="store_true", help="the smallest case, three rounds")
    parser.add_argument("--compile", action="store_true", help="also torch.compile the reference")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--save", action="store_true", help="keep in bench/results/<device>.json")
    return parser.parse_args()


def _show(record: dict[str, Any]) -> None:
    if record["by"] == "torch":
        scale, prefix = (1e9, "G") if record["work"] >= 1e9 else (1e6, "M")
        print(
            f"\n{record['op']}  {record['case']}  {record['dtype']}  {record['pass']}"
            f"  ({record['work'] / scale:.3g} {prefix}{record['unit']})"
        )
    print(
        f"  {record['by']:<14}{_time(record['seconds']):>10}  +-{record['spread']:<5.0%}"
        f"{record['work'] / record['seconds'] / 1e9:>8.2f} G{record['unit']}/s"
        f"{record['speedup']:>8.2f}x",
        flush=True,
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


if __name__ == "__main__":
    main()
