// op:       hidden_mse, cosine, kl and their backward
// math:     hidden_mse: u = s / ms, v = t / mt (or s, t): loss = c sum_i w_i |u_i - v_i|^2, c = 1/2 or 1 / (D sum w);
//           ms = sum_i w_i |s_i| / sum w; ds = 2 c w dloss ((u - v) / ms - s sum_i w_i u_i . (u_i - v_i) / (ms |s_i| sum w))
//           cosine: loss = w (1 - a.b / (|a| |b|)); da = -w dloss (b / (|a| |b|) - cos a / |a|^2)
//           kl: a = zs / T, b = zt / T, q, p their softmax: forward sum p log(p/q), reverse sum q log(q/p),
//           jsd beta KL(p||m) + (1-beta) KL(q||m); loss = w F kl; dz = dloss w F / T slope, slope: q - p;
//           q (log q - log p - kl); q ((1-beta) log(q/m) - (1-beta) KL(q||m))
// grad:     hidden_mse_bwd, cosine_bwd, kl_bwd (student side; cosine both)
// shapes:   student s, teacher t and weight w of all; hidden_mse: s[R,D], t[R,D], w[R], loss[], stats[4], norms[R], sums[R];
//           bwd: s[R,D], t[R,D], w[R], saved stats[4], dloss[], ds[R,D]
//           cosine: a[R,D], b[R,D], w[R], loss[R]; bwd: a[R,D], b[R,D], w[R], dloss[R], da[R,D], db[R,D]
//           kl: zs[R,V], zt[R,V], w[R], loss[R], lse_s[R], lse_t[R], expectation[R]
//           kl_bwd: zs[R,V], zt[R,V], w[R], saved lse_s[R], lse_t[R], expectation[R], dloss[R], dz[R,V]
// layout:   row-major; stats: sum w, ms, mt, sum_i w_i u_i . (u_i - v_i)
// launch:   rows linear, 64 a block; means and totals one block of 128; kl v2: one block of 128 per row; kl_bwd linear, 4 elements each
//           kl v3: a warp, a block of 256 or one of 512 per row; kl_bwd_v2: a warp per 128 vectors of a row
// cost:     hidden_mse 3 R D flops, cosine 6 R D, kl 12 R V
// numerics: f32; maxima taken off before exp; sums in blocks of 32; jsd from log(p/q), free of the rounding of lse;
//           all weights 0: loss 0 and gradient 0; rows of zeros have norm gradient 0
// source:   LightChatGLM Eq 10; BMCook (Zhang et al. 2022); Hinton et al. 2015; Agarwal et al. 2024
// rungs:    v1 a row per thread; v2 (kl) a row per block, butterfly reductions; v3 (kl) 16 bytes per access, both rows once with
//           maxima and sums taken along (jsd: a second pass over what the cache has)

struct DistillParams { u32 rows, d, a, b; float inverse, factor; };

#define GROUP 128u
#define BLOCK 32u

__device__ __forceinline__ float inverse_or_zero(float x) { return x > 0.0f ? 1.0f / fmaxf(x, 1e-37f) : 0.0f; }

// --- hidden_mse: a = mean reduction, b = normalised
__device__ __forceinline__ float mse_factor(const DistillParams& p, float total) {
    return p.a == 0u ? 0.5f : inverse_or_zero(total) / (float)p.d;
}

// Squared lengths of a row of student and teacher.
__device__ float2 row_squares(const E* s, const E* t, u32 d) {
    float2 sum = make_float2(0.0f, 0.0f);
    for (u32 begin = 0; begin < d; begin += BLOCK) {
        float2 part = make_float2(0.0f, 0.0f);
        for (u32 i = begin; i < min(begin + BLOCK, d); i++) {
            float u = ld(s[i]), v = ld(t[i]);
            part.x += u * u;
            part.y += v * v;
        }
        sum.x += part.x;
        sum.y += part.y;
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(64)
    hidden_mse_norms(const E* student, const E* teacher, const float* weight, float*, float*, float2* norms, float2*, DistillParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    float2 squares = row_squares(student + (u64)row * p.d, teacher + (u64)row * p.d, p.d);
    norms[row] = make_float2(weight[row] * sqrtf(squares.x), weight[row] * sqrtf(squares.y));
}

// Sums over all rows of the weights and of a pair, in every thread: the weights in x.
__device__ float3 row_totals(const float* weight, const float2* pairs, u32 rows, float* tile) {
    float3 sum = make_float3(0.0f, 0.0f, 0.0f);
    for (u32 row = threadIdx.x; row < rows; row += GROUP) {
        sum.x += weight[row];
        sum.y += pairs[row].x;
        sum.z += pairs[row].y;
    }
    sum.x = block_sum(sum.x, tile);
    sum.y = block_sum(sum.y, tile);
    sum.z = block_sum(sum.z, tile);
    return sum;
}

extern "C" __global__ void __launch_bounds__(128)
    hidden_mse_means(const E*, const E*, const float* weight, float*, float* stats, const float2* norms, float2*, DistillParams p) {
    __shared__ float tile[WARP];
    float3 totals = row_totals(weight, norms, p.rows, tile);
    if (threadIdx.x != 0u) return;
    stats[1] = totals.y * inverse_or_zero(totals.x);
    stats[2] = totals.z * inverse_or_zero(totals.x);
}

// (w |u - v|^2, w u . (u - v)) of one row.
extern "C" __global__ void __launch_bounds__(64)
    hidden_mse_fwd(const E* student, const E* teacher, const float* weight, float*, const float* stats, float2*, float2* sums, DistillParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    float scale_s = 1.0f, scale_t = 1.0f;
    if (p.b != 0u) {
        scale_s = inverse_or_zero(stats[1]);
        scale_t = inverse_or_zero(stats[2]);
    }
    student += (u64)row * p.d;
    teacher += (u64)row * p.d;
    float squares = 0.0f, along = 0.0f;
    for (u32 begin = 0; begin < p.d; begin += BLOCK) {
        float part_squares = 0.0f, part_along = 0.0f;
        for (u32 i = begin; i < min(begin + BLOCK, p.d); i++) {
            float u = scale_s * ld(student[i]);
            float e = u - scale_t * ld(teacher[i]);
            part_squares += e * e;
            part_along += u * e;
        }
        squares += part_squares;
        along += part_along;
    }
    sums[row] = make_float2(weight[row] * squares, weight[row] * along);
}

extern "C" __global__ void __launch_bounds__(128)
    hidden_mse_total(const E*, const E*, const float* weight, float* loss, float* stats, const float2*, const float2* sums, DistillParams p) {
    __shared__ float tile[WARP];
    float3 totals = row_totals(weight, sums, p.rows, tile);
    if (threadIdx.x != 0u) return;
    loss[0] = mse_factor(p, totals.x) * totals.y;
    stats[0] = totals.x;
    if (p.b == 0u) {
        stats[1] = 1.0f;
        stats[2] = 1.0f;
    }
    stats[3] = totals.z;
}

extern "C" __global__ void __launch_bounds__(64)
    hidden_mse_bwd(const E* student, const E* teacher, const float* weight, const float* saved, const float* dloss, E* ds, DistillParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    student += (u64)row * p.d;
    teacher += (u64)row * p.d;
    ds += (u64)row * p.d;
    float total = saved[0], scale_s = inverse_or_zero(saved[1]), scale_t = inverse_or_zero(saved[2]), through = 0.0f;
    if (p.b != 0u) through = saved[3] * scale_s * inverse_or_zero(sqrtf(row_squares(student, teacher, p.d).x)) * inverse_or_zero(total);
    float factor = 2.0f * mse_factor(p, total) * dloss[0] * weight[row];
    for (u32 i = 0; i < p.d; i++) {
        float s = ld(student[i]);
        ds[i] = st(factor * ((scale_s * s - scale_t * ld(teacher[i])) * scale_s - through * s));
    }
}

// --- cosine
// a.a, b.b, a.b of one row.
__device__ float3 row_products(const E* a, const E* b, u32 d) {
    float3 sum = make_float3(0.0f, 0.0f, 0.0f);
    for (u32 begin = 0; begin < d; begin += BLOCK) {
        float3 part = make_float3(0.0f, 0.0f, 0.0f);
        for (u32 i = begin; i < min(begin + BLOCK, d); i++) {
            float u = ld(a[i]), v = ld(b[i]);
            part.x += u * u;
            part.y += v * v;
            part.z += u * v;
        }
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(64) cosine_fwd(const E* a, const E* b, const float* weight, float* loss, DistillParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    float3 products = row_products(a + (u64)row * p.d, b + (u64)row * p.d, p.d);
    loss[row] = weight[row] * (1.0f - products.z * inverse_or_zero(sqrtf(products.x) * sqrtf(products.y)));
}

extern "C" __global__ void __launch_bounds__(64)
    cosine_bwd(const E* a, const E* b, const float* weight, const float* dloss, E* da, E* db, DistillParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    u64 base = (u64)row * p.d;
    float3 products = row_products(a + base, b + base, p.d);
    float lengths = inverse_or_zero(sqrtf(products.x) * sqrtf(products.y));
    float along_a = products.z * lengths * inverse_or_zero(products.x);
    float along_b = products.z * lengths * inverse_or_zero(products.y);
    float factor = -weight[row] * dloss[row];
    for (u64 i = base; i < base + p.d; i++) {
        float u = ld(a[i]), v = ld(b[i]);
        da[i] = st(factor * (v * lengths - along_a * u));
        db[i] = st(factor * (u * lengths - along_b * v));
    }
}

// --- kl: a = direction, b = beta's bits
// Maxima of student and teacher over elements first, first + step, ... of one row; the sums below go over the same.
__device__ float2 kl_max(const E* zs, const E* zt, const DistillParams& p, u32 first, u32 step) {
    float2 most = make_float2(-3.4e38f, -3.4e38f);
    for (u32 i = first; i < p.d; i += step) {
        most.x = fmaxf(most.x, ld(zs[i]) * p.inverse);
        most.y = fmaxf(most.y, ld(zt[i]) * p.inverse);
    }
    return most;
}

// Sums of exp(a - max), exp(b - max) and of the difference of logits under the distribution that the divergence averages over.
__device__ float3 kl_sums(const E* zs, const E* zt, const DistillParams& p, float2 most, u32 first, u32 step) {
    float3 sum = make_float3(0.0f, 0.0f, 0.0f);
    for (u32 begin = first; begin < p.d; begin += BLOCK * step) {
        float3 part = make_float3(0.0f, 0.0f, 0.0f);
        for (u32 i = begin; i < min(begin + BLOCK * step, p.d); i += step) {
            float s = ld(zs[i]) * p.inverse, t = ld(zt[i]) * p.inverse;
            float exp_s = expf(s - most.x), exp_t = expf(t - most.y);
            part.x += exp_s;
            part.y += exp_t;
            part.z += p.a == 1u ? exp_s * (s - t) : exp_t * (t - s);
        }
        sum.x += part.x;
        sum.y += part.y;
        sum.z += part.z;
    }
    return sum;
}

__device__ __forceinline__ float2 kl_lse(float2 most, float3 sums) { return make_float2(most.x + logf(sums.x), most.y + logf(sums.y)); }

// Sums of p log(p/m) and q log(q/m).
__device__ float2 jsd_sums(const E* zs, const E* zt, const DistillParams& p, float2 lse, u32 first, u32 step) {
    float2 sum = make_float2(0.0f, 0.0f);
    for (u32 begin = first; begin < p.d; begin += BLOCK * step) {
        float2 part = make_float2(0.0f, 0.0f);
        for (u32 i = begin; i < min(begin + BLOCK * step, p.d); i += step) {
            float log_q = ld(zs[i]) * p.inverse - lse.x, log_p = ld(zt[i]) * p.inverse - lse.y;
            float2 terms = jsd_terms(__uint_as_float(p.b), log_p, log_q);
            part.x += terms.x;
            part.y += terms.y;
        }
        sum.x += part.x;
        sum.y += part.y;
    }
    return sum;
}

// loss, lse of student and teacher and expectation of one row from its sums; jsd is only read for that direction. The
// logarithm of the sums' quotient, not of each sum: a small divergence is a difference of large terms.
__device__ float4 kl_values(const DistillParams& p, float weight, float2 most, float3 sums, float2 jsd) {
    float apart = (most.x - most.y) + logf(sums.x / sums.y);
    float beta = __uint_as_float(p.b), value = 0.0f, expectation = 0.0f;
    if (p.a == 0u) value = sums.z / sums.y + apart;
    if (p.a == 1u) {
        value = sums.z / sums.x - apart;
        expectation = value;
    }
    if (p.a == 2u) {
        expectation = (1.0f - beta) * jsd.y;
        value = beta * jsd.x + expectation;
    }
    float2 lse = kl_lse(most, sums);
    return make_float4(weight * p.factor * value, lse.x, lse.y, expectation);
}

extern "C" __global__ void __launch_bounds__(64)
    kl_fwd(const E* zs, const E* zt, const float* weight, float* loss, float* lse_s, float* lse_t, float* expectation, DistillParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    zs += (u64)row * p.d;
    zt += (u64)row * p.d;
    float2 most = kl_max(zs, zt, p, 0u, 1u), jsd = make_float2(0.0f, 0.0f);
    float3 sums = kl_sums(zs, zt, p, most, 0u, 1u);
    if (p.a == 2u) jsd = jsd_sums(zs, zt, p, kl_lse(most, sums), 0u, 1u);
    float4 values = kl_values(p, weight[row], most, sums, jsd);
    loss[row] = values.x;
    lse_s[row] = values.y;
    lse_t[row] = values.z;
    expectation[row] = values.w;
}

extern "C" __global__ void __launch_bounds__(128)
    kl_fwd_v2(const E* zs, const E* zt, const float* weight, float* loss, float* lse_s, float* lse_t, float* expectation, DistillParams p) {
    __shared__ float tile[WARP];
    u32 row = linear_block(), lane = threadIdx.x;
    if (row >= p.rows) return;
    zs += (u64)row * p.d;
    zt += (u64)row * p.d;
    float2 most = kl_max(zs, zt, p, lane, GROUP), jsd = make_float2(0.0f, 0.0f);
    most.x = block_max(most.x, tile);
    most.y = block_max(most.y, tile);
    float3 sums = kl_sums(zs, zt, p, most, lane, GROUP);
    sums.x = block_sum(sums.x, tile);
    sums.y = block_sum(sums.y, tile);
    sums.z = block_sum(sums.z, tile);
    if (p.a == 2u) {
        jsd = jsd_sums(zs, zt, p, kl_lse(most, sums), lane, GROUP);
        jsd.x = block_sum(jsd.x, tile);
        jsd.y = block_sum(jsd.y, tile);
    }
    if (lane != 0u) return;
    float4 values = kl_values(p, weight[row], most, sums, jsd);
    loss[row] = values.x;
    lse_s[row] = values.y;
    lse_t[row] = values.z;
    expectation[row] = values.w;
}

extern "C" __global__ void __launch_bounds__(64)
    kl_bwd(const E* zs, const E* zt, const float* weight, const float* lse_s, const float* lse_t, const float* expectation, const float* dloss, E* dz,
           DistillParams p) {
    u32 first = linear_id() * 4u;
    float beta = __uint_as_float(p.b);
    for (u32 i = first; i < min(first + 4u, p.rows * p.d); i++) {
        u32 row = i / p.d;
        float log_q = ld(zs[i]) * p.inverse - lse_s[row], log_p = ld(zt[i]) * p.inverse - lse_t[row];
        float slope = expf(log_q);
        if (p.a == 0u) slope -= expf(log_p);
        if (p.a == 1u) slope *= log_q - log_p - expectation[row];
        if (p.a == 2u) slope *= (beta - 1.0f) * log_mixture(beta, log_p - log_q).y - expectation[row];
        dz[i] = st(dloss[row] * weight[row] * p.factor * p.inverse * slope);
    }
}

// --- kl, 16 bytes per access. Rows need not be aligned: elements of other rows in a first or last vector do not count.
#define UNROLL 2u

// Both maxima, and the sums that kl_sums takes.
struct Pass { float2 most; float3 sums; };

// The sums move to new maxima.
__device__ __forceinline__ float3 moved(const Pass& f, const DistillParams& p, float2 most) {
    float scale_s = expf(f.most.x - most.x), scale_t = expf(f.most.y - most.y);
    return make_float3(f.sums.x * scale_s, f.sums.y * scale_t, f.sums.z * (p.a == 1u ? scale_s : scale_t));
}

// UNROLL vectors of both rows; EDGE where some of their elements are of other rows or of none.
template <u32 TEAM, bool EDGE>
__device__ __forceinline__ void kl_batch(Pass& f, const E* zs, const E* zt, const DistillParams& p, const Span& span, u32 base) {
    uint4 raw_s[UNROLL], raw_t[UNROLL];
#pragma unroll
    for (u32 i = 0; i < UNROLL; i++) {
        u64 at = span.start + (u64)(base + i * TEAM) * VECTOR;
        raw_s[i] = EDGE ? span_load(zs, span, base + i * TEAM, 0.0f) : load_vector(zs + at);
        raw_t[i] = EDGE ? span_load(zt, span, base + i * TEAM, 0.0f) : load_vector(zt + at);
    }
    float s[UNROLL][VECTOR], t[UNROLL][VECTOR];
    float2 most = f.most;
#pragma unroll
    for (u32 i = 0; i < UNROLL; i++) {
        unpack_vector(s[i], raw_s[i]);
        unpack_vector(t[i], raw_t[i]);
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) {
            bool inside = !EDGE || span_index(span, base + i * TEAM, k) < span.length;
            s[i][k] *= p.inverse;
            t[i][k] *= p.inverse;
            most.x = inside ? fmaxf(most.x, s[i][k]) : most.x;
            most.y = inside ? fmaxf(most.y, t[i][k]) : most.y;
        }
    }
    float3 part = make_float3(0.0f, 0.0f, 0.0f);
#pragma unroll
    for (u32 i = 0; i < UNROLL; i++) {
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) {
            bool inside = !EDGE || span_index(span, base + i * TEAM, k) < span.length;
            float exp_s = expf(s[i][k] - most.x), exp_t = expf(t[i][k] - most.y);
            float apart = p.a == 1u ? exp_s * (s[i][k] - t[i][k]) : exp_t * (t[i][k] - s[i][k]);
            part.x += inside ? exp_s : 0.0f;
            part.y += inside ? exp_t : 0.0f;
            part.z += inside ? apart : 0.0f;
        }
    }
    float3 old = moved(f, p, most);
    f.most = most;
    f.sums = make_float3(old.x + part.x, old.y + part.y, old.z + part.z);
}

template <u32 TEAM>
__device__ __forceinline__ void kl_row(const E* zs, const E* zt, const float* weight, float* loss, float* lse_s, float* lse_t, float* expectation, const DistillParams& p, float* tile) {
    u32 row = team_row<TEAM>(), lane = threadIdx.x % TEAM;
    if (row >= p.rows) return;
    Span span = span_of(row, p.d);
    Pass f = {make_float2(-3.4e38f, -3.4e38f), make_float3(0.0f, 0.0f, 0.0f)};
    for (u32 base = lane; base < span.vectors; base += TEAM * UNROLL) {
        if (span_whole(span, base) && span_whole(span, base + (UNROLL - 1u) * TEAM)) kl_batch<TEAM, false>(f, zs, zt, p, span, base);
        else kl_batch<TEAM, true>(f, zs, zt, p, span, base);
    }
    float2 most = make_float2(team_max<TEAM>(f.most.x, tile), team_max<TEAM>(f.most.y, tile)), jsd = make_float2(0.0f, 0.0f);
    float3 sums = moved(f, p, most);
    sums.x = team_sum<TEAM>(sums.x, tile);
    sums.y = team_sum<TEAM>(sums.y, tile);
    sums.z = team_sum<TEAM>(sums.z, tile);
    if (p.a == 2u) {
        u64 at = (u64)row * p.d;
        jsd = jsd_sums(zs + at, zt + at, p, kl_lse(most, sums), lane, TEAM);
        jsd.x = team_sum<TEAM>(jsd.x, tile);
        jsd.y = team_sum<TEAM>(jsd.y, tile);
    }
    if (lane != 0u) return;
    float4 values = kl_values(p, weight[row], most, sums, jsd);
    loss[row] = values.x;
    lse_s[row] = values.y;
    lse_t[row] = values.z;
    expectation[row] = values.w;
}

extern "C" __global__ void __launch_bounds__(128)
    kl_fwd_warp_v3(const E* zs, const E* zt, const float* weight, float* loss, float* lse_s, float* lse_t, float* expectation, DistillParams p) {
    kl_row<WARP>(zs, zt, weight, loss, lse_s, lse_t, expectation, p, nullptr);
}

extern "C" __global__ void __launch_bounds__(256)
    kl_fwd_block_v3(const E* zs, const E* zt, const float* weight, float* loss, float* lse_s, float* lse_t, float* expectation, DistillParams p) {
    __shared__ float tile[WARP];
    kl_row<256u>(zs, zt, weight, loss, lse_s, lse_t, expectation, p, tile);
}

extern "C" __global__ void __launch_bounds__(512)
    kl_fwd_wide_v3(const E* zs, const E* zt, const float* weight, float* loss, float* lse_s, float* lse_t, float* expectation, DistillParams p) {
    __shared__ float tile[WARP];
    kl_row<512u>(zs, zt, weight, loss, lse_s, lse_t, expectation, p, tile);
}

template <u32 DIRECTION>
__device__ __forceinline__ void kl_slopes(float* s, const float* t, const DistillParams& p, float lse_s, float lse_t, float expectation, float factor) {
    float beta = __uint_as_float(p.b);
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++) {
        float log_q = s[k] * p.inverse - lse_s, log_p = t[k] * p.inverse - lse_t, slope = expf(log_q);
        if (DIRECTION == 0u) slope -= expf(log_p);
        if (DIRECTION == 1u) slope *= log_q - log_p - expectation;
        if (DIRECTION == 2u) slope *= (beta - 1.0f) * log_mixture(beta, log_p - log_q).y - expectation;
        s[k] = factor * slope;
    }
}

extern "C" __global__ void __launch_bounds__(256)
    kl_bwd_v2(const E* zs, const E* zt, const float* weight, const float* lse_s, const float* lse_t, const float* expectation, const float* dloss, E* dz,
              DistillParams p) {
    // Vectors of a part, 32 at a time.
    constexpr u32 TURNS = 4u;
    u32 parts = div_up((p.d + 2u * VECTOR - 2u) / VECTOR, WARP * TURNS);
    u32 item = team_row<WARP>(), row = item / parts, first = item % parts * (WARP * TURNS) + threadIdx.x % WARP;
    if (row >= p.rows) return;
    Span span = span_of(row, p.d);
    float log_sum_s = lse_s[row], log_sum_t = lse_t[row], mean = expectation[row], factor = dloss[row] * weight[row] * p.factor * p.inverse;
#pragma unroll 2
    for (u32 i = 0; i < TURNS; i++) {
        u32 j = first + i * WARP;
        float s[VECTOR], t[VECTOR];
        uint4 raw_s = span_load(zs, span, j, 0.0f), raw_t = span_load(zt, span, j, 0.0f);
        unpack_vector(s, raw_s);
        unpack_vector(t, raw_t);
        if (p.a == 0u) kl_slopes<0u>(s, t, p, log_sum_s, log_sum_t, mean, factor);
        else if (p.a == 1u) kl_slopes<1u>(s, t, p, log_sum_s, log_sum_t, mean, factor);
        else kl_slopes<2u>(s, t, p, log_sum_s, log_sum_t, mean, factor);
        span_store(dz, span, j, s);
    }
}
