// op:       layernorm, rmsnorm, add_layernorm, add_rmsnorm and their backward
// math:     h = x + scale r (or x); y = (h - mean) rstd w + b, rstd = 1 / sqrt(mean((h - mean)^2) + epsilon); rms: mean = 0, b = 0
//           n = (h - mean) rstd, g = dy w: dh' = rstd (g - mean(g) - n mean(g n)) + dh; dx = dh', dr = scale dh',
//           dw = sum_rows dy n, db = sum_rows dy; rms: without mean(g)
// grad:     norm_bwd, add_norm_bwd
// shapes:   layernorm: x[R,D], w[D], b[D], y[R,D], mean[R], rstd[R]; rmsnorm: x[R,D], w[D], y[R,D], rstd[R]
//           add_layernorm: x[R,D], r[R,D], w[D], b[D], y[R,D], h[R,D], mean[R], rstd[R]
//           add_rmsnorm: x[R,D], r[R,D], w[D], y[R,D], h[R,D], rstd[R]
//           norm_bwd: x[R,D], w[D], mean[R], rstd[R], dy[R,D], dx[R,D], dw[D], db[D], partial[chunks,D]
//           add_norm_bwd: h[R,D], w[D], mean[R], rstd[R], dy[R,D], dh[R,D], dx[R,D], dr[R,D], dw[D], db[D], partial[chunks,D]
// layout:   row-major; partial holds (sum dy n, sum dy) of 64 rows
// launch:   v1: linear over rows, 64 a block; v2: one block of 128 per row; partial: linear over chunks x D; total: linear over D
// cost:     8 R D flops forward, 15 R D backward; every element of x, r, dy, dh, y, h, dx, dr once
// numerics: f32; centred second pass for the variance; y from the unrounded h; NaN rows stay NaN
// source:   Ba, Kiros and Hinton 2016; Zhang and Sennrich 2019
// rungs:    v1 a row per thread, three passes; v2 a row per block, butterfly sums
//           v3 norm_vectors.cu

struct NormParams { u32 rows, d; float epsilon, scale; u32 rms, joined, chunks; };

#define GROUP 128u
#define CHUNK 64u
#define BLOCK 32u

// Sums over elements first, first + step, ... of one row; blocks are summed on their own, so that the rounding error
// grows with the block and the number of blocks, not with their product.
__device__ float x_sum(const E* x, u32 d, u32 first, u32 step) {
    float sum = 0.0f;
    for (u32 begin = first; begin < d; begin += BLOCK * step) {
        float part = 0.0f;
        for (u32 i = begin; i < min(begin + BLOCK * step, d); i += step) part += ld(x[i]);
        sum += part;
    }
    return sum;
}

__device__ float x_squares(const E* x, u32 d, float mean, u32 first, u32 step) {
    float sum = 0.0f;
    for (u32 begin = first; begin < d; begin += BLOCK * step) {
        float part = 0.0f;
        for (u32 i = begin; i < min(begin + BLOCK * step, d); i += step) {
            float v = ld(x[i]) - mean;
            part += v * v;
        }
        sum += part;
    }
    return sum;
}

// Fused by name, so that every pass over a row sees the same h.
__device__ __forceinline__ float added(E x, E r, float scale) { return fmaf(scale, ld(r), ld(x)); }

__device__ float h_sum(const E* x, const E* r, const NormParams& p, u32 first, u32 step) {
    float sum = 0.0f;
    for (u32 begin = first; begin < p.d; begin += BLOCK * step) {
        float part = 0.0f;
        for (u32 i = begin; i < min(begin + BLOCK * step, p.d); i += step) part += added(x[i], r[i], p.scale);
        sum += part;
    }
    return sum;
}

__device__ float h_squares(const E* x, const E* r, const NormParams& p, float mean, u32 first, u32 step) {
    float sum = 0.0f;
    for (u32 begin = first; begin < p.d; begin += BLOCK * step) {
        float part = 0.0f;
        for (u32 i = begin; i < min(begin + BLOCK * step, p.d); i += step) {
            float v = added(x[i], r[i], p.scale) - mean;
            part += v * v;
        }
        sum += part;
    }
    return sum;
}

// rstd from the sum of centred squares.
__device__ __forceinline__ float rstd_of(float squares, const NormParams& p) { return 1.0f / sqrtf(squares / (float)p.d + p.epsilon); }

__device__ void layer_store(E* y, const E* x, const E* w, const E* b, u32 d, float mean, float rstd, u32 first, u32 step) {
    for (u32 i = first; i < d; i += step) y[i] = st((ld(x[i]) - mean) * rstd * ld(w[i]) + ld(b[i]));
}

__device__ void rms_store(E* y, const E* x, const E* w, u32 d, float rstd, u32 first, u32 step) {
    for (u32 i = first; i < d; i += step) y[i] = st(ld(x[i]) * rstd * ld(w[i]));
}

__device__ void add_layer_store(E* y, E* h, const E* x, const E* r, const E* w, const E* b, const NormParams& p, float mean, float rstd, u32 first, u32 step) {
    for (u32 i = first; i < p.d; i += step) {
        float v = added(x[i], r[i], p.scale);
        h[i] = st(v);
        y[i] = st((v - mean) * rstd * ld(w[i]) + ld(b[i]));
    }
}

__device__ void add_rms_store(E* y, E* h, const E* x, const E* r, const E* w, const NormParams& p, float rstd, u32 first, u32 step) {
    for (u32 i = first; i < p.d; i += step) {
        float v = added(x[i], r[i], p.scale);
        h[i] = st(v);
        y[i] = st(v * rstd * ld(w[i]));
    }
}

extern "C" __global__ void __launch_bounds__(64) layernorm_fwd(const E* x, const E* w, const E* b, E* y, float* means, float* rstds, NormParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    u64 at = (u64)row * p.d;
    float mean = x_sum(x + at, p.d, 0u, 1u) / (float)p.d;
    float rstd = rstd_of(x_squares(x + at, p.d, mean, 0u, 1u), p);
    layer_store(y + at, x + at, w, b, p.d, mean, rstd, 0u, 1u);
    means[row] = mean;
    rstds[row] = rstd;
}

extern "C" __global__ void __launch_bounds__(128) layernorm_fwd_v2(const E* x, const E* w, const E* b, E* y, float* means, float* rstds, NormParams p) {
    __shared__ float tile[WARP];
    u32 row = linear_block(), lane = threadIdx.x;
    if (row >= p.rows) return;
    u64 at = (u64)row * p.d;
    float mean = block_sum(x_sum(x + at, p.d, lane, GROUP), tile) / (float)p.d;
    float rstd = rstd_of(block_sum(x_squares(x + at, p.d, mean, lane, GROUP), tile), p);
    layer_store(y + at, x + at, w, b, p.d, mean, rstd, lane, GROUP);
    if (lane == 0u) {
        means[row] = mean;
        rstds[row] = rstd;
    }
}

extern "C" __global__ void __launch_bounds__(64) rmsnorm_fwd(const E* x, const E* w, E* y, float* rstds, NormParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    u64 at = (u64)row * p.d;
    float rstd = rstd_of(x_squares(x + at, p.d, 0.0f, 0u, 1u), p);
    rms_store(y + at, x + at, w, p.d, rstd, 0u, 1u);
    rstds[row] = rstd;
}

extern "C" __global__ void __launch_bounds__(128) rmsnorm_fwd_v2(const E* x, const E* w, E* y, float* rstds, NormParams p) {
    __shared__ float tile[WARP];
    u32 row = linear_block(), lane = threadIdx.x;
    if (row >= p.rows) return;
    u64 at = (u64)row * p.d;
    float rstd = rstd_of(block_sum(x_squares(x + at, p.d, 0.0f, lane, GROUP), tile), p);
    rms_store(y + at, x + at, w, p.d, rstd, lane, GROUP);
    if (lane == 0u) rstds[row] = rstd;
}

extern "C" __global__ void __launch_bounds__(64) add_layernorm_fwd(const E* x, const E* r, const E* w, const E* b, E* y, E* h, float* means, float* rstds, NormParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    u64 at = (u64)row * p.d;
    float mean = h_sum(x + at, r + at, p, 0u, 1u) / (float)p.d;
    float rstd = rstd_of(h_squares(x + at, r + at, p, mean, 0u, 1u), p);
    add_layer_store(y + at, h + at, x + at, r + at, w, b, p, mean, rstd, 0u, 1u);
    means[row] = mean;
    rstds[row] = rstd;
}

extern "C" __global__ void __launch_bounds__(128) add_layernorm_fwd_v2(const E* x, const E* r, const E* w, const E* b, E* y, E* h, float* means, float* rstds, NormParams p) {
    __shared__ float tile[WARP];
    u32 row = linear_block(), lane = threadIdx.x;
    if (row >= p.rows) return;
    u64 at = (u64)row * p.d;
    float mean = block_sum(h_sum(x + at, r + at, p, lane, GROUP), tile) / (float)p.d;
    float rstd = rstd_of(block_sum(h_squares(x + at, r + at, p, mean, lane, GROUP), tile), p);
    add_layer_store(y + at, h + at, x + at, r + at, w, b, p, mean, rstd, lane, GROUP);
    if (lane == 0u) {
        means[row] = mean;
        rstds[row] = rstd;
    }
}

extern "C" __global__ void __launch_bounds__(64) add_rmsnorm_fwd(const E* x, const E* r, const E* w, E* y, E* h, float* rstds, NormParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    u64 at = (u64)row * p.d;
    float rstd = rstd_of(h_squares(x + at, r + at, p, 0.0f, 0u, 1u), p);
    add_rms_store(y + at, h + at, x + at, r + at, w, p, rstd, 0u, 1u);
    rstds[row] = rstd;
}

extern "C" __global__ void __launch_bounds__(128) add_rmsnorm_fwd_v2(const E* x, const E* r, const E* w, E* y, E* h, float* rstds, NormParams p) {
    __shared__ float tile[WARP];
    u32 row = linear_block(), lane = threadIdx.x;
    if (row >= p.rows) return;
    u64 at = (u64)row * p.d;
    float rstd = rstd_of(block_sum(h_squares(x + at, r + at, p, 0.0f, lane, GROUP), tile), p);
    add_rms_store(y + at, h + at, x + at, r + at, w, p, rstd, lane, GROUP);
    if (lane == 0u) rstds[row] = rstd;
}

// Backward, one row: x is h where a residual was added, and RMS normalisation takes no mean off (what is bound as one is not it).
struct Row { const E* x; const E* w; const E* dy; float mean, rstd; };

__device__ __forceinline__ float row_mean(const float* means, u32 row, const NormParams& p) { return p.rms != 0u ? 0.0f : means[row]; }

__device__ __forceinline__ Row row_of(const E* x, const E* w, const float* means, const float* rstds, const E* dy, u32 row, const NormParams& p) {
    u64 at = (u64)row * p.d;
    return {x + at, w, dy + at, row_mean(means, row, p), rstds[row]};
}

__device__ float g_sum(const Row& r, u32 d, u32 first, u32 step) {
    float sum = 0.0f;
    for (u32 i = first; i < d; i += step) sum += ld(r.dy[i]) * ld(r.w[i]);
    return sum;
}

__device__ float gn_sum(const Row& r, u32 d, u32 first, u32 step) {
    float sum = 0.0f;
    for (u32 i = first; i < d; i += step) sum += ld(r.dy[i]) * ld(r.w[i]) * (ld(r.x[i]) - r.mean) * r.rstd;
    return sum;
}

// Gradient through the normalisation at element i of a row, from the row's two sums.
__device__ __forceinline__ float dx_at(const Row& r, const NormParams& p, u32 i, float g, float gn) {
    float n = (ld(r.x[i]) - r.mean) * r.rstd;
    float mean_g = p.rms != 0u ? 0.0f : g / (float)p.d;
    return r.rstd * (ld(r.dy[i]) * ld(r.w[i]) - mean_g - n * (gn / (float)p.d));
}

__device__ void dx_store(E* dx, const Row& r, const NormParams& p, float g, float gn, u32 first, u32 step) {
    for (u32 i = first; i < p.d; i += step) dx[i] = st(dx_at(r, p, i, g, gn));
}

__device__ void add_dx_store(E* dx, E* dr, const E* dh, const Row& r, const NormParams& p, float g, float gn, u32 first, u32 step) {
    for (u32 i = first; i < p.d; i += step) {
        float v = dx_at(r, p, i, g, gn);
        if (p.joined != 0u) v += ld(dh[i]);
        dx[i] = st(v);
        dr[i] = st(p.scale * v);
    }
}

extern "C" __global__ void __launch_bounds__(64) norm_bwd(const E* x, const E* w, const float* means, const float* rstds, const E* dy, E* dx, E*, E*, float2*, NormParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    Row r = row_of(x, w, means, rstds, dy, row, p);
    dx_store(dx + (u64)row * p.d, r, p, g_sum(r, p.d, 0u, 1u), gn_sum(r, p.d, 0u, 1u), 0u, 1u);
}

extern "C" __global__ void __launch_bounds__(128) norm_bwd_v2(const E* x, const E* w, const float* means, const float* rstds, const E* dy, E* dx, E*, E*, float2*, NormParams p) {
    __shared__ float tile[WARP];
    u32 row = linear_block(), lane = threadIdx.x;
    if (row >= p.rows) return;
    Row r = row_of(x, w, means, rstds, dy, row, p);
    float g = block_sum(g_sum(r, p.d, lane, GROUP), tile);
    float gn = block_sum(gn_sum(r, p.d, lane, GROUP), tile);
    dx_store(dx + (u64)row * p.d, r, p, g, gn, lane, GROUP);
}

extern "C" __global__ void __launch_bounds__(64) add_norm_bwd(const E* h, const E* w, const float* means, const float* rstds, const E* dy, const E* dh, E* dx, E* dr, E*, E*, float2*, NormParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    Row r = row_of(h, w, means, rstds, dy, row, p);
    u64 at = (u64)row * p.d;
    add_dx_store(dx + at, dr + at, dh + at, r, p, g_sum(r, p.d, 0u, 1u), gn_sum(r, p.d, 0u, 1u), 0u, 1u);
}

extern "C" __global__ void __launch_bounds__(128) add_norm_bwd_v2(const E* h, const E* w, const float* means, const float* rstds, const E* dy, const E* dh, E* dx, E* dr, E*, E*, float2*, NormParams p) {
    __shared__ float tile[WARP];
    u32 row = linear_block(), lane = threadIdx.x;
    if (row >= p.rows) return;
    Row r = row_of(h, w, means, rstds, dy, row, p);
    u64 at = (u64)row * p.d;
    float g = block_sum(g_sum(r, p.d, lane, GROUP), tile);
    float gn = block_sum(gn_sum(r, p.d, lane, GROUP), tile);
    add_dx_store(dx + at, dr + at, dh + at, r, p, g, gn, lane, GROUP);
}

// (sum dy n, sum dy) of one column over one chunk of rows; neighbours read neighbouring columns.
__device__ float2 column_sums(const E* x, const float* means, const float* rstds, const E* dy, u32 item, const NormParams& p) {
    u32 chunk = item / p.d, i = item - chunk * p.d;
    float2 sums = make_float2(0.0f, 0.0f);
    for (u32 row = chunk * CHUNK; row < min((chunk + 1u) * CHUNK, p.rows); row++) {
        u64 at = (u64)row * p.d + i;
        float slope = ld(dy[at]);
        sums.x += slope * (ld(x[at]) - row_mean(means, row, p)) * rstds[row];
        sums.y += slope;
    }
    return sums;
}

// Sum of one column's chunks.
__device__ float2 chunk_sums(const float2* partial, u32 i, const NormParams& p) {
    float2 sums = make_float2(0.0f, 0.0f);
    for (u32 chunk = 0; chunk < p.chunks; chunk++) {
        float2 part = partial[(u64)chunk * p.d + i];
        sums.x += part.x;
        sums.y += part.y;
    }
    return sums;
}

extern "C" __global__ void __launch_bounds__(64) norm_bwd_partial(const E* x, const E*, const float* means, const float* rstds, const E* dy, E*, E*, E*, float2* partial, NormParams p) {
    u32 item = linear_id();
    if (item < p.chunks * p.d) partial[item] = column_sums(x, means, rstds, dy, item, p);
}

extern "C" __global__ void __launch_bounds__(64) add_norm_bwd_partial(const E* h, const E*, const float* means, const float* rstds, const E* dy, const E*, E*, E*, E*, E*, float2* partial, NormParams p) {
    u32 item = linear_id();
    if (item < p.chunks * p.d) partial[item] = column_sums(h, means, rstds, dy, item, p);
}

extern "C" __global__ void __launch_bounds__(64) norm_bwd_total(const E*, const E*, const float*, const float*, const E*, E*, E* dw, E* db, const float2* partial, NormParams p) {
    u32 i = linear_id();
    if (i >= p.d) return;
    float2 sums = chunk_sums(partial, i, p);
    dw[i] = st(sums.x);
    db[i] = st(sums.y);
}

extern "C" __global__ void __launch_bounds__(64) add_norm_bwd_total(const E*, const E*, const float*, const float*, const E*, const E*, E*, E*, E* dw, E* db, const float2* partial, NormParams p) {
    u32 i = linear_id();
    if (i >= p.d) return;
    float2 sums = chunk_sums(partial, i, p);
    dw[i] = st(sums.x);
    db[i] = st(sums.y);
}
