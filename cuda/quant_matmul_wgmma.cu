// op:       matmul_int8, matmul_int8_requantized
// math:     as quant_matmul.cu: y[i, j] = (sum_k x[i, k] w[j, k]) xs[i] ws[j] + bias[j]; requantize: see requantize.cuh
// grad:     none
// shapes:   x[M, K] i8, xs[M], w[N, K] i8, ws[N], bias[N] (any array where there is none), y[M, N]
// layout:   x and w by tensor maps [rows, k], rows at multiples of 16 bytes; y contiguous
// launch:   384 threads: a warp group that copies and two that multiply 64 rows of x each; a block per multiprocessor walks over tiles
//           of 128 tokens by 256 (narrow: 128) weights; shared: four stages of (128 + N) 128 bytes, then barriers
// cost:     2 M N K operations
// numerics: int32 sums, exact for K below 2^17; then three f32 roundings
// source:   as gemm_wgmma.cuh; wgmma of bytes: PTX ISA 8.0
// rungs:    v3 (9.0 alone, K % 16 = 0), for quant_matmul.cu's mma and below: 128 of k a stage

#if ARCH == 90

struct Int8WgmmaParams {
    u32 m, n, k, bias;
    // Tiles of outputs.
    u32 down, across;
};

// 64 rows of x by COLUMNS rows of w, 128 bytes of k a stage, w from byte B on.
template <u32 COLUMNS, u32 B>
struct Int8Product {
    typedef int Sums[COLUMNS / 2u];
    __device__ __forceinline__ void issue(Sums& sums, const u8* stage, u32 group, u32 step) const {
        const u8* a = stage + group * WGMMA_BLOCK;
#pragma unroll
        for (u32 part = 0; part < 4u; part++)
            wgmma_s8<COLUMNS>(sums, wgmma_operand<false>(a, part * 32u), wgmma_operand<false>(stage + B, part * 32u), step | part);
    }
    template <class Stages, class Tile>
    __device__ __forceinline__ void sum(Stages& place, const Tile&, u32 steps, u32 group, Sums& sums) const {
        wgmma_sums(place, *this, steps, group, sums);
    }
};

// Scales and bias, a pair of columns at a time: four lanes fill 32 bytes of a row.
template <u32 COLUMNS>
struct Int8Finish {
    const float *xs, *ws, *bias;
    float* y;
    const Int8WgmmaParams& p;
    // Each step rounds by itself: a fused sum would differ from what other devices give.
    __device__ __forceinline__ static float value(int sum, float x, float w, float more, bool adds) {
        float v = (float)sum * x * w;
        return adds ? __fadd_rn(v, more) : v;
    }
    __device__ __forceinline__ void operator()(const int (&sums)[COLUMNS / 2u], const WgmmaTiles::Tile& t, u32 group) const {
        u32 row = t.row * WGMMA_ROWS + group * 64u + wgmma_row(), column = t.column * COLUMNS + wgmma_column();
        bool adds = p.bias == 1u, pairs = p.n % 2u == 0u;
        float x[2] = {row < p.m ? xs[row] : 0.0f, row + 8u < p.m ? xs[row + 8u] : 0.0f};
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 8u; j++) {
            u32 c = column + j * 8u;
            if (c >= p.n) continue;
            bool second = c + 1u < p.n;
            float w[2] = {ws[c], second ? ws[c + 1u] : 0.0f};
            float more[2] = {adds ? bias[c] : 0.0f, adds && second ? bias[c + 1u] : 0.0f};
#pragma unroll
            for (u32 half = 0; half < 2u; half++) {
                u32 at = row + half * 8u;
                if (at >= p.m) continue;
                float* to = y + (u64)at * p.n + c;
                float low = value(sums[j * 4u + half * 2u], x[half], w[0], more[0], adds);
                float high = value(sums[j * 4u + half * 2u + 1u], x[half], w[1], more[1], adds);
                if (pairs) {
                    *(float2*)to = make_float2(low, high);
                } else {
                    to[0] = low;
                    if (second) to[1] = high;
                }
            }
        }
    }
};

template <u32 COLUMNS>
__device__ __forceinline__ void matmul_int8_wgmma(const float* xs, const float* ws, const float* bias, float* y, const TensorMap* a, const TensorMap* b, const Int8WgmmaParams& p) {
    const u32 B = WGMMA_ROWS * 128u;
    typedef WgmmaStages<4u, B + COLUMNS * 128u> Stages;
    DYNAMIC_SHARED(shared);
    WgmmaTiles tiles = {p.down, p.across, 1u, div_up(p.k, 128u)};
    WgmmaMaps<WGMMA_ROWS, COLUMNS, 128u> load = {a, b, false, false, false, false};
    wgmma_gemm<Stages>(shared, tiles, load, Int8Product<COLUMNS, B>(), Int8Finish<COLUMNS>{xs, ws, bias, y, p});
}

extern "C" __global__ void __launch_bounds__(384, 1)
matmul_int8_fwd_wgmma(const i8*, const float* xs, const i8*, const float* ws, const float* bias, float* y,
                      const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, Int8WgmmaParams p) {
    matmul_int8_wgmma<256u>(xs, ws, bias, y, &a, &b, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
matmul_int8_narrow_wgmma(const i8*, const float* xs, const i8*, const float* ws, const float* bias, float* y,
                         const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, Int8WgmmaParams p) {
    matmul_int8_wgmma<128u>(xs, ws, bias, y, &a, &b, p);
}

extern "C" __global__ void __launch_bounds__(256) matmul_int8_requantize(const float* hidden, i8* q, float* scale, RequantizeParams p) {
    requantize_rows(hidden, q, scale, p);
}

#endif
