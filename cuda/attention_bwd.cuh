// Joined in front of every kernel file, after attention.cuh, and empty unless HEAD is defined: what the backward passes of
// attention on tensor instructions share (attention_bwd_mma.cu, attention_bwd_wgmma.cu). Scores and products with gradients are
// fragments of 16 rows of a warp and N columns: row r of the thread's two is row0 + 8 r + g.

#if defined(HEAD) && (ARCH >= 80 || defined(ESPALIER_HOST))

__device__ __forceinline__ u32 padded_rows(const AttentionParams& p) { return div_up(p.queries, 64u) * 64u; }

// What the other entries need of a query row: lse in base 2 and delta, both shifted; rows past the end hold zeros.
__device__ __forceinline__ void attention_rows(const E* y, const E* dy, const float* lse, float* stats, const AttentionParams& p) {
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

// Rows are queries, columns the keys from `base` on: scores become weights, shifted as lse is, 0 for what is hidden. Every row
// sees the first `least` keys, row r n[r].
template <int N>
__device__ __forceinline__ void weigh_rows(float score[1][N / 8][4], const float lse[2], float factor, const u32 n[2], u32 base, u32 least) {
    bool partly = base + N > least;
#pragma unroll
    for (u32 j = 0; j < N / 2u; j++) {
        u32 r = j % 4u / 2u, key = base + j / 4u * 8u + threadIdx.x % 4u * 2u + j % 2u;
        float* s = &score[0][j / 4u][j % 4u];
        *s = !partly || key < n[r] ? power2(*s * factor - lse[r]) : 0.0f;
    }
}

// The gradient of a score from its weight and the product of gradients and values, which may be anything for what is hidden.
__device__ __forceinline__ float slope_of(float weight, float product, float delta) { return weight == 0.0f ? 0.0f : weight * (product * UNSHIFT - delta); }

template <int N>
__device__ __forceinline__ void slope_rows(float slope[1][N / 8][4], const float weight[1][N / 8][4], const float delta[2]) {
#pragma unroll
    for (u32 j = 0; j < N / 2u; j++) slope[0][j / 4u][j % 4u] = slope_of(weight[0][j / 4u][j % 4u], slope[0][j / 4u][j % 4u], delta[j % 4u / 2u]);
}

// The same with rows that are keys, from key0 on for the warp, and columns that are the queries from `base` on.
template <int N>
__device__ __forceinline__ void weigh_columns(float score[1][N / 8][4], const float* lse, const E* bias, u32 key0, u32 base, const Visible& visible, const AttentionParams& p) {
    u32 first = threadIdx.x % 4u * 2u, key[2] = {key0 + threadIdx.x % WARP / 4u, key0 + threadIdx.x % WARP / 4u + 8u};
    float slope = p.scale * LOG2_E, factor = (p.flags & 8u) != 0u ? 1.0f : slope;
    if ((p.flags & 8u) != 0u) {
#pragma unroll
        for (u32 j = 0; j < N / 4u; j++) {
            u32 t = base + j / 2u * 8u + first + j % 2u, sees = t < p.queries ? visible.count(t) : 0u;
            const E* line = bias + (u64)t * p.keys;
            // A few loads at a time: registers are for the sums.
            if (j % 4u == 0u) __syncwarp();
#pragma unroll
            for (u32 r = 0; r < 2u; r++) {
                float* s = &score[0][j / 2u][r * 2u + j % 2u];
                if (key[r] < sees) *s = *s * slope + ld(line[key[r]]) * LOG2_E;
            }
        }
    }
    bool partly = base + N > p.queries || key0 + 16u > visible.count(base);
#pragma unroll
    for (u32 j = 0; j < N / 4u; j++) {
        u32 column = j / 2u * 8u + first + j % 2u, t = base + column, sees = t < p.queries ? visible.count(t) : 0u;
        float shift = lse[column];
#pragma unroll
        for (u32 r = 0; r < 2u; r++) {
            float* s = &score[0][j / 2u][r * 2u + j % 2u];
            *s = !partly || key[r] < sees ? power2(*s * factor - shift) : 0.0f;
        }
    }
}

template <int N>
__device__ __forceinline__ void slope_columns(float slope[1][N / 8][4], const float weight[1][N / 8][4], const float* delta) {
#pragma unroll
    for (u32 j = 0; j < N / 4u; j++) {
        float shift = delta[j / 2u * 8u + threadIdx.x % 4u * 2u + j % 2u];
#pragma unroll
        for (u32 r = 0; r < 2u; r++) {
            float* x = &slope[0][j / 2u][r * 2u + j % 2u];
            *x = slope_of(weight[0][j / 2u][r * 2u + j % 2u], *x, shift);
        }
    }
}

// dbias of BACK queries and BACK keys of one head, summed over the batch in order.
__device__ __forceinline__ void attention_bias(u8* bytes, const E* q, const E* k, const E* v, const u32* context, const u32* lengths, const E* bias,
                                               const E* dy, const float* stats, E* dbias, const AttentionParams& p) {
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
