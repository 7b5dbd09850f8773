// op:       embed, embed_bwd
// math:     y[i] = table[ids[i]]; dtable[r] = sum of dy[i] over the i with ids[i] = r
// grad:     embed_bwd
// shapes:   fwd: table[V,D], ids[N], y[N,D]; slots of bwd_zero: dtable[rows,D]; bwd_links: ids[N], links[N];
//           bwd_sum: dy[N,D], ids[N], links[N], dtable[rows,D]
// layout:   contiguous; a launch gets rows first..last of the table (here as a rule all) and passes over every other id
// launch:   linear, 64 threads a block, 4 elements each; bwd_links one token each
// cost:     2 N D elements moved forward; N D read and rows D written backward, and up to N^2 ids compared
// numerics: ids beyond the table give zeros and count nowhere; sums in f32 in token order, no atomics
// source:   -
// rungs:    v1 chains of equal ids: the first token of each id sums its chain

struct EmbedParams {
    u32 tokens, dim, rows;
    // Rows of the table that are bound, tokens of this launch.
    u32 first, last;
    u32 begin, end;
};

extern "C" __global__ void __launch_bounds__(64) embed_fwd(const E* table, const u32* ids, E* y, EmbedParams p) {
    u32 chunks = div_up(p.dim, 4u), item = linear_id();
    if (item >= p.tokens * chunks) return;
    u32 token = item / chunks, d0 = item % chunks * 4u;
    u32 id = ids[token];
    y += (u64)token * p.dim;
    if (id >= p.first && id < p.last) {
        table += (u64)(id - p.first) * p.dim;
        for (u32 d = d0; d < min(d0 + 4u, p.dim); d++) y[d] = table[d];
    } else if (id >= p.rows && p.first == 0u) {
        for (u32 d = d0; d < min(d0 + 4u, p.dim); d++) y[d] = st(0.0f);
    }
}

extern "C" __global__ void __launch_bounds__(64) embed_bwd_zero(E* zeroed, EmbedParams p) {
    u64 start = (u64)linear_id() * 4u, count = (u64)(p.last - p.first) * p.dim;
    for (u32 j = 0; j < 4u; j++)
        if (start + j < count) zeroed[start + j] = st(0.0f);
}

// Marks a token whose id stood earlier in the range.
#define LATER 0x80000000u

// links[i]: the next token with the same id (`end` for none), marked where an earlier one has it too.
extern "C" __global__ void __launch_bounds__(64) embed_bwd_links(const u32* ids, u32* links, EmbedParams p) {
    u32 i = p.begin + linear_id();
    if (i >= p.end) return;
    u32 id = ids[i], next = i + 1u, mark = 0u;
    while (next < p.end && ids[next] != id) next++;
    for (u32 j = p.begin; j < i; j++) {
        if (ids[j] == id) {
            mark = LATER;
            break;
        }
    }
    links[i] = next | mark;
}

extern "C" __global__ void __launch_bounds__(64) embed_bwd_sum(const E* dy, const u32* ids, const u32* links, E* sums, EmbedParams p) {
    u32 chunks = div_up(p.dim, 4u), item = linear_id();
    if (item >= (p.end - p.begin) * chunks) return;
    u32 token = p.begin + item / chunks, d0 = item % chunks * 4u;
    u32 id = ids[token];
    if (id < p.first || id >= p.last || (links[token] & LATER) != 0u) return;
    float sum[4] = {};
    while (token < p.end) {
        const E* row = dy + (u64)token * p.dim + d0;
#pragma unroll
        for (u32 j = 0; j < 4u; j++)
            if (d0 + j < p.dim) sum[j] += ld(row[j]);
        token = links[token] & ~LATER;
    }
    // Earlier ranges of tokens left their sums here.
    sums += (u64)(id - p.first) * p.dim + d0;
#pragma unroll
    for (u32 j = 0; j < 4u; j++)
        if (d0 + j < p.dim) sums[j] = st(ld(sums[j]) + sum[j]);
}
