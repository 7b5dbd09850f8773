// op:       layernorm, rmsnorm, add_layernorm, add_rmsnorm and their backward
// math:     norm.cu
// grad:     norm_bwd, add_norm_bwd
// shapes:   norm.cu; D a multiple of the elements of 16 bytes
// layout:   row-major; partial holds (sum dy n, sum dy) of 64 rows
// launch:   a warp, a block of 256 or one of 1,024 per row; partial: a block per chunk and 32 vectors; total: per 32 columns
// cost:     8 R D flops forward, 15 R D backward; every element once, x and dy a second time for the partial sums
// numerics: f32; centred second pass over registers for the variance; y from the unrounded h; NaN rows stay NaN
// source:   Ba, Kiros and Hinton 2016; Zhang and Sennrich 2019
// rungs:    v3 16 bytes per access, the row kept in registers and read once; v1 and v2 norm.cu

struct NormParams { u32 rows, d; float epsilon, scale; u32 rms, joined, chunks; };

#define CHUNK 64u

__device__ __forceinline__ float rstd_of(float squares, const NormParams& p) { return 1.0f / sqrtf(squares / (float)p.d + p.epsilon); }

// RMS normalisation takes no mean off; what is bound as one is not it.
__device__ __forceinline__ float row_mean(const float* means, u32 row, const NormParams& p) { return p.rms != 0u ? 0.0f : means[row]; }

// Elements of a row that stay in the registers of a thread.
#define KEPT 32u

template <u32 TEAM, u32 COUNT, bool ADDED, bool RMS>
__device__ __forceinline__ void norm_row(const E* x, const E* r, const E* w, const E* b, E* y, E* h, float* means, float* rstds, const NormParams& p, float* tile) {
        u32 row = team_row<TEAM>(), lane = threadIdx.x % TEAM, vectors = p.d / VECTOR;
    if (row >= p.rows) return;
    u64 at = (u64)row * p.d;
    float kept[COUNT][VECTOR], sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        // Short rows skip the rest together.
        if (i * TEAM >= vectors) continue;
        u32 j = lane + i * TEAM;
        uint4 raw = make_uint4(0u, 0u, 0u, 0u), more = raw;
        if (j < vectors) raw = load_vector(x + at + j * VECTOR);
        if (ADDED && j < vectors) more = load_vector(r + at + j * VECTOR);
        unpack_vector(kept[i], raw);
        if (ADDED) {
            float residual[VECTOR];
            unpack_vector(residual, more);
#pragma unroll
            for (u32 k = 0; k < VECTOR; k++) kept[i][k] = fmaf(p.scale, residual[k], kept[i][k]);
        }
    }
    float mean = 0.0f;
    if (!RMS) {
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) {
            if (i * TEAM >= vectors) continue;
            float part = 0.0f;
#pragma unroll
            for (u32 k = 0; k < VECTOR; k++) part += kept[i][k];
            sum += part;
        }
        mean = team_sum<TEAM>(sum, tile) / (float)p.d;
    }
    sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        if (i * TEAM >= vectors) continue;
        float part = 0.0f;
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) {
            float v = kept[i][k] - mean;
            part += v * v;
        }
        // What lies behind the row is 0, not the mean.
        if (lane + i * TEAM < vectors) sum += part;
    }
    float rstd = rstd_of(team_sum<TEAM>(sum, tile), p);
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        if (i * TEAM >= vectors) continue;
        u32 j = lane + i * TEAM;
        if (j < vectors) {
            float weight[VECTOR], bias[VECTOR];
            unpack_vector(weight, load_vector(w + j * VECTOR));
            if (!RMS) unpack_vector(bias, load_vector(b + j * VECTOR));
            if (ADDED) store_vector(h + at + j * VECTOR, pack_vector(kept[i]));
#pragma unroll
            for (u32 k = 0; k < VECTOR; k++) {
                if (RMS) kept[i][k] = kept[i][k] * rstd * weight[k];
                else kept[i][k] = (kept[i][k] - mean) * rstd * weight[k] + bias[k];
            }
            store_vector(y + at + j * VECTOR, pack_vector(kept[i]));
        }
    }
    if (lane == 0u) {
        if (!RMS) means[row] = mean;
        rstds[row] = rstd;
    }
}

extern "C" __global__ void __launch_bounds__(128) layernorm_fwd_warp_v3(const E* x, const E* w, const E* b, E* y, float* means, float* rstds, NormParams p) {
    norm_row<WARP, KEPT / VECTOR, false, false>(x, nullptr, w, b, y, nullptr, means, rstds, p, nullptr);
}

extern "C" __global__ void __launch_bounds__(256, 2) layernorm_fwd_block_v3(const E* x, const E* w, const E* b, E* y, float* means, float* rstds, NormParams p) {
    __shared__ float tile[WARP];
    norm_row<256u, KEPT / VECTOR, false, false>(x, nullptr, w, b, y, nullptr, means, rstds, p, tile);
}

extern "C" __global__ void __launch_bounds__(1024) layernorm_fwd_wide_v3(const E* x, const E* w, const E* b, E* y, float* means, float* rstds, NormParams p) {
    __shared__ float tile[WARP];
    norm_row<1024u, KEPT / VECTOR, false, false>(x, nullptr, w, b, y, nullptr, means, rstds, p, tile);
}

extern "C" __global__ void __launch_bounds__(128) rmsnorm_fwd_warp_v3(const E* x, const E* w, E* y, float* rstds, NormParams p) {
    norm_row<WARP, KEPT / VECTOR, false, true>(x, nullptr, w, nullptr, y, nullptr, nullptr, rstds, p, nullptr);
}

extern "C" __global__ void __launch_bounds__(256, 2) rmsnorm_fwd_block_v3(const E* x, const E* w, E* y, float* rstds, NormParams p) {
    __shared__ float tile[WARP];
    norm_row<256u, KEPT / VECTOR, false, true>(x, nullptr, w, nullptr, y, nullptr, nullptr, rstds, p, tile);
}

extern "C" __global__ void __launch_bounds__(1024) rmsnorm_fwd_wide_v3(const E* x, const E* w, E* y, float* rstds, NormParams p) {
    __shared__ float tile[WARP];
    norm_row<1024u, KEPT / VECTOR, false, true>(x, nullptr, w, nullptr, y, nullptr, nullptr, rstds, p, tile);
}

extern "C" __global__ void __launch_bounds__(128) add_layernorm_fwd_warp_v3(const E* x, const E* r, const E* w, const E* b, E* y, E* h, float* means, float* rstds, NormParams p) {
    norm_row<WARP, KEPT / VECTOR, true, false>(x, r, w, b, y, h, means, rstds, p, nullptr);
}

extern "C" __global__ void __launch_bounds__(256, 2) add_layernorm_fwd_block_v3(const E* x, const E* r, const E* w, const E* b, E* y, E* h, float* means, float* rstds, NormParams p) {
    __shared__ float tile[WARP];
    norm_row<256u, KEPT / VECTOR, true, false>(x, r, w, b, y, h, means, rstds, p, tile);
}

// Half the elements a thread: x and r are loaded side by side, and a thread has 64 registers.
extern "C" __global__ void __launch_bounds__(1024) add_layernorm_fwd_wide_v3(const E* x, const E* r, const E* w, const E* b, E* y, E* h, float* means, float* rstds, NormParams p) {
    __shared__ float tile[WARP];
    norm_row<1024u, KEPT / 2u / VECTOR, true, false>(x, r, w, b, y, h, means, rstds, p, tile);
}

extern "C" __global__ void __launch_bounds__(128) add_rmsnorm_fwd_warp_v3(const E* x, const E* r, const E* w, E* y, E* h, float* rstds, NormParams p) {
    norm_row<WARP, KEPT / VECTOR, true, true>(x, r, w, nullptr, y, h, nullptr, rstds, p, nullptr);
}

extern "C" __global__ void __launch_bounds__(256, 2) add_rmsnorm_fwd_block_v3(const E* x, const E* r, const E* w, E* y, E* h, float* rstds, NormParams p) {
    __shared__ float tile[WARP];
    norm_row<256u, KEPT / VECTOR, true, true>(x, r, w, nullptr, y, h, nullptr, rstds, p, tile);
}

extern "C" __global__ void __launch_bounds__(1024) add_rmsnorm_fwd_wide_v3(const E* x, const E* r, const E* w, E* y, E* h, float* rstds, NormParams p) {
    __shared__ float tile[WARP];
    norm_row<1024u, KEPT / 2u / VECTOR, true, true>(x, r, w, nullptr, y, h, nullptr, rstds, p, tile);
}

// n and g = dy w of one row in COUNT vectors of each thread. Without a residual only dx is written.
template <u32 TEAM, u32 COUNT, bool ADDED>
__device__ __forceinline__ void norm_bwd_row(const E* x, const E* w, const float* means, const float* rstds, const E* dy, const E* dh, E* dx, E* dr, const NormParams& p, float* tile) {
    u32 row = team_row<TEAM>(), lane = threadIdx.x % TEAM, vectors = p.d / VECTOR;
    if (row >= p.rows) return;
    u64 at = (u64)row * p.d;
    float mean = row_mean(means, row, p), rstd = rstds[row];
    float n[COUNT][VECTOR], g[COUNT][VECTOR], sum = 0.0f, along = 0.0f;
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        if (i * TEAM >= vectors) continue;
        u32 j = lane + i * TEAM;
        uint4 values = make_uint4(0u, 0u, 0u, 0u), slopes = values, weights = values;
        if (j < vectors) {
            values = load_vector(x + at + j * VECTOR);
            slopes = load_vector(dy + at + j * VECTOR);
            weights = load_vector(w + j * VECTOR);
        }
        float weight[VECTOR];
        unpack_vector(n[i], values);
        unpack_vector(g[i], slopes);
        unpack_vector(weight, weights);
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) {
            n[i][k] = (n[i][k] - mean) * rstd;
            g[i][k] *= weight[k];
        }
    }
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        if (i * TEAM >= vectors) continue;
        float part = 0.0f, part_along = 0.0f;
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) {
            part += g[i][k];
            part_along += g[i][k] * n[i][k];
        }
        sum += part;
        along += part_along;
    }
    float mean_g = p.rms != 0u ? 0.0f : team_sum<TEAM>(sum, tile) / (float)p.d;
    float mean_gn = team_sum<TEAM>(along, tile) / (float)p.d;
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        if (i * TEAM >= vectors) continue;
        u32 j = lane + i * TEAM;
        if (j < vectors) {
            float out[VECTOR], joined[VECTOR];
            uint4 more = make_uint4(0u, 0u, 0u, 0u);
            if (ADDED && p.joined != 0u) more = load_vector(dh + at + j * VECTOR);
            unpack_vector(joined, more);
#pragma unroll
            for (u32 k = 0; k < VECTOR; k++) {
                out[k] = rstd * (g[i][k] - mean_g - n[i][k] * mean_gn);
                if (ADDED) out[k] += joined[k];
            }
            store_vector(dx + at + j * VECTOR, pack_vector(out));
            if (ADDED) {
#pragma unroll
                for (u32 k = 0; k < VECTOR; k++) out[k] *= p.scale;
                store_vector(dr + at + j * VECTOR, pack_vector(out));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(128, 4) norm_bwd_warp_v3(const E* x, const E* w, const float* means, const float* rstds, const E* dy, E* dx, E*, E*, float2*, NormParams p) {
    norm_bwd_row<WARP, KEPT / VECTOR, false>(x, w, means, rstds, dy, nullptr, dx, nullptr, p, nullptr);
}

extern "C" __global__ void __launch_bounds__(256, 2) norm_bwd_block_v3(const E* x, const E* w, const float* means, const float* rstds, const E* dy, E* dx, E*, E*, float2*, NormParams p) {
    __shared__ float tile[WARP];
    norm_bwd_row<256u, KEPT / VECTOR, false>(x, w, means, rstds, dy, nullptr, dx, nullptr, p, tile);
}

// Half the elements a thread: of 64 registers two rows leave room for no more.
extern "C" __global__ void __launch_bounds__(1024) norm_bwd_wide_v3(const E* x, const E* w, const float* means, const float* rstds, const E* dy, E* dx, E*, E*, float2*, NormParams p) {
    __shared__ float tile[WARP];
    norm_bwd_row<1024u, KEPT / 2u / VECTOR, false>(x, w, means, rstds, dy, nullptr, dx, nullptr, p, tile);
}

extern "C" __global__ void __launch_bounds__(128, 4) add_norm_bwd_warp_v3(const E* h, const E* w, const float* means, const float* rstds, const E* dy, const E* dh, E* dx, E* dr, E*, E*, float2*, NormParams p) {
    norm_bwd_row<WARP, KEPT / VECTOR, true>(h, w, means, rstds, dy, dh, dx, dr, p, nullptr);
}

extern "C" __global__ void __launch_bounds__(256, 2) add_norm_bwd_block_v3(const E* h, const E* w, const float* means, const float* rstds, const E* dy, const E* dh, E* dx, E* dr, E*, E*, float2*, NormParams p) {
    __shared__ float tile[WARP];
    norm_bwd_row<256u, KEPT / VECTOR, true>(h, w, means, rstds, dy, dh, dx, dr, p, tile);
}

extern "C" __global__ void __launch_bounds__(1024) add_norm_bwd_wide_v3(const E* h, const E* w, const float* means, const float* rstds, const E* dy, const E* dh, E* dx, E* dr, E*, E*, float2*, NormParams p) {
    __shared__ float tile[WARP];
    norm_bwd_row<1024u, KEPT / 2u / VECTOR, true>(h, w, means, rstds, dy, dh, dx, dr, p, tile);
}

// (sum dy n, sum dy) of the columns of 32 vectors over one chunk: each of four warps takes a fourth of the rows.
__device__ __forceinline__ void column_vectors(const E* x, const float* means, const float* rstds, const E* dy, float2* partial, const NormParams& p, float (*tile)[2u * VECTOR][WARP]) {
    u32 vectors = p.d / VECTOR, across = div_up(vectors, WARP), block = linear_block();
    u32 chunk = block / across, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, j = block % across * WARP + lane;
    float sums[2u * VECTOR];
#pragma unroll
    for (u32 k = 0; k < 2u * VECTOR; k++) sums[k] = 0.0f;
    u32 first = chunk * CHUNK + warp * (CHUNK / 4u), last = min(first + CHUNK / 4u, p.rows);
    if (j < vectors) {
#pragma unroll 4
        for (u32 row = first; row < last; row++) {
            u64 at = (u64)row * p.d + j * VECTOR;
            float values[VECTOR], slopes[VECTOR], mean = row_mean(means, row, p), rstd = rstds[row];
            unpack_vector(values, load_vector(x + at));
            unpack_vector(slopes, load_vector(dy + at));
#pragma unroll
            for (u32 k = 0; k < VECTOR; k++) {
                sums[2u * k] += slopes[k] * (values[k] - mean) * rstd;
                sums[2u * k + 1u] += slopes[k];
            }
        }
    }
#pragma unroll
    for (u32 k = 0; k < 2u * VECTOR; k++) tile[warp][k][lane] = sums[k];
    __syncthreads();
    // A pair of sums per thread and turn, in the order of memory.
    for (u32 i = threadIdx.x; i < WARP * VECTOR; i += 128u) {
        u32 column = block % across * WARP * VECTOR + i, owner = i / VECTOR, k = i % VECTOR;
        float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
        for (u32 other = 0; other < 4u; other++) {
            total.x += tile[other][2u * k][owner];
            total.y += tile[other][2u * k + 1u][owner];
        }
        if (column < p.d) partial[(u64)chunk * p.d + column] = total;
    }
}

extern "C" __global__ void __launch_bounds__(128) norm_bwd_partial_v2(const E* x, const E*, const float* means, const float* rstds, const E* dy, E*, E*, E*, float2* partial, NormParams p) {
    __shared__ float tile[4][2u * VECTOR][WARP];
    column_vectors(x, means, rstds, dy, partial, p, tile);
}

extern "C" __global__ void __launch_bounds__(128) add_norm_bwd_partial_v2(const E* h, const E*, const float* means, const float* rstds, const E* dy, const E*, E*, E*, E*, E*, float2* partial, NormParams p) {
    __shared__ float tile[4][2u * VECTOR][WARP];
    column_vectors(h, means, rstds, dy, partial, p, tile);
}

// Sums of 32 columns' chunks: each of eight warps takes every eighth.
__device__ __forceinline__ void column_totals(E* dw, E* db, const float2* partial, const NormParams& p, float2 (*tile)[WARP]) {
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, i = linear_block() * WARP + lane;
    float2 sums = make_float2(0.0f, 0.0f);
    if (i < p.d) {
#pragma unroll 4
        for (u32 chunk = warp; chunk < p.chunks; chunk += 8u) {
            float2 part = partial[(u64)chunk * p.d + i];
            sums.x += part.x;
            sums.y += part.y;
        }
    }
    tile[warp][lane] = sums;
    __syncthreads();
    if (warp != 0u || i >= p.d) return;
    for (u32 other = 1u; other < 8u; other++) {
        sums.x += tile[other][lane].x;
        sums.y += tile[other][lane].y;
    }
    dw[i] = st(sums.x);
    db[i] = st(sums.y);
}

extern "C" __global__ void __launch_bounds__(256) norm_bwd_total_v2(const E*, const E*, const float*, const float*, const E*, E*, E* dw, E* db, const float2* partial, NormParams p) {
    __shared__ float2 tile[8][WARP];
    column_totals(dw, db, partial, p, tile);
}

extern "C" __global__ void __launch_bounds__(256) add_norm_bwd_total_v2(const E*, const E*, const float*, const float*, const E*, const E*, E*, E*, E* dw, E* db, const float2* partial, NormParams p) {
    __shared__ float2 tile[8][WARP];
    column_totals(dw, db, partial, p, tile);
}
