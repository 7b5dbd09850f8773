// op:       matmul_sparse24, matmul_sparse24_int8
// math:     y[i, j] = sum_g v[j, 2g] x[i, 4g + p0] + v[j, 2g + 1] x[i, 4g + p1] (+ bias[j]); int8: times xs[i] ws[j]
// grad:     x and values through decompress24, gather24 and matmul; int8: none
// shapes:   x[M, K], values[N, K/2], meta[N, ceil(K/32)], bias[N], y[M, N];
//           int8: x[M, K] i8, xs[M], values[N, K/2] i8, meta, ws[N], bias[N], y[M, N] f32
// layout:   meta: two bits per kept place, eight groups of four to a word; i8 four to a word
// launch:   linear, 64 threads a block; one thread per element (v1, int8) or per 4 rows of one column (v2); mma: one block per
//           tile of 128 weights by 128 tokens (256 threads) or 32 by 16 (128 threads), see weights.cuh
// cost:     M N K operations: half of dense; K/2 values and K/8 bytes of places read per column
// numerics: f32 sums in the order of k; int8: exact int32 sums, then three roundings
// source:   Mishra et al. 2021
// rungs:    v1 one element; v2 four rows share the values and places they meet; mma (sm_80, 16-bit, K % 16 = 0) sparse tensor
//           instructions on the portable format; int8 mma (K % 32 = 0) dense ones, weights made dense on their way into shared
//           memory; few_mma the same for at most 32 tokens

struct Sparse24MatmulParams { u32 m, n, k, bias; };

// Places of group g, from a row of meta.
__device__ __forceinline__ u32 places_of(const u32* meta, u32 g) { return meta[g / 8u] >> (4u * (g % 8u)); }

extern "C" __global__ void __launch_bounds__(64) matmul_sparse24_fwd(const E* x, const E* values, const u32* meta, const E* bias, E* y, Sparse24MatmulParams p) {
    u32 id = linear_id(), i = id / p.n, j = id % p.n;
    if (i >= p.m) return;
    x += (u64)i * p.k;
    values += (u64)j * (p.k / 2u);
    meta += (u64)j * div_up(p.k, 32u);
    float sum = 0.0f;
    for (u32 g = 0u; g < p.k / 4u; g++) {
        u32 places = places_of(meta, g);
        sum += ld(values[2u * g]) * ld(x[4u * g + (places & 3u)]);
        sum += ld(values[2u * g + 1u]) * ld(x[4u * g + ((places >> 2) & 3u)]);
    }
    if (p.bias == 1u) sum += ld(bias[j]);
    y[id] = st(sum);
}

extern "C" __global__ void __launch_bounds__(64) matmul_sparse24_fwd_v2(const E* x, const E* values, const u32* meta, const E* bias, E* y, Sparse24MatmulParams p) {
    u32 id = linear_id(), i = id / p.n * 4u, j = id % p.n;
    if (i >= p.m) return;
    values += (u64)j * (p.k / 2u);
    meta += (u64)j * div_up(p.k, 32u);
    const E* row[4];
    float sum[4] = {};
    // Rows past the edge repeat the last one; what they make is not stored.
#pragma unroll
    for (u32 r = 0u; r < 4u; r++) row[r] = x + (u64)min(i + r, p.m - 1u) * p.k;
    for (u32 g = 0u; g < p.k / 4u; g++) {
        u32 places = places_of(meta, g);
        u32 first = 4u * g + (places & 3u), second = 4u * g + ((places >> 2) & 3u);
        float a = ld(values[2u * g]), b = ld(values[2u * g + 1u]);
#pragma unroll
        for (u32 r = 0u; r < 4u; r++) {
            sum[r] += a * ld(row[r][first]);
            sum[r] += b * ld(row[r][second]);
        }
    }
    float more = p.bias == 1u ? ld(bias[j]) : 0.0f;
#pragma unroll
    for (u32 r = 0u; r < 4u; r++) {
        if (i + r < p.m) y[(u64)(i + r) * p.n + j] = st(sum[r] + more);
    }
}

// A group of x is one word; a pair of values is half of one.
extern "C" __global__ void __launch_bounds__(64) matmul_sparse24_int8_fwd(const u32* x, const float* xs, const u16* values, const u32* meta, const float* ws, const float* bias, float* y, Sparse24MatmulParams p) {
    u32 id = linear_id(), i = id / p.n, j = id % p.n, groups = p.k / 4u;
    if (i >= p.m) return;
    x += (u64)i * groups;
    values += (u64)j * groups;
    meta += (u64)j * div_up(p.k, 32u);
    int sum = 0;
    for (u32 g = 0u; g < groups; g++) {
        u32 places = places_of(meta, g), word = x[g], pair = values[g];
        sum += (int)(i8)pair * (int)(i8)(word >> (8u * (places & 3u)));
        sum += (int)(i8)(pair >> 8) * (int)(i8)(word >> (8u * ((places >> 2) & 3u)));
    }
    float value = (float)sum * xs[i] * ws[j];
    // Rounded by itself: a fused sum would differ from what other devices give.
    if (p.bias == 1u) value = __fadd_rn(value, bias[j]);
    y[id] = value;
}

#if ARCH >= 80 || defined(ESPALIER_HOST)
// Places 0 and 1 in every group: what stands where there are no weights, as places must ascend.
#define NO_PLACES 0x44444444u

#if defined(ESPALIER_HOST) || defined(ELEMENT_F16) || defined(ELEMENT_BF16)
// 128 weights by 128 tokens, 64 of k a stage; and 32 weights by 16 tokens, four warps with 64 of k each.
typedef weights::Tile<128, 128, 2, 4, 1, 4, 4> SparseTile;
typedef weights::Tile<32, 16, 1, 1, 4, 5, 4> SparseFewTile;

// The portable word of 32 columns holds what mma.sp wants for one row, in its order; only the lanes differ. Of a quad, selector 0
// reads lanes 0 and 1 and selector 1 lanes 2 and 3: the even one gives the first 16 columns, the odd one the others, each with
// row g in the low half and row g + 8 in the high half. So one register serves both steps of a slice. This map is that of the PTX
// ISA and agrees with the order CUTLASS stores for sm_80 (its interleave by 32 rows and 2x2 swizzle, undone by hand); a probe on
// a GPU, one non-zero group at a time against the dense product, must confirm it.
template <class T>
struct SparseOperands : weights::Operands<T> {
    const u32* meta;
    u32 k;
    u32 next[T::MI][2];

    __device__ __forceinline__ SparseOperands(const E* x, const E* values, const u32* m, const Sparse24MatmulParams& p, u32 token, u32 row)
        : weights::Operands<T>(x, values, p.m, p.n, p.k * 2u, p.k, token, row), meta(m + (u64)row * div_up(p.k, 32u)), k(p.k) {
        load_places(0u);
    }

    // Words of rows g and g + 8 for the slice this warp multiplies in stage s.
    __device__ __forceinline__ void load_places(u32 s) {
        u32 lane = threadIdx.x % WARP, words = div_up(k, 32u), at = (s * T::SLICES + this->slice) * 2u + lane % 4u / 2u;
#pragma unroll
        for (u32 mi = 0u; mi < T::MI; mi++)
#pragma unroll
            for (u32 i = 0u; i < 2u; i++) {
                u32 row = this->warp_row + mi * 16u + i * 8u + lane / 4u;
                u32 word = row < this->rows && at < words ? meta[(u64)row * words + at] : NO_PLACES;
                // k is a multiple of 16: the last word may be half full.
                next[mi][i] = at * 32u + 16u == k ? (word & 0xffffu) | (NO_PLACES & 0xffff0000u) : word;
            }
    }

    template <int STEP>
    __device__ __forceinline__ void multiply_step(const u8* stage, const u32 (&places)[T::MI], float (&sum)[T::MI][T::NI][4]) {
        u32 b[T::NI][4];
#pragma unroll
        for (u32 ni = 0u; ni < T::NI; ni++) this->load_tokens(b[ni], stage, ni, 4u * STEP);
#pragma unroll
        for (u32 mi = 0u; mi < T::MI; mi++) {
            u32 a[4];
            this->load_weights(a, stage, mi, 2u * STEP);
#pragma unroll
            for (u32 ni = 0u; ni < T::NI; ni++) mma_sp_16832<STEP>(sum[mi][ni], a, b[ni], places[mi]);
        }
    }

    __device__ __forceinline__ void multiply(const u8* stage, u32 s, float (&sum)[T::MI][T::NI][4]) {
        u32 places[T::MI];
#pragma unroll
        for (u32 mi = 0u; mi < T::MI; mi++) {
            u32 upper = next[mi][0], lower = next[mi][1];
            places[mi] = threadIdx.x & 1u ? upper >> 16 | (lower & 0xffff0000u) : (upper & 0xffffu) | lower << 16;
        }
        // They arrive while this slice is multiplied.
        load_places(s + 1u);
        multiply_step<0>(stage, places, sum);
        multiply_step<1>(stage, places, sum);
    }
};

template <class T>
__device__ __forceinline__ void matmul_sparse24_tile(u8* shared, const E* x, const E* values, const u32* meta, const E* bias, E* y, const Sparse24MatmulParams& p) {
    u32 token, row;
    if (!weights::first_of<T>(p.m, p.n, token, row)) return;
    SparseOperands<T> operands(x, values, meta, p, token, row);
    float sum[T::MI][T::NI][4] = {};
    weights::run(shared, operands, sum, div_up(p.k, 64u * T::SLICES));
    weights::StoreElements store{p.bias == 1u ? bias : nullptr, y, p.n};
    weights::put<T>(shared, operands, sum, p.m, p.n, token, row, store);
}

extern "C" __global__ void __launch_bounds__(256, 2) matmul_sparse24_fwd_mma(const E* x, const E* values, const u32* meta, const E* bias, E* y, Sparse24MatmulParams p) {
    DYNAMIC_SHARED(shared);
    matmul_sparse24_tile<SparseTile>(shared, x, values, meta, bias, y, p);
}

extern "C" __global__ void __launch_bounds__(128) matmul_sparse24_fwd_few_mma(const E* x, const E* values, const u32* meta, const E* bias, E* y, Sparse24MatmulParams p) {
    DYNAMIC_SHARED(shared);
    matmul_sparse24_tile<SparseFewTile>(shared, x, values, meta, bias, y, p);
}
#endif

// The tiles of quant_matmul.cu; weights become dense on their way into shared memory.
typedef weights::Tile<128, 128, 2, 4, 1, 3, 8> SparseBytesTile;
typedef weights::Tile<32, 16, 1, 1, 4, 4, 8> SparseBytesFewTile;

// A group's two kept bytes (the low half of `pair`) at their places.
__device__ __forceinline__ u32 dense_group(u32 pair, u32 places) {
    return (pair & 0xffu) << (8u * (places & 3u)) | (pair >> 8 & 0xffu) << (8u * (places >> 2 & 3u));
}

template <class T>
struct SparseBytesOperands : weights::Operands<T> {
    // Runs of 32 columns that a thread makes dense in a stage.
    static constexpr u32 RUNS = T::ROWS * T::SLICES * 4u / T::THREADS;
    const u32* meta;
    u32 k;
    uint4 kept[RUNS];
    u32 places[RUNS];

    __device__ __forceinline__ SparseBytesOperands(const i8* x, const i8* values, const u32* m, const Sparse24MatmulParams& p, u32 token, u32 row)
        : weights::Operands<T>(x, values, p.m, p.n, p.k, p.k / 2u, token, row), meta(m + (u64)row * (p.k / 32u)), k(p.k) {}

    __device__ __forceinline__ void begin(u8* stage, u32 s) {
        this->copy_tokens(stage, s);
#pragma unroll
        for (u32 i = 0u; i < RUNS; i++) {
            u32 id = i * T::THREADS + threadIdx.x, row = id / (T::SLICES * 4u), run = s * T::SLICES * 4u + id % (T::SLICES * 4u);
            bool inside = row < this->rows && run < k / 32u;
            kept[i] = inside ? *(const uint4*)(this->w + (u64)row * this->w_pitch + run * 16u) : make_uint4(0u, 0u, 0u, 0u);
            places[i] = inside ? meta[(u64)row * (k / 32u) + run] : 0u;
        }
    }

    // After the products of an earlier stage the loads have arrived.
    __device__ __forceinline__ void end(u8* stage) {
#pragma unroll
        for (u32 i = 0u; i < RUNS; i++) {
            u32 id = i * T::THREADS + threadIdx.x, row = id / (T::SLICES * 4u), run = id % (T::SLICES * 4u), p = places[i];
            u8* to = stage + T::X_BYTES + run / 4u * T::W_SLICE;
            uint4 v = kept[i];
            *(uint4*)(to + weights::chunk_at<8u>(row, run % 4u * 2u)) =
                make_uint4(dense_group(v.x, p), dense_group(v.x >> 16, p >> 4), dense_group(v.y, p >> 8), dense_group(v.y >> 16, p >> 12));
            *(uint4*)(to + weights::chunk_at<8u>(row, run % 4u * 2u + 1u)) =
                make_uint4(dense_group(v.z, p >> 16), dense_group(v.z >> 16, p >> 20), dense_group(v.w, p >> 24), dense_group(v.w >> 16, p >> 28));
        }
    }

    __device__ __forceinline__ void multiply(const u8* stage, u32, int (&sum)[T::MI][T::NI][4]) { weights::multiply_bytes<T>(*this, stage, sum); }
};

template <class T>
__device__ __forceinline__ void matmul_sparse24_int8_tile(u8* shared, const i8* x, const float* xs, const i8* values, const u32* meta, const float* ws, const float* bias, float* y, const Sparse24MatmulParams& p) {
    u32 token, row;
    if (!weights::first_of<T>(p.m, p.n, token, row)) return;
    SparseBytesOperands<T> operands(x, values, meta, p, token, row);
    int sum[T::MI][T::NI][4] = {};
    weights::run(shared, operands, sum, div_up(p.k, 128u * T::SLICES));
    weights::StoreScaled store{xs, ws, p.bias == 1u ? bias : nullptr, y, p.n};
    weights::put<T>(shared, operands, sum, p.m, p.n, token, row, store);
}

extern "C" __global__ void __launch_bounds__(256, 2) matmul_sparse24_int8_fwd_mma(const i8* x, const float* xs, const i8* values, const u32* meta, const float* ws, const float* bias, float* y, Sparse24MatmulParams p) {
    DYNAMIC_SHARED(shared);
    matmul_sparse24_int8_tile<SparseBytesTile>(shared, x, xs, values, meta, ws, bias, y, p);
}

extern "C" __global__ void __launch_bounds__(128) matmul_sparse24_int8_fwd_few_mma(const i8* x, const float* xs, const i8* values, const u32* meta, const float* ws, const float* bias, float* y, Sparse24MatmulParams p) {
    DYNAMIC_SHARED(shared);
    matmul_sparse24_int8_tile<SparseBytesFewTile>(shared, x, xs, values, meta, ws, bias, y, p);
}
#endif
