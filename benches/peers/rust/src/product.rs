//! f32 products of row-major matrices: a `[m, k]` times b, which is `[k, n]` or, of a sparse weight made dense, `[n, k]`.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rten_gemm::{GemmExecutor, GemmInputA, GemmInputB, GemmOptions};
use rten_tensor::NdTensorView;

use crate::protocol::{Case, Work, bytes, floats};

struct Slot {
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
}

#[derive(Clone, Copy)]
struct Size {
    m: usize,
    n: usize,
    k: usize,
    /// b is `[n, k]`.
    transposed: bool,
}

/// How the case gives b.
#[derive(Clone, Copy)]
enum Stored {
    Dense,
    /// 2:4, with so many words of places in a row.
    Pairs {
        words: usize,
    },
    /// Kept values and bitmaps of blocks of 64.
    Bitmaps,
}

type Multiply = Box<dyn Fn(Size, &mut Slot)>;

struct Product {
    kernel: String,
    size: Size,
    stored: Stored,
    slots: Vec<Slot>,
    multiply: Multiply,
}

pub fn open(peer: &str, case: &Case, slots: usize) -> Option<Box<dyn Work>> {
    let (a, b) = (&case.inputs[0], &case.inputs[1]);
    let plain = case.params.contains("transpose_a:false,transpose_b:false,epilogue:None,accumulate:false");
    let (stored, n) = match case.op.as_str() {
        "matmul_sparse24" if case.inputs.len() == 3 => (Stored::Pairs { words: case.inputs[2].dims[1] }, b.dims[0]),
        "matmul_bitmap" if case.inputs.len() == 3 => (Stored::Bitmaps, case.inputs[2].dims[1]),
        "matmul" if plain => (Stored::Dense, b.dims[1]),
        _ => return None,
    };
    if a.dtype != "f32" || a.dims.len() != 2 {
        return None;
    }
    let (m, k) = (a.dims[0], a.dims[1]);
    let size = Size { m, k, n, transposed: !matches!(stored, Stored::Dense) };
    let (kernel, multiply): (String, Multiply) = match peer {
        "faer" => (peer.into(), Box::new(with_faer)),
        "gemm x86-v4" => (peer.into(), Box::new(with_gemm)),
        "matrixmultiply" => (peer.into(), Box::new(with_matrixmultiply)),
        "rten-gemm" => {
            let executor = GemmExecutor::<f32>::new();
            (executor.kernel_name().into(), Box::new(move |size, slot| with_rten(&executor, size, slot)))
        }
        _ => return None,
    };
    let slot = || Slot { a: vec![0.0; m * k], b: vec![0.0; k * size.n], c: vec![0.0; m * size.n] };
    Some(Box::new(Product { kernel, size, stored, slots: (0..slots).map(|_| slot()).collect(), multiply }))
}

impl Work for Product {
    fn fill(&mut self, slot: usize, inputs: Vec<Vec<u8>>) {
        let slot = &mut self.slots[slot];
        floats(&mut slot.a, &inputs[0]);
        match self.stored {
            Stored::Dense => floats(&mut slot.b, &inputs[1]),
            Stored::Pairs { words } => of_pairs(&mut slot.b, self.size.k, words, &inputs[1], &inputs[2]),
            Stored::Bitmaps => of_bitmaps(&mut slot.b, self.size, &inputs[1], &inputs[2]),
        }
        slot.c.fill(f32::from_bits(u32::MAX));
    }

    fn run(&mut self, slot: usize) {
        (self.multiply)(self.size, &mut self.slots[slot]);
    }

    fn read(&self, slot: usize) -> Vec<Vec<u8>> {
        vec![bytes(&self.slots[slot].c)]
    }

    fn kernel(&self) -> String {
        self.kernel.clone()
    }
}

/// A 2:4 matrix with its zeros: two kept values of each four, their places in two bits each, low bits first.
fn of_pairs(b: &mut [f32], k: usize, words: usize, values: &[u8], places: &[u8]) {
    b.fill(0.0);
    let mut kept = vec![0.0; b.len() / 2];
    floats(&mut kept, values);
    for (row, target) in b.chunks_exact_mut(k).enumerate() {
        for (i, value) in kept[row * k / 2..][..k / 2].iter().enumerate() {
            let at = 4 * (row * words + i / 16);
            let word = u32::from_le_bytes([places[at], places[at + 1], places[at + 2], places[at + 3]]);
            target[i / 2 * 4 + (word >> (2 * (i % 16)) & 3) as usize] = *value;
        }
    }
}

/// A matrix with its zeros: of each block of 64 columns and row two words of mask and the place of the first value.
fn of_bitmaps(b: &mut [f32], Size { n, k, .. }: Size, values: &[u8], lists: &[u8]) {
    b.fill(0.0);
    let mut kept = vec![0.0; values.len() / 4];
    floats(&mut kept, values);
    let words: Vec<u32> = lists.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    for (i, list) in words.chunks_exact(3).enumerate() {
        let (mask, row) = (u64::from(list[0]) | u64::from(list[1]) << 32, &mut b[i % n * k..][..k]);
        let places = (0..64).filter(|place| mask >> place & 1 == 1);
        for (place, value) in places.zip(&kept[list[2] as usize..]) {
            row[i / n * 64 + place] = *value;
        }
    }
}

/// As many threads as the asking program wants.
fn threads() -> usize {
    std::env::var("PEER_THREADS").ok().and_then(|t| t.parse().ok()).unwrap_or(1)
}

fn with_faer(Size { m, n, k, transposed }: Size, slot: &mut Slot) {
    let a = MatRef::from_row_major_slice(&slot.a, m, k);
    let b = if transposed {
        MatRef::from_column_major_slice(&slot.b, k, n)
    } else {
        MatRef::from_row_major_slice(&slot.b, k, n)
    };
    let par = if threads() == 1 { Par::Seq } else { Par::rayon(threads()) };
    matmul(MatMut::from_row_major_slice_mut(&mut slot.c, m, n), Accum::Replace, a, b, 1.0f32, par);
}

fn with_gemm(Size { m, n, k, transposed }: Size, slot: &mut Slot) {
    let parallelism = if threads() == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads()) };
    let (down, across) = if transposed { (1, k as isize) } else { (n as isize, 1) };
    // SAFETY: the three matrices hold m x n, m x k and k x n elements at these steps, and none overlaps another.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            slot.c.as_mut_ptr(),
            1,
            n as isize,
            false,
            slot.a.as_ptr(),
            1,
            k as isize,
            slot.b.as_ptr(),
            across,
            down,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn with_matrixmultiply(Size { m, n, k, transposed }: Size, slot: &mut Slot) {
    let (down, across) = if transposed { (1, k as isize) } else { (n as isize, 1) };
    let (a, b, c) = (slot.a.as_ptr(), slot.b.as_ptr(), slot.c.as_mut_ptr());
    // SAFETY: as above.
    unsafe {
        matrixmultiply::sgemm(m, k, n, 1.0, a, k as isize, 1, b, down, across, 0.0, c, n as isize, 1);
    }
}

fn with_rten(executor: &GemmExecutor<f32>, Size { m, n, k, transposed }: Size, slot: &mut Slot) {
    let a = NdTensorView::from_data([m, k], &slot.a[..]);
    let b = if transposed {
        NdTensorView::from_data([n, k], &slot.b[..]).transposed()
    } else {
        NdTensorView::from_data([k, n], &slot.b[..])
    };
    let (a, b) = (GemmInputA::Unpacked(a), GemmInputB::Unpacked(b));
    executor.gemm(&mut slot.c, a, b, GemmOptions::default()).expect("shapes that fit");
}
