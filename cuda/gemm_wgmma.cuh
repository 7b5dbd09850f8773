// Joined in front of every kernel file, after wgmma.cuh: one loop on warp groups (sm_90a) for every family whose work is products.
// A block is a warp group that copies and CONSUMERS that multiply 64 rows each. It walks over tiles of outputs; copies run ahead of
// products through a ring of stages, also from one tile into the next. A family says what is in a stage:
//
//   Stages     WgmmaStages<how many, bytes, blocks of a cluster, TURNS>: the bytes of a stage are a multiple of 1,024. Behind the ring,
//              from OWN, shared memory is the family's, filled before `wgmma_gemm` (which starts with a barrier of the block). With
//              TURNS the groups take tiles of 64 rows in turns: one finishes while the other multiplies; each is group 0 to the parts
//              below, and every number is a tile. Blocks of a cluster have the same stages, and what they copy to each other lies in the same place.
//   tiles      `count()` numbers, `Tile`, `at(id, tile)`: whether there is a tile of this number, and which; `steps(tile)`: its
//              stages, one at least. Whole warps call these, so they may use shuffles.
//   load       THREADS that copy (WARP or WARP_GROUP) and how they report a stage:
//              `begin()`; `start(tile)`, once per tile; `stage(place, tile, step)` fills place.tile() and brings place.full() its ARRIVALS and
//              bytes, now or later; `end()` reports what is left.
//   product    `Sums`, the registers of a tile: an array of float or int. `sum(place, tile, steps, group, sums)` runs the stages of a
//              tile, `wgmma_sums` with `issue(sums, stage, group, step)`: starts the products of one stage, the first (step 0) without what
//              was in the sums. An operand from registers is made there, with a fence of its own.
//   finish     `finish(sums, tile, group)`: what becomes of the 64 rows of a group; fragments as wgmma.cuh says.

#if ARCH == 90

#define CONSUMERS 2u
// Rows of outputs of a tile.
#define WGMMA_ROWS (CONSUMERS * 64u)
// With TURNS, the named barrier of group 0's turns; that of group 1 follows. Lower numbers are the families'.
#define WGMMA_TURN 8u
// Rows of tiles that are worked off together, column by column: their operands stay in cache while they are shared.
#define TILES_TOGETHER 16u

// A place in the ring: which stage is next, and the parity of its round.
template <u32 STAGES_, u32 BYTES_, u32 CLUSTER_ = 1u, bool TURNS_ = false>
struct WgmmaStages {
    static const bool TURNS = TURNS_;
    static const u32 STAGES = STAGES_, BYTES = BYTES_, CLUSTER = CLUSTER_, OWN = STAGES * (BYTES + 16u);
    static_assert(BYTES % 1024u == 0u, "turned tiles start at multiples of 1,024 bytes");
    u8* shared;
    u32 at, parity;
    __device__ __forceinline__ explicit WgmmaStages(u8* shared_) : shared(shared_), at(0u), parity(0u) {}
    __device__ __forceinline__ u8* tile() const { return shared + at * BYTES; }
    // The stage is full: arrivals and bytes of what copies. It is empty: an arrival of every warp that multiplies, in all blocks
    // of the cluster, as what one block copies may go to all.
    __device__ __forceinline__ u64* full() const { return (u64*)(shared + STAGES * BYTES) + at; }
    __device__ __forceinline__ u64* empty() const { return full() + STAGES; }
    // A warp is done with a stage.
    __device__ __forceinline__ static void release(u64* empty) {
        u32 lane = threadIdx.x % WARP;
        if (CLUSTER == 1u && lane == 0u) mbarrier_arrive(empty);
        if (CLUSTER > 1u && lane < CLUSTER) mbarrier_arrive_at(empty, lane);
    }
    __device__ __forceinline__ void next() {
        at = at + 1u == STAGES ? 0u : at + 1u;
        parity ^= at == 0u ? 1u : 0u;
    }
    // Past the stages of a tile that is another group's.
    __device__ __forceinline__ void skip(u32 stages) {
        parity ^= (at + stages) / STAGES & 1u;
        at = (at + stages) % STAGES;
    }
};

// Tiles of a batch of matrices, all with the same stages.
struct WgmmaTiles {
    u32 down, across, batch, all_steps;
    struct Tile { u32 batch, row, column; };
    __device__ __forceinline__ u32 count() const { return batch * down * across; }
    __device__ __forceinline__ u32 steps(const Tile&) const { return all_steps; }
    __device__ __forceinline__ bool at(u32 id, Tile& t) const {
        u32 each = down * across, rest = id % each, whole = TILES_TOGETHER * across;
        u32 first = rest / whole * TILES_TOGETHER, height = min(down - first, TILES_TOGETHER), within = rest % whole;
        t = {id / each, first + within % height, within / height};
        return true;
    }
};

// The same for clusters of two blocks, which work on neighbours down a column; below the last row there may be one too many.
struct WgmmaTilePairs {
    typedef WgmmaTiles::Tile Tile;
    WgmmaTiles pairs;
    __device__ __forceinline__ WgmmaTilePairs(u32 down, u32 across, u32 batch, u32 steps) : pairs{div_up(down, 2u), across, batch, steps} {}
    __device__ __forceinline__ u32 count() const { return pairs.count(); }
    __device__ __forceinline__ u32 steps(const Tile& t) const { return pairs.steps(t); }
    __device__ __forceinline__ bool at(u32 id, Tile& t) const {
        pairs.at(id, t);
        t.row = t.row * 2u + cluster_rank();
        return true;
    }
};

// One operand's 128 bytes of k: a box of EXTENT rows, or, contiguous along m or n (`blocks`), a box per 64 of those.
template <u32 EXTENT>
__device__ __forceinline__ void wgmma_copy(u8* tile, const TensorMap* map, u64* barrier, bool blocks, u32 first, u32 k0, u32 batch) {
    if (!blocks) {
        tma_load(tile, map, barrier, k0, first, batch);
    } else {
#pragma unroll
        for (u32 i = 0; i < EXTENT / 64u; i++) tma_load(tile + i * WGMMA_BLOCK, map, barrier, first + i * 64u, k0, batch);
    }
}

// Both operands by tensor maps, ROWS of a and then COLUMNS of b, 128 bytes (DEPTH) of k a stage. `batched`: the operand has planes.
template <u32 ROWS, u32 COLUMNS, u32 DEPTH = 64u>
struct WgmmaMaps {
    static const u32 THREADS = WARP, ARRIVALS = 1u;
    const TensorMap *a, *b;
    bool a_blocks, b_blocks, a_batched, b_batched;
    __device__ __forceinline__ void begin() const {
        if (threadIdx.x != 0u) return;
        tma_prefetch(a);
        tma_prefetch(b);
    }
    __device__ __forceinline__ void start(const WgmmaTiles::Tile&) const {}
    __device__ __forceinline__ void end() const {}
    template <class Stages>
    __device__ __forceinline__ void stage(const Stages& place, const WgmmaTiles::Tile& t, u32 step) const {
        if (threadIdx.x % WARP != 0u) return;
        mbarrier_arrive_expect(place.full(), (ROWS + COLUMNS) * 128u);
        wgmma_copy<ROWS>(place.tile(), a, place.full(), a_blocks, t.row * ROWS, step * DEPTH, a_batched ? t.batch : 0u);
        wgmma_copy<COLUMNS>(place.tile() + ROWS * 128u, b, place.full(), b_blocks, t.column * COLUMNS, step * DEPTH, b_batched ? t.batch : 0u);
    }
};

// Copies by threads into stages: every copying warp reports a stage once its own copies have come, OPEN stages later. As many
// stay open as the ring can spare: a stage is only freed when the product of the next has been issued.
template <class Stages>
struct WgmmaReports {
    static const u32 OPEN = Stages::STAGES - 2u;
    Stages place;
    u32 open;
    __device__ __forceinline__ explicit WgmmaReports(u8* shared) : place(shared), open(0u) {}
    __device__ __forceinline__ void report() {
        // Products read what these threads have written.
        proxy_fence();
        __syncwarp();
        if (threadIdx.x % WARP == 0u) mbarrier_arrive(place.full());
        place.next();
    }
    // All copies of a stage have been started.
    __device__ __forceinline__ void started() {
        cp_async_commit();
        if (open < OPEN) {
            open++;
            return;
        }
        cp_async_wait<(int)OPEN>();
        report();
    }
    __device__ __forceinline__ void end() {
        cp_async_wait<0>();
        for (; open > 0u; open--) report();
    }
};

// Where 16 bytes of a row of a turned tile lie.
__device__ __forceinline__ u32 wgmma_place(u32 row, u32 chunk) { return row * 128u + ((chunk ^ (row & 7u)) << 4); }

// The same for clusters of two blocks with the columns in common: each copies one half of b, to both.
template <u32 ROWS, u32 COLUMNS>
struct WgmmaMapPairs : WgmmaMaps<ROWS, COLUMNS> {
    template <class Stages>
    __device__ __forceinline__ void stage(const Stages& place, const WgmmaTiles::Tile& t, u32 step) const {
        static_assert(Stages::CLUSTER == 2u, "two blocks share b");
        if (threadIdx.x % WARP != 0u) return;
        const u32 HALF = COLUMNS / 2u;
        u32 first = t.column * COLUMNS + cluster_rank() * HALF, k0 = step * 64u, batch = this->b_batched ? t.batch : 0u;
        u8* half = place.tile() + ROWS * 128u + cluster_rank() * (HALF * 128u);
        mbarrier_arrive_expect(place.full(), (ROWS + COLUMNS) * 128u);
        wgmma_copy<ROWS>(place.tile(), this->a, place.full(), this->a_blocks, t.row * ROWS, k0, this->a_batched ? t.batch : 0u);
        if (!this->b_blocks) {
            tma_load_cluster(half, this->b, place.full(), k0, first, batch, 3u);
        } else {
#pragma unroll
            for (u32 i = 0; i < HALF / 64u; i++) tma_load_cluster(half + i * WGMMA_BLOCK, this->b, place.full(), first + i * 64u, k0, batch, 3u);
        }
    }
};

// The stages of a tile into the sums of this warp group; the product of one stage runs while the next is issued.
template <class Stages, class Product, class Sums>
__device__ __forceinline__ void wgmma_sums(Stages& place, const Product& product, u32 steps, u32 group, Sums& sums) {
    u64* before = nullptr;
    for (u32 step = 0; step < steps; step++) {
        mbarrier_wait(place.full(), place.parity);
        wgmma_fence();
        product.issue(sums, place.tile(), group, step);
        wgmma_commit();
        // The products of the step before are done, so its stage may be filled again.
        wgmma_wait<1>();
        if (before) Stages::release(before);
        before = place.empty();
        place.next();
    }
    wgmma_wait<0>();
    wgmma_hold(sums);
    Stages::release(before);
}

// 64 rows of 16-bit a from its group's block, COLUMNS of b from byte B of the stage on, 64 of k.
template <u32 COLUMNS, u32 B, bool A_BLOCKS, bool B_BLOCKS>
struct WgmmaProduct {
    typedef float Sums[COLUMNS / 2u];
    __device__ __forceinline__ void issue(Sums& sums, const u8* stage, u32 group, u32 step) const {
        // 64 rows of a are WGMMA_BLOCK bytes in both orders.
        const u8* a = stage + group * WGMMA_BLOCK;
#pragma unroll
        for (u32 part = 0; part < 4u; part++)
            wgmma<COLUMNS, A_BLOCKS, B_BLOCKS>(sums, wgmma_operand<A_BLOCKS>(a, wgmma_step<A_BLOCKS>(part)),
                                               wgmma_operand<B_BLOCKS>(stage + B, wgmma_step<B_BLOCKS>(part)), step | part);
    }
    template <class Stages, class Tile>
    __device__ __forceinline__ void sum(Stages& place, const Tile&, u32 steps, u32 group, Sums& sums) const {
        wgmma_sums(place, *this, steps, group, sums);
    }
};

// The same in any order of the operands, chosen for each tile: bit 0 of `orders` is A_BLOCKS, bit 1 B_BLOCKS.
template <u32 COLUMNS, u32 B>
struct WgmmaOrders {
    typedef float Sums[COLUMNS / 2u];
    u32 orders;
    template <class Stages, class Tile>
    __device__ __forceinline__ void sum(Stages& place, const Tile&, u32 steps, u32 group, Sums& sums) const {
        switch (orders) {
            case 0u: wgmma_sums(place, WgmmaProduct<COLUMNS, B, false, false>(), steps, group, sums); break;
            case 1u: wgmma_sums(place, WgmmaProduct<COLUMNS, B, true, false>(), steps, group, sums); break;
            case 2u: wgmma_sums(place, WgmmaProduct<COLUMNS, B, false, true>(), steps, group, sums); break;
            default: wgmma_sums(place, WgmmaProduct<COLUMNS, B, true, true>(), steps, group, sums); break;
        }
    }
};

template <class Stages, class Tiles, class Load>
__device__ __forceinline__ void wgmma_produce(u8* shared, const Tiles& tiles, Load& load) {
    Stages place(shared);
    typename Tiles::Tile tile;
    load.begin();
    for (u32 id = blockIdx.x / Stages::CLUSTER; id < tiles.count(); id += gridDim.x / Stages::CLUSTER) {
        if (!tiles.at(id, tile)) continue;
        u32 steps = tiles.steps(tile);
        load.start(tile);
        for (u32 step = 0; step < steps; step++) {
            // In the first round every stage is empty: parity 1 of a new barrier passes.
            mbarrier_wait(place.empty(), place.parity ^ 1u);
            load.stage(place, tile, step);
            // One lane may have copied alone.
            __syncwarp();
            place.next();
        }
    }
    load.end();
}

template <class Stages, class Tiles, class Product, class Finish>
__device__ __forceinline__ void wgmma_consume(u8* shared, u32 group, const Tiles& tiles, const Product& product, const Finish& finish) {
    Stages place(shared);
    typename Tiles::Tile tile;
    u32 turn = 0u, stride = gridDim.x / Stages::CLUSTER;
    for (u32 id = blockIdx.x / Stages::CLUSTER; id < tiles.count(); id += stride) {
        if (!tiles.at(id, tile)) continue;
        u32 steps = tiles.steps(tile);
        if (Stages::TURNS && turn++ % CONSUMERS != group) {
            place.skip(steps);
            continue;
        }
        // A parity tells a phase from the one before alone, so nobody waits for a stage before the other group has had all before it.
        // The first turn is free, and after the last one nobody waits.
        if (Stages::TURNS && turn > 1u) named_barrier(WGMMA_TURN + group, CONSUMERS * WARP_GROUP);
        typename Product::Sums sums;
        product.sum(place, tile, steps, Stages::TURNS ? 0u : group, sums);
        if (Stages::TURNS && id + stride < tiles.count()) named_arrive(WGMMA_TURN + 1u - group, CONSUMERS * WARP_GROUP);
        finish(sums, tile, Stages::TURNS ? 0u : group);
    }
}

// The kernel: launch bounds of 384 threads and one block per multiprocessor, without which setmaxnreg does nothing.
template <class Stages, class Tiles, class Load, class Product, class Finish>
__device__ __forceinline__ void wgmma_gemm(u8* shared, const Tiles& tiles, Load load, const Product& product, const Finish& finish) {
    if (threadIdx.x == 0u) {
        Stages place(shared);
        for (u32 i = 0; i < Stages::STAGES; i++) {
            mbarrier_init(place.full(), Load::ARRIVALS);
            mbarrier_init(place.empty(), Stages::CLUSTER * (Stages::TURNS ? 1u : CONSUMERS) * WARP_GROUP / WARP);
            place.next();
        }
        mbarrier_init_fence();
    }
    if (Stages::CLUSTER > 1u) cluster_barrier();
    else __syncthreads();
    u32 group = threadIdx.x / WARP_GROUP;
    if (group == 0u) {
        // Copies by threads keep addresses.
        registers_down<Load::THREADS == WARP ? 40u : 56u>();
        if (threadIdx.x < Load::THREADS) wgmma_produce<Stages>(shared, tiles, load);
    } else {
        registers_up<Load::THREADS == WARP ? 232u : 224u>();
        wgmma_consume<Stages>(shared, group - 1u, tiles, product, finish);
    }
    // Shared memory stays while other blocks may reach for it.
    if (Stages::CLUSTER > 1u) cluster_barrier();
}

// Where this lane's first fragment of a group's 64 rows starts.
__device__ __forceinline__ u32 wgmma_row() { return threadIdx.x % WARP_GROUP / WARP * 16u + threadIdx.x % WARP / 4u; }
__device__ __forceinline__ u32 wgmma_column() { return threadIdx.x % 4u * 2u; }

#ifdef TENSOR_16

// Two neighbouring values of a row of `columns`; zeros outside. Rows of whole eights: the pair is one word.
__device__ __forceinline__ void wgmma_pair(float (&pair)[2], const E* line, u32 column, u32 columns, bool aligned) {
    u32 word = 0u;
    if (column < columns) word = aligned ? *(const u32*)(line + column) : pack_pair(line[column], column + 1u < columns ? line[column + 1u] : (E)0);
    pair[0] = ld((E)word);
    pair[1] = ld((E)(word >> 16));
}

// Sums to [rows, columns] without gaps, four fragments (32 columns) at a time: bias where there is one, what is there (`add`) and
// the activation (0 none, 1 ReLU, 2 GELU) in f32.
struct WgmmaStore {
    const E* bias;
    E* out;
    u32 rows, columns, activation;
    bool add;

    template <u32 COUNT>
    __device__ __forceinline__ void operator()(const float (&sums)[COUNT], u32 row, u32 column) const {
        row += wgmma_row();
        column += wgmma_column();
        bool aligned = columns % 8u == 0u;
#pragma unroll
        for (u32 first = 0; first < COUNT / 4u; first += 4u) {
            // Zeros stand for what is outside or absent; x + 0 is x, but for the sign of a zero.
            float shift[4][2] = {};
            if (bias) {
#pragma unroll
                for (u32 j = 0; j < 8u; j++) {
                    u32 c = column + (first + j / 2u) * 8u + j % 2u;
                    if (c < columns) shift[j / 2u][j % 2u] = ld(bias[c]);
                }
            }
#pragma unroll
            for (u32 half = 0; half < 2u; half++) {
                u32 at = row + half * 8u, pairs[4];
                bool inside = at < rows;
                E* line = out + (u64)(inside ? at : 0u) * columns;
#pragma unroll
                for (u32 j = 0; j < 4u; j++) {
                    float z[2] = {sums[(first + j) * 4u + half * 2u] + shift[j][0], sums[(first + j) * 4u + half * 2u + 1u] + shift[j][1]};
                    if (add && inside) {
                        float old[2];
                        wgmma_pair(old, line, column + (first + j) * 8u, columns, aligned);
                        z[0] += old[0];
                        z[1] += old[1];
                    }
#pragma unroll
                    for (u32 q = 0; q < 2u; q++) {
                        // A NaN is not below 0 and stays.
                        if (activation == 1u) z[q] = z[q] < 0.0f ? 0.0f : z[q];
                        else if (activation == 2u) z[q] = z[q] * gelu_gate<true>(z[q]);
                    }
                    pairs[j] = round_pair(z[0], z[1]);
                }
                gemm_store_row<4u>(line, pairs, inside, column + first * 8u, columns, aligned);
            }
        }
    }
};

#endif

#endif
