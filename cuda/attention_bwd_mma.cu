// op:       attention_bwd
// math:     as attention.cu: P = exp(scores - lse), delta = rowsum(dy y), dS = P (dy v^T - delta)
//           dv = P^T dy, dq = scale dS k, dk = scale dS^T q, dbias = sum over b of dS
// grad:     none
// shapes:   rows: y[B,T,H,D], dy, lse[B,H,T], stats[2,B,H,T to whole 64s]; q: q, k[B,S,H,D], v, context[B], lengths[B],
//           bias[H,T,S], dy, stats, dq; kv: the same up to stats, dk, dv; bias: the same, dbias; D is a multiple of 8, at most HEAD
// layout:   contiguous; the plan puts arguments into slots, an absent optional input is any read argument and never read
// launch:   linear blocks of 128 threads: 64 query rows (q), 64 key rows (kv), 64 x 64 pairs (bias), 16 rows (rows); shared rows
//           of HEAD + 8 elements: 128 + 4 STEP (q, kv; kv has 4 STEP floats more), 256 (bias)
// cost:     14 B H T S D flops (q and kv both recompute scores)
// numerics: f32 sums; P and dS are rounded once, to the storage type, for the second product, P in f16 times 2^8 backward;
//           no atomics: every sum has one order; hidden keys matter to nobody, not even as NaN;
//           nor do queries matter to keys that they do not see; infinite values may come out as NaN
// source:   Dao et al. 2022; Dao 2023 (FlashAttention-2)
// rungs:    v2: a block keeps its rows and their gradients, the others stream through shared memory in two stages; v1 is attention.cu

#if defined(HEAD) && (ARCH >= 80 || defined(ESPALIER_HOST))

extern "C" __global__ void __launch_bounds__(128)
attention_bwd_rows_mma(const E* y, const E* dy, const float* lse, float* stats, AttentionParams p) {
    attention_rows(y, dy, lse, stats, p);
}

// dq of BACK rows; keys and values stream past in two stages.
extern "C" __global__ void __launch_bounds__(128, HEAD == 64 || HEAD == 96 ? 3 : 2)
attention_bwd_q_mma(const E* q, const E* k, const E* v, const u32* context, const u32* lengths, const E* bias, const E* dy,
                    const float* stats, E* dq, AttentionParams p) {
    DYNAMIC_SHARED(bytes);
    E *q_tile = (E*)bytes, *dy_tile = q_tile + BACK * PITCH, *stages = dy_tile + BACK * PITCH;
    Place at = place_of(p, p.queries, BACK, (p.flags & 3u) != 0u);
    if (at.b >= p.batch) return;
    u64 start = start_of(p, at.b, at.h, p.queries), key_start = start_of(p, at.b, at.h, p.keys);
    Visible visible = visible_of(context, lengths, p, at.b);
    u32 end = visible.count(min(at.first + BACK, p.queries) - 1u);
    u32 lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 16u, row0 = at.first + own;
    u32 least = visible.count(row0), most = row0 < p.queries ? visible.count(min(row0 + 16u, p.queries) - 1u) : 0u;
    u32 n[2];
    float lse[2], delta[2], sum[1][HEAD / 8][4], slope = p.scale * LOG2_E, factor = (p.flags & 8u) != 0u ? 1.0f : slope;
    stats += ((u64)at.b * p.heads + at.h) * padded_rows(p);
#pragma unroll
    for (u32 r = 0; r < 2u; r++) {
        u32 row = row0 + r * 8u + lane / 4u;
        n[r] = visible.count(min(row, p.queries - 1u));
        lse[r] = stats[row];
        delta[r] = stats[(u64)p.batch * p.heads * padded_rows(p) + row];
    }
    clear<1>(sum);
    bias += (u64)at.h * p.queries * p.keys;

    auto load = [&](u32 base) {
        E* stage = stages + base / STEP % 2u * (2u * STEP * PITCH);
        load_rows<STEP>(stage, k + key_start, base, end, p);
        load_rows<STEP>(stage + STEP * PITCH, v + key_start, base, end, p);
    };
    load_rows<BACK>(q_tile, q + start, at.first, p.queries, p);
    load_rows<BACK>(dy_tile, dy + start, at.first, p.queries, p);
    load(0u);
    cp_async_commit();
    Left<1> query, gradient;
    query.rows = q_tile + own * PITCH;
    gradient.rows = dy_tile + own * PITCH;
    for (u32 base = 0; base < end; base += STEP) {
        // This stage has come, and all warps are done with the other.
        cp_async_wait<0>();
        __syncthreads();
        if (base + STEP < end) load(base + STEP);
        cp_async_commit();
        if (base == 0u) {
            query.keep();
            gradient.keep();
        }
        if (base >= most) continue;
        const E* stage = stages + base / STEP % 2u * (2u * STEP * PITCH);
        float score[1][STEP / 8][4], ds[1][STEP / 8][4];
        multiply<1, STEP>(score, query, stage);
        multiply<1, STEP>(ds, gradient, stage + STEP * PITCH);
        if ((p.flags & 8u) != 0u) add_bias<1, STEP>(score, bias, n, row0, base, slope, p);
        weigh_rows<STEP>(score, lse, factor, n, base, least);
        slope_rows<STEP>(ds, score, delta);
#pragma unroll
        for (u32 j = 0; j < STEP / 16u; j++) {
            u32 key = base + j * 16u;
            if (key >= most) continue;
            auto sees = [&](int, int half, u32 i) { return key + i < n[half]; };
            add_rows<1, STEP>(sum, ds, j, stage + j * 16u * PITCH, key + 16u > least, sees);
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    put_rows(q_tile + own * PITCH, sum[0], p.scale, p.scale);
    __syncwarp();
    store_rows<16>(dq + start, q_tile + own * PITCH, row0, p.queries, p);
}

// dk and dv of BACK key rows; queries and their gradients stream past in two stages. Scores are held transposed, so that
// they are the left operand of the second product as they are.
extern "C" __global__ void __launch_bounds__(128, HEAD == 32 || HEAD == 96 && ARCH != 90 ? 3 : 2)
attention_bwd_kv_mma(const E* q, const E* k, const E* v, const u32* context, const u32* lengths, const E* bias, const E* dy,
                     const float* stats, E* dk, E* dv, AttentionParams p) {
    DYNAMIC_SHARED(bytes);
    E *k_tile = (E*)bytes, *v_tile = k_tile + BACK * PITCH, *stages = v_tile + BACK * PITCH;
    float* stat_stages = (float*)(stages + 4u * STEP * PITCH);
    Place at = place_of(p, p.keys, BACK, false);
    if (at.b >= p.batch) return;
    u64 start = start_of(p, at.b, at.h, p.keys), query_start = start_of(p, at.b, at.h, p.queries);
    Visible visible = visible_of(context, lengths, p, at.b);
    u32 seen = visible.count(p.queries - 1u);
    u32 lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 16u, key0 = at.first + own;
    u32 key[2] = {key0 + lane / 4u, key0 + 8u + lane / 4u};
    float sum_k[1][HEAD / 8][4], sum_v[1][HEAD / 8][4];
    clear<1>(sum_k);
    clear<1>(sum_v);
    bias += (u64)at.h * p.queries * p.keys;
    stats += ((u64)at.b * p.heads + at.h) * padded_rows(p);
    u64 plane = (u64)p.batch * p.heads * padded_rows(p);
    // Steps start at multiples of STEP: their rows of stats are there up to the padding.
    u32 first = visible.first(at.first, p.queries) / STEP * STEP;
    if (at.first >= seen) first = p.queries;

    auto load = [&](u32 base) {
        u32 which = base / STEP % 2u;
        E* stage = stages + which * (2u * STEP * PITCH);
        load_rows<STEP>(stage, q + query_start, base, p.queries, p);
        load_rows<STEP>(stage + STEP * PITCH, dy + query_start, base, p.queries, p);
        u32 i = threadIdx.x * 4u;
        if (i < 2u * STEP) cp_async_16(stat_stages + which * 2u * STEP + i, stats + (i < STEP ? 0u : plane) + base + i % STEP, 16);
    };
    load_rows<BACK>(k_tile, k + start, at.first, min(seen, p.keys), p);
    load_rows<BACK>(v_tile, v + start, at.first, min(seen, p.keys), p);
    if (first < p.queries) load(first);
    cp_async_commit();
    Left<1> left_k, left_v;
    left_k.rows = k_tile + own * PITCH;
    left_v.rows = v_tile + own * PITCH;
    for (u32 base = first; base < p.queries; base += STEP) {
        // This stage has come, and all warps are done with the other.
        cp_async_wait<0>();
        __syncthreads();
        if (base + STEP < p.queries) load(base + STEP);
        cp_async_commit();
        if (base == first) {
            left_k.keep();
            left_v.keep();
        }
        if (key0 >= visible.count(min(base + STEP, p.queries) - 1u)) continue;
        const E* stage = stages + base / STEP % 2u * (2u * STEP * PITCH);
        const float* stat = stat_stages + base / STEP % 2u * 2u * STEP;
        float weight[1][STEP / 8][4], ds[1][STEP / 8][4];
        multiply<1, STEP>(weight, left_k, stage);
        multiply<1, STEP>(ds, left_v, stage + STEP * PITCH);
        weigh_columns<STEP>(weight, stat, bias, key0, base, visible, p);
        slope_columns<STEP>(ds, weight, stat + STEP);
#pragma unroll
        for (u32 j = 0; j < STEP / 16u; j++) {
            u32 t = base + j * 16u;
            if (t >= p.queries || key0 >= visible.count(min(t + 16u, p.queries) - 1u)) continue;
            bool mixed = t + 16u > p.queries || key0 + 16u > visible.count(t);
            auto sees = [&](int, int half, u32 i) { return t + i < p.queries && key[half] < visible.count(t + i); };
            add_rows<1, STEP>(sum_v, weight, j, stage + (STEP + j * 16u) * PITCH, mixed, sees);
            add_rows<1, STEP>(sum_k, ds, j, stage + j * 16u * PITCH, mixed, sees);
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    put_rows(k_tile + own * PITCH, sum_k[0], p.scale, p.scale);
    put_rows(v_tile + own * PITCH, sum_v[0], UNSHIFT, UNSHIFT);
    __syncwarp();
    store_rows<16>(dk + start, k_tile + own * PITCH, key0, p.keys, p);
    store_rows<16>(dv + start, v_tile + own * PITCH, key0, p.keys, p);
}

extern "C" __global__ void __launch_bounds__(128)
attention_bwd_bias_mma(const E* q, const E* k, const E* v, const u32* context, const u32* lengths, const E* bias, const E* dy,
                       const float* stats, E* dbias, AttentionParams p) {
    DYNAMIC_SHARED(bytes);
    attention_bias(bytes, q, k, v, context, lengths, bias, dy, stats, dbias, p);
}

#endif
