// op:       relation, relation_bwd
// math:     scores s = scale a b^T of the student and z = teacher_scale c d^T of the teacher over the visible keys
//           KL: loss = w sum p (z - s) / sum p - lse(z) + lse(s), dS = w dloss (softmax(s) - softmax(z))
//           squared error: loss = w sum (s - z)^2 / n, dS = w dloss 2 (s - z) / n
//           da = scale dS b, db = scale dS^T a
// grad:     relation_bwd_rows, then relation_bwd_a and relation_bwd_b
// shapes:   visible: context[B], lengths[B], weights[B,T], seen[B,T,2]; fwd: a[B,T,H,D], b[B,S,H,D], c[B,T,H,E], d[B,S,H,E],
//           seen[B,T,2], loss[B,H,T], sums[B,H,T,2]; bwd_rows: context, lengths, weights, sums, dloss[B,H,T], rows[B,H,T,4];
//           bwd_a: a, b, c, d, rows, da[B,T,H,D]; bwd_b: a, b, c, d, rows, db[B,S,H,D]
// layout:   contiguous; the plan puts arguments into slots, an absent optional input is any read argument and never read
// launch:   linear; v1 64 invocations, one row each (a query in fwd and bwd_a, a key in bwd_b); v2 16 x 16 invocations, one
//           tile of 16 rows each; backward once for every 128 dimensions, first to last
// cost:     2 B H T S (D + E) flops forward; backward recomputes scores for da and for db
// numerics: f32; online softmax of both models at once, in key order; masks leave a prefix of the keys visible, hidden keys
//           never count; a query without keys gives loss 0 and sums of MASKED
// source:   Wang et al. 2020 (MiniLM) eq. 5 and 7; Jiao et al. 2020 (TinyBERT) eq. 7; Milakov and Gimelshein 2018
// rungs:    v1 one row per invocation, 4 of the other side at a time; v2 tiles of scores 16 x 16, operands and slopes in
//           workgroup memory

struct RelationParams {
    batch: u32, queries: u32, keys: u32, heads: u32, dim: u32, teacher_dim: u32,
    flags: u32,
    scale: f32, teacher_scale: f32,
    // Dimensions of da or db that this launch sums.
    first: u32, last: u32,
}
var<immediate> re: RelationParams;

// Dimensions of a range at most.
const DIM: u32 = 128u;
const TILE: u32 = 16u;

@group(0) @binding(0) var<storage, read> re_context: array<u32>;
@group(0) @binding(1) var<storage, read> re_lengths: array<u32>;
@group(0) @binding(2) var<storage, read> re_weights: array<f32>;
@group(0) @binding(3) var<storage, read_write> re_seen_out: array<f32>;

// Every mask leaves a prefix of the keys visible.
fn visible_keys(b: u32, t: u32) -> u32 {
    var n = re.keys;
    let mask = re.flags & 3u;
    if mask != 0u {
        var seen = t + 1u;
        if mask == 2u { seen = max(seen, re_context[b]); }
        n = min(n, seen);
    }
    if (re.flags & 4u) != 0u { n = min(n, re_lengths[b]); }
    return n;
}

// Of each query: how many keys it sees (exact: below 2^24) and what it weighs.
@compute @workgroup_size(64)
fn relation_visible(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= re.batch * re.queries { return; }
    re_seen_out[2u * item] = f32(visible_keys(item / re.queries, item % re.queries));
    re_seen_out[2u * item + 1u] = re_weights[item];
}

@group(0) @binding(3) var<storage, read> re_sums_in: array<f32>;
@group(0) @binding(4) var<storage, read> re_dloss: array<f32>;
@group(0) @binding(5) var<storage, read_write> re_rows_out: array<f32>;

// What backward needs of a query: visible keys, both log sum exps, the factor of its slopes.
@compute @workgroup_size(64)
fn relation_bwd_rows(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= re.batch * re.heads * re.queries { return; }
    let t = item % re.queries;
    let b = item / (re.queries * re.heads);
    let n = visible_keys(b, t);
    var factor = re_weights[b * re.queries + t] * re_dloss[item];
    if (re.flags & 8u) != 0u { factor = factor * 2.0 / f32(max(n, 1u)); }
    re_rows_out[4u * item] = f32(n);
    re_rows_out[4u * item + 1u] = re_sums_in[2u * item];
    re_rows_out[4u * item + 2u] = re_sums_in[2u * item + 1u];
    re_rows_out[4u * item + 3u] = factor;
}

@group(0) @binding(0) var<storage, read> re_a: array<E>;
@group(0) @binding(1) var<storage, read> re_b: array<E>;
@group(0) @binding(2) var<storage, read> re_c: array<E>;
@group(0) @binding(3) var<storage, read> re_d: array<E>;
@group(0) @binding(4) var<storage, read> re_seen: array<f32>;
@group(0) @binding(4) var<storage, read> re_rows: array<f32>;
@group(0) @binding(5) var<storage, read_write> re_loss: array<f32>;
@group(0) @binding(6) var<storage, read_write> re_sums: array<f32>;
@group(0) @binding(5) var<storage, read_write> re_da: array<E>;
@group(0) @binding(5) var<storage, read_write> re_db: array<E>;

// Start of row (b, n, h) of a tensor of `extent` rows of `dim`.
fn start_of(b: u32, n: u32, h: u32, extent: u32, dim: u32) -> u32 { return ((b * extent + n) * re.heads + h) * dim; }

fn load4_a(r: vec4<u32>, d: u32) -> vec4<f32> { return vec4<f32>(ld(re_a[r.x + d]), ld(re_a[r.y + d]), ld(re_a[r.z + d]), ld(re_a[r.w + d])); }
fn load4_b(r: vec4<u32>, d: u32) -> vec4<f32> { return vec4<f32>(ld(re_b[r.x + d]), ld(re_b[r.y + d]), ld(re_b[r.z + d]), ld(re_b[r.w + d])); }
fn load4_c(r: vec4<u32>, d: u32) -> vec4<f32> { return vec4<f32>(ld(re_c[r.x + d]), ld(re_c[r.y + d]), ld(re_c[r.z + d]), ld(re_c[r.w + d])); }
fn load4_d(r: vec4<u32>, d: u32) -> vec4<f32> { return vec4<f32>(ld(re_d[r.x + d]), ld(re_d[r.y + d]), ld(re_d[r.z + d]), ld(re_d[r.w + d])); }

// Scores of query rows at (sa, sc) against key rows at (sb, sd), four of either side at a time.
struct Pair { s: vec4<f32>, z: vec4<f32> }
fn scores_of_query(sa: u32, sc: u32, sb: vec4<u32>, sd: vec4<u32>) -> Pair {
    var pair = Pair(vec4<f32>(0.0), vec4<f32>(0.0));
    var i = 0u;
    for (; i + 4u <= re.dim; i += 4u) {
        pair.s += ld(re_a[sa + i]) * load4_b(sb, i) + ld(re_a[sa + i + 1u]) * load4_b(sb, i + 1u);
        pair.s += ld(re_a[sa + i + 2u]) * load4_b(sb, i + 2u) + ld(re_a[sa + i + 3u]) * load4_b(sb, i + 3u);
    }
    for (; i < re.dim; i++) { pair.s += ld(re_a[sa + i]) * load4_b(sb, i); }
    i = 0u;
    for (; i + 4u <= re.teacher_dim; i += 4u) {
        pair.z += ld(re_c[sc + i]) * load4_d(sd, i) + ld(re_c[sc + i + 1u]) * load4_d(sd, i + 1u);
        pair.z += ld(re_c[sc + i + 2u]) * load4_d(sd, i + 2u) + ld(re_c[sc + i + 3u]) * load4_d(sd, i + 3u);
    }
    for (; i < re.teacher_dim; i++) { pair.z += ld(re_c[sc + i]) * load4_d(sd, i); }
    return Pair(pair.s * re.scale, pair.z * re.teacher_scale);
}
fn scores_of_key(sa: vec4<u32>, sc: vec4<u32>, sb: u32, sd: u32) -> Pair {
    var pair = Pair(vec4<f32>(0.0), vec4<f32>(0.0));
    var i = 0u;
    for (; i + 4u <= re.dim; i += 4u) {
        pair.s += ld(re_b[sb + i]) * load4_a(sa, i) + ld(re_b[sb + i + 1u]) * load4_a(sa, i + 1u);
        pair.s += ld(re_b[sb + i + 2u]) * load4_a(sa, i + 2u) + ld(re_b[sb + i + 3u]) * load4_a(sa, i + 3u);
    }
    for (; i < re.dim; i++) { pair.s += ld(re_b[sb + i]) * load4_a(sa, i); }
    i = 0u;
    for (; i + 4u <= re.teacher_dim; i += 4u) {
        pair.z += ld(re_d[sd + i]) * load4_c(sc, i) + ld(re_d[sd + i + 1u]) * load4_c(sc, i + 1u);
        pair.z += ld(re_d[sd + i + 2u]) * load4_c(sc, i + 2u) + ld(re_d[sd + i + 3u]) * load4_c(sc, i + 3u);
    }
    for (; i < re.teacher_dim; i++) { pair.z += ld(re_d[sd + i]) * load4_c(sc, i); }
    return Pair(pair.s * re.scale, pair.z * re.teacher_scale);
}

// Largest score and sum of exponentials of student and teacher; the teacher's exponentials times what lies between the
// scores, or its squares.
struct Online { most_s: f32, total_s: f32, most_z: f32, total_z: f32, apart: f32 }

// Loss and sums of query (b, h, t) that sees n keys and weighs w.
fn finish(item: u32, n: u32, w: f32, state: Online) {
    var loss = 0.0;
    var sums = vec2<f32>(0.0);
    if (re.flags & 8u) != 0u {
        if n > 0u { loss = w * state.apart / f32(n); }
    } else if n == 0u {
        sums = vec2<f32>(MASKED);
    } else {
        sums = vec2<f32>(state.most_s + log(state.total_s), state.most_z + log(state.total_z));
        loss = w * (state.apart / state.total_z - sums.y + sums.x);
    }
    re_loss[item] = loss;
    re_sums[2u * item] = sums.x;
    re_sums[2u * item + 1u] = sums.y;
}

@compute @workgroup_size(64)
fn relation_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= re.batch * re.heads * re.queries { return; }
    let t = item % re.queries;
    let h = item / re.queries % re.heads;
    let b = item / (re.queries * re.heads);
    let n = u32(re_seen[2u * (b * re.queries + t)]);
    let sa = start_of(b, t, h, re.queries, re.dim);
    let sc = start_of(b, t, h, re.queries, re.teacher_dim);
    let sb = start_of(b, 0u, h, re.keys, re.dim);
    let sd = start_of(b, 0u, h, re.keys, re.teacher_dim);
    var state = Online(MASKED, 0.0, MASKED, 0.0, 0.0);
    for (var s = 0u; s < n; s += 4u) {
        // Rows past the end repeat the last visible key and count nothing.
        let key = min(vec4<u32>(s, s + 1u, s + 2u, s + 3u), vec4<u32>(n - 1u));
        let live = vec4<u32>(s, s + 1u, s + 2u, s + 3u) < vec4<u32>(n);
        let pair = scores_of_query(sa, sc, sb + key * (re.heads * re.dim), sd + key * (re.heads * re.teacher_dim));
        let apart = pair.z - pair.s;
        if (re.flags & 8u) != 0u {
            state.apart += dot(select(vec4<f32>(0.0), apart, live), apart);
            continue;
        }
        let most_s = max(state.most_s, max(max(pair.s.x, pair.s.y), max(pair.s.z, pair.s.w)));
        let most_z = max(state.most_z, max(max(pair.z.x, pair.z.y), max(pair.z.z, pair.z.w)));
        let correct_s = exp(state.most_s - most_s);
        let correct_z = exp(state.most_z - most_z);
        let q = select(vec4<f32>(0.0), exp(pair.s - most_s), live);
        let p = select(vec4<f32>(0.0), exp(pair.z - most_z), live);
        state = Online(most_s, state.total_s * correct_s + q.x + q.y + q.z + q.w,
            most_z, state.total_z * correct_z + p.x + p.y + p.z + p.w, state.apart * correct_z + dot(p, apart));
    }
    finish(item, n, re_seen[2u * (b * re.queries + t) + 1u], state);
}

// Slope of the loss in a score: `row` is what relation_bwd_rows kept of the query.
fn slope(s: f32, z: f32, row: u32) -> f32 {
    var apart = s - z;
    if (re.flags & 8u) == 0u { apart = exp(s - re_rows[row + 1u]) - exp(z - re_rows[row + 2u]); }
    return re_rows[row + 3u] * apart;
}

var<private> re_total: array<f32, DIM>;

@compute @workgroup_size(64)
fn relation_bwd_a(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= re.batch * re.heads * re.queries { return; }
    let t = item % re.queries;
    let h = item / re.queries % re.heads;
    let b = item / (re.queries * re.heads);
    let n = u32(re_rows[4u * item]);
    let sa = start_of(b, t, h, re.queries, re.dim);
    let sc = start_of(b, t, h, re.queries, re.teacher_dim);
    let sb = start_of(b, 0u, h, re.keys, re.dim);
    let sd = start_of(b, 0u, h, re.keys, re.teacher_dim);
    let width = re.last - re.first;
    for (var i = 0u; i < width; i++) { re_total[i] = 0.0; }
    for (var s = 0u; s < n; s += 4u) {
        let key = min(vec4<u32>(s, s + 1u, s + 2u, s + 3u), vec4<u32>(n - 1u));
        let live = vec4<u32>(s, s + 1u, s + 2u, s + 3u) < vec4<u32>(n);
        let at = sb + key * (re.heads * re.dim);
        let pair = scores_of_query(sa, sc, at, sd + key * (re.heads * re.teacher_dim));
        let row = 4u * item;
        let slopes = vec4<f32>(slope(pair.s.x, pair.z.x, row), slope(pair.s.y, pair.z.y, row),
            slope(pair.s.z, pair.z.z, row), slope(pair.s.w, pair.z.w, row));
        let ds = select(vec4<f32>(0.0), slopes, live);
        for (var i = 0u; i < width; i++) { re_total[i] += dot(ds, load4_b(at, re.first + i)); }
    }
    for (var i = 0u; i < width; i++) { re_da[sa + re.first + i] = st(re_total[i] * re.scale); }
}

@compute @workgroup_size(64)
fn relation_bwd_b(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    if item >= re.batch * re.heads * re.keys { return; }
    let s = item % re.keys;
    let h = item / re.keys % re.heads;
    let b = item / (re.keys * re.heads);
    let sb = start_of(b, s, h, re.keys, re.dim);
    let sd = start_of(b, s, h, re.keys, re.teacher_dim);
    let sa = start_of(b, 0u, h, re.queries, re.dim);
    let sc = start_of(b, 0u, h, re.queries, re.teacher_dim);
    let rows = 4u * (b * re.heads + h) * re.queries;
    let width = re.last - re.first;
    for (var i = 0u; i < width; i++) { re_total[i] = 0.0; }
    for (var t = 0u; t < re.queries; t += 4u) {
        // Rows past the end repeat the last query and must not count; the others count where they see this key.
        let query = min(vec4<u32>(t, t + 1u, t + 2u, t + 3u), vec4<u32>(re.queries - 1u));
        let row = rows + 4u * query;
        let seen = vec4<f32>(re_rows[row.x], re_rows[row.y], re_rows[row.z], re_rows[row.w]);
        let live = (vec4<f32>(f32(s)) < seen) & (vec4<u32>(t, t + 1u, t + 2u, t + 3u) < vec4<u32>(re.queries));
        if !any(live) { continue; }
        let at = sa + query * (re.heads * re.dim);
        let pair = scores_of_key(at, sc + query * (re.heads * re.teacher_dim), sb, sd);
        let slopes = vec4<f32>(slope(pair.s.x, pair.z.x, row.x), slope(pair.s.y, pair.z.y, row.y),
            slope(pair.s.z, pair.z.z, row.z), slope(pair.s.w, pair.z.w, row.w));
        let ds = select(vec4<f32>(0.0), slopes, live);
        for (var i = 0u; i < width; i++) { re_total[i] += dot(ds, load4_a(at, re.first + i)); }
    }
    for (var i = 0u; i < width; i++) { re_db[sb + re.first + i] = st(re_total[i] * re.scale); }
}

var<workgroup> re_left: array<f32, 256>;
// Rows lie 17 apart, so that sixteen of one column touch all banks.
var<workgroup> re_right: array<f32, 272>;
var<workgroup> re_slopes: array<f32, 272>;
var<workgroup> re_states: array<Online, 256>;

// Score of query i against key j of a tile. Invocation (i, j) brings element j of query row i and of key row i, by their starts.
fn tile_student(i: u32, j: u32, sa: u32, sb: u32) -> f32 {
    var sum = 0.0;
    for (var d = 0u; d < re.dim; d += TILE) {
        let inside = d + j < re.dim;
        re_left[i * TILE + j] = 0.0;
        re_right[i * 17u + j] = 0.0;
        if inside { re_left[i * TILE + j] = ld(re_a[sa + d + j]); re_right[i * 17u + j] = ld(re_b[sb + d + j]); }
        workgroupBarrier();
        for (var k = 0u; k < TILE; k++) { sum += re_left[i * TILE + k] * re_right[j * 17u + k]; }
        workgroupBarrier();
    }
    return sum * re.scale;
}
fn tile_teacher(i: u32, j: u32, sc: u32, sd: u32) -> f32 {
    var sum = 0.0;
    for (var d = 0u; d < re.teacher_dim; d += TILE) {
        let inside = d + j < re.teacher_dim;
        re_left[i * TILE + j] = 0.0;
        re_right[i * 17u + j] = 0.0;
        if inside { re_left[i * TILE + j] = ld(re_c[sc + d + j]); re_right[i * 17u + j] = ld(re_d[sd + d + j]); }
        workgroupBarrier();
        for (var k = 0u; k < TILE; k++) { sum += re_left[i * TILE + k] * re_right[j * 17u + k]; }
        workgroupBarrier();
    }
    return sum * re.teacher_scale;
}

// Batch element, head and first row of a workgroup's tile among `extent` rows.
struct Tile { b: u32, h: u32, start: u32 }
fn tile_of(group: vec3<u32>, extent: u32) -> Tile {
    let item = group.x + group.y * 65535u;
    let tiles = (extent + TILE - 1u) / TILE;
    let head = item / tiles;
    return Tile(head / re.heads, head % re.heads, item % tiles * TILE);
}

@compute @workgroup_size(16, 16)
fn relation_fwd_tiles(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let i = local.y;
    let j = local.x;
    let tile = tile_of(group, re.queries);
    if tile.b >= re.batch { return; }
    let t = min(tile.start + i, re.queries - 1u);
    let n = u32(re_seen[2u * (tile.b * re.queries + t)]);
    let sa = start_of(tile.b, t, tile.h, re.queries, re.dim);
    let sc = start_of(tile.b, t, tile.h, re.queries, re.teacher_dim);
    var state = Online(MASKED, 0.0, MASKED, 0.0, 0.0);
    for (var first = 0u; first < re.keys; first += TILE) {
        let brought = min(first + i, re.keys - 1u);
        let s = tile_student(i, j, sa, start_of(tile.b, brought, tile.h, re.keys, re.dim));
        let z = tile_teacher(i, j, sc, start_of(tile.b, brought, tile.h, re.keys, re.teacher_dim));
        if first + j < n {
            if (re.flags & 8u) != 0u {
                state.apart += (s - z) * (s - z);
            } else {
                let most_s = max(state.most_s, s);
                let most_z = max(state.most_z, z);
                let correct = exp(state.most_z - most_z);
                let p = exp(z - most_z);
                state = Online(most_s, state.total_s * exp(state.most_s - most_s) + exp(s - most_s),
                    most_z, state.total_z * correct + p, state.apart * correct + p * (z - s));
            }
        }
    }
    re_states[i * TILE + j] = state;
    workgroupBarrier();
    if j > 0u || tile.start + i >= re.queries { return; }
    for (var k = 1u; k < TILE; k++) {
        let other = re_states[i * TILE + k];
        let most_s = max(state.most_s, other.most_s);
        let most_z = max(state.most_z, other.most_z);
        let own = exp(state.most_z - most_z);
        let its = exp(other.most_z - most_z);
        state = Online(most_s, state.total_s * exp(state.most_s - most_s) + other.total_s * exp(other.most_s - most_s),
            most_z, state.total_z * own + other.total_z * its, state.apart * own + other.apart * its);
    }
    finish((tile.b * re.heads + tile.h) * re.queries + t, n, re_seen[2u * (tile.b * re.queries + t) + 1u], state);
}

@compute @workgroup_size(16, 16)
fn relation_bwd_a_tiles(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let i = local.y;
    let j = local.x;
    let tile = tile_of(group, re.queries);
    if tile.b >= re.batch { return; }
    let t = min(tile.start + i, re.queries - 1u);
    let row = 4u * ((tile.b * re.heads + tile.h) * re.queries + t);
    let n = u32(re_rows[row]);
    let sa = start_of(tile.b, t, tile.h, re.queries, re.dim);
    let sc = start_of(tile.b, t, tile.h, re.queries, re.teacher_dim);
    var total: array<f32, 8>;
    for (var first = 0u; first < re.keys; first += TILE) {
        let brought = min(first + i, re.keys - 1u);
        let sb = start_of(tile.b, brought, tile.h, re.keys, re.dim);
        let s = tile_student(i, j, sa, sb);
        let z = tile_teacher(i, j, sc, start_of(tile.b, brought, tile.h, re.keys, re.teacher_dim));
        re_slopes[i * 17u + j] = 0.0;
        if first + j < n { re_slopes[i * 17u + j] = slope(s, z, row); }
        for (var m = 0u; m < 8u; m++) {
            let d = re.first + m * TILE + j;
            re_right[i * 17u + j] = 0.0;
            if d < re.last { re_right[i * 17u + j] = ld(re_b[sb + d]); }
            workgroupBarrier();
            var sum = 0.0;
            for (var k = 0u; k < TILE; k++) { sum += re_slopes[i * 17u + k] * re_right[k * 17u + j]; }
            total[m] += sum;
            workgroupBarrier();
        }
    }
    if tile.start + i >= re.queries { return; }
    for (var m = 0u; m < 8u; m++) {
        let d = re.first + m * TILE + j;
        if d < re.last { re_da[sa + d] = st(total[m] * re.scale); }
    }
}

@compute @workgroup_size(16, 16)
fn relation_bwd_b_tiles(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) local: vec3<u32>) {
    let i = local.y;
    let j = local.x;
    let tile = tile_of(group, re.keys);
    if tile.b >= re.batch { return; }
    let brought = min(tile.start + i, re.keys - 1u);
    let sb = start_of(tile.b, brought, tile.h, re.keys, re.dim);
    let sd = start_of(tile.b, brought, tile.h, re.keys, re.teacher_dim);
    var total: array<f32, 8>;
    for (var first = 0u; first < re.queries; first += TILE) {
        let t = min(first + i, re.queries - 1u);
        let row = 4u * ((tile.b * re.heads + tile.h) * re.queries + t);
        let sa = start_of(tile.b, t, tile.h, re.queries, re.dim);
        let s = tile_student(i, j, sa, sb);
        let z = tile_teacher(i, j, start_of(tile.b, t, tile.h, re.queries, re.teacher_dim), sd);
        re_slopes[i * 17u + j] = 0.0;
        if first + i < re.queries && tile.start + j < u32(re_rows[row]) { re_slopes[i * 17u + j] = slope(s, z, row); }
        for (var m = 0u; m < 8u; m++) {
            let d = re.first + m * TILE + j;
            re_right[i * 17u + j] = 0.0;
            if d < re.last { re_right[i * 17u + j] = ld(re_a[sa + d]); }
            workgroupBarrier();
            var sum = 0.0;
            for (var k = 0u; k < TILE; k++) { sum += re_slopes[k * 17u + i] * re_right[k * 17u + j]; }
            total[m] += sum;
            workgroupBarrier();
        }
    }
    if tile.start + i >= re.keys { return; }
    for (var m = 0u; m < 8u; m++) {
        let d = re.first + m * TILE + j;
        if d < re.last { re_db[sb + d] = st(total[m] * re.scale); }
    }
}
