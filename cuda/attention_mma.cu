// op:       attention
// math:     as attention.cu: y = softmax(scale q k^T + bias) v over the visible keys; lse = log sum exp of the scores
// grad:     attention_bwd_mma.cu
// shapes:   slots: q[B,T,H,D], k[B,S,H,D], v[B,S,H,D], context[B], lengths[B], bias[H,T,S], y[B,T,H,D], lse[B,H,T];
//           D is a multiple of 8, at most HEAD
// layout:   contiguous; the plan puts arguments into slots, an absent optional input is any read argument and never read
// launch:   linear, one block of 128 threads for 128 query rows of a head; shared: 128 + 2 KEYS rows of HEAD + 8 elements
// cost:     4 B H T S D flops
// numerics: f32 sums, the sum of P too; P is rounded once, to the storage type, for the second product; no atomics:
//           every sum has one order; hidden keys matter to nobody, not even as NaN;
//           a row without keys gives y = 0 and lse = MASKED; infinite values may come out as NaN
// source:   Dao 2023 (FlashAttention-2); Milakov and Gimelshein 2018
// rungs:    v2: 32 query rows a warp, KEYS keys at a time through shared memory, scores stay in registers; v1 is attention.cu

#if defined(HEAD) && (ARCH >= 80 || defined(ESPALIER_HOST))

extern "C" __global__ void __launch_bounds__(128)
attention_fwd_mma(const E* q, const E* k, const E* v, const u32* context, const u32* lengths, const E* bias, E* y,
                  float* lse_out, AttentionParams p) {
    DYNAMIC_SHARED(bytes);
    E *q_tile = (E*)bytes, *k_tile = q_tile + ROWS * PITCH, *v_tile = k_tile + KEYS * PITCH;
    Place at = place_of(p, p.queries, ROWS, (p.flags & 3u) != 0u);
    if (at.b >= p.batch) return;
    u64 start = start_of(p, at.b, at.h, p.queries), key_start = start_of(p, at.b, at.h, p.keys);
    Visible visible = visible_of(context, lengths, p, at.b);
    u32 end = visible.count(min(at.first + ROWS, p.queries) - 1u);

    u32 lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 32u, row0 = at.first + own;
    // Keys that the first and the last row of this warp see; nothing for a warp past the end.
    u32 least = visible.count(row0), most = row0 < p.queries ? visible.count(min(row0 + 32u, p.queries) - 1u) : 0u;
    u32 n[4];
    float largest[4], total[4], sum[2][HEAD / 8][4];
#pragma unroll
    for (u32 r = 0; r < 4u; r++) {
        n[r] = visible.count(min(row0 + r * 8u + lane / 4u, p.queries - 1u));
        largest[r] = (p.flags & 8u) != 0u ? MASKED * LOG2_E : MASKED;
        total[r] = 0.0f;
    }
    clear<2>(sum);
    bias += (u64)at.h * p.queries * p.keys;
    // Exponents are base 2. Without a bias products enter them times `factor`; with one they are scaled before the maximum.
    float slope = fabsf(p.scale) * LOG2_E, factor = (p.flags & 8u) != 0u ? 1.0f : fmaxf(slope, 1.2e-38f);

    load_rows<ROWS>(q_tile, q + start, at.first, p.queries, p);
    load_rows<KEYS>(k_tile, k + key_start, 0u, end, p);
    cp_async_commit();
    Left<2> left;
    left.rows = q_tile + own * PITCH;
    for (u32 base = 0; base < end; base += KEYS) {
        bool busy = base < most;
        float score[2][KEYS / 8][4];
        // The keys have come, and all warps are done with the old values.
        cp_async_wait<0>();
        __syncthreads();
        load_rows<KEYS>(v_tile, v + key_start, base, end, p);
        cp_async_commit();
        if (base == 0u) left.keep();
        if (busy) multiply<2, KEYS>(score, left, k_tile);
        // The values have come, and all warps are done with the keys.
        cp_async_wait<0>();
        __syncthreads();
        if (base + KEYS < end) load_rows<KEYS>(k_tile, k + key_start, base + KEYS, end, p);
        cp_async_commit();
        if (!busy) continue;
        if (p.scale < 0.0f) {
#pragma unroll
            for (u32 j = 0; j < KEYS; j++) score[j % 8u / 4u][j / 8u][j % 4u] *= -1.0f;
        }
        if ((p.flags & 8u) != 0u) {
#pragma unroll
            for (u32 j = 0; j < KEYS; j++) {
                u32 r = j % 8u / 4u * 2u + j % 4u / 2u, row = row0 + r * 8u + lane / 4u, key = base + j / 8u * 8u + lane % 4u * 2u + j % 2u;
                // A few loads at a time: registers are for the sums.
                if (j % 8u == 0u) __syncwarp();
                float* s = &score[j % 8u / 4u][j / 8u][j % 4u];
                if (row < p.queries && key < n[r]) *s = *s * slope + ld(bias[row * p.keys + key]) * LOG2_E;
            }
        }
        if (base + KEYS > least) {
#pragma unroll
            for (u32 j = 0; j < KEYS; j++) {
                u32 r = j % 8u / 4u * 2u + j % 4u / 2u, key = base + j / 8u * 8u + lane % 4u * 2u + j % 2u;
                if (key >= n[r]) score[j % 8u / 4u][j / 8u][j % 4u] = MINUS_INFINITY;
            }
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float high = largest[r];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) high = fmaxf(high, fmaxf(score[r / 2][j][r % 2 * 2], score[r / 2][j][r % 2 * 2 + 1]));
            high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, 1));
            high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, 2));
            float correction = power2((largest[r] - high) * factor), shift = high * factor, part = 0.0f;
            largest[r] = high;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int i = r % 2 * 2; i < r % 2 * 2 + 2; i++) part += score[r / 2][j][i] = power2(score[r / 2][j][i] * factor - shift);
            total[r] = total[r] * correction + part;
#pragma unroll
            for (int d = 0; d < HEAD / 8; d++) {
                sum[r / 2][d][r % 2 * 2] *= correction;
                sum[r / 2][d][r % 2 * 2 + 1] *= correction;
            }
        }
#pragma unroll
        for (u32 j = 0; j < KEYS / 16u; j++) {
            u32 key = base + j * 16u;
            if (key >= most) continue;
            auto sees = [&](int m, int half, u32 i) { return key + i < n[m * 2 + half]; };
            add_rows<2, KEYS>(sum, score, j, v_tile + j * 16u * PITCH, key + 16u > least, sees);
        }
    }
    // Without a key the copies were not waited for.
    cp_async_wait<0>();
    __syncthreads();
    float inverse[4];
#pragma unroll
    for (u32 r = 0; r < 4u; r++) {
        total[r] += __shfl_xor_sync(ALL_LANES, total[r], 1);
        total[r] += __shfl_xor_sync(ALL_LANES, total[r], 2);
        inverse[r] = n[r] > 0u ? 1.0f / total[r] : 0.0f;
        u32 row = row0 + r * 8u + lane / 4u;
        if (lane % 4u == 0u && row < p.queries)
            lse_out[((u64)at.b * p.heads + at.h) * p.queries + row] = n[r] > 0u ? largest[r] * factor * LN_2 + logf(total[r]) : MASKED;
    }
    put_rows(q_tile + own * PITCH, sum[0], inverse[0], inverse[1]);
    put_rows(q_tile + (own + 16u) * PITCH, sum[1], inverse[2], inverse[3]);
    __syncwarp();
    store_rows<32>(y + start, q_tile + own * PITCH, row0, p.queries, p);
}

#endif
