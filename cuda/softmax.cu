// op:       softmax, log_softmax and their backward, cross_entropy, cross_entropy_bwd
// math:     softmax: y = exp(x - lse); log: y = x - lse; lse = max + log(sum exp(x - max))
//           softmax_bwd: dx = y (dy - sum(dy y)); log: dx = dy - exp(y) sum(dy)
//           cross_entropy: loss = lse - (1 - s) z_t - s mean(z); bwd: dz = dloss (exp(z - lse) - (1 - s) onehot - s / V)
// grad:     softmax_bwd, cross_entropy_bwd
// shapes:   softmax: x[R,V], y[R,V]; softmax_bwd: y[R,V], dy[R,V], dx[R,V]
//           cross_entropy: z[R,V], target[R], loss[R], lse[R]; cross_entropy_bwd: z[R,V], target[R], saved[R] (lse), dloss[R], dz[R,V]
// layout:   row-major
// launch:   v1: linear over rows, 64 a block; v2: one block of 128 per row; cross_entropy_bwd: linear over elements, 4 each
//           v3: a warp, a block of 256 or one of 1,024 per row; cross_entropy_bwd_v2: a warp per 128 vectors of a row
// cost:     5 R V flops; every element once
// numerics: f32, maximum taken off first; NaN rows stay NaN; target 0xffffffff: loss, lse and dz are 0; a target of V or more: NaN loss
// source:   label smoothing: Szegedy et al. 2016
// rungs:    v1 a row per thread, three passes; v2 a row per block, butterfly reductions; v3 16 bytes per access, the row kept in
//           registers and read once; longer rows and losses with maximum and sum taken along in one pass

struct SoftmaxParams { u32 rows, v, log; float smoothing; };

#define GROUP 128u
#define BLOCK 32u
#define IGNORE 0xffffffffu

// Reductions over elements first, first + step, ... of one row; sums run in blocks against rounding.
__device__ float x_max(const E* x, u32 v, u32 first, u32 step) {
    float most = -3.4e38f;
    for (u32 i = first; i < v; i += step) most = fmaxf(most, ld(x[i]));
    return most;
}

__device__ float exp_sum(const E* x, u32 v, float most, u32 first, u32 step) {
    float sum = 0.0f;
    for (u32 begin = first; begin < v; begin += BLOCK * step) {
        float part = 0.0f;
        for (u32 i = begin; i < min(begin + BLOCK * step, v); i += step) part += expf(ld(x[i]) - most);
        sum += part;
    }
    return sum;
}

__device__ float x_sum(const E* x, u32 v, u32 first, u32 step) {
    float sum = 0.0f;
    for (u32 begin = first; begin < v; begin += BLOCK * step) {
        float part = 0.0f;
        for (u32 i = begin; i < min(begin + BLOCK * step, v); i += step) part += ld(x[i]);
        sum += part;
    }
    return sum;
}

__device__ void y_store(E* y, const E* x, const SoftmaxParams& p, float most, float sum, u32 first, u32 step) {
    for (u32 i = first; i < p.v; i += step) {
        float value = ld(x[i]) - most;
        y[i] = st(p.log != 0u ? value - logf(sum) : expf(value) / sum);
    }
}

extern "C" __global__ void __launch_bounds__(64) softmax_fwd(const E* x, E* y, SoftmaxParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    x += (u64)row * p.v;
    y += (u64)row * p.v;
    float most = x_max(x, p.v, 0u, 1u);
    y_store(y, x, p, most, exp_sum(x, p.v, most, 0u, 1u), 0u, 1u);
}

extern "C" __global__ void __launch_bounds__(128) softmax_fwd_v2(const E* x, E* y, SoftmaxParams p) {
    __shared__ float tile[WARP];
    u32 row = linear_block(), lane = threadIdx.x;
    if (row >= p.rows) return;
    x += (u64)row * p.v;
    y += (u64)row * p.v;
    float most = block_max(x_max(x, p.v, lane, GROUP), tile);
    y_store(y, x, p, most, block_sum(exp_sum(x, p.v, most, lane, GROUP), tile), lane, GROUP);
}

__device__ float dy_sum(const E* y, const E* dy, const SoftmaxParams& p, u32 first, u32 step) {
    float sum = 0.0f;
    for (u32 begin = first; begin < p.v; begin += BLOCK * step) {
        float part = 0.0f;
        for (u32 i = begin; i < min(begin + BLOCK * step, p.v); i += step) part += ld(dy[i]) * (p.log != 0u ? 1.0f : ld(y[i]));
        sum += part;
    }
    return sum;
}

__device__ void dx_store(E* dx, const E* y, const E* dy, const SoftmaxParams& p, float total, u32 first, u32 step) {
    for (u32 i = first; i < p.v; i += step) {
        float out = ld(y[i]), grad = ld(dy[i]);
        dx[i] = st(p.log != 0u ? grad - expf(out) * total : out * (grad - total));
    }
}

extern "C" __global__ void __launch_bounds__(64) softmax_bwd(const E* y, const E* dy, E* dx, SoftmaxParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    u64 at = (u64)row * p.v;
    dx_store(dx + at, y + at, dy + at, p, dy_sum(y + at, dy + at, p, 0u, 1u), 0u, 1u);
}

extern "C" __global__ void __launch_bounds__(128) softmax_bwd_v2(const E* y, const E* dy, E* dx, SoftmaxParams p) {
    __shared__ float tile[WARP];
    u32 row = linear_block(), lane = threadIdx.x;
    if (row >= p.rows) return;
    u64 at = (u64)row * p.v;
    dx_store(dx + at, y + at, dy + at, p, block_sum(dy_sum(y + at, dy + at, p, lane, GROUP), tile), lane, GROUP);
}

// Loss of one row z from its reductions; sum is only read where labels are smoothed.
__device__ void entropy_store(float* loss, float* saved, const E* z, u32 t, const SoftmaxParams& p, float most, float exps, float sum) {
    if (t == IGNORE) {
        *loss = 0.0f;
        *saved = 0.0f;
        return;
    }
    float lse = most + logf(exps);
    *saved = lse;
    if (t >= p.v) *loss = __uint_as_float(0x7fc00000u);
    else *loss = lse - (1.0f - p.smoothing) * ld(z[t]) - p.smoothing * (sum / (float)p.v);
}

extern "C" __global__ void __launch_bounds__(64) cross_entropy_fwd(const E* z, const u32* target, float* loss, float* lse, SoftmaxParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    z += (u64)row * p.v;
    float most = x_max(z, p.v, 0u, 1u);
    float sum = p.smoothing > 0.0f ? x_sum(z, p.v, 0u, 1u) : 0.0f;
    entropy_store(loss + row, lse + row, z, target[row], p, most, exp_sum(z, p.v, most, 0u, 1u), sum);
}

extern "C" __global__ void __launch_bounds__(128) cross_entropy_fwd_v2(const E* z, const u32* target, float* loss, float* lse, SoftmaxParams p) {
    __shared__ float tile[WARP];
    u32 row = linear_block(), lane = threadIdx.x;
    if (row >= p.rows) return;
    z += (u64)row * p.v;
    float most = block_max(x_max(z, p.v, lane, GROUP), tile);
    float sum = p.smoothing > 0.0f ? block_sum(x_sum(z, p.v, lane, GROUP), tile) : 0.0f;
    float exps = block_sum(exp_sum(z, p.v, most, lane, GROUP), tile);
    if (lane == 0u) entropy_store(loss + row, lse + row, z, target[row], p, most, exps, sum);
}

extern "C" __global__ void __launch_bounds__(64) cross_entropy_bwd(const E* z, const u32* target, const float* saved, const float* dloss, E* dz, SoftmaxParams p) {
    u32 first = linear_id() * 4u;
    float s = p.smoothing;
    for (u32 i = first; i < min(first + 4u, p.rows * p.v); i++) {
        u32 row = i / p.v, t = target[row];
        float slope = expf(ld(z[i]) - saved[row]) - s / (float)p.v;
        if (t == i - row * p.v) slope -= 1.0f - s;
        dz[i] = st(t == IGNORE ? 0.0f : dloss[row] * slope);
    }
}

// --- 16 bytes per access. Rows need not be aligned: what a first or last vector holds of other rows counts as minus infinity.
#define NOTHING __uint_as_float(0xff800000u)
#define LOWEST (-3.4e38f)
// Elements of a row that a thread keeps, and vectors of it that a pass has under way.
#define KEPT 32u
#define UNROLL 4u

// Whether any thread of a team has an i-th vector of a row: short rows skip the rest together.
template <u32 TEAM> __device__ __forceinline__ bool reaches(const Span& span, u32 i) { return i * TEAM < span.vectors; }

template <u32 TEAM>
__device__ __forceinline__ void softmax_kept(const E* x, E* y, const SoftmaxParams& p, float* tile) {
    constexpr u32 COUNT = KEPT / VECTOR;
    u32 row = team_row<TEAM>(), lane = threadIdx.x % TEAM;
    if (row >= p.rows) return;
    Span span = span_of(row, p.v);
    uint4 raw[COUNT];
#pragma unroll
    for (u32 i = 0; i < COUNT; i++)
        if (reaches<TEAM>(span, i)) raw[i] = span_load(x, span, lane + i * TEAM, NOTHING);
    float kept[COUNT][VECTOR], most = LOWEST;
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        if (!reaches<TEAM>(span, i)) continue;
        unpack_vector(kept[i], raw[i]);
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) most = fmaxf(most, kept[i][k]);
    }
    most = team_max<TEAM>(most, tile);
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        if (!reaches<TEAM>(span, i)) continue;
        float part = 0.0f;
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) {
            float value = kept[i][k] - most, exponential = expf(value);
            part += exponential;
            kept[i][k] = p.log != 0u ? value : exponential;
        }
        sum += part;
    }
    sum = team_sum<TEAM>(sum, tile);
    float scale = p.log != 0u ? 1.0f : 1.0f / sum, shift = p.log != 0u ? -logf(sum) : 0.0f;
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        if (!reaches<TEAM>(span, i)) continue;
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) kept[i][k] = fmaf(kept[i][k], scale, shift);
        span_store(y, span, lane + i * TEAM, kept[i]);
    }
}

extern "C" __global__ void __launch_bounds__(128) softmax_fwd_warp_v3(const E* x, E* y, SoftmaxParams p) { softmax_kept<WARP>(x, y, p, nullptr); }

extern "C" __global__ void __launch_bounds__(256) softmax_fwd_block_v3(const E* x, E* y, SoftmaxParams p) {
    __shared__ float tile[WARP];
    softmax_kept<256u>(x, y, p, tile);
}

extern "C" __global__ void __launch_bounds__(1024) softmax_fwd_wide_v3(const E* x, E* y, SoftmaxParams p) {
    __shared__ float tile[WARP];
    softmax_kept<1024u>(x, y, p, tile);
}

// What one pass over a row has found: the maximum, the sum of exp(x - maximum), and the sum of x where it is asked for.
struct Found { float most, exps, sum; };

// One thread's share of the pass. The sum of exponentials moves to every new maximum; one exponential more for a whole batch.
template <u32 TEAM>
__device__ __forceinline__ Found pass(const E* x, const Span& span, bool summed) {
    Found f = {LOWEST, 0.0f, 0.0f};
    for (u32 base = threadIdx.x % TEAM; base < span.vectors; base += TEAM * UNROLL) {
        uint4 raw[UNROLL];
#pragma unroll
        for (u32 i = 0; i < UNROLL; i++) raw[i] = span_load(x, span, base + i * TEAM, NOTHING);
        float values[UNROLL][VECTOR], most = f.most, part = 0.0f;
#pragma unroll
        for (u32 i = 0; i < UNROLL; i++) {
            unpack_vector(values[i], raw[i]);
#pragma unroll
            for (u32 k = 0; k < VECTOR; k++) most = fmaxf(most, values[i][k]);
        }
#pragma unroll
        for (u32 i = 0; i < UNROLL; i++) {
#pragma unroll
            for (u32 k = 0; k < VECTOR; k++) part += expf(values[i][k] - most);
        }
        f.exps = f.exps * expf(f.most - most) + part;
        f.most = most;
        if (summed) {
            part = 0.0f;
#pragma unroll
            for (u32 i = 0; i < UNROLL; i++) {
#pragma unroll
                for (u32 k = 0; k < VECTOR; k++) part += span_index(span, base + i * TEAM, k) < span.length ? values[i][k] : 0.0f;
            }
            f.sum += part;
        }
    }
    return f;
}

// The whole row's, in every thread of the team.
template <u32 TEAM>
__device__ __forceinline__ Found found(const E* x, const Span& span, bool summed, float* tile) {
    Found f = pass<TEAM>(x, span, summed);
    float most = team_max<TEAM>(f.most, tile);
    float exps = team_sum<TEAM>(f.exps * expf(f.most - most), tile);
    return {most, exps, summed ? team_sum<TEAM>(f.sum, tile) : 0.0f};
}

// Rows that no block holds: the second pass reads what the cache has left of the first.
extern "C" __global__ void __launch_bounds__(1024) softmax_fwd_long_v3(const E* x, E* y, SoftmaxParams p) {
    __shared__ float tile[WARP];
    u32 row = linear_block();
    if (row >= p.rows) return;
    Span span = span_of(row, p.v);
    Found f = found<1024u>(x, span, false, tile);
    float scale = 1.0f / f.exps, shift = logf(f.exps);
    for (u32 j = threadIdx.x; j < span.vectors; j += 1024u) {
        float values[VECTOR];
        unpack_vector(values, span_load(x, span, j, NOTHING));
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) values[k] = p.log != 0u ? values[k] - f.most - shift : expf(values[k] - f.most) * scale;
        span_store(y, span, j, values);
    }
}

// y and dy of one row in COUNT vectors of each thread.
template <u32 TEAM, u32 COUNT>
__device__ __forceinline__ void softmax_bwd_kept(const E* y, const E* dy, E* dx, const SoftmaxParams& p, float* tile) {
    u32 row = team_row<TEAM>(), lane = threadIdx.x % TEAM;
    if (row >= p.rows) return;
    Span span = span_of(row, p.v);
    uint4 outs[COUNT], grads[COUNT];
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        if (!reaches<TEAM>(span, i)) continue;
        outs[i] = span_load(y, span, lane + i * TEAM, 0.0f);
        grads[i] = span_load(dy, span, lane + i * TEAM, 0.0f);
    }
    float total = 0.0f, out[VECTOR], grad[VECTOR];
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        if (!reaches<TEAM>(span, i)) continue;
        float part = 0.0f;
        unpack_vector(out, outs[i]);
        unpack_vector(grad, grads[i]);
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) part += grad[k] * (p.log != 0u ? 1.0f : out[k]);
        total += part;
    }
    total = team_sum<TEAM>(total, tile);
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        if (!reaches<TEAM>(span, i)) continue;
        unpack_vector(out, outs[i]);
        unpack_vector(grad, grads[i]);
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) grad[k] = p.log != 0u ? grad[k] - expf(out[k]) * total : out[k] * (grad[k] - total);
        span_store(dx, span, lane + i * TEAM, grad);
    }
}

extern "C" __global__ void __launch_bounds__(128) softmax_bwd_warp_v3(const E* y, const E* dy, E* dx, SoftmaxParams p) {
    softmax_bwd_kept<WARP, KEPT / VECTOR>(y, dy, dx, p, nullptr);
}

extern "C" __global__ void __launch_bounds__(256) softmax_bwd_block_v3(const E* y, const E* dy, E* dx, SoftmaxParams p) {
    __shared__ float tile[WARP];
    softmax_bwd_kept<256u, KEPT / VECTOR>(y, dy, dx, p, tile);
}

// Half the elements a thread: of 64 registers two rows leave room for no more.
extern "C" __global__ void __launch_bounds__(1024) softmax_bwd_wide_v3(const E* y, const E* dy, E* dx, SoftmaxParams p) {
    __shared__ float tile[WARP];
    softmax_bwd_kept<1024u, KEPT / 2u / VECTOR>(y, dy, dx, p, tile);
}

extern "C" __global__ void __launch_bounds__(1024) softmax_bwd_long_v3(const E* y, const E* dy, E* dx, SoftmaxParams p) {
    __shared__ float tile[WARP];
    u32 row = linear_block();
    if (row >= p.rows) return;
    Span span = span_of(row, p.v);
    float total = 0.0f, out[VECTOR], grad[VECTOR];
#pragma unroll 4
    for (u32 j = threadIdx.x; j < span.vectors; j += 1024u) {
        float part = 0.0f;
        unpack_vector(out, span_load(y, span, j, 0.0f));
        unpack_vector(grad, span_load(dy, span, j, 0.0f));
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) part += grad[k] * (p.log != 0u ? 1.0f : out[k]);
        total += part;
    }
    total = team_sum<1024u>(total, tile);
    for (u32 j = threadIdx.x; j < span.vectors; j += 1024u) {
        unpack_vector(out, span_load(y, span, j, 0.0f));
        unpack_vector(grad, span_load(dy, span, j, 0.0f));
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) grad[k] = p.log != 0u ? grad[k] - expf(out[k]) * total : out[k] * (grad[k] - total);
        span_store(dx, span, j, grad);
    }
}

// Losses need no row kept: one pass.
template <u32 TEAM>
__device__ __forceinline__ void entropy_row(const E* z, const u32* target, float* loss, float* lse, const SoftmaxParams& p, float* tile) {
    u32 row = team_row<TEAM>();
    if (row >= p.rows) return;
    Found f = found<TEAM>(z, span_of(row, p.v), p.smoothing > 0.0f, tile);
    if (threadIdx.x % TEAM == 0u) entropy_store(loss + row, lse + row, z + (u64)row * p.v, target[row], p, f.most, f.exps, f.sum);
}

extern "C" __global__ void __launch_bounds__(128) cross_entropy_fwd_warp_v3(const E* z, const u32* target, float* loss, float* lse, SoftmaxParams p) {
    entropy_row<WARP>(z, target, loss, lse, p, nullptr);
}

extern "C" __global__ void __launch_bounds__(256) cross_entropy_fwd_block_v3(const E* z, const u32* target, float* loss, float* lse, SoftmaxParams p) {
    __shared__ float tile[WARP];
    entropy_row<256u>(z, target, loss, lse, p, tile);
}

extern "C" __global__ void __launch_bounds__(1024) cross_entropy_fwd_wide_v3(const E* z, const u32* target, float* loss, float* lse, SoftmaxParams p) {
    __shared__ float tile[WARP];
    entropy_row<1024u>(z, target, loss, lse, p, tile);
}

extern "C" __global__ void __launch_bounds__(256) cross_entropy_bwd_v2(const E* z, const u32* target, const float* saved, const float* dloss, E* dz, SoftmaxParams p) {
    u32 parts = div_up((p.v + 2u * VECTOR - 2u) / VECTOR, WARP * UNROLL);
    u32 item = team_row<WARP>(), row = item / parts, first = item % parts * (WARP * UNROLL) + threadIdx.x % WARP;
    if (row >= p.rows) return;
    Span span = span_of(row, p.v);
    uint4 raw[UNROLL];
#pragma unroll
    for (u32 i = 0; i < UNROLL; i++) raw[i] = span_load(z, span, first + i * WARP, 0.0f);
    u32 t = target[row];
    float lse = saved[row], slope = dloss[row], even = p.smoothing / (float)p.v, hit = 1.0f - p.smoothing, values[VECTOR];
#pragma unroll
    for (u32 i = 0; i < UNROLL; i++) {
        unpack_vector(values, raw[i]);
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) {
            float value = expf(values[k] - lse) - even;
            if (span_index(span, first + i * WARP, k) == t) value -= hit;
            values[k] = t == IGNORE ? 0.0f : slope * value;
        }
        span_store(dz, span, first + i * WARP, values);
    }
}
