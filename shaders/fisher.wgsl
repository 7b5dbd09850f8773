// op:       rank_one_inverse
// math:     F <- F - (F g)(F g)^T / (count + g^T F g) for every block
// grad:     none
// shapes:   F[blocks, B, B] (in place), g[blocks, B]
// layout:   contiguous; F is symmetric, so that a column is read where a row is meant
// launch:   one workgroup of 64 per block
// cost:     4 flops and 8 bytes an element of F
// numerics: f32; sums in the order of the index; symmetric to the bit where F was
// source:   WoodFisher: Singh and Alistarh 2020; Sherman and Morrison 1950
// rungs:    v1 one group per block, F read twice

struct FisherParams { blocks: u32, b: u32, count: f32 }
var<immediate> fisher: FisherParams;

@group(0) @binding(0) var<storage, read_write> fisher_F: array<f32>;
@group(0) @binding(1) var<storage, read> fisher_g: array<f32>;

var<workgroup> fisher_gradient: array<f32, 128>;
var<workgroup> fisher_product: array<f32, 128>;

@compute @workgroup_size(64)
fn rank_one_inverse(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let block = group.x + group.y * 65535u;
    if block >= fisher.blocks { return; }
    let b = fisher.b;
    let start = block * b * b;
    for (var i = lane; i < b; i += 64u) { fisher_gradient[i] = fisher_g[block * b + i]; }
    workgroupBarrier();
    for (var i = lane; i < b; i += 64u) {
        var sum = 0.0;
        for (var j = 0u; j < b; j++) { sum += fisher_F[start + j * b + i] * fisher_gradient[j]; }
        fisher_product[i] = sum;
    }
    workgroupBarrier();
    // Each invocation sums for itself, in the same order.
    var divisor = fisher.count;
    for (var j = 0u; j < b; j++) { divisor += fisher_product[j] * fisher_gradient[j]; }
    for (var i = lane; i < b * b; i += 64u) {
        fisher_F[start + i] -= fisher_product[i / b] * fisher_product[i % b] / divisor;
    }
}
