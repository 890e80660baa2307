#include "parallel.h"

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#include "local_attention.h"

namespace sasa {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr int kMostThreads = 1024;  // an OpenMP runtime that cannot start all requested threads aborts

std::atomic<sasa_parallel> openmp{nullptr};

void use_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  if (bytes < 2 * kHugePage) return;
  // The complete pages within the memory; the advice does not change their contents.
  const uintptr_t page = 4096, start = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(start), (reinterpret_cast<uintptr_t>(memory) + bytes - start) / page * page,
          MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

struct Job {
  std::atomic<int64_t> next{0};
  std::atomic<int> status{SASA_OK};
  int64_t tasks;
  size_t bytes;
  Work work;
  void* context;
};

// Runs on every thread: takes tasks until none is left. Which thread runs a task does not change its result.
void worker(void* data) noexcept {
  Job& job = *static_cast<Job*>(data);
  char* workspace = nullptr;
  for (;;) {
    const int64_t task = job.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= job.tasks) break;
    if (workspace == nullptr && job.bytes > 0 && (workspace = allocate(job.bytes)) == nullptr) {
      job.status.store(SASA_OUT_OF_MEMORY);
      job.next.store(job.tasks);
      break;
    }
    job.work(job.context, task, workspace);
  }
  release(workspace);
}

// For callers without OpenMP: threads that live only for this call.
void start_threads(Job& job, int threads) {
  std::vector<std::thread> started;
  try {
    started.reserve(size_t(threads));
    for (int i = 1; i < threads; ++i) started.emplace_back(worker, &job);
  } catch (const std::exception&) {
    // No more threads, or no memory for them: those already started do the work.
  }
  worker(&job);
  for (auto& thread : started) thread.join();
}

}  // namespace

char* allocate(size_t bytes) {
  const bool huge = bytes >= 2 * kHugePage;
  const size_t alignment = huge ? kHugePage : 64;
  void* memory = nullptr;
  if (bytes > SIZE_MAX - alignment) return nullptr;
  if (posix_memalign(&memory, alignment, (bytes + alignment - 1) / alignment * alignment) != 0) return nullptr;
  use_huge_pages(memory, bytes);
  return static_cast<char*>(memory);
}

void release(char* memory) { free(memory); }

int run_parallel(int threads, int64_t tasks, size_t bytes, Work work, void* context) {
  Job job;
  job.tasks = tasks;
  job.bytes = bytes;
  job.work = work;
  job.context = context;
  if (threads > kMostThreads) threads = kMostThreads;
  if (threads > tasks) threads = int(tasks);
  const sasa_parallel parallel = openmp.load();
  if (threads <= 1)
    worker(&job);
  else if (parallel != nullptr)
    parallel(worker, &job, unsigned(threads), 0);
  else
    start_threads(job, threads);
  return job.status.load();
}

}  // namespace sasa

extern "C" void sasa_set_parallel(sasa_parallel parallel) { sasa::openmp.store(parallel); }

extern "C" void sasa_use_huge_pages(void* memory, size_t bytes) { sasa::use_huge_pages(memory, bytes); }
