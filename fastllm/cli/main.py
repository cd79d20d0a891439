"""`fastllm <command>`: find the command, run it, and turn mistakes into one clear line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from . import threads
from .commands import COMMANDS, Command
from .config_file import read_config
from .options import UsageError, build_parser, nearest, parse

EXIT_FAILED, EXIT_USAGE, EXIT_DATA, EXIT_NUMERIC, EXIT_STORAGE = 1, 2, 3, 4, 5
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done, 2 usage, 3 data, 4 numeric stop, 5 storage, 1 anything else.
    FASTLLM_DEBUG=1 shows the traceback of an error.
    """
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("fastllm: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone (`fastllm ... | head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        if os.environ.get("FASTLLM_DEBUG") == "1":
            raise
        print(f"fastllm: error: {_one_line(error)}", file=sys.stderr)
        return _exit_code(error)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else EXIT_USAGE
    if argv[0] == "--version":
        from fastllm import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        kind = "option" if argv[0].startswith("-") else "command"
        near = nearest(argv[0], list(COMMANDS)) or f"; the commands are {', '.join(COMMANDS)}"
        raise UsageError(f"unknown {kind} {argv[0]!r}{near}")
    command = COMMANDS[argv[0]]
    if command.passes_on:
        return command.load()({"arguments": argv[1:]})
    values = _values(command, argv[1:])
    threads.settle()
    return 0 if values is None else command.load()(values)


def _values(command: Command, argv: list[str]) -> dict[str, Any] | None:
    """Every option's value: the command line's, else the YAML file's, else the default."""
    options = command.options()
    parser = build_parser(command.name, command.summary, options)
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        return None
    given = parse(parser, options, argv)
    if given.get("config") is not None:
        given = read_config(given["config"], options) | given
    missing = [
        f"--{option.name}" for option in options if option.required and option.name not in given
    ]
    if missing:
        raise UsageError(f"{command.name} needs {', '.join(missing)}")
    return given


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastllm <command> [options]",
            "",
            "LLM post-training: supervised fine-tuning, reward models and GRPO.",
            "",
            *lines,
            "",
            "fastllm <command> --help lists a command's options.",
        ]
    )


def _exit_code(error: BaseException) -> int:
    kinds = {type_.__name__ for type_ in type(error).__mro__}
    # By name: the classes live in modules that import torch or are not needed otherwise.
    if "DataError" in kinds or isinstance(error, FileNotFoundError):
        return EXIT_DATA
    if "NumericError" in kinds:
        return EXIT_NUMERIC
    if "CheckpointError" in kinds or isinstance(error, OSError):
        return EXIT_STORAGE
    return EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAILED


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
