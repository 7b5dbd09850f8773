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

// Dynamic shared memory: `DYNAMIC_SHARED(bytes);` declares an aligned array of bytes.
#ifdef ESPALIER_HOST
#define DYNAMIC_SHARED(name) u8* name = host::dynamic_shared()
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) u8 name[]
#endif
