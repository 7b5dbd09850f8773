// op:       grouped_matmul, grouped_matmul_int8, grouped_matmul_bwd_input, grouped_matmul_bwd_weight
// math:     y[r, j] = f(sum_c x[row(r), c] w[e(r), j, c] + b[e(r), j]), e(r) the expert whose sorted rows hold r
// grad:     dx[r, c] = sum_j dz[r, j] w[e(r), j, c]; dw[e, j, c] = sum_{r in e} dz[r, j] x[row(r), c]; db[e, j] = sum dz[r, j]
// shapes:   fwd: x[M, D], w[E, N, D], b[E, N], order[R], offsets[E + 1], y[R, N]; int8: x i8, xs[M], w i8, ws[E, N], b, order,
//           offsets, y; bwd_input: dz[R, N], w, offsets, dx[R, D]; bwd_weight: dz, x, order, offsets, dw[E, N, D];
//           bwd_bias: dz, x, order, offsets, db[E, N]
// layout:   rows contiguous; i8 four to a word, little endian, rows need not start on words
// launch:   linear, 64 threads a block: four columns of a row (fwd), one element else; mma: 128 threads, 128x128 outputs (small: 64x64),
//           tiles of columns in x, as many tiles of rows in y as experts can need at most: each block finds its own by the offsets;
//           bwd_weight_mma: db and then tiles of columns in x, tiles of rows in y, experts in z
// cost:     2 R N D operations; weights of experts without rows are never read
// numerics: f32 sums in rising order of the summed axis (db in mma: of every 8th or 16th row, then of these); int8: exact int32
//           sums, then three roundings
// source:   Shazeer et al. 2017; MoEfication: Zhang et al. 2022
// rungs:    v1 as above; mma (f16, bf16) tensor instructions, rows gathered as they are copied, all experts in one launch; small_mma rows
//           of any alignment

struct GroupedParams { u32 rows, n, d, k, gather, experts, relu, bias; };
struct GroupedBackParams { u32 rows, n, d, k, gather, experts; };

// The expert of sorted row r: the last whose rows start at or before it.
__device__ __forceinline__ u32 expert_of(const u32* offsets, u32 experts, u32 r) {
    u32 e = 0u;
    for (u32 next = 1u; next < experts; next++) {
        if (offsets[next] <= r) e = next;
    }
    return e;
}

extern "C" __global__ void __launch_bounds__(64) grouped_matmul_fwd(const E* x, const E* w, const E* b, const u32* order, const u32* offsets, E* y, GroupedParams p) {
    u32 id = linear_id(), quads = div_up(p.n, 4u);
    u32 r = id / quads, j = id % quads * 4u;
    if (r >= p.rows) return;
    u32 first = expert_of(offsets, p.experts, r) * p.n;
    x += (u64)(p.gather == 1u ? min(order[r], p.rows - 1u) / p.k : r) * p.d;
    const E* row[4];
    float sum[4] = {};
    // Columns past the edge repeat the last one; what they make is not stored.
#pragma unroll
    for (u32 q = 0u; q < 4u; q++) row[q] = w + (u64)(first + min(j + q, p.n - 1u)) * p.d;
    for (u32 c = 0u; c < p.d; c++) {
        float value = ld(x[c]);
#pragma unroll
        for (u32 q = 0u; q < 4u; q++) sum[q] += value * ld(row[q][c]);
    }
#pragma unroll
    for (u32 q = 0u; q < 4u; q++) {
        if (j + q >= p.n) break;
        float z = sum[q];
        if (p.bias == 1u) z += ld(b[first + j + q]);
        if (p.relu == 1u && z < 0.0f) z = 0.0f;
        y[(u64)r * p.n + j + q] = st(z);
    }
}

extern "C" __global__ void __launch_bounds__(64) grouped_matmul_int8_fwd(const i8* x, const float* xs, const i8* w, const float* ws, const float* b, const u32* order, const u32* offsets, float* y, GroupedParams p) {
    u32 id = linear_id(), r = id / p.n, j = id % p.n;
    if (r >= p.rows) return;
    u32 column = expert_of(offsets, p.experts, r) * p.n + j;
    u32 row = p.gather == 1u ? min(order[r], p.rows - 1u) / p.k : r;
    x += (u64)row * p.d;
    w += (u64)column * p.d;
    int sum = 0;
    if ((p.d & 3u) == 0u) {
        for (u32 c = 0u; c < p.d / 4u; c++) sum = __dp4a(((const int*)x)[c], ((const int*)w)[c], sum);
    } else {
        for (u32 c = 0u; c < p.d; c++) sum += (int)x[c] * (int)w[c];
    }
    float z = (float)sum * xs[row] * ws[column];
    // Rounded by itself: a fused sum would differ from what other devices give.
    if (p.bias == 1u) z = __fadd_rn(z, b[column]);
    if (p.relu == 1u && z < 0.0f) z = 0.0f;
    y[id] = z;
}

extern "C" __global__ void __launch_bounds__(64) grouped_matmul_bwd_input(const E* dz, const E* w, const u32* offsets, E* dx, GroupedBackParams p) {
    u32 id = linear_id(), r = id / p.d;
    if (r >= p.rows) return;
    w += (u64)expert_of(offsets, p.experts, r) * p.n * p.d + id % p.d;
    dz += (u64)r * p.n;
    float sum = 0.0f;
    for (u32 j = 0u; j < p.n; j++) sum += ld(dz[j]) * ld(w[(u64)j * p.d]);
    dx[id] = st(sum);
}

// The bias has a launch of its own, with db in the place of dw.
extern "C" __global__ void __launch_bounds__(64) grouped_matmul_bwd_weight(const E* dz, const E* x, const u32* order, const u32* offsets, E* dw, void*, GroupedBackParams p) {
    u32 id = linear_id(), column = id / p.d;
    u32 e = column / p.n;
    if (e >= p.experts) return;
    u32 j = column % p.n, c = id % p.d;
    float sum = 0.0f;
    for (u32 r = offsets[e]; r < min(offsets[e + 1u], p.rows); r++) {
        u32 row = p.gather == 1u ? min(order[r], p.rows - 1u) / p.k : r;
        sum += ld(dz[(u64)r * p.n + j]) * ld(x[(u64)row * p.d + c]);
    }
    dw[id] = st(sum);
}

extern "C" __global__ void __launch_bounds__(64) grouped_matmul_bwd_bias(const E* dz, const void*, const void*, const u32* offsets, E* db, GroupedBackParams p) {
    u32 id = linear_id(), e = id / p.n;
    if (e >= p.experts) return;
    float sum = 0.0f;
    for (u32 r = offsets[e]; r < min(offsets[e + 1u], p.rows); r++) sum += ld(dz[(u64)r * p.n + id % p.n]);
    db[id] = st(sum);
}

#ifdef TENSOR_16

// Where the sorted rows of an expert start; those of the one past the last: their number. Offsets are data and stay inside.
__device__ __forceinline__ u32 grouped_start(const u32* offsets, u32 experts, u32 rows, u32 e) {
    if (e == 0u) return 0u;
    return e < experts ? min(offsets[e], rows) : rows;
}

// A tile of rows of one expert.
struct GroupedTile {
    u32 expert, first, count;
    // Row of the tile within the expert's.
    u32 row;
};

// Tile `wanted` of all experts' tiles in order, found by every warp for itself: sums over 32 experts at a time. False past the last.
__device__ __forceinline__ bool grouped_tile(GroupedTile& tile, const u32* offsets, u32 experts, u32 rows, u32 height, u32 wanted) {
    u32 lane = threadIdx.x % WARP, before = 0u;
    for (u32 base = 0u; base < experts; base += WARP) {
        u32 e = base + lane, start = rows, end = rows;
        if (e < experts) {
            start = grouped_start(offsets, experts, rows, e);
            end = grouped_start(offsets, experts, rows, e + 1u);
        }
        u32 count = end > start ? end - start : 0u, tiles = div_up(count, height), sum = tiles;
#pragma unroll
        for (u32 by = 1u; by < WARP; by *= 2u) {
            u32 got = __shfl_up_sync(ALL_LANES, sum, by);
            if (lane >= by) sum += got;
        }
        u32 past = __ballot_sync(ALL_LANES, before + sum > wanted);
        if (past) {
            u32 at = (u32)__ffs((int)past) - 1u;
            tile.expert = base + at;
            tile.first = __shfl_sync(ALL_LANES, start, at);
            tile.count = __shfl_sync(ALL_LANES, count, at);
            tile.row = (wanted - before - __shfl_sync(ALL_LANES, sum - tiles, at)) * height;
            return true;
        }
        before += __shfl_sync(ALL_LANES, sum, WARP - 1u);
    }
    return false;
}

// Rows of x in sorted order, from an expert's first: gathered by `order`, or sorted already.
struct GroupedRows {
    const E* base;
    const u32* order;
    u32 step, rows, inner;
    u64 plane;
    bool aligned, gather;
    u32 first, last, k;
    __device__ __forceinline__ const E* row(u32 r, bool& inside) const {
        inside = r < rows;
        if (!inside) return base;
        u32 at = first + r;
        // An order is data: slots past the end count as the last.
        if (gather) at = min(order[at], last) / k;
        return base + (u64)at * step;
    }
};

// Bias where there is one, ReLU, storage.
struct GroupedStore {
    const E* bias;
    E* y;
    u32 rows, columns;
    bool relu;

    template <u32 DOWN, u32 RIGHT>
    __device__ __forceinline__ void operator()(float (&sums)[DOWN][RIGHT][4], u32 row, u32 column, u8*) const {
        float shift[RIGHT][2] = {};
        if (bias) {
#pragma unroll
            for (u32 j = 0; j < RIGHT; j++) {
#pragma unroll
                for (u32 q = 0; q < 2u; q++) shift[j][q] = column + j * 8u + q < columns ? ld(bias[column + j * 8u + q]) : 0.0f;
            }
        }
#pragma unroll
        for (u32 i = 0; i < 2u * DOWN; i++) {
            u32 r = row + i * 8u, pairs[RIGHT];
            bool inside = r < rows;
#pragma unroll
            for (u32 j = 0; j < RIGHT; j++) {
                float z[2];
#pragma unroll
                for (u32 q = 0; q < 2u; q++) {
                    z[q] = sums[i / 2u][j][i % 2u * 2u + q] + shift[j][q];
                    // A NaN is not below 0 and stays.
                    if (relu && z[q] < 0.0f) z[q] = 0.0f;
                }
                pairs[j] = round_pair(z[0], z[1]);
            }
            gemm_store_row<RIGHT>(y + (u64)(inside ? r : 0u) * columns, pairs, inside, column, columns, columns % 8u == 0u);
        }
    }
};

template <class Shape, bool ODD>
__device__ __forceinline__ void grouped_forward(const E* x, const E* w, const E* b, const u32* order, const u32* offsets, E* y, const GroupedParams& p) {
    DYNAMIC_SHARED(shared);
    u32 row, column;
    gemm_tile(row, column);
    GroupedTile tile;
    if (!grouped_tile(tile, offsets, p.experts, p.rows, Shape::ROWS, row)) return;
    column *= Shape::COLUMNS;
    bool aligned = p.d % 8u == 0u;
    GroupedRows left = {x, order, p.d, tile.count, p.d, 0, aligned, p.gather == 1u, tile.first, p.rows - 1u, p.k};
    GemmRows right = {w + (u64)tile.expert * p.n * p.d, p.d, p.n, p.d, 0, aligned};
    GroupedStore finish = {p.bias == 1u ? b + (u64)tile.expert * p.n : nullptr, y + (u64)tile.first * p.n, tile.count, p.n, p.relu == 1u};
    gemm<Shape, true, true, 1, 1, ODD>(left, right, tile.row, column, p.d, shared, finish);
}

template <class Shape, bool ODD>
__device__ __forceinline__ void grouped_input(const E* dz, const E* w, const u32* offsets, E* dx, const GroupedBackParams& p) {
    DYNAMIC_SHARED(shared);
    u32 row, column;
    gemm_tile(row, column);
    GroupedTile tile;
    if (!grouped_tile(tile, offsets, p.experts, p.rows, Shape::ROWS, row)) return;
    column *= Shape::COLUMNS;
    GemmRows left = {dz + (u64)tile.first * p.n, p.n, tile.count, p.n, 0, p.n % 8u == 0u};
    GemmRows right = {w + (u64)tile.expert * p.n * p.d, p.d, p.n, p.d, 0, p.d % 8u == 0u};
    GroupedStore finish = {nullptr, dx + (u64)tile.first * p.d, tile.count, p.d, false};
    gemm<Shape, true, false, 1, 1, ODD>(left, right, tile.row, column, p.n, shared, finish);
}

// Column sums of an expert's rows of dz for the columns of one tile: a thread sums eight columns of every few rows.
template <class Shape, bool ODD>
__device__ __forceinline__ void grouped_bias(const E* dz, E* db, u32 count, u32 n, u32 first, u8* shared) {
    const u32 ACROSS = Shape::ROWS / 8u, DOWN = Shape::THREADS / ACROSS;
    float (*parts)[Shape::ROWS] = (float (*)[Shape::ROWS])shared;
    u32 within = threadIdx.x % ACROSS * 8u, down = threadIdx.x / ACROSS;
    u32 valid = first + within < n ? min(n - first - within, 8u) : 0u;
    float sums[8] = {};
    if (!ODD || n % 8u == 0u) {
        if (valid) {
#pragma unroll 4
            for (u32 r = down; r < count; r += DOWN) {
                float values[8];
                unpack_vector(values, load_vector(dz + (u64)r * n + first + within));
#pragma unroll
                for (u32 i = 0; i < 8u; i++) sums[i] += values[i];
            }
        }
    } else {
        for (u32 r = down; r < count; r += DOWN) {
#pragma unroll
            for (u32 i = 0; i < 8u; i++) {
                if (i < valid) sums[i] += ld(dz[(u64)r * n + first + within + i]);
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < 8u; i++) parts[down][within + i] = sums[i];
    __syncthreads();
    if (threadIdx.x >= Shape::ROWS || first + threadIdx.x >= n) return;
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < DOWN; i++) sum += parts[i][threadIdx.x];
    db[first + threadIdx.x] = st(sum);
}

// The expert's rows are the axis that is summed.
template <class Shape, bool ODD>
__device__ __forceinline__ void grouped_weight(const E* dz, const E* x, const u32* order, const u32* offsets, E* dw, E* db, const GroupedBackParams& p) {
    DYNAMIC_SHARED(shared);
    u32 e = blockIdx.z, first = grouped_start(offsets, p.experts, p.rows, e), end = grouped_start(offsets, p.experts, p.rows, e + 1u);
    u32 count = end > first ? end - first : 0u, row = blockIdx.y * Shape::ROWS;
    dz += (u64)first * p.n;
    if (blockIdx.x == 0u) {
        grouped_bias<Shape, ODD>(dz, db + (u64)e * p.n, count, p.n, row, shared);
        return;
    }
    GemmRows left = {dz, p.n, count, p.n, 0, p.n % 8u == 0u};
    GroupedRows right = {x, order, p.d, count, p.d, 0, p.d % 8u == 0u, p.gather == 1u, first, p.rows - 1u, p.k};
    GroupedStore finish = {nullptr, dw + (u64)e * p.n * p.d, p.n, p.d, false};
    gemm<Shape, false, false, 1, 1, ODD>(left, right, row, (blockIdx.x - 1u) * Shape::COLUMNS, count, shared, finish);
}

#endif

#if ARCH >= 80 || defined(ESPALIER_HOST)

extern "C" __global__ void __launch_bounds__(128, 2)
    grouped_matmul_fwd_mma(const E* x, const E* w, const E* b, const u32* order, const u32* offsets, E* y, GroupedParams p) {
    TENSOR_ONLY(grouped_forward<GemmLarge, false>(x, w, b, order, offsets, y, p);)
}

extern "C" __global__ void __launch_bounds__(128)
    grouped_matmul_fwd_small_mma(const E* x, const E* w, const E* b, const u32* order, const u32* offsets, E* y, GroupedParams p) {
    TENSOR_ONLY(grouped_forward<GemmSmall, true>(x, w, b, order, offsets, y, p);)
}

extern "C" __global__ void __launch_bounds__(128, 2)
    grouped_matmul_bwd_input_mma(const E* dz, const E* w, const u32* offsets, E* dx, GroupedBackParams p) {
    TENSOR_ONLY(grouped_input<GemmLarge, false>(dz, w, offsets, dx, p);)
}

extern "C" __global__ void __launch_bounds__(128)
    grouped_matmul_bwd_input_small_mma(const E* dz, const E* w, const u32* offsets, E* dx, GroupedBackParams p) {
    TENSOR_ONLY(grouped_input<GemmSmall, true>(dz, w, offsets, dx, p);)
}

extern "C" __global__ void __launch_bounds__(128, 2)
    grouped_matmul_bwd_weight_mma(const E* dz, const E* x, const u32* order, const u32* offsets, E* dw, E* db, GroupedBackParams p) {
    TENSOR_ONLY(grouped_weight<GemmLarge, false>(dz, x, order, offsets, dw, db, p);)
}

extern "C" __global__ void __launch_bounds__(128)
    grouped_matmul_bwd_weight_small_mma(const E* dz, const E* x, const u32* order, const u32* offsets, E* dw, E* db, GroupedBackParams p) {
    TENSOR_ONLY(grouped_weight<GemmSmall, true>(dz, x, order, offsets, dw, db, p);)
}

#endif
