// Several threads run one program. Its phases consist of tasks, and each free thread takes the next task.
//
// A phase ends when its tasks are done, not when all threads have arrived. So a thread that gets no core on a
// busy machine is late, finds no task, and delays nobody. The results do not depend on which thread runs a
// task. Idle threads spin for a moment and then sleep, so that the daemon, the tools and the agents get the
// cores.

#pragma once

#include <atomic>
#include <csignal>
#include <cstdint>
#include <immintrin.h>
#include <pthread.h>
#include <thread>
#include <vector>
#include <x86intrin.h>

namespace {

constexpr uint64_t CLOSED = ~uint64_t(0);        // belongs to no run
constexpr uint64_t SPIN_CYCLES = 100'000;  // about 40 us

class Team {
 public:
  Team(int size, int64_t phases) : phases_(phases) {
    sigset_t every, before;  // these threads block all signals: Python's main thread handles them
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    for (int i = 1; i < size; i++) threads_.emplace_back([this] { follow(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
  ~Team() {
    program_ = nullptr;
    start();
    for (auto& p : phases_) {  // a late thread may sleep in one
      p.done.store(~0u, std::memory_order_release);
      p.done.notify_all();
    }
    for (auto& t : threads_) t.join();
  }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // The program must call each() for the same phases in every thread, at most as often as there are phases.
  // A late thread may still be inside the program after run() has returned, and even in the next run, but it
  // takes no task then. So code outside of tasks may only compute numbers.
  void run(void (*program)(void*), void* argument) {
    program_ = program;
    argument_ = argument;
    uint64_t next = uint64_t(epoch_.load(std::memory_order_relaxed) + 1) << 32;
    for (auto& p : phases_) {
      p.done.store(0, std::memory_order_relaxed);
      p.next.store(next, std::memory_order_release);
    }
    start();
    take_part(epoch_.load(std::memory_order_relaxed));
    // The caller may now change the data from which the program computes the number of tasks. Close the
    // phases, so that a late thread that computes a larger number takes no task.
    for (auto& p : phases_) p.next.store(CLOSED, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
  }
  template <class F> void each(int64_t tasks, F&& task) {
    Phase& phase = phases_[place().phase++];
    uint32_t run = place().run;
    for (int64_t i; (i = phase.take(run, tasks)) >= 0;) {
      task(i);
      if (phase.done.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(tasks)) phase.done.notify_all();
    }
    await(phase.done, [&](uint32_t done) {
      return done == uint32_t(tasks) || epoch_.load(std::memory_order_acquire) != run;
    });
  }

 private:
  struct alignas(64) Phase {
    std::atomic<uint64_t> next{0};  // upper half: the run; lower half: its next task
    alignas(64) std::atomic<uint32_t> done{0};

    int64_t take(uint32_t run, int64_t tasks) {
      uint64_t v = next.load(std::memory_order_acquire);
      for (;;) {
        if (v >> 32 != run || int64_t(v & 0xffffffff) >= tasks) return -1;
        if (next.compare_exchange_weak(v, v + 1, std::memory_order_acq_rel)) return int64_t(v & 0xffffffff);
      }
    }
  };
  struct Place { uint32_t run = 0; size_t phase = 0; };

  static Place& place() {
    static thread_local Place here;
    return here;
  }
  void start() {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }
  bool take_part(uint32_t run) {
    auto program = program_.load(std::memory_order_acquire);
    if (!program) return false;
    place() = {run, 0};
    program(argument_);
    return true;
  }
  void follow() {
    for (uint32_t seen = 0;;) {
      seen = await(epoch_, [&](uint32_t now) { return now != seen; });
      if (!take_part(seen)) return;
    }
  }
  template <class F> static uint32_t await(std::atomic<uint32_t>& word, F&& enough) {
    for (uint64_t since = __rdtsc(); __rdtsc() - since < SPIN_CYCLES; _mm_pause())
      if (uint32_t v = word.load(std::memory_order_acquire); enough(v)) return v;
    for (;;) {
      uint32_t v = word.load(std::memory_order_acquire);
      if (enough(v)) return v;
      word.wait(v, std::memory_order_acquire);
    }
  }

  std::vector<Phase> phases_;
  std::vector<std::thread> threads_;
  std::atomic<void (*)(void*)> program_{nullptr};
  void* argument_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};
};

}  // namespace
