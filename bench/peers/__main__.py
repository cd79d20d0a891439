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
    folder = parser.parse_args().path
    for name, version in environment.set_up(folder).items():
        print(f"{name} {version}")
    print(f"ready in {folder}")


if __name__ == "__main__":
    main()
