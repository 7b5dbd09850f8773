// op:       attention
// math:     as attention.cu: y = softmax(scale q k^T + bias) v over the visible keys; lse = log sum exp of the scores
// grad:     attention_bwd_wgmma.cu
// shapes:   slots: q[B,T,H,D], k[B,S,H,D], v[B,S,H,D], context[B], lengths[B], bias[H,T,S], y[B,T,H,D], lse[B,H,T];
//           D is a multiple of 8, at most HEAD, which is 64 or 128
// layout:   contiguous; q, k and v by tensor maps of boxes of 64, 128 and 64 rows, planes as attention_wgmma.cuh says; an absent
//           optional input is any read argument and never read
// launch:   linear blocks of 384 threads that walk over tiles of 128 query rows of a head: a warp group that copies and two that
//           take 64 rows each; shared: a tile of HEAD elements, a ring of 512 / HEAD of them, barriers, HEAD + 1 words for each
// cost:     4 B H T S D flops
// numerics: as attention_mma.cu: f32 sums, P rounded once, to the storage type; no atomics on floats; hidden keys matter to
//           nobody, not even as NaN; infinite values may come out as NaN
// source:   Shah et al. 2024 (FlashAttention-3); Dao 2023; Milakov and Gimelshein 2018; PTX ISA 8.0
// rungs:    v3 (9.0 alone), for attention_mma.cu's v2: while one group weighs its scores, the other has the tensor cores, and its
//           own last weights meet their values; v1 is attention.cu

#if defined(HEAD) && ARCH == 90 && HEAD % 64 == 0

struct ForwardShared {
    typedef WgmmaStages<512u / HEAD, SPAN * HEAD * 2u> Ring;
    // A tile of queries per group.
    u8 *queries, *ring;
    // The queries have come, and are no longer read; values that are cleaned before use have come.
    u64 *ready, *free, *raw;
    // For every tile of the ring, of the values that were cleaned away: the first row of each column, and whether there is any.
    u32* lost;
    __device__ __forceinline__ explicit ForwardShared(u8* shared)
        : queries(shared), ring(shared + 2u * TILE), ready((u64*)(ring + Ring::OWN)), free(ready + 1), raw(free + 1), lost((u32*)(raw + 1)) {}
    __device__ __forceinline__ u32* lost_of(const Ring& place) const { return lost + place.at * (HEAD + 1u); }
};

// The steps of keys that any row of the tile sees.
__device__ __forceinline__ u32 steps_of(const Place& at, const Visible& visible, const AttentionParams& p) {
    return div_up(visible.count(min(at.first + SPAN, p.queries) - 1u), SPAN);
}

// Some row of the tile does not see all keys of this step.
__device__ __forceinline__ bool is_mixed(const Place& at, const Visible& visible, u32 step) { return (step + 1u) * SPAN > visible.count(at.first); }

// Keys and values of a step: keys run one step ahead, as their scores do.
__device__ __forceinline__ void produce(const ForwardShared& s, const TensorMap* q, const TensorMap* k, const TensorMap* v, const u32* context,
                                        const u32* lengths, const AttentionParams& p) {
    ForwardShared::Ring place(s.ring);
    u32 cleaned = 0u;
    bool leads = threadIdx.x == 0u;
    each_tile(p.queries, (p.flags & 3u) != 0u, p, [&](const Place& at, u32 before) {
        Visible visible = visible_of(context, lengths, p, at.b);
        u32 plane = plane_of(p, at, p.keys), steps = steps_of(at, visible, p);
        for (u32 step = 0; steps > 0u && step <= steps; step++) {
            if (step < steps) {
                if (leads) {
                    // In the first round every tile is empty: parity 1 of a new barrier passes.
                    mbarrier_wait(place.empty(), place.parity ^ 1u);
                    mbarrier_arrive_expect(place.full(), 2u * TILE);
                    load_tile<SPAN>(place.tile(), k, place.full(), step * SPAN, plane);
                }
                place.next();
            }
            if (step == 0u) {
                if (leads) {
                    u32 own = plane_of(p, at, p.queries);
                    mbarrier_wait(s.free, before % 2u ^ 1u);
                    mbarrier_arrive_expect(s.ready, 2u * TILE);
                    load_tile<64>(s.queries, q, s.ready, at.first, own);
                    load_tile<64>(s.queries + TILE, q, s.ready, at.first + 64u, own);
                }
                continue;
            }
            bool mixed = is_mixed(at, visible, step - 1u);
            if (leads) {
                u64* barrier = mixed ? s.raw : place.full();
                mbarrier_wait(place.empty(), place.parity ^ 1u);
                mbarrier_arrive_expect(barrier, 2u * TILE);
                load_tile<64>(place.tile(), v, barrier, (step - 1u) * SPAN, plane);
                load_tile<64>(place.tile() + TILE, v, barrier, (step - 1u) * SPAN + 64u, plane);
            }
            if (mixed) {
                u32* lost = s.lost_of(place);
                mbarrier_wait(s.raw, cleaned++ % 2u);
                if (threadIdx.x < HEAD) lost[threadIdx.x] = 0x7fffffffu;
                if (leads) lost[HEAD] = 0u;
                named_barrier(COPIERS, WARP_GROUP);
                clean_tiles(place.tile(), 2u * TILE, [&](u32 row, u32 column) {
                    atomicMin(lost + column, row);
                    atomicMax(lost + HEAD, 1u);
                });
                if (leads) mbarrier_arrive(place.full());
            }
            place.next();
        }
        return steps > 0u;
    });
}

// The groups take turns at the tensor cores: a turn is `steps` - 1 times waited for and passed on by each.
struct Turns {
    u32 group, left;
    __device__ __forceinline__ Turns(u32 group_, u32 steps) : group(group_), left(steps - 1u) {
        if (group == 1u && left > 0u) named_arrive(TURN, 2u * WARP_GROUP);
    }
    __device__ __forceinline__ void wait() const { named_barrier(TURN + group, 2u * WARP_GROUP); }
    __device__ __forceinline__ void pass() {
        // After the last turn of all nobody waits.
        if (--left > 0u || group == 0u) named_arrive(TURN + 1u - group, 2u * WARP_GROUP);
    }
};

// What was cleaned away makes NaN of the sums that may know of it. `n` is counted from the step's first key.
__device__ __forceinline__ void restore(float (&sum)[1][HEAD / 8][4], const u32* lost, const int n[2]) {
    if (lost[HEAD] == 0u) return;
#pragma unroll
    for (u32 i = 0; i < HEAD / 2u; i++) {
        if (n[i % 4u / 2u] > (int)lost[i / 4u * 8u + threadIdx.x % 4u * 2u + i % 2u]) sum[0][i / 4u][i % 4u] = NO_NUMBER;
    }
}

// The tile's rows of one group, from the place in the ring where its first keys come.
__device__ __forceinline__ void consume(const ForwardShared& s, ForwardShared::Ring& keys, u32 group, const Place& at, const Visible& visible, u32 steps, u32 before,
                                        const E* bias, E* y, float* lse, const AttentionParams& p) {
    u32 lane = threadIdx.x % WARP, row0 = at.first + group * 64u + threadIdx.x % WARP_GROUP / WARP * 16u;
    // Rows past the end see as much as the last.
    u32 least = visible.count(row0), n[2] = {visible.count(min(row0 + lane / 4u, p.queries - 1u)), visible.count(min(row0 + 8u + lane / 4u, p.queries - 1u))};
    float score[1][SPAN / 8u][4], sum[1][HEAD / 8][4];
    u32 weights[SPAN / 16u][4];
    Softmax<1> softmax(p);
    clear<1>(sum);
    auto restores = [&](const ForwardShared::Ring& values, u32 step) {
        const int seen[2] = {(int)(n[0] - step * SPAN), (int)(n[1] - step * SPAN)};
        if (is_mixed(at, visible, step)) restore(sum, s.lost_of(values), seen);
    };
    if (steps > 0u) {
        const u8* queries = s.queries + group * TILE;
        Turns turns(group, steps);
        mbarrier_wait(s.ready, before % 2u);
        mbarrier_wait(keys.full(), keys.parity);
        wgmma_fence();
        start_scores<SPAN>(score, queries, keys.tile());
        wgmma_commit();
        wgmma_wait<0>();
        hold(score);
        release(keys.empty());
        if (steps == 1u) release(s.free);
        keys.next();
        finish_scores<1, SPAN>(score, bias, n, row0, 0u, least, p);
        softmax.weigh<SPAN>(score, 0);
        softmax.weigh<SPAN>(score, 1);
        round_weights<SPAN>(weights, score);
        mbarrier_wait(keys.full(), keys.parity);
        for (u32 step = 1; step < steps; step++) {
            ForwardShared::Ring values = keys;
            values.next();
            turns.wait();
            wgmma_fence();
            start_scores<SPAN>(score, queries, keys.tile());
            wgmma_commit();
            mbarrier_wait(values.full(), values.parity);
            start_sums<SPAN>(sum, weights, values.tile(), step - 1u);
            wgmma_commit();
            turns.pass();
            wgmma_wait<1>();
            hold(score);
            release(keys.empty());
            if (step + 1u == steps) release(s.free);
            finish_scores<1, SPAN>(score, bias, n, row0, step * SPAN, least, p);
            float correction[2] = {softmax.weigh<SPAN>(score, 0), softmax.weigh<SPAN>(score, 1)};
            hold(score);
            // The next keys, or the last values. Here, as no compiler moves the wait for the sums across this loop: they run while
            // scores become weights.
            keys = values;
            keys.next();
            mbarrier_wait(keys.full(), keys.parity);
            wgmma_wait<0>();
            hold(sum);
            restores(values, step - 1u);
            release(values.empty());
#pragma unroll
            for (u32 i = 0; i < HEAD / 2u; i++) sum[0][i / 4u][i % 4u] *= correction[i % 4u / 2u];
            round_weights<SPAN>(weights, score);
        }
        wgmma_fence();
        start_sums<SPAN>(sum, weights, keys.tile(), steps - 1u);
        wgmma_commit();
        wgmma_wait<0>();
        hold(sum);
        restores(keys, steps - 1u);
        release(keys.empty());
        keys.next();
    }
    float inverse[2];
    softmax.finish(inverse, lse + ((u64)at.b * p.heads + at.h) * p.queries, n, row0, p.queries);
    store_sums(y + start_of(p, at.b, at.h, p.queries), sum, inverse, row0, p.queries, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
attention_fwd_wgmma(const E*, const E*, const E*, const u32* context, const u32* lengths, const E* bias, E* y, float* lse, const __grid_constant__ TensorMap q,
                    const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, AttentionParams p) {
    DYNAMIC_SHARED(shared);
    ForwardShared s(shared);
    begin_block<ForwardShared::Ring>(s.ring, s.ready);
    u32 group = warp_group();
    if (group == 0u) {
        registers_down<40u>();
        produce(s, &q, &k, &v, context, lengths, p);
    } else {
        registers_up<232u>();
        ForwardShared::Ring keys(s.ring);
        each_tile(p.queries, (p.flags & 3u) != 0u, p, [&](const Place& at, u32 before) {
            Visible visible = visible_of(context, lengths, p, at.b);
            u32 steps = steps_of(at, visible, p);
            consume(s, keys, group - 1u, at, visible, steps, before, bias + (u64)at.h * p.queries * p.keys, y, lse, p);
            return steps > 0u;
        });
    }
}

#endif
