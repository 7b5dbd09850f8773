// Joined in front of every kernel file, after mma.cuh: one matrix product of a block on tensor instructions (sm_80 and newer),
// for every family whose work is a product. A family says where operands come from and what becomes of the sums:
//
//   source     rows in memory along the contiguous axis. `row(r, inside)` points at row r (at any readable place, with `inside`
//              false, where there is none); `inner` counts the elements of a row, `plane` is the distance between the planes of a
//              value kept as a sum of several numbers, `aligned` says whether rows start at multiples of 16 bytes.
//              Gathered or expert rows: give `row` an index. An operand contiguous along k has its m or n as rows, else k itself.
//   epilogue   `finish(sums, row, column, shared)`: sums[i][j] are fragments of mma_16816 of this lane, elements (row + 16 i, column + 8 j),
//              (.., + 1), (row + 16 i + 8, ..), (.., + 1). All of shared memory is free after a barrier.
//
// What lies outside of an operand reads as zero, so m, n and k may have any length.

// Set where a kernel may multiply its elements on tensor instructions. Entries exist for every element type, so that a file
// has one list of them; for the others they are empty and no record names them.
#if (ARCH >= 80 || defined(ESPALIER_HOST)) && (defined(ELEMENT_F16) || defined(ELEMENT_BF16))
#define TENSOR_16
#define TENSOR_ONLY(...) __VA_ARGS__
#else
#define TENSOR_ONLY(...)
#endif

#ifdef TENSOR_16

// Elements of k of one stage: 64 bytes.
#define GEMM_K 32u

// A block's tile of outputs, the warps that share it, and the stages of the ring in shared memory.
template <u32 ROWS_, u32 COLUMNS_, u32 WARP_ROWS_, u32 WARP_COLUMNS_, u32 STAGES_>
struct GemmShape {
    static const u32 ROWS = ROWS_, COLUMNS = COLUMNS_, STAGES = STAGES_;
    // Outputs of a warp.
    static const u32 WARP_ROWS = WARP_ROWS_, WARP_COLUMNS = WARP_COLUMNS_, ACROSS = COLUMNS / WARP_COLUMNS;
    static const u32 THREADS = ROWS / WARP_ROWS * ACROSS * WARP;
    // Fragments of a warp: 16 rows by 8 columns each.
    static const u32 DOWN = WARP_ROWS / 16u, RIGHT = WARP_COLUMNS / 8u;
};

// 64x64 per warp: a byte read from shared memory serves 32 multiply-adds, half of what the memory could deliver stays free.
typedef GemmShape<128, 128, 64, 64, 4> GemmLarge;
typedef GemmShape<64, 64, 32, 32, 4> GemmSmall;
// With an operand in two planes three stages let two blocks share a multiprocessor.
typedef GemmShape<128, 128, 64, 64, 3> GemmLargePlanes;

// The plain source: a matrix by its row step.
struct GemmRows {
    const E* base;
    u32 step, rows, inner;
    u64 plane;
    bool aligned;
    __device__ __forceinline__ const E* row(u32 r, bool& inside) const {
        inside = r < rows;
        return inside ? base + (u64)r * step : base;
    }
};

__device__ __forceinline__ u32 pack_pair(E low, E high) { return (u32)(u16)low | (u32)(u16)high << 16; }

// One operand: EXTENT of m or n, in PLANES planes. In shared memory rows of 16-byte chunks, the chunk's place turned by the row,
// so that the eight rows of an 8x8 matrix, and the eight chunks of a quarter of a warp's copies, lie in different banks.
template <bool ALONG_K, u32 EXTENT, u32 PLANES, bool ODD, u32 THREADS, class Source>
struct GemmSide {
    static const u32 ROWS = ALONG_K ? EXTENT : GEMM_K, CHUNKS = (ALONG_K ? GEMM_K : EXTENT) / 8u;
    static const u32 COPIES = ROWS * CHUNKS / THREADS, SIZE = EXTENT * GEMM_K;
    const Source& source;
    u32 first, inside;
    const E* rows[COPIES];

    __device__ __forceinline__ static u32 place(u32 row, u32 chunk) {
        u32 turn = ALONG_K ? row >> 1 & 3u : row & 7u;
        return (row * CHUNKS + (chunk ^ turn)) * 8u;
    }

    __device__ __forceinline__ GemmSide(const Source& source_, u32 first_) : source(source_), first(first_), inside(0u) {
        // Rows of m or n stay the same through all of k: looked up once.
        if constexpr (ALONG_K) {
#pragma unroll
            for (u32 i = 0; i < COPIES; i++) {
                bool there;
                rows[i] = source.row(first + (threadIdx.x + i * THREADS) / CHUNKS, there);
                inside |= there ? 1u << i : 0u;
            }
        }
    }

    // Starts the copies of k0 .. k0 + GEMM_K.
    __device__ __forceinline__ void load(E* tile, u32 k0) const {
#pragma unroll
        for (u32 i = 0; i < COPIES; i++) {
            u32 id = threadIdx.x + i * THREADS, r = id / CHUNKS, chunk = id % CHUNKS;
            bool there = inside >> i & 1u;
            const E* row = ALONG_K ? rows[i] : source.row(k0 + r, there);
            u32 at = (ALONG_K ? k0 : first) + chunk * 8u;
            u32 valid = there && at < source.inner ? min(source.inner - at, 8u) : 0u;
            if (valid) row += at;
            E* to = tile + place(r, chunk);
#pragma unroll
            for (u32 plane = 0; plane < PLANES; plane++) {
                const E* from = row + plane * source.plane;
                if (!ODD || source.aligned) cp_async_16(to + plane * SIZE, from, (int)(valid * 2u));
                else gather(to + plane * SIZE, from, valid);
            }
        }
    }

    // Rows that 16-byte copies cannot read: element by element through registers.
    __device__ __forceinline__ static void gather(E* to, const E* from, u32 valid) {
        u32 words[4];
#pragma unroll
        for (u32 i = 0; i < 4u; i++)
            words[i] = pack_pair(2u * i < valid ? from[2u * i] : (E)0, 2u * i + 1u < valid ? from[2u * i + 1u] : (E)0);
        *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
    }

    // The left operand's fragments of 16 rows from `row` and 16 of k from 16 `half`.
    __device__ __forceinline__ static void left(u32* fragment, const E* tile, u32 row, u32 half) {
        u32 lane = threadIdx.x % WARP;
        if (ALONG_K) ldmatrix_x4(fragment, tile + place(row + lane % 16u, half * 2u + lane / 16u));
        else ldmatrix_x4_trans(fragment, tile + place(half * 16u + lane / 16u * 8u + lane % 8u, row / 8u + lane / 8u % 2u));
    }

    // The right operand's fragments of 16 columns: two of mma_16816.
    __device__ __forceinline__ static void right(u32* fragment, const E* tile, u32 column, u32 half) {
        u32 lane = threadIdx.x % WARP;
        if (ALONG_K) ldmatrix_x4(fragment, tile + place(column + lane / 16u * 8u + lane % 8u, half * 2u + lane / 8u % 2u));
        else ldmatrix_x4_trans(fragment, tile + place(half * 16u + lane / 8u % 2u * 8u + lane % 8u, column / 8u + lane / 16u));
    }
};

// Tiles of a launch in groups of eight rows of tiles, columns within: blocks that run together share operands in cache.
__device__ __forceinline__ void gemm_tile(u32& row, u32& column) {
    u32 id = blockIdx.y * gridDim.x + blockIdx.x, whole = 8u * gridDim.x;
    u32 first = id / whole * 8u, height = min(gridDim.y - first, 8u), within = id % whole;
    row = first + within % height;
    column = within / height;
}

// Bytes of shared memory: STAGES (PLANES_A ROWS + PLANES_B COLUMNS) GEMM_K 2, as plans compute them.
// Adds the product to the sums, which start as zeros; several layouts of one kernel can so share an epilogue.
template <class Shape, bool A_ALONG_K, bool B_ALONG_K, u32 PLANES_A, u32 PLANES_B, bool ODD, class A, class B>
__device__ __forceinline__ void gemm_multiply(const A& source_a, const B& source_b, u32 row, u32 column, u32 k, u8* shared,
                                              float (&sums)[Shape::DOWN][Shape::RIGHT][4]) {
    typedef GemmSide<A_ALONG_K, Shape::ROWS, PLANES_A, ODD, Shape::THREADS, A> Left;
    typedef GemmSide<B_ALONG_K, Shape::COLUMNS, PLANES_B, ODD, Shape::THREADS, B> Right;
    static_assert(PLANES_A == 1u || PLANES_B == 1u, "one operand has planes");
    const u32 PLANES = PLANES_A * PLANES_B, OPEN = Shape::STAGES - 1u, UNITS = GEMM_K / 16u * PLANES;
    const u32 SIZE = PLANES_A * Left::SIZE + PLANES_B * Right::SIZE;
    E* ring = (E*)shared;
    Left a(source_a, row);
    Right b(source_b, column);
    u32 warp = threadIdx.x / WARP;
    u32 warp_row = warp / Shape::ACROSS * Shape::WARP_ROWS, warp_column = warp % Shape::ACROSS * Shape::WARP_COLUMNS;
    u32 steps = div_up(k, GEMM_K);
    u32 read = 0u, write = OPEN;
#pragma unroll
    for (u32 stage = 0; stage < OPEN; stage++) {
        if (stage < steps) {
            a.load(ring + stage * SIZE, stage * GEMM_K);
            b.load(ring + stage * SIZE + PLANES_A * Left::SIZE, stage * GEMM_K);
        }
        cp_async_commit();
    }
    for (u32 step = 0; step < steps; step++) {
        cp_async_wait<(int)OPEN - 1>();
        // This stage is complete for everybody, and everybody is done with the one that is overwritten next.
        __syncthreads();
        if (step + OPEN < steps) {
            a.load(ring + write * SIZE, (step + OPEN) * GEMM_K);
            b.load(ring + write * SIZE + PLANES_A * Left::SIZE, (step + OPEN) * GEMM_K);
        }
        // Groups are counted, so an empty one is closed too.
        cp_async_commit();
        const E* tile_a = ring + read * SIZE;
        const E* tile_b = tile_a + PLANES_A * Left::SIZE;
        // Fragments of the next unit (half of the stage's k, or a plane of it) are read while this one is multiplied.
        u32 part_a[2][Shape::DOWN][4], part_b[2][Shape::RIGHT * 2u];
#pragma unroll
        for (u32 unit = 0; unit <= UNITS; unit++) {
            if (unit < UNITS) {
                u32 half = unit / PLANES, plane = unit % PLANES;
                if (PLANES_A > 1u || plane == 0u) {
#pragma unroll
                    for (u32 i = 0; i < Shape::DOWN; i++)
                        Left::left(part_a[(PLANES_A > 1u ? unit : half) & 1u][i], tile_a + (PLANES_A > 1u ? plane * Left::SIZE : 0u), warp_row + i * 16u, half);
                }
                if (PLANES_B > 1u || plane == 0u) {
#pragma unroll
                    for (u32 j = 0; j < Shape::RIGHT; j += 2u)
                        Right::right(part_b[(PLANES_B > 1u ? unit : half) & 1u] + j * 2u, tile_b + (PLANES_B > 1u ? plane * Right::SIZE : 0u), warp_column + j * 8u, half);
                }
            }
            if (unit > 0u) {
                u32 done = unit - 1u, half = done / PLANES;
#pragma unroll
                for (u32 i = 0; i < Shape::DOWN; i++) {
#pragma unroll
                    for (u32 j = 0; j < Shape::RIGHT; j++)
                        mma_16816(sums[i][j], part_a[(PLANES_A > 1u ? done : half) & 1u][i], part_b[(PLANES_B > 1u ? done : half) & 1u] + j * 2u);
                }
            }
        }
        read = read + 1u == Shape::STAGES ? 0u : read + 1u;
        write = write + 1u == Shape::STAGES ? 0u : write + 1u;
    }
    cp_async_wait<0>();
}

// Hands the sums of the tile at (row, column) to the epilogue.
template <class Shape, class Epilogue>
__device__ __forceinline__ void gemm_finish(float (&sums)[Shape::DOWN][Shape::RIGHT][4], u32 row, u32 column, u8* shared, Epilogue& finish) {
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    row += warp / Shape::ACROSS * Shape::WARP_ROWS + lane / 4u;
    column += warp % Shape::ACROSS * Shape::WARP_COLUMNS + lane % 4u * 2u;
    finish(sums, row, column, shared);
}

template <class Shape, bool A_ALONG_K, bool B_ALONG_K, u32 PLANES_A, u32 PLANES_B, bool ODD, class A, class B, class Epilogue>
__device__ __forceinline__ void gemm(const A& source_a, const B& source_b, u32 row, u32 column, u32 k, u8* shared, Epilogue& finish) {
    float sums[Shape::DOWN][Shape::RIGHT][4] = {};
    gemm_multiply<Shape, A_ALONG_K, B_ALONG_K, PLANES_A, PLANES_B, ODD>(source_a, source_b, row, column, k, shared, sums);
    gemm_finish<Shape>(sums, row, column, shared, finish);
}

// Stores COUNT neighbouring fragments of one row as pairs: 16 bytes per lane where rows are aligned. All lanes of the warp come
// here together. Aligned rows have room for whole eights: a pair inside of `columns` takes the rest of its eight with it.
template <u32 COUNT>
__device__ __forceinline__ void gemm_store_row(E* row, const u32 (&pairs)[COUNT], bool inside, u32 column, u32 columns, bool aligned) {
    u32 t = threadIdx.x % 4u;
    if (COUNT % 4u == 0u && aligned) {
#pragma unroll
        for (u32 j = 0; j + 3u < COUNT; j += 4u) {
            u32 w[4] = {pairs[j], pairs[j + 1u], pairs[j + 2u], pairs[j + 3u]};
            quad_transpose(w);
            // The lane's own pair starts 2 t into each fragment; now it has all of fragment j + t.
            u32 at = column - 2u * t + (j + t) * 8u;
            if (inside && at < columns) *(uint4*)(row + at) = make_uint4(w[0], w[1], w[2], w[3]);
        }
        return;
    }
#pragma unroll
    for (u32 j = 0; j < COUNT; j++) {
        u32 at = column + j * 8u;
        if (!inside || at >= columns) continue;
        if (aligned) {
            *(u32*)(row + at) = pairs[j];
        } else {
            row[at] = (E)(u16)pairs[j];
            if (at + 1u < columns) row[at + 1u] = (E)(u16)(pairs[j] >> 16);
        }
    }
}

#endif
