// op:       relative_bias, relative_bias_bwd
// math:     bias[h, t, s] = table[h, bucket(s - t - offset)]; bucket of a distance: ids, and the second half of the buckets
//           for keys after the query (both sides) or the bucket of distance 0 for them
// grad:     dtable[h, b] = sum of dbias over the pairs of bucket b
// shapes:   fwd: table[H,C], ids[R], bias[H,T,S]; bwd_diagonals: dbias[H,T,S], sums[H,T+S-1]; bwd_buckets: sums, ids, dtable[H,C]
// layout:   contiguous; diagonal g of a head holds the pairs with s - t + T - 1 = g
// launch:   linear, 64 threads a block: one pair (fwd), one diagonal (bwd_diagonals), one bucket (bwd_buckets) each
// cost:     H T S elements moved once
// numerics: fwd copies; f32 sums in order of t, then in order of diagonals
// source:   Raffel et al. 2020
// rungs:    v1

struct RelativeParams { u32 heads, queries, keys, count, reach, offset, both_sides; };

// Bucket of diagonal g.
__device__ __forceinline__ u32 bucket_of(const u32* ids, const RelativeParams& p, u32 g) {
    u32 behind = p.queries - 1u + p.offset, reach = 0u, side = 0u;
    if (g <= behind) reach = behind - g;
    else if (p.both_sides != 0u) {
        reach = g - behind;
        side = p.count / 2u;
    }
    return min(ids[min(reach, p.reach - 1u)] + side, p.count - 1u);
}

extern "C" __global__ void __launch_bounds__(64) relative_fwd(const E* table, const u32* ids, E* bias, RelativeParams p) {
    u32 item = linear_id();
    if (item >= p.heads * p.queries * p.keys) return;
    u32 s = item % p.keys, row = item / p.keys, g = s + p.queries - 1u - row % p.queries;
    bias[item] = table[row / p.queries * p.count + bucket_of(ids, p, g)];
}

extern "C" __global__ void __launch_bounds__(64) relative_bwd_diagonals(const E* dbias, float* sums, RelativeParams p) {
    u32 item = linear_id(), diagonals = p.queries + p.keys - 1u;
    if (item >= p.heads * diagonals) return;
    u32 g = item % diagonals, head = item / diagonals * p.queries;
    // s = g - (T - 1) + t lies in 0..S.
    float sum = 0.0f;
    u32 first = max(g, p.queries - 1u) - g, last = min(p.queries, p.keys + p.queries - 1u - g);
    for (u32 t = first; t < last; t++) sum += ld(dbias[(u64)(head + t) * p.keys + (g + t + 1u - p.queries)]);
    sums[item] = sum;
}

extern "C" __global__ void __launch_bounds__(64)
relative_bwd_buckets(const float* sums, const u32* ids, E* dtable, RelativeParams p) {
    u32 item = linear_id();
    if (item >= p.heads * p.count) return;
    u32 diagonals = p.queries + p.keys - 1u, start = item / p.count * diagonals, own = item % p.count;
    float sum = 0.0f;
    for (u32 g = 0; g < diagonals; g++)
        if (bucket_of(ids, p, g) == own) sum += sums[start + g];
    dtable[item] = st(sum);
}
