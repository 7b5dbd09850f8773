// op:       relative_bias, relative_bias_bwd
// math:     bias[h, t, s] = table[h, bucket(s - t - offset)]; bucket of a distance: ids, and the second half of the buckets
//           for keys after the query (both sides) or the bucket of distance 0 for them
// grad:     dtable[h, b] = sum of dbias over the pairs of bucket b
// shapes:   fwd: table[H,C], ids[R], bias[H,T,S]; bwd_diagonals: dbias[H,T,S], sums[H,T+S-1]; bwd_buckets: sums, ids, dtable[H,C]
// layout:   contiguous; diagonal g of a head holds the pairs with s - t + T - 1 = g
// launch:   linear, 64 invocations a group: one pair (fwd), one diagonal (bwd_diagonals), one bucket (bwd_buckets) each
// cost:     H T S elements moved once
// numerics: fwd copies; f32 sums in order of t, then in order of diagonals
// source:   Raffel et al. 2020
// rungs:    v1

struct RelativeParams { heads: u32, queries: u32, keys: u32, count: u32, reach: u32, offset: u32, both_sides: u32 }
var<immediate> rb: RelativeParams;

@group(0) @binding(0) var<storage, read> rb_table: array<E>;
@group(0) @binding(1) var<storage, read> rb_ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> rb_bias: array<E>;

// Bucket of diagonal g.
fn bucket_of(g: u32) -> u32 {
    let behind = rb.queries - 1u + rb.offset;
    var reach = 0u;
    var side = 0u;
    if g <= behind { reach = behind - g; }
    else if rb.both_sides != 0u { reach = g - behind; side = rb.count / 2u; }
    return min(rb_ids[min(reach, rb.reach - 1u)] + side, rb.count - 1u);
}

@compute @workgroup_size(64)
fn relative_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= rb.heads * rb.queries * rb.keys { return; }
    let s = item % rb.keys;
    let row = item / rb.keys;
    let g = s + rb.queries - 1u - row % rb.queries;
    rb_bias[item] = rb_table[row / rb.queries * rb.count + bucket_of(g)];
}

@group(0) @binding(0) var<storage, read> rb_dbias: array<E>;
@group(0) @binding(1) var<storage, read_write> rb_sums: array<f32>;

@compute @workgroup_size(64)
fn relative_bwd_diagonals(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    let diagonals = rb.queries + rb.keys - 1u;
    if item >= rb.heads * diagonals { return; }
    let g = item % diagonals;
    let head = item / diagonals * rb.queries;
    // s = g - (T - 1) + t lies in 0..S.
    var sum = 0.0;
    let first = max(g, rb.queries - 1u) - g;
    let last = min(rb.queries, rb.keys + rb.queries - 1u - g);
    for (var t = first; t < last; t++) {
        sum += ld(rb_dbias[(head + t) * rb.keys + g + t + 1u - rb.queries]);
    }
    rb_sums[item] = sum;
}

@group(0) @binding(0) var<storage, read> rb_sums_in: array<f32>;
@group(0) @binding(2) var<storage, read_write> rb_dtable: array<E>;

@compute @workgroup_size(64)
fn relative_bwd_buckets(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= rb.heads * rb.count { return; }
    let diagonals = rb.queries + rb.keys - 1u;
    let start = item / rb.count * diagonals;
    let own = item % rb.count;
    var sum = 0.0;
    for (var g = 0u; g < diagonals; g++) {
        if bucket_of(g) == own { sum += rb_sums_in[start + g]; }
    }
    rb_dtable[item] = st(sum);
}
