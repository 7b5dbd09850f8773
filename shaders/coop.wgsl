// What a subgroup does with fragments that it holds together: COOP x COOP of E times the same into sums of f32, on the matrix units of the
// GPU. All its invocations call these with the same arguments. `matmul_coop_emulated.wgsl` has the same for adapters without such units.

// Of the tiles that the kernel declares, rows `step` elements apart.
fn coop_a(at: u32, step: u32) -> CoopA { return coopLoadT<CoopA>(&coop_tile_a[at], step); }
fn coop_b(at: u32, step: u32) -> CoopB { return coopLoadT<CoopB>(&coop_tile_b[at], step); }
fn coop_sum(a: CoopA, b: CoopB, c: CoopC) -> CoopC { return coopMultiplyAdd(a, b, c); }
fn coop_put(c: CoopC, at: u32, step: u32) { coopStoreT(c, &coop_tile_c[at], step); }
