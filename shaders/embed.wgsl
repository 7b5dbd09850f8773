// op:       embed, embed_bwd
// math:     y[i] = table[ids[i]]; dtable[r] = sum of dy[i] over the i with ids[i] = r
// grad:     embed_bwd
// shapes:   fwd: table[V,D], ids[N], y[N,D]; slots of bwd_zero: dtable[rows,D]; bwd_links: ids[N], links[N];
//           bwd_sum: dy[N,D], ids[N], links[N], dtable[rows,D]
// layout:   contiguous; a launch binds rows first..last of the table and passes over every other id
// launch:   linear, 64 invocations a group, 4 elements each; bwd_links one token each
// cost:     2 N D elements moved forward; N D read and rows D written backward, and up to N^2 ids compared
// numerics: ids beyond the table give zeros and count nowhere; sums in f32 in token order, no atomics
// source:   -
// rungs:    v1 chains of equal ids: the first token of each id sums its chain

struct EmbedParams {
    tokens: u32, dim: u32, rows: u32,
    first: u32, last: u32,  // rows of the table that are bound
    begin: u32, end: u32,   // tokens of this launch
}
var<immediate> embed: EmbedParams;

@group(0) @binding(0) var<storage, read> embed_table: array<E>;
@group(0) @binding(1) var<storage, read> embed_ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> embed_y: array<E>;

@compute @workgroup_size(64)
fn embed_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let chunks = (embed.dim + 3u) / 4u;
    let item = linear_id(gid, 64u);
    if item >= embed.tokens * chunks { return; }
    let token = item / chunks;
    let d0 = (item % chunks) * 4u;
    let id = embed_ids[token];
    let y = token * embed.dim;
    if id >= embed.first && id < embed.last {
        let row = (id - embed.first) * embed.dim;
        for (var d = d0; d < min(d0 + 4u, embed.dim); d++) { embed_y[y + d] = embed_table[row + d]; }
    } else if id >= embed.rows && embed.first == 0u {
        for (var d = d0; d < min(d0 + 4u, embed.dim); d++) { embed_y[y + d] = st(0.0); }
    }
}

@group(0) @binding(0) var<storage, read_write> embed_zeroed: array<E>;

@compute @workgroup_size(64)
fn embed_bwd_zero(@builtin(global_invocation_id) gid: vec3<u32>) {
    let start = linear_id(gid, 64u) * 4u;
    let count = (embed.last - embed.first) * embed.dim;
    for (var i = start; i < min(start + 4u, count); i++) { embed_zeroed[i] = st(0.0); }
}

@group(0) @binding(0) var<storage, read> embed_ids_in: array<u32>;
@group(0) @binding(1) var<storage, read_write> embed_links_out: array<u32>;

// Marks a token whose id stood earlier in the range.
const LATER: u32 = 0x80000000u;

// links[i]: the next token with the same id (`end` for none), marked where an earlier one has it too.
@compute @workgroup_size(64)
fn embed_bwd_links(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = embed.begin + linear_id(gid, 64u);
    if i >= embed.end { return; }
    let id = embed_ids_in[i];
    var next = i + 1u;
    while next < embed.end && embed_ids_in[next] != id { next++; }
    var mark = 0u;
    for (var j = embed.begin; j < i; j++) {
        if embed_ids_in[j] == id { mark = LATER; break; }
    }
    embed_links_out[i] = next | mark;
}

@group(0) @binding(0) var<storage, read> embed_dy: array<E>;
@group(0) @binding(2) var<storage, read> embed_links: array<u32>;
@group(0) @binding(3) var<storage, read_write> embed_sums: array<E>;

@compute @workgroup_size(64)
fn embed_bwd_sum(@builtin(global_invocation_id) gid: vec3<u32>) {
    let chunks = (embed.dim + 3u) / 4u;
    let item = linear_id(gid, 64u);
    if item >= (embed.end - embed.begin) * chunks { return; }
    var token = embed.begin + item / chunks;
    let id = embed_ids[token];
    if id < embed.first || id >= embed.last || (embed_links[token] & LATER) != 0u { return; }
    // The last chunk may reach past the row: it reads the last element again and does not store it.
    let d = min((item % chunks) * 4u + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(embed.dim - 1u));
    var sum = vec4<f32>(0.0);
    while token < embed.end {
        let dy = token * embed.dim + d;
        sum += vec4<f32>(ld(embed_dy[dy.x]), ld(embed_dy[dy.y]), ld(embed_dy[dy.z]), ld(embed_dy[dy.w]));
        token = embed_links[token] & ~LATER;
    }
    // Earlier ranges of tokens left their sums here.
    let at = (id - embed.first) * embed.dim + d;
    embed_sums[at.x] = st(ld(embed_sums[at.x]) + sum.x);
    if at.y > at.x { embed_sums[at.y] = st(ld(embed_sums[at.y]) + sum.y); }
    if at.z > at.y { embed_sums[at.z] = st(ld(embed_sums[at.z]) + sum.z); }
    if at.w > at.z { embed_sums[at.w] = st(ld(embed_sums[at.w]) + sum.w); }
}
