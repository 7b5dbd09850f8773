// Products on matrix units: 4 COOP x 4 COOP outputs per workgroup of four subgroups, each with 2 x 2 fragments of them, 2 COOP of k at a time
// in workgroup memory. Goes on from matmul.wgsl; COOP and what is done with fragments come with the files that are its records'.

// Of the subgroup; the emulation asks for it.
var<private> coop_lane: u32;
// Four subgroups of the largest size that the adapter has. Where they turn out smaller there are more, which repeat the first four: whether
// a workgroup meets at a barrier must not depend on who asks.
override COOP_THREADS: u32 = 128u;
const COOP_SIDE: u32 = 4u * COOP;
const COOP_K: u32 = 2u * COOP;
// Rows are padded against bank conflicts, by eight: fragments must start at multiples of 16 bytes.
const COOP_STEP_A: u32 = COOP_K + 8u;
const COOP_STEP_B: u32 = COOP_SIDE + 8u;
const COOP_FRAGMENT: u32 = COOP * COOP;
var<workgroup> coop_tile_a: array<E, COOP_SIDE * COOP_STEP_A>;
var<workgroup> coop_tile_b: array<E, COOP_K * COOP_STEP_B>;
// A fragment of each subgroup, and one for those that repeat, which may overwrite each other's there: nobody reads it.
var<workgroup> coop_tile_c: array<f32, 5u * COOP_FRAGMENT>;

// Rows of a from first_row and columns of b from first_column for COOP_K of k from k0, zeros past their ends.
fn matmul_coop_load(id: u32, base_a: u32, base_b: u32, first_row: u32, first_column: u32, k0: u32) {
    // Neighbouring invocations read neighbours in memory.
    let along_a = matmul.a_column == 1u;
    let along_b = matmul.b_row == 1u;
    for (var i = id; i < COOP_SIDE * COOP_K; i += COOP_THREADS) {
        let ra = select(i % COOP_SIDE, i / COOP_K, along_a);
        let ka = select(i / COOP_SIDE, i % COOP_K, along_a);
        var x = st(0.0);
        if k0 + ka < matmul.k1 && first_row + ra < matmul.rows {
            x = matmul_a[base_a + (first_row + ra) * matmul.a_row + (k0 + ka) * matmul.a_column];
        }
        coop_tile_a[ra * COOP_STEP_A + ka] = x;
        let cb = select(i % COOP_SIDE, i / COOP_K, along_b);
        let kb = select(i / COOP_SIDE, i % COOP_K, along_b);
        x = st(0.0);
        if k0 + kb < matmul.k1 && first_column + cb < matmul.columns {
            x = matmul_b[base_b + (k0 + kb) * matmul.b_row + (first_column + cb) * matmul.b_column];
        }
        coop_tile_b[kb * COOP_STEP_B + cb] = x;
    }
}

// Writes the sums of one fragment of each subgroup, `down` and `across` within what is the subgroup's.
fn matmul_coop_put(id: u32, subgroup: u32, c: CoopC, batch: u32, first_row: u32, first_column: u32, down: u32, across: u32) {
    // The fragments of the call before have been written out by all.
    workgroupBarrier();
    coop_put(c, min(subgroup, 4u) * COOP_FRAGMENT, COOP);
    workgroupBarrier();
    for (var i = id; i < 4u * COOP_FRAGMENT; i += COOP_THREADS) {
        let owner = i / COOP_FRAGMENT;
        let row = first_row + (owner / 2u * 2u + down) * COOP + i % COOP_FRAGMENT / COOP;
        let column = first_column + (owner % 2u * 2u + across) * COOP + i % COOP;
        matmul_put(batch, row, column, coop_tile_c[i]);
    }
}

@compute @workgroup_size(COOP_THREADS)
fn matmul_fwd_coop(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) id: u32, @builtin(subgroup_id) subgroup: u32, @builtin(subgroup_invocation_id) lane: u32) {
    coop_lane = lane;
    let first_row = matmul.first_row + group.y * COOP_SIDE;
    let first_column = matmul.first_column + group.x * COOP_SIDE;
    let batch = matmul.first_batch + group.z;
    let row = subgroup / 2u % 2u * 2u * COOP;
    let column = subgroup % 2u * 2u * COOP;
    var c00 = CoopC();
    var c01 = CoopC();
    var c10 = CoopC();
    var c11 = CoopC();
    for (var k0 = 0u; k0 < matmul.k1; k0 += COOP_K) {
        matmul_coop_load(id, batch * matmul.a_batch, batch * matmul.b_batch, first_row, first_column, k0);
        workgroupBarrier();
        for (var k = 0u; k < COOP_K; k += COOP) {
            let a0 = coop_a(row * COOP_STEP_A + k, COOP_STEP_A);
            let a1 = coop_a((row + COOP) * COOP_STEP_A + k, COOP_STEP_A);
            let b0 = coop_b(k * COOP_STEP_B + column, COOP_STEP_B);
            let b1 = coop_b(k * COOP_STEP_B + column + COOP, COOP_STEP_B);
            c00 = coop_sum(a0, b0, c00);
            c01 = coop_sum(a0, b1, c01);
            c10 = coop_sum(a1, b0, c10);
            c11 = coop_sum(a1, b1, c11);
        }
        // The next tiles may only overwrite these once everybody has read them.
        workgroupBarrier();
    }
    matmul_coop_put(id, subgroup, c00, batch, first_row, first_column, 0u, 0u);
    matmul_coop_put(id, subgroup, c01, batch, first_row, first_column, 0u, 1u);
    matmul_coop_put(id, subgroup, c10, batch, first_row, first_column, 1u, 0u);
    matmul_coop_put(id, subgroup, c11, batch, first_row, first_column, 1u, 1u);
}
