//! Records of the feed-forward block on warp groups of compute capability 9.0: 16-bit elements, widths of whole eights.

use super::plan::{aligned, fits, problem};
use super::{Extents, FfnActivation};
use crate::dtype::DType;
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, TensorMap, cuda_source};
use crate::ops::groups;

const SOURCE: Source = cuda_source!("ffn_wgmma");

pub(super) const FORWARD: Kernel = kernel("ffn_fwd_wgmma", "ffn_up_wgmma", forward);
pub(super) const BACKWARD: Kernel = kernel("ffn_bwd_wgmma", "ffn_slope_wgmma", backward);

const fn kernel(name: &'static str, entry: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Cuda { source: SOURCE, entry, constants: &[], arch: 90, tensor: &["wgmma.mma_async"] };
    Kernel { name, code, dtypes: &[DType::F16, DType::Bf16], fits: fits_groups, plan }
}

/// Rows of a tile, columns of a wide and of a narrow one, and k of a stage.
const ROWS: usize = 128;
const WIDE: usize = 256;
const NARROW: usize = 128;
const STAGE_K: usize = 64;
/// Rows of the tiles of column sums, and columns of a block of them.
const PARTIAL: usize = 64;
const SUM_BLOCK: usize = 128;

/// Tensor maps step by multiples of 16 bytes. The hidden layer has wide tiles for every multiprocessor; products with fewer take
/// narrow ones.
fn fits_groups(p: &Problem) -> bool {
    fits(p)
        && problem(p).is_some_and(|(activation, e)| {
            let aligned = [e.d, e.f, e.d2].iter().all(|&n| n > 0 && n.is_multiple_of(8));
            e.rows > 0 && aligned && groups::full(p, e.rows, e.f * activation.halves())
        })
}

/// Up to this d the groups of `ffn_up_turns_wgmma` take tiles of 64 rows in turns: what they do to z is then much of the work, and
/// each hides it under the other's products. Where both are even is to be measured. Small on the host, to verify both.
fn turns(p: &Problem, d: usize) -> bool {
    d <= if p.info.software { 384 } else { 1024 }
}

/// A matrix in memory: its slot in the launch, its rows and columns.
type Matrix = (usize, [usize; 2]);

/// A box of 64 of k: `extent` rows, or 64 columns of an operand that is contiguous along m or n.
fn map(p: &Problem, (slot, [rows, columns]): Matrix, extent: usize) -> TensorMap {
    groups::matrix(slot, p.element, [rows, columns], columns, extent)
}

/// `FfnWgmmaParams` for outputs in tiles of (rows, columns), and the launch's blocks: pairs, but for the narrow entry.
fn launch(
    p: &Problem,
    entry: &'static str,
    [rows, columns, k]: [usize; 3],
    mode: usize,
    tile: (usize, usize),
) -> Launch {
    let (down, across) = (rows.div_ceil(tile.0), columns.div_ceil(tile.1));
    let params = Params::new().u(rows).u(columns).u(k).u(mode).u(down).u(across);
    let single = entry == "ffn_narrow_wgmma";
    let blocks =
        if single { groups::blocks(p, down * across) } else { 2 * groups::pairs(p, down.div_ceil(2) * across) };
    Launch::new([blocks, 1, 1], params).entry(entry)
}

/// Bytes of four stages with tiles `width` columns wide.
fn shared(width: usize, own: usize) -> usize {
    groups::shared(4, (ROWS + width) * STAGE_K * 2, own)
}

/// c = a b (+ bias), each operand contiguous along k or else along m or n, by the shape of its matrix in memory.
struct Product {
    extents: [usize; 3],
    /// Whether a and b are contiguous along m and n.
    blocks: [bool; 2],
    a: [usize; 2],
    b: [usize; 2],
    /// a, b, bias (a stands in where there is none) and c.
    slots: [usize; 4],
}

impl Product {
    fn launch(&self, p: &Problem) -> Launch {
        let [rows, columns, _] = self.extents;
        let wide = columns > NARROW && groups::full(p, rows, columns);
        let (entry, width) = if wide { ("ffn_product_wgmma", WIDE) } else { ("ffn_narrow_wgmma", NARROW) };
        let [a, b] = self.blocks;
        let bias = self.slots[2] != self.slots[0];
        let mode = usize::from(a) | usize::from(b) << 1 | usize::from(bias) << 2;
        let extent = |blocks: bool, extent: usize| if blocks { STAGE_K } else { extent };
        launch(p, entry, self.extents, mode, (ROWS, width))
            .slots(&self.slots)
            .map(map(p, (0, self.a), extent(a, ROWS)))
            // Of a pair each block copies one half of b.
            .map(map(p, (1, self.b), extent(b, NARROW)))
            .shared(shared(width, 0))
    }
}

/// Arguments: x 0, w1 1, b1 2, w2 3, b2 4, y 5, z 6; scratch: h 7.
fn forward(p: &Problem) -> Plan {
    let Some((activation, e)) = problem(p) else {
        return Plan::default();
    };
    let hidden = e.f * activation.halves();
    let (entry, rows, stages) =
        if turns(p, e.d) { ("ffn_up_turns_wgmma", ROWS / 2, 5) } else { ("ffn_up_wgmma", ROWS, 4) };
    // A tile of GEGLU has as many gates as values.
    let width = WIDE / activation.halves();
    let up = launch(p, entry, [e.rows, e.f, e.d], activation.code(), (rows, width))
        .slots(&[0, 1, 2, 6, 7])
        .map(map(p, (0, [e.rows, e.d]), rows))
        .map(map(p, (1, [hidden, e.d]), WIDE / 2))
        .shared(groups::shared(stages, (rows + WIDE) * STAGE_K * 2, 0));
    let down = Product {
        extents: [e.rows, e.d2, e.f],
        blocks: [false, false],
        a: [e.rows, e.f],
        b: [e.d2, e.f],
        slots: [7, 3, 4, 5],
    };
    Plan::sequence(vec![up, down.launch(p)]).scratch(aligned(e.rows, e.f))
}

fn column_sums(entry: &'static str, rows: usize, columns: usize, tiles: usize, slots: &[usize]) -> Launch {
    let params = (0..4).fold(Params::new().u(rows).u(columns), |params, _| params.u(0));
    Launch::new([columns.div_ceil(SUM_BLOCK) as u32, tiles as u32, 1], params).entry(entry).slots(slots)
}

/// The products that follow dz and h in scratch.
fn products(activation: FfnActivation, e: &Extents) -> [Product; 3] {
    let hidden = e.f * activation.halves();
    let (x, dz, h, dy) = ([e.rows, e.d], [e.rows, hidden], [e.rows, e.f], [e.rows, e.d2]);
    let (w1, over_rows) = ([hidden, e.d], [true, true]);
    [
        Product { extents: [e.rows, e.d, hidden], blocks: [false, true], a: dz, b: w1, slots: [11, 1, 11, 5] },
        Product { extents: [hidden, e.d, e.rows], blocks: over_rows, a: dz, b: x, slots: [11, 0, 11, 6] },
        Product { extents: [e.d2, e.f, e.rows], blocks: over_rows, a: dy, b: h, slots: [4, 10, 4, 8] },
    ]
}

/// Arguments: x 0, w1 1, w2 2, z 3, dy 4, dx 5, dw1 6, db1 7, dw2 8, db2 9; scratch: h 10, dz 11, sums over tiles of rows for
/// db1 12 and db2 13.
fn backward(p: &Problem) -> Plan {
    let Some((activation, e)) = problem(p) else {
        return Plan::default();
    };
    let hidden = e.f * activation.halves();
    let parts = e.rows.div_ceil(PARTIAL);
    // Behind the ring: of both groups, sums of two parts of four warps each.
    let slope = launch(p, "ffn_slope_wgmma", [e.rows, e.f, e.d2], activation.code(), (ROWS, WIDE))
        .slots(&[4, 2, 3, 10, 11, 12])
        .map(map(p, (0, [e.rows, e.d2]), ROWS))
        .map(map(p, (1, [e.d2, e.f]), STAGE_K))
        .shared(shared(WIDE, 2 * 2 * 4 * WIDE * 4));
    let mut launches = vec![slope];
    launches.extend(products(activation, &e).iter().map(|product| product.launch(p)));
    launches.push(column_sums("ffn_sum_wgmma", parts, hidden, 1, &[12, 7]));
    launches.push(column_sums("ffn_partial_wgmma", e.rows, e.d2, parts, &[4, 13]));
    launches.push(column_sums("ffn_sum_wgmma", parts, e.d2, 1, &[13, 9]));
    Plan::sequence(launches)
        .scratch(aligned(e.rows, e.f))
        .scratch(aligned(e.rows, hidden))
        .scratch(parts * hidden * 4)
        .scratch(parts * e.d2 * 4)
}
