// What the processor is good at, beyond the instructions that it has.

#pragma once

namespace fastllm {

// Do the bf16 dot instructions outrun fp32? AMD multiplies bf16 at twice the rate of fp32 (Zen 5:
// 474 against 254 GFLOP/s per core) and Intel's AMX tiles do better still, but Intel's vdpbf16ps
// without AMX runs at half the rate of fp32 (Emerald Rapids: 84 against 170 GFLOP/s): there, bf16 is
// read as bf16 and multiplied in fp32.
bool fast_bf16_dot();

// Does vdpbf16ps alone, without tiles?
bool fast_bf16_pairs();

}  // namespace fastllm
