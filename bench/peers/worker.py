"""A peer: a worker that trains, scores or generates with TRL, transformers or llama.cpp.

`python -m bench.peers.worker FOLDER SETTINGS`, in the peers' environment. The settings, JSON:

    by        "trl", "transformers" or "llama.cpp"
    dtype     "fp32", "amp" (autocast to bf16) or "bf16" (weights too); TRL: "fp32" or "amp"
    compile   torch.compile the step
    defaults  TRL: leave every setting that concerns speed as the library has it
    packing   TRL's SFT: its own packing, batch rows of `max_length`
    cache     generate: "dynamic" or "static"
    weights   llama.cpp: "f32", "bf16" or "q8_0"
    sort      score_pairs: each batch in four parts, sequences of like length together
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_DISABLED": "true",
    "CUDA_VISIBLE_DEVICES": "",
}
# Before any of the peers is imported.
os.environ.update(QUIET)

import torch  # noqa: E402

from bench.steps.job import Job  # noqa: E402
from bench.steps.turns import Ended, Line, serve  # noqa: E402


def main() -> None:
    """Run the job until the parent has enough."""
    line, job = Line(), Job.read(Path(sys.argv[1]), json.loads(sys.argv[2]))
    warnings.filterwarnings("ignore")
    torch.set_num_threads(job.threads)
    try:
        if job.settings["by"] == "trl":
            with tempfile.TemporaryDirectory() as scratch:
                # The datasets library keeps what it maps: in a folder that goes.
                os.environ["HF_DATASETS_CACHE"] = scratch
                from bench.peers import trainers

                trainers.TRAINERS[job.kind](line, job, scratch).train()
        elif job.settings["by"] == "llama.cpp":
            from bench.peers import llama

            serve(line, llama.generate(job))
        elif job.kind == "generate":
            from bench.peers import generation

            serve(line, generation.generate(job))
        else:
            from bench.peers import loops

            serve(line, loops.BLOCKS[job.kind](job))
    except Ended:
        pass


if __name__ == "__main__":
    main()
