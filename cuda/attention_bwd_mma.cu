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

// What the other entries need of a query row: lse in base 2 and delta, both shifted; rows past the end hold zeros.
__device__ __forceinline__ u32 padded_rows(const AttentionParams& p) { return div_up(p.queries, 64u) * 64u; }

extern "C" __global__ void __launch_bounds__(128)
attention_bwd_rows_mma(const E* y, const E* dy, const float* lse, float* stats, AttentionParams p) {
    // Eight lanes a row.
    u32 padded = padded_rows(p), total = p.batch * p.heads * padded, item = linear_block() * 16u + threadIdx.x / 8u;
    u32 t = item % padded, head = item / padded;
    bool there = item < total && t < p.queries;
    float delta = 0.0f;
    if (there) {
        u64 row = (((u64)(head / p.heads) * p.queries + t) * p.heads + head % p.heads) * p.dim;
        for (u32 d = threadIdx.x % 8u * 8u; d < p.dim; d += 64u) {
            uint4 a = *(const uint4*)(y + row + d), b = *(const uint4*)(dy + row + d);
            u32 left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                delta += ld((u16)left[i]) * ld((u16)right[i]);
                delta += ld((u16)(left[i] >> 16)) * ld((u16)(right[i] >> 16));
            }
        }
    }
    for (int offset = 1; offset < 8; offset *= 2) delta += __shfl_xor_sync(ALL_LANES, delta, offset);
    if (threadIdx.x % 8u != 0u || item >= total) return;
    stats[item] = there ? lse[(u64)head * p.queries + t] * LOG2_E - SHIFT : 0.0f;
    stats[(u64)total + item] = delta * UNSHIFT;
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
        bool partly = base + STEP > least;
#pragma unroll
        for (u32 j = 0; j < STEP / 2u; j++) {
            u32 r = j % 4u / 2u, key = base + j / 4u * 8u + lane % 4u * 2u + j % 2u;
            bool live = !partly || key < n[r];
            float weight = power2(score[0][j / 4u][j % 4u] * factor - lse[r]), x = ds[0][j / 4u][j % 4u];
            ds[0][j / 4u][j % 4u] = live ? weight * (x * UNSHIFT - delta[r]) : 0.0f;
        }
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
extern "C" __global__ void __launch_bounds__(128)
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
    float sum_k[1][HEAD / 8][4], sum_v[1][HEAD / 8][4], slope = p.scale * LOG2_E, factor = (p.flags & 8u) != 0u ? 1.0f : slope;
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
        if ((p.flags & 8u) != 0u) {
#pragma unroll
            for (u32 j = 0; j < STEP / 2u; j++) {
                u32 r = j % 4u / 2u, t = base + j / 4u * 8u + lane % 4u * 2u + j % 2u;
                if (j % 8u == 0u) __syncwarp();
                float* w = &weight[0][j / 4u][j % 4u];
                if (t < p.queries && key[r] < visible.count(t)) *w = *w * slope + ld(bias[t * p.keys + key[r]]) * LOG2_E;
            }
        }
        bool partly = base + STEP > p.queries || key0 + 16u > visible.count(base);
#pragma unroll
        for (u32 j = 0; j < STEP / 4u; j++) {
            u32 n = j / 2u, i = j % 2u, column = n * 8u + lane % 4u * 2u + i, t = base + column;
            float lse = stat[column], delta = stat[STEP + column];
            u32 sees = t < p.queries ? visible.count(t) : 0u;
#pragma unroll
            for (u32 r = 0; r < 2u; r++) {
                bool live = !partly || key[r] < sees;
                float *w = &weight[0][n][r * 2u + i], *x = &ds[0][n][r * 2u + i];
                *w = live ? power2(*w * factor - lse) : 0.0f;
                *x = live ? *w * (*x * UNSHIFT - delta) : 0.0f;
            }
        }
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

// dbias of BACK queries and BACK keys of one head, summed over the batch in order.
extern "C" __global__ void __launch_bounds__(128)
attention_bwd_bias_mma(const E* q, const E* k, const E* v, const u32* context, const u32* lengths, const E* bias, const E* dy,
                       const float* stats, E* dbias, AttentionParams p) {
    DYNAMIC_SHARED(bytes);
    E *q_tile = (E*)bytes, *dy_tile = q_tile + BACK * PITCH, *k_tile = dy_tile + BACK * PITCH, *v_tile = k_tile + BACK * PITCH;
    u32 across = div_up(p.keys, BACK), down = div_up(p.queries, BACK), item = linear_block();
    u32 first_key = item % across * BACK, first = item / across % down * BACK, h = item / across / down;
    if (h >= p.heads) return;
    u32 lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 16u, padded = padded_rows(p);
    float slope = p.scale * LOG2_E, sum[BACK / 8][4] = {};
    bias += (u64)h * p.queries * p.keys;
    dbias += (u64)h * p.queries * p.keys;
    for (u32 b = 0; b < p.batch; b++) {
        Visible visible = visible_of(context, lengths, p, b);
        u32 end = visible.count(min(first + BACK, p.queries) - 1u);
        if (first_key >= end) continue;
        u64 start = start_of(p, b, h, p.queries), key_start = start_of(p, b, h, p.keys);
        // All warps are done with the last sequence.
        __syncthreads();
        load_rows<BACK>(q_tile, q + start, first, p.queries, p);
        load_rows<BACK>(dy_tile, dy + start, first, p.queries, p);
        load_rows<BACK>(k_tile, k + key_start, first_key, end, p);
        load_rows<BACK>(v_tile, v + key_start, first_key, end, p);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        Left<1, false> query, gradient;
        query.rows = q_tile + own * PITCH;
        gradient.rows = dy_tile + own * PITCH;
        u32 n[2];
        float lse[2], delta[2];
#pragma unroll
        for (u32 r = 0; r < 2u; r++) {
            u32 t = first + own + r * 8u + lane / 4u;
            u64 item = ((u64)b * p.heads + h) * padded + t;
            n[r] = t < p.queries ? visible.count(t) : 0u;
            lse[r] = stats[item];
            delta[r] = stats[(u64)p.batch * p.heads * padded + item];
        }
        // Half of the keys at a time: registers are for the sums.
#pragma unroll
        for (u32 part = 0; part < BACK; part += 32u) {
            float score[1][4][4], slopes[1][4][4];
            __syncwarp();
            multiply<1, 32, 1>(score, query, k_tile + part * PITCH);
            multiply<1, 32, 1>(slopes, gradient, v_tile + part * PITCH);
#pragma unroll
            for (u32 j = 0; j < 16u; j++) {
                u32 r = j % 4u / 2u, t = first + own + r * 8u + lane / 4u, key = first_key + part + j / 4u * 8u + lane % 4u * 2u + j % 2u;
                if (key < n[r]) {
                    float exponent = score[0][j / 4u][j % 4u] * slope - lse[r] + ld(bias[t * p.keys + key]) * LOG2_E;
                    sum[part / 8u + j / 4u][j % 4u] += power2(exponent) * (slopes[0][j / 4u][j % 4u] * UNSHIFT - delta[r]);
                }
            }
        }
    }
#pragma unroll
    for (u32 j = 0; j < BACK / 2u; j++) {
        u32 t = first + own + j % 4u / 2u * 8u + lane / 4u, key = first_key + j / 4u * 8u + lane % 4u * 2u + j % 2u;
        if (t < p.queries && key < p.keys) dbias[t * p.keys + key] = st(sum[j / 4u][j % 4u]);
    }
}

#endif
