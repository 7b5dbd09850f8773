// Joined in front of every kernel file, after wgmma.cuh: products of tokens and weights, y[i, j] = sum_k x[i, k] w[j, k], by the
// tensor instructions of mma.cuh. Weights are operand A and tokens operand B: few tokens fill columns of eight, and a sparse
// operand can only be A. Both lie with k contiguous, so every fragment is read without a transpose.
//
// A block makes ROWS x TOKENS sums. A stage of its pipeline holds SLICES slices of k, each 128 bytes of every token's row (64
// values of 16 bits or 128 bytes) and the CHUNKS 16-byte chunks of every weight's row that belong to them. Warps share a slice as
// ROW_WARPS x TOKEN_WARPS; where there are several slices each set of warps sums its own, and they are added in order at the end:
// with few tokens a block needs many warps on few rows.
//
// On warp groups (sm_90a) weights are an operand in registers: each thread reads its own from memory, 16 bytes at a time, and tokens
// have all of shared memory for themselves, 128 bytes of k a stage of gemm_wgmma.cuh's ring.

#if ARCH >= 80 || defined(ESPALIER_HOST)
namespace weights {

template <u32 R, u32 T, u32 RW, u32 TW, u32 S, u32 DEPTH, u32 C>
struct Tile {
    static constexpr u32 ROWS = R, TOKENS = T, ROW_WARPS = RW, TOKEN_WARPS = TW, SLICES = S, STAGES = DEPTH, CHUNKS = C;
    static constexpr u32 THREADS = 32u * RW * TW * S;
    // Instruction tiles of one warp: 16 weights by 8 tokens each.
    static constexpr u32 MI = R / RW / 16u, NI = T / TW / 8u;
    static constexpr u32 X_SLICE = T * 128u, W_SLICE = R * C * 16u;
    static constexpr u32 X_BYTES = S * X_SLICE, STAGE = X_BYTES + S * W_SLICE;
};

// Where a block's tile starts. Blocks walk panels of eight tiles of weights, so that those at work share operands in cache.
template <class T>
__device__ __forceinline__ bool first_of(u32 m, u32 n, u32& token, u32& row) {
    u32 rows = div_up(n, T::ROWS), tokens = div_up(m, T::TOKENS), id = linear_block();
    if (id >= rows * tokens) return false;
    u32 panel = id / (8u * tokens), within = id % (8u * tokens), width = min(8u, rows - panel * 8u);
    row = (panel * 8u + within % width) * T::ROWS;
    token = within / width * T::TOKENS;
    return true;
}

// Byte of a chunk in a tile with CHUNKS (2, 4, 8) chunks a row. Eight rows of one chunk lie in different banks (ldmatrix), and so
// do two rows of eight-chunk tiles times four neighbouring chunks (16-byte reads).
template <u32 CHUNKS>
__device__ __forceinline__ u32 chunk_at(u32 row, u32 chunk) {
    u32 turn = CHUNKS == 8u ? (row & 1u) << 2 | (row >> 1 & 3u) : row / (8u / CHUNKS) % CHUNKS;
    return row * CHUNKS * 16u + ((chunk ^ turn) << 4);
}

// Starts the copies of one stage: ROWS rows of SLICES * CHUNKS chunks. Rows from `rows` on and bytes from `pitch` (a row, whole
// chunks) on are zero.
template <u32 ROWS, u32 CHUNKS, u32 SLICES, u32 THREADS>
__device__ __forceinline__ void copy_rows(u8* shared, const u8* from, u32 rows, u32 pitch, u32 stage) {
    constexpr u32 WIDE = CHUNKS * SLICES;
    static_assert(ROWS * WIDE % THREADS == 0u && THREADS % WIDE == 0u, "every thread copies the same number of chunks of one column");
    u32 chunk = threadIdx.x % WIDE, at = (stage * WIDE + chunk) * 16u;
    shared += chunk / CHUNKS * (ROWS * CHUNKS * 16u);
#pragma unroll
    for (u32 first = 0u; first < ROWS; first += THREADS / WIDE) {
        u32 row = first + threadIdx.x / WIDE;
        bool inside = row < rows && at < pitch;
        cp_async_16(shared + chunk_at<CHUNKS>(row, chunk % CHUNKS), inside ? from + ((u64)row * pitch + at) : from, inside ? 16 : 0);
    }
}

// The tile's part of x and of w, and this warp's place in it.
template <class T>
struct Operands {
    typedef T Shape;
    const u8 *x, *w;
    // Rows left from the first one on, and bytes of a row.
    u32 tokens, rows, x_pitch, w_pitch;
    u32 slice, warp_row, warp_token;

    __device__ __forceinline__ Operands(const void* x_, const void* w_, u32 m, u32 n, u32 xp, u32 wp, u32 token, u32 row)
        : x((const u8*)x_ + (u64)token * xp), w((const u8*)w_ + (u64)row * wp), tokens(m - token), rows(n - row), x_pitch(xp), w_pitch(wp) {
        u32 warp = threadIdx.x / WARP;
        warp_row = warp % T::ROW_WARPS * (T::MI * 16u);
        warp_token = warp / T::ROW_WARPS % T::TOKEN_WARPS * (T::NI * 8u);
        slice = warp / (T::ROW_WARPS * T::TOKEN_WARPS);
    }

    __device__ __forceinline__ void copy_tokens(u8* stage, u32 s) const {
        copy_rows<T::TOKENS, 8u, T::SLICES, T::THREADS>(stage, x, tokens, x_pitch, s);
    }
    // Loads of a stage: what is started before the products of an earlier stage, and what is left to do after them.
    __device__ __forceinline__ void begin(u8* stage, u32 s) {
        copy_tokens(stage, s);
        copy_rows<T::ROWS, T::CHUNKS, T::SLICES, T::THREADS>(stage + T::X_BYTES, w, rows, w_pitch, s);
    }
    __device__ __forceinline__ void end(u8*) {}

    __device__ __forceinline__ const u8* x_tile(const u8* stage) const { return stage + slice * T::X_SLICE; }
    __device__ __forceinline__ const u8* w_tile(const u8* stage) const { return stage + T::X_BYTES + slice * T::W_SLICE; }
    // Fragments: 16 weights by two chunks; 16 tokens by two chunks (two operands); eight tokens by four chunks.
    __device__ __forceinline__ void load_weights(u32 a[4], const u8* stage, u32 mi, u32 chunk) const {
        u32 lane = threadIdx.x % WARP;
        ldmatrix_x4(a, w_tile(stage) + chunk_at<T::CHUNKS>(warp_row + mi * 16u + lane % 16u, chunk + lane / 16u));
    }
    __device__ __forceinline__ void load_token_pair(u32 b[4], const u8* stage, u32 ni, u32 chunk) const {
        u32 lane = threadIdx.x % WARP;
        ldmatrix_x4(b, x_tile(stage) + chunk_at<8u>(warp_token + ni * 8u + lane % 8u + lane / 16u * 8u, chunk + lane / 8u % 2u));
    }
    __device__ __forceinline__ void load_tokens(u32 b[4], const u8* stage, u32 ni, u32 chunk) const {
        u32 lane = threadIdx.x % WARP;
        ldmatrix_x4(b, x_tile(stage) + chunk_at<8u>(warp_token + ni * 8u + lane % 8u, chunk + lane / 8u));
    }
};

// The pipeline: STAGES - 1 stages are on their way while one is multiplied. `loader` is an Operands with `multiply`.
template <class Loader, class Sum>
__device__ __forceinline__ void run(u8* shared, Loader& loader, Sum& sum, u32 stages) {
    typedef typename Loader::Shape T;
#pragma unroll 1
    for (u32 s = 0u; s < T::STAGES - 1u; s++) {
        if (s < stages) {
            loader.begin(shared + s * T::STAGE, s);
            loader.end(shared + s * T::STAGE);
        }
        cp_async_commit();
    }
    u32 full = 0u, empty = T::STAGES - 1u;
#pragma unroll 1
    for (u32 s = 0u; s < stages; s++) {
        cp_async_wait<(int)T::STAGES - 2>();
        // Stage s is complete for all, and all have left the one that is filled next.
        __syncthreads();
        bool more = s + T::STAGES - 1u < stages;
        if (more) loader.begin(shared + empty * T::STAGE, s + T::STAGES - 1u);
        cp_async_commit();
        loader.multiply(shared + full * T::STAGE, s, sum);
        if (more) loader.end(shared + empty * T::STAGE);
        full = full + 1u == T::STAGES ? 0u : full + 1u;
        empty = empty + 1u == T::STAGES ? 0u : empty + 1u;
    }
    // The sums go through the same memory.
    cp_async_wait<0>();
    __syncthreads();
}

// Adds the slices in order and hands `store` four neighbouring sums of one token. The extra four of a row keep both sides of the
// exchange free of bank conflicts.
template <class T, class S, class Store>
__device__ __forceinline__ void put(u8* shared, const Operands<T>& at, const S (&sum)[T::MI][T::NI][4], u32 m, u32 n, u32 token, u32 row, const Store& store) {
    constexpr u32 PITCH = T::ROWS + 4u, SLICE = T::TOKENS * PITCH;
    static_assert(T::SLICES * SLICE * 4u <= T::STAGES * T::STAGE, "the sums fit where the stages were");
    S* sums = (S*)shared;
    u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (u32 mi = 0u; mi < T::MI; mi++)
#pragma unroll
        for (u32 ni = 0u; ni < T::NI; ni++)
#pragma unroll
            for (u32 i = 0u; i < 4u; i++) {
                u32 r = at.warp_row + mi * 16u + lane / 4u + i / 2u * 8u, c = at.warp_token + ni * 8u + lane % 4u * 2u + i % 2u;
                sums[at.slice * SLICE + c * PITCH + r] = sum[mi][ni][i];
            }
    __syncthreads();
#pragma unroll 4
    for (u32 id = threadIdx.x; id < T::TOKENS * T::ROWS / 4u; id += T::THREADS) {
        u32 c = id / (T::ROWS / 4u), r = id % (T::ROWS / 4u) * 4u;
        if (token + c >= m || row + r >= n) continue;
        S total[4] = {};
#pragma unroll
        for (u32 slice = 0u; slice < T::SLICES; slice++)
#pragma unroll
            for (u32 i = 0u; i < 4u; i++) total[i] += sums[slice * SLICE + c * PITCH + r + i];
        store(token + c, row + r, total);
    }
}

// Bytes in, exact integer sums out: both operands 128 bytes of k a slice.
template <class T>
__device__ __forceinline__ void multiply_bytes(const Operands<T>& o, const u8* stage, int (&sum)[T::MI][T::NI][4]) {
#pragma unroll
    for (u32 step = 0u; step < 4u; step++) {
        u32 b[T::NI / 2u][4];
#pragma unroll
        for (u32 ni = 0u; ni < T::NI; ni += 2u) o.load_token_pair(b[ni / 2u], stage, ni, 2u * step);
#pragma unroll
        for (u32 mi = 0u; mi < T::MI; mi++) {
            u32 a[4];
            o.load_weights(a, stage, mi, 2u * step);
#pragma unroll
            for (u32 ni = 0u; ni < T::NI; ni++) mma_16832_s8(sum[mi][ni], a, b[ni / 2u] + ni % 2u * 2u);
        }
    }
}

// y = sum xs ws (+ bias), each step rounded by itself: a fused sum would differ from what other devices give.
struct StoreScaled {
    const float *xs, *ws, *bias;
    float* y;
    u32 n;
    __device__ __forceinline__ float scaled(int sum, float x, float w, float more) const {
        float v = (float)sum * x * w;
        return bias ? __fadd_rn(v, more) : v;
    }
    __device__ __forceinline__ float value(u32 i, u32 j, int sum) const { return scaled(sum, xs[i], ws[j], bias ? bias[j] : 0.0f); }
    __device__ __forceinline__ void operator()(u32 i, u32 j, const int sum[4]) const {
        float* to = y + (u64)i * n + j;
        if (n % 4u == 0u) {
            *(float4*)to = make_float4(value(i, j, sum[0]), value(i, j + 1u, sum[1]), value(i, j + 2u, sum[2]), value(i, j + 3u, sum[3]));
            return;
        }
#pragma unroll
        for (u32 c = 0u; c < 4u; c++)
            if (j + c < n) to[c] = value(i, j + c, sum[c]);
    }
};

// y = sum (+ bias) in the element type.
struct StoreElements {
    const E* bias;
    E* y;
    u32 n;
    __device__ __forceinline__ E value(u32 j, float sum) const { return st(bias ? sum + ld(bias[j]) : sum); }
    __device__ __forceinline__ void operator()(u32 i, u32 j, const float sum[4]) const {
        E* to = y + (u64)i * n + j;
        if (sizeof(E) == 2 && n % 4u == 0u) {
            u32 low = (u32)value(j, sum[0]) | (u32)value(j + 1u, sum[1]) << 16, high = (u32)value(j + 2u, sum[2]) | (u32)value(j + 3u, sum[3]) << 16;
            *(u64*)to = (u64)high << 32 | low;
            return;
        }
#pragma unroll
        for (u32 c = 0u; c < 4u; c++)
            if (j + c < n) to[c] = value(j + c, sum[c]);
    }
};

#if defined(ESPALIER_HOST) || defined(ELEMENT_F16) || defined(ELEMENT_BF16)
// Four bits in the low places of a float of this exponent are its value plus them.
#if defined(ELEMENT_F16)
#define INT4_PAIR 0x64006400u
#else
#define INT4_PAIR 0x43004300u
#endif

// Byte `index` of a word as two levels in the element type: nibble minus 8, exactly. A permutation of the word and the word shifted
// by one nibble puts one nibble of the byte in each half; what else it brings is masked.
__device__ __forceinline__ u32 levels_of(u32 word, u32 index) {
    u32 pair = (__byte_perm(word, word >> 4, index | (index + 4u) << 8) & 0x000f000fu) | INT4_PAIR;
#if defined(ESPALIER_HOST)
    float least = ld((u16)INT4_PAIR) + 8.0f;
    return (u32)st(ld((u16)pair) - least) | (u32)st(ld((u16)(pair >> 16)) - least) << 16;
#else
    u32 y;
#if defined(ELEMENT_F16)
    asm("sub.f16x2 %0, %1, %2;" : "=r"(y) : "r"(pair), "r"(0x64086408u));
#else
    // One times it, minus 136.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(pair), "r"(0x3f803f80u), "r"(0xc308c308u));
#endif
    return y;
#endif
}
#endif

#if ARCH == 90
// Rows of tokens by tensor map, DEPTH of k a stage.
template <u32 TOKENS, u32 DEPTH>
struct TokenMap {
    static const u32 THREADS = WARP, ARRIVALS = 1u;
    const TensorMap* x;
    __device__ __forceinline__ void begin() const {
        if (threadIdx.x == 0u) tma_prefetch(x);
    }
    __device__ __forceinline__ void start(const WgmmaTiles::Tile&) const {}
    __device__ __forceinline__ void end() const {}
    template <class Stages>
    __device__ __forceinline__ void stage(const Stages& place, const WgmmaTiles::Tile& t, u32 step) const {
        if (threadIdx.x % WARP != 0u) return;
        mbarrier_arrive_expect(place.full(), TOKENS * 128u);
        tma_load(place.tile(), x, place.full(), step * DEPTH, t.column * TOKENS, 0u);
    }
};

// The product of gemm_wgmma.cuh for weights in registers: `Work` holds what a thread knows of its rows of a tile.
//   Work(weights, row, sums)  of this thread's first row
//   load(read, step)      starts to read what a stage needs (anything beyond the weights is harmless), into a `Read`
//   make(operands, read)  its operands, a warp together
//   issue, finish         start the products of one stage; what is to be done when they are done
// While a stage is multiplied the operands of the next one are made, and memory is two stages ahead. Two warp groups do so side
// by side, each at its own pace: tensor instructions go on while one of them waits for its own.
template <class Work>
struct RegisterProduct {
    typedef typename Work::Sums Sums;
    typename Work::Weights weights;
    template <class Stages>
    __device__ __forceinline__ void sum(Stages& place, const WgmmaTiles::Tile& t, u32 steps, u32 group, Sums& sums) const {
        Work work(weights, t.row * WGMMA_ROWS + group * 64u + wgmma_row(), sums);
        typename Work::Read read[2];
        typename Work::Operands operands[2];
        bool signals = threadIdx.x % WARP == 0u;
        work.load(read[0], 0u);
        work.load(read[1], 1u);
        work.make(operands[0], read[0]);
        work.load(read[0], 2u);
        for (u32 first = 0u; first < steps; first += 2u) {
            // By twos, so that registers need not move: a move would wait for what is being read.
#pragma unroll
            for (u32 i = 0u; i < 2u; i++) {
                if (first + i == steps) break;
                mbarrier_wait(place.full(), place.parity);
                wgmma_fence();
                work.issue(sums, operands[i], place.tile(), first + i);
                wgmma_commit();
                work.make(operands[i ^ 1u], read[i ^ 1u]);
                work.load(read[i ^ 1u], first + i + 3u);
                wgmma_wait<0>();
                work.finish(sums);
                if (signals) mbarrier_arrive(place.empty());
                place.next();
            }
        }
    }
};

// Sums are [weights, tokens] here: a thread's pairs lie in neighbouring rows of y. Eight lanes fill 32 bytes of a row.
template <u32 TOKENS>
struct FinishScaled {
    StoreScaled to;
    u32 m;
    __device__ __forceinline__ void operator()(const int (&sums)[TOKENS / 2u], const WgmmaTiles::Tile& t, u32 group) const {
        u32 row = t.row * WGMMA_ROWS + group * 64u + wgmma_row(), token = t.column * TOKENS + wgmma_column();
        float w[2], more[2];
#pragma unroll
        for (u32 half = 0u; half < 2u; half++) {
            bool inside = row + half * 8u < to.n;
            w[half] = inside ? to.ws[row + half * 8u] : 0.0f;
            more[half] = inside && to.bias ? to.bias[row + half * 8u] : 0.0f;
        }
#pragma unroll
        for (u32 j = 0u; j < TOKENS / 4u; j++) {
            u32 at = token + j / 2u * 8u + j % 2u;
            if (at >= m) continue;
            float x = to.xs[at];
            float* y = to.y + (u64)at * to.n + row;
#pragma unroll
            for (u32 half = 0u; half < 2u; half++)
                if (row + half * 8u < to.n) y[half * 8u] = to.scaled(sums[j / 2u * 4u + half * 2u + j % 2u], x, w[half], more[half]);
        }
    }
};

#ifdef TENSOR_16
// Rounded, then turned: two lanes fill 32 bytes of a row.
template <u32 TOKENS>
struct FinishElements {
    StoreElements to;
    u32 m;
    __device__ __forceinline__ void operator()(const float (&sums)[TOKENS / 2u], const WgmmaTiles::Tile& t, u32 group) const {
        u32 lane = threadIdx.x % WARP, first = t.row * WGMMA_ROWS + group * 64u + threadIdx.x % WARP_GROUP / WARP * 16u;
        float more[2];
#pragma unroll
        for (u32 half = 0u; half < 2u; half++) {
            u32 row = first + half * 8u + lane / 4u;
            more[half] = to.bias && row < to.n ? ld(to.bias[row]) : 0.0f;
        }
#pragma unroll
        for (u32 j = 0u; j < TOKENS / 8u; j += 2u) {
            u32 words[4];
#pragma unroll
            for (u32 i = 0u; i < 4u; i++) {
                const float* pair = sums + (j + i / 2u) * 4u + i % 2u * 2u;
                words[i] = movmatrix(round_pair(pair[0] + more[i % 2u], pair[1] + more[i % 2u]));
            }
            // Of words 0 to 3 (eight tokens, then eight others, each with eight weights and then eight more) a lane gets the one
            // of its number, whole: eight weights of one token.
            quad_transpose(words);
            u32 token = t.column * TOKENS + (j + lane % 4u / 2u) * 8u + lane / 4u, row = first + lane % 2u * 8u;
            if (token >= m || row >= to.n) continue;
            E* y = to.y + (u64)token * to.n + row;
            if (to.n % 8u == 0u) {
                *(uint4*)y = make_uint4(words[0], words[1], words[2], words[3]);
            } else {
#pragma unroll
                for (u32 i = 0u; i < 8u; i++)
                    if (row + i < to.n) y[i] = (E)(words[i / 2u] >> i % 2u * 16u);
            }
        }
    }
};
#endif
#endif

}  // namespace weights
#endif
