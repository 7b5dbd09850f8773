//! Records of the losses with a linear head on warp groups of compute capability 9.0: 16-bit elements, widths of whole eights.
//! The forward passes store no logits, only what each tile of words gives each row; the backward passes store dz alone.

use super::{LinearCrossEntropy, LinearCrossEntropyBackward, LinearKl, LinearKlBackward, LinearPredict};
use crate::dtype::DType;
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, TensorMap, cuda_source};
use crate::ops::distill::Divergence;
use crate::ops::groups;

const FORWARD: Source = cuda_source!("linear_loss_wgmma");
const BACKWARD: Source = cuda_source!("linear_loss_bwd_wgmma");

pub(super) const fn forward(name: &'static str, entry: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    kernel(name, FORWARD, entry, plan)
}

pub(super) const fn backward(name: &'static str, entry: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    kernel(name, BACKWARD, entry, plan)
}

const fn kernel(name: &'static str, source: Source, entry: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Cuda { source, entry, constants: &[], arch: 90, tensor: &["wgmma.mma_async"] };
    Kernel { name, code, dtypes: &[DType::F16, DType::Bf16], fits, plan }
}

/// Rows of a tile, columns of a wide and of a narrow one (divergences: narrow), k of a stage.
const ROWS: usize = 128;
const WIDE: usize = 256;
const NARROW: usize = 128;
const STAGE_K: usize = 64;
/// Tokens of a chunk at most, and words whose dz is kept at a time: 64 MiB of it in two planes.
const CHUNK: usize = 4096;
const WORDS: usize = 4096;

/// Tensor maps step by multiples of 16 bytes; logits of all words fill every multiprocessor, by pairs of tiles down a column.
/// Software adapters are never full.
fn fits(p: &Problem) -> bool {
    let e = Extents::new(p, CHUNK);
    let matrices = p.inputs.iter().filter(|m| m.dims().len() == 2);
    let aligned = matrices.clone().all(|m| m.shape.last() > 0 && m.shape.last().is_multiple_of(8));
    aligned && e.tokens > 0 && groups::full(p, e.chunk, e.vocabulary)
}

#[derive(Clone, Copy)]
struct Extents {
    tokens: usize,
    vocabulary: usize,
    /// Tokens of a chunk and words of a tile of dz.
    chunk: usize,
    tile: usize,
    /// Widths of the student and the teacher (0 without one).
    widths: [usize; 2],
}

impl Extents {
    fn new(p: &Problem, chunk: usize) -> Self {
        let (tokens, vocabulary) = (p.inputs[0].shape.rows(), p.inputs[1].shape.rows());
        let teacher = p.inputs.get(2).filter(|m| m.dims().len() == 2).map_or(0, |m| m.shape.last());
        // Small on the host, so that small cases have several.
        let most = if p.info.software { 256 } else { WORDS };
        let chunk = chunk.min(CHUNK).min(tokens);
        Self { tokens, vocabulary, chunk, tile: most.min(vocabulary), widths: [p.inputs[0].shape.last(), teacher] }
    }

    /// First tokens and lengths of the chunks.
    fn chunks(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.tokens).step_by(self.chunk.max(1)).map(move |row| (row, self.chunk.min(self.tokens - row)))
    }

    /// First words and lengths of the tiles of dz.
    fn words(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.vocabulary).step_by(self.tile).map(move |word| (word, self.tile.min(self.vocabulary - word)))
    }
}

/// What the epilogues know of a loss.
#[derive(Clone, Copy)]
struct Form {
    direction: usize,
    /// Smoothing, or beta.
    factor: f32,
    inverse: f32,
    squared: f32,
    /// Columns of a tile of logits.
    width: usize,
}

impl Form {
    fn entropy(smoothing: f32) -> Self {
        Self { direction: 0, factor: smoothing, inverse: 1.0, squared: 1.0, width: WIDE }
    }

    fn divergence(d: &Divergence) -> Self {
        let (direction, factor) = (d.direction.code(), d.direction.beta());
        Self { direction, factor, inverse: 1.0 / d.temperature, squared: d.factor(), width: NARROW }
    }

    /// `LinearWgmmaParams` of `(first, count)` tokens and words.
    fn params(&self, e: &Extents, rows: (usize, usize), words: (usize, usize)) -> Params {
        let params = Params::new().u(rows.1).u(words.1).u(e.widths[0]).u(e.widths[1]).u(rows.0).u(words.0);
        let params = params.u(e.vocabulary).u(self.direction).f(self.factor).f(self.inverse).f(self.squared);
        params.u(rows.1.div_ceil(ROWS)).u(words.1.div_ceil(self.width))
    }

    /// A launch over the tiles of logits: hidden states and head, or those of student and teacher, then `slots`.
    fn logits(
        &self,
        p: &Problem,
        entry: &'static str,
        e: &Extents,
        rows: (usize, usize),
        words: (usize, usize),
        slots: &[usize],
    ) -> Launch {
        let pairs = if e.widths[1] > 0 { 2 } else { 1 };
        let stages = if self.width == WIDE { 4 } else { 6 };
        // Pairs of blocks take two tiles down a column; each copies one half of the words.
        let blocks = 2 * groups::pairs(p, rows.1.div_ceil(ROWS).div_ceil(2) * words.1.div_ceil(self.width));
        let all: Vec<usize> = (0..2 * pairs).chain(slots.iter().copied()).collect();
        let mut launch = Launch::new([blocks, 1, 1], self.params(e, rows, words)).entry(entry).slots(&all);
        for pair in 0..pairs {
            let (first, d) = (2 * pair, e.widths[pair]);
            launch = window(launch, p, first, rows, d).map(map(p, first, [rows.1, d], ROWS));
            launch = window(launch, p, first + 1, words, d).map(map(p, first + 1, [words.1, d], self.width / 2));
        }
        launch.shared(groups::shared(stages, (ROWS + self.width) * STAGE_K * 2, 0))
    }

    /// A warp per token.
    fn join(&self, entry: &'static str, e: &Extents, rows: (usize, usize), slots: &[usize]) -> Launch {
        Launch::linear(rows.1 * 32, 256, self.params(e, rows, (0, e.vocabulary))).entry(entry).slots(slots)
    }
}

/// Binds rows `first .. first + count` of a matrix of width `d`.
fn window(launch: Launch, p: &Problem, argument: usize, (first, count): (usize, usize), d: usize) -> Launch {
    let row = d * p.element.size();
    launch.window(argument, first * row, count * row)
}

fn map(p: &Problem, slot: usize, [rows, columns]: [usize; 2], extent: usize) -> TensorMap {
    groups::matrix(slot, p.element, [rows, columns], columns, extent)
}

/// Arguments: hidden 0, weight 1, target 2, outputs 3 and 4; scratch: what tiles give rows 5, targets' logits 6.
fn scored(p: &Problem, chunk: usize, smoothing: f32, join: &'static str) -> Plan {
    let (e, form) = (Extents::new(p, chunk), Form::entropy(smoothing));
    let mut launches = Vec::new();
    for rows in e.chunks() {
        launches.push(form.logits(p, "entropy_tiles_wgmma", &e, rows, (0, e.vocabulary), &[2, 5, 6]));
        launches.push(form.join(join, &e, rows, &[5, 6, 2, 3, 4]));
    }
    Plan::sequence(launches).scratch(e.chunk * e.vocabulary.div_ceil(WIDE) * 16).scratch(e.chunk * 4)
}

pub(super) fn entropy(p: &Problem) -> Plan {
    p.op::<LinearCrossEntropy>().map(|op| scored(p, op.chunk, op.smoothing, "entropy_join_wgmma")).unwrap_or_default()
}

pub(super) fn predict(p: &Problem) -> Plan {
    p.op::<LinearPredict>().map(|op| scored(p, op.chunk, 0.0, "predict_join_wgmma")).unwrap_or_default()
}

/// Arguments: student 0 and 1, teacher 2 and 3, row weights 4, loss 5, log sum exps 6 and 7, expectation 8; scratch: what tiles
/// give rows 9.
pub(super) fn kl(p: &Problem) -> Plan {
    let Some(op) = p.op::<LinearKl>() else {
        return Plan::default();
    };
    let divergence = op.divergence();
    let (e, form) = (Extents::new(p, op.chunk), Form::divergence(&divergence));
    let all = (0, e.vocabulary);
    let mut launches = Vec::new();
    for rows in e.chunks() {
        launches.push(form.logits(p, "kl_tiles_wgmma", &e, rows, all, &[9]));
        launches.push(form.join("kl_join_wgmma", &e, rows, &[9, 4, 5, 6, 7, 8]));
        // The mixture of the Jensen-Shannon divergence needs both log sum exps: a second pass over the words.
        if form.direction == 2 {
            launches.push(form.logits(p, "jsd_tiles_wgmma", &e, rows, all, &[6, 7, 9]));
            launches.push(form.join("jsd_join_wgmma", &e, rows, &[9, 4, 5, 8]));
        }
    }
    Plan::sequence(launches).scratch(e.chunk * e.vocabulary.div_ceil(NARROW) * 20)
}

/// Arguments of the gradients: dhidden and dweight from `out` on; in scratch from `planes` on dz, f32 sums of both, the scale.
#[derive(Clone, Copy)]
struct Places {
    out: usize,
    planes: usize,
}

impl Places {
    fn scale(self) -> usize {
        self.planes + 3
    }
}

/// One product of dz: `over` is its summed axis.
struct Product {
    rows: usize,
    columns: usize,
    over: usize,
    /// dz is contiguous along m.
    blocks: bool,
    /// The other operand, its rows are the summed axis.
    b: usize,
    /// f32 sums, output, and the first row in both.
    sums: usize,
    out: usize,
    first: usize,
    add: bool,
    last: bool,
}

impl Product {
    fn launch(&self, p: &Problem, at: Places) -> Launch {
        let full = p.info.software || groups::tiles(self.rows, self.columns, WIDE) >= groups::MULTIPROCESSORS;
        let wide = self.columns > NARROW && full;
        let (entry, width, stages) =
            if wide { ("planes_product_wgmma", WIDE, 3) } else { ("planes_narrow_wgmma", NARROW, 4) };
        let [tokens, words] = if self.blocks { [self.over, self.rows] } else { [self.rows, self.over] };
        let step = words.next_multiple_of(8);
        let rows = if self.blocks { STAGE_K } else { ROWS };
        let strides = [step, tokens * step];
        let dz = TensorMap { slot: 0, element: p.element, dims: [words, tokens, 2], strides, rows };
        let mode = usize::from(self.add) | usize::from(self.last) << 1;
        let params = Params::new().u(self.rows).u(self.columns).u(self.over).u(mode).u(self.first).u(0).u(0);
        let params = params.flag(self.blocks).f(0.0).f(0.0).f(0.0);
        let params = params.u(self.rows.div_ceil(ROWS)).u(self.columns.div_ceil(width));
        Launch::new([groups::blocks(p, groups::tiles(self.rows, self.columns, width)), 1, 1], params)
            .entry(entry)
            .slots(&[at.planes, self.b, at.scale(), self.sums, self.out])
            .map(dz)
            .map(map(p, 1, [self.over, self.columns], STAGE_K))
            .shared(groups::shared(stages, (2 * ROWS + width) * STAGE_K * 2, 0))
    }
}

/// Launches of dhidden and dweight; `slopes` makes dz of `(first, count)` tokens and words.
fn gradients(
    p: &Problem,
    e: Extents,
    at: Places,
    scale: Launch,
    slopes: &dyn Fn((usize, usize), (usize, usize)) -> Launch,
) -> Plan {
    let d = e.widths[0];
    let mut launches = vec![scale];
    // Words outside: a tile of dweight is finished before the next.
    for words in e.words() {
        for rows in e.chunks() {
            launches.push(slopes(rows, words));
            let hidden = Product {
                rows: rows.1,
                columns: d,
                over: words.1,
                blocks: false,
                b: 1,
                sums: at.planes + 1,
                out: at.out,
                first: rows.0,
                add: words.0 > 0,
                last: words.0 + words.1 == e.vocabulary,
            };
            launches.push(window(hidden.launch(p, at), p, 1, words, d));
            let weight = Product {
                rows: words.1,
                columns: d,
                over: rows.1,
                blocks: true,
                b: 0,
                sums: at.planes + 2,
                out: at.out + 1,
                first: 0,
                add: rows.0 > 0,
                last: rows.0 + rows.1 == e.tokens,
            };
            launches.push(window(window(weight.launch(p, at), p, 0, rows, d), p, at.out + 1, words, d));
        }
    }
    Plan::sequence(launches)
        .scratch(2 * e.chunk * e.tile.next_multiple_of(8) * 2)
        .scratch(e.tokens * d * 4)
        .scratch(e.tile * d * 4)
        .scratch(2 * 4)
}

/// The power of two that dz is multiplied with, from dloss and the weight (dloss again where there is none).
fn scale(form: &Form, e: &Extents, dloss: usize, weight: usize, scale: usize) -> Launch {
    let params = form.params(e, (0, e.tokens), (0, e.vocabulary));
    Launch::new([1, 1, 1], params).entry("linear_scale_wgmma").slots(&[dloss, weight, scale])
}

/// Arguments: hidden 0, weight 1, target 2, lse 3, dloss 4, dhidden 5, dweight 6; scratch from 7.
pub(super) fn entropy_backward(p: &Problem) -> Plan {
    const AT: Places = Places { out: 5, planes: 7 };
    let Some(op) = p.op::<LinearCrossEntropyBackward>() else {
        return Plan::default();
    };
    let (e, form) = (Extents::new(p, op.chunk), Form::entropy(op.smoothing));
    let slots = [2, 3, 4, AT.scale(), AT.planes];
    gradients(p, e, AT, scale(&form, &e, 4, 4, AT.scale()), &|rows, words| {
        form.logits(p, "entropy_planes_wgmma", &e, rows, words, &slots)
    })
}

/// Arguments: student 0 and 1, teacher 2 and 3, row weights 4, log sum exps 5 and 6, expectation 7, dloss 8, dhidden 9, dweight
/// 10; scratch from 11.
pub(super) fn kl_backward(p: &Problem) -> Plan {
    const AT: Places = Places { out: 9, planes: 11 };
    let Some(op) = p.op::<LinearKlBackward>() else {
        return Plan::default();
    };
    let divergence = op.divergence();
    let (e, form) = (Extents::new(p, op.chunk), Form::divergence(&divergence));
    let slots = [4, 5, 6, 7, 8, AT.scale(), AT.planes];
    gradients(p, e, AT, scale(&form, &e, 8, 4, AT.scale()), &|rows, words| {
        form.logits(p, "kl_planes_wgmma", &e, rows, words, &slots)
    })
}
