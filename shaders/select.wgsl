// op:       keep_largest, above
// math:     keep_largest: mask = 1 for the `keep` largest x of each row (|x| where asked), else 0; above: mask = 1 where x > threshold
// grad:     none
// shapes:   ranked, above: x[G, N], mask[G, N]; count: x, counts[G C, 256], state[G, 2]; digit: counts, state; write: x, mask, counts, state
// layout:   x as words; a row is C chunks of 4096; counts of 256 digits per chunk; state: the key's digits so far, how many are still to be kept
// launch:   ranked, above: linear, 64 invocations a group, one element each; count, write: a group of 64 per chunk; digit: a group of 256 per row
// cost:     ranked: N comparisons an element; else five readings of x and one writing of the mask
// numerics: exact; lower index wins ties, -0 equals 0, NaN is smaller than everything; whole numbers alone are added, in any order
// source:   radix select: Alabi et al. 2012
// rungs:    v1 ranked (rows of at most 64), radix select with digits of 8 bits

struct SelectParams { rows: u32, n: u32, keep: u32, magnitude: u32, chunks: u32, shift: u32 }
struct AboveParams { count: u32, threshold: u32 }
var<immediate> choice: SelectParams;
var<immediate> above_params: AboveParams;

const CHUNK: u32 = 4096u;

@group(0) @binding(0) var<storage, read> select_x: array<u32>;
@group(0) @binding(1) var<storage, read_write> select_mask: array<f32>;
@group(0) @binding(1) var<storage, read_write> count_counts: array<u32>;
@group(0) @binding(2) var<storage, read> count_state: array<u32>;
@group(0) @binding(0) var<storage, read> digit_counts: array<u32>;
@group(0) @binding(1) var<storage, read_write> digit_state: array<u32>;
@group(0) @binding(2) var<storage, read> write_counts: array<u32>;
@group(0) @binding(3) var<storage, read> write_state: array<u32>;

// A word's place among all f32: larger numbers have larger keys.
fn key_of(word: u32, magnitude: bool) -> u32 {
    let size = word & 0x7fffffffu;
    if size > 0x7f800000u { return 0u; }
    if magnitude { return size + 1u; }
    if size == 0u { return 0x80000000u; }
    return select(word | 0x80000000u, ~word, (word >> 31u) == 1u);
}

fn key_at(at: u32) -> u32 { return key_of(select_x[at], choice.magnitude == 1u); }

@compute @workgroup_size(64)
fn above(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= above_params.count { return; }
    let over = key_of(select_x[i], false) > key_of(above_params.threshold, false);
    select_mask[i] = select(0.0, 1.0, over);
}

@compute @workgroup_size(64)
fn keep_largest_ranked(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= choice.rows * choice.n { return; }
    let start = i - i % choice.n;
    let own = key_at(i);
    // How many come before: the larger ones, and the equal ones of lower index.
    var rank = 0u;
    for (var j = start; j < start + choice.n; j++) {
        let other = key_at(j);
        if other > own || (other == own && j < i) { rank++; }
    }
    select_mask[i] = select(0.0, 1.0, rank < choice.keep);
}

var<workgroup> select_bins: array<atomic<u32>, 256>;

// Elements of a chunk whose higher digits are those of the smallest kept key, by their next digit.
@compute @workgroup_size(64)
fn keep_largest_count(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let block = group.x + group.y * 65535u;
    if block >= choice.rows * choice.chunks { return; }
    let row = block / choice.chunks;
    let first = block % choice.chunks * CHUNK;
    for (var d = lane; d < 256u; d += 64u) { atomicStore(&select_bins[d], 0u); }
    workgroupBarrier();
    // The first digit has none before it, and a shift by 32 is none.
    var prefix = 0u;
    if choice.shift < 24u { prefix = count_state[row * 2u] >> (choice.shift + 8u); }
    for (var i = first + lane; i < min(first + CHUNK, choice.n); i += 64u) {
        let key = key_at(row * choice.n + i);
        var own = 0u;
        if choice.shift < 24u { own = key >> (choice.shift + 8u); }
        if own == prefix { atomicAdd(&select_bins[(key >> choice.shift) & 255u], 1u); }
    }
    workgroupBarrier();
    for (var d = lane; d < 256u; d += 64u) { count_counts[block * 256u + d] = atomicLoad(&select_bins[d]); }
}

var<workgroup> select_totals: array<u32, 256>;

// The next digit of the smallest kept key: the largest one at or above which enough elements lie.
@compute @workgroup_size(256)
fn keep_largest_digit(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x + group.y * 65535u;
    if row >= choice.rows { return; }
    var total = 0u;
    for (var c = 0u; c < choice.chunks; c++) { total += digit_counts[(row * choice.chunks + c) * 256u + lane]; }
    select_totals[lane] = total;
    workgroupBarrier();
    if lane == 0u {
        var prefix = 0u;
        var left = choice.keep;
        if choice.shift < 24u {
            prefix = digit_state[row * 2u];
            left = digit_state[row * 2u + 1u];
        }
        var digit = 255u;
        for (; digit > 0u && select_totals[digit] < left; digit--) { left -= select_totals[digit]; }
        digit_state[row * 2u] = prefix | (digit << choice.shift);
        digit_state[row * 2u + 1u] = left;
    }
}

var<workgroup> select_before: atomic<u32>;
var<workgroup> select_equals: array<u32, 64>;

// The mask: larger keys, and of the equal ones the first. The last counts say how many equal ones earlier chunks have.
@compute @workgroup_size(64)
fn keep_largest_write(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let block = group.x + group.y * 65535u;
    if block >= choice.rows * choice.chunks { return; }
    let row = block / choice.chunks;
    let chunk = block % choice.chunks;
    let least = write_state[row * 2u];
    let left = write_state[row * 2u + 1u];
    if lane == 0u { atomicStore(&select_before, 0u); }
    workgroupBarrier();
    var earlier = 0u;
    for (var c = lane; c < chunk; c += 64u) { earlier += write_counts[(row * choice.chunks + c) * 256u + (least & 255u)]; }
    atomicAdd(&select_before, earlier);
    // Neighbours belong to one invocation, so that equal ones are met in their order.
    let first = min(chunk * CHUNK + lane * 64u, choice.n);
    let end = min(first + 64u, choice.n);
    var equals = 0u;
    for (var i = first; i < end; i++) {
        if key_at(row * choice.n + i) == least { equals++; }
    }
    select_equals[lane] = equals;
    workgroupBarrier();
    var before = atomicLoad(&select_before);
    for (var l = 0u; l < lane; l++) { before += select_equals[l]; }
    for (var i = first; i < end; i++) {
        let key = key_at(row * choice.n + i);
        select_mask[row * choice.n + i] = select(0.0, 1.0, key > least || (key == least && before < left));
        if key == least { before++; }
    }
}
