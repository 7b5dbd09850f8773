// op:       matmul
// math:     y = f(sum_k a[i, k] b[k, j] + bias[j]) or y += sum_k a[i, k] b[k, j] (+ bias[j]), f: identity, ReLU, GELU (tanh)
// grad:     da = dz bᵀ, db = aᵀ dz by matmul itself; dbias = column sums of dz
// shapes:   fwd: a[B, M, K], b[B, K, N], bias[N], y[B, M, N]
// layout:   a and b by strides (any transpose; a shared matrix has batch stride 0), y contiguous
// launch:   64 threads as 8x8, one output (v1) or 8x8 (v4) each; batch in z; blocks of rows, columns and batch above 65,535 groups
// cost:     2 B M N K flop
// numerics: f32 sums in the order of k; NaN passes through
// source:   GELU: Hendrycks and Gimpel 2016
// rungs:    v1 one output per thread; v4 64x64 outputs per block, 16 of k at a time in shared memory

struct MatmulParams {
    u32 rows, columns;
    // Bits 0-1 activation (0 none, 1 ReLU, 2 GELU), bit 2 bias, bit 3 add to y.
    u32 mode;
    u32 a_batch, a_row, a_column;
    u32 b_batch, b_row, b_column;
    u32 first_row, first_column, first_batch;
    u32 k0, k1;
};

// x / (1 + exp(-2u)) = x (1 + tanh u) / 2; the exponent is bounded so that exp stays finite.
__device__ __forceinline__ float matmul_gelu(float x) {
    float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1.0f + expf(fminf(-2.0f * u, 80.0f)));
}

__device__ __forceinline__ float matmul_finished(float y, const E* bias, const E* old, u32 mode) {
    if (mode & 4u) y += ld(*bias);
    if (mode & 8u) y += ld(*old);
    switch (mode & 3u) {
        case 1u: return y < 0.0f ? 0.0f : y;
        case 2u: return matmul_gelu(y);
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
