// Joined in front of every kernel file: rows of a hidden layer activated and rounded to int8, behind every rung of matmul_int8.

struct RequantizeParams { u32 m, n, activation; float high, unit; };

__device__ __forceinline__ float requantize_activated(float x, u32 activation) { return activation == 0u ? fmaxf(x, 0.0f) : x * gelu_gate(x); }

// Scale and its reciprocal for a largest magnitude: the symmetric grid of quant.cu.
__device__ __forceinline__ float2 requantize_grid(float width, float unit) {
    const float nan = __uint_as_float(0x7fc00000u);
    if (is_nan(width) || !(width <= 1.329228e36f)) return make_float2(nan, nan);
    if (width < 7.888609e-31f) return make_float2(1.0f, 0.0f);
    float scale = __fmul_rn(width, unit);
    return make_float2(scale, __fdiv_rn(1.0f, scale));
}

// Four rows of hidden[M, N] to q[M, N] and scale[M].
__device__ __forceinline__ void requantize_rows(const float* hidden, i8* q, float* scale, const RequantizeParams& p) {
    // Of each row the bits of the largest magnitude, which integers order as floats do, NaN on top; then 1 / scale.
    __shared__ u32 most[4];
    __shared__ float inverse[4];
    u32 first = min(linear_block() * 4u, p.m), rows = min(p.m - first, 4u), id = threadIdx.x;
    if (id < 4u) most[id] = 0u;
    __syncthreads();
    hidden += (u64)first * p.n;
    q += (u64)first * p.n;
    for (u32 row = 0u; row < rows; row++) {
        u32 own = 0u;
        for (u32 j = id; j < p.n; j += blockDim.x)
            own = max(own, __float_as_uint(requantize_activated(hidden[(u64)row * p.n + j], p.activation)) & 0x7fffffffu);
        for (u32 offset = 16u; offset > 0u; offset >>= 1) own = max(own, __shfl_xor_sync(ALL_LANES, own, offset));
        if (id % WARP == 0u) atomicMax(&most[row], own);
    }
    __syncthreads();
    if (id < rows) {
        float2 grid = requantize_grid(__uint_as_float(most[id]), p.unit);
        scale[first + id] = grid.x;
        inverse[id] = grid.y;
    }
    __syncthreads();
    for (u32 row = 0u; row < rows; row++) {
        for (u32 j = id; j < p.n; j += blockDim.x) {
            u64 at = (u64)row * p.n + j;
            float level = rintf(__fmul_rn(requantize_activated(hidden[at], p.activation), inverse[row]));
            q[at] = is_nan(level) ? (i8)0 : (i8)(int)clampf(level, -p.high, p.high);
        }
    }
}
