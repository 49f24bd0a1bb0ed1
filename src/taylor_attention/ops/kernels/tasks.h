// Many pieces of work on several threads.
#pragma once
#include "simd.h"

namespace taylor {
namespace TARGET {

// Tasks 0..count-1. Each thread begins with a share that is its own from call to call, of which its core's cache may still
// hold the data, and then helps the others, so that a slow core does fewer. Memory that is not there is reported by the
// caller.
template <class Task> struct Tasks {
  struct alignas(64) Share {  // a cache line each
    Index next, end;
  };

  Tasks(const Task& task, Index count, Index threads) : task(task), threads(threads), shares(threads) {
    for (Index i = 0; i < threads; ++i) shares[i] = {count * i / threads, count * (i + 1) / threads};
  }

  static void work(void* data, Index thread) {
    Tasks& self = *static_cast<Tasks*>(data);
    for (Index i = 0; i < self.threads; ++i) self.finish(self.shares[(thread + i) % self.threads]);
  }

  void finish(Share& share) {
    while (__atomic_load_n(&share.next, __ATOMIC_RELAXED) < share.end) {
      const Index i = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED);
      if (i >= share.end) return;
      try {
        task(i);
      } catch (const std::bad_alloc&) {
        __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
      }
    }
  }

  const Task& task;
  const Index threads;
  Buffer<Share> shares;
  bool failed = false;
};

template <class Task> void run_tasks(Index count, Index threads, const Task& task) {
  threads = count < threads ? count : threads;
  Tasks<Task> tasks(task, count, threads < 1 ? 1 : threads);
  if (threads <= 1) tasks.work(&tasks, 0);
  else parallel(threads, tasks.work, &tasks);
  if (tasks.failed) throw std::bad_alloc();
}

}  // namespace TARGET
}  // namespace taylor
