// Threads that wait close by, and work cut so that each of them reads one stream of memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace headrace {

// A number that others wait to see change: spins for at most 50 microseconds, then parks.
class Signal {
public:
    uint32_t value() const { return word.load(std::memory_order_acquire); }
    void advance() {
        word.fetch_add(1);
        word.notify_all();
    }
    void wait(uint32_t seen) const;

private:
    std::atomic<uint32_t> word{0};
};

// Items 0..n of one phase. Every thread begins with a contiguous share of its own and takes from the others' ends when
// that is done: equal shares of memory on a quiet machine, and a thread that is held up, or never comes, is done without.
class Work {
public:
    void reset(int64_t items, int threads);
    // The next run of at most ``most`` items for this thread; false when none is left to take.
    bool claim(int thread, int64_t most, int64_t& begin, int64_t& end);
    // Says that so many items are done; true for the last.
    bool finish(int64_t items) { return done.fetch_add(items, std::memory_order_acq_rel) + items == total; }
    bool finished() const { return done.load(std::memory_order_acquire) == total; }

private:
    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };
    std::vector<Share> shares;
    int64_t total = 0;
    alignas(64) std::atomic<int64_t> done{0};
};

// While it lives the thread rounds to nearest and keeps subnormals, whatever its owner has set: part of the numerics.
class Rounding {
public:
    Rounding();
    ~Rounding();
    Rounding(const Rounding&) = delete;

private:
    uint64_t before = 0;
};

class Pool {
public:
    static constexpr int PHASES = 6;

    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;

    int threads() const { return count; }

    // Ops of one pool come one after the other.
    std::unique_lock<std::mutex> lock() { return std::unique_lock(one_at_a_time); }

    // Calls body(thread) on the caller's thread, and on every other that comes in time. All that is done in a body is
    // done in items of phases, so that nobody waits for a thread that the system lets wait.
    template <class Body>
    void run(Body&& body) {
        auto call = [](void* context, int thread) { (*static_cast<std::remove_reference_t<Body>*>(context))(thread); };
        start(call, &body);
    }

    // Before a run: a phase's items. Inside: each(phase, ...) calls body(begin, end) for shares of them, when all items
    // of the phase before are done. Phases are numbered from 0 and taken in order.
    void items(int phase, int64_t count_) { work[phase].reset(count_, count); }
    template <class Body>
    void each(int thread, int phase, int64_t most, Body&& body) {
        if (phase) await(work[phase - 1]);
        int64_t begin, end, taken = 0;
        while (work[phase].claim(thread, most, begin, end)) {
            body(begin, end);
            taken += end - begin;
        }
        if (taken && work[phase].finish(taken)) progress.advance();
    }

    // A run of its own: body(i, thread) for i in 0..items_. Where all that is touched is few elements, the caller does
    // it alone: waking others would take longer.
    template <class Body>
    void spread(int64_t items_, int64_t elements, Body&& body) {
        const int64_t most = 1 + items_ / (8 * count);
        items(0, items_);
        auto work = [&](int thread) {
            each(thread, 0, most, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) body(i, thread);
            });
        };
        elements < FEW ? work(0) : run(work);
    }
    static constexpr int64_t FEW = 1 << 14;

    // Before a run: memory for all threads, aligned to 64 bytes, that lives until the next call; grows, never shrinks.
    // Raises std::bad_alloc.
    std::byte* shared(size_t bytes);
    // A thread's own, 256 KiB: the size of half a second-level cache.
    std::byte* own(int thread) { return scratch[size_t(thread)].get(); }
    static constexpr size_t OWN_BYTES = 256 << 10;

private:
    using Call = void (*)(void*, int);
    struct Free {
        void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
    };
    using Memory = std::unique_ptr<std::byte[], Free>;

    void start(Call call, void* context);
    void stop();
    void serve(int thread);
    void await(const Work& phase);
    static Memory allocate(size_t bytes);

    const int count;
    std::mutex one_at_a_time;
    Call call = nullptr;
    void* context = nullptr;
    std::atomic<bool> stopping{false};
    // A thread that comes says so in ``inside``, then looks whether the run is still open; the caller closes it, then
    // waits for those inside.
    alignas(64) Signal begun;
    alignas(64) std::atomic<bool> open{false};
    alignas(64) std::atomic<int> inside{0};
    Signal left;
    alignas(64) Signal progress;
    Work work[PHASES];
    Memory arena;
    size_t arena_bytes = 0;
    std::vector<Memory> scratch;
    std::vector<std::thread> workers;
};

}  // namespace headrace
