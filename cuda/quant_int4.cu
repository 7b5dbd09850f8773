// op:       unpack_int4, matmul_int4 (pack_int4 stands in quant.cu, beside the scale rule)
// math:     w[j, k] = (nibble[j, k] - 8) scale[j, k / group]; y[i, j] = sum_k x[i, k] w[j, k] (+ bias[j])
// grad:     dx = dy W with W unpacked; the packed weight is fixed
// shapes:   unpack: words[N, K/8] (packed), scales[N, K/group], w[N, K]; matmul: x[M, K], words, scales, bias[N], y[M, N]
// layout:   eight weights to a word, the lowest column in the lowest four bits
// launch:   linear, 64 threads a block; one word (unpack) or one element of y; mma: one block per tile of 128 weights by 128
//           tokens (256 threads) or 32 by 16 (128 threads), see weights.cuh
// cost:     2 M N K operations; N K / 2 bytes of weights
// numerics: f32: sums within a word (mma: within 32 of k, by tensor instructions on exact levels), times its scale, in rising
//           order of k (few_mma: four sums, of every fourth 64 of k, added in order)
// source:   Frantar et al. 2023 (group scales)
// rungs:    v1 one element of y; mma (sm_80, 16-bit, groups of 32 m) levels made in registers, tensor instructions, few_mma the
//           same for at most 32 tokens

struct Int4Params { u32 m, n, k, group, bias; };
struct UnpackParams { u32 n, one, k, group; };

__device__ __forceinline__ float level_of(u32 word, u32 b) { return (float)((word >> (4u * b)) & 15u) - 8.0f; }

extern "C" __global__ void __launch_bounds__(64) unpack_int4_fwd(const u32* words, const float* scales, float* w, UnpackParams p) {
    u32 id = linear_id();
    if (id >= p.n * (p.k / 8u)) return;
    u64 first = (u64)id * 8u;
    float scale = scales[first / p.group];
    for (u32 b = 0u; b < 8u; b++) w[first + b] = level_of(words[id], b) * scale;
}

extern "C" __global__ void __launch_bounds__(64) matmul_int4_fwd(const E* x, const u32* words, const float* scales, const E* bias, E* y, Int4Params p) {
    u32 id = linear_id(), i = id / p.n, j = id % p.n;
    if (i >= p.m) return;
    x += (u64)i * p.k;
    words += (u64)j * (p.k / 8u);
    scales += (u64)j * (p.k / p.group);
    float sum = 0.0f;
    for (u32 k = 0u; k < p.k; k += 8u) {
        u32 word = words[k / 8u];
        float part = 0.0f;
        for (u32 b = 0u; b < 8u; b++) part += level_of(word, b) * ld(x[k + b]);
        sum += part * scales[k / p.group];
    }
    if (p.bias == 1u) sum += ld(bias[j]);
    y[id] = st(sum);
}

#if defined(ESPALIER_HOST) || (ARCH >= 80 && (defined(ELEMENT_F16) || defined(ELEMENT_BF16)))
// 128 weights by 128 tokens, 64 of k a stage; and 32 weights by 16 tokens, four warps with 64 of k each.
typedef weights::Tile<128, 128, 4, 2, 1, 4, 2> Int4Tile;
typedef weights::Tile<32, 16, 1, 1, 4, 6, 2> Int4FewTile;

// Within 32 of k the order of products is ours to choose: lane t takes k = 8t .. 8t + 7, which is one word of nibbles (as ldmatrix
// hands them out) and one 16-byte read of x. A scale is applied to the f32 sum of 32 products, so weights stay exact integers.
template <class T>
struct Int4Operands : weights::Operands<T> {
    const float* scales;
    u32 k, group;
    // Scales of rows g and g + 8 for the next 32 of k.
    float next[T::MI][2];

    __device__ __forceinline__ Int4Operands(const E* x, const u32* words, const float* s, const Int4Params& p, u32 token, u32 row)
        : weights::Operands<T>(x, words, p.m, p.n, p.k * 2u, p.k / 2u, token, row), scales(s + (u64)row * (p.k / p.group)), k(p.k), group(p.group) {
        load_scales(this->slice * 64u);
    }

    // 32-bit indices (a matrix has fewer than 2^31 scales) spare registers.
    __device__ __forceinline__ void load_scales(u32 first) {
        u32 groups = k / group, row = this->warp_row + threadIdx.x % WARP / 4u, at = row * groups + first / group;
#pragma unroll
        for (u32 i = 0u; i < 2u * T::MI; i++) next[i / 2u][i % 2u] = first < k && row + 8u * i < this->rows ? scales[at + groups * 8u * i] : 0.0f;
    }

    __device__ __forceinline__ void multiply(const u8* stage, u32 s, float (&sum)[T::MI][T::NI][4]) {
        u32 lane = threadIdx.x % WARP, first = (s * T::SLICES + this->slice) * 64u;
        // Not unrolled: with both halves at once the registers run out.
#pragma unroll 1
        for (u32 half = 0u; half < 2u; half++) {
            float scale[T::MI][2];
            u32 a[T::MI][2][4];
#pragma unroll
            for (u32 mi = 0u; mi < T::MI; mi += 2u) {
                // Words of rows g and g + 8 of two instruction tiles.
                u32 words[4];
                ldmatrix_x4(words, this->w_tile(stage) + weights::chunk_at<T::CHUNKS>(this->warp_row + mi * 16u + lane, half));
#pragma unroll
                for (u32 i = 0u; i < 16u; i++) a[mi + i / 8u][i / 4u % 2u][i % 4u] = weights::levels_of(words[i / 8u * 2u + i % 2u], i / 2u % 4u);
            }
#pragma unroll
            for (u32 i = 0u; i < 2u * T::MI; i++) scale[i / 2u][i % 2u] = next[i / 2u][i % 2u];
            // They arrive while these are multiplied.
            load_scales(half == 0u ? first + 32u : first + T::SLICES * 64u);
#pragma unroll
            for (u32 ni = 0u; ni < T::NI; ni++) {
                uint4 v = *(const uint4*)(this->x_tile(stage) + weights::chunk_at<8u>(this->warp_token + ni * 8u + lane / 4u, half * 4u + lane % 4u));
                u32 b[4] = {v.x, v.y, v.z, v.w};
                float part[T::MI][4] = {};
#pragma unroll
                for (u32 step = 0u; step < 2u; step++)
#pragma unroll
                    for (u32 mi = 0u; mi < T::MI; mi++) mma_16816(part[mi], a[mi][step], b + 2u * step);
#pragma unroll
                for (u32 i = 0u; i < 4u * T::MI; i++) sum[i / 4u][ni][i % 4u] += part[i / 4u][i % 4u] * scale[i / 4u][i % 4u / 2u];
            }
        }
    }
};

template <class T>
__device__ __forceinline__ void matmul_int4_tile(u8* shared, const E* x, const u32* words, const float* scales, const E* bias, E* y, const Int4Params& p) {
    u32 token, row;
    if (!weights::first_of<T>(p.m, p.n, token, row)) return;
    Int4Operands<T> operands(x, words, scales, p, token, row);
    float sum[T::MI][T::NI][4] = {};
    weights::run(shared, operands, sum, div_up(p.k, 64u * T::SLICES));
    weights::StoreElements store{p.bias == 1u ? bias : nullptr, y, p.n};
    weights::put<T>(shared, operands, sum, p.m, p.n, token, row, store);
}

extern "C" __global__ void __launch_bounds__(256, 2) matmul_int4_fwd_mma(const E* x, const u32* words, const float* scales, const E* bias, E* y, Int4Params p) {
    DYNAMIC_SHARED(shared);
    matmul_int4_tile<Int4Tile>(shared, x, words, scales, bias, y, p);
}

extern "C" __global__ void __launch_bounds__(128) matmul_int4_fwd_few_mma(const E* x, const u32* words, const float* scales, const E* bias, E* y, Int4Params p) {
    DYNAMIC_SHARED(shared);
    matmul_int4_tile<Int4FewTile>(shared, x, words, scales, bias, y, p);
}
#endif
