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
    float sum[2][HEAD / 8][4];
    Softmax<2> softmax(p);
#pragma unroll
    for (u32 r = 0; r < 4u; r++) n[r] = visible.count(min(row0 + r * 8u + lane / 4u, p.queries - 1u));
    clear<2>(sum);
    bias += (u64)at.h * p.queries * p.keys;

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
        finish_scores<2, KEYS>(score, bias, n, row0, base, least, p);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            float correction = softmax.weigh<KEYS>(score, r);
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
    softmax.finish(inverse, lse_out + ((u64)at.b * p.heads + at.h) * p.queries, n, row0, p.queries);
    put_rows(q_tile + own * PITCH, sum[0], inverse[0], inverse[1]);
    put_rows(q_tile + (own + 16u) * PITCH, sum[1], inverse[2], inverse[3]);
    __syncwarp();
    store_rows<32>(y + start, q_tile + own * PITCH, row0, p.queries, p);
}

#endif
