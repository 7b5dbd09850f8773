// op:       matmul
// math:     as matmul.cu: y = f(a b + bias) or y += a b (+ bias)
// grad:     by matmul itself
// shapes:   fwd: a[B, M, K], b[B, K, N], bias[N], y[B, M, N]; a or b may be one matrix for the whole batch
// layout:   a and b by tensor maps [batch, rows, contiguous axis], contiguous along k or not, rows at multiples of 16 bytes; y contiguous
// launch:   384 threads: a warp group that copies and two that multiply 64 rows each; a block per multiprocessor walks over tiles
//           of 128x256 (narrow: 128x128) outputs; pairs: clusters of two blocks take two tiles down a column, each copies one half of
//           b to both; shared: four stages of (128 + N) 128 bytes, then barriers
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

template <u32 COLUMNS>
struct MatmulFinish {
    const E* bias;
    E* y;
    const MatmulWgmmaParams& p;
    __device__ __forceinline__ void operator()(const float (&sums)[COLUMNS / 2u], const WgmmaTiles::Tile& t, u32 group) const {
        WgmmaStore store = {p.mode & 4u ? bias : nullptr, y + (u64)t.batch * p.rows * p.columns, p.rows, p.columns, p.mode & 3u, (p.mode & 8u) != 0u};
        store(sums, t.row * WGMMA_ROWS + group * 64u, t.column * COLUMNS);
    }
};

template <u32 COLUMNS, u32 CLUSTER, class Tiles, class Load>
__device__ __forceinline__ void matmul_wgmma(const E* bias, E* y, const TensorMap* a, const TensorMap* b, const MatmulWgmmaParams& p) {
    typedef WgmmaStages<4u, (WGMMA_ROWS + COLUMNS) * 128u, CLUSTER> Stages;
    DYNAMIC_SHARED(shared);
    Tiles tiles = {p.down, p.across, p.batch, div_up(p.k, 64u)};
    Load load = {a, b, (p.mode & 64u) != 0u, (p.mode & 128u) != 0u, (p.mode & 16u) != 0u, (p.mode & 32u) != 0u};
    wgmma_gemm<Stages>(shared, tiles, load, WgmmaOrders<COLUMNS, WGMMA_ROWS * 128u>{p.mode >> 6}, MatmulFinish<COLUMNS>{bias, y, p});
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
matmul_pairs_wgmma(const E*, const E*, const E* bias, E* y, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, MatmulWgmmaParams p) {
    matmul_wgmma<256u, 2u, WgmmaTilePairs, WgmmaMapPairs<WGMMA_ROWS, 256u>>(bias, y, &a, &b, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
matmul_fwd_wgmma(const E*, const E*, const E* bias, E* y, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, MatmulWgmmaParams p) {
    matmul_wgmma<256u, 1u, WgmmaTiles, WgmmaMaps<WGMMA_ROWS, 256u>>(bias, y, &a, &b, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
matmul_narrow_wgmma(const E*, const E*, const E* bias, E* y, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, MatmulWgmmaParams p) {
    matmul_wgmma<128u, 1u, WgmmaTiles, WgmmaMaps<WGMMA_ROWS, 128u>>(bias, y, &a, &b, p);
}

#endif
