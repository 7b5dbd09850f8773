// op:       matmul
// math:     y = f(sum_k a[i, k] b[k, j] + bias[j]) or y += sum_k a[i, k] b[k, j] (+ bias[j]), f: identity, ReLU, GELU (tanh)
// grad:     da = dz bᵀ, db = aᵀ dz by matmul itself; dbias = column sums of dz
// shapes:   fwd: a[B, M, K], b[B, K, N], bias[N], y[B, M, N]
// layout:   a and b by strides (any transpose; a shared matrix has batch stride 0), y contiguous
// launch:   64 threads as 8x8, one output (v1) or 8x8 (v4) each; mma: 128 threads, four warps of 64x64 or 32x32 outputs; batch in z;
//           blocks of rows, columns and batch above 65,535 groups
// cost:     2 B M N K flop
// numerics: f32 sums in the order of k; NaN passes through
// source:   GELU: Hendrycks and Gimpel 2016
// rungs:    v1 one output per thread; v4 64x64 outputs per block, 16 of k at a time in shared memory; mma (f16, bf16) 128x128 outputs
//           per block on tensor instructions, 32 of k a stage, four stages; small_mma 64x64 outputs, rows of any alignment

struct MatmulParams {
    u32 rows, columns;
    // Bits 0-1 activation (0 none, 1 ReLU, 2 GELU), bit 2 bias, bit 3 add to y.
    u32 mode;
    u32 a_batch, a_row, a_column;
    u32 b_batch, b_row, b_column;
    u32 first_row, first_column, first_batch;
    u32 k0, k1;
};

__device__ __forceinline__ float matmul_finished(float y, const E* bias, const E* old, u32 mode) {
    if (mode & 4u) y += ld(*bias);
    if (mode & 8u) y += ld(*old);
    switch (mode & 3u) {
        case 1u: return y < 0.0f ? 0.0f : y;
        case 2u: return y * gelu_gate(y);
        default: return y;
    }
}

__device__ __forceinline__ void matmul_put(const E* bias, E* y, const MatmulParams& p, u32 batch, u32 row, u32 column, float sum) {
    if (row >= p.rows || column >= p.columns) return;
    u64 at = ((u64)batch * p.rows + row) * p.columns + column;
    y[at] = st(matmul_finished(sum, bias + column, y + at, p.mode));
}

extern "C" __global__ void __launch_bounds__(64) matmul_fwd(const E* a, const E* b, const E* bias, E* y, MatmulParams p) {
    u32 row = p.first_row + blockIdx.y * 8u + threadIdx.x / 8u;
    u32 column = p.first_column + blockIdx.x * 8u + threadIdx.x % 8u;
    u32 batch = p.first_batch + blockIdx.z;
    if (row >= p.rows || column >= p.columns) return;
    a += (u64)batch * p.a_batch + (u64)row * p.a_row;
    b += (u64)batch * p.b_batch + (u64)column * p.b_column;
    float sum = 0.0f;
    for (u32 k = p.k0; k < p.k1; k++) sum += ld(a[(u64)k * p.a_column]) * ld(b[(u64)k * p.b_row]);
    matmul_put(bias, y, p, batch, row, column, sum);
}

extern "C" __global__ void __launch_bounds__(64) matmul_fwd_v4(const E* a, const E* b, const E* bias, E* y, MatmulParams p) {
    // 64 x 16 of a and 16 x 64 of b, k-major.
    __shared__ float tile_a[16][64];
    __shared__ float tile_b[16][64];
    u32 first_row = p.first_row + blockIdx.y * 64u, first_column = p.first_column + blockIdx.x * 64u;
    u32 batch = p.first_batch + blockIdx.z, id = threadIdx.x;
    a += (u64)batch * p.a_batch;
    b += (u64)batch * p.b_batch;
    // Neighbouring threads read neighbours in memory: 16 along k by 4 rows, or 64 rows.
    bool along_a = p.a_column == 1u, along_b = p.b_row == 1u;
    float t[8][8] = {};
    for (u32 k0 = 0; k0 < p.k1; k0 += 16u) {
        for (u32 part = 0; part < 16u; part++) {
            u32 ka = along_a ? id & 15u : part, ra = along_a ? part * 4u + (id >> 4) : id;
            bool inside = k0 + ka < p.k1 && first_row + ra < p.rows;
            tile_a[ka][ra] = inside ? ld(a[(u64)(first_row + ra) * p.a_row + (u64)(k0 + ka) * p.a_column]) : 0.0f;
            u32 kb = along_b ? id & 15u : part, cb = along_b ? part * 4u + (id >> 4) : id;
            inside = k0 + kb < p.k1 && first_column + cb < p.columns;
            tile_b[kb][cb] = inside ? ld(b[(u64)(k0 + kb) * p.b_row + (u64)(first_column + cb) * p.b_column]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (u32 k = 0; k < 16u; k++) {
            for (u32 i = 0; i < 8u; i++)
                for (u32 j = 0; j < 8u; j++) t[i][j] += tile_a[k][id / 8u * 8u + i] * tile_b[k][id % 8u * 8u + j];
        }
        // The next tile may only overwrite this one once everybody has read it.
        __syncthreads();
    }
    for (u32 i = 0; i < 8u; i++)
        for (u32 j = 0; j < 8u; j++) matmul_put(bias, y, p, batch, first_row + id / 8u * 8u + i, first_column + id % 8u * 8u + j, t[i][j]);
}

#ifdef TENSOR_16

// Bias, activation and sum with what is there, in f32, on the way from the fragments to memory.
struct MatmulStore {
    const E* bias;
    E* y;
    const MatmulParams& p;
    template <u32 DOWN, u32 RIGHT>
    __device__ __forceinline__ void operator()(float (&sums)[DOWN][RIGHT][4], u32 row, u32 column, u8*) const {
        // Zeros stand for what is outside of y or absent; x + 0 is x, but for the sign of a zero.
        bool aligned = p.columns % 8u == 0u;
        float shift[RIGHT][2] = {};
        if (p.mode & 4u) {
#pragma unroll
            for (u32 j = 0; j < RIGHT; j++) {
                for (u32 i = 0; i < 2u; i++) shift[j][i] = column + j * 8u + i < p.columns ? ld(bias[column + j * 8u + i]) : 0.0f;
            }
        }
#pragma unroll
        for (u32 i = 0; i < 2u * DOWN; i++) {
            u32 at = row + i * 8u, pairs[RIGHT];
            bool inside = at < p.rows;
            E* line = y + (u64)(inside ? at : 0u) * p.columns;
#pragma unroll
            for (u32 j = 0; j < RIGHT; j++) {
                float z[2];
#pragma unroll
                for (u32 q = 0; q < 2u; q++) {
                    u32 c = column + j * 8u + q;
                    z[q] = sums[i / 2u][j][i % 2u * 2u + q] + shift[j][q];
                    if ((p.mode & 8u) && inside && c < p.columns) z[q] += ld(line[c]);
                    if ((p.mode & 3u) == 1u) z[q] = z[q] < 0.0f ? 0.0f : z[q];
                    else if ((p.mode & 3u) == 2u) z[q] = z[q] * gelu_gate(z[q]);
                }
                pairs[j] = pack_pair(st(z[0]), st(z[1]));
            }
            gemm_store_row<RIGHT>(line, pairs, inside, column, p.columns, aligned);
        }
    }
};

// Whichever axis has step 1 is the contiguous one. Rows that do not start at multiples of 16 bytes are only taken with ODD.
template <class Shape, bool ODD>
__device__ __forceinline__ void matmul_mma(const E* a, const E* b, const E* bias, E* y, const MatmulParams& p) {
    DYNAMIC_SHARED(shared);
    u32 batch = p.first_batch + blockIdx.z, row, column;
    gemm_tile(row, column);
    row = p.first_row + row * Shape::ROWS;
    column = p.first_column + column * Shape::COLUMNS;
    a += (u64)batch * p.a_batch;
    b += (u64)batch * p.b_batch;
    bool along_a = p.a_column == 1u, along_b = p.b_row == 1u;
    GemmRows left = {a, along_a ? p.a_row : p.a_column, along_a ? p.rows : p.k1, along_a ? p.k1 : p.rows, 0, true};
    GemmRows right = {b, along_b ? p.b_column : p.b_row, along_b ? p.columns : p.k1, along_b ? p.k1 : p.columns, 0, true};
    if (ODD) {
        // A single row is never stepped over.
        left.aligned = (left.rows < 2u || left.step % 8u == 0u) && (u64)batch * p.a_batch % 8u == 0u;
        right.aligned = (right.rows < 2u || right.step % 8u == 0u) && (u64)batch * p.b_batch % 8u == 0u;
    }
    float sums[Shape::DOWN][Shape::RIGHT][4] = {};
    if (along_a) {
        if (along_b) gemm_multiply<Shape, true, true, 1, 1, ODD>(left, right, row, column, p.k1, shared, sums);
        else gemm_multiply<Shape, true, false, 1, 1, ODD>(left, right, row, column, p.k1, shared, sums);
    } else {
        if (along_b) gemm_multiply<Shape, false, true, 1, 1, ODD>(left, right, row, column, p.k1, shared, sums);
        else gemm_multiply<Shape, false, false, 1, 1, ODD>(left, right, row, column, p.k1, shared, sums);
    }
    MatmulStore finish = {bias, y + (u64)batch * p.rows * p.columns, p};
    gemm_finish<Shape>(sums, row, column, shared, finish);
}

#endif

#if ARCH >= 80 || defined(ESPALIER_HOST)

extern "C" __global__ void __launch_bounds__(128, 2) matmul_fwd_mma(const E* a, const E* b, const E* bias, E* y, MatmulParams p) {
    TENSOR_ONLY(matmul_mma<GemmLarge, false>(a, b, bias, y, p);)
}

extern "C" __global__ void __launch_bounds__(128) matmul_small_mma(const E* a, const E* b, const E* bias, E* y, MatmulParams p) {
    TENSOR_ONLY(matmul_mma<GemmSmall, true>(a, b, bias, y, p);)
}

#endif
