//! WGSL plans: which tile, in which order, with which arguments.

use crate::dtype::DType;
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, source};
use crate::ops::distill::Divergence;
use crate::ops::groups::MULTIPROCESSORS;
use crate::ops::rows::BLOCK;

use super::{LinearCrossEntropy, LinearCrossEntropyBackward, LinearKl, LinearKlBackward, LinearPredict};

pub(super) const SOURCE: Source = source!("linear_loss");

/// Words of a tile; a multiple of 256, so that a tile of the head starts where a binding may start.
const TILE: usize = 2048;
/// Tokens of a chunk at most: the sums over tokens of one launch are one loop.
const CHUNK: usize = 4096;
/// f32 of state per row.
const STATE: usize = 8;

pub(super) const fn kernel(name: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry: "tile_logits", constants: &[] };
    Kernel { name, code, dtypes: DType::FLOATS, fits, plan }
}

/// Tensor instructions of compute capability 8.0 on 16-bit elements: 128x128 outputs a block, of aligned widths.
pub(super) const fn tensor(name: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Cuda { source: SOURCE, entry: "tile_logits_mma", constants: &[], arch: 80, tensor: &["mma.sync"] };
    Kernel { name, code, dtypes: &[DType::F16, DType::Bf16], fits: fits_tensor, plan }
}

/// 64x64 outputs a block, of any width.
pub(super) const fn tensor_small(name: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    let code =
        Code::Cuda { source: SOURCE, entry: "tile_logits_small_mma", constants: &[], arch: 80, tensor: &["mma.sync"] };
    Kernel { name, code, dtypes: &[DType::F16, DType::Bf16], fits, plan }
}

/// Which kernels make the products of a plan.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Rung {
    Registers,
    Small,
    Large,
}

/// Outputs of a block of the tensor rungs, per axis.
const LARGE_TILE: usize = 128;
const SMALL_TILE: usize = 64;

/// Whether a product has large tiles enough. Software adapters are never full, so that small cases verify them too.
fn many(p: &Problem, rows: usize, columns: usize) -> bool {
    p.info.software || rows.div_ceil(LARGE_TILE) * columns.div_ceil(LARGE_TILE) >= MULTIPROCESSORS
}

/// The large tile copies 16 bytes at a time. Its plan takes the small one for products with few outputs.
fn fits_tensor(p: &Problem) -> bool {
    let e = Extents::new(p, CHUNK);
    let aligned = p.inputs.iter().filter(|m| m.dims().len() == 2).all(|m| m.shape.last().is_multiple_of(8));
    aligned && fits(p) && many(p, e.chunk, e.tile)
}

/// Everything but the head is bound whole, and one invocation sums over the width.
fn fits(p: &Problem) -> bool {
    let limit = p.info.limits.binding_bytes;
    let budget = p.info.limits.loop_budget.unwrap_or(u64::MAX);
    let floats = p.inputs.iter().filter(|m| m.dims().len() == 2);
    floats.enumerate().all(|(i, m)| {
        let d = m.shape.last() as u64;
        // Hidden states and their f32 gradient are bound whole, heads 256 words at a time or more.
        let bound = if i % 2 == 0 { m.count() as u64 * 4 } else { 256 * 4 * d };
        d <= budget && bound <= limit
    })
}

/// Extents of one op on one device.
#[derive(Clone, Copy)]
struct Extents {
    n: usize,
    v: usize,
    chunk: usize,
    tile: usize,
}

/// Tokens `row..row + rows` against words `word..word + words`.
#[derive(Clone, Copy)]
struct Tile {
    row: usize,
    rows: usize,
    word: usize,
    words: usize,
}

impl Extents {
    fn new(p: &Problem, chunk: usize) -> Self {
        let (n, v) = (p.inputs[0].shape.rows(), p.inputs[1].shape.rows());
        let widest = p.inputs.iter().filter(|m| m.dims().len() == 2).map(|m| m.shape.last()).max().unwrap_or(1);
        let most = usize::try_from(p.info.limits.binding_bytes).unwrap_or(usize::MAX) / (4 * widest.max(1));
        let tile = TILE.min(most / 256 * 256).max(256).min(v);
        Self { n, v, chunk: chunk.min(CHUNK).min(n), tile }
    }

    fn tile(&self, row: usize, word: usize) -> Tile {
        Tile { row, rows: self.chunk.min(self.n - row), word, words: self.tile.min(self.v - word) }
    }

    /// Words inside, tokens outside.
    fn by_tokens(self) -> impl Iterator<Item = Tile> {
        (0..self.n)
            .step_by(self.chunk)
            .flat_map(move |row| (0..self.v).step_by(self.tile).map(move |word| self.tile(row, word)))
    }

    /// Bytes of one tile of logits.
    fn logits(&self) -> usize {
        self.chunk * self.tile * 4
    }
}

/// One operand: argument, first element, and strides of its outer index and of the reduction.
struct Operand {
    argument: usize,
    start: usize,
    outer: usize,
    inner: usize,
}

/// c[i, j] (+)= sum_k a[i, k] b[j, k]; `c` is (argument, start, row stride).
fn product(
    entry: &'static str,
    [m, n, k]: [usize; 3],
    a: Operand,
    b: Operand,
    c: (usize, usize, usize),
    add: bool,
) -> Launch {
    let params = Params::new().u(m).u(n).u(k).u(a.start).u(a.outer).u(a.inner).u(b.start).u(b.outer).u(b.inner);
    let params = params.u(c.1).u(c.2).flag(add).u(0).u(0).f(0.0).f(0.0);
    // 8x8 invocations of 4x4 outputs.
    let groups = [n.div_ceil(32) as u32, m.div_ceil(32) as u32, 1];
    Launch::new(groups, params).entry(entry).slots(&[a.argument, b.argument, c.0]).trips(k + 64)
}

/// A product of `planes` planes of operands on tensor instructions, by its large and its small entry.
fn tensor_product(
    p: &Problem,
    rung: Rung,
    entries: [&'static str; 2],
    planes: usize,
    [m, n, k]: [usize; 3],
    params: Params,
) -> Launch {
    let large = rung == Rung::Large && many(p, m, n);
    let (entry, tile) = if large { (entries[0], LARGE_TILE) } else { (entries[1], SMALL_TILE) };
    // Four stages of 32 of k in shared memory, with planes in the large tile three.
    let stages = if large && planes == 3 { 3 } else { 4 };
    let groups = [n.div_ceil(tile) as u32, m.div_ceil(tile) as u32, 1];
    Launch::new(groups, params).entry(entry).shared(planes * tile * stages * 32 * 2).trips(k)
}

/// Binds only the head's (or its gradient's) words of a tile.
fn window(launch: Launch, p: &Problem, argument: usize, t: Tile, d: usize) -> Launch {
    let word = d * p.inputs[0].dtype.size();
    launch.window(argument, t.word * word, t.words * word)
}

/// z = hidden weightᵀ of one tile, from arguments `first` and `first + 1` into argument `z`.
fn logits(p: &Problem, rung: Rung, first: usize, t: Tile, z: usize) -> Launch {
    let d = p.inputs[first].shape.last();
    let hidden = Operand { argument: first, start: t.row * d, outer: d, inner: 1 };
    let weight = Operand { argument: first + 1, start: 0, outer: d, inner: 1 };
    let extents = [t.rows, t.words, d];
    let mut launch = product("tile_logits", extents, hidden, weight, (z, 0, t.words), false);
    if rung != Rung::Registers {
        let entries = ["tile_logits_mma", "tile_logits_small_mma"];
        launch = tensor_product(p, rung, entries, 2, extents, launch.params).slots(&launch.slots);
    }
    window(launch, p, first + 1, t, d)
}

/// What the row kernels read besides the tile.
#[derive(Clone, Copy)]
struct Form {
    direction: usize,
    /// Smoothing, or beta.
    factor: f32,
    inverse: f32,
    squared: f32,
}

impl Form {
    fn entropy(smoothing: f32) -> Self {
        Self { direction: 0, factor: smoothing, inverse: 1.0, squared: 1.0 }
    }

    fn divergence(d: &Divergence) -> Self {
        Self {
            direction: d.direction.code(),
            factor: d.direction.beta(),
            inverse: 1.0 / d.temperature,
            squared: d.factor(),
        }
    }

    fn params(&self, e: &Extents, t: Tile) -> Params {
        let params = Params::new().u(t.rows).u(t.words).u(e.v).f(self.squared);
        let params = (0..7).fold(params, |p, _| p.u(0));
        params.u(t.row).u(t.word).u(self.direction).f(self.factor).f(self.inverse)
    }

    /// One invocation per token, with loops over the tile's words.
    fn rows(&self, entry: &'static str, e: &Extents, t: Tile, slots: &[usize]) -> Launch {
        let trips = 2 * t.words + t.words.div_ceil(32);
        Launch::linear(t.rows, BLOCK, self.params(e, t)).entry(entry).slots(slots).trips(trips)
    }

    /// One warp per token.
    fn warps(&self, entry: &'static str, e: &Extents, t: Tile, slots: &[usize]) -> Launch {
        Launch::linear(t.rows * 32, 256, self.params(e, t)).entry(entry).slots(slots)
    }

    /// Eight neighbouring words of a row per thread.
    fn eights(&self, entry: &'static str, e: &Extents, t: Tile, slots: &[usize]) -> Launch {
        Launch::linear(t.rows * t.words.div_ceil(8), 128, self.params(e, t)).entry(entry).slots(slots)
    }

    /// The power of two that dz is multiplied with, from dloss and, where one counts, the weight.
    fn scale(&self, e: &Extents, dloss: usize, weight: Option<usize>, scale: usize) -> Launch {
        let all = Tile { row: 0, rows: e.n, word: 0, words: usize::from(weight.is_some()) };
        let launch = Launch::new([1, 1, 1], self.params(e, all)).entry("tile_scale_mma");
        launch.slots(&[dloss, weight.unwrap_or(dloss), scale])
    }

    /// Four neighbouring elements of the tile per invocation.
    fn elements(&self, entry: &'static str, e: &Extents, t: Tile, slots: &[usize]) -> Launch {
        Launch::linear((t.rows * t.words).div_ceil(4), BLOCK, self.params(e, t)).entry(entry).slots(slots).trips(4)
    }

    /// One invocation for each of all tokens, after the last tile.
    fn done(&self, entry: &'static str, e: &Extents, slots: &[usize]) -> Launch {
        let all = Tile { row: 0, rows: e.n, word: 0, words: 1 };
        Launch::linear(e.n, BLOCK, self.params(e, all)).entry(entry).slots(slots)
    }
}

fn scored(p: &Problem, rung: Rung, chunk: usize, smoothing: f32, done: &'static str) -> Plan {
    const Z: usize = 5;
    const STATES: usize = 6;
    let (e, form) = (Extents::new(p, chunk), Form::entropy(smoothing));
    let mut launches = Vec::new();
    for t in e.by_tokens() {
        launches.push(logits(p, rung, 0, t, Z));
        launches.push(match rung {
            Rung::Registers => form.rows("entropy_tile", &e, t, &[Z, 2, STATES]),
            _ => form.warps("entropy_tile_mma", &e, t, &[Z, 2, STATES]),
        });
    }
    launches.push(form.done(done, &e, &[STATES, 2, 3, 4]));
    Plan::sequence(launches).scratch(e.logits()).scratch(e.n * STATE * 4)
}

pub(super) fn entropy(p: &Problem, rung: Rung) -> Plan {
    p.op::<LinearCrossEntropy>().map(|op| scored(p, rung, op.chunk, op.smoothing, "entropy_done")).unwrap_or_default()
}

pub(super) fn predict(p: &Problem, rung: Rung) -> Plan {
    p.op::<LinearPredict>().map(|op| scored(p, rung, op.chunk, 0.0, "predict_done")).unwrap_or_default()
}

/// Arguments of the gradients: the first output, the tile's dz, the first of two f32 sums. Tensor rungs have two more scratch
/// buffers after those: dz in two planes and its scale.
#[derive(Clone, Copy)]
struct Places {
    out: usize,
    z: usize,
    sums: usize,
}

impl Places {
    fn planes(self) -> usize {
        self.sums + 2
    }

    fn scale(self) -> usize {
        self.sums + 3
    }
}

/// Launches of dhidden and dweight, from what `slopes` leaves as dz of a tile.
fn gradients(p: &Problem, rung: Rung, e: Extents, at: Places, slopes: &dyn Fn(Tile, &mut Vec<Launch>)) -> Vec<Launch> {
    let d = p.inputs[0].shape.last();
    let mut launches = Vec::new();
    let multiply = |tensor: [&'static str; 2], extents, dz: Operand, b: Operand, c: (usize, usize, usize), add| {
        let slots = [at.planes(), b.argument, at.scale(), c.0];
        let launch = product("tile_product", extents, dz, b, c, add);
        match rung {
            Rung::Registers => launch,
            _ => tensor_product(p, rung, tensor, 3, extents, launch.params).slots(&slots),
        }
    };
    // Words outside: a tile of dweight is finished before the next.
    for word in (0..e.v).step_by(e.tile) {
        for row in (0..e.n).step_by(e.chunk) {
            let t = e.tile(row, word);
            slopes(t, &mut launches);
            let dz = Operand { argument: at.z, start: 0, outer: t.words, inner: 1 };
            let weight = Operand { argument: 1, start: 0, outer: 1, inner: d };
            let entries = ["tile_hidden_mma", "tile_hidden_small_mma"];
            let back = multiply(entries, [t.rows, d, t.words], dz, weight, (at.sums, row * d, d), word > 0);
            launches.push(window(back, p, 1, t, d));
            let dz = Operand { argument: at.z, start: 0, outer: 1, inner: t.words };
            let hidden = Operand { argument: 0, start: row * d, outer: 1, inner: d };
            let entries = ["tile_weight_mma", "tile_weight_small_mma"];
            launches.push(multiply(entries, [t.words, d, t.rows], dz, hidden, (at.sums + 1, 0, d), row > 0));
        }
        let t = e.tile(0, word);
        launches.push(window(store(at.sums + 1, at.out + 1, t.words * d), p, at.out + 1, t, d));
    }
    launches.push(store(at.sums, at.out, e.n * d));
    launches
}

/// Adds the scratch of `gradients` behind that of the tiles' logits.
fn sums(plan: Plan, p: &Problem, rung: Rung, e: &Extents) -> Plan {
    let d = p.inputs[0].shape.last();
    let plan = plan.scratch(e.n * d * 4).scratch(e.tile * d * 4);
    match rung {
        Rung::Registers => plan,
        _ => plan.scratch(2 * e.chunk * e.tile.next_multiple_of(8) * 2).scratch(2 * 4),
    }
}

/// Rounds f32 sums to storage.
fn store(from: usize, to: usize, count: usize) -> Launch {
    let params = (0..15).fold(Params::new().u(count), |p, _| p.u(0));
    Launch::linear(count.div_ceil(4), BLOCK, params).entry("tile_store").slots(&[from, to]).trips(4)
}

pub(super) fn entropy_backward(p: &Problem, rung: Rung) -> Plan {
    const Z: usize = 7;
    const AT: Places = Places { out: 5, z: Z, sums: 8 };
    let Some(op) = p.op::<LinearCrossEntropyBackward>() else {
        return Plan::default();
    };
    let (e, form) = (Extents::new(p, op.chunk), Form::entropy(op.smoothing));
    let slopes = |t: Tile, launches: &mut Vec<Launch>| {
        launches.push(logits(p, rung, 0, t, Z));
        launches.push(match rung {
            Rung::Registers => form.elements("entropy_slopes", &e, t, &[Z, 2, 3, 4]),
            _ => form.eights("entropy_slopes_mma", &e, t, &[Z, 2, 3, 4, AT.scale(), AT.planes()]),
        });
    };
    let mut launches = gradients(p, rung, e, AT, &slopes);
    if rung != Rung::Registers {
        launches.insert(0, form.scale(&e, 4, None, AT.scale()));
    }
    sums(Plan::sequence(launches).scratch(e.logits()), p, rung, &e)
}

pub(super) fn kl(p: &Problem, rung: Rung) -> Plan {
    const ZS: usize = 9;
    const ZT: usize = 10;
    const STATES: usize = 11;
    let Some(op) = p.op::<LinearKl>() else {
        return Plan::default();
    };
    let divergence = op.divergence();
    let (e, form) = (Extents::new(p, op.chunk), Form::divergence(&divergence));
    let mut launches = Vec::new();
    // The mixture of the Jensen-Shannon divergence needs both log sum exps: a second pass over the words.
    let passes = [["kl_tile", "kl_tile_mma"], ["jsd_tile", "jsd_tile_mma"]];
    for [entry, warps] in passes.into_iter().take(1 + usize::from(form.direction == 2)) {
        for t in e.by_tokens() {
            launches.push(logits(p, rung, 0, t, ZS));
            launches.push(logits(p, rung, 2, t, ZT));
            launches.push(match rung {
                Rung::Registers => form.rows(entry, &e, t, &[ZS, ZT, STATES]),
                _ => form.warps(warps, &e, t, &[ZS, ZT, STATES]),
            });
        }
    }
    launches.push(form.done("kl_done", &e, &[STATES, 4, 5, 6, 7, 8]));
    Plan::sequence(launches).scratch(e.logits()).scratch(e.logits()).scratch(e.n * STATE * 4)
}

pub(super) fn kl_backward(p: &Problem, rung: Rung) -> Plan {
    const ZS: usize = 11;
    const ZT: usize = 12;
    const AT: Places = Places { out: 9, z: ZS, sums: 13 };
    let Some(op) = p.op::<LinearKlBackward>() else {
        return Plan::default();
    };
    let divergence = op.divergence();
    let (e, form) = (Extents::new(p, op.chunk), Form::divergence(&divergence));
    let slopes = |t: Tile, launches: &mut Vec<Launch>| {
        launches.push(logits(p, rung, 0, t, ZS));
        launches.push(logits(p, rung, 2, t, ZT));
        launches.push(match rung {
            Rung::Registers => form.elements("kl_slopes", &e, t, &[ZS, ZT, 4, 5, 6, 7, 8]),
            _ => form.eights("kl_slopes_mma", &e, t, &[ZS, ZT, 4, 5, 6, 7, 8, AT.scale(), AT.planes()]),
        });
    };
    let mut launches = gradients(p, rung, e, AT, &slopes);
    if rung != Rung::Registers {
        launches.insert(0, form.scale(&e, 8, Some(4), AT.scale()));
    }
    sums(Plan::sequence(launches).scratch(e.logits()).scratch(e.logits()), p, rung, &e)
}
