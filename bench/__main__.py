"""`python -m bench`: time this project against its peers, print, and perhaps keep the results."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import allocator
from .options import Options, parse, sections_of

if TYPE_CHECKING:
    from .records import Record

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the sections, print and perhaps keep the results."""
    argv = list(sys.argv[1:] if argv is None else argv)
    given = parse(argv, prog=os.environ.get("FASTLLM_BENCH_PROG", "python -m bench"))
    if given.sections[:1] == ["compare"]:
        from . import compare

        return compare.main(given.sections[1:])
    if given.sections[:1] == ["merge"]:
        from . import merge

        return merge.main(given.sections[1:], RESULTS)
    allocator.settle(given.malloc, argv)
    options = _options(given)
    from . import machine, table
    from .records import OURS, Document

    facts = machine.describe(options)
    print(machine.line(facts), flush=True)
    document = Document(facts)
    try:
        for record in table.as_they_come(_records(options)):
            document.records.append(record)
    finally:  # what there is of a run that was interrupted is worth keeping too
        for path, write in _outputs(options, facts):
            write(document, path)
            print(f"wrote {path}")
        if options.device == "cuda":
            from .cuda import summary

            print(summary.text(document.records), flush=True)
    ours = [record for record in document.records if record.contender == OURS]
    return int(any(record.note.startswith(("WRONG", "ERROR")) for record in ours))


def _records(options: Options) -> Iterator[Record]:
    if options.device == "cuda":
        from .cuda import setting, supervisor

        setting.prepare()
        yield from supervisor.run(options)
        return
    from .sections import sections

    for run in sections(options.sections):
        yield from run(options)


def _options(given: Any) -> Options:
    import torch

    if given.threads:
        torch.set_num_threads(given.threads)
    device = given.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench: --device cuda, but PyTorch finds no CUDA or ROCm device here")
    known = sections_of(device)
    unknown = sorted(set(given.sections) - set(known))
    if unknown:
        sys.exit(f"bench: no section {', '.join(unknown)} on {device}: expected {', '.join(known)}")
    seed = secrets.randbits(31) if given.seed is None else given.seed
    fields = vars(given) | {
        "sections": tuple(name for name in known if name in given.sections or not given.sections),
        "device": device,
        "seed": seed,
        "scale": "quick" if given.quick else "full",
        "dtypes": tuple(given.dtypes),
        "threads": torch.get_num_threads(),
        "compile": not given.quick if given.compile is None else given.compile,
    }
    options = Options(**fields)
    # Worker processes and the libraries in them read the number of threads here.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
    return options


def _outputs(options: Options, facts: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    from . import machine, page
    from .records import Document

    kept = RESULTS / machine.slug(facts["device"])
    jsons = [options.json, kept.with_suffix(".json") if options.save else None]
    pages = [options.html, kept.with_suffix(".html") if options.save else None]
    yield from ((path, Document.write) for path in jsons if path)
    yield from ((path, page.write) for path in pages if path)


if __name__ == "__main__":
    sys.exit(main())
