#pragma once

#include <stddef.h>

namespace fastllm {

// Makes this process keep the memory that it frees, for its own next allocations: a training step
// allocates what the step before freed. By default glibc gives every block above 32 MB, and the end
// of the heap, back to the system, and each of their pages costs a fault when it comes again.
//
// For the rest of the process, and for all of it: only programs that train may ask for it. Returns
// whether the C library knows how (glibc does).
bool keep_memory();

// Asks for large pages for a big piece of memory that will be read from end to end again and again:
// looking up small pages costs a tenth of the bandwidth.
void prefer_large_pages(void* memory, size_t bytes);

}  // namespace fastllm
