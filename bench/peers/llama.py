"""llama.cpp through its Python binding: the case's model as a GGUF file, greedy."""

from __future__ import annotations

import ctypes
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

from bench.steps.drawing import Drawn, in_parts
from bench.steps.job import Job
from bench.steps.turns import Block

TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_A_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Prompt tokens handed over at a time, as many as llama.cpp takes by default.
PROMPT_TOKENS = 2048


def generate(job: Job) -> Block:
    """Greedy completions of one length, each behind its own copy of the prompt."""
    ids = np.array([record["ids"] for record in job.records for _ in range(job.group)])
    new = job.new_tokens
    with tempfile.TemporaryDirectory() as folder:
        path = convert(Path(job.model), Path(folder), job.settings["weights"])
        context = Context(path, job.threads, len(ids), ids.shape[1] + new)

    def draw(whole: bool) -> Drawn:
        tokens = [context.prefill(ids)]
        for number in range(new - 1 if whole else 0):
            tokens.append(context.step(tokens[-1], ids.shape[1] + number))
        return Drawn(np.stack(tokens, axis=1).tolist())

    return in_parts(draw, job.lengths)


class Context:
    """A loaded model and a cache for so many sequences of at most `length` tokens."""

    def __init__(self, path: Path, threads: int, sequences: int, length: int) -> None:
        llama_cpp.llama_backend_init()
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers, settings.use_mmap = 0, False
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = sequences * length, sequences
        options.n_batch = max(PROMPT_TOKENS, length)
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no room for {sequences} x {length} tokens")
        self._batch = llama_cpp.llama_batch_init(options.n_batch, 0, 1)
        for place in range(options.n_batch):
            self._batch.n_seq_id[place] = 1

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Forget everything, read prompts [B, P] and draw the first token of each [B]."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        at_a_time = max(1, PROMPT_TOKENS // ids.shape[1])
        drawn = []
        for first in range(0, len(ids), at_a_time):
            part = ids[first : first + at_a_time]
            place = 0
            for sequence, prompt in enumerate(part.tolist(), first):
                for position, token in enumerate(prompt):
                    self._put(place, token, position, sequence, position == len(prompt) - 1)
                    place += 1
            drawn.append(self._draw(place, len(part)))
        return np.concatenate(drawn)

    def step(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """Read the newest token of every sequence [B] and draw the next [B]."""
        for sequence, token in enumerate(tokens.tolist()):
            self._put(sequence, token, position, sequence, True)
        return self._draw(len(tokens), len(tokens))

    def _put(self, place: int, token: int, position: int, sequence: int, wanted: bool) -> None:
        batch = self._batch
        batch.token[place], batch.pos[place] = token, position
        batch.seq_id[place][0], batch.logits[place] = sequence, wanted

    def _draw(self, tokens: int, outputs: int) -> np.ndarray:
        self._batch.n_tokens = tokens
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode: status {status}")
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(outputs, self._vocabulary)).argmax(axis=1)


def convert(model: Path, folder: Path, weights: str) -> Path:
    """Write a Llama model of a Hugging Face folder as GGUF, its matrices in another format."""
    config = json.loads((model / "config.json").read_text())
    kind, file_type = TYPES[weights]
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, config)
    writer.add_file_type(file_type)
    for name, values in load_file(model / "model.safetensors").items():
        place, values = _placed(name.removesuffix(".weight"), values, config)
        if values.ndim == 1 or weights == "f32":
            writer.add_tensor(f"{place}.weight", np.ascontiguousarray(values, np.float32))
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), kind)
            writer.add_tensor(f"{place}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _placed(name: str, values: np.ndarray, config: dict[str, Any]) -> tuple[str, np.ndarray]:
    """A tensor's name there, and its rows in the order that llama.cpp's rotation pairs them."""
    if name in WHOLE:
        return WHOLE[name], values
    _, _, layer, part = name.split(".", 3)
    if part.endswith("q_proj"):
        values = _paired(values, config["num_attention_heads"])
    if part.endswith("k_proj"):
        values = _paired(values, config["num_key_value_heads"])
    return f"blk.{layer}.{IN_A_LAYER[part]}", values


def _paired(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + D/2 of each head side by side."""
    halves = values.reshape(heads, 2, -1, values.shape[-1])
    return halves.swapaxes(1, 2).reshape(values.shape)
