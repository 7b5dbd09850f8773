// op:       linear_cross_entropy_bwd, linear_kl_bwd
// math:     as linear_loss.cu: z = hidden weightᵀ again for a tile of tokens and words, dz from it in registers, dhidden += dz weight,
//           dweight += dzᵀ hidden
// grad:     none
// shapes:   C tokens of a chunk, W words of a tile; scale: dloss[N], weight[N], scale[2]; entropy_planes: hidden[C, D], weight[W, D], target[N],
//           lse[N], dloss[N], scale, planes[2, C, W in eights]; kl_planes: student and teacher hidden[C, ..], weight[W, ..], weight[N],
//           lse_s[N], lse_t[N], expectation[N], dloss[N], scale, planes; product: planes, b, scale, sums (f32), out (E)
// layout:   operands by tensor maps, widths multiples of 8; a chunk of hidden and a tile of the head are bound from their start
// launch:   384 threads, gemm_wgmma.cuh, tiles of 128x256 (entropy_planes: by clusters of two blocks; divergences: 128x128 of each model;
//           narrow products: 128x128); scale: one block
// cost:     2 N V D flops per product, three of them (teacher: 1 more), those from two planes twice
// numerics: as mma of linear_loss.cu: dz times a power of two as the sum of two 16-bit numbers, each multiplied for itself; f32
//           sums until the last tile of words (dhidden) or chunk of tokens (dweight) is added
// source:   chunked cross-entropy: Wijmans et al. 2024 (CCE); Hinton et al. 2015
// rungs:    v3 (9.0 alone), for linear_loss.cu's mma and below: of a tile dz alone is stored

#if ARCH == 90

#define IGNORE 0xffffffffu

// A power of two that takes the largest factor of all rows to 16 .. 32, and its inverse: dz is a probability's size times the
// factor, and f16 has no small numbers. Of a divergence (`weight`) the factor has a weight in it. One block.
extern "C" __global__ void __launch_bounds__(256) linear_scale_wgmma(const float* dloss, const float* weight, float* scale, LinearWgmmaParams p) {
    __shared__ float tile[32];
    float most = 0.0f;
    for (u32 row = threadIdx.x; row < p.rows; row += 256u) {
        float x = fabsf(dloss[row] * (weight != dloss ? weight[row] * p.squared * p.inverse : 1.0f));
        if (is_finite(x)) most = fmaxf(most, x);
    }
    most = block_max(most, tile);
    if (threadIdx.x != 0u) return;
    // Neither of the two may leave the normal numbers.
    u32 exponent = min(258u - (__float_as_uint(most) >> 23), 253u);
    scale[0] = __uint_as_float(exponent << 23);
    scale[1] = __uint_as_float((254u - exponent) << 23);
}

// Four fragments of a row of scaled dz as two planes, by all lanes of a warp together.
__device__ __forceinline__ void planes_store(E* planes, const float (&dz)[8], u32 row, u32 column, const LinearWgmmaParams& p) {
    u32 step = div_up(p.words, 8u) * 8u, high_pairs[4], low_pairs[4];
#pragma unroll
    for (u32 j = 0; j < 4u; j++) {
        float low[2];
#pragma unroll
        for (u32 q = 0; q < 2u; q++) {
            // What 16 bits cannot hold stays infinite.
            float high = ld(st(dz[2u * j + q]));
            low[q] = is_finite(high) ? dz[2u * j + q] - high : 0.0f;
        }
        high_pairs[j] = round_pair(dz[2u * j], dz[2u * j + 1u]);
        low_pairs[j] = round_pair(low[0], low[1]);
    }
    bool inside = row < p.rows;
    E* line = planes + (u64)(inside ? row : 0u) * step;
    gemm_store_row<4u>(line, high_pairs, inside, column, p.words, true);
    gemm_store_row<4u>(line + (u64)p.rows * step, low_pairs, inside, column, p.words, true);
}

struct EntropyPlanes {
    const u32* target;
    const float *lse, *dloss, *scale;
    E* planes;
    const LinearWgmmaParams& p;
    __device__ __forceinline__ void operator()(const float (&sums)[128], const WgmmaTiles::Tile& t, u32 group) const {
        u32 column = t.column * 256u + wgmma_column();
        u32 rows[2], wanted[2];
        bool live[2];
        float all[2], factor[2], even = p.factor / (float)p.vocabulary;
#pragma unroll
        for (u32 half = 0; half < 2u; half++) {
            rows[half] = t.row * WGMMA_ROWS + group * 64u + wgmma_row() + half * 8u;
            u32 at = p.row + min(rows[half], p.rows - 1u), word = target[at];
            wanted[half] = word - p.word;
            live[half] = word != IGNORE;
            all[half] = lse[at];
            factor[half] = dloss[at] * scale[0];
        }
#pragma unroll
        for (u32 first = 0; first < 32u; first += 4u) {
#pragma unroll
            for (u32 half = 0; half < 2u; half++) {
                float dz[8];
#pragma unroll
                for (u32 j = 0; j < 8u; j++) {
                    u32 c = column + (first + j / 2u) * 8u + j % 2u;
                    float slope = expf(sums[(first + j / 2u) * 4u + half * 2u + j % 2u] - all[half]) - even;
                    if (wanted[half] == c) slope -= 1.0f - p.factor;
                    dz[j] = live[half] && c < p.words ? factor[half] * slope : 0.0f;
                }
                planes_store(planes, dz, rows[half], column + first * 8u, p);
            }
        }
    }
};

struct KlPlanes {
    const float *weight, *lse_s, *lse_t, *expectation, *dloss, *scale;
    E* planes;
    const LinearWgmmaParams& p;
    __device__ __forceinline__ void operator()(const float (&sums)[2][64], const WgmmaTiles::Tile& t, u32 group) const {
        u32 column = t.column * 128u + wgmma_column();
#pragma unroll
        for (u32 half = 0; half < 2u; half++) {
            u32 row = t.row * WGMMA_ROWS + group * 64u + wgmma_row() + half * 8u, at = p.row + min(row, p.rows - 1u);
            float all_s = lse_s[at], all_t = lse_t[at], expected = expectation[at], factor = dloss[at] * weight[at] * (p.squared * p.inverse) * scale[0];
#pragma unroll
            for (u32 first = 0; first < 16u; first += 4u) {
                float dz[8];
#pragma unroll
                for (u32 j = 0; j < 8u; j++) {
                    u32 of = (first + j / 2u) * 4u + half * 2u + j % 2u;
                    bool inside = column + (first + j / 2u) * 8u + j % 2u < p.words;
                    dz[j] = inside ? factor * kl_slope(sums[0][of], sums[1][of], all_s, all_t, expected, p) : 0.0f;
                }
                planes_store(planes, dz, row, column + first * 8u, p);
            }
        }
    }
};

__device__ __forceinline__ void entropy_planes(const EntropyPlanes& finish, const TensorMap* hidden, const TensorMap* weight, const LinearWgmmaParams& p) {
    DYNAMIC_SHARED(shared);
    WgmmaTilePairs tiles = {p.down, p.across, 1u, div_up(p.width, 64u)};
    WgmmaMapPairs<WGMMA_ROWS, 256u> load = {{hidden, weight, false, false, false, false}};
    wgmma_gemm<WgmmaStages<4u, LINEAR_A + 32768u, 2u>>(shared, tiles, load, WgmmaProduct<256u, LINEAR_A, false, false>(), finish);
}

// Two planes of a (along k or not) and one of b, which is contiguous along n.
template <u32 COLUMNS>
struct PlanesLoad {
    static const u32 THREADS = WARP, ARRIVALS = 1u;
    const TensorMap *a, *b;
    bool a_blocks;
    __device__ __forceinline__ void begin() const {}
    __device__ __forceinline__ void start(const WgmmaTiles::Tile&) const {}
    __device__ __forceinline__ void end() const {}
    template <class Stages>
    __device__ __forceinline__ void stage(const Stages& place, const WgmmaTiles::Tile& t, u32 step) const {
        if (threadIdx.x != 0u) return;
        mbarrier_arrive_expect(place.full(), Stages::BYTES);
#pragma unroll
        for (u32 plane = 0; plane < 2u; plane++)
            wgmma_copy<WGMMA_ROWS>(place.tile() + plane * LINEAR_A, a, place.full(), a_blocks, t.row * WGMMA_ROWS, step * 64u, plane);
        wgmma_copy<COLUMNS>(place.tile() + 2u * LINEAR_A, b, place.full(), true, t.column * COLUMNS, step * 64u, 0u);
    }
};

template <u32 COLUMNS, bool A_BLOCKS>
struct PlanesStage {
    __device__ __forceinline__ void issue(float (&sums)[COLUMNS / 2u], const u8* stage, u32 group, u32 step) const {
#pragma unroll
        for (u32 plane = 0; plane < 2u; plane++) {
            const u8* a = stage + plane * LINEAR_A + group * WGMMA_BLOCK;
#pragma unroll
            for (u32 part = 0; part < 4u; part++)
                wgmma<COLUMNS, A_BLOCKS, true>(sums, wgmma_operand<A_BLOCKS>(a, wgmma_step<A_BLOCKS>(part)),
                                               wgmma_operand<true>(stage + 2u * LINEAR_A, wgmma_step<true>(part)), step | plane | part);
        }
    }
};

template <u32 COLUMNS>
struct PlanesProduct {
    typedef float Sums[COLUMNS / 2u];
    bool a_blocks;
    template <class Stages, class Tile>
    __device__ __forceinline__ void sum(Stages& place, const Tile&, u32 steps, u32 group, Sums& sums) const {
        if (a_blocks) wgmma_sums(place, PlanesStage<COLUMNS, true>(), steps, group, sums);
        else wgmma_sums(place, PlanesStage<COLUMNS, false>(), steps, group, sums);
    }
};

// Times the inverse scale, to f32 or added to what is there; the last sums go to `out` instead. Rows have an even length.
template <u32 COLUMNS>
struct PlanesFinish {
    const float* scale;
    float* sums_out;
    E* out;
    const LinearWgmmaParams& p;
    __device__ __forceinline__ void operator()(const float (&sums)[COLUMNS / 2u], const WgmmaTiles::Tile& t, u32 group) const {
        u32 column = t.column * COLUMNS + wgmma_column();
        float inverse = scale[1];
        bool add = (p.teacher & 1u) != 0u, last = (p.teacher & 2u) != 0u;
#pragma unroll
        for (u32 half = 0; half < 2u; half++) {
            u32 row = t.row * WGMMA_ROWS + group * 64u + wgmma_row() + half * 8u;
            bool inside = row < p.rows;
            u64 line = (u64)(p.row + (inside ? row : 0u)) * p.words;
#pragma unroll
            for (u32 first = 0; first < COLUMNS / 8u; first += 4u) {
                u32 pairs[4];
#pragma unroll
                for (u32 j = 0; j < 4u; j++) {
                    u32 c = column + (first + j) * 8u, of = (first + j) * 4u + half * 2u;
                    float2 y = make_float2(sums[of] * inverse, sums[of + 1u] * inverse);
                    bool stored = inside && c < p.words;
                    float2* to = (float2*)(sums_out + line + (stored ? c : 0u));
                    if (add && stored) y = make_float2(to->x + y.x, to->y + y.y);
                    if (!last && stored) *to = y;
                    pairs[j] = round_pair(y.x, y.y);
                }
                if (last) gemm_store_row<4u>(out + line, pairs, inside, column + first * 8u, p.words, true);
            }
        }
    }
};

template <u32 COLUMNS, u32 STAGES>
__device__ __forceinline__ void planes_product(const float* scale, float* sums, E* out, const TensorMap* a, const TensorMap* b, const LinearWgmmaParams& p) {
    DYNAMIC_SHARED(shared);
    bool a_blocks = p.direction != 0u;
    WgmmaTiles tiles = {p.down, p.across, 1u, div_up(p.width, 64u)};
    wgmma_gemm<WgmmaStages<STAGES, 2u * LINEAR_A + COLUMNS * 128u>>(shared, tiles, PlanesLoad<COLUMNS>{a, b, a_blocks}, PlanesProduct<COLUMNS>{a_blocks},
                                                                     PlanesFinish<COLUMNS>{scale, sums, out, p});
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
entropy_planes_wgmma(const E*, const E*, const u32* target, const float* lse, const float* dloss, const float* scale, E* planes,
                     const __grid_constant__ TensorMap hidden, const __grid_constant__ TensorMap weight, LinearWgmmaParams p) {
    entropy_planes({target, lse, dloss, scale, planes, p}, &hidden, &weight, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
kl_planes_wgmma(const E*, const E*, const E*, const E*, const float* weight, const float* lse_s, const float* lse_t, const float* expectation,
                const float* dloss, const float* scale, E* planes, LINEAR_MAPS, LinearWgmmaParams p) {
    linear_pair_tiles({&hs, &ws, &ht, &wt}, KlPlanes{weight, lse_s, lse_t, expectation, dloss, scale, planes, p}, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
planes_product_wgmma(const E*, const E*, const float* scale, float* sums, E* out, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                     LinearWgmmaParams p) {
    planes_product<256u, 3u>(scale, sums, out, &a, &b, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
planes_narrow_wgmma(const E*, const E*, const float* scale, float* sums, E* out, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                    LinearWgmmaParams p) {
    planes_product<128u, 4u>(scale, sums, out, &a, &b, p);
}

#endif
