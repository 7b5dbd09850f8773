// op:       linear_cross_entropy, linear_kl, their backward, linear_predict
// math:     z = hidden weightᵀ, one tile of tokens and words at a time; per row a running maximum and sums (softmax.cu,
//           distill.cu hold the losses' formulas); backward: z again, dz in its place, dhidden += dz weight, dweight += dzᵀ hidden
// grad:     linear_cross_entropy_bwd, linear_kl_bwd
// shapes:   tile_logits: a[R,D] (hidden), b[W,D] (weight), c[C,W] (z); tile_product: dz[C,W], b[..], c[..] (sums); tile_store: sums[..], out[..]
//           entropy_tile: z[C,W], target[R], state[R,8]; entropy_done: state[R,8], target[R], loss[R], lse[R]
//           predict_done: state[R,8], target[R], prediction[R], log_probability[R]
//           entropy_slopes: z[C,W], target[R], lse[R], dloss[R]
//           kl_tile, jsd_tile: zs[C,W], zt[C,W], state[R,8]; kl_done: state[R,8], weight[R], loss[R], lse_s[R], lse_t[R], expectation[R]
//           kl_slopes: zs[C,W], zt[C,W], weight[R], lse_s[R], lse_t[R], expectation[R], row[R] (dloss)
// layout:   arguments are slots (the plan says which argument is where); W words of the head from `word` on, weight and its
//           gradient bound from there; C tokens from `row` on; z row-major f32; state: 8 f32 per row
// launch:   tile_logits, tile_product: 64 threads as 8x8, 4x4 outputs each; rows linear, 64 a block; store and slopes linear, 4 elements each
// cost:     2 N V D flops per product: 1 forward, 3 backward (teacher: 1 each)
// numerics: f32 sums in the order of the reduction; maxima taken off before exp; jsd as in distill.cu;
//           target 0xffffffff: loss and gradient 0; target of V or more: NaN
// source:   chunked cross-entropy: Wijmans et al. 2024 (CCE); Hinton et al. 2015
// rungs:    v1 register tiles of 4x4, a row per thread

struct LinearParams {
    // tile_*: extents m, n, k and strides; rows: tokens, words of the tile, vocabulary.
    u32 m, n, k;
    u32 a_start, a_row, a_k;
    u32 b_start, b_column, b_k;
    u32 c_start, c_row;
    // tile_product: add to c; rows: first token of the chunk.
    u32 add;
    // rows: first word of the tile, direction, smoothing or beta, 1 / temperature
    u32 word, direction;
    float factor, inverse;
};

#define IGNORE 0xffffffffu
#define BLOCK 32u

// Operands are storage or f32.
template <class T> __device__ __forceinline__ float wide(T x) { return ld(x); }
template <> __device__ __forceinline__ float wide<float>(float x) { return x; }

// 4x4 outputs of a thread; rows and columns past the edge repeat the last one and are not stored.
template <class A> __device__ __forceinline__ void tile_outputs(const A* a, const E* b, float* c, const LinearParams& p) {
    u32 row = (blockIdx.y * 8u + threadIdx.x / 8u) * 4u, column = (blockIdx.x * 8u + threadIdx.x % 8u) * 4u;
    if (row >= p.m || column >= p.n) return;
    u64 at_a[4], at_b[4];
    float sum[4][4] = {};
#pragma unroll
    for (u32 i = 0; i < 4u; i++) {
        at_a[i] = p.a_start + (u64)min(row + i, p.m - 1u) * p.a_row;
        at_b[i] = p.b_start + (u64)min(column + i, p.n - 1u) * p.b_column;
    }
    for (u32 k = 0; k < p.k; k++) {
        float left[4], right[4];
#pragma unroll
        for (u32 i = 0; i < 4u; i++) {
            left[i] = wide(a[at_a[i] + (u64)k * p.a_k]);
            right[i] = ld(b[at_b[i] + (u64)k * p.b_k]);
        }
#pragma unroll
        for (u32 i = 0; i < 4u; i++)
#pragma unroll
            for (u32 j = 0; j < 4u; j++) sum[i][j] += left[i] * right[j];
    }
#pragma unroll
    for (u32 i = 0; i < 4u; i++)
#pragma unroll
        for (u32 j = 0; j < 4u; j++) {
            if (row + i >= p.m || column + j >= p.n) continue;
            float* out = c + (p.c_start + (u64)(row + i) * p.c_row + column + j);
            *out = p.add != 0u ? *out + sum[i][j] : sum[i][j];
        }
}

extern "C" __global__ void __launch_bounds__(64) tile_logits(const E* a, const E* b, float* c, LinearParams p) { tile_outputs(a, b, c, p); }

// As tile_logits, from the f32 gradient of a tile.
extern "C" __global__ void __launch_bounds__(64) tile_product(const float* dz, const E* b, float* c, LinearParams p) { tile_outputs(dz, b, c, p); }

extern "C" __global__ void __launch_bounds__(64) tile_store(const float* sums, E* out, LinearParams p) {
    u32 first = linear_id() * 4u;
    for (u32 i = first; i < min(first + 4u, p.m); i++) out[i] = st(sums[i]);
}

// --- cross-entropy. p.m tokens from p.add on, p.n words from p.word on, p.k words in all.
// State of a row, cross-entropy: maximum, sum of exp, sum, target's logit, index of the maximum (exact below 2^24). Divergences:
// maximum and sum of exp of student and of teacher, sum of the difference, sums of p log(p/m) and q log(q/m).
extern "C" __global__ void __launch_bounds__(64) entropy_tile(const float* z, const u32* target, float* state, LinearParams p) {
    u32 i = linear_id();
    if (i >= p.m) return;
    u32 row = p.add + i;
    float* s = state + (u64)row * 8u;
    float most = -3.4e38f, exps = 0.0f, total = 0.0f, z_target = 0.0f;
    u32 best = 0u;
    if (p.word != 0u) {
        most = s[0];
        exps = s[1];
        total = s[2];
        z_target = s[3];
        best = (u32)s[4];
    }
    z += (u64)i * p.n;
    float before = most;
    for (u32 j = 0; j < p.n; j++) {
        // Strictly larger: the lowest index wins ties.
        if (z[j] > most) {
            most = z[j];
            best = p.word + j;
        }
    }
    exps *= expf(before - most);
    for (u32 begin = 0; begin < p.n; begin += BLOCK) {
        float part = 0.0f, sum = 0.0f;
        for (u32 j = begin; j < min(begin + BLOCK, p.n); j++) {
            part += expf(z[j] - most);
            sum += z[j];
        }
        exps += part;
        total += sum;
    }
    u32 t = target[row];
    if (t >= p.word && t - p.word < p.n) z_target = z[t - p.word];
    s[0] = most;
    s[1] = exps;
    s[2] = total;
    s[3] = z_target;
    s[4] = (float)best;
}

extern "C" __global__ void __launch_bounds__(64) entropy_done(const float* state, const u32* target, float* loss, float* lse, LinearParams p) {
    u32 row = linear_id();
    if (row >= p.m) return;
    u32 t = target[row];
    if (t == IGNORE) {
        loss[row] = 0.0f;
        lse[row] = 0.0f;
        return;
    }
    const float* s = state + (u64)row * 8u;
    float all = s[0] + logf(s[1]);
    lse[row] = all;
    if (t >= p.k) loss[row] = __uint_as_float(0x7fc00000u);
    else loss[row] = all - (1.0f - p.factor) * s[3] - p.factor * (s[2] / (float)p.k);
}

extern "C" __global__ void __launch_bounds__(64)
    predict_done(const float* state, const u32* target, u32* prediction, float* log_probability, LinearParams p) {
    u32 row = linear_id();
    if (row >= p.m) return;
    const float* s = state + (u64)row * 8u;
    prediction[row] = (u32)s[4];
    u32 t = target[row];
    if (t == IGNORE) log_probability[row] = 0.0f;
    else if (t >= p.k) log_probability[row] = __uint_as_float(0x7fc00000u);
    else log_probability[row] = s[3] - s[0] - logf(s[1]);
}

extern "C" __global__ void __launch_bounds__(64)
    entropy_slopes(float* z, const u32* target, const float* lse, const float* dloss, LinearParams p) {
    u32 first = linear_id() * 4u;
    float smoothing = p.factor;
    for (u32 e = first; e < min(first + 4u, p.m * p.n); e++) {
        u32 i = e / p.n, row = p.add + i, t = target[row];
        float slope = expf(z[e] - lse[row]) - smoothing / (float)p.k;
        if (t == p.word + e - i * p.n) slope -= 1.0f - smoothing;
        z[e] = t == IGNORE ? 0.0f : dloss[row] * slope;
    }
}

// --- divergences
// log(m / p) and log(m / q) of m = beta p + (1 - beta) q from log(p / q): where p and q are close these are small, and log m
// would have lost their digits.
__device__ __forceinline__ float2 log_mixture(float beta, float ratio) {
    float apart = fabsf(ratio), rest = 1.0f - beta;
    float larger = ratio > 0.0f ? beta : rest, smaller = ratio > 0.0f ? rest : beta;
    float over = apart < 1.0f ? log1pf(smaller * expm1f(-apart)) : logf(larger + smaller * expf(-apart));
    return ratio > 0.0f ? make_float2(over, over + apart) : make_float2(over + apart, over);
}

// p log(p/m) - p + m and q log(q/m) - q + m: their sums are the divergences, as those of p, q and m are 1, and no rounding of
// the log sum exps reaches them, whose share p - m has.
__device__ __forceinline__ float2 jsd_terms(float beta, float log_p, float log_q) {
    float ratio = log_p - log_q, p = expf(log_p), q = expf(log_q);
    float2 over = log_mixture(beta, ratio);
    // p - q from the larger of the two.
    float difference = ratio > 0.0f ? -p * expm1f(-ratio) : q * expm1f(ratio);
    return make_float2((beta - 1.0f) * difference - p * over.x, beta * difference - q * over.y);
}

extern "C" __global__ void __launch_bounds__(64) kl_tile(const float* zs, const float* zt, float* state, LinearParams p) {
    u32 i = linear_id();
    if (i >= p.m) return;
    float* s = state + (u64)(p.add + i) * 8u;
    float most_s = -3.4e38f, most_t = -3.4e38f, exps_s = 0.0f, exps_t = 0.0f, difference = 0.0f;
    if (p.word != 0u) {
        most_s = s[0];
        most_t = s[1];
        exps_s = s[2];
        exps_t = s[3];
        difference = s[4];
    }
    zs += (u64)i * p.n;
    zt += (u64)i * p.n;
    float before_s = most_s, before_t = most_t;
    for (u32 j = 0; j < p.n; j++) {
        most_s = fmaxf(most_s, zs[j] * p.inverse);
        most_t = fmaxf(most_t, zt[j] * p.inverse);
    }
    float shrink_s = expf(before_s - most_s), shrink_t = expf(before_t - most_t);
    exps_s *= shrink_s;
    exps_t *= shrink_t;
    difference *= p.direction == 1u ? shrink_s : shrink_t;
    for (u32 begin = 0; begin < p.n; begin += BLOCK) {
        float part_s = 0.0f, part_t = 0.0f, part_difference = 0.0f;
        for (u32 j = begin; j < min(begin + BLOCK, p.n); j++) {
            float a = zs[j] * p.inverse, b = zt[j] * p.inverse;
            float exp_s = expf(a - most_s), exp_t = expf(b - most_t);
            part_s += exp_s;
            part_t += exp_t;
            part_difference += p.direction == 1u ? exp_s * (a - b) : exp_t * (b - a);
        }
        exps_s += part_s;
        exps_t += part_t;
        difference += part_difference;
    }
    s[0] = most_s;
    s[1] = most_t;
    s[2] = exps_s;
    s[3] = exps_t;
    s[4] = difference;
}

extern "C" __global__ void __launch_bounds__(64) jsd_tile(const float* zs, const float* zt, float* state, LinearParams p) {
    u32 i = linear_id();
    if (i >= p.m) return;
    float* s = state + (u64)(p.add + i) * 8u;
    float lse_s = s[0] + logf(s[2]), lse_t = s[1] + logf(s[3]), sum_p = 0.0f, sum_q = 0.0f;
    if (p.word != 0u) {
        sum_p = s[5];
        sum_q = s[6];
    }
    zs += (u64)i * p.n;
    zt += (u64)i * p.n;
    for (u32 begin = 0; begin < p.n; begin += BLOCK) {
        float part_p = 0.0f, part_q = 0.0f;
        for (u32 j = begin; j < min(begin + BLOCK, p.n); j++) {
            float log_q = zs[j] * p.inverse - lse_s, log_p = zt[j] * p.inverse - lse_t;
            float2 terms = jsd_terms(p.factor, log_p, log_q);
            part_p += terms.x;
            part_q += terms.y;
        }
        sum_p += part_p;
        sum_q += part_q;
    }
    s[5] = sum_p;
    s[6] = sum_q;
}

// p.a_start holds the bits of the loss's factor (T squared or 1).
extern "C" __global__ void __launch_bounds__(64)
    kl_done(const float* state, const float* weight, float* loss, float* lse_s, float* lse_t, float* expectations, LinearParams p) {
    u32 row = linear_id();
    if (row >= p.m) return;
    const float* s = state + (u64)row * 8u;
    // The logarithm of the sums' quotient: a small divergence is a difference of large terms.
    float apart = (s[0] - s[1]) + logf(s[2] / s[3]);
    float value = 0.0f, expectation = 0.0f;
    if (p.direction == 0u) value = s[4] / s[3] + apart;
    if (p.direction == 1u) {
        value = s[4] / s[2] - apart;
        expectation = value;
    }
    if (p.direction == 2u) {
        expectation = (1.0f - p.factor) * s[6];
        value = p.factor * s[5] + expectation;
    }
    loss[row] = weight[row] * __uint_as_float(p.a_start) * value;
    lse_s[row] = s[0] + logf(s[2]);
    lse_t[row] = s[1] + logf(s[3]);
    expectations[row] = expectation;
}

extern "C" __global__ void __launch_bounds__(64)
    kl_slopes(float* zs, const float* zt, const float* weight, const float* lse_s, const float* lse_t, const float* expectation, const float* dloss,
              LinearParams p) {
    u32 first = linear_id() * 4u;
    float factor = __uint_as_float(p.a_start) * p.inverse;
    for (u32 e = first; e < min(first + 4u, p.m * p.n); e++) {
        u32 row = p.add + e / p.n;
        float log_q = zs[e] * p.inverse - lse_s[row], log_p = zt[e] * p.inverse - lse_t[row];
        float slope = expf(log_q);
        if (p.direction == 0u) slope -= expf(log_p);
        if (p.direction == 1u) slope *= log_q - log_p - expectation[row];
        if (p.direction == 2u) slope *= (p.factor - 1.0f) * log_mixture(p.factor, log_p - log_q).y - expectation[row];
        zs[e] = dloss[row] * weight[row] * factor * slope;
    }
}
