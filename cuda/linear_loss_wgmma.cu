// op:       linear_cross_entropy, linear_kl, their backward, linear_predict
// math:     as linear_loss.cu: z = hidden weightᵀ in tiles that never leave the registers; a tile's share of each row's maximum and sums,
//           joined per row; backward: z again, dz in its place, dhidden += dz weight, dweight += dzᵀ hidden
// grad:     linear_cross_entropy_bwd, linear_kl_bwd
// shapes:   C tokens of a chunk, W words (forward: all V); entropy_tiles: hidden[C, D], weight[W, D], target[N], partial[C, W / 256] of 4 f32,
//           z_target[C]; entropy_join, predict_join: partial, z_target, target, two outputs [N]; kl_tiles, jsd_tiles: student and teacher hidden[C, ..],
//           weight[W, ..], lse_s[N], lse_t[N], partial[C, W / 128] of 4 f32 and of one; kl_join, jsd_join: partial, weight[N], loss[N], lse_s[N],
//           lse_t[N], expectation[N]; *_planes: the operands, rows of the forward pass, dloss[N], scale[2], planes[2, C, W in eights];
//           product: planes, b, scale, sums (f32), out (E)
// layout:   operands by tensor maps, widths multiples of 8; arguments are slots: a chunk of hidden and a tile of the head are bound from their start
// launch:   384 threads, gemm_wgmma.cuh, tiles of 128x256 by clusters of two blocks (divergences: 128x128 of each model, single blocks);
//           join: a warp a row, 8 a block; scale: one block
// cost:     2 N V D flops per product: 1 forward, 3 backward (teacher: 1 each)
// numerics: as mma of linear_loss.cu; rows' sums per tile of words, then over the tiles with maxima taken off; dhidden and dweight are
//           f32 until the last word or token is added
// source:   chunked cross-entropy: Wijmans et al. 2024 (CCE); Hinton et al. 2015
// rungs:    v3 (9.0 alone), for linear_loss.cu's mma and below: forward stores no logits, backward dz alone

#if ARCH == 90

#define IGNORE 0xffffffffu
#define LOWEST (-3.4e38f)

// Four lanes share a row of a tile.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// --- forward
// A tile's maximum, sum of exp, sum and index of the maximum per row, and the target's logit where the tile has it.
struct EntropyFinish {
    const u32* target;
    float4* partial;
    float* z_target;
    const LinearWgmmaParams& p;
    __device__ __forceinline__ void operator()(const float (&sums)[128], const WgmmaTiles::Tile& t, u32 group) const {
        u32 column = t.column * 256u + wgmma_column();
#pragma unroll
        for (u32 half = 0; half < 2u; half++) {
            u32 row = t.row * WGMMA_ROWS + group * 64u + wgmma_row() + half * 8u, wanted = row < p.rows ? target[p.row + row] : IGNORE;
            u32 best = 0xffffffffu;
            float most = LOWEST, exps = 0.0f, total = 0.0f;
#pragma unroll
            for (u32 j = 0; j < 64u; j++) {
                u32 c = column + j / 2u * 8u + j % 2u;
                float z = sums[j / 2u * 4u + half * 2u + j % 2u];
                if (c >= p.words) continue;
                if (c == wanted) z_target[row] = z;
                // Strictly larger: the lowest index wins ties.
                if (z > most) {
                    most = z;
                    best = c;
                }
            }
            float own = most;
            most = quad_max(own);
            if (own != most) best = 0xffffffffu;
            best = min(best, __shfl_xor_sync(ALL_LANES, best, 1));
            best = min(best, __shfl_xor_sync(ALL_LANES, best, 2));
#pragma unroll
            for (u32 j = 0; j < 64u; j++) {
                float z = sums[j / 2u * 4u + half * 2u + j % 2u];
                if (column + j / 2u * 8u + j % 2u >= p.words) continue;
                exps += expf(z - most);
                total += z;
            }
            exps = quad_sum(exps);
            total = quad_sum(total);
            if (threadIdx.x % 4u == 0u && row < p.rows) partial[(u64)row * p.across + t.column] = make_float4(most, exps, total, __uint_as_float(best));
        }
    }
};

__device__ __forceinline__ void entropy_tiles(const u32* target, float4* partial, float* z_target, const TensorMap* hidden, const TensorMap* weight,
                                              const LinearWgmmaParams& p) {
    DYNAMIC_SHARED(shared);
    WgmmaTilePairs tiles = {p.down, p.across, 1u, div_up(p.width, 64u)};
    WgmmaMapPairs<WGMMA_ROWS, 256u> load = {{hidden, weight, false, false, false, false}};
    wgmma_gemm<WgmmaStages<4u, LINEAR_A + 32768u, 2u>>(shared, tiles, load, WgmmaProduct<256u, LINEAR_A, false, false>(),
                                                    EntropyFinish{target, partial, z_target, p});
}

// A row's tiles joined by its warp: maximum, sum of exp, sum, index of the maximum.
struct EntropyRow { float most, exps, total; u32 best; };

__device__ __forceinline__ EntropyRow entropy_row(const float4* tiles, u32 count) {
    u32 lane = threadIdx.x % WARP;
    EntropyRow r = {LOWEST, 0.0f, 0.0f, 0xffffffffu};
    for (u32 i = lane; i < count; i += WARP) {
        float4 tile = tiles[i];
        if (tile.x > r.most) {
            r.most = tile.x;
            r.best = __float_as_uint(tile.w);
        }
    }
    float own = r.most;
    r.most = warp_max(own);
    if (own != r.most) r.best = 0xffffffffu;
    for (u32 by = 16u; by > 0u; by /= 2u) r.best = min(r.best, __shfl_xor_sync(ALL_LANES, r.best, by));
    // Without any larger logit the first word stands.
    if (r.best == 0xffffffffu) r.best = 0u;
    for (u32 i = lane; i < count; i += WARP) {
        float4 tile = tiles[i];
        r.exps += tile.y * expf(tile.x - r.most);
        r.total += tile.z;
    }
    r.exps = warp_sum(r.exps);
    r.total = warp_sum(r.total);
    return r;
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
entropy_tiles_wgmma(const E*, const E*, const u32* target, float4* partial, float* z_target, const __grid_constant__ TensorMap hidden,
                    const __grid_constant__ TensorMap weight, LinearWgmmaParams p) {
    entropy_tiles(target, partial, z_target, &hidden, &weight, p);
}

extern "C" __global__ void __launch_bounds__(256)
entropy_join_wgmma(const float4* partial, const float* z_target, const u32* target, float* loss, float* lse, LinearWgmmaParams p) {
    u32 i = team_row<WARP>(), row = p.row + i;
    if (i >= p.rows) return;
    EntropyRow r = entropy_row(partial + (u64)i * p.across, p.across);
    if (threadIdx.x % WARP != 0u) return;
    u32 t = target[row];
    float all = r.most + logf(r.exps), value = 0.0f;
    if (t != IGNORE) value = t >= p.vocabulary ? __uint_as_float(0x7fc00000u) : all - (1.0f - p.factor) * z_target[i] - p.factor * (r.total / (float)p.vocabulary);
    loss[row] = value;
    lse[row] = t == IGNORE ? 0.0f : all;
}

extern "C" __global__ void __launch_bounds__(256)
predict_join_wgmma(const float4* partial, const float* z_target, const u32* target, u32* prediction, float* log_probability, LinearWgmmaParams p) {
    u32 i = team_row<WARP>(), row = p.row + i;
    if (i >= p.rows) return;
    EntropyRow r = entropy_row(partial + (u64)i * p.across, p.across);
    if (threadIdx.x % WARP != 0u) return;
    prediction[row] = r.best;
    u32 t = target[row];
    float value = 0.0f;
    if (t != IGNORE) value = t >= p.vocabulary ? __uint_as_float(0x7fc00000u) : z_target[i] - r.most - logf(r.exps);
    log_probability[row] = value;
}

// A tile's maxima and sums of exp of both, and its sum of the difference, each relative to the tile's own maxima.
struct KlFinish {
    float4* partial;
    float* differences;
    const LinearWgmmaParams& p;
    __device__ __forceinline__ void operator()(const float (&sums)[2][64], const WgmmaTiles::Tile& t, u32 group) const {
        u32 column = t.column * 128u + wgmma_column();
#pragma unroll
        for (u32 half = 0; half < 2u; half++) {
            u32 row = t.row * WGMMA_ROWS + group * 64u + wgmma_row() + half * 8u;
            float most_s = LOWEST, most_t = LOWEST, exps_s = 0.0f, exps_t = 0.0f, difference = 0.0f;
#pragma unroll
            for (u32 j = 0; j < 32u; j++) {
                if (column + j / 2u * 8u + j % 2u >= p.words) continue;
                most_s = fmaxf(most_s, sums[0][j / 2u * 4u + half * 2u + j % 2u] * p.inverse);
                most_t = fmaxf(most_t, sums[1][j / 2u * 4u + half * 2u + j % 2u] * p.inverse);
            }
            most_s = quad_max(most_s);
            most_t = quad_max(most_t);
#pragma unroll
            for (u32 j = 0; j < 32u; j++) {
                if (column + j / 2u * 8u + j % 2u >= p.words) continue;
                float a = sums[0][j / 2u * 4u + half * 2u + j % 2u] * p.inverse, b = sums[1][j / 2u * 4u + half * 2u + j % 2u] * p.inverse;
                float exp_s = expf(a - most_s), exp_t = expf(b - most_t);
                exps_s += exp_s;
                exps_t += exp_t;
                difference += p.direction == 1u ? exp_s * (a - b) : exp_t * (b - a);
            }
            exps_s = quad_sum(exps_s);
            exps_t = quad_sum(exps_t);
            difference = quad_sum(difference);
            if (threadIdx.x % 4u != 0u || row >= p.rows) continue;
            u64 at = (u64)row * p.across + t.column;
            partial[at] = make_float4(most_s, most_t, exps_s, exps_t);
            differences[at] = difference;
        }
    }
};

// A tile's sums of p log(p/m) - p + m and of the other, with both log sum exps known.
struct JsdFinish {
    const float *lse_s, *lse_t;
    float2* partial;
    const LinearWgmmaParams& p;
    __device__ __forceinline__ void operator()(const float (&sums)[2][64], const WgmmaTiles::Tile& t, u32 group) const {
        u32 column = t.column * 128u + wgmma_column();
#pragma unroll 1
        for (u32 half = 0; half < 2u; half++) {
            u32 row = t.row * WGMMA_ROWS + group * 64u + wgmma_row() + half * 8u;
            float all_s = row < p.rows ? lse_s[p.row + row] : 0.0f, all_t = row < p.rows ? lse_t[p.row + row] : 0.0f, sum_p = 0.0f, sum_q = 0.0f;
#pragma unroll
            for (u32 j = 0; j < 32u; j++) {
                if (column + j / 2u * 8u + j % 2u >= p.words) continue;
                // Both halves by constant indices.
                u32 at = j / 2u * 4u + j % 2u;
                float zs = half ? sums[0][at + 2u] : sums[0][at], zt = half ? sums[1][at + 2u] : sums[1][at];
                float2 terms = jsd_terms(p.factor, zt * p.inverse - all_t, zs * p.inverse - all_s);
                sum_p += terms.x;
                sum_q += terms.y;
            }
            sum_p = quad_sum(sum_p);
            sum_q = quad_sum(sum_q);
            if (threadIdx.x % 4u == 0u && row < p.rows) partial[(u64)row * p.across + t.column] = make_float2(sum_p, sum_q);
        }
    }
};

extern "C" __global__ void __launch_bounds__(384, 1)
kl_tiles_wgmma(const E*, const E*, const E*, const E*, float4* partial, LINEAR_MAPS, LinearWgmmaParams p) {
    linear_pair_tiles({&hs, &ws, &ht, &wt}, KlFinish{partial, (float*)(partial + (u64)p.rows * p.across), p}, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
jsd_tiles_wgmma(const E*, const E*, const E*, const E*, const float* lse_s, const float* lse_t, float2* partial, LINEAR_MAPS, LinearWgmmaParams p) {
    linear_pair_tiles({&hs, &ws, &ht, &wt}, JsdFinish{lse_s, lse_t, partial, p}, p);
}

extern "C" __global__ void __launch_bounds__(256)
kl_join_wgmma(const float4* partial, const float* weight, float* loss, float* lse_s, float* lse_t, float* expectations, LinearWgmmaParams p) {
    u32 i = team_row<WARP>(), row = p.row + i, lane = threadIdx.x % WARP;
    if (i >= p.rows) return;
    const float* differences = (const float*)(partial + (u64)p.rows * p.across) + (u64)i * p.across;
    partial += (u64)i * p.across;
    float most_s = LOWEST, most_t = LOWEST, exps_s = 0.0f, exps_t = 0.0f, difference = 0.0f;
    for (u32 j = lane; j < p.across; j += WARP) {
        most_s = fmaxf(most_s, partial[j].x);
        most_t = fmaxf(most_t, partial[j].y);
    }
    most_s = warp_max(most_s);
    most_t = warp_max(most_t);
    for (u32 j = lane; j < p.across; j += WARP) {
        float4 tile = partial[j];
        float shrink_s = expf(tile.x - most_s), shrink_t = expf(tile.y - most_t);
        exps_s += tile.z * shrink_s;
        exps_t += tile.w * shrink_t;
        difference += differences[j] * (p.direction == 1u ? shrink_s : shrink_t);
    }
    exps_s = warp_sum(exps_s);
    exps_t = warp_sum(exps_t);
    difference = warp_sum(difference);
    if (lane != 0u) return;
    lse_s[row] = most_s + logf(exps_s);
    lse_t[row] = most_t + logf(exps_t);
    // The mixture's sums come in a second pass.
    if (p.direction == 2u) return;
    // The logarithm of the sums' quotient: a small divergence is a difference of large terms.
    float apart = (most_s - most_t) + logf(exps_s / exps_t);
    float value = p.direction == 1u ? difference / exps_s - apart : difference / exps_t + apart;
    expectations[row] = p.direction == 1u ? value : 0.0f;
    loss[row] = weight[row] * p.squared * value;
}

extern "C" __global__ void __launch_bounds__(256)
jsd_join_wgmma(const float2* partial, const float* weight, float* loss, float* expectations, LinearWgmmaParams p) {
    u32 i = team_row<WARP>(), row = p.row + i, lane = threadIdx.x % WARP;
    if (i >= p.rows) return;
    float sum_p = 0.0f, sum_q = 0.0f;
    for (u32 j = lane; j < p.across; j += WARP) {
        float2 tile = partial[(u64)i * p.across + j];
        sum_p += tile.x;
        sum_q += tile.y;
    }
    sum_p = warp_sum(sum_p);
    sum_q = warp_sum(sum_q);
    if (lane != 0u) return;
    float expectation = (1.0f - p.factor) * sum_q;
    expectations[row] = expectation;
    loss[row] = weight[row] * p.squared * (p.factor * sum_p + expectation);
}

#endif
