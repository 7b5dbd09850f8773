// op:       rank_one_inverse
// math:     F <- F - (F g)(F g)^T / (count + g^T F g) for every block
// grad:     none
// shapes:   F[blocks, B, B] (in place), g[blocks, B]
// layout:   contiguous; F is symmetric, so that a column is read where a row is meant
// launch:   one block of 64 threads per block
// cost:     4 flops and 8 bytes an element of F
// numerics: f32; sums in the order of the index; symmetric to the bit where F was
// source:   WoodFisher: Singh and Alistarh 2020; Sherman and Morrison 1950
// rungs:    v1 one block per block, F read twice

struct FisherParams { u32 blocks, b; float count; };

extern "C" __global__ void __launch_bounds__(64) rank_one_inverse(float* F, const float* g, FisherParams p) {
    __shared__ float gradient[128], product[128];
    u32 block = linear_block(), lane = threadIdx.x, b = p.b;
    if (block >= p.blocks) return;
    F += (u64)block * b * b;
    g += (u64)block * b;
    for (u32 i = lane; i < b; i += 64u) gradient[i] = g[i];
    __syncthreads();
    for (u32 i = lane; i < b; i += 64u) {
        float sum = 0.0f;
        for (u32 j = 0u; j < b; j++) sum += F[j * b + i] * gradient[j];
        product[i] = sum;
    }
    __syncthreads();
    // Each thread sums for itself, in the same order.
    float divisor = p.count;
    for (u32 j = 0u; j < b; j++) divisor += product[j] * gradient[j];
    // No fused multiply-add: entry (i, j) must be entry (j, i).
    for (u32 i = lane; i < b * b; i += 64u) F[i] = __fsub_rn(F[i], __fmul_rn(product[i / b], product[i % b]) / divisor);
}
