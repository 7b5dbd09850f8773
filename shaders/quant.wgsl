// op:       observe, fake_quant, fake_quant_bwd, quantize, dequantize, pack_int4
// math:     y = (clamp(rne(x / s) + z, low, high) - z) s, with s and z from the range of the element's group
// grad:     fake_quant_bwd: dx = dy where low <= rne(x / s) + z <= high, else 0
// shapes:   observe: x[N], range[G, 2]; fold: parts[P, 2], range[G, 2]; fake_quant: x[N], range[G, 2], y[N];
//           fake_quant_bwd: x[N], range[G, 2], dy[N], dx[N]; quantize: x[N], range[G, 2], q[N] i8;
//           scales: range[G, 2], scale[G], zero[G]; dequantize: q[N] i8, scale[G], zero[G], y[N];
//           pack_int4: x[N], range[G, 2], q[N / 8] words
// layout:   groups are runs of `length` neighbours; i8 packed four to a word, little endian
// launch:   linear, 64 invocations a group: 8 elements each (maps), one word (i8), one part of a group (ranges)
// cost:     about 6 operations an element; each tensor moved once
// numerics: f32; bits are defined: one multiplication by the correctly rounded reciprocal, round to nearest even;
//           a group narrower than 2^-100 is zero with scale 1, one with NaN or wider than 2^120 has the scale NaN
// source:   Jacob et al. 2018 (affine levels); straight-through: Bengio et al. 2013
// rungs:    v1 one invocation, neighbouring elements

struct QuantParams { count: u32, length: u32, asymmetric: u32, low: f32, high: f32, unit: f32, shift: f32 }
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

// 1 / s, correctly rounded, by long division of the mantissas: WGSL's own division may be off by 2.5 ulp.
// s is normal and between 2^-108 and 2^120.
fn reciprocal(s: f32) -> f32 {
    let bits = bitcast<u32>(s);
    let exponent = bits >> 23u;
    let mantissa = (bits & 0x7fffffu) | 0x800000u;
    if mantissa == 0x800000u { return bitcast<f32>((254u - exponent) << 23u); }
    // 2^47 / mantissa in three digits of eight bits; a tie would need a power of two.
    var rest = 0x800000u << 8u;
    let d2 = rest / mantissa;
    rest = (rest - d2 * mantissa) << 8u;
    let d1 = rest / mantissa;
    rest = (rest - d1 * mantissa) << 8u;
    let d0 = rest / mantissa;
    rest = rest - d0 * mantissa;
    let quotient = (d2 << 16u) + (d1 << 8u) + d0 + select(0u, 1u, 2u * rest > mantissa);
    return bitcast<f32>(((253u - exponent) << 23u) + (quotient - 0x800000u));
}

struct Grid { scale: f32, inverse: f32, zero: f32 }

fn grid_of(low: f32, high: f32) -> Grid {
    let bottom = min(low, 0.0);
    let width = select(max(abs(low), abs(high)), max(high, 0.0) - bottom, quant.asymmetric == 1u);
    if is_nan(low) || is_nan(high) || !(width <= 1.329228e36) {
        let nan = not_a_number();
        return Grid(nan, nan, 0.0);
    }
    if width < 7.888609e-31 { return Grid(1.0, 0.0, 0.0); }
    let scale = width * quant.unit;
    let inverse = reciprocal(scale);
    if quant.asymmetric == 0u { return Grid(scale, inverse, 0.0); }
    return Grid(scale, inverse, clamp(round(-bottom * inverse), quant.low, quant.high));
}

// The level before clamping.
fn raw_level(x: f32, grid: Grid) -> f32 { return round(x * grid.inverse) + grid.zero; }

@group(0) @binding(1) var<storage, read> quant_range: array<f32>;
@group(0) @binding(2) var<storage, read_write> fake_y: array<E>;

@compute @workgroup_size(64)
fn fake_quant_fwd(@builtin(global_invocation_id) gid: vec3<u32>) {
    let first = linear_id(gid, 64u) * 8u;
    if first >= quant.count { return; }
    var g = first / quant.length;
    var grid = grid_of(quant_range[2u * g], quant_range[2u * g + 1u]);
    for (var i = first; i < min(first + 8u, quant.count); i++) {
        if i / quant.length != g {
            g = i / quant.length;
            grid = grid_of(quant_range[2u * g], quant_range[2u * g + 1u]);
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
    var grid = grid_of(quant_range[2u * g], quant_range[2u * g + 1u]);
    for (var i = first; i < min(first + 8u, quant.count); i++) {
        if i / quant.length != g {
            g = i / quant.length;
            grid = grid_of(quant_range[2u * g], quant_range[2u * g + 1u]);
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
    var grid = grid_of(quant_range[2u * g], quant_range[2u * g + 1u]);
    for (var i = first; i < min(first + 4u, quant.count); i++) {
        if i / quant.length != g {
            g = i / quant.length;
            grid = grid_of(quant_range[2u * g], quant_range[2u * g + 1u]);
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
    let grid = grid_of(scales_range[2u * g], scales_range[2u * g + 1u]);
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
    let grid = grid_of(quant_range[2u * g], quant_range[2u * g + 1u]);
    var packed = 0u;
    for (var b = 0u; b < 8u; b++) {
        let level = raw_level(ld(quant_x[word * 8u + b]), grid);
        var q = 0.0;
        if !is_nan(level) { q = clamp(level, quant.low, quant.high); }
        packed |= u32(q + 8.0) << (4u * b);
    }
    quantize_q[word] = packed;
}
