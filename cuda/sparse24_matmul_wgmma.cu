// op:       matmul_sparse24, matmul_sparse24_int8
// math:     as sparse24_matmul.cu: y = x W^T (+ bias) with two of four of W kept; int8: times xs[i] ws[j]
// grad:     as there
// shapes:   x[M, K], values[N, K/2], meta[N, ceil(K/32)], bias[N], y[M, N];
//           int8: x[M, K] i8, xs[M], values[N, K/2] i8, meta, ws[N], bias[N], y[M, N] f32
// layout:   x by a tensor map [rows, k]; meta: two bits per kept place, eight groups of four to a word
// launch:   384 threads: a warp group that copies x and two that multiply 64 weights each; a block per multiprocessor walks over
//           tiles of 128 weights by 256 (narrow: 128) tokens; shared: 6 (8) stages of N 128 bytes, then barriers
// cost:     M N K operations: half of dense
// numerics: f32 sums in the order of k, 32 at a time; int8: exact int32 sums, then three roundings
// source:   Mishra et al. 2021; wgmma with metadata: PTX ISA 8.2
// rungs:    v3 (9.0 alone), for sparse24_matmul.cu's mma and below: sparse warp-group instructions on the portable format; 16-bit
//           (K % 16 = 0): 64 of k a stage, int8 (K % 32 = 0): 128

#if ARCH == 90

struct SparseWgmmaParams {
    u32 m, n, k, bias;
    // Tiles of weights, of tokens.
    u32 down, across;
};

// Places 0 and 1 in every group: what stands where there are no weights, as places must ascend.
#define NO_PLACES 0x44444444u

struct SparseWeights {
    const u8* kept;
    const u32* meta;
    u32 n, k;
};

template <bool BYTES> struct SparseSum { typedef float Type; };
template <> struct SparseSum<true> { typedef int Type; };

// The weights of rows g and g + 8: 64 kept bytes of each a stage, for two instructions. Of a row's four chunks lane t of a quad reads
// chunk t, and gives every lane its word of it: chunk 2 i is the first half of the kept columns of instruction i, 2 i + 1 the second.
template <u32 TOKENS, bool BYTES>
struct SparseWork {
    typedef SparseWeights Weights;
    typedef typename SparseSum<BYTES>::Type Sums[TOKENS / 2u];
    // Places are two words of meta. 16-bit: of row g and of row g + 8, lanes t = 0, 1 those of the first 32 columns, t = 2, 3 those
    // of the others. Bytes: for both instructions what the instruction asks of this lane.
    struct Read { uint4 kept[2]; u32 places[2]; };
    struct Operands { u32 a[2][4], places[2]; };
    const u8* kept[2];
    const u32* meta[2];
    u32 pitch, words, k;

    __device__ __forceinline__ SparseWork(const SparseWeights& w, u32 row, Sums&) : pitch(BYTES ? w.k / 2u : w.k), words(div_up(w.k, 32u)), k(w.k) {
#pragma unroll
        for (u32 i = 0u; i < 2u; i++) {
            u32 of_kept = row + i * 8u, of_meta = BYTES ? row + threadIdx.x % 2u * 8u : of_kept;
            kept[i] = of_kept < w.n ? w.kept + (u64)of_kept * pitch : nullptr;
            meta[i] = of_meta < w.n ? w.meta + (u64)of_meta * words : nullptr;
        }
    }

    __device__ __forceinline__ void load(Read& read, u32 step) const {
        u32 t = threadIdx.x % 4u, byte = step * 64u + t * 16u;
#pragma unroll
        for (u32 i = 0u; i < 2u; i++) {
            read.kept[i] = kept[i] && byte < pitch ? load_vector(kept[i] + byte) : make_uint4(0u, 0u, 0u, 0u);
            u32 at = BYTES ? step * 4u + i * 2u + t / 2u : step * 2u + t / 2u;
            u32 word = meta[i] && at < words ? meta[i][at] : NO_PLACES;
            // k is a multiple of 16: the last word may be half full.
            read.places[i] = at * 32u + 16u == k ? (word & 0xffffu) | (NO_PLACES & 0xffff0000u) : word;
        }
    }

    __device__ __forceinline__ void make(Operands& operands, const Read& read) const {
#pragma unroll
        for (u32 i = 0u; i < 2u; i++) {
            u32 w[4] = {read.kept[i].x, read.kept[i].y, read.kept[i].z, read.kept[i].w};
            quad_transpose(w);
#pragma unroll
            for (u32 chunk = 0u; chunk < 4u; chunk++) operands.a[chunk / 2u][chunk % 2u * 2u + i] = w[chunk];
        }
        u32 first = read.places[0], second = read.places[1];
        if (BYTES) {
            operands.places[0] = first;
            operands.places[1] = second;
        } else {
            // The even lane gives the first 16 columns of both rows, the odd one the others; lanes 0, 1 serve the first instruction.
            operands.places[0] = threadIdx.x & 1u ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
        }
    }

    __device__ __forceinline__ void issue(Sums& sums, const Operands& o, const u8* stage, u32 step) const {
        u64 b[2] = {wgmma_operand<false>(stage, 0u), wgmma_operand<false>(stage, 64u)};
        if constexpr (BYTES) {
            wgmma_sparse_s8<TOKENS>(sums, o.a[0], b[0], o.places[0], step);
            wgmma_sparse_s8<TOKENS>(sums, o.a[1], b[1], o.places[1], 1u);
        } else {
            wgmma_sparse<TOKENS, 0u>(sums, o.a[0], b[0], o.places[0], step);
            wgmma_sparse<TOKENS, 1u>(sums, o.a[1], b[1], o.places[0], 1u);
        }
    }

    __device__ __forceinline__ void finish(Sums& sums) const { wgmma_hold(sums); }
};

// 128 bytes of every token a stage.
template <u32 TOKENS, bool BYTES, class Finish>
__device__ __forceinline__ void matmul_sparse24_wgmma(const void* kept, const u32* meta, const TensorMap* x, const SparseWgmmaParams& p, const Finish& finish) {
    typedef WgmmaStages<TOKENS == 256u ? 6u : 8u, TOKENS * 128u> Stages;
    const u32 DEPTH = BYTES ? 128u : 64u;
    DYNAMIC_SHARED(shared);
    WgmmaTiles tiles = {p.down, p.across, 1u, div_up(p.k, DEPTH)};
    weights::RegisterProduct<SparseWork<TOKENS, BYTES>> product = {{(const u8*)kept, meta, p.n, p.k}};
    wgmma_gemm<Stages>(shared, tiles, weights::TokenMap<TOKENS, DEPTH>{x}, product, finish);
}

extern "C" __global__ void __launch_bounds__(384, 1)
matmul_sparse24_fwd_wgmma(const E*, const E* values, const u32* meta, const E* bias, E* y, const __grid_constant__ TensorMap x, SparseWgmmaParams p) {
    TENSOR_ONLY(matmul_sparse24_wgmma<256u, false>(values, meta, &x, p, weights::FinishElements<256u>{{p.bias == 1u ? bias : nullptr, y, p.n}, p.m});)
}

extern "C" __global__ void __launch_bounds__(384, 1)
matmul_sparse24_narrow_wgmma(const E*, const E* values, const u32* meta, const E* bias, E* y, const __grid_constant__ TensorMap x, SparseWgmmaParams p) {
    TENSOR_ONLY(matmul_sparse24_wgmma<128u, false>(values, meta, &x, p, weights::FinishElements<128u>{{p.bias == 1u ? bias : nullptr, y, p.n}, p.m});)
}

extern "C" __global__ void __launch_bounds__(384, 1)
matmul_sparse24_int8_fwd_wgmma(const i8*, const float* xs, const i8* values, const u32* meta, const float* ws, const float* bias, float* y,
                               const __grid_constant__ TensorMap x, SparseWgmmaParams p) {
    matmul_sparse24_wgmma<256u, true>(values, meta, &x, p, weights::FinishScaled<256u>{{xs, ws, p.bias == 1u ? bias : nullptr, y, p.n}, p.m});
}

extern "C" __global__ void __launch_bounds__(384, 1)
matmul_sparse24_int8_narrow_wgmma(const i8*, const float* xs, const i8* values, const u32* meta, const float* ws, const float* bias, float* y,
                                  const __grid_constant__ TensorMap x, SparseWgmmaParams p) {
    matmul_sparse24_wgmma<128u, true>(values, meta, &x, p, weights::FinishScaled<128u>{{xs, ws, p.bias == 1u ? bias : nullptr, y, p.n}, p.m});
}

#endif
