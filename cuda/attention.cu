// op:       attention, attention_bwd
// math:     y = softmax(scale q k^T + bias) v over the visible keys; lse = log sum exp of the scores
//           P = exp(scores - lse), delta = rowsum(dy y), dS = P (dy v^T - delta)
//           dv = P^T dy, dq = scale dS k, dk = scale dS^T q, dbias = sum over b of dS
// grad:     attention_bwd_rows, then attention_bwd_q, attention_bwd_kv and attention_bwd_bias
// shapes:   slots of fwd: q[B,T,H,D], k[B,S,H,D], v[B,S,H,D], context[B], lengths[B], bias[H,T,S], y[B,T,H,D], lse[B,H,T];
//           part: q, k, v, context, lengths, bias, state[B,H,T,D+2]; finish: state, y, lse
//           bwd_rows: y, dy, lse, context, lengths, stats[B,H,T,3]; bwd_q: q, k, v, bias, dy, stats, dq (bwd_q_part: total[B,T,H,D]);
//           bwd_kv: q, k, v, bias, dy, stats, dk, dv (bwd_kv_part: total[2,B,S,H,D]); bwd_bias: q, k, v, bias, dy, stats, dbias;
//           bwd_store: total, one of dq, dk, dv
// layout:   contiguous; the plan puts arguments into slots, an absent optional input is any read argument and never read
// launch:   linear, 64 threads a block: one query row (fwd, bwd_q), one key row (bwd_kv) or one pair (bwd_bias) each
// cost:     4 B H T S D flops forward, 10 backward (14 here: bwd_q and bwd_kv both recompute scores)
// numerics: f32 sums in key order, in blocks of 4; masks leave a prefix of the keys visible, hidden keys are never loaded;
//           a row without keys gives y = 0 and lse = MASKED
// source:   online softmax: Milakov and Gimelshein 2018; backward without scores in memory: Dao et al. 2022
// rungs:    v1 one row per thread, 4 keys at a time; part: the same over a range of keys, state in f32 between launches

struct AttentionParams {
    u32 batch, queries, keys, heads, dim;
    u32 flags, offset;
    float scale;
    // Range of keys, queries or elements of this launch.
    u32 first, last;
};

// Largest head dimension: rows live in arrays of the thread.
#define DIM 128

// Every mask leaves a prefix of the keys visible: how many, for query row t.
__device__ u32 visible_keys(const u32* context, const u32* lengths, const AttentionParams& p, u32 b, u32 t) {
    u32 n = p.keys, mask = p.flags & 3u;
    if (mask != 0u) {
        u32 seen = t + p.offset + 1u;
        if (mask == 2u) seen = max(seen, context[b]);
        n = min(n, seen);
    }
    if ((p.flags & 4u) != 0u) n = min(n, lengths[b]);
    return n;
}

// Item (b, h, n) with n fastest, of `extent` rows; the start of that row in a [B, N, H, D] tensor.
struct Row { u32 b, h, n; u64 start; };
__device__ __forceinline__ Row row_of(const AttentionParams& p, u32 item, u32 extent) {
    u32 n = item % extent, head = item / extent, h = head % p.heads, b = head / p.heads;
    return Row{b, h, n, (((u64)b * extent + n) * p.heads + h) * p.dim};
}

// Start of row 0 of the batch and head of `row` in a [B, N, H, D] tensor of `extent` rows; rows lie H D apart.
__device__ __forceinline__ u64 first_of(const AttentionParams& p, const Row& row, u32 extent) {
    return ((u64)row.b * extent * p.heads + row.h) * p.dim;
}

// Four rows from `first`; those past the end repeat the last of `count`.
__device__ __forceinline__ void four(u32* index, u32 first, u32 count) {
#pragma unroll
    for (u32 j = 0; j < 4u; j++) index[j] = min(first + j, count - 1u);
}

// score[j] += row . (row index[j] of x)
__device__ __forceinline__ void dot4(float* score, const float* row, const E* x, const u32* index, const AttentionParams& p) {
    u64 stride = (u64)p.heads * p.dim;
    const E *x0 = x + index[0] * stride, *x1 = x + index[1] * stride, *x2 = x + index[2] * stride, *x3 = x + index[3] * stride;
    for (u32 d = 0; d < p.dim; d++) {
        float value = row[d];
        score[0] += value * ld(x0[d]);
        score[1] += value * ld(x1[d]);
        score[2] += value * ld(x2[d]);
        score[3] += value * ld(x3[d]);
    }
}

// sum = sum factor + the four rows of x by their weights
__device__ __forceinline__ void add4(float* sum, float factor, const float* weight, const E* x, const u32* index, const AttentionParams& p) {
    u64 stride = (u64)p.heads * p.dim;
    const E *x0 = x + index[0] * stride, *x1 = x + index[1] * stride, *x2 = x + index[2] * stride, *x3 = x + index[3] * stride;
    for (u32 d = 0; d < p.dim; d++)
        sum[d] = sum[d] * factor + (weight[0] * ld(x0[d]) + weight[1] * ld(x1[d]) + weight[2] * ld(x2[d]) + weight[3] * ld(x3[d]));
}

// Largest score and total of one query row over keys first..last of its n visible ones; `sum` takes the weighted values.
struct Online { float largest, total; };
__device__ __forceinline__ Online
attend(float* sum, const float* query, const E* k, const E* v, const E* bias, const AttentionParams& p, const Row& row, u32 n, Online state) {
    u64 base = first_of(p, row, p.keys);
    bias += ((u64)row.h * p.queries + row.n) * p.keys;
    for (u32 s = p.first; s < min(n, p.last); s += 4u) {
        // Rows past the end repeat the last visible key and weigh nothing.
        u32 key[4];
        four(key, s, n);
        float score[4] = {}, weight[4];
        dot4(score, query, k + base, key, p);
        float largest = state.largest;
#pragma unroll
        for (u32 j = 0; j < 4u; j++) {
            if ((p.flags & 8u) != 0u) score[j] += ld(bias[key[j]]);
            if (s + j < n) largest = fmaxf(largest, score[j]);
        }
        float correction = expf(state.largest - largest), total = state.total * correction;
#pragma unroll
        for (u32 j = 0; j < 4u; j++) {
            weight[j] = s + j < n ? expf(score[j] - largest) : 0.0f;
            total += weight[j];
        }
        state = Online{largest, total};
        add4(sum, correction, weight, v + base, key, p);
    }
    return state;
}

__device__ __forceinline__ void load_query(float* query, float* sum, const E* q, const AttentionParams& p) {
    for (u32 d = 0; d < p.dim; d++) {
        query[d] = ld(q[d]) * p.scale;
        sum[d] = 0.0f;
    }
}

extern "C" __global__ void __launch_bounds__(64)
attention_fwd(const E* q, const E* k, const E* v, const u32* context, const u32* lengths, const E* bias, E* y, float* lse_out, AttentionParams p) {
    u32 item = linear_id();
    if (item >= p.batch * p.heads * p.queries) return;
    Row row = row_of(p, item, p.queries);
    u32 n = visible_keys(context, lengths, p, row.b, row.n);
    float query[DIM], sum[DIM];
    load_query(query, sum, q + row.start, p);
    Online state = attend(sum, query, k, v, bias, p, row, n, Online{MASKED, 0.0f});
    float inverse = 0.0f, lse = MASKED;
    if (n > 0u) {
        inverse = 1.0f / state.total;
        lse = state.largest + logf(state.total);
    }
    for (u32 d = 0; d < p.dim; d++) y[row.start + d] = st(sum[d] * inverse);
    lse_out[item] = lse;
}

// One range of keys: state of an item is D sums, the largest score and the total.
extern "C" __global__ void __launch_bounds__(64)
attention_fwd_part(const E* q, const E* k, const E* v, const u32* context, const u32* lengths, const E* bias, float* kept, AttentionParams p) {
    u32 item = linear_id();
    if (item >= p.batch * p.heads * p.queries) return;
    Row row = row_of(p, item, p.queries);
    u32 n = visible_keys(context, lengths, p, row.b, row.n);
    kept += (u64)item * (p.dim + 2u);
    float query[DIM], sum[DIM];
    load_query(query, sum, q + row.start, p);
    Online state = {MASKED, 0.0f};
    if (p.first > 0u) {
        for (u32 d = 0; d < p.dim; d++) sum[d] = kept[d];
        state = Online{kept[p.dim], kept[p.dim + 1u]};
    }
    state = attend(sum, query, k, v, bias, p, row, n, state);
    for (u32 d = 0; d < p.dim; d++) kept[d] = sum[d];
    kept[p.dim] = state.largest;
    kept[p.dim + 1u] = state.total;
}

extern "C" __global__ void __launch_bounds__(64) attention_fwd_finish(const float* kept, E* y, float* lse_out, AttentionParams p) {
    u32 item = linear_id();
    if (item >= p.batch * p.heads * p.queries) return;
    Row row = row_of(p, item, p.queries);
    kept += (u64)item * (p.dim + 2u);
    float total = kept[p.dim + 1u], inverse = 0.0f, lse = MASKED;
    // The largest score of a row with keys weighs 1, so its total is at least 1; a NaN total must get through.
    if (total != 0.0f) {
        inverse = 1.0f / total;
        lse = kept[p.dim] + logf(total);
    }
    for (u32 d = 0; d < p.dim; d++) y[row.start + d] = st(kept[d] * inverse);
    lse_out[item] = lse;
}

// What the other entries need of a query row: lse, delta, and how many keys it sees (exact: below 2^24).
extern "C" __global__ void __launch_bounds__(64)
attention_bwd_rows(const E* y, const E* dy, const float* lse, const u32* context, const u32* lengths, float* stats, AttentionParams p) {
    u32 item = linear_id();
    if (item >= p.batch * p.heads * p.queries) return;
    Row row = row_of(p, item, p.queries);
    float delta = 0.0f;
    for (u32 d = 0; d < p.dim; d++) delta += ld(y[row.start + d]) * ld(dy[row.start + d]);
    stats += (u64)item * 3u;
    stats[0] = lse[item];
    stats[1] = delta;
    stats[2] = (float)visible_keys(context, lengths, p, row.b, row.n);
}

// dq / scale of one query row over keys first..last, added to `sum`.
__device__ __forceinline__ void query_gradient(float* sum, const E* q, const E* k, const E* v, const E* bias, const E* dy,
                                               const float* stats, const AttentionParams& p, const Row& row, u32 item) {
    float query[DIM], slope[DIM];
    for (u32 d = 0; d < p.dim; d++) {
        query[d] = ld(q[row.start + d]) * p.scale;
        slope[d] = ld(dy[row.start + d]);
        sum[d] = 0.0f;
    }
    u64 base = first_of(p, row, p.keys);
    bias += ((u64)row.h * p.queries + row.n) * p.keys;
    stats += (u64)item * 3u;
    float lse = stats[0], delta = stats[1];
    u32 n = (u32)stats[2];
    for (u32 s = p.first; s < min(n, p.last); s += 4u) {
        u32 key[4];
        four(key, s, n);
        float score[4] = {}, dp[4] = {-delta, -delta, -delta, -delta}, ds[4];
        if ((p.flags & 8u) != 0u) {
#pragma unroll
            for (u32 j = 0; j < 4u; j++) score[j] = ld(bias[key[j]]);
        }
        dot4(score, query, k + base, key, p);
        dot4(dp, slope, v + base, key, p);
#pragma unroll
        for (u32 j = 0; j < 4u; j++) ds[j] = s + j < n ? expf(score[j] - lse) * dp[j] : 0.0f;
        add4(sum, 1.0f, ds, k + base, key, p);
    }
}

extern "C" __global__ void __launch_bounds__(64)
attention_bwd_q(const E* q, const E* k, const E* v, const E* bias, const E* dy, const float* stats, E* dq, AttentionParams p) {
    u32 item = linear_id();
    if (item >= p.batch * p.heads * p.queries) return;
    Row row = row_of(p, item, p.queries);
    float sum[DIM];
    query_gradient(sum, q, k, v, bias, dy, stats, p, row, item);
    for (u32 d = 0; d < p.dim; d++) dq[row.start + d] = st(sum[d] * p.scale);
}

// One range of keys; the first launch sets the sum.
extern "C" __global__ void __launch_bounds__(64)
attention_bwd_q_part(const E* q, const E* k, const E* v, const E* bias, const E* dy, const float* stats, float* total, AttentionParams p) {
    u32 item = linear_id();
    if (item >= p.batch * p.heads * p.queries) return;
    Row row = row_of(p, item, p.queries);
    float sum[DIM];
    query_gradient(sum, q, k, v, bias, dy, stats, p, row, item);
    for (u32 d = 0; d < p.dim; d++) total[row.start + d] = sum[d] * p.scale + (p.first > 0u ? total[row.start + d] : 0.0f);
}

// dk / scale and dv of one key row over queries first..last, added to `sum` and `sum2`.
__device__ __forceinline__ void key_gradient(float* sum, float* sum2, const E* q, const E* k, const E* v, const E* bias, const E* dy,
                                             const float* stats, const AttentionParams& p, const Row& row) {
    float key[DIM], value[DIM];
    for (u32 d = 0; d < p.dim; d++) {
        key[d] = ld(k[row.start + d]) * p.scale;
        value[d] = ld(v[row.start + d]);
        sum[d] = 0.0f;
        sum2[d] = 0.0f;
    }
    u64 base = first_of(p, row, p.queries);
    bias += (u64)row.h * p.queries * p.keys + row.n;
    stats += ((u64)row.b * p.heads + row.h) * p.queries * 3u;
    for (u32 t = p.first; t < p.last; t += 4u) {
        u32 query[4];
        four(query, t, p.queries);
        // Rows past the end repeat the last query and must not count; the others count where they see this key.
        bool live[4];
#pragma unroll
        for (u32 j = 0; j < 4u; j++) live[j] = (float)row.n < stats[(u64)query[j] * 3u + 2u] && t + j < p.last;
        if (!(live[0] || live[1] || live[2] || live[3])) continue;
        float score[4], dp[4], weight[4], ds[4];
#pragma unroll
        for (u32 j = 0; j < 4u; j++) {
            score[j] = ((p.flags & 8u) != 0u ? ld(bias[(u64)query[j] * p.keys]) : 0.0f) - stats[(u64)query[j] * 3u];
            dp[j] = -stats[(u64)query[j] * 3u + 1u];
        }
        dot4(score, key, q + base, query, p);
        dot4(dp, value, dy + base, query, p);
#pragma unroll
        for (u32 j = 0; j < 4u; j++) {
            weight[j] = live[j] ? expf(score[j]) : 0.0f;
            ds[j] = live[j] ? weight[j] * dp[j] : 0.0f;
        }
        add4(sum, 1.0f, ds, q + base, query, p);
        add4(sum2, 1.0f, weight, dy + base, query, p);
    }
}

extern "C" __global__ void __launch_bounds__(64)
attention_bwd_kv(const E* q, const E* k, const E* v, const E* bias, const E* dy, const float* stats, E* dk, E* dv, AttentionParams p) {
    u32 item = linear_id();
    if (item >= p.batch * p.heads * p.keys) return;
    Row row = row_of(p, item, p.keys);
    float sum[DIM], sum2[DIM];
    key_gradient(sum, sum2, q, k, v, bias, dy, stats, p, row);
    for (u32 d = 0; d < p.dim; d++) {
        dk[row.start + d] = st(sum[d] * p.scale);
        dv[row.start + d] = st(sum2[d]);
    }
}

// One range of queries; the first launch sets the sums, dk before dv.
extern "C" __global__ void __launch_bounds__(64)
attention_bwd_kv_part(const E* q, const E* k, const E* v, const E* bias, const E* dy, const float* stats, float* total, AttentionParams p) {
    u32 item = linear_id();
    if (item >= p.batch * p.heads * p.keys) return;
    Row row = row_of(p, item, p.keys);
    float sum[DIM], sum2[DIM];
    key_gradient(sum, sum2, q, k, v, bias, dy, stats, p, row);
    float *total_k = total + row.start, *total_v = total_k + (u64)p.batch * p.keys * p.heads * p.dim;
    for (u32 d = 0; d < p.dim; d++) {
        total_k[d] = sum[d] * p.scale + (p.first > 0u ? total_k[d] : 0.0f);
        total_v[d] = sum2[d] + (p.first > 0u ? total_v[d] : 0.0f);
    }
}

// Elements first..last of the sums into storage.
extern "C" __global__ void __launch_bounds__(64) attention_bwd_store(const float* total, E* stored, AttentionParams p) {
    u32 item = linear_id();
    if (item >= p.last - p.first) return;
    stored[item] = st(total[(u64)p.first + item]);
}

extern "C" __global__ void __launch_bounds__(64)
attention_bwd_bias(const E* q, const E* k, const E* v, const E* bias, const E* dy, const float* stats, E* dbias, AttentionParams p) {
    u32 item = linear_id();
    if (item >= p.heads * p.queries * p.keys) return;
    u32 s = item % p.keys, head = item / p.keys, t = head % p.queries, h = head / p.queries;
    float sum = 0.0f;
    for (u32 b = 0; b < p.batch; b++) {
        const float* stat = stats + (((u64)b * p.heads + h) * p.queries + t) * 3u;
        if ((float)s >= stat[2]) continue;
        u64 query = (((u64)b * p.queries + t) * p.heads + h) * p.dim, key = (((u64)b * p.keys + s) * p.heads + h) * p.dim;
        float score = 0.0f, dp = 0.0f;
        for (u32 d = 0; d < p.dim; d++) {
            score += ld(q[query + d]) * ld(k[key + d]);
            dp += ld(dy[query + d]) * ld(v[key + d]);
        }
        float weight = expf(score * p.scale + ld(bias[item]) - stat[0]);
        sum += weight * (dp - stat[1]);
    }
    dbias[item] = st(sum);
}
