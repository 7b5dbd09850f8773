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
//           mma: planes[2,C,W in eights] (dz), scale[2]; tile_hidden, tile_weight: planes, b, scale, c (sums); slopes: .., scale, planes
// launch:   tile_logits, tile_product: 64 threads as 8x8, 4x4 outputs each; rows linear, 64 a block; store and slopes linear, 4 elements each;
//           mma: products 128 threads, 128x128 outputs (small: 64x64); rows a warp each, 8 a block; slopes linear, 8 words of a row each
// cost:     2 N V D flops per product: 1 forward, 3 backward (teacher: 1 each)
// numerics: mma: dz times a power of two as the sum of two 16-bit numbers (16 or 22 bits), each multiplied for itself;
//           f32 sums in the order of the reduction; maxima taken off before exp; jsd as in distill.cu;
//           target 0xffffffff: loss and gradient 0; target of V or more: NaN
// source:   chunked cross-entropy: Wijmans et al. 2024 (CCE); Hinton et al. 2015
// rungs:    v1 register tiles of 4x4, a row per thread; mma (f16, bf16) products on tensor instructions, a row per warp

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
// A row belongs to a thread (TEAM 1) or to a warp, whose lanes take every TEAM-th word.
template <u32 TEAM> __device__ __forceinline__ u32 row_of() { return TEAM == 1u ? linear_id() : team_row<WARP>(); }
template <u32 TEAM> __device__ __forceinline__ float row_sum(float x) { return TEAM == 1u ? x : warp_sum(x); }
template <u32 TEAM> __device__ __forceinline__ float row_max(float x) { return TEAM == 1u ? x : warp_max(x); }

template <u32 TEAM> __device__ __forceinline__ void entropy_row(const float* z, const u32* target, float* state, const LinearParams& p) {
    u32 i = row_of<TEAM>(), lane = threadIdx.x % TEAM;
    if (i >= p.m) return;
    u32 row = p.add + i, best = 0u;
    float* s = state + (u64)row * 8u;
    float most = -3.4e38f, exps = 0.0f, total = 0.0f, z_target = 0.0f;
    if (p.word != 0u) {
        most = s[0];
        exps = lane == 0u ? s[1] : 0.0f;
        total = lane == 0u ? s[2] : 0.0f;
        z_target = s[3];
        best = (u32)s[4];
    }
    z += (u64)i * p.n;
    float before = most;
#pragma unroll 4
    for (u32 j = lane; j < p.n; j += TEAM) {
        // Strictly larger: the lowest index wins ties, and those of earlier tiles are lower.
        if (z[j] > most) {
            most = z[j];
            best = p.word + j;
        }
    }
    float own = most;
    most = row_max<TEAM>(own);
    if (own != most) best = 0xffffffffu;
    for (u32 by = TEAM / 2u; by > 0u; by /= 2u) best = min(best, __shfl_xor_sync(ALL_LANES, best, by));
    exps *= expf(before - most);
    for (u32 begin = lane; begin < p.n; begin += BLOCK * TEAM) {
        float part = 0.0f, sum = 0.0f;
#pragma unroll 4
        for (u32 j = begin; j < min(begin + BLOCK * TEAM, p.n); j += TEAM) {
            part += expf(z[j] - most);
            sum += z[j];
        }
        exps += part;
        total += sum;
    }
    exps = row_sum<TEAM>(exps);
    total = row_sum<TEAM>(total);
    if (lane != 0u) return;
    u32 t = target[row];
    if (t >= p.word && t - p.word < p.n) z_target = z[t - p.word];
    s[0] = most;
    s[1] = exps;
    s[2] = total;
    s[3] = z_target;
    s[4] = (float)best;
}

extern "C" __global__ void __launch_bounds__(64) entropy_tile(const float* z, const u32* target, float* state, LinearParams p) {
    entropy_row<1>(z, target, state, p);
}

extern "C" __global__ void __launch_bounds__(256) entropy_tile_mma(const float* z, const u32* target, float* state, LinearParams p) {
    entropy_row<WARP>(z, target, state, p);
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

// dz of word p.word + j of a row.
__device__ __forceinline__ float entropy_slope(float z, u32 j, u32 row, const u32* target, const float* lse, const float* dloss, const LinearParams& p) {
    u32 t = target[row];
    float slope = expf(z - lse[row]) - p.factor / (float)p.k;
    if (t == p.word + j) slope -= 1.0f - p.factor;
    return t == IGNORE ? 0.0f : dloss[row] * slope;
}

extern "C" __global__ void __launch_bounds__(64)
    entropy_slopes(float* z, const u32* target, const float* lse, const float* dloss, LinearParams p) {
    u32 first = linear_id() * 4u;
    for (u32 e = first; e < min(first + 4u, p.m * p.n); e++) z[e] = entropy_slope(z[e], e % p.n, p.add + e / p.n, target, lse, dloss, p);
}

// --- divergences
template <u32 TEAM> __device__ __forceinline__ void kl_row(const float* zs, const float* zt, float* state, const LinearParams& p) {
    u32 i = row_of<TEAM>(), lane = threadIdx.x % TEAM;
    if (i >= p.m) return;
    float* s = state + (u64)(p.add + i) * 8u;
    float most_s = -3.4e38f, most_t = -3.4e38f, exps_s = 0.0f, exps_t = 0.0f, difference = 0.0f;
    if (p.word != 0u) {
        most_s = s[0];
        most_t = s[1];
        exps_s = lane == 0u ? s[2] : 0.0f;
        exps_t = lane == 0u ? s[3] : 0.0f;
        difference = lane == 0u ? s[4] : 0.0f;
    }
    zs += (u64)i * p.n;
    zt += (u64)i * p.n;
    float before_s = most_s, before_t = most_t;
#pragma unroll 4
    for (u32 j = lane; j < p.n; j += TEAM) {
        most_s = fmaxf(most_s, zs[j] * p.inverse);
        most_t = fmaxf(most_t, zt[j] * p.inverse);
    }
    most_s = row_max<TEAM>(most_s);
    most_t = row_max<TEAM>(most_t);
    float shrink_s = expf(before_s - most_s), shrink_t = expf(before_t - most_t);
    exps_s *= shrink_s;
    exps_t *= shrink_t;
    difference *= p.direction == 1u ? shrink_s : shrink_t;
    for (u32 begin = lane; begin < p.n; begin += BLOCK * TEAM) {
        float part_s = 0.0f, part_t = 0.0f, part_difference = 0.0f;
#pragma unroll 4
        for (u32 j = begin; j < min(begin + BLOCK * TEAM, p.n); j += TEAM) {
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
    exps_s = row_sum<TEAM>(exps_s);
    exps_t = row_sum<TEAM>(exps_t);
    difference = row_sum<TEAM>(difference);
    if (lane != 0u) return;
    s[0] = most_s;
    s[1] = most_t;
    s[2] = exps_s;
    s[3] = exps_t;
    s[4] = difference;
}

template <u32 TEAM> __device__ __forceinline__ void jsd_row(const float* zs, const float* zt, float* state, const LinearParams& p) {
    u32 i = row_of<TEAM>(), lane = threadIdx.x % TEAM;
    if (i >= p.m) return;
    float* s = state + (u64)(p.add + i) * 8u;
    float lse_s = s[0] + logf(s[2]), lse_t = s[1] + logf(s[3]), sum_p = 0.0f, sum_q = 0.0f;
    if (p.word != 0u && lane == 0u) {
        sum_p = s[5];
        sum_q = s[6];
    }
    zs += (u64)i * p.n;
    zt += (u64)i * p.n;
    for (u32 begin = lane; begin < p.n; begin += BLOCK * TEAM) {
        float part_p = 0.0f, part_q = 0.0f;
        for (u32 j = begin; j < min(begin + BLOCK * TEAM, p.n); j += TEAM) {
            float log_q = zs[j] * p.inverse - lse_s, log_p = zt[j] * p.inverse - lse_t;
            float2 terms = jsd_terms(p.factor, log_p, log_q);
            part_p += terms.x;
            part_q += terms.y;
        }
        sum_p += part_p;
        sum_q += part_q;
    }
    sum_p = row_sum<TEAM>(sum_p);
    sum_q = row_sum<TEAM>(sum_q);
    if (lane != 0u) return;
    s[5] = sum_p;
    s[6] = sum_q;
}

extern "C" __global__ void __launch_bounds__(64) kl_tile(const float* zs, const float* zt, float* state, LinearParams p) { kl_row<1>(zs, zt, state, p); }
extern "C" __global__ void __launch_bounds__(64) jsd_tile(const float* zs, const float* zt, float* state, LinearParams p) { jsd_row<1>(zs, zt, state, p); }
extern "C" __global__ void __launch_bounds__(256) kl_tile_mma(const float* zs, const float* zt, float* state, LinearParams p) { kl_row<WARP>(zs, zt, state, p); }
extern "C" __global__ void __launch_bounds__(256) jsd_tile_mma(const float* zs, const float* zt, float* state, LinearParams p) { jsd_row<WARP>(zs, zt, state, p); }

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
        zs[e] = dloss[row] * weight[row] * factor * kl_slope(zs[e], zt[e], lse_s[row], lse_t[row], expectation[row], p);
    }
}

// --- tensor rung: products on gemm.cuh, dz as the sum of two 16-bit numbers
#ifdef TENSOR_16

// Sums by a factor to f32, or added to what is there.
struct TileStore {
    float* c;
    const LinearParams& p;
    float scale;
    template <u32 DOWN, u32 RIGHT>
    __device__ __forceinline__ void operator()(float (&sums)[DOWN][RIGHT][4], u32 row, u32 column, u8*) const {
        bool pairs = p.c_row % 2u == 0u && p.c_start % 2u == 0u;
#pragma unroll
        for (u32 i = 0; i < 2u * DOWN; i++) {
            if (row + i * 8u >= p.m) continue;
            float* line = c + (p.c_start + (u64)(row + i * 8u) * p.c_row);
#pragma unroll
            for (u32 j = 0; j < RIGHT; j++) {
                u32 at = column + j * 8u;
                float2 y = make_float2(sums[i / 2u][j][i % 2u * 2u] * scale, sums[i / 2u][j][i % 2u * 2u + 1u] * scale);
                // Rows of even length end with a pair.
                if (at >= p.n) continue;
                if (pairs && at + 1u < p.n) {
                    float2* out = (float2*)(line + at);
                    *out = p.add != 0u ? make_float2(out->x + y.x, out->y + y.y) : y;
                } else {
                    line[at] = p.add != 0u ? line[at] + y.x : y.x;
                    if (at + 1u < p.n) line[at + 1u] = p.add != 0u ? line[at + 1u] + y.y : y.y;
                }
            }
        }
    }
};

template <class Shape, bool A_ALONG_K, bool B_ALONG_K, u32 PLANES, bool ODD>
__device__ __forceinline__ void tile_tensor(const GemmRows& a, const GemmRows& b, float* c, const LinearParams& p, float scale) {
    DYNAMIC_SHARED(shared);
    u32 row, column;
    gemm_tile(row, column);
    TileStore finish = {c, p, scale};
    gemm<Shape, A_ALONG_K, B_ALONG_K, PLANES, 1, ODD>(a, b, row * Shape::ROWS, column * Shape::COLUMNS, p.k, shared, finish);
}

template <class Shape, bool ODD>
__device__ __forceinline__ void tile_logits_tensor(const E* a, const E* b, float* c, const LinearParams& p) {
    bool aligned = p.k % 8u == 0u;
    GemmRows left = {a + p.a_start, p.k, p.m, p.k, 0, aligned}, right = {b + p.b_start, p.k, p.n, p.k, 0, aligned};
    tile_tensor<Shape, true, true, 1, ODD>(left, right, c, p, 1.0f);
}

// dhidden: tokens by the width, the sums run over words (along dz's rows); dweight: words by the width, over tokens.
template <class Shape, bool ODD, bool OVER_WORDS>
__device__ __forceinline__ void tile_product_tensor(const E* planes, const E* b, const float* scale, float* c, const LinearParams& p) {
    u32 tokens = OVER_WORDS ? p.m : p.k, words = OVER_WORDS ? p.k : p.m, step = div_up(words, 8u) * 8u;
    GemmRows left = {planes, step, tokens, words, (u64)tokens * step, true}, right = {b + p.b_start, p.n, p.k, p.n, 0, p.n % 8u == 0u};
    tile_tensor<Shape, OVER_WORDS, false, 2, ODD>(left, right, c, p, scale[1]);
}

// Eight words of one row of a tile, zeros behind its end, and back as two planes.
__device__ __forceinline__ void tile_read(float (&z)[8], const float* row, u32 j, u32 n) {
    if (n % 4u == 0u && j + 8u <= n) {
        float4 low = *(const float4*)(row + j), high = *(const float4*)(row + j + 4u);
        z[0] = low.x, z[1] = low.y, z[2] = low.z, z[3] = low.w, z[4] = high.x, z[5] = high.y, z[6] = high.z, z[7] = high.w;
    } else {
#pragma unroll
        for (u32 i = 0; i < 8u; i++) z[i] = j + i < n ? row[j + i] : 0.0f;
    }
}

__device__ __forceinline__ void tile_split(E* planes, const float (&dz)[8], u32 row, u32 j, const LinearParams& p) {
    u32 step = div_up(p.n, 8u) * 8u;
    float low[8];
#pragma unroll
    for (u32 i = 0; i < 8u; i++) {
        // What 16 bits cannot hold stays infinite.
        float high = ld(st(dz[i]));
        low[i] = is_finite(high) ? dz[i] - high : 0.0f;
    }
    E* to = planes + (u64)row * step + j;
    store_vector(to, pack_vector(dz));
    store_vector(to + (u64)p.m * step, pack_vector(low));
}

#endif

#if ARCH >= 80 || defined(ESPALIER_HOST)

extern "C" __global__ void __launch_bounds__(128, 2) tile_logits_mma(const E* a, const E* b, float* c, LinearParams p) {
    TENSOR_ONLY((tile_logits_tensor<GemmLarge, false>(a, b, c, p));)
}

extern "C" __global__ void __launch_bounds__(128) tile_logits_small_mma(const E* a, const E* b, float* c, LinearParams p) {
    TENSOR_ONLY((tile_logits_tensor<GemmSmall, true>(a, b, c, p));)
}

extern "C" __global__ void __launch_bounds__(128, 2) tile_hidden_mma(const E* planes, const E* b, const float* scale, float* c, LinearParams p) {
    TENSOR_ONLY((tile_product_tensor<GemmLargePlanes, false, true>(planes, b, scale, c, p));)
}

extern "C" __global__ void __launch_bounds__(128) tile_hidden_small_mma(const E* planes, const E* b, const float* scale, float* c, LinearParams p) {
    TENSOR_ONLY((tile_product_tensor<GemmSmall, true, true>(planes, b, scale, c, p));)
}

extern "C" __global__ void __launch_bounds__(128, 2) tile_weight_mma(const E* planes, const E* b, const float* scale, float* c, LinearParams p) {
    TENSOR_ONLY((tile_product_tensor<GemmLargePlanes, false, false>(planes, b, scale, c, p));)
}

extern "C" __global__ void __launch_bounds__(128) tile_weight_small_mma(const E* planes, const E* b, const float* scale, float* c, LinearParams p) {
    TENSOR_ONLY((tile_product_tensor<GemmSmall, true, false>(planes, b, scale, c, p));)
}

// A power of two that takes the largest factor of p.m rows to 16 .. 32, and its inverse: dz is a probability's size times the
// factor, and f16 has no small numbers. With p.n the factor has a weight in it. One block.
extern "C" __global__ void __launch_bounds__(256) tile_scale_mma(const float* dloss, const float* weight, float* scale, LinearParams p) {
    __shared__ float tile[32];
    float most = 0.0f, factor = __uint_as_float(p.a_start) * p.inverse;
    for (u32 row = threadIdx.x; row < p.m; row += 256u) {
        float x = fabsf(dloss[row] * (p.n != 0u ? weight[row] * factor : 1.0f));
        if (is_finite(x)) most = fmaxf(most, x);
    }
    most = block_max(most, tile);
    if (threadIdx.x != 0u) return;
    // Neither of the two may leave the normal numbers.
    u32 exponent = min(258u - (__float_as_uint(most) >> 23), 253u);
    scale[0] = __uint_as_float(exponent << 23);
    scale[1] = __uint_as_float((254u - exponent) << 23);
}

// Eight words of a row per thread.
extern "C" __global__ void __launch_bounds__(128)
    entropy_slopes_mma(const float* z, const u32* target, const float* lse, const float* dloss, const float* scale, E* planes, LinearParams p) {
#ifdef TENSOR_16
    u32 eights = div_up(p.n, 8u), i = linear_id() / eights, j = linear_id() % eights * 8u;
    if (i >= p.m) return;
    float dz[8];
    tile_read(dz, z + (u64)i * p.n, j, p.n);
#pragma unroll
    for (u32 q = 0; q < 8u; q++) dz[q] = j + q < p.n ? entropy_slope(dz[q], j + q, p.add + i, target, lse, dloss, p) * scale[0] : 0.0f;
    tile_split(planes, dz, i, j, p);
#endif
}

extern "C" __global__ void __launch_bounds__(128)
    kl_slopes_mma(const float* zs, const float* zt, const float* weight, const float* lse_s, const float* lse_t, const float* expectation,
                  const float* dloss, const float* scale, E* planes, LinearParams p) {
#ifdef TENSOR_16
    u32 eights = div_up(p.n, 8u), i = linear_id() / eights, j = linear_id() % eights * 8u, row = p.add + i;
    if (i >= p.m) return;
    float dz[8], teacher[8], factor = dloss[row] * weight[row] * (__uint_as_float(p.a_start) * p.inverse) * scale[0];
    tile_read(dz, zs + (u64)i * p.n, j, p.n);
    tile_read(teacher, zt + (u64)i * p.n, j, p.n);
#pragma unroll
    for (u32 q = 0; q < 8u; q++) dz[q] = j + q < p.n ? factor * kl_slope(dz[q], teacher[q], lse_s[row], lse_t[row], expectation[row], p) : 0.0f;
    tile_split(planes, dz, i, j, p);
#endif
}

#endif
