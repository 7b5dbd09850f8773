// op:       matmul_int4
// math:     as quant_int4.cu: y[i, j] = sum_k x[i, k] (nibble[j, k] - 8) scale[j, k / group] (+ bias[j])
// grad:     as there
// shapes:   x[M, K], words[N, K/8] (packed), scales[N, K/group], bias[N], y[M, N]
// layout:   x by a tensor map [rows, k]; eight weights to a word, the lowest column in the lowest four bits
// launch:   384 threads: a warp group that copies x and two that multiply 64 weights each; a block per multiprocessor walks over
//           tiles of 128 weights by 128 tokens; shared: 8 stages of 128 128 bytes, then barriers
// cost:     2 M N K operations; N K / 2 bytes of weights
// numerics: f32: sums within 64 of k (32, where 64 do not divide groups) by tensor instructions on exact levels, times their scale,
//           in rising order of k
// source:   Frantar et al. 2023 (group scales); weights unpacked in registers: Frantar et al. 2024 (Marlin)
// rungs:    v3 (9.0 alone, 16-bit, groups of 32 m), for quant_int4.cu's mma and below: 64 of k a stage, levels made in registers

#if ARCH == 90

struct Int4WgmmaParams {
    u32 m, n, k, group, bias;
    // Tiles of weights, of tokens.
    u32 down, across;
};

#ifdef TENSOR_16

struct Int4Weights {
    const u32* words;
    const float* scales;
    u32 n, k, group;
};

// The weights of rows g and g + 8, 64 of k a stage: two chunks of 16 bytes each. Lane t of a quad reads chunk t / 2 of row
// g + 8 (t % 2); of every word lane t multiplies byte t, the levels of k = 2 t and 2 t + 1. A scale is applied to the f32 sum of PART
// of k, so weights stay exact integers.
template <u32 TOKENS, u32 PART>
struct Int4Work {
    typedef Int4Weights Weights;
    typedef float Sums[TOKENS / 2u];
    struct Read { uint4 words; };
    struct Operands { u32 a[4][4]; };
    const u32* words;
    const float* scales[2];
    // Words of a row; groups of a row, parts of a group.
    u32 pitch, groups, parts;
    // Of rows g and g + 8: the scales of this part and of the next one, which belongs to this group and is the `left`th last of it.
    float scale[2], next[2];
    u32 group, left;
    Sums part;

    __device__ __forceinline__ Int4Work(const Int4Weights& w, u32 row, Sums& sums)
        : words(nullptr), pitch(w.k / 8u), groups(w.k / w.group), parts(w.group / PART), group(0u), left(w.group / PART) {
        u32 mine = row + threadIdx.x % 2u * 8u;
        if (mine < w.n) words = w.words + (u64)mine * pitch;
#pragma unroll
        for (u32 i = 0u; i < 2u; i++) scales[i] = row + i * 8u < w.n ? w.scales + (u64)(row + i * 8u) * groups : nullptr;
        load_scales();
        advance();
#pragma unroll
        for (u32 i = 0u; i < TOKENS / 2u; i++) sums[i] = 0.0f;
    }

    __device__ __forceinline__ void load_scales() {
#pragma unroll
        for (u32 i = 0u; i < 2u; i++) next[i] = scales[i] && group < groups ? scales[i][group] : 0.0f;
    }

    __device__ __forceinline__ void advance() {
        scale[0] = next[0];
        scale[1] = next[1];
        bool ends = --left == 0u;
        group += ends ? 1u : 0u;
        left = ends ? parts : left;
        load_scales();
    }

    __device__ __forceinline__ void load(Read& read, u32 step) const {
        u32 word = step * 8u + threadIdx.x % 4u / 2u * 4u;
        read.words = words && word < pitch ? load_vector(words + word) : make_uint4(0u, 0u, 0u, 0u);
    }

    __device__ __forceinline__ void make(Operands& operands, const Read& read) const {
        // Bytes t of the four words for lane t: the lanes' words turned within each lane, then among them.
        u32 low[2] = {__byte_perm(read.words.x, read.words.y, 0x5140u), __byte_perm(read.words.z, read.words.w, 0x5140u)};
        u32 high[2] = {__byte_perm(read.words.x, read.words.y, 0x7362u), __byte_perm(read.words.z, read.words.w, 0x7362u)};
        u32 bytes[4] = {__byte_perm(low[0], low[1], 0x5410u), __byte_perm(low[0], low[1], 0x7632u),
                        __byte_perm(high[0], high[1], 0x5410u), __byte_perm(high[0], high[1], 0x7632u)};
        quad_transpose(bytes);
#pragma unroll
        for (u32 lane = 0u; lane < 4u; lane++)
#pragma unroll
            for (u32 word = 0u; word < 4u; word++)
                operands.a[lane / 2u * 2u + word / 2u][lane % 2u + word % 2u * 2u] = weights::levels_of(bytes[lane], word);
    }

    __device__ __forceinline__ void add(Sums& sums) {
        wgmma_hold(part);
#pragma unroll
        for (u32 i = 0u; i < TOKENS / 2u; i++) sums[i] += part[i] * scale[i % 4u / 2u];
        advance();
    }

    __device__ __forceinline__ void issue(Sums& sums, const Operands& o, const u8* stage, u32) {
#pragma unroll
        for (u32 i = 0u; i < 4u; i++) {
            if (i > 0u && i * 16u % PART == 0u) {
                wgmma_commit();
                wgmma_wait<0>();
                add(sums);
                wgmma_fence();
            }
            wgmma_registers<TOKENS, false>(part, o.a[i], wgmma_operand<false>(stage, i * 32u), i * 16u % PART);
        }
    }

    __device__ __forceinline__ void finish(Sums& sums) { add(sums); }
};

// Parts of 64 of k where they divide groups.
template <u32 TOKENS>
struct Int4Product {
    typedef float Sums[TOKENS / 2u];
    Int4Weights packed;
    template <class Stages>
    __device__ __forceinline__ void sum(Stages& place, const WgmmaTiles::Tile& t, u32 steps, u32 group, Sums& sums) const {
        if (packed.group % 64u == 0u) weights::RegisterProduct<Int4Work<TOKENS, 64u>>{packed}.sum(place, t, steps, group, sums);
        else weights::RegisterProduct<Int4Work<TOKENS, 32u>>{packed}.sum(place, t, steps, group, sums);
    }
};

#endif

extern "C" __global__ void __launch_bounds__(384, 1)
matmul_int4_fwd_wgmma(const E*, const u32* words, const float* scales, const E* bias, E* y, const __grid_constant__ TensorMap x, Int4WgmmaParams p) {
    TENSOR_ONLY(
        typedef WgmmaStages<8u, 128u * 128u> Stages;
        DYNAMIC_SHARED(shared);
        WgmmaTiles tiles = {p.down, p.across, 1u, div_up(p.k, 64u)};
        Int4Product<128u> product = {{words, scales, p.n, p.k, p.group}};
        weights::FinishElements<128u> finish = {{p.bias == 1u ? bias : nullptr, y, p.n}, p.m};
        wgmma_gemm<Stages>(shared, tiles, weights::TokenMap<128u, 64u>{&x}, product, finish);
    )
}

#endif
