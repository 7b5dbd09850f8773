// CUDA kernels as C++ on the CPU: one fiber per thread, blocks one after another. Included in front of a kernel source, it
// gives the words of CUDA C++ their meaning; `espalier_launch` runs a grid and reports what a GPU would not: accesses outside
// of buffers (they end at a page nobody may touch), reads of shared memory that nobody wrote (it starts as NaN), threads that
// pass a barrier alone or part within a warp's collective operation, misaligned vectors, copies used before they were waited for.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#define ESPALIER_HOST 1
#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
#define __constant__ static const
// One block runs at a time, so a block's shared memory may be static; its section is filled with NaN before every block.
#define __shared__ static __attribute__((section("espalier_shared")))

extern char __start_espalier_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_espalier_shared[] __attribute__((weak, visibility("hidden")));

struct dim3 { unsigned x, y, z; };
#define VECTORS(type, name)                                                                  \
    struct name##2 { type x, y; };                                                           \
    struct name##3 { type x, y, z; };                                                        \
    struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };                           \
    static inline name##2 make_##name##2(type x, type y) { return {x, y}; }                  \
    static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }       \
    static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTORS(float, float)
VECTORS(int, int)
VECTORS(unsigned, uint)
VECTORS(unsigned short, ushort)

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

enum class State { Ready, Barrier, Named, Collective, Waiting, Cluster, Done };

struct Copy { void* shared; const void* global; int valid; bool committed; };

struct Thread {
    void* stack_pointer;
    State state;
    // Where it waits: the source line (the number of a named barrier), and in a collective operation what completes it, the
    // lane's operands and how many lanes take part: a warp, or a warp group.
    unsigned line;
    void (*complete)(void** lanes, unsigned count);
    void* operands;
    unsigned width;
    // Asynchronous copies that were issued and not waited for, and the open groups among them.
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
    // Its finished copies, as 16 bytes of dynamic shared memory, that no proxy fence has followed.
    std::vector<unsigned> unfenced;
};

struct Range { const unsigned char* start; size_t bytes; };

static const size_t STACK = 128 << 10, PAGE = 4096;
static const unsigned MOST_THREADS = 1024, LANES = 32, WARP_GROUP_LANES = 128, MOST_BLOCKS = 2;
static const size_t MOST_SHARED = 227 << 10;

static Thread threads[MOST_THREADS];
static unsigned char* stacks;
// Dynamic shared memory of the running thread's block, and of every block of its cluster.
static unsigned char* dynamic;
static unsigned char* regions[MOST_BLOCKS];
static unsigned dynamic_bytes;
// Per 16 bytes of dynamic shared memory: the thread (plus 1) whose copy has written them without a proxy fence since.
static unsigned short unfenced[MOST_BLOCKS * MOST_SHARED / 16];
// The running thread. A cluster's blocks run together, their threads numbered one block after another.
static unsigned current, cluster_blocks;
static dim3 first_block;
// Barriers of threads that each block has passed, and those of the cluster.
static unsigned passed[MOST_BLOCKS], cluster_passed;
static void* scheduler;
static void (*entry)(void**);
static void** arguments;
static unsigned argument_count, parameter_bytes;
static sigjmp_buf escape;
static char* message;
static size_t message_bytes;
static const Range* ranges;
static unsigned range_count;

// Ends the launch with a report; the fibers are left where they stand.
[[noreturn]] static void fail(const char* format, ...) {
    char text[400];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    snprintf(message, message_bytes, "block (%u, %u, %u), thread %u: %s", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, text);
    siglongjmp(escape, 1);
}

static void on_fault(int, siginfo_t* info, void*) {
    auto address = (const unsigned char*)info->si_addr;
    if (stacks && address >= stacks && address < stacks + MOST_THREADS * STACK) fail("more than %zu bytes of local memory", STACK - PAGE);
    if (dynamic && address >= dynamic && address < dynamic + MOST_SHARED + 2 * PAGE)
        fail("shared memory accessed %td bytes past its %u", address - dynamic - dynamic_bytes, dynamic_bytes);
    // The nearest argument whose end lies below.
    int near = -1;
    for (unsigned i = 0; i < range_count; i++) {
        if (ranges[i].start + ranges[i].bytes <= address && (near < 0 || ranges[i].start > ranges[near].start)) near = (int)i;
    }
    if (near >= 0) fail("accessed argument %d of %zu bytes at byte %td", near, ranges[near].bytes, address - ranges[near].start);
    fail("accessed %p, which belongs to no argument", (const void*)address);
}

// Saves the callee's registers and the stack pointer to *from, and goes on with `to`.
#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void espalier_switch(void** from, void* to);
asm(R"(
.text
.hidden espalier_switch
.globl espalier_switch
espalier_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
static const unsigned SAVED = 6;
#elif defined(__aarch64__)
extern "C" __attribute__((visibility("hidden"))) void espalier_switch(void** from, void* to);
asm(R"(
.text
.hidden espalier_switch
.globl espalier_switch
espalier_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
#else
#error "the CUDA host harness switches fibers on x86-64 and AArch64 only"
#endif

static unsigned block_of(unsigned thread) { return thread / blockDim.x; }

// Thread and block as the thread's own code sees them.
static void enter(unsigned thread) {
    current = thread;
    threadIdx.x = thread % blockDim.x;
    blockIdx.x = first_block.x + block_of(thread);
    dynamic = regions[block_of(thread)];
}

static void yield() { espalier_switch(&threads[current].stack_pointer, scheduler); }

static void fiber() {
    entry(arguments);
    threads[current].state = State::Done;
    yield();
}

static void start(unsigned index) {
    Thread& t = threads[index];
    t.state = State::Ready;
    t.groups.clear();
    t.open.clear();
    t.unfenced.clear();
    auto top = (void**)(stacks + (index + 1) * STACK);
#if defined(__x86_64__)
    // As after a call: the return address lies at a multiple of 16, so the fiber starts with the stack it expects.
    top -= 2;
    top[0] = (void*)fiber;
    top -= SAVED;
#else
    top -= 20;
    top[11] = (void*)fiber;
#endif
    t.stack_pointer = top;
}

static void barrier(unsigned line) {
    threads[current].state = State::Barrier;
    threads[current].line = line;
    yield();
}

// Waits until every lane of the warp (of the warp group) has come with its operands, and `complete` has worked on all of them.
static void collective(unsigned line, void (*complete)(void**, unsigned), void* operands, unsigned width = LANES) {
    Thread& t = threads[current];
    t.width = width;
    t.state = State::Collective;
    t.line = line;
    t.complete = complete;
    t.operands = operands;
    yield();
}

// Completes the collective operations of warps whose lanes have all come. False where no warp has. Upwards and downwards
// only the first such warp goes on, so that it runs ahead of the others as far as barriers let it; else all do, in step.
static bool complete_warps(unsigned count, unsigned order) {
    bool any = false;
    unsigned warps = (count + LANES - 1) / LANES;
    for (unsigned n = 0; n < warps && !(any && order % 3 != 2); n++) {
        unsigned first = (order % 3 == 1 ? warps - 1 - n : n) * LANES;
        unsigned width = threads[first].state == State::Collective ? threads[first].width : LANES;
        if (first % width) continue;
        unsigned lanes = std::min(width, count - first);
        void* operands[WARP_GROUP_LANES];
        unsigned come = 0;
        for (unsigned i = 0; i < lanes; i++) {
            const Thread& t = threads[first + i];
            if (t.state == State::Collective && t.width == width && t.complete == threads[first].complete && t.line == threads[first].line) operands[come++] = t.operands;
        }
        if (come < lanes || threads[first].state != State::Collective) continue;
        enter(first);
        threads[first].complete(operands, lanes);
        for (unsigned i = 0; i < lanes; i++) threads[first + i].state = State::Ready;
        any = true;
    }
    return any;
}

static const char* describe(const Thread& t) {
    switch (t.state) {
        case State::Ready: return "runs";
        case State::Barrier: return "waits at the barrier";
        case State::Named: return "waits at the named barrier";
        case State::Collective: return t.width == LANES ? "waits in the warp operation" : "waits in the warp group's operation";
        case State::Waiting: return "waits for the mbarrier";
        case State::Cluster: return "waits for the cluster";
        default: return "has ended";
    }
}

// Of wgmma.hpp: what a block starts without; lets go of threads whose barriers let them, false where none does; names the
// thread that waits for ever, if one waits for an mbarrier; checks that nothing is in flight at the block's end.
static void reset_groups(unsigned order);
static bool complete_waits(unsigned count);
static void report_waits(unsigned count);
static void check_finished();

// Lets a block go on whose threads have all come to one barrier, and a cluster whose threads have all come to its own.
static bool complete_barriers(unsigned count) {
    bool any = false;
    unsigned met = 0;
    for (unsigned block = 0; block < cluster_blocks; block++) {
        const Thread* t = threads + block * blockDim.x;
        unsigned same = 0;
        while (same < blockDim.x && t[same].state == t[0].state && t[same].line == t[0].line) same++;
        if (same < blockDim.x) continue;
        met += t[0].state == State::Cluster;
        if (t[0].state != State::Barrier) continue;
        passed[block]++;
        for (unsigned i = 0; i < blockDim.x; i++) threads[block * blockDim.x + i].state = State::Ready;
        any = true;
    }
    if (met < cluster_blocks) return any;
    for (auto& p : passed) p++;
    cluster_passed++;
    for (unsigned i = 0; i < count; i++) threads[i].state = State::Ready;
    return true;
}

// Runs the blocks of a cluster, most often one.
static void run_cluster(unsigned order) {
    unsigned count = blockDim.x * cluster_blocks;
    first_block = blockIdx;
    reset_groups(order);
    if (__start_espalier_shared) memset(__start_espalier_shared, 0xff, __stop_espalier_shared - __start_espalier_shared);
    for (unsigned block = 0; block < cluster_blocks && dynamic_bytes; block++) memset(regions[block], 0xff, dynamic_bytes);
    memset(unfenced, 0, sizeof unfenced);
    for (unsigned i = 0; i < count; i++) start(i);
    for (unsigned round = 0;; round++) {
        // Orders: upwards, downwards, and a walk by an odd step, so that no kernel relies on one.
        for (unsigned n = 0; n < count; n++) {
            unsigned i = order % 3 == 0 ? n : order % 3 == 1 ? count - 1 - n : (n * 37u + round * 11u) % count;
            if (order % 3 == 2 && count % 37 == 0) i = n;
            if (threads[i].state != State::Ready) continue;
            enter(i);
            espalier_switch(&scheduler, threads[i].stack_pointer);
        }
        if (complete_warps(count, order) || complete_waits(count) || complete_barriers(count)) continue;
        unsigned other = 0;
        while (other < count && threads[other].state == threads[0].state && (threads[0].state == State::Done || threads[other].line == threads[0].line)) other++;
        if (other == count && threads[0].state == State::Done) {
            check_finished();
            return;
        }
        report_waits(count);
        if (other == count) other = 0;
        enter(0);
        fail("threads part: thread 0 %s (line %u), thread %u %s (line %u)", describe(threads[0]), threads[0].line, other, describe(threads[other]), threads[other].line);
    }
}

template <class T>
static void check_aligned(const T* pointer, size_t bytes) {
    if ((uintptr_t)pointer % bytes) fail("a vector of %zu bytes at an address that is no multiple of it", bytes);
}

static unsigned char* dynamic_shared() { return dynamic; }

// Asynchronous copies take place when they are waited for, so that a use before the wait sees NaN.
static void copy_async(void* shared, const void* global, int valid) {
    check_aligned(shared, 16);
    if (valid) check_aligned(global, 16);
    threads[current].open.push_back({shared, global, valid, false});
}

static void copy_commit() {
    threads[current].groups.push_back(std::move(threads[current].open));
    threads[current].open.clear();
}

// A thread's own write to shared memory, which tensor instructions may read once the thread has fenced it.
static void leave_unfenced(const void* written) {
    auto to = (const unsigned char*)written;
    if (!dynamic_bytes || to < dynamic || to >= dynamic + dynamic_bytes) return;
    size_t at = (to - dynamic) / 16 + block_of(current) * (MOST_SHARED / 16);
    if (unfenced[at] == current + 1) return;
    unfenced[at] = (unsigned short)(current + 1);
    threads[current].unfenced.push_back((unsigned)at);
}

static void copy_wait(unsigned left_open) {
    auto& groups = threads[current].groups;
    while (groups.size() > left_open) {
        for (const Copy& c : groups.front()) {
            memset(c.shared, 0, 16);
            memcpy(c.shared, c.global, c.valid);
            leave_unfenced(c.shared);
        }
        groups.erase(groups.begin());
    }
}

static float f16_to_float(unsigned short x) {
    unsigned sign = (x & 0x8000u) << 16, exponent = (x >> 10) & 31u, mantissa = x & 1023u, bits;
    if (exponent == 31u) bits = sign | 0x7f800000u | (mantissa << 13);
    else if (exponent) bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
    else {
        float value = std::ldexp((float)mantissa, -24);
        return sign ? -value : value;
    }
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

// Round to nearest even.
static unsigned short float_to_f16(float x) {
    unsigned b;
    memcpy(&b, &x, 4);
    unsigned sign = (b >> 16) & 0x8000u, rest = b & 0x7fffffffu;
    if (rest > 0x7f800000u) return (unsigned short)(sign | 0x7fffu);
    if (rest >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);
    if (rest < 0x38800000u) {
        // Below the normal range the value is a multiple of 2^-24; adding 0.5 rounds it at that place.
        float shifted;
        memcpy(&shifted, &rest, 4);
        shifted += 0.5f;
        unsigned bits;
        memcpy(&bits, &shifted, 4);
        return (unsigned short)(sign | (bits - 0x3f000000u));
    }
    unsigned rounded = rest + 0xfffu + ((rest >> 13) & 1u);
    return (unsigned short)(sign | ((rounded - 0x38000000u) >> 13));
}

template <class... A, size_t... I>
static void invoke_all(void (*kernel)(A...), void** from, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A>*)from[I]...);
}

template <class T, class... A> struct Last : Last<A...> {};
template <class T> struct Last<T> { static const size_t bytes = sizeof(T); };

// Calls a kernel with the values that `from` points to: buffers, then the parameter block.
template <class... A>
static void invoke(void (*kernel)(A...), void** from) {
    if (sizeof...(A) != argument_count) fail("the kernel takes %zu arguments, the launch gives %u", sizeof...(A), argument_count);
    if (Last<A...>::bytes > parameter_bytes) fail("the kernel reads %zu bytes of parameters, the launch gives %u", Last<A...>::bytes, parameter_bytes);
    invoke_all(kernel, from, std::index_sequence_for<A...>{});
}

// Lanes exchange values: `source(lane, count)` names the lane whose value each gets.
template <class T> struct Exchange { T value; unsigned argument; };

template <class T> static void complete_xor(void** lanes, unsigned count) {
    T old[LANES];
    for (unsigned i = 0; i < count; i++) old[i] = ((Exchange<T>*)lanes[i])->value;
    for (unsigned i = 0; i < count; i++) {
        auto e = (Exchange<T>*)lanes[i];
        e->value = (i ^ e->argument) < count ? old[i ^ e->argument] : old[i];
    }
}
template <class T> static void complete_down(void** lanes, unsigned count) {
    T old[LANES];
    for (unsigned i = 0; i < count; i++) old[i] = ((Exchange<T>*)lanes[i])->value;
    for (unsigned i = 0; i < count; i++) {
        auto e = (Exchange<T>*)lanes[i];
        e->value = i + e->argument < count ? old[i + e->argument] : old[i];
    }
}
template <class T> static void complete_up(void** lanes, unsigned count) {
    T old[LANES];
    for (unsigned i = 0; i < count; i++) old[i] = ((Exchange<T>*)lanes[i])->value;
    for (unsigned i = 0; i < count; i++) {
        auto e = (Exchange<T>*)lanes[i];
        e->value = i >= e->argument ? old[i - e->argument] : old[i];
    }
}
template <class T> static void complete_index(void** lanes, unsigned count) {
    T old[LANES];
    for (unsigned i = 0; i < count; i++) old[i] = ((Exchange<T>*)lanes[i])->value;
    for (unsigned i = 0; i < count; i++) {
        auto e = (Exchange<T>*)lanes[i];
        e->value = old[e->argument % LANES < count ? e->argument % LANES : i];
    }
}
static void complete_ballot(void** lanes, unsigned count) {
    unsigned votes = 0;
    for (unsigned i = 0; i < count; i++) votes |= (((Exchange<unsigned>*)lanes[i])->value ? 1u : 0u) << i;
    for (unsigned i = 0; i < count; i++) ((Exchange<unsigned>*)lanes[i])->value = votes;
}
static void complete_nothing(void**, unsigned) {}

template <class T> static T exchange(unsigned line, void (*complete)(void**, unsigned), unsigned mask, T value, unsigned argument) {
    if (mask != 0xffffffffu) fail("a warp operation with mask %08x: all lanes take part here", mask);
    Exchange<T> e{value, argument};
    collective(line, complete, &e);
    return e.value;
}

}  // namespace host

#define __syncthreads() host::barrier(__LINE__)
#define __syncwarp(...) host::collective(__LINE__, host::complete_nothing, nullptr)
#define __shfl_xor_sync(mask, value, lane) host::exchange(__LINE__, host::complete_xor<decltype(+(value))>, mask, +(value), lane)
#define __shfl_down_sync(mask, value, by) host::exchange(__LINE__, host::complete_down<decltype(+(value))>, mask, +(value), by)
#define __shfl_up_sync(mask, value, by) host::exchange(__LINE__, host::complete_up<decltype(+(value))>, mask, +(value), by)
#define __shfl_sync(mask, value, lane) host::exchange(__LINE__, host::complete_index<decltype(+(value))>, mask, +(value), lane)
#define __ballot_sync(mask, vote) host::exchange(__LINE__, host::complete_ballot, mask, (unsigned)((vote) ? 1u : 0u), 0u)
#define __any_sync(mask, vote) (__ballot_sync(mask, vote) != 0u)

static inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
static inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
static inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float x) { return std::sqrt(x); }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
#define __expf expf
#define __logf logf
template <class T> static inline T __ldg(const T* p) { return *p; }
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t both = (uint64_t)y << 32 | x;
    unsigned z = 0;
    for (int i = 0; i < 4; i++) z |= (unsigned)(both >> ((selector >> (4 * i) & 7u) * 8) & 0xffu) << (8 * i);
    return z;
}
static inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (int)(signed char)(a >> (8 * i)) * (int)(signed char)(b >> (8 * i));
    return c;
}
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline void __threadfence() {}
template <class T> static inline T atomicAdd(T* p, T x) { T old = *p; *p += x; return old; }
template <class T> static inline T atomicMax(T* p, T x) { T old = *p; *p = old > x ? old : x; return old; }
template <class T> static inline T atomicMin(T* p, T x) { T old = *p; *p = old < x ? old : x; return old; }
template <class T> static inline T atomicExch(T* p, T x) { T old = *p; *p = x; return old; }

#include "mma.hpp"
#include "wgmma.hpp"

// Runs `kernel` over a grid, `cluster` blocks along x together. `stacks` holds 1,024 stacks of 128 KiB, the first page of each untouchable; they belong to the caller,
// because every compiled file is a library of its own. Returns 0, or 1 with the reason in `text`.
extern "C" int espalier_launch(void (*kernel)(void**), void** arguments, unsigned count, unsigned parameter_bytes, const unsigned groups[3],
                               unsigned block, unsigned cluster, unsigned shared, unsigned order, const host::Range* ranges, unsigned range_count, unsigned char* stacks, char* text, size_t bytes) {
    using namespace host;
    static unsigned char signal_stack[64 << 10];
    message = text;
    message_bytes = bytes;
    blockIdx = {0, 0, 0};
    threadIdx = {0, 0, 0};
    struct sigaction action = {}, old_segv, old_bus;
    stack_t alternate = {}, old_alternate;
    alternate.ss_sp = signal_stack;
    alternate.ss_size = sizeof signal_stack;
    sigaltstack(&alternate, &old_alternate);
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
    int failed = sigsetjmp(escape, 1);
    if (!failed) {
        if (block == 0 || block > MOST_THREADS) fail("%u threads in a block", block);
        if (cluster == 0 || cluster > MOST_BLOCKS || block * cluster > MOST_THREADS || groups[0] % cluster) fail("clusters of %u blocks of %u threads in %u", cluster, block, groups[0]);
        if (shared > MOST_SHARED) fail("%u bytes of shared memory", shared);
        host::stacks = stacks;
        for (unsigned i = 0; i < cluster && shared; i++) {
            // The end lies at a page that nobody may touch, as far as alignment to 128 bytes lets it.
            static unsigned char* bases[MOST_BLOCKS];
            unsigned char*& base = bases[i];
            size_t whole = (MOST_SHARED + PAGE - 1) / PAGE * PAGE;
            if (!base) {
                auto mapped = mmap(nullptr, whole + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
                if (mapped == MAP_FAILED) fail("no memory for shared memory");
                base = (unsigned char*)mapped;
                mprotect(base + whole, PAGE, PROT_NONE);
            }
            regions[i] = base + (whole - shared) / 128 * 128;
        }
        cluster_blocks = cluster;
        dynamic_bytes = shared;
        entry = kernel;
        host::arguments = arguments;
        argument_count = count;
        host::parameter_bytes = parameter_bytes;
        host::ranges = ranges;
        host::range_count = range_count;
        blockDim = {block, 1, 1};
        gridDim = {groups[0], groups[1], groups[2]};
        for (unsigned z = 0; z < groups[2]; z++)
            for (unsigned y = 0; y < groups[1]; y++)
                for (unsigned x = 0; x < groups[0]; x += cluster) {
                    blockIdx = {x, y, z};
                    run_cluster(order + x / cluster);
                }
    }
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaltstack(&old_alternate, nullptr);
    return failed;
}
