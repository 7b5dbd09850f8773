// op:       unpack_int4, matmul_int4 (pack_int4 stands in quant.cu, beside the scale rule)
// math:     w[j, k] = (nibble[j, k] - 8) scale[j, k / group]; y[i, j] = sum_k x[i, k] w[j, k] (+ bias[j])
// grad:     dx = dy W with W unpacked; the packed weight is fixed
// shapes:   unpack: words[N, K/8] (packed), scales[N, K/group], w[N, K]; matmul: x[M, K], words, scales, bias[N], y[M, N]
// layout:   eight weights to a word, the lowest column in the lowest four bits
// launch:   linear, 64 threads a block; one word (unpack) or one element of y
// cost:     2 M N K operations; N K / 2 bytes of weights
// numerics: f32: sums within a word, times its scale, in rising order of k
// source:   Frantar et al. 2023 (group scales)
// rungs:    v1 one element of y

struct Int4Params { u32 m, n, k, group, bias; };
struct UnpackParams { u32 n, one, k, group; };

__device__ __forceinline__ float level_of(u32 word, u32 b) { return (float)((word >> (4u * b)) & 15u) - 8.0f; }

extern "C" __global__ void __launch_bounds__(64) unpack_int4_fwd(const u32* words, const float* scales, float* w, UnpackParams p) {
    u32 id = linear_id();
    if (id >= p.n * (p.k / 8u)) return;
    u64 first = (u64)id * 8u;
    float scale = scales[first / p.group];
    for (u32 b = 0u; b < 8u; b++) w[first + b] = level_of(words[id], b) * scale;
}

extern "C" __global__ void __launch_bounds__(64) matmul_int4_fwd(const E* x, const u32* words, const float* scales, const E* bias, E* y, Int4Params p) {
    u32 id = linear_id(), i = id / p.n, j = id % p.n;
    if (i >= p.m) return;
    x += (u64)i * p.k;
    words += (u64)j * (p.k / 8u);
    scales += (u64)j * (p.k / p.group);
    float sum = 0.0f;
    for (u32 k = 0u; k < p.k; k += 8u) {
        u32 word = words[k / 8u];
        float part = 0.0f;
        for (u32 b = 0u; b < 8u; b++) part += level_of(word, b) * ld(x[k + b]);
        sum += part * scales[k / p.group];
    }
    if (p.bias == 1u) sum += ld(bias[j]);
    y[id] = st(sum);
}
