// op:       multiply_add_chain
// math:     y_0 = 0; y_{t+1} = y_t / 2 + x, `steps` times: a yardstick, nothing but multiply-adds in registers
// grad:     none
// shapes:   x[N], y[N]
// layout:   contiguous
// launch:   linear, 64 threads a block, 16 elements each
// cost:     2 N steps operations; 2 N elements moved
// numerics: f32; the product by 1/2 is exact, so fused and unfused forms give the same bits
// source:   the measured ceiling of `kernels bench`
// rungs:    v1 sixteen independent chains per thread hide the latency of one

struct CeilingParams { u32 count, steps; };

#define CHAINS 16u

extern "C" __global__ void __launch_bounds__(64) multiply_add_chain_fwd(const float* x, float* y, CeilingParams p) {
    u32 first = linear_id() * CHAINS, last = p.count - 1u;
    float input[CHAINS], chain[CHAINS];
    // Loads past the end repeat the last element; they are never stored.
#pragma unroll
    for (u32 i = 0; i < CHAINS; i++) {
        input[i] = x[min(first + i, last)];
        chain[i] = 0.0f;
    }
    for (u32 t = 0; t < p.steps; t++) {
#pragma unroll
        for (u32 i = 0; i < CHAINS; i++) chain[i] = fmaf(chain[i], 0.5f, input[i]);
    }
#pragma unroll
    for (u32 i = 0; i < CHAINS; i++) {
        if (first + i < p.count) y[first + i] = chain[i];
    }
}
