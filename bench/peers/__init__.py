"""The libraries that fastllm is measured against, in a virtual environment of their own.

`python -m bench.peers` sets it up. What runs inside it (`worker`, `trainers`, `stopwatch`, `loops`,
`generation`, `llama`) imports nothing of fastllm.
"""
