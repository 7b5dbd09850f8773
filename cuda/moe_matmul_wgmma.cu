// op:       grouped_matmul, grouped_matmul_bwd_input, grouped_matmul_bwd_weight
// math:     as moe_matmul.cu: y[r, j] = f(sum_c x[row(r), c] w[e(r), j, c] + b[e(r), j]); dx[r, c] = sum_j dz[r, j] w[e(r), j, c];
//           dw[e, j, c] = sum_{r in e} dz[r, j] x[row(r), c]; db[e, j] = sum_{r in e} dz[r, j]
// grad:     by the last two
// shapes:   fwd: x[M, D], w[E, N, D], b[E, N], order[R], offsets[E + 1], y[R, N]; bwd_input: dz[R, N], w, offsets, dx[R, D];
//           bwd_weight: dz[R, N], x[M, D], order[R], offsets, dw[E, N, D]; bias: dz[R, N], offsets, db[E, N]
// layout:   rows contiguous, N and D multiples of 8; weights and sorted rows by tensor maps, gathered rows by the copying threads
// launch:   384 threads, gemm_wgmma.cuh, one launch for all experts: 128x256 (narrow: 128x128) outputs of one expert a tile; bias: 256 threads,
//           64 columns in x, experts in y
// cost:     2 R N D flop each; weights of experts without rows are never read
// numerics: f32 sums in rising order of the summed axis; db of every 32nd row, then of these
// source:   Shazeer et al. 2017; rows gathered as they are copied: ScatterMoE, SonicMoE
// rungs:    v3 (9.0 alone), for moe_matmul.cu's mma and below

#if ARCH == 90

struct GroupedWgmmaParams {
    // Sorted rows, columns of the outputs (bwd_weight: D), the summed axis (bwd_weight: N, rows of the outputs), slots of a token.
    u32 rows, columns, inner, k;
    u32 experts;
    // Bit 0 gather, bit 1 ReLU, bit 2 bias.
    u32 mode;
};

#define GROUPED_B (WGMMA_ROWS * 128u)

// Where the sorted rows of an expert start; those of the one past the last: their number. Offsets are data and stay inside.
__device__ __forceinline__ u32 grouped_start(const u32* offsets, u32 experts, u32 rows, u32 e) {
    if (e == 0u) return 0u;
    return e < experts ? min(offsets[e], rows) : rows;
}

struct GroupedTile {
    // Sorted rows of the expert from `first` on.
    u32 expert, first, count, column;
};

// Tiles of sorted rows, a list in shared memory: where each expert's rows start, and how many tiles of rows come before it.
template <u32 COLUMNS>
struct GroupedTiles {
    u32 *starts, *before;
    u32 experts, across, all_steps;
    typedef GroupedTile Tile;

    // One warp writes the list: sums over 32 experts at a time.
    __device__ __forceinline__ GroupedTiles(u32* own, const u32* offsets, const GroupedWgmmaParams& p)
        : starts(own), before(own + p.experts + 1u), experts(p.experts), across(div_up(p.columns, COLUMNS)), all_steps(div_up(p.inner, 64u)) {
        if (threadIdx.x >= WARP) return;
        u32 lane = threadIdx.x, all = 0u;
        for (u32 base = 0u; base <= experts; base += WARP) {
            u32 e = base + lane, start = p.rows, end = p.rows;
            if (e < experts) {
                start = grouped_start(offsets, experts, p.rows, e);
                end = grouped_start(offsets, experts, p.rows, e + 1u);
            }
            u32 tiles = end > start ? div_up(end - start, WGMMA_ROWS) : 0u, sum = tiles;
#pragma unroll
            for (u32 by = 1u; by < WARP; by *= 2u) {
                u32 got = __shfl_up_sync(ALL_LANES, sum, by);
                if (lane >= by) sum += got;
            }
            if (e <= experts) {
                starts[e] = start;
                before[e] = all + sum - tiles;
            }
            all += __shfl_sync(ALL_LANES, sum, WARP - 1u);
        }
    }
    __device__ __forceinline__ u32 count() const { return before[experts] * across; }
    __device__ __forceinline__ u32 steps(const Tile&) const { return all_steps; }
    __device__ __forceinline__ bool at(u32 id, Tile& t) const {
        u32 down = before[experts], whole = TILES_TOGETHER * across;
        u32 first = id / whole * TILES_TOGETHER, height = min(down - first, TILES_TOGETHER), within = id % whole;
        u32 wanted = first + within % height;
        // The last expert with no more than that many tiles before it has the tile.
        u32 low = 0u, high = experts;
        while (high - low > 1u) {
            u32 middle = (low + high) / 2u;
            if (before[middle] <= wanted) low = middle;
            else high = middle;
        }
        u32 row = (wanted - before[low]) * WGMMA_ROWS;
        t = {low, starts[low] + row, starts[low + 1u] - starts[low] - row, within / height};
        return true;
    }
};

// Sorted rows by a map, the expert's weights by another: rows along k, or (B_BLOCKS) k along rows.
template <u32 COLUMNS, bool B_BLOCKS>
struct GroupedSorted {
    static const u32 THREADS = WARP, ARRIVALS = 1u;
    const TensorMap *a, *b;
    __device__ __forceinline__ void begin() const {
        if (threadIdx.x != 0u) return;
        tma_prefetch(a);
        tma_prefetch(b);
    }
    __device__ __forceinline__ void start(const GroupedTile&) const {}
    __device__ __forceinline__ void end() const {}
    template <class Stages>
    __device__ __forceinline__ void stage(const Stages& place, const GroupedTile& t, u32 step) const {
        if (threadIdx.x != 0u) return;
        mbarrier_arrive_expect(place.full(), Stages::BYTES);
        // Rows of the next expert below the tile make outputs that are not stored.
        tma_load(place.tile(), a, place.full(), step * 64u, t.first, 0u);
        wgmma_copy<COLUMNS>(place.tile() + GROUPED_B, b, place.full(), B_BLOCKS, t.column * COLUMNS, step * 64u, t.expert);
    }
};

// Rows of tokens for sorted rows.
struct GroupedOrder {
    const u32* order;
    u32 last, k;
    bool gather;
    __device__ __forceinline__ GroupedOrder(const u32* order_, const GroupedWgmmaParams& p)
        : order(order_), last(p.rows - 1u), k(p.k), gather((p.mode & 1u) != 0u) {}
    // An order is data: slots past the end count as the last.
    __device__ __forceinline__ u32 operator()(u32 row) const { return gather ? min(order[row], last) / k : row; }
};

// Rows of x gathered by the copying threads, eight threads to 128 bytes of a row.
template <class Stages, u32 COLUMNS>
struct GroupedGathered {
    static const u32 THREADS = WARP_GROUP, ARRIVALS = 1u + WARP_GROUP / WARP, COPIES = WGMMA_ROWS * 8u / WARP_GROUP;
    const E* x;
    const TensorMap* b;
    GroupedOrder order;
    u32 inner;
    WgmmaReports<Stages> reports;
    // Of the tile: where rows of x start, in 16 bytes, and which of them are the expert's.
    u32 rows[COPIES], inside;

    __device__ __forceinline__ void begin() const {
        if (threadIdx.x == 0u) tma_prefetch(b);
    }
    __device__ __forceinline__ void start(const GroupedTile& t) {
        inside = 0u;
#pragma unroll
        for (u32 i = 0; i < COPIES; i++) {
            u32 r = threadIdx.x / 8u + i * (WARP_GROUP / 8u);
            rows[i] = r < t.count ? order(t.first + r) * (inner / 8u) : 0u;
            inside |= r < t.count ? 1u << i : 0u;
        }
    }
    __device__ __forceinline__ void stage(const Stages& place, const GroupedTile& t, u32 step) {
        if (threadIdx.x == 0u) {
            mbarrier_arrive_expect(place.full(), COLUMNS * 128u);
            tma_load(place.tile() + GROUPED_B, b, place.full(), step * 64u, t.column * COLUMNS, t.expert);
        }
        u32 at = step * 64u + threadIdx.x % 8u * 8u;
        u32 live = at < inner ? inside : 0u;
        // Rows 16 apart are turned alike.
        u8* to = place.tile() + wgmma_place(threadIdx.x / 8u, threadIdx.x % 8u);
        const E* from = x + (at < inner ? at : 0u);
#pragma unroll
        for (u32 i = 0; i < COPIES; i++) cp_async_16(to + i * 2048u, from + (u64)rows[i] * 8u, (int)((live >> i & 1u) * 16u));
        reports.started();
    }
    __device__ __forceinline__ void end() { reports.end(); }
};

// Bias where there is one, ReLU, storage; the expert's rows alone.
template <u32 COLUMNS>
struct GroupedFinish {
    const E* bias;
    E* y;
    const GroupedWgmmaParams& p;
    __device__ __forceinline__ void operator()(const float (&sums)[COLUMNS / 2u], const GroupedTile& t, u32 group) const {
        const E* shift = p.mode & 4u ? bias + (u64)t.expert * p.columns : nullptr;
        WgmmaStore store = {shift, y + (u64)t.first * p.columns, t.count, p.columns, p.mode & 2u ? 1u : 0u, false};
        store(sums, group * 64u, t.column * COLUMNS);
    }
};

template <u32 COLUMNS, bool B_BLOCKS>
__device__ __forceinline__ void grouped_sorted(const E* bias, const u32* offsets, E* y, const TensorMap* a, const TensorMap* b, const GroupedWgmmaParams& p) {
    typedef WgmmaStages<4u, (WGMMA_ROWS + COLUMNS) * 128u> Stages;
    DYNAMIC_SHARED(shared);
    GroupedTiles<COLUMNS> tiles((u32*)(shared + Stages::OWN), offsets, p);
    wgmma_gemm<Stages>(shared, tiles, GroupedSorted<COLUMNS, B_BLOCKS>{a, b}, WgmmaProduct<COLUMNS, GROUPED_B, false, B_BLOCKS>(),
                       GroupedFinish<COLUMNS>{bias, y, p});
}

template <u32 COLUMNS>
__device__ __forceinline__ void grouped_gathered(const E* x, const E* bias, const u32* order, const u32* offsets, E* y, const TensorMap* w,
                                                 const GroupedWgmmaParams& p) {
    typedef WgmmaStages<4u, (WGMMA_ROWS + COLUMNS) * 128u> Stages;
    DYNAMIC_SHARED(shared);
    GroupedTiles<COLUMNS> tiles((u32*)(shared + Stages::OWN), offsets, p);
    GroupedGathered<Stages, COLUMNS> load = {x, w, GroupedOrder(order, p), p.inner, WgmmaReports<Stages>(shared), {}, 0u};
    wgmma_gemm<Stages>(shared, tiles, load, WgmmaProduct<COLUMNS, GROUPED_B, false, false>(), GroupedFinish<COLUMNS>{bias, y, p});
}

// dw: tiles of [N, D] of an expert, whose rows are the axis that is summed; `first` and `count` are all of them.
template <u32 COLUMNS>
struct GroupedWeightTiles {
    const u32* offsets;
    u32 experts, rows, down, across;
    struct Tile { u32 expert, first, count, row, column; };
    __device__ __forceinline__ u32 count() const { return experts * down * across; }
    // Without rows one stage of zeros.
    __device__ __forceinline__ u32 steps(const Tile& t) const { return max(div_up(t.count, 64u), 1u); }
    __device__ __forceinline__ bool at(u32 id, Tile& t) const {
        u32 expert = id / (down * across), rest = id % (down * across);
        u32 first = grouped_start(offsets, experts, rows, expert), end = grouped_start(offsets, experts, rows, expert + 1u);
        t = {expert, first, end > first ? end - first : 0u, rest % down, rest / down};
        return true;
    }
};

// 64 of the expert's rows of dz and x, both contiguous along m and n. What a map cannot give, rows that are gathered and the last
// ones, behind which zeros stand for the next expert's, the threads copy.
template <class Stages, u32 COLUMNS>
struct GroupedWeightLoad {
    static const u32 THREADS = WARP_GROUP, ARRIVALS = 1u + WARP_GROUP / WARP, COPIES = 64u * 8u / WARP_GROUP;
    typedef typename GroupedWeightTiles<COLUMNS>::Tile Tile;
    const E *dz, *x;
    const TensorMap *dz_map, *x_map;
    GroupedOrder order;
    u32 n, d;
    WgmmaReports<Stages> reports;
    // Rows of x of the next stage: known before its copies start.
    u32 next[COPIES];

    __device__ __forceinline__ void begin() const {
        if (threadIdx.x != 0u) return;
        tma_prefetch(dz_map);
        tma_prefetch(x_map);
    }
    __device__ __forceinline__ u32 row(u32 i) const { return threadIdx.x / 8u + i * (WARP_GROUP / 8u); }
    __device__ __forceinline__ void look_up(const Tile& t, u32 k0) {
#pragma unroll
        for (u32 i = 0; i < COPIES; i++) next[i] = k0 + row(i) < t.count ? order(t.first + k0 + row(i)) : 0u;
    }
    __device__ __forceinline__ void start(const Tile& t) { look_up(t, 0u); }

    template <u32 EXTENT>
    __device__ __forceinline__ void copy(u8* tile, const E* base, u32 at, u32 i, bool there, u32 column, u32 columns) const {
        column += threadIdx.x % 8u * 8u;
        const E* from = base + (u64)at * columns;
        u32 to = wgmma_place(row(i), threadIdx.x % 8u);
#pragma unroll
        for (u32 block = 0; block < EXTENT / 64u; block++) {
            bool inside = there && column + block * 64u < columns;
            cp_async_16(tile + block * WGMMA_BLOCK + to, inside ? from + column + block * 64u : base, inside ? 16 : 0);
        }
    }
    __device__ __forceinline__ void stage(const Stages& place, const Tile& t, u32 step) {
        u32 k0 = step * 64u, n0 = t.row * WGMMA_ROWS, d0 = t.column * COLUMNS;
        bool dz_mapped = k0 + 64u <= t.count, x_mapped = dz_mapped && !order.gather;
        u8 *a = place.tile(), *b = a + GROUPED_B;
        if (threadIdx.x == 0u) {
            mbarrier_arrive_expect(place.full(), (dz_mapped ? GROUPED_B : 0u) + (x_mapped ? COLUMNS * 128u : 0u));
            if (dz_mapped) wgmma_copy<WGMMA_ROWS>(a, dz_map, place.full(), true, n0, t.first + k0, 0u);
            if (x_mapped) wgmma_copy<COLUMNS>(b, x_map, place.full(), true, d0, t.first + k0, 0u);
        }
#pragma unroll
        for (u32 i = 0; i < COPIES; i++) {
            u32 r = k0 + row(i);
            bool there = r < t.count;
            if (!dz_mapped) copy<WGMMA_ROWS>(a, dz, there ? t.first + r : 0u, i, there, n0, n);
            if (!x_mapped) copy<COLUMNS>(b, x, next[i], i, there, d0, d);
        }
        look_up(t, k0 + 64u);
        reports.started();
    }
    __device__ __forceinline__ void end() { reports.end(); }
};

template <u32 COLUMNS>
struct GroupedWeightFinish {
    E* dw;
    u32 n, d;
    __device__ __forceinline__ void operator()(const float (&sums)[COLUMNS / 2u], const typename GroupedWeightTiles<COLUMNS>::Tile& t, u32 group) const {
        WgmmaStore store = {nullptr, dw + (u64)t.expert * n * d, n, d, 0u, false};
        store(sums, t.row * WGMMA_ROWS + group * 64u, t.column * COLUMNS);
    }
};

template <u32 COLUMNS>
__device__ __forceinline__ void grouped_weight(const E* dz, const E* x, const u32* order, const u32* offsets, E* dw, const TensorMap* dz_map,
                                               const TensorMap* x_map, const GroupedWgmmaParams& p) {
    typedef WgmmaStages<4u, (WGMMA_ROWS + COLUMNS) * 128u> Stages;
    DYNAMIC_SHARED(shared);
    GroupedWeightTiles<COLUMNS> tiles = {offsets, p.experts, p.rows, div_up(p.inner, WGMMA_ROWS), div_up(p.columns, COLUMNS)};
    GroupedWeightLoad<Stages, COLUMNS> load = {dz, x, dz_map, x_map, GroupedOrder(order, p), p.inner, p.columns, WgmmaReports<Stages>(shared), {}};
    wgmma_gemm<Stages>(shared, tiles, load, WgmmaProduct<COLUMNS, GROUPED_B, true, true>(), GroupedWeightFinish<COLUMNS>{dw, p.inner, p.columns});
}

#define GROUPED_MAPS const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, GroupedWgmmaParams p

extern "C" __global__ void __launch_bounds__(384, 1)
grouped_sorted_wgmma(const E*, const E*, const E* bias, const u32*, const u32* offsets, E* y, GROUPED_MAPS) {
    grouped_sorted<256u, false>(bias, offsets, y, &a, &b, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
grouped_sorted_narrow_wgmma(const E*, const E*, const E* bias, const u32*, const u32* offsets, E* y, GROUPED_MAPS) {
    grouped_sorted<128u, false>(bias, offsets, y, &a, &b, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
grouped_gathered_wgmma(const E* x, const E*, const E* bias, const u32* order, const u32* offsets, E* y, const __grid_constant__ TensorMap w,
                       GroupedWgmmaParams p) {
    grouped_gathered<256u>(x, bias, order, offsets, y, &w, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
grouped_gathered_narrow_wgmma(const E* x, const E*, const E* bias, const u32* order, const u32* offsets, E* y, const __grid_constant__ TensorMap w,
                              GroupedWgmmaParams p) {
    grouped_gathered<128u>(x, bias, order, offsets, y, &w, p);
}

extern "C" __global__ void __launch_bounds__(384, 1) grouped_input_wgmma(const E*, const E*, const u32* offsets, E* dx, GROUPED_MAPS) {
    grouped_sorted<256u, true>(nullptr, offsets, dx, &a, &b, p);
}

extern "C" __global__ void __launch_bounds__(384, 1) grouped_input_narrow_wgmma(const E*, const E*, const u32* offsets, E* dx, GROUPED_MAPS) {
    grouped_sorted<128u, true>(nullptr, offsets, dx, &a, &b, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
grouped_weight_wgmma(const E* dz, const E* x, const u32* order, const u32* offsets, E* dw, GROUPED_MAPS) {
    grouped_weight<256u>(dz, x, order, offsets, dw, &a, &b, p);
}

extern "C" __global__ void __launch_bounds__(384, 1)
grouped_weight_narrow_wgmma(const E* dz, const E* x, const u32* order, const u32* offsets, E* dw, GROUPED_MAPS) {
    grouped_weight<128u>(dz, x, order, offsets, dw, &a, &b, p);
}

// db of 64 columns of an expert: a thread sums eight columns of every 32nd row.
extern "C" __global__ void __launch_bounds__(256) grouped_bias_wgmma(const E* dz, const u32* offsets, E* db, GroupedWgmmaParams p) {
    __shared__ float parts[32][64];
    u32 e = blockIdx.y, first = grouped_start(offsets, p.experts, p.rows, e), end = grouped_start(offsets, p.experts, p.rows, e + 1u);
    u32 column = blockIdx.x * 64u, within = threadIdx.x % 8u * 8u, down = threadIdx.x / 8u;
    float sums[8] = {};
    if (column + within < p.inner) {
#pragma unroll 4
        for (u32 r = first + down; r < end; r += 32u) {
            float values[8];
            unpack_vector(values, load_vector(dz + (u64)r * p.inner + column + within));
#pragma unroll
            for (u32 i = 0; i < 8u; i++) sums[i] += values[i];
        }
    }
#pragma unroll
    for (u32 i = 0; i < 8u; i++) parts[down][within + i] = sums[i];
    __syncthreads();
    if (threadIdx.x >= 64u || column + threadIdx.x >= p.inner) return;
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 32u; i++) sum += parts[i][threadIdx.x];
    db[(u64)e * p.inner + column + threadIdx.x] = st(sum);
}

#endif
