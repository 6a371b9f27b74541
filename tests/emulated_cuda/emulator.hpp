// A CUDA grid on one thread of a processor, as much of it as the kernels use: a fiber for every
// thread, barriers, shuffles, shared memory. It shows what another order of threads, warps or
// blocks would change, a barrier that not all threads reach, a vector that is not aligned, memory
// that was never written (it is NaN), and, with pages that cannot be touched behind the arrays,
// what is read or written past an end. It does not show what only memory of other threads' caches
// would, nor speed.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (emulator::current->index)
#define blockIdx (emulator::current->block->index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
#define __syncthreads() emulator::block_barrier()
#define __builtin_assume_aligned(pointer, bytes) emulator::aligned(pointer, bytes)

using std::isfinite;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};

constexpr size_t kSharedBytes = 256 << 10;
alignas(4096) uint4 shared_memory[kSharedBytes / sizeof(uint4)];

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kResident = 3;  // blocks that run in turns
constexpr unsigned kMostThreads = 256;

struct Index {
    unsigned x;
};
struct Barrier {
    unsigned arrived = 0, generation = 0;
};
struct Warp {
    Barrier barrier;
    unsigned alive = 0;
    unsigned values[kWarp] = {};
};
struct Block {
    Index index = {};
    Barrier barrier;
    unsigned alive = 0;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;  // while another block runs
};
struct Fiber {
    Index index = {};
    Block* block = nullptr;
    jmp_buf at;
    bool started = false, done = false;
    unsigned barriers = 0;
    const Barrier* waits_for = nullptr;
    unsigned generation = 0;
};

Fiber* current;
Index block_size, grid_size;
void (*kernel)(const void* parameters);
const void* parameters;
const char* fault;
jmp_buf scheduler;
sigjmp_buf launcher;

inline void* aligned(const void* pointer, size_t bytes) {
    if ((uintptr_t)pointer % bytes != 0) fault = "a vector is not aligned";
    return (void*)pointer;
}

// Lets others run until the barrier opens.
inline void wait_for(Barrier& barrier, unsigned alive) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == alive) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    current->waits_for = &barrier;
    current->generation = generation;
    if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}

inline void block_barrier() {
    ++current->barriers;
    wait_for(current->block->barrier, current->block->alive);
}

inline unsigned exchange(unsigned value, unsigned lane_of_other) {
    Warp& warp = current->block->warps[current->index.x / kWarp];
    warp.values[current->index.x % kWarp] = value;
    wait_for(warp.barrier, kWarp);
    const unsigned other = warp.values[lane_of_other];
    wait_for(warp.barrier, kWarp);
    return other;
}

inline void run_fiber() {
    kernel(parameters);
    current->done = true;
    --current->block->alive;
    _longjmp(scheduler, 1);
}

// Runs a fiber until it waits or ends.
inline void resume(Fiber& fiber, unsigned char* stack) {
    current = &fiber;
    fiber.waits_for = nullptr;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, run_fiber, 0);
    setcontext(&context);
}

// A small generator: the schedules of a seed are the same everywhere.
struct Random {
    uint64_t state;
    unsigned below(unsigned n) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return (unsigned)((state >> 33) % n);
    }
    template <class Values>
    void shuffle(Values& values) {
        for (unsigned i = (unsigned)values.size(); i > 1; --i)
            std::swap(values[i - 1], values[below(i)]);
    }
};

// Blocks that are resident together. Seed 0: threads in order, block by block. Other seeds: in any
// order, and every few rounds one block or one warp is let far ahead of the others.
inline void run_blocks(const std::vector<unsigned>& indices, size_t shared, unsigned seed,
                       Random& random, unsigned char* stacks) {
    const unsigned threads = block_size.x, warps = (threads + kWarp - 1) / kWarp;
    std::vector<Block> blocks(indices.size());
    std::vector<std::vector<Fiber>> fibers(indices.size(), std::vector<Fiber>(threads));
    // Bytes of 0xff are a NaN of every type; those past the end must stay as they are.
    const size_t watched = std::min(shared + 4096, kSharedBytes);
    for (unsigned b = 0; b < blocks.size(); ++b) {
        blocks[b].index = {indices[b]};
        blocks[b].alive = threads;
        blocks[b].warps.resize(warps);
        blocks[b].shared.assign(watched, 0xff);
        for (unsigned t = 0; t < threads; ++t) {
            fibers[b][t].index = {t};
            fibers[b][t].block = &blocks[b];
        }
    }
    std::vector<unsigned> order(threads);
    for (unsigned t = 0; t < threads; ++t) order[t] = t;
    unsigned b = 0;
    for (int round = 0; fault == nullptr; ++round) {
        unsigned alive = 0;
        for (const Block& block : blocks) alive += block.alive;
        if (alive == 0) break;
        if (seed == 0 || round % 8 == 0) {
            while (blocks[b].alive == 0) b = (b + 1) % (unsigned)blocks.size();
        } else {
            do b = random.below((unsigned)blocks.size());
            while (blocks[b].alive == 0);
        }
        if (seed != 0) random.shuffle(order);
        const int only = seed != 0 && round % 3 == 1 ? (int)random.below(warps) : -1;
        std::memcpy(shared_memory, blocks[b].shared.data(), watched);
        bool moved = false;
        for (const unsigned t : order) {
            Fiber& fiber = fibers[b][t];
            if (fiber.done || (only >= 0 && (int)t / kWarp != only)) continue;
            const Barrier* barrier = fiber.waits_for;
            if (barrier != nullptr && barrier->generation == fiber.generation) continue;
            resume(fiber, stacks + ((size_t)b * threads + t) * kStackBytes);
            moved = true;
        }
        std::memcpy(blocks[b].shared.data(), shared_memory, watched);
        if (!moved && only < 0) fault = "threads wait at a barrier that the others do not reach";
    }
    for (unsigned i = 0; i < blocks.size() && fault == nullptr; ++i) {
        for (const Fiber& fiber : fibers[i])
            if (fiber.barriers != fibers[i][0].barriers) fault = "threads left out a barrier";
        for (size_t j = shared; j < watched; ++j)
            if (blocks[i].shared[j] != 0xff) fault = "shared memory is written past its end";
    }
}

inline void on_signal(int) { siglongjmp(launcher, 1); }

// Returns what went wrong, or null.
inline const char* launch(void (*entry)(const void*), const void* given, unsigned grid,
                          unsigned block, size_t shared, unsigned seed, unsigned char* stacks) {
    if (block > kMostThreads) return "more threads than a block may have here";
    if (shared > kSharedBytes) return "more shared memory than any block has";
    kernel = entry;
    parameters = given;
    grid_size = {grid};
    block_size = {block};
    fault = nullptr;
    Random random = {seed};
    std::vector<unsigned> indices(grid);
    for (unsigned i = 0; i < grid; ++i) indices[i] = i;
    if (seed != 0) random.shuffle(indices);
    struct sigaction action = {}, before_segv, before_bus;
    action.sa_handler = on_signal;
    sigaction(SIGSEGV, &action, &before_segv);
    sigaction(SIGBUS, &action, &before_bus);
    if (sigsetjmp(launcher, 1) == 0) {
        for (unsigned first = 0; first < grid && fault == nullptr; first += kResident) {
            const auto begin = indices.begin() + first;
            const auto end = indices.begin() + std::min(first + kResident, grid);
            run_blocks({begin, end}, shared, seed, random, stacks);
        }
    } else {
        fault = "memory is touched past the end of an array";
    }
    sigaction(SIGSEGV, &before_segv, nullptr);
    sigaction(SIGBUS, &before_bus, nullptr);
    return fault;
}

}  // namespace emulator

inline unsigned __shfl_xor_sync(unsigned, unsigned value, int mask) {
    return emulator::exchange(value, (threadIdx.x % emulator::kWarp) ^ (unsigned)mask);
}

template <class T>
inline void __stwb(T* to, T value) {
    *to = value;
}
