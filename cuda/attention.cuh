// Joined in front of every kernel file, after mma.cuh, and empty unless HEAD is defined: tiles of attention on 16-bit
// elements by the tensor instructions of one warp (attention_mma.cu, attention_bwd_mma.cu). Blocks have 128 threads.
//
//   HEAD    head dimension that registers are laid out for: 32, 64, 96 or 128; columns from D on are zeros

#if defined(HEAD) && (ARCH >= 80 || defined(ESPALIER_HOST))

struct AttentionParams {
    u32 batch, queries, keys, heads, dim;
    u32 flags, offset;
    float scale;
};

// Rows in shared memory lie an odd number of 16-byte chunks apart: eight rows of one column touch all banks.
#define PITCH (HEAD + 8)
#define CHUNKS (HEAD / 8u)
// Whether a left operand stays in registers or is read again from shared memory.
#define KEEP (HEAD <= 64)
// Rows of a forward block (32 of each warp) and of a backward block (16 of each warp).
#define ROWS 128u
#define BACK 64u
// Rows that stream past per step, forward and backward: what registers hold without spilling.
#define KEYS (HEAD <= 32 || (HEAD <= 96 && ARCH < 100) ? 64u : 32u)
#define STEP (HEAD <= 64 ? 64u : 32u)

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
#define MINUS_INFINITY __uint_as_float(0xff800000u)
#if defined(ELEMENT_F16)
#define EXPONENT 0x7c00u
// P of a long row is small for f16: it is kept times 2^SHIFT.
#define SHIFT 8.0f
#define UNSHIFT 0.00390625f
#else
#define EXPONENT 0x7f80u
#define SHIFT 0.0f
#define UNSHIFT 1.0f
#endif

__device__ __forceinline__ float power2(float x) {
#ifdef ESPALIER_HOST
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

__device__ __forceinline__ u32 pack(float low, float high) {
#ifdef ESPALIER_HOST
    return (u32)st(low) | (u32)st(high) << 16;
#else
    u32 y;
    asm("cvt.rn." MMA_TYPE "x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#endif
}

__device__ __forceinline__ bool unusual(u32 pair) {
    return (pair & EXPONENT) == EXPONENT || (pair & (EXPONENT << 16)) == EXPONENT << 16;
}

// Every mask leaves a prefix of the keys visible, and later queries never see fewer.
struct Visible {
    u32 limit, context, next;
    __device__ __forceinline__ u32 count(u32 t) const { return min(limit, max(t + next, context)); }
    // The first query that sees key s; `queries` if none does.
    __device__ __forceinline__ u32 first(u32 s, u32 queries) const {
        if (s >= limit) return queries;
        return s < context || s + 1u <= next ? 0u : s + 1u - next;
    }
};
__device__ __forceinline__ Visible visible_of(const u32* context, const u32* lengths, const AttentionParams& p, u32 b) {
    u32 mask = p.flags & 3u;
    u32 limit = (p.flags & 4u) != 0u ? min(p.keys, lengths[b]) : p.keys;
    return Visible{limit, mask == 0u ? p.keys : mask == 2u ? context[b] : 0u, p.offset + 1u};
}

// Rows of a block: `first` on, of `extent`, of one batch and head; the start of its row 0 in a [B, N, H, D] tensor.
struct Place { u32 b, h, first; };
__device__ __forceinline__ Place place_of(const AttentionParams& p, u32 extent, u32 rows, bool backwards, u32 item = linear_block()) {
    u32 tiles = div_up(extent, rows), tile = item % tiles, head = item / tiles;
    // With a causal mask the last queries have the most keys: they start first.
    return Place{head / p.heads, head % p.heads, (backwards ? tiles - 1u - tile : tile) * rows};
}
__device__ __forceinline__ u64 start_of(const AttentionParams& p, u32 b, u32 h, u32 extent) {
    return ((u64)b * extent * p.heads + h) * p.dim;
}

// Rows first.. of x into shared memory, zeros from row `end` and column D on. A thread keeps to one column.
template <u32 COUNT>
__device__ __forceinline__ void load_rows(E* tile, const E* x, u32 first, u32 end, const AttentionParams& p) {
    const u32 LANES = HEAD <= 32 ? 4u : HEAD <= 64 ? 8u : 16u;
    u32 row = threadIdx.x / LANES, column = threadIdx.x % LANES * 8u;
    if (column >= HEAD) return;
    if (column >= p.dim) end = 0u;
    u64 step = (u64)(128u / LANES) * p.heads * p.dim;
    const E* from = x + (u64)(first + row) * p.heads * p.dim + column;
    tile += row * PITCH + column;
#pragma unroll
    for (u32 i = 0; i < COUNT; i += 128u / LANES, from += step) {
        bool there = first + row + i < end;
        cp_async_16(tile + i * PITCH, there ? from : x, there ? 16 : 0);
    }
}

// A warp's own rows of a tile to rows first.. of x.
template <u32 COUNT>
__device__ __forceinline__ void store_rows(E* x, const E* tile, u32 first, u32 end, const AttentionParams& p) {
    u64 stride = (u64)p.heads * p.dim;
    for (u32 i = threadIdx.x % WARP; i < COUNT * CHUNKS; i += WARP) {
        u32 row = i / CHUNKS, chunk = i % CHUNKS;
        if (first + row < end && chunk * 8u < p.dim)
            *(uint4*)(x + (first + row) * stride + chunk * 8u) = *(const uint4*)(tile + row * PITCH + chunk * 8u);
    }
}

// Sums of 16 rows of a warp, times a factor for each of the thread's two, into the warp's rows of a tile.
__device__ __forceinline__ void put_rows(E* rows, const float sum[HEAD / 8][4], float factor0, float factor1) {
    u32 lane = threadIdx.x % WARP;
    E* at = rows + lane / 4u * PITCH + lane % 4u * 2u;
#pragma unroll
    for (int d = 0; d < HEAD / 8; d++) {
        *(u32*)(at + d * 8) = pack(sum[d][0] * factor0, sum[d][1] * factor0);
        *(u32*)(at + 8 * PITCH + d * 8) = pack(sum[d][2] * factor1, sum[d][3] * factor1);
    }
}

// The left operand: 16 M rows of a warp.
template <int M, bool KEPT = KEEP>
struct Left {
    const E* rows;
    u32 kept[KEPT ? M : 1][KEPT ? HEAD / 16 : 1][4];

    __device__ __forceinline__ void fetch(u32 a[4], int m, int d) const {
        u32 lane = threadIdx.x % WARP;
        ldmatrix_x4(a, rows + (m * 16 + lane % 16u) * PITCH + d * 16 + lane / 16u * 8u);
    }
    __device__ __forceinline__ void keep() {
#pragma unroll
        for (int m = 0; m < (KEPT ? M : 0); m++)
#pragma unroll
            for (int d = 0; d < HEAD / 16; d++) fetch(kept[m][KEPT ? d : 0], m, d);
    }
};

// product[16 M, N] = left (N rows of a tile)^T. An operand that is kept needs the loop unrolled.
template <int M, int N, int UNROLL = HEAD / 16, bool KEPT>
__device__ __forceinline__ void multiply(float product[M][N / 8][4], const Left<M, KEPT>& left, const E* tile) {
    u32 lane = threadIdx.x % WARP;
    const E* at = tile + (lane / 16u * 8u + lane % 8u) * PITCH + lane / 8u % 2u * 8u;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) product[m][n][i] = 0.0f;
#pragma unroll UNROLL
    for (int d = 0; d < HEAD / 16; d++) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            if (KEPT) {
#pragma unroll
                for (int i = 0; i < 4; i++) a[m][i] = left.kept[KEPT ? m : 0][KEPT ? d : 0][i];
            } else {
                left.fetch(a[m], m, d);
            }
        }
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            u32 b[4];
            ldmatrix_x4(b, at + n * 16 * PITCH + d * 16);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16816(product[m][2 * n], a[m], b);
                mma_16816(product[m][2 * n + 1], a[m], b + 2);
            }
        }
    }
}

// sum[16 M, HEAD] += weight[16 M, 16] (16 rows of a tile), where weight is columns 16 n.. of the product of `multiply`, rounded
// to the storage type.
// `sees(m, half, i)` says whether row 8 half + g of m may know of tile row i. Where that is so for all of them, `mixed` is
// false; else a tile row that is not finite must not reach the others, although they weigh it with 0.
template <int M, int N, class Sees>
__device__ __forceinline__ void add_rows(float sum[M][HEAD / 8][4], const float weight[M][N / 8][4], int n, const E* rows, bool mixed, Sees sees) {
    u32 lane = threadIdx.x % WARP, left[M][4];
    const E* at = rows + lane % 16u * PITCH + lane / 16u * 8u;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* pair = &weight[m][2 * n + i / 2][i % 2 * 2];
            left[m][i] = pack(pair[0], pair[1]);
        }
#pragma unroll
    for (int d = 0; d < HEAD / 16; d++) {
        u32 b[4];
        ldmatrix_x4_trans(b, at + d * 16);
        if (mixed && __any_sync(ALL_LANES, unusual(b[0]) || unusual(b[1]) || unusual(b[2]) || unusual(b[3]))) {
            // One tile row at a time, kept where it may be known.
#pragma unroll 1
            for (u32 i = 0; i < 16u; i++) {
                u32 mask = lane % 4u == i % 8u / 2u ? 0xffffu << i % 2u * 16u : 0u, low = i < 8u ? mask : 0u, high = i < 8u ? 0u : mask;
                u32 one[4] = {b[0] & low, b[1] & high, b[2] & low, b[3] & high};
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        float* old = sum[m][2 * d + c];
                        float now[4] = {old[0], old[1], old[2], old[3]};
                        mma_16816(now, left[m], one + 2 * c);
#pragma unroll
                        for (int j = 0; j < 4; j++) old[j] = sees(m, j / 2, i) ? now[j] : old[j];
                    }
            }
            continue;
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
            mma_16816(sum[m][2 * d], left[m], b);
            mma_16816(sum[m][2 * d + 1], left[m], b + 2);
        }
    }
}

// The helpers below take the scores of 16 M rows of a warp, or those of its rows that a warp group has (M = 1), against N keys
// from `base` on. Row r of the thread's 2 M is row0 + 8 r + g.

// Scores with what the bias adds, both times log2 e: a score of keys that a row does not see keeps its value.
template <int M, int N>
__device__ __forceinline__ void add_bias(float score[M][N / 8][4], const E* bias, const u32 n[2 * M], u32 row0, u32 base, float slope, const AttentionParams& p) {
    u32 lane = threadIdx.x % WARP, first = base + lane % 4u * 2u;
#pragma unroll
    for (u32 r = 0; r < 2u * M; r++) {
        u32 row = row0 + r * 8u + lane / 4u;
        int seen = row < p.queries ? (int)n[r] - (int)first : 0;
        const E* line = bias + (u64)row * p.keys + first;
#pragma unroll
        for (u32 j = 0; j < N / 4u; j++) {
            u32 key = j / 2u * 8u + j % 2u;
            // A few loads at a time: registers are for the sums.
            if (j % 8u == 0u) __syncwarp();
            float* s = &score[r / 2u][j / 2u][r % 2u * 2u + j % 2u];
            if ((int)key < seen) *s = *s * slope + ld(line[key]) * LOG2_E;
        }
    }
}

// Scores ready for exponents: sign and bias, and minus infinity for what is hidden. Every row sees the first `least` keys.
template <int M, int N>
__device__ __forceinline__ void finish_scores(float score[M][N / 8][4], const E* bias, const u32 n[2 * M], u32 row0, u32 base, u32 least, const AttentionParams& p) {
    u32 lane = threadIdx.x % WARP;
    if (p.scale < 0.0f) {
#pragma unroll
        for (u32 j = 0; j < M * N / 2u; j++) score[j / 4u % M][j / (4u * M)][j % 4u] *= -1.0f;
    }
    if ((p.flags & 8u) != 0u) add_bias<M, N>(score, bias, n, row0, base, fabsf(p.scale) * LOG2_E, p);
    if (base + N > least) {
#pragma unroll
        for (u32 j = 0; j < M * N / 2u; j++) {
            u32 m = j / 4u % M, part = j / (4u * M), key = base + part * 8u + lane % 4u * 2u + j % 2u;
            if (key >= n[m * 2u + j % 4u / 2u]) score[m][part][j % 4u] = MINUS_INFINITY;
        }
    }
}

// The online softmax of 2 M rows of a thread. Exponents are base 2. Without a bias products enter them times `factor`; with one
// they are scaled before the maximum.
template <int M>
struct Softmax {
    float factor, largest[2 * M], total[2 * M];

    __device__ __forceinline__ explicit Softmax(const AttentionParams& p) : factor((p.flags & 8u) != 0u ? 1.0f : fmaxf(fabsf(p.scale) * LOG2_E, 1.2e-38f)) {
#pragma unroll
        for (int r = 0; r < 2 * M; r++) {
            largest[r] = (p.flags & 8u) != 0u ? MASKED * LOG2_E : MASKED;
            total[r] = 0.0f;
        }
    }

    // Scores of row r become weights. Returns by what the row's older weights are to be multiplied.
    template <int N>
    __device__ __forceinline__ float weigh(float score[M][N / 8][4], int r) {
        float high = largest[r];
#pragma unroll
        for (int j = 0; j < N / 8; j++) high = fmaxf(high, fmaxf(score[r / 2][j][r % 2 * 2], score[r / 2][j][r % 2 * 2 + 1]));
        high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, 1));
        high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, 2));
        float correction = power2((largest[r] - high) * factor), shift = high * factor, part = 0.0f;
        largest[r] = high;
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int i = r % 2 * 2; i < r % 2 * 2 + 2; i++) part += score[r / 2][j][i] = power2(score[r / 2][j][i] * factor - shift);
        total[r] = total[r] * correction + part;
        return correction;
    }

    // 1 / total of each row, 0 for one that sees nothing; lse, where the head's first row stands at `lse`.
    __device__ __forceinline__ void finish(float inverse[2 * M], float* lse, const u32 n[2 * M], u32 row0, u32 queries) {
        u32 lane = threadIdx.x % WARP;
#pragma unroll
        for (u32 r = 0; r < 2u * M; r++) {
            total[r] += __shfl_xor_sync(ALL_LANES, total[r], 1);
            total[r] += __shfl_xor_sync(ALL_LANES, total[r], 2);
            inverse[r] = n[r] > 0u ? 1.0f / total[r] : 0.0f;
            u32 row = row0 + r * 8u + lane / 4u;
            if (lane % 4u == 0u && row < queries) lse[row] = n[r] > 0u ? largest[r] * factor * LN_2 + logf(total[r]) : MASKED;
        }
    }
};

template <int M>
__device__ __forceinline__ void clear(float sum[M][HEAD / 8][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int d = 0; d < HEAD / 8; d++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[m][d][i] = 0.0f;
}

#endif
