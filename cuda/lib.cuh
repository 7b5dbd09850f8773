// Joined in front of every kernel file, after elem.cuh: what shaders/lib.wgsl is there, and the reductions of a warp and a block.

// Item of a launch made by `Launch::linear`: blocks fold into y above 65,535.
__device__ __forceinline__ u32 linear_id() { return blockIdx.x * blockDim.x + threadIdx.x + blockIdx.y * (65535u * blockDim.x); }

// Block of a launch made by `Launch::linear` with one item per block.
__device__ __forceinline__ u32 linear_block() { return blockIdx.x + blockIdx.y * 65535u; }

// NaN by its bits, as in WGSL.
__device__ __forceinline__ bool is_nan(float x) { return (__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u; }
__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Large and finite: masked scores never hold an infinity.
#define MASKED (-1e30f)

// Maximum and minimum that keep a NaN of the second argument out, as WGSL's; fmaxf and fminf do the same.
__device__ __forceinline__ float clampf(float x, float low, float high) { return fminf(fmaxf(x, low), high); }
__device__ __forceinline__ u32 div_up(u32 a, u32 b) { return (a + b - 1u) / b; }

// Where exp overflows to infinity, the quotient is its limit 0. SHORT, for what is rounded to 16 bits: by the fast exponential and
// quotient, which are a few units of the last place of f32 off.
template <bool SHORT = false>
__device__ __forceinline__ float sigmoid(float x) {
#ifndef ESPALIER_HOST
    if (SHORT) return __fdividef(1.0f, 1.0f + __expf(-x));
#endif
    return 1.0f / (1.0f + expf(-x));
}

// (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), written as sigmoid(2 u): no cancellation in the negative tail.
// GELU (tanh form, Hendrycks and Gimpel 2016) is x gelu_gate(x).
template <bool SHORT = false>
__device__ __forceinline__ float gelu_gate(float x) { return sigmoid<SHORT>(1.5957691216f * (x + 0.044715f * x * x * x)); }

__device__ __forceinline__ float gelu_slope(float x) {
    float s = gelu_gate(x);
    return s + x * s * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * x * x);
}

// log(m / p) and log(m / q) of m = beta p + (1 - beta) q from log(p / q): where p and q are close these are small, and log m
// would have lost their digits.
__device__ __forceinline__ float2 log_mixture(float beta, float ratio) {
    float apart = fabsf(ratio), rest = 1.0f - beta;
    float larger = ratio > 0.0f ? beta : rest, smaller = ratio > 0.0f ? rest : beta;
    float over = apart < 1.0f ? log1pf(smaller * expm1f(-apart)) : logf(larger + smaller * expf(-apart));
    return ratio > 0.0f ? make_float2(over, over + apart) : make_float2(over + apart, over);
}

// p log(p/m) - p + m and q log(q/m) - q + m: their sums are the divergences, as those of p, q and m are 1, and no rounding of
// the log sum exps reaches them, whose share p - m has.
__device__ __forceinline__ float2 jsd_terms(float beta, float log_p, float log_q) {
    float ratio = log_p - log_q, p = expf(log_p), q = expf(log_q);
    float2 over = log_mixture(beta, ratio);
    // p - q from the larger of the two.
    float difference = ratio > 0.0f ? -p * expm1f(-ratio) : q * expm1f(ratio);
    return make_float2((beta - 1.0f) * difference - p * over.x, beta * difference - q * over.y);
}

// Philox4x32-10 (Salmon et al. 2011): the same bits as src/rng.rs.
__device__ __forceinline__ uint4 philox(uint4 c, uint2 k) {
    for (int round = 0; round < 10; round++) {
        u32 p0 = c.x * 0xD2511F53u, q0 = __umulhi(c.x, 0xD2511F53u);
        u32 p1 = c.z * 0xCD9E8D57u, q1 = __umulhi(c.z, 0xCD9E8D57u);
        c = make_uint4(q1 ^ c.y ^ k.x, p1, q0 ^ c.w ^ k.y, p0);
        k.x += 0x9E3779B9u;
        k.y += 0xBB67AE85u;
    }
    return c;
}

#define WARP 32u
#define ALL_LANES 0xffffffffu

// Butterflies: every lane gets the result, and the order of the sum is fixed.
__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// Sum over a block of whole warps (at most 32), in every thread. `tile` is 32 floats of shared memory; it may be used again at once.
__device__ __forceinline__ float block_sum(float x, float* tile) {
    u32 warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
    x = warp_sum(x);
    if (lane == 0) tile[threadIdx.x / WARP] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? tile[lane] : 0.0f);
    // The tile is written again by the next reduction.
    __syncthreads();
    return x;
}

__device__ __forceinline__ float block_max(float x, float* tile) {
    u32 warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
    x = warp_max(x);
    if (lane == 0) tile[threadIdx.x / WARP] = x;
    __syncthreads();
    x = warp_max(lane < warps ? tile[lane] : -3.4e38f);
    __syncthreads();
    return x;
}

// Turns four words of each of the four lanes of a quad: lane t gets word t of all four, in the order of the lanes.
__device__ __forceinline__ void quad_transpose(u32 w[4]) {
    u32 t = threadIdx.x % 4u;
#pragma unroll
    for (u32 by = 1u; by < 4u; by *= 2u) {
        bool upper = t & by;
#pragma unroll
        for (u32 i = 0; i < 4u; i++) {
            if (i & by) continue;
            u32 got = __shfl_xor_sync(ALL_LANES, upper ? w[i] : w[i | by], by);
            if (upper) w[i] = got;
            else w[i | by] = got;
        }
    }
}

// Dynamic shared memory: `DYNAMIC_SHARED(bytes);` declares an aligned array of bytes.
#ifdef ESPALIER_HOST
#define DYNAMIC_SHARED(name) u8* name = host::dynamic_shared()
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) u8 name[]
#endif

// Elements of 16 bytes, the most that one access of a thread moves.
#define VECTOR (16u / (u32)sizeof(E))

// One access of 16 bytes; the address is a multiple of 16.
template <class T> __device__ __forceinline__ uint4 load_vector(const T* from) {
#ifdef ESPALIER_HOST
    host::check_aligned(from, 16);
    uint4 x;
    memcpy(&x, from, 16);
    return x;
#else
    return *(const uint4*)from;
#endif
}

template <class T> __device__ __forceinline__ void store_vector(T* to, uint4 x) {
#ifdef ESPALIER_HOST
    host::check_aligned(to, 16);
    memcpy(to, &x, 16);
#else
    *(uint4*)to = x;
#endif
}

// Two 16-bit elements in one word. A NaN's payload is the hardware's, which rounds both at once.
__device__ __forceinline__ u32 round_pair(float low, float high) {
#if defined(ESPALIER_HOST) || ARCH < 80
    return (u32)st(low) | (u32)st(high) << 16;
#elif defined(ELEMENT_F16)
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#endif
}

// The VECTOR elements of 16 bytes as floats, and back.
__device__ __forceinline__ void unpack_vector(float* y, uint4 x) {
    const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++) {
        if (sizeof(E) == 4) y[k] = __uint_as_float(words[k % 4u]);
        else y[k] = ld((E)(words[k / 2u] >> (k % 2u * 16u)));
    }
}

__device__ __forceinline__ uint4 pack_vector(const float* x) {
    u32 words[4];
#pragma unroll
    for (u32 k = 0; k < 4u; k++) {
        if (sizeof(E) == 4) words[k] = __float_as_uint(x[k]);
        else words[k] = round_pair(x[(2u * k) % VECTOR], x[(2u * k + 1u) % VECTOR]);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// A row of a matrix cut into aligned vectors, whatever its length: the first and the last one may hold elements of neighbours.
// The matrix starts at a multiple of 16 bytes.
struct Span {
    // Element at which vector 0 starts, and how many elements of it belong to the row before.
    u64 start;
    u32 shift;
    u32 length, vectors;
};

__device__ __forceinline__ Span span_of(u32 row, u32 length) {
    u64 at = (u64)row * length;
    u32 shift = (u32)at % VECTOR;
    return {at - shift, shift, length, (u32)(((u64)shift + length + VECTOR - 1u) / VECTOR)};
}

// Index in the row of element k of vector j; not below `length` where it is not in the row.
__device__ __forceinline__ u32 span_index(const Span& s, u32 j, u32 k) { return j * VECTOR + k - s.shift; }

// Whether all of vector j lies in the row.
__device__ __forceinline__ bool span_whole(const Span& s, u32 j) {
    u32 head = s.shift > 0u ? 1u : 0u;
    return j >= head && (j + 1u) * VECTOR <= s.shift + s.length;
}

// Vector j, with `outside` in place of what is not in the row.
__device__ __forceinline__ uint4 span_load(const E* x, const Span& s, u32 j, float outside) {
    if (span_whole(s, j)) return load_vector(x + s.start + (u64)j * VECTOR);
    float values[VECTOR];
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++) values[k] = outside;
    if (j < s.vectors) {
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) {
            if (span_index(s, j, k) < s.length) values[k] = ld(x[s.start + (u64)j * VECTOR + k]);
        }
    }
    return pack_vector(values);
}

__device__ __forceinline__ void span_store(E* y, const Span& s, u32 j, const float* values) {
    if (span_whole(s, j)) {
        store_vector(y + s.start + (u64)j * VECTOR, pack_vector(values));
    } else if (j < s.vectors) {
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) {
            if (span_index(s, j, k) < s.length) y[s.start + (u64)j * VECTOR + k] = st(values[k]);
        }
    }
}

// Rows are shared by teams: a warp each, or a block each. A team's row, and its reductions in every thread of it.
template <u32 TEAM> __device__ __forceinline__ u32 team_row() {
    return TEAM == WARP ? linear_block() * (blockDim.x / WARP) + threadIdx.x / WARP : linear_block();
}

template <u32 TEAM> __device__ __forceinline__ float team_sum(float x, float* tile) { return TEAM == WARP ? warp_sum(x) : block_sum(x, tile); }
template <u32 TEAM> __device__ __forceinline__ float team_max(float x, float* tile) { return TEAM == WARP ? warp_max(x) : block_max(x, tile); }
