// Joined in front of every kernel file, after attention.cuh, and empty unless HEAD is defined: tiles of attention for warp groups
// (attention_wgmma.cu, attention_bwd_wgmma.cu). Maps have a plane for each head of each sequence; what a box holds beyond the
// head dimension or the last row is zero. HEAD is 64 or 128.
//
//   A tile of 64 rows has a block of WGMMA_BLOCK bytes for each 64 columns, so that one tile serves as an operand along its rows'
//   elements (scores) and, as blocks, along its rows (sums). A tile of 128 rows serves for scores alone.

#if defined(HEAD) && ARCH == 90 && HEAD % 64 == 0

// Rows of a block, 64 of each group that multiplies.
#define SPAN 128u
#define SIDES (HEAD / 64u)
// Bytes of a tile of 64 rows.
#define TILE (64u * HEAD * 2u)
#define NO_NUMBER __uint_as_float(0x7fffffffu)
// Named barriers: of the group that copies, and the turns of the two that multiply.
#define COPIERS 1u
#define TURN 2u

// The number of the thread's warp group, by a way from which the compiler sees that a warp does not part on it: branches on it may
// then hold products, which run one by one in what it takes for divergent code.
__device__ __forceinline__ u32 warp_group() { return __shfl_sync(ALL_LANES, threadIdx.x / WARP_GROUP, 0); }

// The plane of a head in a tensor [B, extent, H, D].
__device__ __forceinline__ u32 plane_of(const AttentionParams& p, const Place& at, u32 extent) { return at.b * extent * p.heads + at.h; }

// Calls `each(at, before)` with a block's tiles of rows in order and how many of them had any work before, which is what it returns.
// Every other round goes backwards: under a mask, who had much to do then has little.
template <class Each>
__device__ __forceinline__ void each_tile(u32 extent, bool backwards, const AttentionParams& p, Each each) {
    u32 tiles = p.batch * p.heads * div_up(extent, SPAN), blocks = gridDim.x * gridDim.y, block = linear_block(), before = 0u;
    bool turned = false;
    for (u32 first = 0; first < tiles; first += blocks, turned = !turned) {
        u32 item = first + (turned ? blocks - 1u - block : block);
        if (item < tiles && each(place_of(p, extent, SPAN, backwards, item), before)) before++;
    }
}

// The barriers of a block: a ring's, then in shared memory one each for what stays: it has come; it is no longer read; and for tiles
// of the ring that are cleaned before use: one has come.
template <class Ring>
__device__ __forceinline__ void begin_block(u8* ring, u64* ready) {
    if (threadIdx.x == 0u) {
        Ring place(ring);
        for (u32 i = 0; i < Ring::STAGES; i++) {
            mbarrier_init(place.full(), 1u);
            mbarrier_init(place.empty(), 2u * WARP_GROUP / WARP);
            place.next();
        }
        mbarrier_init(ready, 1u);
        mbarrier_init(ready + 1, 2u * WARP_GROUP / WARP);
        mbarrier_init(ready + 2, 1u);
        mbarrier_init_fence();
    }
    __syncthreads();
}

// Rows first.. of a plane. One thread calls it.
template <u32 ROWS_>
__device__ __forceinline__ void load_tile(u8* tile, const TensorMap* map, u64* barrier, u32 first, u32 plane) {
#pragma unroll
    for (u32 side = 0; side < SIDES; side++) tma_load(tile + side * ROWS_ * 128u, map, barrier, side * 64u, first, plane);
}

// product[64, N] = rows (64) columns (N)^T
template <u32 N>
__device__ __forceinline__ void start_scores(float (&product)[1][N / 8u][4], const u8* rows, const u8* columns) {
    float (&d)[N / 2u] = (float (&)[N / 2u])product;
#pragma unroll
    for (u32 i = 0; i < HEAD / 16u; i++)
        wgmma<N, false, false>(d, wgmma_operand<false>(rows + i / 4u * WGMMA_BLOCK, wgmma_step<false>(i % 4u)),
                               wgmma_operand<false>(columns + i / 4u * (N * 128u), wgmma_step<false>(i % 4u)), i);
}

// sum[64, HEAD] = weights[64, K] rows (K) (+ sum, where `add` is not 0)
template <u32 K>
__device__ __forceinline__ void start_sums(float (&sum)[1][HEAD / 8][4], const u32 (&weights)[K / 16u][4], const u8* rows, u32 add) {
    float (&d)[HEAD / 2] = (float (&)[HEAD / 2])sum;
#pragma unroll
    for (u32 i = 0; i < K / 16u; i++)
        wgmma_registers<HEAD, true>(d, weights[i], wgmma_operand<true>(rows + i / 4u * TILE, wgmma_step<true>(i % 4u)), add | i);
}

// The left operand of `start_sums` from a product of `start_scores`: rounded once, to the storage type.
template <u32 K>
__device__ __forceinline__ void round_weights(u32 (&weights)[K / 16u][4], const float (&product)[1][K / 8u][4]) {
#pragma unroll
    for (u32 i = 0; i < K / 4u; i++) {
        const float* pair = &product[0][i / 2u][i % 2u * 2u];
        weights[i / 4u][i % 4u] = pack(pair[0], pair[1]);
    }
}

// A thread's registers of `wgmma_hold`, whatever their shape.
template <u32 N> __device__ __forceinline__ void hold(float (&product)[1][N][4]) { wgmma_hold((float (&)[4u * N])product); }

// Rows `half` of a thread that know of something that is not a number.
__device__ __forceinline__ void spoil(float (&sum)[1][HEAD / 8][4], bool first, bool second) {
#pragma unroll
    for (u32 i = 0; i < HEAD / 2u; i++) {
        if (i % 4u < 2u ? first : second) sum[0][i / 4u][i % 4u] = NO_NUMBER;
    }
}

// A warp's own part of a tile is no longer read.
__device__ __forceinline__ void release(u64* barrier) {
    if (threadIdx.x % WARP == 0u) mbarrier_arrive(barrier);
}

// Makes zeros of what is not finite in tiles of 64 rows, as a product weighs hidden rows with 0, and 0 times NaN is NaN. Tells
// `note(row, column)` of each, so that it reaches those who may know of it. The group that copies calls it before products.
template <class Note>
__device__ __forceinline__ void clean_tiles(u8* tiles, u32 bytes, Note note) {
    for (u32 at = threadIdx.x * 16u; at < bytes; at += WARP_GROUP * 16u) {
        uint4 x = load_vector(tiles + at);
        if (!unusual(x.x) && !unusual(x.y) && !unusual(x.z) && !unusual(x.w)) continue;
        u32 row = at / 128u % 64u, column = at % TILE / WGMMA_BLOCK * 64u + (at / 16u % 8u ^ row % 8u) * 8u;
#pragma unroll 1
        for (u32 i = 0; i < 8u; i++) {
            u16* element = (u16*)(tiles + at) + i;
            if (!unusual(*element)) continue;
            operand_store(element, (u16)0u);
            note(at / TILE * 64u + row, column + i);
        }
    }
    proxy_fence();
    named_barrier(COPIERS, WARP_GROUP);
}

// Rows of a group times a factor for each of the thread's two, 16 bytes a lane, to rows row0.. of a head that starts at `x`.
__device__ __forceinline__ void store_sums(E* x, const float (&sum)[1][HEAD / 8][4], const float (&factor)[2], u32 row0, u32 end, const AttentionParams& p) {
    u32 lane = threadIdx.x % WARP, column = lane % 4u * 2u;
#pragma unroll
    for (u32 j0 = 0; j0 < HEAD / 8u; j0 += 4u) {
#pragma unroll
        for (u32 half = 0; half < 2u; half++) {
            u32 row = row0 + half * 8u + lane / 4u, pairs[4];
            bool inside = row < end;
#pragma unroll
            for (u32 j = 0; j < 4u; j++) pairs[j] = pack(sum[0][j0 + j][half * 2u] * factor[half], sum[0][j0 + j][half * 2u + 1u] * factor[half]);
            gemm_store_row<4u>(x + (u64)(inside ? row : 0u) * p.heads * p.dim, pairs, inside, column + j0 * 8u, p.dim, true);
        }
    }
}

#endif
