// op:       grouped_matmul, grouped_matmul_int8, grouped_matmul_bwd_input, grouped_matmul_bwd_weight
// math:     y[r, j] = f(sum_c x[row(r), c] w[e(r), j, c] + b[e(r), j]), e(r) the expert whose sorted rows hold r
// grad:     dx[r, c] = sum_j dz[r, j] w[e(r), j, c]; dw[e, j, c] = sum_{r in e} dz[r, j] x[row(r), c]; db[e, j] = sum dz[r, j]
// shapes:   fwd: x[M, D], w[E, N, D], b[E, N], order[R], offsets[E + 1], y[R, N]; int8: x i8, xs[M], w i8, ws[E, N], b, order,
//           offsets, y; bwd_input: dz[R, N], w, offsets, dx[R, D]; bwd_weight: dz, x, order, offsets, dw[E, N, D];
//           bwd_bias: dz, x, order, offsets, db[E, N]
// layout:   rows contiguous; i8 four to a word, little endian, rows need not start on words
// launch:   linear, 64 threads a block: four columns of a row (fwd), one element else
// cost:     2 R N D operations; weights of experts without rows are never read
// numerics: f32 sums in rising order of the summed axis; int8: exact int32 sums, then three roundings
// source:   Shazeer et al. 2017; MoEfication: Zhang et al. 2022
// rungs:    v1 as above

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
    x += (u64)(p.gather == 1u ? order[r] / p.k : r) * p.d;
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
    u32 row = p.gather == 1u ? order[r] / p.k : r;
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
        u32 row = p.gather == 1u ? order[r] / p.k : r;
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
