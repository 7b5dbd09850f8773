// op:       observe, fake_quant, fake_quant_bwd, quantize, dequantize, pack_int4, step_slope, track_step
// math:     y = (clamp(rne(x / s) + z, low, high) - z) s, with s and z from the range of the element's group
// grad:     fake_quant_bwd: dx = dy where low <= rne(x / s) + z <= high, else 0; step_slope: f dy (q - x / s) there, f dy q elsewhere
// shapes:   observe: x[N], range[G, 2]; fold: parts[P, 2], range[G, 2]; fake_quant: x[N], grid (range[G, 2] or step[G or 1]), y[N];
//           fake_quant_bwd: x[N], range[G, 2], dy[N], dx[N]; quantize: x[N], range[G, 2], q[N] i8;
//           scales: range[G, 2], scale[G], zero[G]; dequantize: q[N] i8, scale[G], zero[G], y[N];
//           pack_int4: x[N], range[G, 2], q[N / 8] words;
//           observe_means: x[N], (step to divide by, scale)[G, 2]; step_slope: x[N], step, dy[N], slope[N] f32;
//           track_step: step[G], range[G, 2]
// layout:   groups are runs of `length` neighbours; i8 packed four to a word, little endian
// launch:   linear, 64 invocations a group: 8 elements each (maps), one word (i8), one part of a group (ranges)
// cost:     about 6 operations an element; each tensor moved once
// numerics: f32; bits are defined: one multiplication by the correctly rounded reciprocal, round to nearest even;
//           a group narrower than 2^-100 is zero with scale 1, one with NaN or wider than 2^120 has the scale NaN;
//           a given step is at least 2^-100; means are sums in order, over what is not 0
// source:   Jacob et al. 2018 (affine levels); straight-through: Bengio et al. 2013; learned steps:
//           Esser et al. 2020, Eq 3; means: Li and Liu 2016, Rastegari et al. 2016
// rungs:    v1 one invocation, neighbouring elements

// mode: 0 symmetric range, 1 asymmetric range, 2 a step per group, 3 one step, 4 (step to divide by, scale) per group.
struct QuantParams { count: u32, length: u32, mode: u32, low: f32, high: f32, unit: f32, shift: f32, own: u32, factor: f32 }
struct RangeParams { count: u32, length: u32, absolute: u32, part: u32, each: u32 }
var<immediate> quant: QuantParams;
var<immediate> observe: RangeParams;

@group(0) @binding(0) var<storage, read> quant_x: array<E>;
@group(0) @binding(1) var<storage, read_write> observe_range: array<f32>;
@group(0) @binding(0) var<storage, read> observe_parts: array<f32>;

fn not_a_number() -> f32 { return bitcast<f32>(0x7fc00000u | (quant.count & 0x80000000u)); }

@compute @workgroup_size(64)
fn observe_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= observe.count / observe.length * observe.each { return; }
    let start = (id / observe.each) * observe.length;
    let first = start + (id % observe.each) * observe.part;
    let last = min(first + observe.part, start + observe.length);
    var low = ld(quant_x[first]);
    var high = low;
    var nan = is_nan(low);
    for (var i = first + 1u; i < last; i++) {
        let x = ld(quant_x[i]);
        nan = nan || is_nan(x);
        low = min(low, x);
        high = max(high, x);
    }
    store_range(id, low, high, nan);
}

@compute @workgroup_size(64)
fn observe_fold(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= observe.count / observe.length { return; }
    let first = id * observe.each;
    var low = observe_parts[2u * first];
    var high = observe_parts[2u * first + 1u];
    var nan = is_nan(low);
    for (var p = first + 1u; p < first + observe.each; p++) {
        nan = nan || is_nan(observe_parts[2u * p]);
        low = min(low, observe_parts[2u * p]);
        high = max(high, observe_parts[2u * p + 1u]);
    }
    store_range(id, low, high, nan);
}

fn store_range(id: u32, low: f32, high: f32, nan: bool) {
    var range = vec2<f32>(low, high);
    if observe.absolute == 1u {
        let amax = max(abs(low), abs(high));
        range = vec2<f32>(-amax, amax);
    }
    if nan { range = vec2<f32>(bitcast<f32>(0x7fc00000u | (observe.count & 0x80000000u))); }
    observe_range[2u * id] = range.x;
    observe_range[2u * id + 1u] = range.y;
}

struct Grid { scale: f32, inverse: f32, zero: f32 }

fn grid_of(low: f32, high: f32) -> Grid {
    let bottom = min(low, 0.0);
    let width = select(max(abs(low), abs(high)), max(high, 0.0) - bottom, quant.mode == 1u);
    if is_nan(low) || is_nan(high) || !(width <= 1.329228e36) {
        let nan = not_a_number();
        return Grid(nan, nan, 0.0);
    }
    if width < 7.888609e-31 { return Grid(1.0, 0.0, 0.0); }
    let scale = width * quant.unit;
    let inverse = reciprocal(scale);
    if quant.mode == 0u { return Grid(scale, inverse, 0.0); }
    return Grid(scale, inverse, clamp(round(-bottom * inverse), quant.low, quant.high));
}

fn grid_of_step(step: f32) -> Grid {
    if is_nan(step) || step > 1.329228e36 {
        let nan = not_a_number();
        return Grid(nan, nan, 0.0);
    }
    let scale = max(step, 7.888609e-31);
    return Grid(scale, reciprocal(scale), 0.0);
}

fn grid_of_means(step: f32, scale: f32) -> Grid {
    if is_nan(step) {
        let nan = not_a_number();
        return Grid(nan, nan, 0.0);
    }
    if step < 7.888609e-31 { return Grid(1.0, 0.0, 0.0); }
    return Grid(scale, reciprocal(step), 0.0);
}

// What the two words of a group, or the one of a step, stand for.
fn grid_from(first: f32, second: f32) -> Grid {
    if quant.mode == 4u { return grid_of_means(first, second); }
    if quant.mode >= 2u { return grid_of_step(first); }
    return grid_of(first, second);
}

// Where a group's words begin, and the second of them: a step is its own.
fn grid_word(g: u32) -> u32 {
    if quant.mode == 2u { return g; }
    return select(2u * g, 0u, quant.mode == 3u);
}

fn grid_second(g: u32) -> u32 { return grid_word(g) + select(1u, 0u, quant.mode == 2u || quant.mode == 3u); }

// (step to divide by, scale): the mean magnitude decides, and of a ternary group those of more than half a step.
@compute @workgroup_size(64)
fn observe_means(@builtin(global_invocation_id) gid: vec3<u32>) {
    let id = linear_id(gid, 64u);
    if id >= quant.count / quant.length { return; }
    let first = id * quant.length;
    var sum = 0.0;
    var nonzero = 0.0;
    var nan = false;
    for (var i = first; i < first + quant.length; i++) {
        let x = abs(ld(quant_x[i]));
        nan = nan || is_nan(x);
        sum += x;
        nonzero += f32(x >= 7.888609e-31);
    }
    let mean = sum * reciprocal(max(nonzero, 1.0));
    var means = vec2<f32>(7.888609e-31, mean);
    if nan || !(mean <= 1.329228e36) {
        means = vec2<f32>(not_a_number());
    } else if mean < 7.888609e-31 {
        means = vec2<f32>(0.0, 1.0);
    } else if quant.unit > 0.0 {
        let step = mean * quant.unit;
        let inverse = reciprocal(step);
        var kept = 0.0;
        var count = 0.0;
        for (var i = first; i < first + quant.length; i++) {
            let x = abs(ld(quant_x[i]));
            if x * inverse > 0.5 {
                kept += x;
                count += 1.0;
            }
        }
        means = vec2<f32>(step, kept * reciprocal(count));
    }
    observe_range[2u * id] = means.x;
    observe_range[2u * id + 1u] = means.y;
}

// The level before clamping.
fn raw_level(x: f32, grid: Grid) -> f32 { return round(x * grid.inverse) + grid.zero; }

@group(0) @binding(1) var<storage, read> quant_range: array<f32>;

fn grid_at(g: u32) -> Grid { return grid_from(quant_range[grid_word(g)], quant_range[grid_second(g)]); }

@group(0) @binding(2) var<storage, read_write> fake_y: array<E>;

@compute @workgroup_size(64)
fn fake_quant_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 8u;
    if first >= quant.count { return; }
    var g = first / quant.length;
    var grid = grid_at(g);
    for (var i = first; i < min(first + 8u, quant.count); i++) {
        if i / quant.length != g {
            g = i / quant.length;
            grid = grid_at(g);
        }
        let level = raw_level(ld(quant_x[i]), grid);
        if is_nan(level) { fake_y[i] = st(level); }
        else { fake_y[i] = st((clamp(level, quant.low, quant.high) - grid.zero) * grid.scale); }
    }
}

@group(0) @binding(2) var<storage, read> fake_dy: array<E>;
@group(0) @binding(3) var<storage, read_write> fake_dx: array<E>;

@compute @workgroup_size(64)
fn fake_quant_bwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 8u;
    if first >= quant.count { return; }
    var g = first / quant.length;
    var grid = grid_at(g);
    for (var i = first; i < min(first + 8u, quant.count); i++) {
        if i / quant.length != g {
            g = i / quant.length;
            grid = grid_at(g);
        }
        let level = raw_level(ld(quant_x[i]), grid);
        let inside = !is_nan(level) && level >= quant.low && level <= quant.high;
        if inside { fake_dx[i] = fake_dy[i]; } else { fake_dx[i] = st(0.0); }
    }
}

@group(0) @binding(2) var<storage, read_write> quantize_q: array<u32>;

// One word of four elements, which may lie in several groups.
@compute @workgroup_size(64)
fn quantize_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let word = linear_id(gid, 64u);
    let first = word * 4u;
    if first >= quant.count { return; }
    var packed = 0u;
    var g = first / quant.length;
    var grid = grid_at(g);
    for (var i = first; i < min(first + 4u, quant.count); i++) {
        if i / quant.length != g {
            g = i / quant.length;
            grid = grid_at(g);
        }
        let level = raw_level(ld(quant_x[i]), grid);
        var q = 0;
        if !is_nan(level) { q = i32(clamp(level, quant.low, quant.high) - quant.shift); }
        packed |= (bitcast<u32>(q) & 0xffu) << (8u * (i - first));
    }
    quantize_q[word] = packed;
}

@group(0) @binding(0) var<storage, read> scales_range: array<f32>;
@group(0) @binding(1) var<storage, read_write> quantize_scale: array<f32>;
@group(0) @binding(2) var<storage, read_write> quantize_zero: array<f32>;

@compute @workgroup_size(64)
fn quantize_scales(@builtin(global_invocation_id) gid: vec3<u32>) {
    let g = linear_id(gid, 64u);
    if g >= quant.count / quant.length { return; }
    let grid = grid_from(scales_range[grid_word(g)], scales_range[grid_second(g)]);
    quantize_scale[g] = grid.scale;
    quantize_zero[g] = grid.zero - quant.shift;
}

@group(0) @binding(0) var<storage, read> dequantize_q: array<u32>;
@group(0) @binding(1) var<storage, read> dequantize_scale: array<f32>;
@group(0) @binding(2) var<storage, read> dequantize_zero: array<f32>;
@group(0) @binding(3) var<storage, read_write> dequantize_y: array<f32>;

@compute @workgroup_size(64)
fn dequantize_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let word = linear_id(gid, 64u);
    let first = word * 4u;
    if first >= quant.count { return; }
    let q = vec4<f32>(unpack4xI8(dequantize_q[word]));
    for (var i = first; i < min(first + 4u, quant.count); i++) {
        let g = i / quant.length;
        dequantize_y[i] = (q[i - first] - dequantize_zero[g]) * dequantize_scale[g];
    }
}

// Eight levels of four bits to a word, plus 8; a group is a multiple of eight elements.
@compute @workgroup_size(64)
fn pack_int4_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let word = linear_id(gid, 64u);
    if word * 8u >= quant.count { return; }
    let g = word * 8u / quant.length;
    let grid = grid_at(g);
    var packed = 0u;
    for (var b = 0u; b < 8u; b++) {
        let level = raw_level(ld(quant_x[word * 8u + b]), grid);
        var q = 0.0;
        if !is_nan(level) { q = clamp(level, quant.low, quant.high); }
        packed |= u32(q + 8.0) << (4u * b);
    }
    quantize_q[word] = packed;
}

@group(0) @binding(2) var<storage, read> slope_dy: array<E>;
@group(0) @binding(3) var<storage, read_write> grad_slope: array<f32>;

@compute @workgroup_size(64)
fn step_slope(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 8u;
    if first >= quant.count { return; }
    var g = first / quant.length;
    var grid = grid_at(g);
    for (var i = first; i < min(first + 8u, quant.count); i++) {
        if i / quant.length != g {
            g = i / quant.length;
            grid = grid_at(g);
        }
        let x = ld(quant_x[i]);
        let raw = raw_level(x, grid);
        var slope = raw;
        if !is_nan(raw) {
            slope = clamp(raw, quant.low, quant.high);
            if slope == raw { slope -= x * grid.inverse; }
        }
        grad_slope[i] = ld(slope_dy[i]) * quant.factor * slope;
    }
}

@group(0) @binding(0) var<storage, read_write> track_step_value: array<f32>;

@compute @workgroup_size(64)
fn track_step(@builtin(global_invocation_id) gid: vec3<u32>) {
    let g = linear_id(gid, 64u);
    if g >= quant.count { return; }
    let grid = grid_at(g);
    // A zero or non-finite range says nothing.
    if is_nan(grid.inverse) || grid.inverse == 0.0 { return; }
    let step = track_step_value[g];
    track_step_value[g] = select(step + quant.factor * (grid.scale - step), grid.scale, step == 0.0);
}
