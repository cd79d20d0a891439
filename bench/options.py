"""The command line, without torch: help answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECTIONS = ("roofline", "ops", "growth", "threads", "steps", "scoring", "generate")
CUDA_SECTIONS = (
    "check",
    "ceilings",
    "ops",
    "attention",
    "head",
    "optimizer",
    "steps",
    "decode",
)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    sections: tuple[str, ...] = SECTIONS
    quick: bool = False
    """Small cases and few rounds: the whole suite in a few minutes on two cores."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    device: str = "cpu"
    threads: int = 1
    """Threads of every contender, in whatever process it runs."""
    compile: bool = True
    """Contenders under torch.compile too."""
    only: str = ""
    """Leave out what does not have this in its name."""
    malloc: str = "tuned"
    """"tuned": freed memory is kept, for all contenders; "default": glibc's own thresholds."""
    seed: int | None = None
    """Of the inputs on a GPU; None draws one, which is printed and kept."""
    minutes: float | None = None
    """For all sections on a GPU together; None: a little under nine."""
    scale: str = "full"
    """Of the cases on a GPU: full, quick or tiny (which is for tests)."""
    data: Path | None = None
    """Folder of real data; None: $FASTLLM_DATA or ../shared/data."""
    save: bool = False
    json: Path | None = None
    html: Path | None = None

    @property
    def rounds(self) -> int:
        """Rounds of a comparison."""
        return 3 if self.quick else 7

    def wants(self, name: str) -> bool:
        """Whether `--only` lets this through."""
        return self.only in name


def parse(argv: Sequence[str], prog: str = "python -m bench") -> argparse.Namespace:
    """Parse the command line; `--help` ends here."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Time fastllm against PyTorch and other trainers, side by side.",
        epilog=f"{prog} compare A.json B.json prints the ratios of two saved results; "
        f"{prog} merge A.json B.json ... keeps sections that were run one by one as one result.",
    )
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help=f"{', '.join(SECTIONS)}; with --device cuda {', '.join(CUDA_SECTIONS)} (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="small cases, a few minutes in all")
    parser.add_argument("--only", default="", metavar="TEXT", help="only names that contain TEXT")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:2])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, help="of the inputs on a GPU (default: a new one)")
    parser.add_argument(
        "--minutes", type=float, help="for all sections on a GPU (default: a little under 9)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="contenders under torch.compile too (default: unless --quick)",
    )
    parser.add_argument(
        "--malloc",
        choices=("tuned", "default"),
        default="tuned",
        help="keep freed memory, for all contenders, or leave glibc as it is",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="real data of the steps (default: $FASTLLM_DATA or ../shared/data)",
    )
    parser.add_argument("--save", action="store_true", help="keep in bench/results/<device>.*")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts")
    options = parser.parse_args(argv)
    if options.sections[:1] not in (["compare"], ["merge"]):
        known = sections_of(options.device)
        unknown = sorted(set(options.sections) - set(known))
        if unknown:
            parser.error(f"unknown section {', '.join(unknown)}: expected {', '.join(known)}")
    return options


def sections_of(device: str) -> tuple[str, ...]:
    """The sections there are on a device; "auto" may turn out to be either."""
    return {"cpu": SECTIONS, "cuda": CUDA_SECTIONS}.get(device, (*SECTIONS, *CUDA_SECTIONS))
