// op:       matmul
// math:     as matmul.cu: y = f(a b + bias) or y += a b (+ bias)
// grad:     by matmul itself
// shapes:   fwd: a[B, M, K], b[B, K, N], bias[N], y[B, M, N]; a or b may be one matrix for the whole batch
// layout:   a and b by tensor maps [batch, rows, contiguous axis], contiguous along k or not, rows at multiples of 16 bytes; y contiguous
// launch:   384 threads: a warp group that copies and two that multiply 64 rows each; a block per multiprocessor walks over tiles
//           of 128x256 (narrow: 128x128) outputs; shared: STAGES (128 + N) 128 bytes of tiles, then barriers
// cost:     2 B M N K flop
// numerics: f32 sums in the order of k, 16 at a time; NaN passes through
// source:   Hopper's wgmma and bulk copies: PTX ISA 8.0; producer and consumer warp groups, persistent blocks: CUTLASS, fast.cu
// rungs:    v3 (9.0 alone), for matmul.cu's mma and below: 64 of k a stage, four stages; one product is in flight while the next is issued

#if ARCH == 90

struct MatmulWgmmaParams {
    u32 rows, columns, k;
    // Bits 0-1 activation (0 none, 1 ReLU, 2 GELU), bit 2 bias, bit 3 add to y, bits 4 and 5: a, b have a batch, bits 6 and 7: a is
    // contiguous along m, b along n.
    u32 mode;
    // Tiles of outputs.
    u32 down, across, batch;
};

#define STAGES 4u
#define TILE_ROWS 128u
#define TILE_K 64u
// Threads 0 to 127 copy.
#define CONSUMERS 2u
// Rows of tiles that are worked off together, column by column: their operands stay in cache while they are shared.
#define GROUP 16u

struct WgmmaTile { u32 batch, row, column; };

__device__ __forceinline__ WgmmaTile wgmma_tile(const MatmulWgmmaParams& p, u32 id) {
    u32 each = p.down * p.across, rest = id % each, whole = GROUP * p.across;
    u32 first = rest / whole * GROUP, height = min(p.down - first, GROUP), within = rest % whole;
    return {id / each, first + within % height, within / height};
}

// The ring of stages that copies fill and products empty: which stage is next, and the parity of its round.
struct Ring {
    u32 stage, parity;
    __device__ __forceinline__ void next() {
        stage = stage + 1u == STAGES ? 0u : stage + 1u;
        parity ^= stage == 0u ? 1u : 0u;
    }
};

template <u32 COLUMNS>
struct WgmmaShared {
    static const u32 A = TILE_ROWS * TILE_K * 2u, B = COLUMNS * TILE_K * 2u, STAGE = A + B;
    u8* tiles;
    // Stage is full: one arrival and its bytes. Stage is empty: an arrival of every warp that multiplies.
    u64 *full, *empty;
    __device__ __forceinline__ WgmmaShared(u8* shared) : tiles(shared), full((u64*)(shared + STAGES * STAGE)), empty(full + STAGES) {}
};

// One operand's 64 of k: a box of EXTENT rows, or a box per 64 of m or n.
template <u32 EXTENT>
__device__ __forceinline__ void wgmma_copy(u8* tile, const TensorMap* map, u64* barrier, bool blocks, u32 first, u32 k0, u32 batch) {
    if (!blocks) {
        tma_load(tile, map, barrier, k0, first, batch);
    } else {
#pragma unroll
        for (u32 i = 0; i < EXTENT / 64u; i++) tma_load(tile + i * WGMMA_BLOCK, map, barrier, first + i * 64u, k0, batch);
    }
}

// One thread fills stages for all tiles of its block.
template <u32 COLUMNS>
__device__ __forceinline__ void wgmma_produce(const WgmmaShared<COLUMNS>& s, const TensorMap* a, const TensorMap* b, const MatmulWgmmaParams& p) {
    typedef WgmmaShared<COLUMNS> Shared;
    u32 tiles = p.batch * p.down * p.across, steps = div_up(p.k, TILE_K);
    tma_prefetch(a);
    tma_prefetch(b);
    Ring at = {0u, 0u};
    for (u32 id = blockIdx.x; id < tiles; id += gridDim.x) {
        WgmmaTile t = wgmma_tile(p, id);
        u32 batch_a = p.mode & 16u ? t.batch : 0u, batch_b = p.mode & 32u ? t.batch : 0u;
        for (u32 step = 0; step < steps; step++) {
            // In the first round every stage is empty: parity 1 of a new barrier passes.
            mbarrier_wait(s.empty + at.stage, at.parity ^ 1u);
            u8* tile = s.tiles + at.stage * Shared::STAGE;
            u64* full = s.full + at.stage;
            mbarrier_arrive_expect(full, Shared::STAGE);
            wgmma_copy<TILE_ROWS>(tile, a, full, p.mode & 64u, t.row * TILE_ROWS, step * TILE_K, batch_a);
            wgmma_copy<COLUMNS>(tile + Shared::A, b, full, p.mode & 128u, t.column * COLUMNS, step * TILE_K, batch_b);
            at.next();
        }
    }
}

// The sums of one tile for this warp group's 64 rows.
template <u32 COLUMNS, bool A_BLOCKS, bool B_BLOCKS>
__device__ __forceinline__ void wgmma_sums(const WgmmaShared<COLUMNS>& s, Ring& at, u32 group, u32 steps, float (&sums)[COLUMNS / 2u]) {
    typedef WgmmaShared<COLUMNS> Shared;
    u64* before = nullptr;
    bool signals = threadIdx.x % WARP == 0u;
    for (u32 step = 0; step < steps; step++) {
        mbarrier_wait(s.full + at.stage, at.parity);
        // 64 rows of a are 8,192 bytes in both orders.
        const u8* a = s.tiles + at.stage * Shared::STAGE + group * WGMMA_BLOCK;
        const u8* b = s.tiles + at.stage * Shared::STAGE + Shared::A;
        wgmma_fence();
#pragma unroll
        for (u32 part = 0; part < TILE_K / 16u; part++)
            wgmma<COLUMNS, A_BLOCKS, B_BLOCKS>(sums, wgmma_operand<A_BLOCKS>(a, wgmma_step<A_BLOCKS>(part)),
                                               wgmma_operand<B_BLOCKS>(b, wgmma_step<B_BLOCKS>(part)), step | part);
        wgmma_commit();
        // The products of the step before are done, so its stage may be filled again.
        wgmma_wait<1>();
        if (before && signals) mbarrier_arrive(before);
        before = s.empty + at.stage;
        at.next();
    }
    wgmma_wait<0>();
    wgmma_hold(sums);
    if (signals) mbarrier_arrive(before);
}

// Bias, what is there and the activation in f32, four fragments (32 columns) at a time, on the way to memory.
template <u32 COLUMNS>
__device__ __forceinline__ void wgmma_finish(const float (&sums)[COLUMNS / 2u], const E* bias, E* y, const MatmulWgmmaParams& p, u32 row, u32 column) {
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
__device__ __forceinline__ void wgmma_consume(const WgmmaShared<COLUMNS>& s, u32 group, const E* bias, E* y, const MatmulWgmmaParams& p) {
    u32 tiles = p.batch * p.down * p.across, steps = div_up(p.k, TILE_K);
    Ring at = {0u, 0u};
    for (u32 id = blockIdx.x; id < tiles; id += gridDim.x) {
        WgmmaTile t = wgmma_tile(p, id);
        float sums[COLUMNS / 2u];
        switch (p.mode >> 6) {
            case 0u: wgmma_sums<COLUMNS, false, false>(s, at, group, steps, sums); break;
            case 1u: wgmma_sums<COLUMNS, true, false>(s, at, group, steps, sums); break;
            case 2u: wgmma_sums<COLUMNS, false, true>(s, at, group, steps, sums); break;
            default: wgmma_sums<COLUMNS, true, true>(s, at, group, steps, sums); break;
        }
        wgmma_finish<COLUMNS>(sums, bias, y + (u64)t.batch * p.rows * p.columns, p, t.row * TILE_ROWS + group * 64u, t.column * COLUMNS);
    }
}

template <u32 COLUMNS>
__device__ __forceinline__ void matmul_wgmma(const E* bias, E* y, const TensorMap* a, const TensorMap* b, const MatmulWgmmaParams& p) {
    DYNAMIC_SHARED(shared);
    WgmmaShared<COLUMNS> s(shared);
    if (threadIdx.x == 0u) {
        for (u32 i = 0; i < STAGES; i++) {
            mbarrier_init(s.full + i, 1u);
            mbarrier_init(s.empty + i, CONSUMERS * WARP_GROUP / WARP);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    u32 group = threadIdx.x / WARP_GROUP;
    if (group == 0u) {
        registers_down<40u>();
        if (threadIdx.x == 0u) wgmma_produce<COLUMNS>(s, a, b, p);
    } else {
        registers_up<232u>();
        wgmma_consume<COLUMNS>(s, group - 1u, bias, y, p);
    }
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
