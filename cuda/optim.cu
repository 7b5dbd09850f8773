// op:       adamw, sgd, update_factor
// math:     adamw: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p -= lr (c1 m / (sqrt(c2 v) + eps) + decay p)
//           sgd: u = momentum u + g, p -= lr (u + decay p); g = grad factor; a factor of 0 changes nothing
//           update_factor: a = inverse / scale, norm = a sqrt(squares), factor = a min(1, max / (norm + 1e-6)), 0 where
//           squares or loss are not finite; scale doubled after `growth` good steps, halved else, or the step has failed
// grad:     none
// shapes:   adamw: param[N] (in place), grad[N], m[N] (in place), v[N] (in place), factor[1], rates[5], mask[N] when masked
//           sgd: param[N] (in place), grad[N], velocity[N] (in place), factor[1], rates[5], mask[N] when masked
//           update_factor: squares[1], losses[1], rates[5], state[5] (in place), factor[1]
//           rates: lr, c1, c2, inverse (1 / weight), step; state: scale, good steps, failed step, loss, norm
// layout:   contiguous; a group's parameters lie one after another
// launch:   linear, 64 threads a block, 4 elements each; adamw_v2: 256 threads a block, 4 elements each
// cost:     14 flops and 28 bytes an element (adamw), 6 and 20 (sgd)
// numerics: f32; c1 and c2 are rounded once on the host; finite by bits; a masked element becomes exactly 0 everywhere
// source:   AdamW: Loshchilov and Hutter 2019
// rungs:    v1 one thread, four neighbours; v2 16 bytes per access

struct OptimParams { u32 count, masked; float beta1, beta2, epsilon, decay; };

extern "C" __global__ void __launch_bounds__(64) adamw(float* param, const float* grad, float* m, float* v, const float* factor, const float* rates, const float* mask, OptimParams p) {
    u32 first = linear_id() * 4u;
    float scale = factor[0], rate = rates[0];
    if (scale == 0.0f) return;
    for (u32 i = first; i < min(first + 4u, p.count); i++) {
        // Without a mask its slot holds another argument.
        if (p.masked == 1u && mask[i] == 0.0f) {
            param[i] = 0.0f;
            m[i] = 0.0f;
            v[i] = 0.0f;
            continue;
        }
        float g = grad[i] * scale;
        float first_moment = p.beta1 * m[i] + (1.0f - p.beta1) * g;
        float second_moment = p.beta2 * v[i] + (1.0f - p.beta2) * g * g;
        float direction = first_moment * rates[1] / (sqrtf(second_moment * rates[2]) + p.epsilon);
        float old = param[i];
        param[i] = old - rate * (direction + p.decay * old);
        m[i] = first_moment;
        v[i] = second_moment;
    }
}

extern "C" __global__ void __launch_bounds__(64) sgd(float* param, const float* grad, float* velocity, const float* factor, const float* rates, const float* mask, OptimParams p) {
    u32 first = linear_id() * 4u;
    float scale = factor[0], rate = rates[0];
    if (scale == 0.0f) return;
    for (u32 i = first; i < min(first + 4u, p.count); i++) {
        if (p.masked == 1u && mask[i] == 0.0f) {
            param[i] = 0.0f;
            velocity[i] = 0.0f;
            continue;
        }
        // Momentum stands where AdamW's first beta does.
        float u = p.beta1 * velocity[i] + grad[i] * scale;
        float old = param[i];
        param[i] = old - rate * (u + p.decay * old);
        velocity[i] = u;
    }
}

extern "C" __global__ void __launch_bounds__(1) update_factor(const float* squares, const float* losses, const float* rates, float* state, float* factor, OptimParams p) {
    // The op's block is count, scaled, max_norm, growth, least, most: by place.
    float max_norm = p.beta1, growth = p.beta2, least = p.epsilon, most = p.decay;
    factor[0] = 0.0f;
    if (state[2] != 0.0f) return;
    float inverse = rates[3], scale = state[0], loss = losses[0];
    float all = inverse / scale;
    float norm = all * sqrtf(squares[0]);
    if (is_finite(squares[0]) && is_finite(loss) && is_finite(norm)) {
        factor[0] = all * (max_norm > 0.0f ? fminf(1.0f, max_norm / (norm + 1e-6f)) : 1.0f);
        if (p.masked == 1u) {
            float good = state[1] + 1.0f;
            bool grown = good >= growth;
            state[0] = grown ? fminf(2.0f * scale, most) : scale;
            state[1] = grown ? 0.0f : good;
        }
        state[3] = loss * inverse;
        state[4] = norm;
    } else if (p.masked == 1u && is_finite(loss) && scale > least) {
        state[0] = fmaxf(0.5f * scale, least);
        state[1] = 0.0f;
        state[3] = loss * inverse;
        state[4] = 0.0f;
    } else {
        state[2] = rates[4];
        state[3] = 0.0f;
        state[4] = 0.0f;
    }
}

extern "C" __global__ void __launch_bounds__(256) adamw_v2(float* param, const float* grad, float* m, float* v, const float* factor, const float* rates, const float* mask, OptimParams p) {
    u32 first = linear_id() * 4u;
    if (first >= p.count) return;
    float scale = factor[0], rate = rates[0], correction1 = rates[1], correction2 = rates[2];
    if (scale == 0.0f) return;
    float old[4], g[4], first_moment[4], second_moment[4], kept[4] = {1.0f, 1.0f, 1.0f, 1.0f};
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
        float direction = first_moment[k] * correction1 / (sqrtf(second_moment[k] * correction2) + p.epsilon);
        old[k] -= rate * (direction + p.decay * old[k]);
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
