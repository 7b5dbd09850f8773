// op:       matmul
// math:     as matmul.cu: y = f(a b + bias) or y += a b (+ bias)
// grad:     by matmul itself
// shapes:   fwd: a[B, M, K], b[B, K, N], bias[N], y[B, M, N]; a or b may be one matrix for the whole batch
// layout:   a and b by tensor maps [batch, rows, contiguous axis], contiguous along k or not, rows at multiples of 16 bytes; y contiguous
// launch:   384 threads: a warp group that copies and two that multiply 64 rows each; a block per multiprocessor walks over tiles
//           of 128x256 (narrow: 128x128) outputs; shared: four stages of (128 + N) 128 bytes, then barriers
// cost:     2 B M N K flop
// numerics: f32 sums in the order of k, 16 at a time; NaN passes through
// source:   Hopper's wgmma and bulk copies: PTX ISA 8.0; producer and consumer warp groups, persistent blocks: CUTLASS, fast.cu
// rungs:    v3 (9.0 alone), for matmul.cu's mma and below: gemm_wgmma.cuh with 64 of k a stage

#if ARCH == 90

struct MatmulWgmmaParams {
    u32 rows, columns, k;
    // Bits 0-1 activation (0 none, 1 ReLU, 2 GELU), bit 2 bias, bit 3 add to y, bits 4 and 5: a, b have a batch, bits 6 and 7: a is
    // contiguous along m, b along n.
    u32 mode;
    // Tiles of outputs.
    u32 down, across, batch;
};

#define TILE_ROWS 128u

// Any order of the operands in one kernel, chosen per tile.
template <u32 COLUMNS>
struct MatmulProduct {
    typedef float Sums[COLUMNS / 2u];
    u32 orders;
    template <class Stages, class Tile>
    __device__ __forceinline__ void sum(Stages& place, const Tile& tile, u32 steps, u32 group, Sums& sums) const {
        const u32 B = TILE_ROWS * 128u;
        switch (orders) {
            case 0u: wgmma_sums(place, WgmmaProduct<COLUMNS, B, false, false>(), steps, group, sums); break;
            case 1u: wgmma_sums(place, WgmmaProduct<COLUMNS, B, true, false>(), steps, group, sums); break;
            case 2u: wgmma_sums(place, WgmmaProduct<COLUMNS, B, false, true>(), steps, group, sums); break;
            default: wgmma_sums(place, WgmmaProduct<COLUMNS, B, true, true>(), steps, group, sums); break;
        }
    }
};

// Bias, what is there and the activation in f32, four fragments (32 columns) at a time, on the way to memory.
template <u32 COLUMNS>
__device__ __forceinline__ void matmul_finish(const float (&sums)[COLUMNS / 2u], const E* bias, E* y, const MatmulWgmmaParams& p, u32 row, u32 column) {
    u32 lane = threadIdx.x % WARP;
    row += threadIdx.x % WARP_GROUP / WARP * 16u + lane / 4u;
    column += lane % 4u * 2u;
    bool aligned = p.columns % 8u == 0u;
#pragma unroll
    for (u32 j0 = 0; j0 < COLUMNS / 8u; j0 += 4u) {
        // Zeros stand for what is outside of y or absent; x + 0 is x, but for the sign of a zero.
        float shift[4][2] = {};
        if (p.mode & 4u) {
#pragma unroll
            for (u32 j = 0; j < 8u; j++) {
                u32 c = column + (j0 + j / 2u) * 8u + j % 2u;
                if (c < p.columns) shift[j / 2u][j % 2u] = ld(bias[c]);
            }
        }
#pragma unroll
        for (u32 half = 0; half < 2u; half++) {
            u32 at = row + half * 8u, pairs[4];
            bool inside = at < p.rows;
            E* line = y + (u64)(inside ? at : 0u) * p.columns;
#pragma unroll
            for (u32 j = 0; j < 4u; j++) {
                u32 c = column + (j0 + j) * 8u;
                float z[2] = {sums[(j0 + j) * 4u + half * 2u] + shift[j][0], sums[(j0 + j) * 4u + half * 2u + 1u] + shift[j][1]};
                if ((p.mode & 8u) && inside && c < p.columns) {
                    // Rows of whole eights: the pair is one word.
                    u32 old = aligned ? *(const u32*)(line + c) : pack_pair(line[c], c + 1u < p.columns ? line[c + 1u] : (E)0);
                    z[0] += ld((E)old);
                    z[1] += ld((E)(old >> 16));
                }
#pragma unroll
                for (u32 q = 0; q < 2u; q++) {
                    if ((p.mode & 3u) == 1u) z[q] = z[q] < 0.0f ? 0.0f : z[q];
                    else if ((p.mode & 3u) == 2u) z[q] = z[q] * gelu_gate(z[q]);
                }
                pairs[j] = round_pair(z[0], z[1]);
            }
            gemm_store_row<4u>(line, pairs, inside, column + j0 * 8u, p.columns, aligned);
        }
    }
}

template <u32 COLUMNS>
struct MatmulFinish {
    const E* bias;
    E* y;
    const MatmulWgmmaParams& p;
    __device__ __forceinline__ void operator()(const float (&sums)[COLUMNS / 2u], const WgmmaTiles::Tile& t, u32 group) const {
        matmul_finish<COLUMNS>(sums, bias, y + (u64)t.batch * p.rows * p.columns, p, t.row * TILE_ROWS + group * 64u, t.column * COLUMNS);
    }
};

template <u32 COLUMNS>
__device__ __forceinline__ void matmul_wgmma(const E* bias, E* y, const TensorMap* a, const TensorMap* b, const MatmulWgmmaParams& p) {
    typedef WgmmaStages<4u, (TILE_ROWS + COLUMNS) * 128u> Stages;
    DYNAMIC_SHARED(shared);
    WgmmaTiles tiles = {p.down, p.across, p.batch, div_up(p.k, 64u)};
    WgmmaMaps<TILE_ROWS, COLUMNS> load = {a, b, (p.mode & 64u) != 0u, (p.mode & 128u) != 0u, (p.mode & 16u) != 0u, (p.mode & 32u) != 0u};
    wgmma_gemm<Stages>(shared, tiles, load, MatmulProduct<COLUMNS>{p.mode >> 6}, MatmulFinish<COLUMNS>{bias, y, p});
}

extern "C" __global__ void __launch_bounds__(384, 1)
matmul_fwd_wgmma(const E*, const E*, const E* bias, E* y, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, MatmulWgmmaParams p) {
    matmul_wgmma<256u>(bias, y, &a, &b, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
matmul_narrow_wgmma(const E*, const E*, const E* bias, E* y, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, MatmulWgmmaParams p) {
    matmul_wgmma<128u>(bias, y, &a, &b, p);
}

#endif
