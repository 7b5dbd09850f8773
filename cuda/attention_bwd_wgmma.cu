// op:       attention_bwd
// math:     as attention_bwd_mma.cu: P = exp(scores - lse), delta = rowsum(dy y), dS = P (dy v^T - delta)
//           dv = P^T dy, dq = scale dS k, dk = scale dS^T q, dbias = sum over b of dS
// grad:     none
// shapes:   rows: y[B,T,H,D], dy, lse[B,H,T], stats[2,B,H,T to whole 64s]; q: q, k[B,S,H,D], v, context[B], lengths[B],
//           bias[H,T,S], dy, stats, dq; kv: the same up to stats, dk, dv; bias: the same, dbias; D is a multiple of 8, at most
//           HEAD, which is 64 or 128
// layout:   contiguous; q, k, v and dy by tensor maps of boxes of 64 rows, planes as attention_wgmma.cuh says; an absent optional
//           input is any read argument and never read
// launch:   linear; q, kv: blocks of 384 threads that walk over tiles of 128 query (key) rows of a head: a warp group that copies and
//           two that take 64 rows each; shared: four tiles of 64 rows, a ring of four stages of two and 1 KiB, barriers; rows, bias: as v2
// cost:     14 B H T S D flops (q and kv both recompute scores)
// numerics: as attention_bwd_mma.cu: f32 sums; P and dS rounded once, to the storage type, for the second product, P in f16 times
//           2^8; no atomics on floats: every sum has one order; hidden keys matter to nobody, not even as NaN, nor do queries to
//           keys that they do not see; one value that is not finite may make NaN of the whole rows that see it
// source:   Shah et al. 2024 (FlashAttention-3); Dao et al. 2022; Dao 2023; PTX ISA 8.0
// rungs:    v3 (9.0 alone), for attention_bwd_mma.cu's v2: P and dS stay in registers as left operands; dq adds up the last
//           step while this one's scores become gradients; v1 is attention.cu

#if defined(HEAD) && ARCH == 90 && HEAD % 64 == 0

#define STEP_ROWS 64u

// What stays are two tensors' rows, a tile of each for each group; what streams past are two tensors' tiles of 64 rows, then in a
// stage the statistics of these rows, if they are queries, and one word.
struct BackwardShared {
    static const u32 STATS = 2u * TILE, LOST = STATS + 2u * STEP_ROWS * 4u;
    typedef WgmmaStages<4u, 2u * TILE + 1024u> Ring;
    u8 *kept, *ring;
    // What stays has come, and is no longer read; a stage that is cleaned before use has come.
    u64 *ready, *free, *raw;
    __device__ __forceinline__ explicit BackwardShared(u8* shared)
        : kept(shared), ring(shared + 4u * TILE), ready((u64*)(ring + Ring::OWN)), free(ready + 1), raw(free + 1) {}
    __device__ __forceinline__ const u8* first(u32 group) const { return kept + group * TILE; }
    __device__ __forceinline__ const u8* second(u32 group) const { return kept + (2u + group) * TILE; }
};

// Of a cleaned stage: the row with a value that was cleaned away and whom most know, as a number that `clean` finds.
__device__ __forceinline__ u32* lost_of(const BackwardShared::Ring& place) { return (u32*)(place.tile() + BackwardShared::LOST); }

// One tensor of a pair: its map and the plane of the head.
struct Source { const TensorMap* map; u32 plane; };

// The group that copies.
struct Copier {
    const BackwardShared& s;
    BackwardShared::Ring place;
    u32 cleaned;
    __device__ __forceinline__ explicit Copier(const BackwardShared& s_) : s(s_), place(s_.ring), cleaned(0u) {}

    // Rows first.. of the pair that stays, and the steps from `begin` to `end` of the pair that streams past. Of steps that some row
    // does not see all of, `mixed(base)`, those values are cleaned. `statistics(to, base, barrier)` adds BYTES to a stage.
    template <u32 BYTES, class Statistics, class Mixed, class Clean>
    __device__ __forceinline__ void tile(u32 before, Source kept0, Source kept1, u32 first, Source next0, Source next1, u32 begin, u32 end,
                                         Statistics statistics, Mixed mixed, Clean clean) {
        bool leads = threadIdx.x == 0u;
        for (u32 base = begin; base < end; base += STEP_ROWS) {
            bool cleans = mixed(base);
            if (leads) {
                u64* barrier = cleans ? s.raw : place.full();
                // In the first round every stage is empty: parity 1 of a new barrier passes.
                mbarrier_wait(place.empty(), place.parity ^ 1u);
                mbarrier_arrive_expect(barrier, 2u * TILE + BYTES);
                load_tile<64>(place.tile(), next0.map, barrier, base, next0.plane);
                load_tile<64>(place.tile() + TILE, next1.map, barrier, base, next1.plane);
                statistics(place.tile() + BackwardShared::STATS, base, barrier);
                if (base == begin) {
                    mbarrier_wait(s.free, before % 2u ^ 1u);
                    mbarrier_arrive_expect(s.ready, 4u * TILE);
#pragma unroll
                    for (u32 group = 0; group < 2u; group++) {
                        load_tile<64>(s.kept + group * TILE, kept0.map, s.ready, first + group * 64u, kept0.plane);
                        load_tile<64>(s.kept + (2u + group) * TILE, kept1.map, s.ready, first + group * 64u, kept1.plane);
                    }
                }
            }
            if (cleans) {
                mbarrier_wait(s.raw, cleaned++ % 2u);
                clean(place, base, leads);
                if (leads) mbarrier_arrive(place.full());
            }
            place.next();
        }
    }
};

extern "C" __global__ void __launch_bounds__(128)
attention_bwd_rows_wgmma(const E* y, const E* dy, const float* lse, float* stats, AttentionParams p) {
    attention_rows(y, dy, lse, stats, p);
}

// dq: rows are queries, keys and values stream past. Keys that any row of a tile sees, and steps that some row does not see all of.
__device__ __forceinline__ u32 end_of(const Place& at, const Visible& visible, const AttentionParams& p) { return visible.count(min(at.first + SPAN, p.queries) - 1u); }
__device__ __forceinline__ bool mixed_keys(const Place& at, const Visible& visible, u32 base) { return base + STEP_ROWS > visible.count(at.first); }

__device__ __forceinline__ void consume_q(const BackwardShared& s, BackwardShared::Ring& place, u32 group, const Place& at, const Visible& visible, u32 before,
                                          const E* bias, const float* stats, E* dq, const AttentionParams& p) {
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
    u32 first = at.first + group * 64u, own = first < p.queries ? visible.count(min(first + 64u, p.queries) - 1u) : 0u, end = end_of(at, visible, p), base = 0u;
    // The first key of which something was cleaned away.
    u32 lost = ~0u;
    BackwardShared::Ring last = place;
    // After the products of the stage `last`, which were of the step before `base`.
    auto leave = [&]() {
        if (mixed_keys(at, visible, base - STEP_ROWS)) lost = min(lost, *lost_of(last));
        release(last.empty());
    };
    clear<1>(sum);
    if (end > 0u) mbarrier_wait(s.ready, before % 2u);
    if (own > 0u) {
        mbarrier_wait(place.full(), place.parity);
        for (; base < own; base += STEP_ROWS) {
            wgmma_fence();
            start_scores<STEP_ROWS>(weight, s.first(group), place.tile());
            wgmma_commit();
            start_scores<STEP_ROWS>(product, s.second(group), place.tile() + TILE);
            wgmma_commit();
            if (base > 0u) start_sums<STEP_ROWS>(sum, slopes, last.tile(), 1u);
            wgmma_commit();
            wgmma_wait<2>();
            hold(weight);
            if ((p.flags & 8u) != 0u) add_bias<1, STEP_ROWS>(weight, bias, n, row0, base, slope, p);
            weigh_rows<STEP_ROWS>(weight, lse, factor, n, base, least);
            hold(weight);
            // The next keys and values. Here, as no compiler moves the wait for products across this loop: they run while scores become
            // weights.
            BackwardShared::Ring next = place;
            next.next();
            if (base + STEP_ROWS < end) mbarrier_wait(next.full(), next.parity);
            wgmma_wait<0>();
            hold(product);
            hold(sum);
            if (base > 0u) leave();
            slope_rows<STEP_ROWS>(product, weight, delta);
            round_weights<STEP_ROWS>(slopes, product);
            last = place;
            place = next;
        }
        wgmma_fence();
        start_sums<STEP_ROWS>(sum, slopes, last.tile(), 1u);
        wgmma_commit();
        wgmma_wait<0>();
        hold(sum);
        leave();
    }
    if (end > 0u) release(s.free);
    // What only the other group sees.
    for (; base < end; base += STEP_ROWS, place.next()) {
        mbarrier_wait(place.full(), place.parity);
        release(place.empty());
    }
    spoil(sum, n[0] > lost, n[1] > lost);
    const float factors[2] = {p.scale, p.scale};
    store_sums(dq + start_of(p, at.b, at.h, p.queries), sum, factors, row0, p.queries, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
attention_bwd_q_wgmma(const E*, const E*, const E*, const u32* context, const u32* lengths, const E* bias, const E*, const float* stats, E* dq,
                      const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                      const __grid_constant__ TensorMap dy, AttentionParams p) {
    DYNAMIC_SHARED(shared);
    BackwardShared s(shared);
    begin_block<BackwardShared::Ring>(s.ring, s.ready);
    u32 group = warp_group();
    bool backwards = (p.flags & 3u) != 0u;
    if (group == 0u) {
        registers_down<40u>();
        Copier copier(s);
        each_tile(p.queries, backwards, p, [&](const Place& at, u32 before) {
            Visible visible = visible_of(context, lengths, p, at.b);
            u32 plane = plane_of(p, at, p.queries), key_plane = plane_of(p, at, p.keys), end = end_of(at, visible, p);
            auto clean = [&](const BackwardShared::Ring& place, u32 base, bool leads) {
                u32* lost = lost_of(place);
                if (leads) *lost = ~0u;
                named_barrier(COPIERS, WARP_GROUP);
                clean_tiles(place.tile(), TILE, [&](u32 row, u32) { atomicMin(lost, base + row); });
            };
            copier.tile<0>(before, {&q, plane}, {&dy, plane}, at.first, {&k, key_plane}, {&v, key_plane}, 0u, end, [](u8*, u32, u64*) {},
                           [&](u32 base) { return mixed_keys(at, visible, base); }, clean);
            return end > 0u;
        });
    } else {
        registers_up<232u>();
        BackwardShared::Ring place(s.ring);
        each_tile(p.queries, backwards, p, [&](const Place& at, u32 before) {
            Visible visible = visible_of(context, lengths, p, at.b);
            consume_q(s, place, group - 1u, at, visible, before, bias + (u64)at.h * p.queries * p.keys, stats, dq, p);
            return end_of(at, visible, p) > 0u;
        });
    }
}

// dk and dv: rows are keys, queries and their gradients stream past. Keys before `seen` are seen by somebody; queries from `first` on
// see some row of a tile: a multiple of 64, so that statistics are there up to the padding.
struct Queries {
    Visible visible;
    u32 seen, first, end, all;
    __device__ __forceinline__ Queries(const u32* context, const u32* lengths, const Place& at, const AttentionParams& p)
        : visible(visible_of(context, lengths, p, at.b)), end(p.queries) {
        seen = visible.count(p.queries - 1u);
        first = at.first < seen ? visible.first(at.first, p.queries) / STEP_ROWS * STEP_ROWS : end;
        // Queries from here on see all rows that anybody sees.
        all = first < end ? visible.first(min(at.first + SPAN, seen) - 1u, end) : 0u;
    }
    __device__ __forceinline__ bool mixed(u32 base) const { return base < all; }
};

// Scores are held transposed, so that they are the left operand of the second product as they are.
__device__ __forceinline__ void consume_kv(const BackwardShared& s, BackwardShared::Ring& place, u32 group, const Place& at, const Queries& q, u32 before, const E* bias,
                                           E* dk, E* dv, const AttentionParams& p) {
    u32 lane = threadIdx.x % WARP, key0 = at.first + group * 64u + threadIdx.x % WARP_GROUP / WARP * 16u;
    float weight[1][STEP_ROWS / 8u][4], product[1][STEP_ROWS / 8u][4], sum_k[1][HEAD / 8][4], sum_v[1][HEAD / 8][4];
    // `lost`: one past the last query of which something was cleaned away.
    u32 weights[STEP_ROWS / 16u][4], slopes[STEP_ROWS / 16u][4], lost = 0u;
    clear<1>(sum_k);
    clear<1>(sum_v);
    if (q.first < q.end) mbarrier_wait(s.ready, before % 2u);
    u32 base = q.first;
    // The group's keys may be hidden from the first queries that see the tile.
    for (; base < q.end && at.first + group * 64u >= q.visible.count(min(base + STEP_ROWS, p.queries) - 1u); base += STEP_ROWS, place.next()) {
        mbarrier_wait(place.full(), place.parity);
        release(place.empty());
    }
    for (; base < q.end; base += STEP_ROWS) {
        const u8* queries = place.tile();
        const u8* gradients = queries + TILE;
        const float* stats = (const float*)(queries + BackwardShared::STATS);
        mbarrier_wait(place.full(), place.parity);
        wgmma_fence();
        start_scores<STEP_ROWS>(weight, s.first(group), queries);
        wgmma_commit();
        start_scores<STEP_ROWS>(product, s.second(group), gradients);
        wgmma_commit();
        wgmma_wait<1>();
        hold(weight);
        weigh_columns<STEP_ROWS>(weight, stats, bias, key0, base, q.visible, p);
        round_weights<STEP_ROWS>(weights, weight);
        wgmma_fence();
        start_sums<STEP_ROWS>(sum_v, weights, gradients, 1u);
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
        if (q.mixed(base)) lost = max(lost, *lost_of(place));
        release(place.empty());
        place.next();
    }
    if (q.first < q.end) release(s.free);
    // Keys that nobody sees have weighed what nobody cleaned with 0.
#pragma unroll
    for (u32 i = 0; i < HEAD / 2u; i++) {
        if (key0 + i % 4u / 2u * 8u + lane / 4u < q.seen) continue;
        sum_k[0][i / 4u][i % 4u] = 0.0f;
        sum_v[0][i / 4u][i % 4u] = 0.0f;
    }
    if (lost > 0u) {
        u32 sees = q.visible.count(lost - 1u), key = key0 + lane / 4u;
        spoil(sum_k, key < sees, key + 8u < sees);
        spoil(sum_v, key < sees, key + 8u < sees);
    }
    const float scale[2] = {p.scale, p.scale}, unshift[2] = {UNSHIFT, UNSHIFT};
    u64 start = start_of(p, at.b, at.h, p.keys);
    store_sums(dk + start, sum_k, scale, key0, p.keys, p);
    store_sums(dv + start, sum_v, unshift, key0, p.keys, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
attention_bwd_kv_wgmma(const E*, const E*, const E*, const u32* context, const u32* lengths, const E* bias, const E*, const float* stats, E* dk, E* dv,
                       const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                       const __grid_constant__ TensorMap dy, AttentionParams p) {
    DYNAMIC_SHARED(shared);
    BackwardShared s(shared);
    begin_block<BackwardShared::Ring>(s.ring, s.ready);
    u32 group = warp_group();
    if (group == 0u) {
        registers_down<40u>();
        Copier copier(s);
        each_tile(p.keys, false, p, [&](const Place& at, u32 before) {
            Queries queries(context, lengths, at, p);
            u32 plane = plane_of(p, at, p.queries), key_plane = plane_of(p, at, p.keys);
            auto clean = [&](const BackwardShared::Ring& place, u32 base, bool leads) {
                u32* lost = lost_of(place);
                if (leads) *lost = 0u;
                named_barrier(COPIERS, WARP_GROUP);
                clean_tiles(place.tile(), 2u * TILE, [&](u32 row, u32) { atomicMax(lost, base + row % 64u + 1u); });
            };
            u32 head = at.b * p.heads + at.h;
            auto statistics = [&](u8* to, u32 base, u64* barrier) {
                bulk_load(to, stats + (u64)head * padded_rows(p) + base, barrier, STEP_ROWS * 4u);
                bulk_load(to + STEP_ROWS * 4u, stats + ((u64)p.batch * p.heads + head) * padded_rows(p) + base, barrier, STEP_ROWS * 4u);
            };
            copier.tile<2u * STEP_ROWS * 4u>(before, {&k, key_plane}, {&v, key_plane}, at.first, {&q, plane}, {&dy, plane}, queries.first, queries.end, statistics,
                                             [&](u32 base) { return queries.mixed(base); }, clean);
            return queries.first < queries.end;
        });
    } else {
        registers_up<232u>();
        BackwardShared::Ring place(s.ring);
        each_tile(p.keys, false, p, [&](const Place& at, u32 before) {
            Queries queries(context, lengths, at, p);
            consume_kv(s, place, group - 1u, at, queries, before, bias + (u64)at.h * p.queries * p.keys, dk, dv, p);
            return queries.first < queries.end;
        });
    }
}

extern "C" __global__ void __launch_bounds__(128)
attention_bwd_bias_wgmma(const E* q, const E* k, const E* v, const u32* context, const u32* lengths, const E* bias, const E* dy, const float* stats, E* dbias,
                         AttentionParams p) {
    DYNAMIC_SHARED(shared);
    attention_bias(shared, q, k, v, context, lengths, bias, dy, stats, dbias, p);
}

#endif
