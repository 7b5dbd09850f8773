// op:       relu, gelu_tanh, gelu_erf, silu, tanh, sigmoid, exp, scale, their backward, cast
// math:     y = f(x); dx = dy f'(x); cast: y = x in another storage type
// grad:     unary_bwd; a cast's gradient is the cast back
// shapes:   fwd: x[N], y[N]; bwd: x[N], dy[N], dx[N]; cast: x[N], y[N]
// layout:   contiguous
// launch:   linear, 64 threads a block, 4 elements each
// cost:     N functions; 2 N (fwd) or 3 N (bwd) elements moved
// numerics: f32 arithmetic whatever the storage; NaN passes through all but relu (0)
// source:   GELU: Hendrycks and Gimpel 2016; SiLU: Elfwing et al. 2017
// rungs:    v1 one thread, four neighbours

struct UnaryParams { u32 count, kind; float factor; };

#define GELU_SCALE 0.7978845608f

// Where exp overflows to infinity, the quotient is its limit 0.
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// (1 + tanh u) / 2 written as sigmoid(2 u): no cancellation in the negative tail.
__device__ __forceinline__ float gelu_gate(float x) { return sigmoid(2.0f * GELU_SCALE * (x + 0.044715f * x * x * x)); }

__device__ float apply(float x, const UnaryParams& p) {
    switch (p.kind) {
        case 0u: return fmaxf(x, 0.0f);
        case 1u: return x * gelu_gate(x);
        case 2u: return 0.5f * x * (1.0f + erff(x * 0.7071067812f));
        case 3u: return x * sigmoid(x);
        case 4u: return tanhf(x);
        case 5u: return sigmoid(x);
        case 6u: return expf(x);
        default: return x * p.factor;
    }
}

__device__ float derivative(float x, const UnaryParams& p) {
    switch (p.kind) {
        case 0u: return x > 0.0f ? 1.0f : 0.0f;
        case 1u: {
            float s = gelu_gate(x);
            return s + x * s * (1.0f - s) * 2.0f * GELU_SCALE * (1.0f + 0.134145f * x * x);
        }
        case 2u: return 0.5f * (1.0f + erff(x * 0.7071067812f)) + x * 0.3989422804f * expf(-0.5f * x * x);
        case 3u: {
            float s = sigmoid(x);
            return s * (1.0f + x * (1.0f - s));
        }
        case 4u: {
            float t = tanhf(x);
            return 1.0f - t * t;
        }
        case 5u: {
            float s = sigmoid(x);
            return s * (1.0f - s);
        }
        case 6u: return expf(x);
        default: return p.factor;
    }
}

extern "C" __global__ void __launch_bounds__(64) unary_fwd(const E* x, E* y, UnaryParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) y[i] = st(apply(ld(x[i]), p));
}

extern "C" __global__ void __launch_bounds__(64) unary_bwd(const E* x, const E* dy, E* dx, UnaryParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) dx[i] = st(ld(dy[i]) * derivative(ld(x[i]), p));
}

extern "C" __global__ void __launch_bounds__(64) cast_to_f32(const E* x, float* y, UnaryParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) y[i] = ld(x[i]);
}

extern "C" __global__ void __launch_bounds__(64) cast_from_f32(const float* x, E* y, UnaryParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) y[i] = st(x[i]);
}

// Between the 16-bit types, E is f16.
extern "C" __global__ void __launch_bounds__(64) cast_to_bf16_words(const E* x, u16* y, UnaryParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) y[i] = float_to_bf16(ld(x[i]));
}

extern "C" __global__ void __launch_bounds__(64) cast_from_bf16_words(const u16* x, E* y, UnaryParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) y[i] = st(bf16_to_float(x[i]));
}
