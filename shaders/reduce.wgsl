// op:       sum, mean, max, sum_squares over the last axis, all rows or all elements; argmax; count_non_finite; backward
// math:     y = sum x, sum x / n, max x, sum x^2; argmax: lowest index of the largest; count: non-finite bits, first index
// grad:     reduce_bwd: dx = dy, dy / n, dy at the maximum, 2 x dy
// shapes:   reduce_fwd: x[O, N, I], y[O, I], partials[..] (scratch); argmax: x[O, N], indices[O], words[O, S] (scratch);
//           count: x[N], indices[2], words[..] (scratch); reduce_bwd: x[O, N, I] or index[O, I], dy[O, I], dx[O, N, I]
// layout:   contiguous; the reduced axis in the middle: last axis I = 1, rows O = 1, all O = I = 1
// launch:   linear, 64 invocations a group, one (segment of a) reduction each; a tree of passes for long axes
// cost:     N flops and N elements read per reduction
// numerics: f32 accumulation in four lanes per segment, fixed order; max and argmax do not see NaN; counting is by bits
// source:   -
// rungs:    v1 one invocation per segment, segments and passes decided by the shape alone

// `at` maps items to elements: item + first is (o, segment, i); from and to shift into windows and scratch regions.
struct ReduceParams {
    items: u32, first: u32, n: u32, inner: u32, segments: u32, fan: u32, kind: u32, from_shift: u32, to_shift: u32, factor: f32,
}
var<immediate> reduce: ReduceParams;

@group(0) @binding(0) var<storage, read> reduce_x: array<E>;
@group(0) @binding(1) var<storage, read_write> reduce_y: array<E>;
@group(0) @binding(1) var<storage, read_write> reduce_indices: array<u32>;
@group(0) @binding(2) var<storage, read_write> reduce_partials: array<f32>;
@group(0) @binding(2) var<storage, read_write> reduce_words: array<u32>;

const MAXIMUM: u32 = 2u;
const SQUARES: u32 = 3u;

// First element of an item's segment, and how many the segment has.
fn segment_of(item: u32) -> vec2<u32> {
    let row = item / reduce.inner;
    let s = row % reduce.segments;
    let start = ((row / reduce.segments) * reduce.n + s * reduce.fan) * reduce.inner + item % reduce.inner;
    return vec2<u32>(start + reduce.from_shift, min(reduce.fan, reduce.n - s * reduce.fan));
}

fn larger(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> { return select(a, b, b > a); }

fn merge(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    if reduce.kind == MAXIMUM { return larger(a, b); }
    return a + b;
}

fn across(a: vec4<f32>) -> f32 {
    let pairs = merge(a, vec4<f32>(a.y, a.x, a.w, a.z));
    return merge(pairs, pairs.zwxy).x;
}

fn term(x: f32) -> f32 {
    if reduce.kind == SQUARES { return x * x; }
    return x;
}

// A lane that has no element must not change the result.
fn neutral(x: f32) -> f32 { return select(0.0, x, reduce.kind == MAXIMUM); }

fn of_elements(at: vec2<u32>) -> f32 {
    let step = reduce.inner;
    var i = at.x;
    var lanes = vec4<f32>(neutral(ld(reduce_x[i])));
    for (var k = 0u; k < at.y / 4u; k++) {
        let v = vec4<f32>(term(ld(reduce_x[i])), term(ld(reduce_x[i + step])), term(ld(reduce_x[i + 2u * step])),
            term(ld(reduce_x[i + 3u * step])));
        lanes = merge(lanes, v);
        i += 4u * step;
    }
    for (var k = 0u; k < at.y % 4u; k++) {
        let v = term(ld(reduce_x[i]));
        lanes.x = merge(vec4<f32>(lanes.x), vec4<f32>(v)).x;
        i += step;
    }
    return across(lanes);
}

fn of_partials(at: vec2<u32>) -> f32 {
    let step = reduce.inner;
    var i = at.x;
    var lanes = vec4<f32>(neutral(reduce_partials[i]));
    for (var k = 0u; k < at.y / 4u; k++) {
        let v = vec4<f32>(reduce_partials[i], reduce_partials[i + step], reduce_partials[i + 2u * step],
            reduce_partials[i + 3u * step]);
        lanes = merge(lanes, v);
        i += 4u * step;
    }
    for (var k = 0u; k < at.y % 4u; k++) {
        lanes.x = merge(vec4<f32>(lanes.x), vec4<f32>(reduce_partials[i])).x;
        i += step;
    }
    return across(lanes);
}

@compute @workgroup_size(64)
fn reduce_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= reduce.items { return; }
    reduce_y[id + reduce.to_shift] = st(of_elements(segment_of(reduce.first + id)) * reduce.factor);
}

@compute @workgroup_size(64)
fn reduce_first(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= reduce.items { return; }
    reduce_partials[id + reduce.to_shift] = of_elements(segment_of(reduce.first + id));
}

@compute @workgroup_size(64)
fn reduce_next(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= reduce.items { return; }
    reduce_partials[id + reduce.to_shift] = of_partials(segment_of(reduce.first + id));
}

@compute @workgroup_size(64)
fn reduce_last(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= reduce.items { return; }
    reduce_y[id + reduce.to_shift] = st(of_partials(segment_of(reduce.first + id)) * reduce.factor);
}

// Unsigned keys in the order of the floats; both zeros alike, NaN below everything.
fn order_key(x: f32) -> u32 {
    let b = bitcast<u32>(x);
    let magnitude = b & 0x7fffffffu;
    if magnitude > 0x7f800000u { return 0u; }
    if magnitude == 0u { return 0x80000000u; }
    return select(b | 0x80000000u, ~b, b > 0x80000000u);
}

// Index within the row of a segment's first maximum.
fn argmax_of_elements(item: u32) -> u32 {
    let at = segment_of(item);
    var best = 0u;
    var key = 0u;
    for (var k = 0u; k < at.y; k++) {
        let candidate = order_key(ld(reduce_x[at.x + k]));
        if candidate > key { key = candidate; best = k; }
    }
    return (item % reduce.segments) * reduce.fan + best;
}

@compute @workgroup_size(64)
fn argmax_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= reduce.items { return; }
    reduce_indices[id + reduce.to_shift] = argmax_of_elements(reduce.first + id);
}

@compute @workgroup_size(64)
fn argmax_first(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= reduce.items { return; }
    reduce_words[reduce.first + id] = argmax_of_elements(reduce.first + id);
}

// One row: the candidates of its segments, in order.
@compute @workgroup_size(64)
fn argmax_last(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= reduce.items { return; }
    let row = reduce.first + id;
    let x = row * reduce.n + reduce.from_shift;
    var best = 0u;
    var key = 0u;
    for (var s = 0u; s < reduce.segments; s++) {
        let index = reduce_words[row * reduce.segments + s];
        let candidate = order_key(ld(reduce_x[x + index]));
        if candidate > key { key = candidate; best = index; }
    }
    reduce_indices[row + reduce.to_shift] = best;
}

// Partials are (count, first index) pairs; first is all ones where the count is 0.
@compute @workgroup_size(64)
fn count_first(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= reduce.items { return; }
    let item = reduce.first + id;
    let at = segment_of(item);
    var count = 0u;
    var index = 0xffffffffu;
    for (var k = 0u; k < at.y; k++) {
        if !is_finite(ld(reduce_x[at.x + k])) {
            count++;
            index = min(index, item * reduce.fan + k);
        }
    }
    reduce_words[2u * item] = count;
    reduce_words[2u * item + 1u] = index;
}

fn count_of_pairs(item: u32) -> vec2<u32> {
    let at = segment_of(item);
    var found = vec2<u32>(0u, 0xffffffffu);
    for (var k = 0u; k < at.y; k++) {
        found.x += reduce_words[2u * (at.x + k)];
        found.y = min(found.y, reduce_words[2u * (at.x + k) + 1u]);
    }
    return found;
}

@compute @workgroup_size(64)
fn count_next(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= reduce.items { return; }
    let found = count_of_pairs(reduce.first + id);
    reduce_words[2u * (id + reduce.to_shift)] = found.x;
    reduce_words[2u * (id + reduce.to_shift) + 1u] = found.y;
}

@compute @workgroup_size(64)
fn count_last(@builtin(global_invocation_id) gid: vec3<u32>) {
    if linear_id(gid, 64u) > 0u { return; }
    let found = count_of_pairs(0u);
    reduce_indices[0] = found.x;
    reduce_indices[1] = found.y;
}

@group(0) @binding(0) var<storage, read> reduce_bwd_index: array<u32>;
@group(0) @binding(1) var<storage, read> reduce_bwd_dy: array<E>;
@group(0) @binding(2) var<storage, read_write> reduce_bwd_dx: array<E>;

// Index into dy of dx's element, and the place along the reduced axis.
fn backward_of(element: u32) -> vec2<u32> {
    let row = element / reduce.inner;
    return vec2<u32>((row / reduce.n) * reduce.inner + element % reduce.inner, row % reduce.n);
}

@compute @workgroup_size(64)
fn reduce_bwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= reduce.items { return; }
    let at = backward_of(reduce.first + id);
    reduce_bwd_dx[id] = st(ld(reduce_bwd_dy[at.x]) * reduce.factor);
}

@compute @workgroup_size(64)
fn reduce_bwd_squares(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= reduce.items { return; }
    let at = backward_of(reduce.first + id);
    reduce_bwd_dx[id] = st(2.0 * ld(reduce_x[id]) * ld(reduce_bwd_dy[at.x]));
}

@compute @workgroup_size(64)
fn reduce_bwd_max(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= reduce.items { return; }
    let at = backward_of(reduce.first + id);
    reduce_bwd_dx[id] = st(select(0.0, ld(reduce_bwd_dy[at.x]), reduce_bwd_index[at.x] == at.y));
}
