// One invocation, run when a device is opened, always with shader checks on: how this driver behaves where WGSL leaves
// it open, or breaks the rules. Inputs come from memory so that nothing is folded at compile time.
// Input words: 0 NaN bits, 1 subnormal bits, 2 zero, 3 loop count, 4 -3.0 bits, 5 far index, 6 one.

@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;

@compute @workgroup_size(1)
fn probe() {
    // A linear congruential chain: it cannot be replaced by a closed form, so every iteration must run.
    var state = x[6];
    var count = 0u;
    for (var i = 0u; i < x[3]; i++) {
        state = state * 1664525u + 1013904223u;
        count++;
    }
    y[0] = count;
    y[1] = state;

    let nan = bitcast<f32>(x[0]);
    y[2] = select(0u, 1u, nan != nan);
    y[3] = select(0u, 1u, (bitcast<u32>(nan) & 0x7fffffffu) > 0x7f800000u);

    y[4] = bitcast<u32>(bitcast<f32>(x[1]) * bitcast<f32>(x[6] * 0x3f800000u));

    let zero = bitcast<f32>(x[2]);
    let quotient = zero / zero;
    y[5] = select(0u, 1u, (bitcast<u32>(quotient) & 0x7fffffffu) > 0x7f800000u);
    y[6] = bitcast<u32>(1.0 / zero);
    y[7] = x[6] / x[2];
    y[8] = u32(bitcast<f32>(x[4]));

    y[9] = x[x[5]];
    y[x[5]] = 77u;
    y[10] = y[x[5]];
}
