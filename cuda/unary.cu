// op:       relu, gelu_tanh, gelu_erf, silu, tanh, sigmoid, exp, scale, reciprocal, their backward, cast
// math:     y = f(x); dx = dy f'(x); cast: y = x in another storage type
// grad:     unary_bwd; a cast's gradient is the cast back
// shapes:   fwd: x[N], y[N]; bwd: x[N], dy[N], dx[N]; cast: x[N], y[N]
// layout:   contiguous
// launch:   v1: linear, 64 threads a block, 4 elements each; v2: 256 threads a block, 16 bytes of the wider type each (casts to
//           and from f32: 4 elements)
// cost:     N functions; 2 N (fwd) or 3 N (bwd) elements moved
// numerics: f32 arithmetic whatever the storage; NaN passes through all but relu (0)
// source:   GELU: Hendrycks and Gimpel 2016; SiLU: Elfwing et al. 2017
// rungs:    v1 one thread, four neighbours; v2 16 bytes per access, the function chosen once per thread

struct UnaryParams { u32 count, kind; float factor; };

__device__ float apply(float x, const UnaryParams& p) {
    switch (p.kind) {
        case 0u: return fmaxf(x, 0.0f);
        case 1u: return x * gelu_gate(x);
        case 2u: return 0.5f * x * (1.0f + erff(x * 0.7071067812f));
        case 3u: return x * sigmoid(x);
        case 4u: return tanhf(x);
        case 5u: return sigmoid(x);
        case 6u: return expf(x);
        case 8u: return 1.0f / x;
        default: return x * p.factor;
    }
}

__device__ float derivative(float x, const UnaryParams& p) {
    switch (p.kind) {
        case 0u: return x > 0.0f ? 1.0f : 0.0f;
        case 1u: return gelu_slope(x);
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
        case 8u: return -1.0f / (x * x);
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

// --- 16 bytes per access. The last thread of a tensor may have fewer elements.
__device__ __forceinline__ void load_each(float* y, const E* x, u32 first, u32 count) {
    if (first + VECTOR <= count) {
        unpack_vector(y, load_vector(x + first));
    } else {
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) y[k] = ld(x[min(first + k, count - 1u)]);
    }
}

__device__ __forceinline__ void store_each(E* y, const float* x, u32 first, u32 count) {
    if (first + VECTOR <= count) {
        store_vector(y + first, pack_vector(x));
    } else {
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++)
            if (first + k < count) y[first + k] = st(x[k]);
    }
}

// One function on all elements: the switch in it falls away.
template <u32 KIND> __device__ __forceinline__ void apply_all(float* x, UnaryParams p) {
    p.kind = KIND;
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++) x[k] = apply(x[k], p);
}

template <u32 KIND> __device__ __forceinline__ void slope_all(float* x, const float* dy, UnaryParams p) {
    p.kind = KIND;
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++) x[k] = dy[k] * derivative(x[k], p);
}

extern "C" __global__ void __launch_bounds__(256) unary_fwd_v2(const E* x, E* y, UnaryParams p) {
    u32 first = linear_id() * VECTOR;
    if (first >= p.count) return;
    float values[VECTOR];
    load_each(values, x, first, p.count);
    switch (p.kind) {
        case 0u: apply_all<0u>(values, p); break;
        case 1u: apply_all<1u>(values, p); break;
        case 2u: apply_all<2u>(values, p); break;
        case 3u: apply_all<3u>(values, p); break;
        case 4u: apply_all<4u>(values, p); break;
        case 5u: apply_all<5u>(values, p); break;
        case 6u: apply_all<6u>(values, p); break;
        case 8u: apply_all<8u>(values, p); break;
        default: apply_all<7u>(values, p);
    }
    store_each(y, values, first, p.count);
}

extern "C" __global__ void __launch_bounds__(256) unary_bwd_v2(const E* x, const E* dy, E* dx, UnaryParams p) {
    u32 first = linear_id() * VECTOR;
    if (first >= p.count) return;
    float values[VECTOR], slopes[VECTOR];
    load_each(values, x, first, p.count);
    load_each(slopes, dy, first, p.count);
    switch (p.kind) {
        case 0u: slope_all<0u>(values, slopes, p); break;
        case 1u: slope_all<1u>(values, slopes, p); break;
        case 2u: slope_all<2u>(values, slopes, p); break;
        case 3u: slope_all<3u>(values, slopes, p); break;
        case 4u: slope_all<4u>(values, slopes, p); break;
        case 5u: slope_all<5u>(values, slopes, p); break;
        case 6u: slope_all<6u>(values, slopes, p); break;
        case 8u: slope_all<8u>(values, slopes, p); break;
        default: slope_all<7u>(values, slopes, p);
    }
    store_each(dx, values, first, p.count);
}

// Four elements of a cast: the f32 side moves 16 bytes, a 16-bit side 8.
__device__ __forceinline__ uint2 load_four_halves(const void* x) {
#ifdef ESPALIER_HOST
    host::check_aligned((const u8*)x, 8);
    uint2 y;
    memcpy(&y, x, 8);
    return y;
#else
    return *(const uint2*)x;
#endif
}

__device__ __forceinline__ void store_four_halves(void* y, uint2 x) {
#ifdef ESPALIER_HOST
    host::check_aligned((u8*)y, 8);
    memcpy(y, &x, 8);
#else
    *(uint2*)y = x;
#endif
}

extern "C" __global__ void __launch_bounds__(256) cast_to_f32_v2(const E* x, float* y, UnaryParams p) {
    u32 first = linear_id() * 4u;
    if (first >= p.count) return;
    if (first + 4u > p.count) {
        for (u32 i = first; i < p.count; i++) y[i] = ld(x[i]);
    } else if (sizeof(E) == 4) {
        store_vector(y + first, load_vector(x + first));
    } else {
        uint2 raw = load_four_halves(x + first);
        float values[4] = {ld((E)raw.x), ld((E)(raw.x >> 16)), ld((E)raw.y), ld((E)(raw.y >> 16))};
        store_vector(y + first, make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]), __float_as_uint(values[3])));
    }
}

extern "C" __global__ void __launch_bounds__(256) cast_from_f32_v2(const float* x, E* y, UnaryParams p) {
    u32 first = linear_id() * 4u;
    if (first >= p.count) return;
    if (first + 4u > p.count) {
        for (u32 i = first; i < p.count; i++) y[i] = st(x[i]);
    } else {
        uint4 raw = load_vector(x + first);
        uint2 pairs = {round_pair(__uint_as_float(raw.x), __uint_as_float(raw.y)), round_pair(__uint_as_float(raw.z), __uint_as_float(raw.w))};
        store_four_halves(y + first, pairs);
    }
}

// Between the 16-bit types, eight elements; E is f16.
extern "C" __global__ void __launch_bounds__(256) cast_to_bf16_words_v2(const E* x, u16* y, UnaryParams p) {
    u32 first = linear_id() * VECTOR;
    if (first >= p.count) return;
    float values[VECTOR];
    load_each(values, x, first, p.count);
    if (first + VECTOR <= p.count) {
        u32 words[4];
#pragma unroll
        for (u32 k = 0; k < 4u; k++) words[k] = (u32)float_to_bf16(values[2u * k % VECTOR]) | (u32)float_to_bf16(values[(2u * k + 1u) % VECTOR]) << 16;
        store_vector(y + first, make_uint4(words[0], words[1], words[2], words[3]));
    } else {
        for (u32 i = first; i < p.count; i++) y[i] = float_to_bf16(ld(x[i]));
    }
}

extern "C" __global__ void __launch_bounds__(256) cast_from_bf16_words_v2(const u16* x, E* y, UnaryParams p) {
    u32 first = linear_id() * VECTOR;
    if (first >= p.count) return;
    if (first + VECTOR <= p.count) {
        uint4 raw = load_vector(x + first);
        const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
        float values[VECTOR];
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) values[k] = bf16_to_float((u16)(words[k / 2u] >> (k % 2u * 16u)));
        store_vector(y + first, pack_vector(values));
    } else {
        for (u32 i = first; i < p.count; i++) y[i] = st(bf16_to_float(x[i]));
    }
}
