// op:       softmax, log_softmax and their backward, cross_entropy, cross_entropy_bwd
// math:     softmax: y = exp(x - lse); log: y = x - lse; lse = max + log(sum exp(x - max))
//           softmax_bwd: dx = y (dy - sum(dy y)); log: dx = dy - exp(y) sum(dy)
//           cross_entropy: loss = lse - (1 - s) z_t - s mean(z); bwd: dz = dloss (exp(z - lse) - (1 - s) onehot - s / V)
// grad:     softmax_bwd, cross_entropy_bwd
// shapes:   softmax: x[R,V], y[R,V]; softmax_bwd: y[R,V], dy[R,V], dx[R,V]
//           cross_entropy: z[R,V], target[R], loss[R], lse[R]; cross_entropy_bwd: z[R,V], target[R], saved[R] (lse), dloss[R], dz[R,V]
// layout:   row-major
// launch:   v1: linear over rows, 64 a block; v2: one block of 128 per row; cross_entropy_bwd: linear over elements, 4 each
// cost:     5 R V flops; every element once
// numerics: f32, maximum taken off first; NaN rows stay NaN; target 0xffffffff: loss, lse and dz are 0; a target of V or more: NaN loss
// source:   label smoothing: Szegedy et al. 2016
// rungs:    v1 a row per thread, three passes; v2 a row per block, butterfly reductions

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
