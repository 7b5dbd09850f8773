// op:       hard_concrete, hard_concrete_bwd, clamp
// math:     sample: z = clamp(1.2 s - 0.1, 0, 1), s = sigmoid((ln u - ln(1 - u) + x) / beta), beta = 2/3; element i draws word
//           i & 3 of Philox block i >> 2, u = epsilon + (1 - 2 epsilon) (word >> 8) / 2^24; test: s = sigmoid(x); open:
//           z = sigmoid(x - beta ln(0.1 / 1.1)); clamp: x = min(max(x, low), high) in place
// grad:     hard_concrete_bwd: dx = dz 1.2 s (1 - s) / beta where 0 < 1.2 s - 0.1 < 1, else 0; open: dz z (1 - z)
// shapes:   hard_concrete: x[N], step[1], z[N]; hard_concrete_bwd: x[N], dz[N], step[1], dx[N]; clamp: x[N]
// layout:   contiguous; x is log alpha; without a sample x stands in for the step, unread
// launch:   linear, 64 threads a block, 4 elements (one Philox block) each
// cost:     about 120 operations per element; 2 N (backward 3 N) elements moved
// numerics: f32; 1 - u is made from the bits as u is, so that its logarithm loses nothing
// source:   Louizos et al. 2018; constants of Xia et al. 2022 (CoFi)
// rungs:    v1 one Philox block per thread

struct HardConcreteParams { u32 count, kind, seed_low, seed_high, site; float low, high; };

__device__ __forceinline__ float hard_concrete_unit(u32 bits) { return 1e-6f + 0.999998f * ((float)bits * 5.9604644775390625e-8f); }

// s and the temperature of an element; a temperature of 0: not stretched.
struct Gate { float s, beta; };

__device__ __forceinline__ Gate hard_concrete_of(float x, u32 word, u32 kind) {
    if (kind == 1u) return {sigmoid(x), 1.0f};
    if (kind == 2u) return {sigmoid(x + 1.5985968f), 0.0f};
    u32 bits = word >> 8;
    float noise = logf(hard_concrete_unit(bits)) - logf(hard_concrete_unit(16777216u - bits));
    return {sigmoid((noise + x) * 1.5f), 0.6666667f};
}

__device__ __forceinline__ u32 hard_concrete_word(u32 i, u32 step, const HardConcreteParams& p) {
    if (p.kind != 0u) return 0u;
    uint4 words = philox(make_uint4(i >> 2, 0u, p.site, step), make_uint2(p.seed_low, p.seed_high));
    u32 k = i & 3u;
    return k == 0u ? words.x : k == 1u ? words.y : k == 2u ? words.z : words.w;
}

extern "C" __global__ void __launch_bounds__(64) hard_concrete_fwd(const float* x, const u32* step, float* z, HardConcreteParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) {
        Gate gate = hard_concrete_of(x[i], hard_concrete_word(i, step[0], p), p.kind);
        z[i] = gate.beta == 0.0f ? gate.s : clampf(gate.s * 1.2f - 0.1f, 0.0f, 1.0f);
    }
}

extern "C" __global__ void __launch_bounds__(64) hard_concrete_bwd(const float* x, const float* dz, const u32* step, float* dx, HardConcreteParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) {
        Gate gate = hard_concrete_of(x[i], hard_concrete_word(i, step[0], p), p.kind);
        float stretched = gate.s * 1.2f - 0.1f, slope = gate.s * (1.0f - gate.s);
        if (gate.beta != 0.0f) slope = stretched > 0.0f && stretched < 1.0f ? 1.2f * slope / gate.beta : 0.0f;
        dx[i] = dz[i] * slope;
    }
}

extern "C" __global__ void __launch_bounds__(64) clamp_values(float* x, HardConcreteParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) x[i] = clampf(x[i], p.low, p.high);
}
