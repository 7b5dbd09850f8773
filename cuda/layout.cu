// op:       permute, slice, pad, concat, gather_rows, scatter_add_rows, fill
// math:     y = x under another order of axes; a range of an axis; zeros around it; inputs end to end along an axis;
//           y[i] = table[ids[i]]; y[r] = sum over i with ids[i] = r of x[i]; y = value
// grad:     permute by the inverse; pad; slice; slices; scatter_add_rows; gather_rows
// shapes:   permute, slice, pad, concat (one input at a time): x[..], y[..]; gather_rows: table[N, D], ids[M], y[M, D];
//           scatter_add_rows: x[M, D], ids[M], y[N, D], links[N + M] (scratch)
// layout:   contiguous; axes beside the one worked on are merged by the plan
// launch:   linear, 64 threads a block, one element each (scatter_add_rows: four columns of a row)
// cost:     elements read and written once; scatter_add_rows M^2 / 2 ids read, by M threads
// numerics: copies are exact for every bit pattern; sums in f32, in index order; ids outside 0..N give zeros or nothing
// source:   -
// rungs:    v1 element per thread; sums over lists linked in index order, no atomics

struct LayoutParams { u32 count, base, width, stride, offset, rows, flag, bits; };

// x[.., offset .. offset + width, ..] of rows of `stride`.
extern "C" __global__ void __launch_bounds__(64) slice_fwd(const E* x, E* y, LayoutParams p) {
    u32 i = linear_id();
    if (i >= p.count) return;
    y[i] = x[(u64)(i / p.width) * p.stride + p.offset + i % p.width];
}

extern "C" __global__ void __launch_bounds__(64) pad_fwd(const E* x, E* y, LayoutParams p) {
    u32 i = linear_id();
    if (i >= p.count) return;
    // Before the range this wraps to a large number.
    u32 column = i % p.stride - p.offset;
    y[i] = column < p.width ? x[(u64)(i / p.stride) * p.width + column] : st(0.0f);
}

// One input of a concatenation: the converse of a slice.
extern "C" __global__ void __launch_bounds__(64) concat_fwd(const E* x, E* y, LayoutParams p) {
    u32 i = linear_id();
    if (i >= p.count) return;
    y[(u64)(i / p.width) * p.stride + p.offset + i % p.width] = x[i];
}

extern "C" __global__ void __launch_bounds__(64) fill_fwd(E* y, LayoutParams p) {
    u32 i = linear_id();
    if (i >= p.count) return;
    y[i] = st(__uint_as_float(p.bits));
}

// Output extents and input strides, innermost first.
struct PermuteParams { u32 count, base, d[5], s[6]; };

extern "C" __global__ void __launch_bounds__(64) permute_fwd(const E* x, E* y, PermuteParams p) {
    u32 i = linear_id();
    if (i >= p.count) return;
    u32 rest = p.base + i;
    u64 source = 0;
#pragma unroll
    for (u32 axis = 0; axis < 5u; axis++) {
        source += (u64)(rest % p.d[axis]) * p.s[axis];
        rest /= p.d[axis];
    }
    y[i] = x[source + (u64)rest * p.s[5]];
}

// The table's rows base .. base + stride are bound; the launch with the flag writes the zeros of ids that name no row.
extern "C" __global__ void __launch_bounds__(64) gather_rows(const E* table, const u32* ids, E* y, LayoutParams p) {
    u32 i = linear_id();
    if (i >= p.count) return;
    u32 id = ids[i / p.width], local = id - p.base;
    if (id >= p.rows) {
        if (p.flag == 1u) y[i] = st(0.0f);
    } else if (local < p.stride) {
        y[i] = table[(u64)local * p.width + i % p.width];
    }
}

#define NO_ROW 0xffffffffu

// Words 0 .. rows of links: first source of each row; after them: the next source of the same row, per source of this block.
extern "C" __global__ void __launch_bounds__(64) scatter_clear(const E*, const u32*, E*, u32* links, LayoutParams p) {
    u32 i = linear_id();
    if (i < p.count) links[i] = NO_ROW;
}

// One source: sources base .. base + count are linked. Who has no predecessor heads its row's list: one writer each.
extern "C" __global__ void __launch_bounds__(64) scatter_link(const E*, const u32* ids, E*, u32* links, LayoutParams p) {
    u32 i = linear_id();
    if (i >= p.count) return;
    ids += p.base;
    u32 id = ids[i], next = NO_ROW;
    for (u32 j = i + 1u; j < p.count; j++) {
        if (ids[j] == id) {
            next = j;
            break;
        }
    }
    links[(u64)p.rows + i] = next;
    if (id >= p.rows) return;
    for (u32 j = i; j > 0u; j--) {
        if (ids[j - 1u] == id) return;
    }
    links[id] = i;
}

// Four columns of one row of the bound part of y, which starts at row `offset`.
extern "C" __global__ void __launch_bounds__(64) scatter_sum(const E* x, const u32*, E* y, const u32* links, LayoutParams p) {
    u32 item = linear_id(), blocks = div_up(p.width, 4u), row = item / blocks;
    if (row >= p.count) return;
    u32 c = item % blocks * 4u, columns = min(4u, p.width - c);
    y += (u64)row * p.width + c;
    float sum[4] = {};
    // Later blocks of sources go on from what earlier ones left.
    if (p.flag == 0u) {
#pragma unroll
        for (u32 j = 0; j < 4u; j++) {
            if (j < columns) sum[j] = ld(y[j]);
        }
    }
    u32 i = links[p.offset + row];
    for (u32 k = 0; k < p.stride && i != NO_ROW; k++) {
        const E* from = x + (u64)(p.base + i) * p.width + c;
#pragma unroll
        for (u32 j = 0; j < 4u; j++) {
            if (j < columns) sum[j] += ld(from[j]);
        }
        i = links[(u64)p.rows + i];
    }
#pragma unroll
    for (u32 j = 0; j < 4u; j++) {
        if (j < columns) y[j] = st(sum[j]);
    }
}
