// op:       ffn_relu, ffn_gelu, ffn_geglu, their backward
// math:     as ffn.cu: z = x w1ᵀ + b1, h = act(z), y = h w2ᵀ + b2; dz = (dy w2) act'(z), dx = dz w1, dw1 = dzᵀ x, dw2 = dyᵀ h
// grad:     ffn_bwd
// shapes:   up: x[R, D], w1[F', D], b1[F'], z[R, F'], h[R, F]; slope: dy[R, D2], w2[D2, F], z[R, F'], h[R, F], dz[R, F'], partial[R / 64, F'];
//           product: a, b, bias[C], out[R, C] (y, dx, dw1, dw2); partial: dy[R, D2], partial[R / 64, D2]; sum: partial[T, C], db[C]
// layout:   operands by tensor maps, rows at multiples of 16 bytes; outputs contiguous, F, D and D2 multiples of 8
// launch:   384 threads, gemm_wgmma.cuh: tiles of 128x256 outputs (up of GEGLU: 128 gates and their values) by clusters of two blocks;
//           up turns, for few k: 64x256 by each group in turns, one's epilogue under the other's products; product narrow: 128x128, single blocks;
//           partial and sum: 128 threads, a column each, tiles of 64 rows in y
// cost:     forward 2 R D (F' + F) flop, backward twice that
// numerics: as mma of ffn.cu: h and dz rounded once, to what the next product multiplies, h from the unrounded z; db1 and db2 by tiles of
//           64 rows, then over the tiles, from unrounded dz
// source:   GEGLU: Shazeer 2020; the loop: gemm_wgmma.cuh
// rungs:    v3 (9.0 alone), for ffn.cu's mma and below: activation, its slope and db1 in the epilogues on warp groups

#if ARCH == 90

struct FfnWgmmaParams {
    // Up, slope: rows, F, the summed axis. Products: outputs and the summed axis.
    u32 rows, columns, k;
    // Up, slope: 0 ReLU, 1 GELU, 2 GEGLU. Products: bits 0 and 1 orders of the operands, bit 2 bias.
    u32 mode;
    // Tiles of outputs.
    u32 down, across;
    __device__ __forceinline__ u32 hidden() const { return mode == 2u ? 2u * columns : columns; }
};

#define FFN_B (WGMMA_ROWS * 128u)

// Pairs of blocks share the right operand of wide tiles.
typedef WgmmaStages<4u, (WGMMA_ROWS + 256u) * 128u, 2u> FfnStages;
__device__ __forceinline__ WgmmaTilePairs ffn_pairs(const FfnWgmmaParams& p) { return {p.down, p.across, 1u, div_up(p.k, 64u)}; }

// x, and two boxes of 128 rows of w1: neighbours, or gates and the values that belong to them. Each block of a pair copies one, to both.
template <u32 ROWS>
struct FfnUpLoad {
    static const u32 THREADS = WARP, ARRIVALS = 1u;
    const TensorMap *x, *w1;
    // Rows of w1 from tile to tile and from the first box to the second.
    u32 step, second;
    __device__ __forceinline__ void begin() const {
        if (threadIdx.x != 0u) return;
        tma_prefetch(x);
        tma_prefetch(w1);
    }
    __device__ __forceinline__ void start(const WgmmaTiles::Tile&) const {}
    __device__ __forceinline__ void end() const {}
    template <class Stages>
    __device__ __forceinline__ void stage(const Stages& place, const WgmmaTiles::Tile& t, u32 step_k) const {
        if (threadIdx.x != 0u) return;
        u32 k0 = step_k * 64u, rank = cluster_rank();
        mbarrier_arrive_expect(place.full(), Stages::BYTES);
        tma_load(place.tile(), x, place.full(), k0, t.row * ROWS, 0u);
        tma_load_cluster(place.tile() + ROWS * 128u + rank * 2u * WGMMA_BLOCK, w1, place.full(), k0, t.column * step + rank * second, 0u, 3u);
    }
};

__device__ __forceinline__ void ffn_bias(float (&shift)[2], const E* bias, u32 column, u32 columns) {
#pragma unroll
    for (u32 q = 0; q < 2u; q++) shift[q] = column + q < columns ? ld(bias[column + q]) : 0.0f;
}

// z = sums + b1 to memory, h = act(z) from the unrounded z to scratch.
template <u32 ROWS>
struct FfnUpFinish {
    const E* bias;
    E* z_out;
    E* h_out;
    const FfnWgmmaParams& p;

    __device__ __forceinline__ void operator()(const float (&sums)[128], const WgmmaTiles::Tile& t, u32 group) const {
        u32 row = t.row * ROWS + group * 64u + wgmma_row();
        if (p.mode == 2u) gated(sums, row, t.column * 128u + wgmma_column());
        else plain(sums, row, t.column * 256u + wgmma_column());
    }

    __device__ __forceinline__ void plain(const float (&sums)[128], u32 row, u32 column) const {
#pragma unroll
        for (u32 first = 0; first < 32u; first += 4u) {
            float shift[4][2];
            u32 at = column + first * 8u;
#pragma unroll
            for (u32 j = 0; j < 4u; j++) ffn_bias(shift[j], bias, at + j * 8u, p.columns);
#pragma unroll
            for (u32 half = 0; half < 2u; half++) {
                u32 r = row + half * 8u, z_pairs[4], h_pairs[4];
#pragma unroll
                for (u32 j = 0; j < 4u; j++) {
                    float z[2], h[2];
#pragma unroll
                    for (u32 q = 0; q < 2u; q++) {
                        z[q] = sums[(first + j) * 4u + half * 2u + q] + shift[j][q];
                        // A NaN is not below 0 and stays.
                        h[q] = p.mode == 0u ? (z[q] < 0.0f ? 0.0f : z[q]) : z[q] * gelu_gate<true>(z[q]);
                    }
                    z_pairs[j] = round_pair(z[0], z[1]);
                    h_pairs[j] = round_pair(h[0], h[1]);
                }
                bool inside = r < p.rows;
                u64 line = (u64)(inside ? r : 0u) * p.columns;
                gemm_store_row<4u>(z_out + line, z_pairs, inside, at, p.columns, true);
                gemm_store_row<4u>(h_out + line, h_pairs, inside, at, p.columns, true);
            }
        }
    }

    // The values' sums lie 128 columns behind the gates'.
    __device__ __forceinline__ void gated(const float (&sums)[128], u32 row, u32 column) const {
#pragma unroll
        for (u32 first = 0; first < 16u; first += 4u) {
            float gate_shift[4][2], value_shift[4][2];
            u32 at = column + first * 8u;
#pragma unroll
            for (u32 j = 0; j < 4u; j++) {
                ffn_bias(gate_shift[j], bias, at + j * 8u, p.columns);
                ffn_bias(value_shift[j], bias + p.columns, at + j * 8u, p.columns);
            }
#pragma unroll
            for (u32 half = 0; half < 2u; half++) {
                u32 r = row + half * 8u, gates[4], values[4], h_pairs[4];
#pragma unroll
                for (u32 j = 0; j < 4u; j++) {
                    float gate[2], value[2], h[2];
#pragma unroll
                    for (u32 q = 0; q < 2u; q++) {
                        gate[q] = sums[(first + j) * 4u + half * 2u + q] + gate_shift[j][q];
                        value[q] = sums[(first + j + 16u) * 4u + half * 2u + q] + value_shift[j][q];
                        h[q] = gate[q] * gelu_gate<true>(gate[q]) * value[q];
                    }
                    gates[j] = round_pair(gate[0], gate[1]);
                    values[j] = round_pair(value[0], value[1]);
                    h_pairs[j] = round_pair(h[0], h[1]);
                }
                bool inside = r < p.rows;
                u64 line = (u64)(inside ? r : 0u) * p.columns;
                gemm_store_row<4u>(z_out + 2u * line, gates, inside, at, p.columns, true);
                gemm_store_row<4u>(z_out + 2u * line + p.columns, values, inside, at, p.columns, true);
                gemm_store_row<4u>(h_out + line, h_pairs, inside, at, p.columns, true);
            }
        }
    }
};

// The sums are dh. h again from the stored z, and dz, to scratch; column sums of dz over the group's 64 rows to partial.
struct FfnSlopeFinish {
    const E* z_in;
    E* h_out;
    E* dz_out;
    float* partial;
    // Of each group: the columns' sums of its four warps, of dz or of the gates' and then of the values'.
    float* own;
    const FfnWgmmaParams& p;

    __device__ __forceinline__ void operator()(const float (&sums)[128], const WgmmaTiles::Tile& t, u32 group) const {
        if (p.mode == 2u) part<true>(sums, t, group);
        else part<false>(sums, t, group);
    }

    template <bool GATED>
    __device__ __forceinline__ void part(const float (&sums)[128], const WgmmaTiles::Tile& t, u32 group) const {
        const u32 PARTS = GATED ? 2u : 1u;
        float (*columns)[4][256] = (float (*)[4][256])(own + group * 2048u);
        u32 lane = threadIdx.x % WARP, warp = threadIdx.x % WARP_GROUP / WARP, tile_row = t.row * CONSUMERS + group;
        u32 row = tile_row * 64u + wgmma_row(), column = t.column * 256u + wgmma_column();
        // The group's tile before has been read.
        named_barrier(1u + group, WARP_GROUP);
#pragma unroll
        for (u32 first = 0; first < 32u; first += 4u) {
            float total[PARTS][4][2] = {};
            u32 at = column + first * 8u;
#pragma unroll
            for (u32 half = 0; half < 2u; half++) {
                u32 r = row + half * 8u, h_pairs[4], dz_pairs[PARTS][4];
                bool inside = r < p.rows;
                u64 line = (u64)(inside ? r : 0u) * p.columns;
#pragma unroll
                for (u32 j = 0; j < 4u; j++) {
                    float z[2], value[2], h[2], dz[PARTS][2];
                    wgmma_pair(z, z_in + PARTS * line, at + j * 8u, p.columns, true);
                    if (GATED) wgmma_pair(value, z_in + PARTS * line + p.columns, at + j * 8u, p.columns, true);
#pragma unroll
                    for (u32 q = 0; q < 2u; q++) {
                        // Nothing outside counts, whatever the weights hold.
                        float dh = inside ? sums[(first + j) * 4u + half * 2u + q] : 0.0f;
                        if (p.mode == 0u) {
                            h[q] = z[q] < 0.0f ? 0.0f : z[q];
                            dz[0][q] = z[q] > 0.0f ? dh : 0.0f;
                        } else {
                            h[q] = z[q] * gelu_gate(z[q]);
                            dz[0][q] = dh * gelu_slope(z[q]);
                            if (GATED) {
                                dz[0][q] *= value[q];
                                dz[PARTS - 1u][q] = dh * h[q];
                                h[q] *= value[q];
                            }
                        }
                    }
                    h_pairs[j] = round_pair(h[0], h[1]);
#pragma unroll
                    for (u32 i = 0; i < PARTS; i++) {
                        total[i][j][0] += dz[i][0];
                        total[i][j][1] += dz[i][1];
                        dz_pairs[i][j] = round_pair(dz[i][0], dz[i][1]);
                    }
                }
                gemm_store_row<4u>(h_out + line, h_pairs, inside, at, p.columns, true);
#pragma unroll
                for (u32 i = 0; i < PARTS; i++) gemm_store_row<4u>(dz_out + PARTS * line + i * p.columns, dz_pairs[i], inside, at, p.columns, true);
            }
#pragma unroll
            for (u32 i = 0; i < PARTS; i++) {
#pragma unroll
                for (u32 j = 0; j < 8u; j++) {
                    float sum = total[i][j / 2u][j % 2u];
#pragma unroll
                    for (u32 offset = 4u; offset < 32u; offset *= 2u) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
                    if (lane < 4u) columns[i][warp][(first + j / 2u) * 8u + lane * 2u + j % 2u] = sum;
                }
            }
        }
        named_barrier(1u + group, WARP_GROUP);
        if (tile_row * 64u >= p.rows) return;
#pragma unroll
        for (u32 i = 0; i < 2u * PARTS; i++) {
            u32 within = threadIdx.x % WARP_GROUP + i % 2u * 128u, c = t.column * 256u + within;
            if (c >= p.columns) continue;
            const float (*sums_of)[256] = columns[i / 2u];
            float sum = sums_of[0][within];
#pragma unroll
            for (u32 k = 1; k < 4u; k++) sum += sums_of[k][within];
            partial[(u64)tile_row * p.hidden() + i / 2u * p.columns + c] = sum;
        }
    }
};

template <u32 COLUMNS>
struct FfnFinish {
    WgmmaStore store;
    __device__ __forceinline__ void operator()(const float (&sums)[COLUMNS / 2u], const WgmmaTiles::Tile& t, u32 group) const {
        store(sums, t.row * WGMMA_ROWS + group * 64u, t.column * COLUMNS);
    }
};

template <class Stages, u32 COLUMNS, class Tiles, class Load>
__device__ __forceinline__ void ffn_product(const E* bias, E* out, const TensorMap* a, const TensorMap* b, const FfnWgmmaParams& p) {
    DYNAMIC_SHARED(shared);
    Tiles tiles = {p.down, p.across, 1u, div_up(p.k, 64u)};
    Load load = {a, b, (p.mode & 1u) != 0u, (p.mode & 2u) != 0u, false, false};
    FfnFinish<COLUMNS> finish = {{p.mode & 4u ? bias : nullptr, out, p.rows, p.columns, 0u, false}};
    wgmma_gemm<Stages>(shared, tiles, load, WgmmaOrders<COLUMNS, FFN_B>{p.mode & 3u}, finish);
}

template <class Stages, u32 ROWS>
__device__ __forceinline__ void ffn_up(const E* b1, E* z, E* h, const TensorMap* x, const TensorMap* w1, const FfnWgmmaParams& p) {
    DYNAMIC_SHARED(shared);
    bool gated = p.mode == 2u;
    FfnUpLoad<ROWS> load = {x, w1, gated ? 128u : 256u, gated ? p.columns : 128u};
    wgmma_gemm<Stages>(shared, ffn_pairs(p), load, WgmmaProduct<256u, ROWS * 128u, false, false>(), FfnUpFinish<ROWS>{b1, z, h, p});
}

__device__ __forceinline__ void ffn_slope(const E* z, E* h, E* dz, float* partial, const TensorMap* dy, const TensorMap* w2, const FfnWgmmaParams& p) {
    DYNAMIC_SHARED(shared);
    WgmmaMapPairs<WGMMA_ROWS, 256u> load = {{dy, w2, false, true, false, false}};
    FfnSlopeFinish finish = {z, h, dz, partial, (float*)(shared + FfnStages::OWN), p};
    wgmma_gemm<FfnStages>(shared, ffn_pairs(p), load, WgmmaProduct<256u, FFN_B, false, true>(), finish);
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
ffn_up_wgmma(const E*, const E*, const E* b1, E* z, E* h, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w1, FfnWgmmaParams p) {
    ffn_up<FfnStages, WGMMA_ROWS>(b1, z, h, &x, &w1, p);
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
ffn_up_turns_wgmma(const E*, const E*, const E* b1, E* z, E* h, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w1, FfnWgmmaParams p) {
    ffn_up<WgmmaStages<5u, (64u + 256u) * 128u, 2u, true>, 64u>(b1, z, h, &x, &w1, p);
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
ffn_slope_wgmma(const E*, const E*, const E* z, E* h, E* dz, float* partial, const __grid_constant__ TensorMap dy, const __grid_constant__ TensorMap w2,
                FfnWgmmaParams p) {
    ffn_slope(z, h, dz, partial, &dy, &w2, p);
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
ffn_product_wgmma(const E*, const E*, const E* bias, E* out, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, FfnWgmmaParams p) {
    ffn_product<FfnStages, 256u, WgmmaTilePairs, WgmmaMapPairs<WGMMA_ROWS, 256u>>(bias, out, &a, &b, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
ffn_narrow_wgmma(const E*, const E*, const E* bias, E* out, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, FfnWgmmaParams p) {
    ffn_product<WgmmaStages<4u, (WGMMA_ROWS + 128u) * 128u>, 128u, WgmmaTiles, WgmmaMaps<WGMMA_ROWS, 128u>>(bias, out, &a, &b, p);
}

// Column sums of 64 rows of dy to partial[tile of rows, columns].
extern "C" __global__ void __launch_bounds__(128) ffn_partial_wgmma(const E* dy, float* partial, FfnWgmmaParams p) {
    u32 column = blockIdx.x * 128u + threadIdx.x, first = blockIdx.y * 64u;
    if (column >= p.columns) return;
    float sum = 0.0f;
#pragma unroll 8
    for (u32 row = first; row < min(first + 64u, p.rows); row++) sum += ld(dy[(u64)row * p.columns + column]);
    partial[(u64)blockIdx.y * p.columns + column] = sum;
}

// Sums over the tiles, first to last.
extern "C" __global__ void __launch_bounds__(128) ffn_sum_wgmma(const float* partial, E* db, FfnWgmmaParams p) {
    u32 column = blockIdx.x * 128u + threadIdx.x;
    if (column >= p.columns) return;
    float sum = 0.0f;
#pragma unroll 8
    for (u32 row = 0; row < p.rows; row++) sum += partial[(u64)row * p.columns + column];
    db[column] = st(sum);
}

#endif
