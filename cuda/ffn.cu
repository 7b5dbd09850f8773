// op:       ffn_relu, ffn_gelu, ffn_geglu, their backward
// math:     z = x w1ᵀ + b1, h = relu(z), gelu(z) or gelu(z_gate) z_value, y = h w2ᵀ + b2;
//           dh = dy w2, dz = dh act'(z), dx = dz w1, dw1 = dzᵀ x, dw2 = dyᵀ h, db1 = sum dz, db2 = sum dy
// grad:     ffn_bwd
// shapes:   up: a[R, K], b[K, C], bias[C], sums[R, C]; down: a[R, K] (h, dz), b[K, C], bias[C], c[R, C] (y, dx, dw1, dw2); act: sums[R, F'], z[R, F'], h[R, F];
//           slope: z[R, F'], dh[R, F], h[R, F], dz[R, F']; sum: values[R, C] (E or f32), db[C] (db1, db2); F' = F or 2 F
// layout:   products by strides of both sides and of the result; the hidden layer in f32 scratch
// launch:   products 64 threads as 8x8, 8x8 outputs each; act, slope one element, sum one column per thread;
//           mma: 128 threads, 128x128 outputs (small: 64x64), tiles of columns in x, of rows in y
// cost:     forward 2 R D (F' + F) flop, backward twice that
// numerics: f32 sums in the order of k or of rows; v1 never rounds hidden values to 16 bits on the way, mma rounds h and dz once, to what
//           the next product multiplies (h from the unrounded z); db1 and db2 by tiles of rows, then over the tiles, from unrounded dz
// source:   GELU: Hendrycks and Gimpel 2016; GEGLU: Shazeer 2020
// rungs:    v1 8x8 outputs in registers, no barriers; mma (f16, bf16) tensor instructions, activation, its slope and db1 in the
//           products' epilogues

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

// One element of h per thread; z is stored on the way.
extern "C" __global__ void __launch_bounds__(64) ffn_act(const float* sums, E* z_out, float* h_out, FfnParams p) {
    u32 i = linear_id();
    if (i >= p.rows * p.columns) return;
    if (p.mode == 2u) {
        u64 at = (u64)(i / p.columns) * p.columns * 2u + i % p.columns;
        float gate = sums[at], value = sums[at + p.columns];
        z_out[at] = st(gate);
        z_out[at + p.columns] = st(value);
        h_out[i] = gate * gelu_gate(gate) * value;
        return;
    }
    float z = sums[i];
    z_out[i] = st(z);
    // A NaN is not below 0 and stays.
    h_out[i] = p.mode == 0u ? (z < 0.0f ? 0.0f : z) : z * gelu_gate(z);
}

extern "C" __global__ void __launch_bounds__(64) ffn_slope(const E* z_in, const float* dh_in, float* h_out, float* dz, FfnParams p) {
    u32 i = linear_id();
    if (i >= p.rows * p.columns) return;
    float dh = dh_in[i];
    if (p.mode == 2u) {
        u64 at = (u64)(i / p.columns) * p.columns * 2u + i % p.columns;
        float gate = ld(z_in[at]), value = ld(z_in[at + p.columns]);
        float gelu = gate * gelu_gate(gate);
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
        h_out[i] = z * gelu_gate(z);
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

struct FfnTensorParams {
    u32 rows, d, f, d2;
    // 0 ReLU, 1 GELU, 2 GEGLU.
    u32 mode;
    __device__ __forceinline__ u32 hidden() const { return mode == 2u ? 2u * f : f; }
    // Rows of h and dz in scratch start at multiples of 16 bytes.
    __device__ __forceinline__ u32 h_step() const { return (f + 7u) / 8u * 8u; }
    __device__ __forceinline__ u32 dz_step() const { return (hidden() + 7u) / 8u * 8u; }
};

#ifdef TENSOR_16

// Rows of a matrix [rows, inner] without gaps; k is its rows or its columns.
__device__ __forceinline__ GemmRows ffn_rows(const E* base, u32 rows, u32 inner) { return {base, inner, rows, inner, 0, inner % 8u == 0u}; }
// Hidden values in scratch.
__device__ __forceinline__ GemmRows ffn_hidden(const E* base, u32 rows, u32 inner, u32 step) { return {base, step, rows, inner, 0, true}; }

// w1 of GEGLU with eight gates and their eight values in turn, so that a lane gets both of an element.
struct FfnGates {
    const E* base;
    u32 inner, f;
    u64 plane;
    bool aligned, pairs;
    __device__ __forceinline__ const E* row(u32 r, bool& inside) const {
        u32 j = pairs ? r / 16u * 8u + r % 8u : r;
        inside = j < f;
        return inside ? base + (u64)(pairs && r & 8u ? f + j : j) * inner : base;
    }
};

__device__ __forceinline__ void ffn_bias(float (&shift)[2], const E* bias, u32 column, u32 columns) {
#pragma unroll
    for (u32 q = 0; q < 2u; q++) shift[q] = column + q < columns ? ld(bias[column + q]) : 0.0f;
}

// z = sums + b1 to memory, h = act(z) from the unrounded z to scratch.
struct FfnUpStore {
    const E* bias;
    E* z_out;
    E* h_out;
    const FfnTensorParams& p;

    template <u32 DOWN, u32 RIGHT>
    __device__ __forceinline__ void operator()(float (&sums)[DOWN][RIGHT][4], u32 row, u32 column, u8*) const {
        if (p.mode == 2u) gated(sums, row, column);
        else plain(sums, row, column);
    }

    template <u32 DOWN, u32 RIGHT>
    __device__ __forceinline__ void plain(float (&sums)[DOWN][RIGHT][4], u32 row, u32 column) const {
#pragma unroll
        for (u32 first = 0; first < RIGHT; first += 4u) {
            float shift[4][2];
            u32 at = column + first * 8u;
#pragma unroll
            for (u32 j = 0; j < 4u; j++) ffn_bias(shift[j], bias, at + j * 8u, p.f);
#pragma unroll
            for (u32 i = 0; i < 2u * DOWN; i++) {
                u32 r = row + i * 8u, z_pairs[4], h_pairs[4];
#pragma unroll
                for (u32 j = 0; j < 4u; j++) {
                    float z[2], h[2];
#pragma unroll
                    for (u32 q = 0; q < 2u; q++) {
                        z[q] = sums[i / 2u][first + j][i % 2u * 2u + q] + shift[j][q];
                        // A NaN is not below 0 and stays.
                        h[q] = p.mode == 0u ? (z[q] < 0.0f ? 0.0f : z[q]) : z[q] * gelu_gate(z[q]);
                    }
                    z_pairs[j] = pack_pair(st(z[0]), st(z[1]));
                    h_pairs[j] = pack_pair(st(h[0]), st(h[1]));
                }
                bool inside = r < p.rows;
                u64 line = inside ? r : 0u;
                gemm_store_row<4>(z_out + line * p.f, z_pairs, inside, at, p.f, p.f % 8u == 0u);
                gemm_store_row<4>(h_out + line * p.h_step(), h_pairs, inside, at, p.f, true);
            }
        }
    }

    // Fragments alternate between gates and values.
    template <u32 DOWN, u32 RIGHT>
    __device__ __forceinline__ void gated(float (&sums)[DOWN][RIGHT][4], u32 row, u32 column) const {
        const u32 HALF = RIGHT / 2u;
        u32 t2 = threadIdx.x % 4u * 2u, at = (column - t2) / 2u + t2;
#pragma unroll
        for (u32 i = 0; i < 2u * DOWN; i++) {
            u32 r = row + i * 8u, gates[HALF], values[HALF], h_pairs[HALF];
#pragma unroll
            for (u32 j = 0; j < HALF; j++) {
                float gate_shift[2], value_shift[2], gate[2], value[2], h[2];
                ffn_bias(gate_shift, bias, at + j * 8u, p.f);
                ffn_bias(value_shift, bias + p.f, at + j * 8u, p.f);
#pragma unroll
                for (u32 q = 0; q < 2u; q++) {
                    gate[q] = sums[i / 2u][2u * j][i % 2u * 2u + q] + gate_shift[q];
                    value[q] = sums[i / 2u][2u * j + 1u][i % 2u * 2u + q] + value_shift[q];
                    h[q] = gate[q] * gelu_gate(gate[q]) * value[q];
                }
                gates[j] = pack_pair(st(gate[0]), st(gate[1]));
                values[j] = pack_pair(st(value[0]), st(value[1]));
                h_pairs[j] = pack_pair(st(h[0]), st(h[1]));
            }
            bool inside = r < p.rows, aligned = p.f % 8u == 0u;
            u64 line = inside ? r : 0u;
            gemm_store_row<HALF>(z_out + line * 2u * p.f, gates, inside, at, p.f, aligned);
            gemm_store_row<HALF>(z_out + line * 2u * p.f + p.f, values, inside, at, p.f, aligned);
            gemm_store_row<HALF>(h_out + line * p.h_step(), h_pairs, inside, at, p.f, true);
        }
    }
};

// Sums, with a bias where there is one.
struct FfnStore {
    const E* bias;
    E* out;
    u32 rows, columns;

    template <u32 DOWN, u32 RIGHT>
    __device__ __forceinline__ void operator()(float (&sums)[DOWN][RIGHT][4], u32 row, u32 column, u8*) const {
        float shift[RIGHT][2] = {};
        if (bias) {
#pragma unroll
            for (u32 j = 0; j < RIGHT; j++) ffn_bias(shift[j], bias, column + j * 8u, columns);
        }
#pragma unroll
        for (u32 i = 0; i < 2u * DOWN; i++) {
            u32 r = row + i * 8u, pairs[RIGHT];
#pragma unroll
            for (u32 j = 0; j < RIGHT; j++)
                pairs[j] = pack_pair(st(sums[i / 2u][j][i % 2u * 2u] + shift[j][0]), st(sums[i / 2u][j][i % 2u * 2u + 1u] + shift[j][1]));
            gemm_store_row<RIGHT>(out + (u64)(r < rows ? r : 0u) * columns, pairs, r < rows, column, columns, columns % 8u == 0u);
        }
    }
};

// The sums are dh. h again from the stored z, and dz, to scratch; the tile's column sums of dz to partial_db1[tile of rows, hidden].
template <class Shape>
struct FfnSlopeStore {
    const E* z_in;
    E* h_out;
    E* dz_out;
    float* partial;
    const FfnTensorParams& p;

    __device__ __forceinline__ void pair(float (&z)[2], const E* line, bool inside, u32 column) const {
#pragma unroll
        for (u32 q = 0; q < 2u; q++) z[q] = 0.0f;
        if (!inside || column >= p.f) return;
        if (p.f % 8u == 0u) {
            u32 word = *(const u32*)(line + column);
            z[0] = ld((E)(u16)word);
            z[1] = ld((E)(u16)(word >> 16));
        } else {
            z[0] = ld(line[column]);
            if (column + 1u < p.f) z[1] = ld(line[column + 1u]);
        }
    }

    __device__ __forceinline__ void operator()(float (&sums)[Shape::DOWN][Shape::RIGHT][4], u32 row, u32 column, u8* shared) const {
        const u32 HIGH = Shape::ROWS / Shape::WARP_ROWS;
        // Sums of each row of warps: of dz or of the gates', then of the values'.
        float (*columns)[HIGH][Shape::COLUMNS] = (float (*)[HIGH][Shape::COLUMNS])shared;
        u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, parts = p.mode == 2u ? 2u : 1u;
        u32 tile_row = row / Shape::ROWS, tile_column = column / Shape::COLUMNS;
        // The last stages have been read by every warp.
        __syncthreads();
#pragma unroll
        for (u32 first = 0; first < Shape::RIGHT; first += 4u) {
            float total[2][4][2] = {};
            u32 at = column + first * 8u;
#pragma unroll
            for (u32 i = 0; i < 2u * Shape::DOWN; i++) {
                u32 r = row + i * 8u, h_pairs[4], dz_pairs[2][4];
                bool inside = r < p.rows;
                u64 line = inside ? r : 0u;
                const E* z_line = z_in + line * p.hidden();
#pragma unroll
                for (u32 j = 0; j < 4u; j++) {
                    float z[2], value[2], h[2], dz[2], dvalue[2];
                    pair(z, z_line, inside, at + j * 8u);
                    if (p.mode == 2u) pair(value, z_line + p.f, inside, at + j * 8u);
#pragma unroll
                    for (u32 q = 0; q < 2u; q++) {
                        // Nothing outside counts, whatever the weights hold.
                        float dh = inside ? sums[i / 2u][first + j][i % 2u * 2u + q] : 0.0f;
                        if (p.mode == 0u) {
                            h[q] = z[q] < 0.0f ? 0.0f : z[q];
                            dz[q] = z[q] > 0.0f ? dh : 0.0f;
                        } else {
                            h[q] = z[q] * gelu_gate(z[q]);
                            dz[q] = dh * gelu_slope(z[q]);
                            if (p.mode == 2u) {
                                dz[q] *= value[q];
                                dvalue[q] = dh * h[q];
                                h[q] *= value[q];
                                total[1][j][q] += dvalue[q];
                            }
                        }
                        total[0][j][q] += dz[q];
                    }
                    h_pairs[j] = pack_pair(st(h[0]), st(h[1]));
                    dz_pairs[0][j] = pack_pair(st(dz[0]), st(dz[1]));
                    if (p.mode == 2u) dz_pairs[1][j] = pack_pair(st(dvalue[0]), st(dvalue[1]));
                }
                gemm_store_row<4>(h_out + line * p.h_step(), h_pairs, inside, at, p.f, true);
                // With two parts the room after the first belongs to the second.
                bool aligned = p.mode != 2u || p.f % 8u == 0u;
                E* to = dz_out + line * p.dz_step();
                gemm_store_row<4>(to, dz_pairs[0], inside, at, p.f, aligned);
                if (p.mode == 2u) gemm_store_row<4>(to + p.f, dz_pairs[1], inside, at, p.f, aligned);
            }
            for (u32 part = 0; part < parts; part++) {
#pragma unroll
                for (u32 j = 0; j < 4u; j++) {
#pragma unroll
                    for (u32 q = 0; q < 2u; q++) {
                        float sum = part ? total[1][j][q] : total[0][j][q];
                        for (u32 offset = 4u; offset < 32u; offset *= 2u) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
                        if (lane < 4u) columns[part][warp / Shape::ACROSS][at + j * 8u + q - tile_column * Shape::COLUMNS] = sum;
                    }
                }
            }
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < parts * Shape::COLUMNS; i += Shape::THREADS) {
            u32 part = i / Shape::COLUMNS, within = i % Shape::COLUMNS, c = tile_column * Shape::COLUMNS + within;
            if (c >= p.f) continue;
            float sum = 0.0f;
            for (u32 high = 0; high < HIGH; high++) sum += columns[part][high][within];
            partial[(u64)tile_row * p.hidden() + part * p.f + c] = sum;
        }
    }
};

// The block's tile of a product over k.
template <class Shape, bool A_ALONG_K, bool B_ALONG_K, bool ODD, class B, class Epilogue>
__device__ __forceinline__ void ffn_product(const GemmRows& a, const B& b, u32 k, Epilogue finish) {
    DYNAMIC_SHARED(shared);
    u32 row, column;
    gemm_tile(row, column);
    gemm<Shape, A_ALONG_K, B_ALONG_K, 1, 1, ODD>(a, b, row * Shape::ROWS, column * Shape::COLUMNS, k, shared, finish);
}

template <class Shape, bool ODD>
__device__ __forceinline__ void ffn_up_tile(const E* x, const E* w1, const E* b1, E* z, E* h, const FfnTensorParams& p) {
    FfnGates right = {w1, p.d, p.f, 0, p.d % 8u == 0u, p.mode == 2u};
    ffn_product<Shape, true, true, ODD>(ffn_rows(x, p.rows, p.d), right, p.d, FfnUpStore{b1, z, h, p});
}

template <class Shape, bool ODD>
__device__ __forceinline__ void ffn_down_tile(const E* h, const E* w2, const E* b2, E* y, const FfnTensorParams& p) {
    ffn_product<Shape, true, true, ODD>(ffn_hidden(h, p.rows, p.f, p.h_step()), ffn_rows(w2, p.d2, p.f), p.f, FfnStore{b2, y, p.rows, p.d2});
}

template <class Shape, bool ODD>
__device__ __forceinline__ void ffn_slope_tile(const E* dy, const E* w2, const E* z, E* h, E* dz, float* partial, const FfnTensorParams& p) {
    ffn_product<Shape, true, false, ODD>(ffn_rows(dy, p.rows, p.d2), ffn_rows(w2, p.d2, p.f), p.d2, FfnSlopeStore<Shape>{z, h, dz, partial, p});
}

template <class Shape, bool ODD>
__device__ __forceinline__ void ffn_dx_tile(const E* dz, const E* w1, E* dx, const FfnTensorParams& p) {
    ffn_product<Shape, true, false, ODD>(ffn_hidden(dz, p.rows, p.hidden(), p.dz_step()), ffn_rows(w1, p.hidden(), p.d), p.hidden(),
                                              FfnStore{nullptr, dx, p.rows, p.d});
}

template <class Shape, bool ODD>
__device__ __forceinline__ void ffn_dw1_tile(const E* dz, const E* x, E* dw1, const FfnTensorParams& p) {
    ffn_product<Shape, false, false, ODD>(ffn_hidden(dz, p.rows, p.hidden(), p.dz_step()), ffn_rows(x, p.rows, p.d), p.rows, FfnStore{nullptr, dw1, p.hidden(), p.d});
}

template <class Shape, bool ODD>
__device__ __forceinline__ void ffn_dw2_tile(const E* dy, const E* h, E* dw2, const FfnTensorParams& p) {
    ffn_product<Shape, false, false, ODD>(ffn_rows(dy, p.rows, p.d2), ffn_hidden(h, p.rows, p.f, p.h_step()), p.rows, FfnStore{nullptr, dw2, p.d2, p.f});
}

#endif

#if ARCH >= 80 || defined(ESPALIER_HOST)

extern "C" __global__ void __launch_bounds__(128, 2) ffn_up_mma(const E* x, const E* w1, const E* b1, E* z, E* h, FfnTensorParams p) {
    TENSOR_ONLY(ffn_up_tile<GemmLarge, false>(x, w1, b1, z, h, p);)
}

extern "C" __global__ void __launch_bounds__(128, 2) ffn_down_mma(const E* h, const E* w2, const E* b2, E* y, FfnTensorParams p) {
    TENSOR_ONLY(ffn_down_tile<GemmLarge, false>(h, w2, b2, y, p);)
}

extern "C" __global__ void __launch_bounds__(128, 2) ffn_slope_mma(const E* dy, const E* w2, const E* z, E* h, E* dz, float* partial, FfnTensorParams p) {
    TENSOR_ONLY(ffn_slope_tile<GemmLarge, false>(dy, w2, z, h, dz, partial, p);)
}

extern "C" __global__ void __launch_bounds__(128, 2) ffn_dx_mma(const E* dz, const E* w1, E* dx, FfnTensorParams p) {
    TENSOR_ONLY(ffn_dx_tile<GemmLarge, false>(dz, w1, dx, p);)
}

extern "C" __global__ void __launch_bounds__(128, 2) ffn_dw1_mma(const E* dz, const E* x, E* dw1, FfnTensorParams p) {
    TENSOR_ONLY(ffn_dw1_tile<GemmLarge, false>(dz, x, dw1, p);)
}

extern "C" __global__ void __launch_bounds__(128, 2) ffn_dw2_mma(const E* dy, const E* h, E* dw2, FfnTensorParams p) {
    TENSOR_ONLY(ffn_dw2_tile<GemmLarge, false>(dy, h, dw2, p);)
}

extern "C" __global__ void __launch_bounds__(128) ffn_up_small_mma(const E* x, const E* w1, const E* b1, E* z, E* h, FfnTensorParams p) {
    TENSOR_ONLY(ffn_up_tile<GemmSmall, true>(x, w1, b1, z, h, p);)
}

extern "C" __global__ void __launch_bounds__(128) ffn_down_small_mma(const E* h, const E* w2, const E* b2, E* y, FfnTensorParams p) {
    TENSOR_ONLY(ffn_down_tile<GemmSmall, true>(h, w2, b2, y, p);)
}

extern "C" __global__ void __launch_bounds__(128) ffn_slope_small_mma(const E* dy, const E* w2, const E* z, E* h, E* dz, float* partial, FfnTensorParams p) {
    TENSOR_ONLY(ffn_slope_tile<GemmSmall, true>(dy, w2, z, h, dz, partial, p);)
}

extern "C" __global__ void __launch_bounds__(128) ffn_dx_small_mma(const E* dz, const E* w1, E* dx, FfnTensorParams p) {
    TENSOR_ONLY(ffn_dx_tile<GemmSmall, true>(dz, w1, dx, p);)
}

extern "C" __global__ void __launch_bounds__(128) ffn_dw1_small_mma(const E* dz, const E* x, E* dw1, FfnTensorParams p) {
    TENSOR_ONLY(ffn_dw1_tile<GemmSmall, true>(dz, x, dw1, p);)
}

extern "C" __global__ void __launch_bounds__(128) ffn_dw2_small_mma(const E* dy, const E* h, E* dw2, FfnTensorParams p) {
    TENSOR_ONLY(ffn_dw2_tile<GemmSmall, true>(dy, h, dw2, p);)
}

// Column sums of 128 rows of dy to partial[tile of rows, d2]; ffn_sum_f32 adds the tiles.
extern "C" __global__ void __launch_bounds__(128) ffn_partial_mma(const E* dy, float* partial, FfnTensorParams p) {
    u32 column = blockIdx.x * 128u + threadIdx.x, first = blockIdx.y * 128u;
    if (column >= p.d2) return;
    float sum = 0.0f;
#pragma unroll 8
    for (u32 row = first; row < min(first + 128u, p.rows); row++) sum += ld(dy[(u64)row * p.d2 + column]);
    partial[(u64)blockIdx.y * p.d2 + column] = sum;
}

#endif
