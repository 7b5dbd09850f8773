// op:       ffn_relu, ffn_gelu, ffn_geglu, their backward
// math:     z = x w1ᵀ + b1, h = relu(z), gelu(z) or gelu(z_gate) z_value, y = h w2ᵀ + b2;
//           dh = dy w2, dz = dh act'(z), dx = dz w1, dw1 = dzᵀ x, dw2 = dyᵀ h, db1 = sum dz, db2 = sum dy
// grad:     ffn_bwd
// shapes:   up: a[R, K], b[K, C], bias[C], sums[R, C]; down: a[R, K] (h, dz), b[K, C], bias[C], c[R, C] (y, dx, dw1, dw2); act: sums[R, F'], z[R, F'], h[R, F];
//           slope: z[R, F'], dh[R, F], h[R, F], dz[R, F']; sum: values[R, C] (E or f32), db[C] (db1, db2); F' = F or 2 F
// layout:   products by strides of both sides and of the result; the hidden layer in f32 scratch
// launch:   products 64 threads as 8x8, 8x8 outputs each; act, slope one element, sum one column per thread
// cost:     forward 2 R D (F' + F) flop, backward twice that
// numerics: f32 sums in the order of k or of rows; hidden values never rounded to 16 bits on the way
// source:   GELU: Hendrycks and Gimpel 2016; GEGLU: Shazeer 2020
// rungs:    v1 8x8 outputs in registers, no barriers

struct FfnParams {
    u32 rows, columns, k;
    u32 a_row, a_column, b_row, b_column, c_row, c_column;
    // Products: whether a bias is added. Elementwise: 0 ReLU, 1 GELU, 2 GEGLU.
    u32 mode;
};

// Either side of a product may be f32 scratch or storage; with f32 storage these 16-bit forms stand unused.
__device__ __forceinline__ float get(float x) { return x; }
__device__ __forceinline__ float get(u16 x) { return ld(x); }
__device__ __forceinline__ void put(float* c, float x) { *c = x; }
__device__ __forceinline__ void put(u16* c, float x) { *c = st(x); }

// c = a b (+ bias), 8x8 outputs of one thread.
template <class A, class C>
__device__ __forceinline__ void product(const A* a, const E* b, const E* bias, C* c, const FfnParams& p) {
    u32 row = (blockIdx.y * 8u + threadIdx.x / 8u) * 8u, column = (blockIdx.x * 8u + threadIdx.x % 8u) * 8u;
    if (row >= p.rows || column >= p.columns) return;
    const A* rows[8];
    const E* columns[8];
#pragma unroll
    for (u32 i = 0; i < 8u; i++) {
        // Those past the end repeat the last, whose output is not stored.
        rows[i] = a + (u64)min(row + i, p.rows - 1u) * p.a_row;
        columns[i] = b + (u64)min(column + i, p.columns - 1u) * p.b_column;
    }
    float t[8][8] = {};
    for (u32 k = 0; k < p.k; k++) {
        u64 at_a = (u64)k * p.a_column, at_b = (u64)k * p.b_row;
        float right[8];
#pragma unroll
        for (u32 j = 0; j < 8u; j++) right[j] = ld(columns[j][at_b]);
#pragma unroll
        for (u32 i = 0; i < 8u; i++) {
            float left = get(rows[i][at_a]);
#pragma unroll
            for (u32 j = 0; j < 8u; j++) t[i][j] += left * right[j];
        }
    }
#pragma unroll
    for (u32 j = 0; j < 8u; j++) {
        if (column + j >= p.columns) continue;
        float shift = p.mode == 1u ? ld(bias[column + j]) : 0.0f;
#pragma unroll
        for (u32 i = 0; i < 8u; i++)
            if (row + i < p.rows) put(c + (u64)(row + i) * p.c_row + (u64)(column + j) * p.c_column, t[i][j] + shift);
    }
}

// Stored a, f32 result: z before it is rounded, dh.
extern "C" __global__ void __launch_bounds__(64) ffn_up(const E* a, const E* b, const E* bias, float* sums, FfnParams p) {
    product(a, b, bias, sums, p);
}

// f32 a, stored result: y, dx, dw1, and dw2 by the strides of its transpose.
extern "C" __global__ void __launch_bounds__(64) ffn_down(const float* a, const E* b, const E* bias, E* c, FfnParams p) {
    product(a, b, bias, c, p);
}

// exp's argument is bounded so that it stays finite: s = sigmoid(2 u), gelu = x s.
__device__ __forceinline__ float sigmoid_2u(float x) {
    return 1.0f / (1.0f + expf(fminf(-1.5957691216f * (x + 0.044715f * x * x * x), 80.0f)));
}

__device__ __forceinline__ float gelu_slope(float x) {
    float s = sigmoid_2u(x);
    return s + x * s * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * x * x);
}

// One element of h per thread; z is stored on the way.
extern "C" __global__ void __launch_bounds__(64) ffn_act(const float* sums, E* z_out, float* h_out, FfnParams p) {
    u32 i = linear_id();
    if (i >= p.rows * p.columns) return;
    if (p.mode == 2u) {
        u64 at = (u64)(i / p.columns) * p.columns * 2u + i % p.columns;
        float gate = sums[at], value = sums[at + p.columns];
        z_out[at] = st(gate);
        z_out[at + p.columns] = st(value);
        h_out[i] = gate * sigmoid_2u(gate) * value;
        return;
    }
    float z = sums[i];
    z_out[i] = st(z);
    // A NaN is not below 0 and stays.
    h_out[i] = p.mode == 0u ? (z < 0.0f ? 0.0f : z) : z * sigmoid_2u(z);
}

extern "C" __global__ void __launch_bounds__(64) ffn_slope(const E* z_in, const float* dh_in, float* h_out, float* dz, FfnParams p) {
    u32 i = linear_id();
    if (i >= p.rows * p.columns) return;
    float dh = dh_in[i];
    if (p.mode == 2u) {
        u64 at = (u64)(i / p.columns) * p.columns * 2u + i % p.columns;
        float gate = ld(z_in[at]), value = ld(z_in[at + p.columns]);
        float gelu = gate * sigmoid_2u(gate);
        h_out[i] = gelu * value;
        dz[at] = dh * value * gelu_slope(gate);
        dz[at + p.columns] = dh * gelu;
        return;
    }
    float z = ld(z_in[i]);
    if (p.mode == 0u) {
        h_out[i] = z < 0.0f ? 0.0f : z;
        dz[i] = z > 0.0f ? dh : 0.0f;
    } else {
        h_out[i] = z * sigmoid_2u(z);
        dz[i] = dh * gelu_slope(z);
    }
}

// Column sums, rows first to last.
template <class A>
__device__ __forceinline__ void column_sum(const A* values, E* db, const FfnParams& p) {
    u32 column = linear_id();
    if (column >= p.columns) return;
    float sum = 0.0f;
    for (u32 row = 0; row < p.rows; row++) sum += get(values[(u64)row * p.columns + column]);
    db[column] = st(sum);
}

extern "C" __global__ void __launch_bounds__(64) ffn_sum_f32(const float* values, E* db, FfnParams p) { column_sum(values, db, p); }

extern "C" __global__ void __launch_bounds__(64) ffn_sum(const E* values, E* db, FfnParams p) { column_sum(values, db, p); }
