// op:       matmul_sparse24, matmul_sparse24_int8
// math:     y[i, j] = sum_g v[j, 2g] x[i, 4g + p0] + v[j, 2g + 1] x[i, 4g + p1] (+ bias[j]); int8: times xs[i] ws[j]
// grad:     x and values through decompress24, gather24 and matmul; int8: none
// shapes:   x[M, K], values[N, K/2], meta[N, ceil(K/32)], bias[N], y[M, N];
//           int8: x[M, K] i8, xs[M], values[N, K/2] i8, meta, ws[N], bias[N], y[M, N] f32
// layout:   meta: two bits per kept place, eight groups of four to a word; i8 four to a word
// launch:   linear, 64 threads a block; one thread per element (v1, int8) or per 4 rows of one column (v2)
// cost:     M N K operations: half of dense; K/2 values and K/8 bytes of places read per column
// numerics: f32 sums in the order of k; int8: exact int32 sums, then three roundings
// source:   Mishra et al. 2021
// rungs:    v1 one element; v2 four rows share the values and places they meet

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
