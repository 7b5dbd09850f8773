// op:       moe_gate, moe_gate_bwd, moe_dispatch, moe_combine, moe_combine_bwd
// math:     gate: top-k of each row; dispatch: stable sort of slots by expert; combine: out[t] = sum_j g[t, j] y[inv[t k + j]]
// grad:     gate: dscores[t, e] = dgate where chosen; combine: dy[r] = g dout[t], dgate[slot] = dout[t] . y[r]
// shapes:   gate: scores[M, E], indices[M, k], gate[M, k]; gate_bwd: indices, dgate, dscores; count: chosen indices[S], counts[C, E];
//           scan: counts, offsets[E + 1]; scatter: indices, counts, order[S]; inverse: order[S], inverse[S];
//           combine: y[S, D], rows (inverse), gate, out[M, D]; combine_bwd: dout[M, D], order, gate, dy; bwd_gate: dout, order, y, dgate
// layout:   rows contiguous; slot = token k + choice
// launch:   linear, 64 threads a block: a row (gate), an element (backward, combine), a chunk of slots (dispatch)
// cost:     gate k E comparisons a row; dispatch 2 S steps; combine k multiply-adds an element
// numerics: choices exact: lowest index wins ties, NaN last; sums in f32 in the order of choices
// source:   Shazeer et al. 2017; MoEfication: Zhang et al. 2022
// rungs:    v1 as above

struct MoeParams { u32 rows, k, width, weighted, chunk, chunks; };
struct MoeRowParams { u32 rows, k, width; };
struct MoeSumParams { u32 rows, k, width, weighted; };

// An unsigned integer of the order of x: NaN lowest, both zeros equal.
__device__ __forceinline__ u32 rank_of(float x) {
    if (is_nan(x)) return 0u;
    u32 b = x == 0.0f ? 0u : __float_as_uint(x);
    return b >> 31 ? ~b : b | 0x80000000u;
}

extern "C" __global__ void __launch_bounds__(64) moe_gate_fwd(const E* scores, u32* indices, float* gates, MoeRowParams p) {
    u32 row = linear_id();
    if (row >= p.rows) return;
    scores += (u64)row * p.width;
    u32 last_rank = 0xffffffffu, last_index = 0u;
    for (u32 j = 0; j < p.k; j++) {
        // The first in falling order after the last one taken.
        u32 rank = 0u, index = 0xffffffffu;
        for (u32 e = 0; e < p.width; e++) {
            u32 r = rank_of(ld(scores[e]));
            bool after = j == 0u || r < last_rank || (r == last_rank && e > last_index);
            if (after && (index == 0xffffffffu || r > rank)) {
                rank = r;
                index = e;
            }
        }
        indices[(u64)row * p.k + j] = index;
        gates[(u64)row * p.k + j] = ld(scores[index]);
        last_rank = rank;
        last_index = index;
    }
}

extern "C" __global__ void __launch_bounds__(64) moe_gate_bwd(const u32* chosen, const float* dgate, E* dscores, MoeRowParams p) {
    u32 id = linear_id(), row = id / p.width;
    if (row >= p.rows) return;
    float d = 0.0f;
    for (u32 j = 0; j < p.k; j++) {
        if (chosen[(u64)row * p.k + j] == id % p.width) d += dgate[(u64)row * p.k + j];
    }
    dscores[id] = st(d);
}

__device__ __forceinline__ u32 expert_of(const u32* chosen, u32 slot, u32 experts) { return min(chosen[slot], experts - 1u); }

extern "C" __global__ void __launch_bounds__(64) moe_dispatch_count(const u32* chosen, u32* counts, MoeParams p) {
    u32 c = linear_id();
    if (c >= p.chunks) return;
    counts += (u64)c * p.width;
    for (u32 e = 0; e < p.width; e++) counts[e] = 0u;
    for (u32 s = c * p.chunk; s < min((c + 1u) * p.chunk, p.rows); s++) counts[expert_of(chosen, s, p.width)] += 1u;
}

// Counts become the first place of each chunk within each expert.
extern "C" __global__ void __launch_bounds__(64) moe_dispatch_scan(const u32*, u32* counts, u32* offsets, MoeParams p) {
    if (linear_id() != 0u) return;
    u32 total = 0u;
    for (u32 e = 0; e < p.width; e++) {
        offsets[e] = total;
        for (u32 c = 0; c < p.chunks; c++) {
            u32 count = counts[(u64)c * p.width + e];
            counts[(u64)c * p.width + e] = total;
            total += count;
        }
    }
    offsets[p.width] = total;
}

extern "C" __global__ void __launch_bounds__(64) moe_dispatch_scatter(const u32* chosen, u32* counts, u32* order, MoeParams p) {
    u32 c = linear_id();
    if (c >= p.chunks) return;
    counts += (u64)c * p.width;
    for (u32 s = c * p.chunk; s < min((c + 1u) * p.chunk, p.rows); s++) {
        u32 e = expert_of(chosen, s, p.width);
        order[counts[e]] = s;
        counts[e] += 1u;
    }
}

// An order is data: rows and slots past the end count as the last, so that none reaches outside of a buffer.
extern "C" __global__ void __launch_bounds__(64) moe_combine_inverse(const u32* order, u32* inverse, MoeSumParams p) {
    u32 r = linear_id();
    if (r >= p.rows) return;
    inverse[min(order[r], p.rows - 1u)] = r;
}

extern "C" __global__ void __launch_bounds__(64) moe_combine_fwd(const E* y, const u32* inverse, const float* gate, E* out, MoeSumParams p) {
    u32 id = linear_id(), token = id / p.width;
    if (token >= p.rows / p.k) return;
    float sum = 0.0f;
    for (u32 j = 0; j < p.k; j++) {
        u32 slot = token * p.k + j, r = min(inverse[slot], p.rows - 1u);
        float value = ld(y[(u64)r * p.width + id % p.width]);
        sum += p.weighted == 1u ? gate[slot] * value : value;
    }
    out[id] = st(sum);
}

extern "C" __global__ void __launch_bounds__(64) moe_combine_bwd(const E* dout, const u32* order, const float* gate, E* dy, MoeSumParams p) {
    u32 id = linear_id(), r = id / p.width;
    if (r >= p.rows) return;
    u32 slot = min(order[r], p.rows - 1u);
    float d = ld(dout[(u64)(slot / p.k) * p.width + id % p.width]);
    if (p.weighted == 1u) d *= gate[slot];
    dy[id] = st(d);
}

extern "C" __global__ void __launch_bounds__(64)
    moe_combine_bwd_gate(const E* dout, const u32* order, const E* y, float* dgate, MoeSumParams p) {
    u32 r = linear_id();
    if (r >= p.rows) return;
    u32 slot = min(order[r], p.rows - 1u);
    dout += (u64)(slot / p.k) * p.width;
    y += (u64)r * p.width;
    float sum = 0.0f;
    for (u32 c = 0; c < p.width; c++) sum += ld(dout[c]) * ld(y[c]);
    dgate[slot] = sum;
}
