"""`python -m fastllm` is the command `fastllm`."""

from fastllm.cli import main

raise SystemExit(main())
