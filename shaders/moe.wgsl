// op:       moe_gate, moe_gate_bwd, moe_dispatch, moe_combine, moe_combine_bwd
// math:     gate: top-k of each row; dispatch: stable sort of slots by expert; combine: out[t] = sum_j g[t, j] y[inv[t k + j]]
// grad:     gate: dscores[t, e] = dgate where chosen; combine: dy[r] = g dout[t], dgate[slot] = dout[t] . y[r]
// shapes:   gate: scores[M, E], indices[M, k], gate[M, k]; gate_bwd: indices, dgate, dscores; count: chosen indices[S], counts[C, E];
//           scan: counts, offsets[E + 1]; scatter: indices, counts, order[S]; inverse: order[S], inverse[S];
//           combine: y[S, D], rows (inverse), gate, out[M, D]; combine_bwd: dout[M, D], order, gate, dy; bwd_gate: dout, order, y, dgate
// layout:   rows contiguous; slot = token k + choice
// launch:   linear, 64 invocations a group: a row (gate), an element (backward, combine), a chunk of slots (dispatch)
// cost:     gate k E comparisons a row; dispatch 2 S steps; combine k multiply-adds an element
// numerics: choices exact: lowest index wins ties, NaN last; sums in f32 in the order of choices
// source:   Shazeer et al. 2017; MoEfication: Zhang et al. 2022
// rungs:    v1 as above

struct MoeParams { rows: u32, k: u32, width: u32, weighted: u32, chunk: u32, chunks: u32 }
struct MoeRowParams { rows: u32, k: u32, width: u32 }
struct MoeSumParams { rows: u32, k: u32, width: u32, weighted: u32 }
var<immediate> sort: MoeParams;
var<immediate> gating: MoeRowParams;
var<immediate> moe: MoeSumParams;

@group(0) @binding(0) var<storage, read> gate_scores: array<E>;
@group(0) @binding(1) var<storage, read_write> gate_indices: array<u32>;
@group(0) @binding(2) var<storage, read_write> gate_gates: array<f32>;

// An unsigned integer of the order of x: NaN lowest, both zeros equal.
fn rank_of(x: f32) -> u32 {
    if is_nan(x) { return 0u; }
    let b = select(bitcast<u32>(x), 0u, x == 0.0);
    return select(b | 0x80000000u, ~b, (b >> 31u) == 1u);
}

@compute @workgroup_size(64)
fn moe_gate_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let row = linear_id(gid, 64u);
    if row >= gating.rows { return; }
    let start = row * gating.width;
    var last_rank = 0xffffffffu;
    var last_index = 0u;
    for (var j = 0u; j < gating.k; j++) {
        // The first in falling order after the last one taken.
        var rank = 0u;
        var index = 0xffffffffu;
        for (var e = 0u; e < gating.width; e++) {
            let r = rank_of(ld(gate_scores[start + e]));
            let after = j == 0u || r < last_rank || (r == last_rank && e > last_index);
            if after && (index == 0xffffffffu || r > rank) {
                rank = r;
                index = e;
            }
        }
        gate_indices[row * gating.k + j] = index;
        gate_gates[row * gating.k + j] = ld(gate_scores[start + index]);
        last_rank = rank;
        last_index = index;
    }
}

@group(0) @binding(0) var<storage, read> chosen: array<u32>;
@group(0) @binding(1) var<storage, read> gate_dgate: array<f32>;
@group(0) @binding(2) var<storage, read_write> gate_dscores: array<E>;

@compute @workgroup_size(64)
fn moe_gate_bwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let row = id / gating.width;
    if row >= gating.rows { return; }
    var d = 0.0;
    for (var j = 0u; j < gating.k; j++) {
        if chosen[row * gating.k + j] == id % gating.width { d += gate_dgate[row * gating.k + j]; }
    }
    gate_dscores[id] = st(d);
}

@group(0) @binding(1) var<storage, read_write> sort_counts: array<u32>;
@group(0) @binding(2) var<storage, read_write> sort_out: array<u32>;

fn expert_of(slot: u32) -> u32 { return min(chosen[slot], sort.width - 1u); }

@compute @workgroup_size(64)
fn moe_dispatch_count(@builtin(global_invocation_id) gid: vec3<u32>) {
    let c = linear_id(gid, 64u);
    if c >= sort.chunks { return; }
    for (var e = 0u; e < sort.width; e++) { sort_counts[c * sort.width + e] = 0u; }
    for (var s = c * sort.chunk; s < min((c + 1u) * sort.chunk, sort.rows); s++) {
        sort_counts[c * sort.width + expert_of(s)] += 1u;
    }
}

// Counts become the first place of each chunk within each expert.
@compute @workgroup_size(64)
fn moe_dispatch_scan(@builtin(global_invocation_id) gid: vec3<u32>) {
    if linear_id(gid, 64u) != 0u { return; }
    var total = 0u;
    for (var e = 0u; e < sort.width; e++) {
        sort_out[e] = total;
        for (var c = 0u; c < sort.chunks; c++) {
            let count = sort_counts[c * sort.width + e];
            sort_counts[c * sort.width + e] = total;
            total += count;
        }
    }
    sort_out[sort.width] = total;
}

@compute @workgroup_size(64)
fn moe_dispatch_scatter(@builtin(global_invocation_id) gid: vec3<u32>) {
    let c = linear_id(gid, 64u);
    if c >= sort.chunks { return; }
    for (var s = c * sort.chunk; s < min((c + 1u) * sort.chunk, sort.rows); s++) {
        let at = c * sort.width + expert_of(s);
        sort_out[sort_counts[at]] = s;
        sort_counts[at] += 1u;
    }
}

@group(0) @binding(0) var<storage, read> combine_y: array<E>;
@group(0) @binding(1) var<storage, read> combine_rows: array<u32>;
@group(0) @binding(2) var<storage, read> combine_gate: array<f32>;
@group(0) @binding(3) var<storage, read_write> combine_out: array<E>;
@group(0) @binding(1) var<storage, read_write> combine_inverse: array<u32>;

@compute @workgroup_size(64)
fn moe_combine_inverse(@builtin(global_invocation_id) gid: vec3<u32>) {
    let r = linear_id(gid, 64u);
    if r >= moe.rows { return; }
    combine_inverse[min(chosen[r], moe.rows - 1u)] = r;
}

@compute @workgroup_size(64)
fn moe_combine_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let token = id / moe.width;
    if token >= moe.rows / moe.k { return; }
    var sum = 0.0;
    for (var j = 0u; j < moe.k; j++) {
        let slot = token * moe.k + j;
        let y = ld(combine_y[min(combine_rows[slot], moe.rows - 1u) * moe.width + id % moe.width]);
        if moe.weighted == 1u { sum += combine_gate[slot] * y; } else { sum += y; }
    }
    combine_out[id] = st(sum);
}

@compute @workgroup_size(64)
fn moe_combine_bwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    let r = id / moe.width;
    if r >= moe.rows { return; }
    let slot = min(combine_rows[r], moe.rows - 1u);
    var d = ld(combine_y[slot / moe.k * moe.width + id % moe.width]);
    if moe.weighted == 1u { d *= combine_gate[slot]; }
    combine_out[id] = st(d);
}

@group(0) @binding(2) var<storage, read> dots_y: array<E>;
@group(0) @binding(3) var<storage, read_write> dots_dgate: array<f32>;

@compute @workgroup_size(64)
fn moe_combine_bwd_gate(@builtin(global_invocation_id) gid: vec3<u32>) {
    let r = linear_id(gid, 64u);
    if r >= moe.rows { return; }
    let slot = min(combine_rows[r], moe.rows - 1u);
    let dout = slot / moe.k * moe.width;
    var sum = 0.0;
    for (var c = 0u; c < moe.width; c++) { sum += ld(combine_y[dout + c]) * ld(dots_y[r * moe.width + c]); }
    dots_dgate[slot] = sum;
}
