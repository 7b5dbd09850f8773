// op:       adamw, sgd, clip_factor
// math:     adamw: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p -= lr (c1 m / (sqrt(c2 v) + eps) + decay p)
//           sgd: u = momentum u + g, p -= lr (u + decay p); g = grad factor; clip: scale min(1, max / (scale sqrt s))
// grad:     none
// shapes:   adamw: param[N] (in place), grad[N], m[N] (in place), v[N] (in place), factor[1], mask[N] when masked
//           sgd: param[N] (in place), grad[N], velocity[N] (in place), factor[1], mask[N]; clip: squares[1], out[1] (the factor)
// layout:   contiguous; a group's parameters lie one after another
// launch:   linear, 64 threads a block, 4 elements each; adamw_v2: 256 threads a block, 4 elements each
// cost:     14 flops and 28 bytes an element (adamw), 6 and 20 (sgd)
// numerics: f32; c1 and c2 are rounded once on the host; a masked element becomes exactly 0 everywhere
// source:   AdamW: Loshchilov and Hutter 2019
// rungs:    v1 one thread, four neighbours; v2 16 bytes per access

struct OptimParams { u32 count, masked; float rate, beta1, beta2, epsilon, decay, correction1, correction2; };

extern "C" __global__ void __launch_bounds__(64) adamw(float* param, const float* grad, float* m, float* v, const float* factor, const float* mask, OptimParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) {
        // Without a mask its slot holds another argument.
        if (p.masked == 1u && mask[i] == 0.0f) {
            param[i] = 0.0f;
            m[i] = 0.0f;
            v[i] = 0.0f;
            continue;
        }
        float g = grad[i] * factor[0];
        float first_moment = p.beta1 * m[i] + (1.0f - p.beta1) * g;
        float second_moment = p.beta2 * v[i] + (1.0f - p.beta2) * g * g;
        float direction = first_moment * p.correction1 / (sqrtf(second_moment * p.correction2) + p.epsilon);
        float old = param[i];
        param[i] = old - p.rate * (direction + p.decay * old);
        m[i] = first_moment;
        v[i] = second_moment;
    }
}

extern "C" __global__ void __launch_bounds__(64) sgd(float* param, const float* grad, float* velocity, const float* factor, const float* mask, OptimParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.count); i++) {
        if (p.masked == 1u && mask[i] == 0.0f) {
            param[i] = 0.0f;
            velocity[i] = 0.0f;
            continue;
        }
        // Momentum stands where AdamW's first beta does.
        float u = p.beta1 * velocity[i] + grad[i] * factor[0];
        float old = param[i];
        param[i] = old - p.rate * (u + p.decay * old);
        velocity[i] = u;
    }
}

extern "C" __global__ void __launch_bounds__(1) clip_factor(const float* squares, float* out, OptimParams p) {
    // The op's block is count, flag, max_norm, scale: `rate` and `beta1` by place.
    float max_norm = p.rate, scale = p.beta1;
    float clip = 1.0f;
    if (max_norm > 0.0f) clip = fminf(1.0f, max_norm / (scale * sqrtf(squares[0]) + 1e-6f));
    out[0] = scale * clip;
}

extern "C" __global__ void __launch_bounds__(256) adamw_v2(float* param, const float* grad, float* m, float* v, const float* factor, const float* mask, OptimParams p) {
    u32 first = linear_id() * 4u;
    if (first >= p.count) return;
    float old[4], g[4], first_moment[4], second_moment[4], kept[4] = {1.0f, 1.0f, 1.0f, 1.0f}, scale = factor[0];
    bool whole = first + 4u <= p.count;
    if (whole) {
        uint4 raw[4] = {load_vector(param + first), load_vector(grad + first), load_vector(m + first), load_vector(v + first)};
        if (p.masked == 1u) unpack_vector(kept, load_vector(mask + first));
        unpack_vector(old, raw[0]);
        unpack_vector(g, raw[1]);
        unpack_vector(first_moment, raw[2]);
        unpack_vector(second_moment, raw[3]);
    } else {
#pragma unroll
        for (u32 k = 0; k < 4u; k++) {
            u32 i = min(first + k, p.count - 1u);
            old[k] = param[i];
            g[k] = grad[i];
            first_moment[k] = m[i];
            second_moment[k] = v[i];
            if (p.masked == 1u) kept[k] = mask[i];
        }
    }
#pragma unroll
    for (u32 k = 0; k < 4u; k++) {
        g[k] *= scale;
        first_moment[k] = p.beta1 * first_moment[k] + (1.0f - p.beta1) * g[k];
        second_moment[k] = p.beta2 * second_moment[k] + (1.0f - p.beta2) * g[k] * g[k];
        float direction = first_moment[k] * p.correction1 / (sqrtf(second_moment[k] * p.correction2) + p.epsilon);
        old[k] -= p.rate * (direction + p.decay * old[k]);
        if (kept[k] == 0.0f) {
            old[k] = 0.0f;
            first_moment[k] = 0.0f;
            second_moment[k] = 0.0f;
        }
    }
    if (whole) {
        store_vector(param + first, pack_vector(old));
        store_vector(m + first, pack_vector(first_moment));
        store_vector(v + first, pack_vector(second_moment));
    } else {
#pragma unroll
        for (u32 k = 0; k < 4u; k++) {
            if (first + k < p.count) {
                param[first + k] = old[k];
                m[first + k] = first_moment[k];
                v[first + k] = second_moment[k];
            }
        }
    }
}
