// op:       observe, fake_quant, fake_quant_bwd, quantize, dequantize, pack_int4, step_slope, track_step
// math:     y = (clamp(rne(x / s) + z, low, high) - z) s, with s and z from the range of the element's group
// grad:     fake_quant_bwd: dx = dy where low <= rne(x / s) + z <= high, else 0; step_slope: f dy (q - x / s) there, f dy q elsewhere
// shapes:   observe: x[N], range[G, 2]; fold: parts[P, 2], range[G, 2]; fake_quant: x[N], grid (range[G, 2] or step[G or 1]), y[N];
//           fake_quant_bwd: x[N], range[G, 2], dy[N], dx[N]; quantize: x[N], range[G, 2], q[N] i8;
//           scales: range[G, 2], scale[G], zero[G]; dequantize: q[N] i8, scale[G], zero[G], y[N];
//           pack_int4: x[N], range[G, 2], q[N / 8] words;
//           observe_means: x[N], (step to divide by, scale)[G, 2]; step_slope: x[N], step, dy[N], slope[N] f32;
//           track_step: step[G], range[G, 2]
// layout:   groups are runs of `length` neighbours; i8 one after the other; eight levels of four bits to a word
// launch:   linear, 64 threads a block: 8 elements each (maps), four (i8), one word (int4), one part of a group (ranges)
//           v2: 256 threads a block: 8 elements each (maps), a warp per part of a group (ranges)
// cost:     about 6 operations an element; each tensor moved once
// numerics: f32; bits are defined: one multiplication by the correctly rounded reciprocal, round to nearest even;
//           a group narrower than 2^-100 is zero with scale 1, one with NaN or wider than 2^120 has the scale NaN;
//           a given step is at least 2^-100; means are sums in order, over what is not 0
// source:   Jacob et al. 2018 (affine levels); straight-through: Bengio et al. 2013; learned steps:
//           Esser et al. 2020, Eq 3; means: Li and Liu 2016, Rastegari et al. 2016
// rungs:    v1 one thread, neighbouring elements; v2 16 bytes per access, a thread's elements in one group

// mode: 0 symmetric range, 1 asymmetric range, 2 a step per group, 3 one step, 4 (step to divide by, scale) per group.
struct QuantParams { u32 count, length, mode; float low, high, unit, shift; u32 own; };
struct StepParams : QuantParams { float factor; };
struct RangeParams { u32 count, length, absolute, part, each; };

#define NOT_A_NUMBER __uint_as_float(0x7fc00000u)

__device__ __forceinline__ void store_range(float* range, u32 id, float low, float high, bool nan, u32 absolute) {
    if (absolute == 1u) {
        high = fmaxf(fabsf(low), fabsf(high));
        low = -high;
    }
    range[2u * id] = nan ? NOT_A_NUMBER : low;
    range[2u * id + 1u] = nan ? NOT_A_NUMBER : high;
}

extern "C" __global__ void __launch_bounds__(64) observe_fwd(const E* x, float* range, RangeParams p) {
    u32 id = linear_id();
    if (id >= p.count / p.length * p.each) return;
    u32 start = id / p.each * p.length;
    u32 first = start + id % p.each * p.part;
    u32 last = min(first + p.part, start + p.length);
    float low = ld(x[first]);
    float high = low;
    bool nan = is_nan(low);
    for (u32 i = first + 1u; i < last; i++) {
        float value = ld(x[i]);
        nan = nan || is_nan(value);
        low = fminf(low, value);
        high = fmaxf(high, value);
    }
    store_range(range, id, low, high, nan, p.absolute);
}

extern "C" __global__ void __launch_bounds__(64) observe_fold(const float* parts, float* range, RangeParams p) {
    u32 id = linear_id();
    if (id >= p.count / p.length) return;
    parts += 2u * (u64)(id * p.each);
    float low = parts[0];
    float high = parts[1];
    bool nan = is_nan(low);
    for (u32 part = 1u; part < p.each; part++) {
        nan = nan || is_nan(parts[2u * part]);
        low = fminf(low, parts[2u * part]);
        high = fmaxf(high, parts[2u * part + 1u]);
    }
    store_range(range, id, low, high, nan, p.absolute);
}

struct Grid { float scale, inverse, zero; };

// No product here is added to anything before it is rounded to a level, so there is nothing that could be fused.
__device__ __forceinline__ Grid grid_of(const float* given, u32 group, const QuantParams& p) {
    if (p.mode == 2u || p.mode == 3u) {
        float step = given[p.mode == 2u ? group : 0u];
        if (is_nan(step) || step > 1.329228e36f) return {NOT_A_NUMBER, NOT_A_NUMBER, 0.0f};
        step = fmaxf(step, 7.888609e-31f);
        return {step, __fdiv_rn(1.0f, step), 0.0f};
    }
    float low = given[2u * group], high = given[2u * group + 1u];
    if (p.mode == 4u) {
        if (is_nan(low)) return {NOT_A_NUMBER, NOT_A_NUMBER, 0.0f};
        if (low < 7.888609e-31f) return {1.0f, 0.0f, 0.0f};
        return {high, __fdiv_rn(1.0f, low), 0.0f};
    }
    float bottom = fminf(low, 0.0f);
    float width = p.mode == 1u ? fmaxf(high, 0.0f) - bottom : fmaxf(fabsf(low), fabsf(high));
    if (is_nan(low) || is_nan(high) || !(width <= 1.329228e36f)) return {NOT_A_NUMBER, NOT_A_NUMBER, 0.0f};
    if (width < 7.888609e-31f) return {1.0f, 0.0f, 0.0f};
    float scale = __fmul_rn(width, p.unit);
    float inverse = __fdiv_rn(1.0f, scale);
    if (p.mode == 0u) return {scale, inverse, 0.0f};
    return {scale, inverse, clampf(rintf(__fmul_rn(-bottom, inverse)), p.low, p.high)};
}

// (step to divide by, scale): the mean magnitude decides, and of a ternary group those of more than half a step.
extern "C" __global__ void __launch_bounds__(64) observe_means(const E* x, float* means, QuantParams p) {
    u32 id = linear_id();
    if (id >= p.count / p.length) return;
    x += (u64)id * p.length;
    float sum = 0.0f, nonzero = 0.0f;
    for (u32 i = 0u; i < p.length; i++) {
        float value = fabsf(ld(x[i]));
        sum += value;
        nonzero += value >= 7.888609e-31f ? 1.0f : 0.0f;
    }
    float mean = __fmul_rn(sum, __fdiv_rn(1.0f, fmaxf(nonzero, 1.0f)));
    float step = 7.888609e-31f, scale = mean;
    if (is_nan(mean) || mean > 1.329228e36f) {
        step = scale = NOT_A_NUMBER;
    } else if (mean < 7.888609e-31f) {
        step = 0.0f;
        scale = 1.0f;
    } else if (p.unit > 0.0f) {
        step = __fmul_rn(mean, p.unit);
        float inverse = __fdiv_rn(1.0f, step), kept = 0.0f, count = 0.0f;
        for (u32 i = 0u; i < p.length; i++) {
            float value = fabsf(ld(x[i]));
            if (__fmul_rn(value, inverse) > 0.5f) {
                kept += value;
                count += 1.0f;
            }
        }
        scale = __fmul_rn(kept, __fdiv_rn(1.0f, count));
    }
    means[2u * id] = step;
    means[2u * id + 1u] = scale;
}

// The level before clamping.
__device__ __forceinline__ float raw_level(float x, const Grid& grid) { return rintf(__fmul_rn(x, grid.inverse)) + grid.zero; }

extern "C" __global__ void __launch_bounds__(64) fake_quant_fwd(const E* x, const float* range, E* y, QuantParams p) {
    u32 first = linear_id() * 8u;
    if (first >= p.count) return;
    u32 group = first / p.length;
    Grid grid = grid_of(range, group, p);
    for (u32 i = first; i < min(first + 8u, p.count); i++) {
        if (i / p.length != group) {
            group = i / p.length;
            grid = grid_of(range, group, p);
        }
        float level = raw_level(ld(x[i]), grid);
        y[i] = st(is_nan(level) ? level : __fmul_rn(clampf(level, p.low, p.high) - grid.zero, grid.scale));
    }
}

extern "C" __global__ void __launch_bounds__(64) fake_quant_bwd(const E* x, const float* range, const E* dy, E* dx, QuantParams p) {
    u32 first = linear_id() * 8u;
    if (first >= p.count) return;
    u32 group = first / p.length;
    Grid grid = grid_of(range, group, p);
    for (u32 i = first; i < min(first + 8u, p.count); i++) {
        if (i / p.length != group) {
            group = i / p.length;
            grid = grid_of(range, group, p);
        }
        // False for NaN.
        float level = raw_level(ld(x[i]), grid);
        bool inside = level >= p.low && level <= p.high;
        dx[i] = inside ? dy[i] : st(0.0f);
    }
}

// Four elements, which may lie in several groups.
extern "C" __global__ void __launch_bounds__(64) quantize_fwd(const E* x, const float* range, i8* q, QuantParams p) {
    u32 first = linear_id() * 4u;
    if (first >= p.count) return;
    u32 group = first / p.length;
    Grid grid = grid_of(range, group, p);
    for (u32 i = first; i < min(first + 4u, p.count); i++) {
        if (i / p.length != group) {
            group = i / p.length;
            grid = grid_of(range, group, p);
        }
        float level = raw_level(ld(x[i]), grid);
        q[i] = is_nan(level) ? (i8)0 : (i8)(int)(clampf(level, p.low, p.high) - p.shift);
    }
}

extern "C" __global__ void __launch_bounds__(64) quantize_scales(const float* range, float* scale, float* zero, QuantParams p) {
    u32 group = linear_id();
    if (group >= p.count / p.length) return;
    Grid grid = grid_of(range, group, p);
    scale[group] = grid.scale;
    zero[group] = grid.zero - p.shift;
}

extern "C" __global__ void __launch_bounds__(64) dequantize_fwd(const i8* q, const float* scale, const float* zero, float* y, QuantParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) {
        u32 group = i / p.length;
        y[i] = __fmul_rn((float)q[i] - zero[group], scale[group]);
    }
}

// Eight levels of four bits to a word, plus 8; a group is a multiple of eight elements.
extern "C" __global__ void __launch_bounds__(64) pack_int4_fwd(const E* x, const float* range, u32* q, QuantParams p) {
    u32 word = linear_id();
    if (word >= p.count / 8u) return;
    Grid grid = grid_of(range, word * 8u / p.length, p);
    u32 packed = 0u;
    for (u32 b = 0u; b < 8u; b++) {
        float level = raw_level(ld(x[word * 8u + b]), grid);
        float value = is_nan(level) ? 0.0f : clampf(level, p.low, p.high);
        packed |= (u32)(value + 8.0f) << (4u * b);
    }
    q[word] = packed;
}

extern "C" __global__ void __launch_bounds__(64) step_slope(const E* x, const float* step, const E* dy, float* slope, StepParams p) {
    u32 first = linear_id() * 8u;
    if (first >= p.count) return;
    u32 group = first / p.length;
    Grid grid = grid_of(step, group, p);
    for (u32 i = first; i < min(first + 8u, p.count); i++) {
        if (i / p.length != group) {
            group = i / p.length;
            grid = grid_of(step, group, p);
        }
        float value = ld(x[i]), raw = raw_level(value, grid), level = raw;
        if (!is_nan(raw)) {
            level = clampf(raw, p.low, p.high);
            if (level == raw) level -= __fmul_rn(value, grid.inverse);
        }
        slope[i] = ld(dy[i]) * p.factor * level;
    }
}

extern "C" __global__ void __launch_bounds__(64) track_step(float* step, const float* range, StepParams p) {
    u32 group = linear_id();
    if (group >= p.count) return;
    Grid grid = grid_of(range, group, p);
    // A zero or non-finite range says nothing.
    if (is_nan(grid.inverse) || grid.inverse == 0.0f) return;
    float old = step[group];
    step[group] = old == 0.0f ? grid.scale : old + p.factor * (grid.scale - old);
}

// --- 16 bytes per access: eight elements a thread, all of one group.
#define EACH 8u

// The last thread of a tensor may have fewer.
__device__ __forceinline__ void load_each(float* y, const E* x, u32 first, u32 count) {
    if (first + EACH <= count) {
#pragma unroll
        for (u32 i = 0; i < EACH / VECTOR; i++) unpack_vector(y + i * VECTOR, load_vector(x + first + i * VECTOR));
    } else {
#pragma unroll
        for (u32 k = 0; k < EACH; k++) y[k] = ld(x[min(first + k, count - 1u)]);
    }
}

__device__ __forceinline__ void store_each(E* y, const float* x, u32 first, u32 count) {
    if (first + EACH <= count) {
#pragma unroll
        for (u32 i = 0; i < EACH / VECTOR; i++) store_vector(y + first + i * VECTOR, pack_vector(x + i * VECTOR));
    } else {
#pragma unroll
        for (u32 k = 0; k < EACH; k++)
            if (first + k < count) y[first + k] = st(x[k]);
    }
}

extern "C" __global__ void __launch_bounds__(256) fake_quant_fwd_v2(const E* x, const float* range, E* y, QuantParams p) {
    u32 first = linear_id() * EACH;
    if (first >= p.count) return;
    float values[EACH];
    load_each(values, x, first, p.count);
    Grid grid = grid_of(range, first / p.length, p);
#pragma unroll
    for (u32 k = 0; k < EACH; k++) {
        float level = raw_level(values[k], grid);
        values[k] = is_nan(level) ? level : __fmul_rn(clampf(level, p.low, p.high) - grid.zero, grid.scale);
    }
    store_each(y, values, first, p.count);
}

extern "C" __global__ void __launch_bounds__(256) fake_quant_bwd_v2(const E* x, const float* range, const E* dy, E* dx, QuantParams p) {
    u32 first = linear_id() * EACH;
    if (first >= p.count) return;
    float values[EACH], slopes[EACH];
    load_each(values, x, first, p.count);
    load_each(slopes, dy, first, p.count);
    Grid grid = grid_of(range, first / p.length, p);
#pragma unroll
    for (u32 k = 0; k < EACH; k++) {
        // False for NaN.
        float level = raw_level(values[k], grid);
        if (!(level >= p.low && level <= p.high)) slopes[k] = 0.0f;
    }
    store_each(dx, slopes, first, p.count);
}

// Minimum and maximum do not depend on the order; a NaN is kept apart, as fminf and fmaxf lose it.
extern "C" __global__ void __launch_bounds__(256) observe_fwd_v2(const E* x, float* range, RangeParams p) {
    u32 id = team_row<WARP>(), lane = threadIdx.x % WARP;
    if (id >= p.count / p.length * p.each) return;
    u32 start = id / p.each * p.length;
    u32 first = start + id % p.each * p.part;
    u32 last = min(first + p.part, start + p.length);
    float low = ld(x[first]);
    float high = low;
    bool nan = is_nan(low);
    // Parts are whole vectors, but for a tensor's last one.
#pragma unroll 4
    for (u32 i = first + lane * VECTOR; i < last; i += WARP * VECTOR) {
        float values[VECTOR];
        if (i + VECTOR <= last) {
            unpack_vector(values, load_vector(x + i));
        } else {
#pragma unroll
            for (u32 k = 0; k < VECTOR; k++) values[k] = ld(x[min(i + k, last - 1u)]);
        }
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) {
            nan = nan || is_nan(values[k]);
            low = fminf(low, values[k]);
            high = fmaxf(high, values[k]);
        }
    }
    low = -warp_max(-low);
    high = warp_max(high);
    nan = __any_sync(ALL_LANES, nan);
    if (lane == 0u) store_range(range, id, low, high, nan, p.absolute);
}
