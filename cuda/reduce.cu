// op:       sum, mean, max, sum_squares over the last axis, all rows or all elements; argmax; count_non_finite; backward
// math:     y = sum x, sum x / n, max x, sum x^2; argmax: lowest index of the largest; count: non-finite bits, first index
// grad:     reduce_bwd: dx = dy, dy / n, dy at the maximum, 2 x dy
// shapes:   reduce_fwd: x[O, N, I], y[O, I], partials[..] (scratch); argmax: x[O, N], indices[O], words[O, S] (scratch);
//           count: x[N], indices[2], words[..] (scratch); reduce_bwd: x[O, N, I] or index[O, I], dy[O, I], dx[O, N, I]
// layout:   contiguous; the reduced axis in the middle: last axis I = 1, rows O = 1, all O = I = 1
// launch:   linear, 64 threads a block, one (segment of a) reduction each; a tree of passes for long axes
// cost:     N flops and N elements read per reduction
// numerics: f32 accumulation in four lanes per segment, fixed order; max and argmax do not see NaN (-infinity and 0 where all are); counting is by bits
// source:   -
// rungs:    v1 one thread per segment, segments and passes decided by the shape alone

// Items map to elements: item + first is (o, segment, i); the shifts lead into regions of the scratch buffer.
struct ReduceParams { u32 items, first, n, inner, segments, fan, kind, from_shift, to_shift; float factor; };

#define MAXIMUM 2u
#define SQUARES 3u

// First element of an item's segment, and how many the segment has.
struct Segment { u64 start; u32 count; };

__device__ __forceinline__ Segment segment_of(u32 item, const ReduceParams& p) {
    u32 row = item / p.inner, s = row % p.segments;
    u64 start = ((u64)(row / p.segments) * p.n + s * p.fan) * p.inner + item % p.inner;
    return {start + p.from_shift, min(p.fan, p.n - s * p.fan)};
}

// The maximum does not see a NaN as `b`.
__device__ __forceinline__ float merge(float a, float b, u32 kind) {
    if (kind == MAXIMUM) return b > a ? b : a;
    return a + b;
}

__device__ __forceinline__ float term(float x, u32 kind) { return kind == SQUARES ? x * x : x; }

// What does not change the result: 0, or -infinity for the maximum.
__device__ __forceinline__ float neutral(u32 kind) { return kind == MAXIMUM ? __uint_as_float(0xff800000u) : 0.0f; }

__device__ __forceinline__ float across(const float* lanes, u32 kind) {
    return merge(merge(lanes[0], lanes[1], kind), merge(lanes[2], lanes[3], kind), kind);
}

__device__ float of_elements(const E* x, Segment at, const ReduceParams& p) {
    u64 step = p.inner;
    float start = neutral(p.kind), lanes[4] = {start, start, start, start};
    x += at.start;
    for (u32 k = 0; k < at.count / 4u; k++) {
#pragma unroll
        for (u32 l = 0; l < 4u; l++) lanes[l] = merge(lanes[l], term(ld(x[l * step]), p.kind), p.kind);
        x += 4u * step;
    }
    for (u32 k = 0; k < at.count % 4u; k++) lanes[0] = merge(lanes[0], term(ld(x[k * step]), p.kind), p.kind);
    return across(lanes, p.kind);
}

__device__ float of_partials(const float* x, Segment at, const ReduceParams& p) {
    u64 step = p.inner;
    float start = neutral(p.kind), lanes[4] = {start, start, start, start};
    x += at.start;
    for (u32 k = 0; k < at.count / 4u; k++) {
#pragma unroll
        for (u32 l = 0; l < 4u; l++) lanes[l] = merge(lanes[l], x[l * step], p.kind);
        x += 4u * step;
    }
    for (u32 k = 0; k < at.count % 4u; k++) lanes[0] = merge(lanes[0], x[k * step], p.kind);
    return across(lanes, p.kind);
}

extern "C" __global__ void __launch_bounds__(64) reduce_fwd(const E* x, E* y, ReduceParams p) {
    u32 id = linear_id();
    if (id >= p.items) return;
    y[id + p.to_shift] = st(of_elements(x, segment_of(p.first + id, p), p) * p.factor);
}

extern "C" __global__ void __launch_bounds__(64) reduce_first(const E* x, E*, float* partials, ReduceParams p) {
    u32 id = linear_id();
    if (id >= p.items) return;
    partials[id + p.to_shift] = of_elements(x, segment_of(p.first + id, p), p);
}

extern "C" __global__ void __launch_bounds__(64) reduce_next(const E*, E*, float* partials, ReduceParams p) {
    u32 id = linear_id();
    if (id >= p.items) return;
    partials[id + p.to_shift] = of_partials(partials, segment_of(p.first + id, p), p);
}

extern "C" __global__ void __launch_bounds__(64) reduce_last(const E*, E* y, const float* partials, ReduceParams p) {
    u32 id = linear_id();
    if (id >= p.items) return;
    y[id + p.to_shift] = st(of_partials(partials, segment_of(p.first + id, p), p) * p.factor);
}

// Unsigned keys in the order of the floats; both zeros alike, NaN below everything.
__device__ __forceinline__ u32 order_key(float x) {
    u32 b = __float_as_uint(x), magnitude = b & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0u;
    if (magnitude == 0u) return 0x80000000u;
    return b > 0x80000000u ? ~b : b | 0x80000000u;
}

// Index within the row of a segment's first maximum.
__device__ u32 argmax_of_elements(const E* x, u32 item, const ReduceParams& p) {
    Segment at = segment_of(item, p);
    x += at.start;
    u32 best = 0u, key = 0u;
    for (u32 k = 0; k < at.count; k++) {
        u32 candidate = order_key(ld(x[k]));
        if (candidate > key) {
            key = candidate;
            best = k;
        }
    }
    return item % p.segments * p.fan + best;
}

extern "C" __global__ void __launch_bounds__(64) argmax_fwd(const E* x, u32* indices, ReduceParams p) {
    u32 id = linear_id();
    if (id >= p.items) return;
    indices[id + p.to_shift] = argmax_of_elements(x, p.first + id, p);
}

extern "C" __global__ void __launch_bounds__(64) argmax_first(const E* x, u32*, u32* words, ReduceParams p) {
    u32 id = linear_id();
    if (id >= p.items) return;
    words[p.first + id] = argmax_of_elements(x, p.first + id, p);
}

// One row: the candidates of its segments, in order.
extern "C" __global__ void __launch_bounds__(64) argmax_last(const E* x, u32* indices, const u32* words, ReduceParams p) {
    u32 id = linear_id();
    if (id >= p.items) return;
    u32 row = p.first + id, best = 0u, key = 0u;
    x += (u64)row * p.n + p.from_shift;
    words += (u64)row * p.segments;
    for (u32 s = 0; s < p.segments; s++) {
        u32 index = words[s], candidate = order_key(ld(x[index]));
        if (candidate > key) {
            key = candidate;
            best = index;
        }
    }
    indices[row + p.to_shift] = best;
}

// Partials are (count, first index) pairs; first is all ones where the count is 0.
extern "C" __global__ void __launch_bounds__(64) count_first(const E* x, u32*, uint2* pairs, ReduceParams p) {
    u32 id = linear_id();
    if (id >= p.items) return;
    u32 item = p.first + id;
    Segment at = segment_of(item, p);
    x += at.start;
    uint2 found = make_uint2(0u, 0xffffffffu);
    for (u32 k = 0; k < at.count; k++) {
        if (!is_finite(ld(x[k]))) {
            found.x++;
            found.y = min(found.y, item * p.fan + k);
        }
    }
    pairs[item] = found;
}

__device__ uint2 count_of_pairs(const uint2* pairs, u32 item, const ReduceParams& p) {
    Segment at = segment_of(item, p);
    pairs += at.start;
    uint2 found = make_uint2(0u, 0xffffffffu);
    for (u32 k = 0; k < at.count; k++) {
        found.x += pairs[k].x;
        found.y = min(found.y, pairs[k].y);
    }
    return found;
}

extern "C" __global__ void __launch_bounds__(64) count_next(const E*, u32*, uint2* pairs, ReduceParams p) {
    u32 id = linear_id();
    if (id >= p.items) return;
    pairs[id + p.to_shift] = count_of_pairs(pairs, p.first + id, p);
}

extern "C" __global__ void __launch_bounds__(64) count_last(const E*, u32* indices, const uint2* pairs, ReduceParams p) {
    if (linear_id() > 0u) return;
    uint2 found = count_of_pairs(pairs, 0u, p);
    indices[0] = found.x;
    indices[1] = found.y;
}

// Index into dy of dx's element, and the place along the reduced axis.
struct Place { u64 dy; u32 k; };

__device__ __forceinline__ Place backward_of(u32 element, const ReduceParams& p) {
    u32 row = element / p.inner;
    return {(u64)(row / p.n) * p.inner + element % p.inner, row % p.n};
}

// Without a first input dy stands in for it, unread.
extern "C" __global__ void __launch_bounds__(64) reduce_bwd(const E*, const E* dy, E* dx, ReduceParams p) {
    u32 id = linear_id();
    if (id >= p.items) return;
    dx[id] = st(ld(dy[backward_of(p.first + id, p).dy]) * p.factor);
}

extern "C" __global__ void __launch_bounds__(64) reduce_bwd_squares(const E* x, const E* dy, E* dx, ReduceParams p) {
    u32 id = linear_id();
    if (id >= p.items) return;
    dx[id] = st(2.0f * ld(x[id]) * ld(dy[backward_of(p.first + id, p).dy]));
}

extern "C" __global__ void __launch_bounds__(64) reduce_bwd_max(const u32* index, const E* dy, E* dx, ReduceParams p) {
    u32 id = linear_id();
    if (id >= p.items) return;
    Place at = backward_of(p.first + id, p);
    dx[id] = index[at.dy] == at.k ? dy[at.dy] : st(0.0f);
}
