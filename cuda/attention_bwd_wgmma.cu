// op:       attention_bwd
// math:     as attention_bwd_mma.cu: P = exp(scores - lse), delta = rowsum(dy y), dS = P (dy v^T - delta)
//           dv = P^T dy, dq = scale dS k, dk = scale dS^T q, dbias = sum over b of dS
// grad:     none
// shapes:   rows: y[B,T,H,D], dy, lse[B,H,T], stats[2,B,H,T to whole 64s]; q: q, k[B,S,H,D], v, context[B], lengths[B],
//           bias[H,T,S], dy, stats, dq; kv: the same up to stats, dk, dv; bias: the same, dbias; D is a multiple of 8, at most
//           HEAD, which is 64 or 128
// layout:   contiguous; q, k, v and dy by tensor maps of boxes of 64 rows, planes as attention_wgmma.cuh says; an absent optional
//           input is any read argument and never read
// launch:   linear; q, kv: a block for 128 query (key) rows of a head, of 384 threads: a warp group that copies and two that take
//           64 rows each; shared: four tiles of 64 rows, a ring of four stages of two, 16 bytes and 1 KiB each; rows, bias: as v2
// cost:     14 B H T S D flops (q and kv both recompute scores)
// numerics: as attention_bwd_mma.cu: f32 sums; P and dS rounded once, to the storage type, for the second product, P in f16 times
//           2^8; no atomics on floats: every sum has one order; hidden keys matter to nobody, not even as NaN, nor do queries to
//           keys that they do not see; one value that is not finite may make NaN of the whole rows that see it
// source:   Shah et al. 2024 (FlashAttention-3); Dao et al. 2022; Dao 2023; PTX ISA 8.0
// rungs:    v3 (9.0 alone), for attention_bwd_mma.cu's v2: P and dS stay in registers as left operands; dq adds up the last
//           step while this one's scores become gradients; v1 is attention.cu

#if defined(HEAD) && ARCH == 90 && HEAD % 64 == 0

#define SPAN 128u
#define STEP_ROWS 64u

// What stays are two tensors' rows, a tile of each for each group; what streams past are two tensors' tiles of 64 rows, and for
// keys the statistics of these rows.
struct BackwardShared {
    typedef WgmmaStages<4u, 2u * TILE + 1024u> Ring;
    u8 *kept, *ring;
    // What stays has come; a stage that is cleaned before use has come.
    u64 *ready, *raw;
    // Of the rows with values that were cleaned away: the first key, one past the last query.
    u32* lost;
    __device__ __forceinline__ explicit BackwardShared(u8* shared)
        : kept(shared), ring(shared + 4u * TILE), ready((u64*)(ring + Ring::OWN)), raw(ready + 1), lost((u32*)(raw + 1)) {}
    __device__ __forceinline__ const u8* first(u32 group) const { return kept + group * TILE; }
    __device__ __forceinline__ const u8* second(u32 group) const { return kept + (2u + group) * TILE; }
};

__device__ __forceinline__ void begin(const BackwardShared& s, u32 lost) {
    if (threadIdx.x == 0u) {
        BackwardShared::Ring place(s.ring);
        for (u32 i = 0; i < BackwardShared::Ring::STAGES; i++) {
            mbarrier_init(place.full(), 1u);
            mbarrier_init(place.empty(), 2u * WARP_GROUP / WARP);
            place.next();
        }
        mbarrier_init(s.ready, 1u);
        mbarrier_init(s.raw, 1u);
        mbarrier_init_fence();
        *s.lost = lost;
    }
    __syncthreads();
}

// One tensor of a pair: its map and the plane of the head.
struct Source { const TensorMap* map; u32 plane; };

// The group that copies: rows first.. of the pair that stays, then the steps from `begin` to `end` of the pair that streams past.
// `mixed(base)`: some row does not see all of this step's; then `clean(tiles, base)`. STATS: the step's rows have statistics.
template <bool STATS, class Mixed, class Clean>
__device__ __forceinline__ void produce(const BackwardShared& s, Source kept0, Source kept1, u32 first, Source next0, Source next1, const float* stats,
                                        u64 plane, u32 begin, u32 end, Mixed mixed, Clean clean) {
    BackwardShared::Ring place(s.ring);
    bool leads = threadIdx.x == 0u;
    u32 cleaned = 0u;
    if (leads) {
        mbarrier_arrive_expect(s.ready, 4u * TILE);
#pragma unroll
        for (u32 group = 0; group < 2u; group++) {
            load_tile<64>(s.kept + group * TILE, kept0.map, s.ready, first + group * 64u, kept0.plane);
            load_tile<64>(s.kept + (2u + group) * TILE, kept1.map, s.ready, first + group * 64u, kept1.plane);
        }
    }
    for (u32 base = begin; base < end; base += STEP_ROWS) {
        bool cleans = mixed(base);
        if (leads) {
            u64* barrier = cleans ? s.raw : place.full();
            // In the first round every stage is empty: parity 1 of a new barrier passes.
            mbarrier_wait(place.empty(), place.parity ^ 1u);
            mbarrier_arrive_expect(barrier, 2u * TILE + (STATS ? 2u * STEP_ROWS * 4u : 0u));
            load_tile<64>(place.tile(), next0.map, barrier, base, next0.plane);
            load_tile<64>(place.tile() + TILE, next1.map, barrier, base, next1.plane);
            if (STATS) {
                bulk_load(place.tile() + 2u * TILE, stats + base, barrier, STEP_ROWS * 4u);
                bulk_load(place.tile() + 2u * TILE + STEP_ROWS * 4u, stats + plane + base, barrier, STEP_ROWS * 4u);
            }
        }
        if (cleans) {
            mbarrier_wait(s.raw, cleaned++ % 2u);
            clean(place.tile(), base);
            if (leads) mbarrier_arrive(place.full());
        }
        place.next();
    }
}

extern "C" __global__ void __launch_bounds__(128)
attention_bwd_rows_wgmma(const E* y, const E* dy, const float* lse, float* stats, AttentionParams p) {
    attention_rows(y, dy, lse, stats, p);
}

// dq: rows are queries, keys and values stream past.
__device__ __forceinline__ void consume_q(const BackwardShared& s, u32 group, const Place& at, u32 end, const Visible& visible, const E* bias, const float* stats,
                                          E* dq, const AttentionParams& p) {
    u32 lane = threadIdx.x % WARP, row0 = at.first + group * 64u + threadIdx.x % WARP_GROUP / WARP * 16u, least = visible.count(row0), n[2];
    float lse[2], delta[2], slope = p.scale * LOG2_E, factor = (p.flags & 8u) != 0u ? 1.0f : slope;
    stats += ((u64)at.b * p.heads + at.h) * padded_rows(p);
#pragma unroll
    for (u32 r = 0; r < 2u; r++) {
        // Rows past the end are as the last.
        u32 row = min(row0 + r * 8u + lane / 4u, p.queries - 1u);
        n[r] = visible.count(row);
        lse[r] = stats[row];
        delta[r] = stats[(u64)p.batch * p.heads * padded_rows(p) + row];
    }
    float weight[1][STEP_ROWS / 8u][4], product[1][STEP_ROWS / 8u][4], sum[1][HEAD / 8][4];
    u32 slopes[STEP_ROWS / 16u][4];
    // Keys that the group's last row sees.
    u32 first = at.first + group * 64u, own = first < p.queries ? visible.count(min(first + 64u, p.queries) - 1u) : 0u, base = 0u;
    BackwardShared::Ring place(s.ring), before = place;
    clear<1>(sum);
    if (own > 0u) {
        mbarrier_wait(s.ready, 0u);
        mbarrier_wait(place.full(), place.parity);
        for (; base < own; base += STEP_ROWS) {
            wgmma_fence();
            start_scores<STEP_ROWS>(weight, s.first(group), place.tile());
            wgmma_commit();
            start_scores<STEP_ROWS>(product, s.second(group), place.tile() + TILE);
            wgmma_commit();
            if (base > 0u) start_sums<STEP_ROWS>(sum, slopes, before.tile(), 1u);
            wgmma_commit();
            wgmma_wait<2>();
            hold(weight);
            if ((p.flags & 8u) != 0u) add_bias<1, STEP_ROWS>(weight, bias, n, row0, base, slope, p);
            weigh_rows<STEP_ROWS>(weight, lse, factor, n, base, least);
            hold(weight);
            // The next keys and values. Here, as no compiler moves the wait for products across this loop: they run while scores become
            // weights.
            BackwardShared::Ring old = before;
            before = place;
            place.next();
            if (base + STEP_ROWS < end) mbarrier_wait(place.full(), place.parity);
            wgmma_wait<0>();
            hold(product);
            hold(sum);
            if (base > 0u) release(old.empty());
            slope_rows<STEP_ROWS>(product, weight, delta);
            round_weights<STEP_ROWS>(slopes, product);
        }
        wgmma_fence();
        start_sums<STEP_ROWS>(sum, slopes, before.tile(), 1u);
        wgmma_commit();
        wgmma_wait<0>();
        hold(sum);
        release(before.empty());
    }
    // What only the other group sees.
    for (; base < end; base += STEP_ROWS, place.next()) {
        mbarrier_wait(place.full(), place.parity);
        release(place.empty());
    }
    const float factors[2] = {p.scale, p.scale};
    u32 lost = *s.lost;
    store_sums(dq + start_of(p, at.b, at.h, p.queries), sum, factors, row0, p.queries, p, [&](u32 half, u32) { return n[half] > lost; });
}

extern "C" __global__ void __launch_bounds__(384, 1)
attention_bwd_q_wgmma(const E*, const E*, const E*, const u32* context, const u32* lengths, const E* bias, const E*, const float* stats, E* dq,
                      const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                      const __grid_constant__ TensorMap dy, AttentionParams p) {
    DYNAMIC_SHARED(shared);
    BackwardShared s(shared);
    Place at = place_of(p, p.queries, SPAN, (p.flags & 3u) != 0u);
    if (at.b >= p.batch) return;
    begin(s, ~0u);
    Visible visible = visible_of(context, lengths, p, at.b);
    u32 end = visible.count(min(at.first + SPAN, p.queries) - 1u), group = warp_group();
    if (group == 0u) {
        registers_down<24u>();
        u32 plane = plane_of(p, at, p.queries), key_plane = plane_of(p, at, p.keys), least = visible.count(at.first);
        if (end > 0u)
            produce<false>(s, {&q, plane}, {&dy, plane}, at.first, {&k, key_plane}, {&v, key_plane}, nullptr, 0u, 0u, end,
                           [&](u32 base) { return base + STEP_ROWS > least; },
                           [&](u8* tiles, u32 base) { clean_tiles(tiles, TILE, [&](u32 row, u32) { atomicMin(s.lost, base + row); }); });
    } else {
        registers_up<240u>();
        consume_q(s, group - 1u, at, end, visible, bias + (u64)at.h * p.queries * p.keys, stats, dq, p);
    }
}

// dk and dv: rows are keys, queries and their gradients stream past. Scores are held transposed, so that they are the left operand
// of the second product as they are.
__device__ __forceinline__ void consume_kv(const BackwardShared& s, u32 group, const Place& at, u32 first, u32 seen, const Visible& visible, const E* bias, E* dk,
                                           E* dv, const AttentionParams& p) {
    u32 lane = threadIdx.x % WARP, key0 = at.first + group * 64u + threadIdx.x % WARP_GROUP / WARP * 16u;
    float weight[1][STEP_ROWS / 8u][4], product[1][STEP_ROWS / 8u][4], sum_k[1][HEAD / 8][4], sum_v[1][HEAD / 8][4];
    u32 left[STEP_ROWS / 16u][4], slopes[STEP_ROWS / 16u][4];
    clear<1>(sum_k);
    clear<1>(sum_v);
    BackwardShared::Ring place(s.ring);
    if (first < p.queries) mbarrier_wait(s.ready, 0u);
    for (u32 base = first; base < p.queries; base += STEP_ROWS) {
        const u8* queries = place.tile();
        const u8* gradients = queries + TILE;
        const float* stats = (const float*)(gradients + TILE);
        mbarrier_wait(place.full(), place.parity);
        if (at.first + group * 64u >= visible.count(min(base + STEP_ROWS, p.queries) - 1u)) {
            // None of these queries sees a key of this group.
            release(place.empty());
            place.next();
            continue;
        }
        wgmma_fence();
        start_scores<STEP_ROWS>(weight, s.first(group), queries);
        wgmma_commit();
        start_scores<STEP_ROWS>(product, s.second(group), gradients);
        wgmma_commit();
        wgmma_wait<1>();
        hold(weight);
        weigh_columns<STEP_ROWS>(weight, stats, bias, key0, base, visible, p);
        round_weights<STEP_ROWS>(left, weight);
        wgmma_fence();
        start_sums<STEP_ROWS>(sum_v, left, gradients, 1u);
        wgmma_commit();
        wgmma_wait<1>();
        hold(product);
        slope_columns<STEP_ROWS>(product, weight, stats + STEP_ROWS);
        round_weights<STEP_ROWS>(slopes, product);
        wgmma_fence();
        start_sums<STEP_ROWS>(sum_k, slopes, queries, 1u);
        wgmma_commit();
        wgmma_wait<0>();
        hold(sum_v);
        hold(sum_k);
        release(place.empty());
        place.next();
    }
    // Keys that nobody sees have weighed what nobody cleaned with 0.
#pragma unroll
    for (u32 i = 0; i < HEAD / 2u; i++) {
        if (key0 + i % 4u / 2u * 8u + lane / 4u < seen) continue;
        sum_k[0][i / 4u][i % 4u] = 0.0f;
        sum_v[0][i / 4u][i % 4u] = 0.0f;
    }
    const float scale[2] = {p.scale, p.scale}, unshift[2] = {UNSHIFT, UNSHIFT};
    u64 start = start_of(p, at.b, at.h, p.keys);
    u32 lost = *s.lost > 0u ? visible.count(*s.lost - 1u) : 0u;
    auto loses = [&](u32 half, u32) { return key0 + half * 8u + lane / 4u < lost; };
    store_sums(dk + start, sum_k, scale, key0, p.keys, p, loses);
    store_sums(dv + start, sum_v, unshift, key0, p.keys, p, loses);
}

extern "C" __global__ void __launch_bounds__(384, 1)
attention_bwd_kv_wgmma(const E*, const E*, const E*, const u32* context, const u32* lengths, const E* bias, const E*, const float* stats, E* dk, E* dv,
                       const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                       const __grid_constant__ TensorMap dy, AttentionParams p) {
    DYNAMIC_SHARED(shared);
    BackwardShared s(shared);
    Place at = place_of(p, p.keys, SPAN, false);
    if (at.b >= p.batch) return;
    begin(s, 0u);
    Visible visible = visible_of(context, lengths, p, at.b);
    // Steps start at multiples of 64: their rows of statistics are there up to the padding.
    u32 seen = visible.count(p.queries - 1u), first = visible.first(at.first, p.queries) / STEP_ROWS * STEP_ROWS, group = warp_group();
    if (at.first >= seen) first = p.queries;
    if (group == 0u) {
        registers_down<24u>();
        u32 plane = plane_of(p, at, p.queries), key_plane = plane_of(p, at, p.keys), last = min(at.first + SPAN, seen);
        if (first < p.queries)
            produce<true>(s, {&k, key_plane}, {&v, key_plane}, at.first, {&q, plane}, {&dy, plane}, stats + ((u64)at.b * p.heads + at.h) * padded_rows(p),
                          (u64)p.batch * p.heads * padded_rows(p), first, p.queries, [&](u32 base) { return last > visible.count(base); },
                          [&](u8* tiles, u32 base) { clean_tiles(tiles, 2u * TILE, [&](u32 row, u32) { atomicMax(s.lost, base + row % 64u + 1u); }); });
    } else {
        registers_up<240u>();
        consume_kv(s, group - 1u, at, first, seen, visible, bias + (u64)at.h * p.queries * p.keys, dk, dv, p);
    }
}

extern "C" __global__ void __launch_bounds__(128)
attention_bwd_bias_wgmma(const E* q, const E* k, const E* v, const u32* context, const u32* lengths, const E* bias, const E* dy, const float* stats, E* dbias,
                         AttentionParams p) {
    DYNAMIC_SHARED(shared);
    attention_bias(shared, q, k, v, context, lengths, bias, dy, stats, dbias, p);
}

#endif
