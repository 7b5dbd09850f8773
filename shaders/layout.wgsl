// op:       permute, slice, pad, concat, gather_rows, scatter_add_rows, fill
// math:     y = x under another order of axes; a range of an axis; zeros around it; inputs end to end along an axis;
//           y[i] = table[ids[i]]; y[r] = sum over i with ids[i] = r of x[i]; y = value
// grad:     permute by the inverse; pad; slice; slices; scatter_add_rows; gather_rows
// shapes:   permute, slice, pad, concat (one input at a time): x[..], y[..]; gather_rows: table[N, D], ids[M], y[M, D];
//           scatter_add_rows: x[M, D], ids[M], y[N, D], links[N + M] (scratch)
// layout:   contiguous; axes beside the one worked on are merged by the plan
// launch:   linear, 64 invocations a group, one element each (scatter_add_rows: four columns of a row)
// cost:     elements read and written once; scatter_add_rows M^2 / 2 ids read, by M invocations
// numerics: copies are exact for every bit pattern; sums in f32, in index order; ids outside 0..N give zeros or nothing
// source:   -
// rungs:    v1 element per invocation; sums over lists linked in index order, no atomics

struct LayoutParams {
    count: u32, base: u32, width: u32, stride: u32, offset: u32, rows: u32, flag: u32, bits: u32,
}
var<immediate> moved: LayoutParams;

@group(0) @binding(0) var<storage, read> layout_x: array<E>;
@group(0) @binding(1) var<storage, read_write> layout_y: array<E>;

// x[.., offset .. offset + width, ..] of rows of `stride`.
@compute @workgroup_size(64)
fn slice_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= moved.count { return; }
    layout_y[i] = layout_x[(i / moved.width) * moved.stride + moved.offset + i % moved.width];
}

@compute @workgroup_size(64)
fn pad_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= moved.count { return; }
    // Before the range this wraps to a large number.
    let column = i % moved.stride - moved.offset;
    var y = st(0.0);
    if column < moved.width { y = layout_x[(i / moved.stride) * moved.width + column]; }
    layout_y[i] = y;
}

// One input of a concatenation: the converse of a slice.
@compute @workgroup_size(64)
fn concat_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= moved.count { return; }
    layout_y[(i / moved.width) * moved.stride + moved.offset + i % moved.width] = layout_x[i];
}

@group(0) @binding(0) var<storage, read_write> fill_y: array<E>;

@compute @workgroup_size(64)
fn fill_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= moved.count { return; }
    fill_y[i] = st(bitcast<f32>(moved.bits));
}

// Output extents and input strides, innermost first.
struct PermuteParams {
    count: u32, base: u32, d0: u32, d1: u32, d2: u32, d3: u32, d4: u32, s0: u32, s1: u32, s2: u32, s3: u32, s4: u32, s5: u32,
}
var<immediate> permute: PermuteParams;

@compute @workgroup_size(64)
fn permute_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= permute.count { return; }
    var rest = permute.base + i;
    var source = (rest % permute.d0) * permute.s0;
    rest /= permute.d0;
    source += (rest % permute.d1) * permute.s1;
    rest /= permute.d1;
    source += (rest % permute.d2) * permute.s2;
    rest /= permute.d2;
    source += (rest % permute.d3) * permute.s3;
    rest /= permute.d3;
    source += (rest % permute.d4) * permute.s4 + (rest / permute.d4) * permute.s5;
    layout_y[i] = layout_x[source];
}

@group(0) @binding(1) var<storage, read> rows_ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> rows_y: array<E>;

// The table's rows base .. base + stride are bound; the first window writes the zeros of ids that name no row.
@compute @workgroup_size(64)
fn gather_rows(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= moved.count { return; }
    let id = rows_ids[i / moved.width];
    let local = id - moved.base;
    if id >= moved.rows {
        if moved.flag == 1u { rows_y[i] = st(0.0); }
    } else if local < moved.stride {
        rows_y[i] = layout_x[local * moved.width + i % moved.width];
    }
}

const NO_ROW: u32 = 0xffffffffu;
// Words 0 .. rows: first source of each row; after them: the next source of the same row, per source of this block.
@group(0) @binding(3) var<storage, read_write> scatter_links: array<u32>;

@compute @workgroup_size(64)
fn scatter_clear(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i < moved.count { scatter_links[i] = NO_ROW; }
}

// One source: sources base .. base + count are linked. Who has no predecessor heads its row's list: one writer each.
@compute @workgroup_size(64)
fn scatter_link(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= moved.count { return; }
    let id = rows_ids[moved.base + i];
    var next = NO_ROW;
    for (var j = i + 1u; j < moved.count; j++) {
        if rows_ids[moved.base + j] == id { next = j; break; }
    }
    scatter_links[moved.rows + i] = next;
    if id >= moved.rows { return; }
    for (var j = i; j > 0u; j--) {
        if rows_ids[moved.base + j - 1u] == id { return; }
    }
    scatter_links[id] = i;
}

// Four columns of one row of the bound part of y, which starts at row `offset`.
@compute @workgroup_size(64)
fn scatter_sum(@builtin(global_invocation_id) gid: vec3<u32>) {
    let item = linear_id(gid, 64u);
    let blocks = (moved.width + 3u) / 4u;
    let row = item / blocks;
    if row >= moved.count { return; }
    let c = (item % blocks) * 4u;
    let columns = min(4u, moved.width - c);
    let y = row * moved.width + c;
    var sum = vec4<f32>();
    // Later blocks of sources go on from what earlier ones left.
    if moved.flag == 0u {
        sum.x = ld(rows_y[y]);
        if columns > 1u { sum.y = ld(rows_y[y + 1u]); }
        if columns > 2u { sum.z = ld(rows_y[y + 2u]); }
        if columns > 3u { sum.w = ld(rows_y[y + 3u]); }
    }
    var i = scatter_links[moved.offset + row];
    for (var k = 0u; k < moved.stride; k++) {
        if i == NO_ROW { break; }
        let x = (moved.base + i) * moved.width + c;
        var v = vec4<f32>(ld(layout_x[x]), 0.0, 0.0, 0.0);
        if columns > 1u { v.y = ld(layout_x[x + 1u]); }
        if columns > 2u { v.z = ld(layout_x[x + 2u]); }
        if columns > 3u { v.w = ld(layout_x[x + 3u]); }
        sum += v;
        i = scatter_links[moved.rows + i];
    }
    rows_y[y] = st(sum.x);
    if columns > 1u { rows_y[y + 1u] = st(sum.y); }
    if columns > 2u { rows_y[y + 2u] = st(sum.z); }
    if columns > 3u { rows_y[y + 3u] = st(sum.w); }
}
