"""`python -m bench.peers`: set up the environment of the libraries to measure against.

About 2 GB. pip's own settings (PIP_INDEX_URL and so on) say where the packages come from; torch
is of the version that runs here. A second call completes what is missing and prints the versions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import environment


def main() -> None:
    """Set up, and print what is there."""
    parser = argparse.ArgumentParser(prog=environment.COMMAND, description=__doc__)
    parser.add_argument(
        "--path",
        type=Path,
        default=environment.FOLDER,
        help="folder of the environment (default: %(default)s; elsewhere, tell the benchmark by "
        "FASTLLM_PEERS)",
    )
    parser.add_argument(
        "--llama-cpp",
        action="store_true",
        help="build llama.cpp too, for this processor: needs a C++ compiler and some minutes",
    )
    options = parser.parse_args()
    for name, version in environment.set_up(options.path, options.llama_cpp).items():
        print(f"{name} {version}")
    print(f"ready in {options.path}")


if __name__ == "__main__":
    main()
