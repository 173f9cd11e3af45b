#include "pool.h"

#include <algorithm>
#include <chrono>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headrace {

namespace {

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

void Signal::wait(uint32_t seen) const {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
    do {
        for (int i = 0; i < 32; ++i) {
            if (value() != seen) return;
            pause();
        }
    } while (std::chrono::steady_clock::now() < limit);
    while (value() == seen) word.wait(seen, std::memory_order_acquire);
}

void Work::reset(int64_t items, int threads) {
    total = items;
    done.store(0, std::memory_order_relaxed);
    if (shares.size() != size_t(threads)) shares = std::vector<Share>(size_t(threads));
    for (int t = 0; t < threads; ++t) {
        shares[size_t(t)].next.store(items * t / threads, std::memory_order_relaxed);
        shares[size_t(t)].end = items * (t + 1) / threads;
    }
}

bool Work::claim(int thread, int64_t most, int64_t& begin, int64_t& end) {
    const int threads = int(shares.size());
    for (int i = 0; i < threads; ++i) {
        Share& share = shares[size_t((thread + i) % threads)];
        if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
        begin = share.next.fetch_add(most, std::memory_order_relaxed);
        if (begin >= share.end) continue;
        end = std::min(begin + most, share.end);
        return true;
    }
    return false;
}

Pool::Pool(int threads) : count(threads) {
    for (int t = 0; t < count; ++t) scratch.push_back(allocate(OWN_BYTES));
    try {
        for (int t = 1; t < count; ++t) workers.emplace_back([this, t] { serve(t); });
    } catch (...) {
        stop();
        throw;
    }
}

Pool::~Pool() {
    const auto last = lock();  // whoever is inside an op comes first
    stop();
}

void Pool::stop() {
    stopping = true;
    begun.advance();
    for (auto& worker : workers) worker.join();
}

Rounding::Rounding() {
#if defined(__x86_64__)
    before = _mm_getcsr();
    _mm_setcsr(0x1f80);
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t(0)));
#endif
}

Rounding::~Rounding() {
#if defined(__x86_64__)
    _mm_setcsr(uint32_t(before));
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" : : "r"(before));
#endif
}

Pool::Memory Pool::allocate(size_t bytes) {
    return Memory(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{64})));
}

std::byte* Pool::shared(size_t bytes) {
    if (bytes > arena_bytes) {
        arena.reset();
        arena_bytes = 0;
        arena = allocate(bytes);
        arena_bytes = bytes;
    }
    return arena.get();
}

void Pool::start(Call body, void* argument) {
    if (count == 1) return body(argument, 0);
    call = body;
    context = argument;
    open.store(true);
    begun.advance();
    body(argument, 0);
    open.store(false);
    for (;;) {
        const uint32_t seen = left.value();
        if (!inside.load()) return;
        left.wait(seen);
    }
}

void Pool::serve(int thread) {
    const Rounding rounding;
    for (uint32_t seen = 0;;) {
        begun.wait(seen);
        seen = begun.value();
        if (stopping) return;
        inside.fetch_add(1);
        if (open.load()) call(context, thread);
        if (inside.fetch_sub(1) == 1 && !open.load()) left.advance();
    }
}

void Pool::await(const Work& phase) {
    for (;;) {
        const uint32_t seen = progress.value();
        if (phase.finished()) return;
        progress.wait(seen);
    }
}

}  // namespace headrace
