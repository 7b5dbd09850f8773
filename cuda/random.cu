// op:       dropout, uniform, normal
// math:     element i draws word i & 3 of Philox block i >> 2; u = (word >> 8) / 2^24; dropout: y = x scale if
//           word >> 8 >= threshold, else 0; uniform: y = low + span u; normal: y = mean + deviation z, z = probit(q),
//           q = (2 (word mod 2^31) + 1) / 2^33, below the mean where the word's top bit is set
// grad:     dropout: the same op on dy; the others have no input
// shapes:   dropout: x[N], step[1], dropped[N]; uniform, normal: y[N]
// layout:   contiguous; base is the index of the first bound element, a multiple of 4
// launch:   linear, 64 threads a block, 4 elements (one Philox block) each
// cost:     about 100 (normal 200) integer and float operations per element; N or 2 N elements moved
// numerics: bit-equal on every device: each product and sum is rounded by itself (`__fmul_rn`, `__fadd_rn`), never fused;
//           probit error below 4e-7 relative or 1e-7 absolute
// source:   Salmon et al. 2011 (Philox); Giles 2012 (form of the probit, refitted for 32-bit words); Moshier (log)
// rungs:    v1 one Philox block per thread

// `zero` is 0: what the WGSL twin keeps its compilers from fusing with.
struct RandomParams { u32 count, base, seed_low, seed_high, site, step, threshold, zero; float a, b; };

// a x + b with both roundings.
__device__ __forceinline__ float step_of(float a, float x, float b) { return __fadd_rn(__fmul_rn(a, x), b); }

__device__ __forceinline__ uint4 words_of(u32 block, u32 step, const RandomParams& p) {
    return philox(make_uint4(p.base / 4u + block, 0u, p.site, step), make_uint2(p.seed_low, p.seed_high));
}

__device__ __forceinline__ u32 word_of(uint4 words, u32 i) { return i == 0u ? words.x : i == 1u ? words.y : i == 2u ? words.z : words.w; }

// 24 bits are exact in f32.
__device__ __forceinline__ float uniform_of(u32 word) { return (float)(word >> 8) * 5.9604644775390625e-8f; }

// Natural logarithm of t in [2^-31, 1]: exponent, and Moshier's polynomial for a mantissa in [sqrt 1/2, sqrt 2).
__device__ __forceinline__ float log_of(float t) {
    u32 bits = __float_as_uint(t);
    int exponent = (int)(bits - 0x3f3504f3u) >> 23;
    float s = __fsub_rn(__uint_as_float(bits - ((u32)exponent << 23)), 1.0f);
    float z = __fmul_rn(s, s);
    float p = step_of(7.0376836292e-2f, s, -1.1514610310e-1f);
    p = step_of(p, s, 1.1676998740e-1f);
    p = step_of(p, s, -1.2420140846e-1f);
    p = step_of(p, s, 1.4249322787e-1f);
    p = step_of(p, s, -1.6668057665e-1f);
    p = step_of(p, s, 2.0000714765e-1f);
    p = step_of(p, s, -2.4999993993e-1f);
    p = step_of(p, s, 3.3333331174e-1f);
    float cubic = __fmul_rn(__fmul_rn(p, s), z);
    float low = __fadd_rn(__fsub_rn(cubic, __fmul_rn(0.5f, z)), s);
    return step_of((float)exponent, 0.69314718f, low);
}

// Square root by three Newton steps for its inverse: only products and sums.
__device__ __forceinline__ float sqrt_of(float w) {
    float h = __fmul_rn(0.5f, w);
    float y = __uint_as_float(0x5f375a86u - (__float_as_uint(w) >> 1));
    y = __fmul_rn(y, __fsub_rn(1.5f, __fmul_rn(__fmul_rn(h, y), y)));
    y = __fmul_rn(y, __fsub_rn(1.5f, __fmul_rn(__fmul_rn(h, y), y)));
    y = __fmul_rn(y, __fsub_rn(1.5f, __fmul_rn(__fmul_rn(h, y), y)));
    return __fmul_rn(w, y);
}

__device__ __forceinline__ float normal_of(u32 word) {
    u32 odd = 2u * (word & 0x7fffffffu) + 1u;
    // Rounded once: both halves and the product are exact. q = n / 2^33.
    float n = step_of((float)(odd >> 16), 65536.0f, (float)(odd & 0xffffu));
    float x = __fsub_rn(1.0f, __fmul_rn(n, 2.3283064365386963e-10f));
    float t = __fmul_rn(__fmul_rn(n, 4.656612873077393e-10f), __fsub_rn(1.0f, __fmul_rn(n, 1.1641532182693481e-10f)));
    float w = -log_of(t);
    float z;
    if (w < 5.0f) {
        float c = __fsub_rn(w, 2.5f);
        z = step_of(4.0353157e-8f, c, 4.8610195e-7f);
        z = step_of(z, c, -4.9905475e-6f);
        z = step_of(z, c, -6.2179711e-6f);
        z = step_of(z, c, 3.0915014e-4f);
        z = step_of(z, c, -1.7730102e-3f);
        z = step_of(z, c, -5.9081707e-3f);
        z = step_of(z, c, 3.4880266e-1f);
        z = step_of(z, c, 2.1233137f);
        z = __fmul_rn(z, x);
    } else {
        float s = __fsub_rn(sqrt_of(w), 3.4844658f);
        z = step_of(1.8707557e-5f, s, 2.2280592e-5f);
        z = step_of(z, s, -2.7727164e-4f);
        z = step_of(z, s, 9.068221e-4f);
        z = step_of(z, s, -2.4698325e-3f);
        z = step_of(z, s, 4.4986038e-3f);
        z = step_of(z, s, 1.4245695f);
        z = step_of(z, s, 4.6949477f);
    }
    return word >= 0x80000000u ? -z : z;
}

extern "C" __global__ void __launch_bounds__(64) dropout_fwd(const E* x, const u32* step, E* dropped, RandomParams p) {
    u32 block = linear_id(), first = block * 4u;
    if (first >= p.count) return;
    uint4 words = words_of(block, step[0], p);
    for (u32 i = first; i < min(first + 4u, p.count); i++) {
        float kept = ld(x[i]) * p.a;
        dropped[i] = st((word_of(words, i - first) >> 8) >= p.threshold ? kept : 0.0f);
    }
}

extern "C" __global__ void __launch_bounds__(64) uniform_fwd(E* y, RandomParams p) {
    u32 block = linear_id(), first = block * 4u;
    if (first >= p.count) return;
    uint4 words = words_of(block, p.step, p);
    for (u32 i = first; i < min(first + 4u, p.count); i++) y[i] = st(step_of(p.b, uniform_of(word_of(words, i - first)), p.a));
}

extern "C" __global__ void __launch_bounds__(64) normal_fwd(E* y, RandomParams p) {
    u32 block = linear_id(), first = block * 4u;
    if (first >= p.count) return;
    uint4 words = words_of(block, p.step, p);
    for (u32 i = first; i < min(first + 4u, p.count); i++) y[i] = st(step_of(p.b, normal_of(word_of(words, i - first)), p.a));
}
