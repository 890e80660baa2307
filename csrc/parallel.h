// Work distributed to threads, shared by all instruction sets.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace sasa {

// Calls work(context, task, workspace) once for every task, on up to `threads` threads, each with its own workspace of
// `bytes` bytes, aligned to 64. Returns a sasa_status.
using Work = void (*)(void* context, int64_t task, char* workspace);
int run_parallel(int threads, int64_t tasks, size_t bytes, Work work, void* context);

// Memory aligned to 64 bytes, in huge pages if it is large: a kernel touches it once, so page faults would be costly.
// nullptr if there is not enough.
char* allocate(size_t bytes);
void release(char* memory);

}  // namespace sasa
