// op:       matmul_int8, matmul_int8_requantized
// math:     y[i, j] = (sum_k x[i, k] w[j, k]) xs[i] ws[j] + bias[j];
//           requantize: h = relu(y) or gelu(y), scale[i] = max_j |h[i, j]| / 127, q[i, j] = rne(h[i, j] / scale[i])
// grad:     none: training runs on fake-quantized values
// shapes:   x[M, K] i8, xs[M], w[N, K] i8, ws[N], bias[N] (any array where there is none), y[M, N];
//           requantize: hidden[M, N] (y of the launch before), q[M, N] i8, scale[M]
// layout:   rows contiguous along k; four i8 to a word, little endian; rows start on words where K % 4 = 0
// launch:   linear, 64 threads a block; one thread per element (v1), four columns (v2), 4 x 4 tile (v3); mma: one block per tile
//           of 128 weights by 128 tokens (256 threads) or 32 by 16 (128 threads), see weights.cuh; requantize: 256 threads for
//           four rows
// cost:     2 M N K operations; M K + N K bytes read, 4 M N written; requantize: 8 M N read, M N written
// numerics: int32 sums, exact for K below 2^17; then three f32 roundings; requantize: the grid and the rounding of quant.cu
// source:   Jacob et al. 2018; dynamic per-token scales: Dettmers et al. 2022
// rungs:    v1 byte by byte, any K; v2 four columns share a word of x; v3 4 x 4 tile in registers; mma (sm_80, K % 16 = 0) int8 tensor
//           instructions behind a pipeline of asynchronous copies, few_mma the same for at most 32 tokens

struct Int8Params { u32 m, n, k, bias; };

// Each step rounds by itself: a fused sum would differ from what other devices give.
__device__ __forceinline__ void store_sum(const float* xs, const float* ws, const float* bias, float* y, const Int8Params& p, u32 i, u32 j, int sum) {
    if (i >= p.m || j >= p.n) return;
    float value = (float)sum * xs[i] * ws[j];
    if (p.bias == 1u) value = __fadd_rn(value, bias[j]);
    y[(u64)i * p.n + j] = value;
}

extern "C" __global__ void __launch_bounds__(64) matmul_int8_fwd(const i8* x, const float* xs, const i8* w, const float* ws, const float* bias, float* y, Int8Params p) {
    u32 id = linear_id(), i = id / p.n, j = id % p.n;
    if (i >= p.m) return;
    x += (u64)i * p.k;
    w += (u64)j * p.k;
    int sum = 0;
    for (u32 k = 0u; k < p.k; k++) sum += (int)x[k] * (int)w[k];
    store_sum(xs, ws, bias, y, p, i, j, sum);
}

extern "C" __global__ void __launch_bounds__(64) matmul_int8_fwd_v2(const int* x, const float* xs, const int* w, const float* ws, const float* bias, float* y, Int8Params p) {
    u32 id = linear_id(), columns = div_up(p.n, 4u), words = p.k / 4u;
    u32 i = id / columns, j = id % columns * 4u;
    if (i >= p.m) return;
    x += (u64)i * words;
    const int* column[4];
    int sum[4] = {};
    // Columns past the edge repeat the last one; what they make is not stored.
#pragma unroll
    for (u32 c = 0u; c < 4u; c++) column[c] = w + (u64)min(j + c, p.n - 1u) * words;
    for (u32 k = 0u; k < words; k++) {
        int value = x[k];
#pragma unroll
        for (u32 c = 0u; c < 4u; c++) sum[c] = __dp4a(value, column[c][k], sum[c]);
    }
#pragma unroll
    for (u32 c = 0u; c < 4u; c++) store_sum(xs, ws, bias, y, p, i, j + c, sum[c]);
}

extern "C" __global__ void __launch_bounds__(64) matmul_int8_fwd_v3(const int* x, const float* xs, const int* w, const float* ws, const float* bias, float* y, Int8Params p) {
    u32 id = linear_id(), columns = div_up(p.n, 4u), words = p.k / 4u;
    u32 i = id / columns * 4u, j = id % columns * 4u;
    if (i >= p.m) return;
    const int *row[4], *column[4];
    int sum[4][4] = {};
    // Rows past the edge too.
#pragma unroll
    for (u32 c = 0u; c < 4u; c++) {
        row[c] = x + (u64)min(i + c, p.m - 1u) * words;
        column[c] = w + (u64)min(j + c, p.n - 1u) * words;
    }
    for (u32 k = 0u; k < words; k++) {
#pragma unroll
        for (u32 r = 0u; r < 4u; r++)
#pragma unroll
            for (u32 c = 0u; c < 4u; c++) sum[r][c] = __dp4a(row[r][k], column[c][k], sum[r][c]);
    }
#pragma unroll
    for (u32 r = 0u; r < 4u; r++)
#pragma unroll
        for (u32 c = 0u; c < 4u; c++) store_sum(xs, ws, bias, y, p, i + r, j + c, sum[r][c]);
}

extern "C" __global__ void __launch_bounds__(256) matmul_int8_requantize(const float* hidden, i8* q, float* scale, RequantizeParams p) {
    requantize_rows(hidden, q, scale, p);
}

#if ARCH >= 80 || defined(ESPALIER_HOST)
// 128 weights by 128 tokens, 128 of k a stage; and 32 weights by 16 tokens, four warps with 128 of k each.
typedef weights::Tile<128, 128, 2, 4, 1, 3, 8> Int8Tile;
typedef weights::Tile<32, 16, 1, 1, 4, 4, 8> Int8FewTile;

template <class T>
struct Int8Operands : weights::Operands<T> {
    using weights::Operands<T>::Operands;
    __device__ __forceinline__ void multiply(const u8* stage, u32, int (&sum)[T::MI][T::NI][4]) { weights::multiply_bytes<T>(*this, stage, sum); }
};

template <class T>
__device__ __forceinline__ void matmul_int8_tile(u8* shared, const i8* x, const float* xs, const i8* w, const float* ws, const float* bias, float* y, const Int8Params& p) {
    u32 token, row;
    if (!weights::first_of<T>(p.m, p.n, token, row)) return;
    Int8Operands<T> operands(x, w, p.m, p.n, p.k, p.k, token, row);
    int sum[T::MI][T::NI][4] = {};
    weights::run(shared, operands, sum, div_up(p.k, 128u * T::SLICES));
    weights::StoreScaled store{xs, ws, p.bias == 1u ? bias : nullptr, y, p.n};
    weights::put<T>(shared, operands, sum, p.m, p.n, token, row, store);
}

extern "C" __global__ void __launch_bounds__(256) matmul_int8_fwd_mma(const i8* x, const float* xs, const i8* w, const float* ws, const float* bias, float* y, Int8Params p) {
    DYNAMIC_SHARED(shared);
    matmul_int8_tile<Int8Tile>(shared, x, xs, w, ws, bias, y, p);
}

extern "C" __global__ void __launch_bounds__(128) matmul_int8_fwd_few_mma(const i8* x, const float* xs, const i8* w, const float* ws, const float* bias, float* y, Int8Params p) {
    DYNAMIC_SHARED(shared);
    matmul_int8_tile<Int8FewTile>(shared, x, xs, w, ws, bias, y, p);
}
#endif
