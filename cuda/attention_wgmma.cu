// op:       attention
// math:     as attention.cu: y = softmax(scale q k^T + bias) v over the visible keys; lse = log sum exp of the scores
// grad:     attention_bwd_wgmma.cu
// shapes:   slots: q[B,T,H,D], k[B,S,H,D], v[B,S,H,D], context[B], lengths[B], bias[H,T,S], y[B,T,H,D], lse[B,H,T];
//           D is a multiple of 8, at most HEAD, which is 64 or 128
// layout:   contiguous; q, k and v by tensor maps of boxes of 64, 128 and 64 rows, planes as attention_wgmma.cuh says; an absent
//           optional input is any read argument and never read
// launch:   linear, a block for 128 query rows of a head, of 384 threads: a warp group that copies and two that take 64 rows each;
//           shared: 128 rows of HEAD elements, a ring of 512 / HEAD tiles of as many, 16 bytes for each of those, 1 KiB
// cost:     4 B H T S D flops
// numerics: as attention_mma.cu: f32 sums, P rounded once, to the storage type; no atomics on floats; hidden keys matter to
//           nobody, not even as NaN; infinite values may come out as NaN
// source:   Shah et al. 2024 (FlashAttention-3); Dao 2023; Milakov and Gimelshein 2018; PTX ISA 8.0
// rungs:    v3 (9.0 alone), for attention_mma.cu's v2: while one group weighs its scores, the other has the tensor cores, and its
//           own last weights meet their values; v1 is attention.cu

#if defined(HEAD) && ARCH == 90 && HEAD % 64 == 0

#define SPAN 128u

struct ForwardShared {
    typedef WgmmaStages<512u / HEAD, SPAN * HEAD * 2u> Ring;
    // A tile of queries per group.
    u8 *queries, *ring;
    // The queries have come; values that are cleaned before use have come.
    u64 *ready, *raw;
    // The first key whose value is not finite, of those that were cleaned away, for each column.
    u32* first;
    __device__ __forceinline__ explicit ForwardShared(u8* shared)
        : queries(shared), ring(shared + 2u * TILE), ready((u64*)(ring + Ring::OWN)), raw(ready + 1), first((u32*)(raw + 1)) {}
};

// Keys and values of a step: keys run one step ahead, as their scores do.
__device__ __forceinline__ void produce(const ForwardShared& s, const TensorMap* q, const TensorMap* k, const TensorMap* v, const Place& at, u32 steps,
                                        u32 least, const AttentionParams& p) {
    ForwardShared::Ring place(s.ring);
    u32 plane = plane_of(p, at, p.keys), cleaned = 0u;
    bool leads = threadIdx.x == 0u;
    if (leads) {
        u32 own = plane_of(p, at, p.queries);
        mbarrier_arrive_expect(s.ready, 2u * TILE);
        load_tile<64>(s.queries, q, s.ready, at.first, own);
        load_tile<64>(s.queries + TILE, q, s.ready, at.first + 64u, own);
    }
    for (u32 step = 0; step <= steps; step++) {
        if (step < steps) {
            if (leads) {
                // In the first round every tile is empty: parity 1 of a new barrier passes.
                mbarrier_wait(place.empty(), place.parity ^ 1u);
                mbarrier_arrive_expect(place.full(), 2u * TILE);
                load_tile<SPAN>(place.tile(), k, place.full(), step * SPAN, plane);
            }
            place.next();
        }
        if (step == 0u) continue;
        u32 base = (step - 1u) * SPAN;
        bool mixed = base + SPAN > least;
        if (leads) {
            u64* barrier = mixed ? s.raw : place.full();
            mbarrier_wait(place.empty(), place.parity ^ 1u);
            mbarrier_arrive_expect(barrier, 2u * TILE);
            load_tile<64>(place.tile(), v, barrier, base, plane);
            load_tile<64>(place.tile() + TILE, v, barrier, base + 64u, plane);
        }
        if (mixed) {
            // Some row does not see all of these keys.
            mbarrier_wait(s.raw, cleaned++ % 2u);
            clean_tiles(place.tile(), 2u * TILE, [&](u32 row, u32 column) { atomicMin(s.first + column, base + row); });
            if (leads) mbarrier_arrive(place.full());
        }
        place.next();
    }
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

__device__ __forceinline__ void consume(const ForwardShared& s, u32 group, const Place& at, u32 steps, const Visible& visible, const E* bias, E* y, float* lse,
                                        const AttentionParams& p) {
    u32 lane = threadIdx.x % WARP, row0 = at.first + group * 64u + threadIdx.x % WARP_GROUP / WARP * 16u;
    // Rows past the end see as much as the last.
    u32 least = visible.count(row0), n[2] = {visible.count(min(row0 + lane / 4u, p.queries - 1u)), visible.count(min(row0 + 8u + lane / 4u, p.queries - 1u))};
    float score[1][SPAN / 8u][4], sum[1][HEAD / 8][4];
    u32 weights[SPAN / 16u][4];
    Softmax<1> softmax(p);
    clear<1>(sum);
    if (steps > 0u) {
        const u8* queries = s.queries + group * TILE;
        Turns turns(group, steps);
        ForwardShared::Ring keys(s.ring);
        mbarrier_wait(s.ready, 0u);
        mbarrier_wait(keys.full(), keys.parity);
        wgmma_fence();
        start_scores<SPAN>(score, queries, keys.tile());
        wgmma_commit();
        wgmma_wait<0>();
        hold(score);
        release(keys.empty());
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
            wgmma_fence();
            start_sums<SPAN>(sum, weights, values.tile(), step - 1u);
            wgmma_commit();
            turns.pass();
            wgmma_wait<1>();
            hold(score);
            release(keys.empty());
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
    }
    float inverse[2];
    softmax.finish(inverse, lse + ((u64)at.b * p.heads + at.h) * p.queries, n, row0, p.queries);
    store_sums(y + start_of(p, at.b, at.h, p.queries), sum, inverse, row0, p.queries, p, [&](u32 half, u32 column) { return n[half] > s.first[column]; });
}

extern "C" __global__ void __launch_bounds__(384, 1)
attention_fwd_wgmma(const E*, const E*, const E*, const u32* context, const u32* lengths, const E* bias, E* y, float* lse, const __grid_constant__ TensorMap q,
                    const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, AttentionParams p) {
    DYNAMIC_SHARED(shared);
    ForwardShared s(shared);
    Place at = place_of(p, p.queries, SPAN, (p.flags & 3u) != 0u);
    if (at.b >= p.batch) return;
    if (threadIdx.x == 0u) {
        ForwardShared::Ring place(s.ring);
        for (u32 i = 0; i < ForwardShared::Ring::STAGES; i++) {
            mbarrier_init(place.full(), 1u);
            mbarrier_init(place.empty(), 2u * WARP_GROUP / WARP);
            place.next();
        }
        mbarrier_init(s.ready, 1u);
        mbarrier_init(s.raw, 1u);
        mbarrier_init_fence();
    }
    if (threadIdx.x < HEAD) s.first[threadIdx.x] = ~0u;
    __syncthreads();
    Visible visible = visible_of(context, lengths, p, at.b);
    u32 steps = div_up(visible.count(min(at.first + SPAN, p.queries) - 1u), SPAN), group = threadIdx.x / WARP_GROUP;
    if (group == 0u) {
        registers_down<40u>();
        if (steps > 0u) produce(s, &q, &k, &v, at, steps, visible.count(at.first), p);
    } else {
        registers_up<232u>();
        consume(s, group - 1u, at, steps, visible, bias + (u64)at.h * p.queries * p.keys, y, lse, p);
    }
}

#endif
