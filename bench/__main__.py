"""`python -m bench`: time this project against its peers, print, and perhaps keep the results."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import allocator
from .options import SECTIONS, Options, parse

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
    print(machine.line(facts))
    document = Document(facts)
    try:
        for record in table.as_they_come(_records(options)):
            document.records.append(record)
    finally:  # what there is of a run that was interrupted is worth keeping too
        for path, write in _outputs(options, facts):
            write(document, path)
            print(f"wrote {path}")
    ours = [record for record in document.records if record.contender == OURS]
    return int(any(record.note.startswith("WRONG") for record in ours))


def _records(options: Options) -> Iterator[Record]:
    from .sections import sections

    for run in sections(options.sections):
        yield from run(options)


def _options(given: Any) -> Options:
    import torch

    if given.threads:
        torch.set_num_threads(given.threads)
    fields = vars(given) | {
        "sections": tuple(given.sections) or SECTIONS,
        "dtypes": tuple(given.dtypes),
        "threads": torch.get_num_threads(),
        "compile": not given.quick if given.compile is None else given.compile,
    }
    if given.device == "auto":
        fields["device"] = "cuda" if torch.cuda.is_available() else "cpu"
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
