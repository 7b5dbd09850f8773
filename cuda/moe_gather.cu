// op:       gathered_matmul, gathered_matmul_int8
// math:     z(t, j) = w[e] x[row], e the j-th choice of token t; rows: y[t k + j] = f(z(t, j) + b[e]), 0 where none; sum:
//           y[t] = f(sum_j z(t, j) + b)
// grad:     none: for inference
// shapes:   rows: x[M, D], w[E, N, D], b[E, N], indices[M, k], gates[M, k] or unused, y[M k, N]; sum: x[M k, D], b[N], y[M, N];
//           int8: x i8, xs, w i8, ws[E, N], b, indices, gates, y
// layout:   rows contiguous; slot = token k + choice; i8 rows need not start on words
// launch:   linear, 64 threads a block, one output each; warp: 128 threads, a warp for each output
// cost:     2 M k N D operations; weights of experts that nobody chose are never read
// numerics: f32 sums in rising order of choice and of the summed axis (warp: of every 32nd element, then of the lanes by halves);
//           int8: exact int32 sums of each choice, two roundings, then f32 sums over choices
// source:   MoEfication: Zhang et al. 2022
// rungs:    v1 as above; warp weight rows are read side by side by the lanes of a warp

struct GatherParams { u32 tokens, n, d, k, experts, sum, relu, skips; float threshold; };

// What one output is made of: its slots, and the choice of each.
struct GatherOutput {
    u32 row, j, first, end;
    bool summed;
};

__device__ __forceinline__ bool gathered_output(GatherOutput& o, u32 id, const GatherParams& p) {
    o.row = id / p.n;
    o.j = id % p.n;
    o.summed = p.sum == 1u;
    if (o.row >= (o.summed ? p.tokens : p.tokens * p.k)) return false;
    o.first = o.summed ? o.row * p.k : o.row;
    o.end = o.summed ? o.first + p.k : o.first + 1u;
    return true;
}

__device__ __forceinline__ bool gathered_runs(u32 slot, const u32* indices, const float* gates, const GatherParams& p) {
    return indices[slot] < p.experts && (p.skips == 0u || gates[slot] > p.threshold);
}

__device__ __forceinline__ float gathered_finish(float total, const GatherParams& p) {
    return p.relu == 1u && total < 0.0f ? 0.0f : total;
}

extern "C" __global__ void __launch_bounds__(64)
    gathered_matmul_fwd(const E* x, const E* w, const E* b, const u32* indices, const float* gates, E* y, GatherParams p) {
    u32 id = linear_id();
    GatherOutput o;
    if (!gathered_output(o, id, p)) return;
    float total = 0.0f;
    bool executed = o.summed;
    u32 bias = o.j;
    for (u32 slot = o.first; slot < o.end; slot++) {
        if (!gathered_runs(slot, indices, gates, p)) continue;
        u32 column = indices[slot] * p.n + o.j;
        const E* row = w + (u64)column * p.d;
        const E* from = x + (u64)(o.summed ? slot : slot / p.k) * p.d;
        if (!o.summed) bias = column;
        executed = true;
        float sum = 0.0f;
        for (u32 c = 0u; c < p.d; c++) sum += ld(from[c]) * ld(row[c]);
        total += sum;
    }
    if (executed) total += ld(b[bias]);
    y[id] = st(gathered_finish(total, p));
}

extern "C" __global__ void __launch_bounds__(64)
    gathered_matmul_int8_fwd(const i8* x, const float* xs, const i8* w, const float* ws, const float* b, const u32* indices, const float* gates, float* y, GatherParams p) {
    u32 id = linear_id();
    GatherOutput o;
    if (!gathered_output(o, id, p)) return;
    float total = 0.0f;
    bool executed = o.summed;
    u32 bias = o.j;
    for (u32 slot = o.first; slot < o.end; slot++) {
        if (!gathered_runs(slot, indices, gates, p)) continue;
        u32 column = indices[slot] * p.n + o.j, from = o.summed ? slot : slot / p.k;
        const i8* row = w + (u64)column * p.d;
        const i8* input = x + (u64)from * p.d;
        if (!o.summed) bias = column;
        executed = true;
        int sum = 0;
        if ((p.d & 3u) == 0u) {
            for (u32 c = 0u; c < p.d / 4u; c++) sum = __dp4a(((const int*)input)[c], ((const int*)row)[c], sum);
        } else {
            for (u32 c = 0u; c < p.d; c++) sum += (int)input[c] * (int)row[c];
        }
        // Rounded by itself: a fused sum would differ from what other devices give.
        total = __fadd_rn(total, __fmul_rn(__fmul_rn((float)sum, xs[from]), ws[column]));
    }
    if (executed) total = __fadd_rn(total, b[bias]);
    y[id] = gathered_finish(total, p);
}

extern "C" __global__ void __launch_bounds__(128)
    gathered_matmul_fwd_warp(const E* x, const E* w, const E* b, const u32* indices, const float* gates, E* y, GatherParams p) {
    u32 id = linear_id() / WARP, lane = threadIdx.x % WARP;
    GatherOutput o;
    // All lanes of a warp have one output, so they leave together.
    if (!gathered_output(o, id, p)) return;
    float total = 0.0f;
    bool executed = o.summed;
    u32 bias = o.j;
    for (u32 slot = o.first; slot < o.end; slot++) {
        if (!gathered_runs(slot, indices, gates, p)) continue;
        u32 column = indices[slot] * p.n + o.j;
        const E* row = w + (u64)column * p.d;
        const E* from = x + (u64)(o.summed ? slot : slot / p.k) * p.d;
        if (!o.summed) bias = column;
        executed = true;
        for (u32 c = lane; c < p.d; c += WARP) total += ld(from[c]) * ld(row[c]);
    }
#pragma unroll
    for (u32 by = WARP / 2u; by > 0u; by /= 2u) total += __shfl_xor_sync(ALL_LANES, total, by);
    if (lane != 0u) return;
    if (executed) total += ld(b[bias]);
    y[id] = st(gathered_finish(total, p));
}

extern "C" __global__ void __launch_bounds__(128)
    gathered_matmul_int8_fwd_warp(const i8* x, const float* xs, const i8* w, const float* ws, const float* b, const u32* indices, const float* gates, float* y, GatherParams p) {
    u32 id = linear_id() / WARP, lane = threadIdx.x % WARP;
    GatherOutput o;
    if (!gathered_output(o, id, p)) return;
    float total = 0.0f;
    bool executed = o.summed;
    u32 bias = o.j;
    for (u32 slot = o.first; slot < o.end; slot++) {
        if (!gathered_runs(slot, indices, gates, p)) continue;
        u32 column = indices[slot] * p.n + o.j, from = o.summed ? slot : slot / p.k;
        const i8* row = w + (u64)column * p.d;
        const i8* input = x + (u64)from * p.d;
        if (!o.summed) bias = column;
        executed = true;
        int sum = 0;
        if ((p.d & 3u) == 0u) {
            for (u32 c = lane; c < p.d / 4u; c += WARP) sum = __dp4a(((const int*)input)[c], ((const int*)row)[c], sum);
        } else {
            for (u32 c = lane; c < p.d; c += WARP) sum += (int)input[c] * (int)row[c];
        }
#pragma unroll
        for (u32 by = WARP / 2u; by > 0u; by /= 2u) sum += __shfl_xor_sync(ALL_LANES, sum, by);
        total = __fadd_rn(total, __fmul_rn(__fmul_rn((float)sum, xs[from]), ws[column]));
    }
    if (lane != 0u) return;
    if (executed) total = __fadd_rn(total, b[bias]);
    y[id] = gathered_finish(total, p);
}
