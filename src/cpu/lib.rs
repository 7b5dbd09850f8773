//! CPU kernels, twins of `shaders/` and `cuda/`: one file per op family.

#[path = "../dtype.rs"]
pub mod dtype;
#[path = "../error.rs"]
pub mod error;
#[path = "../rng.rs"]
pub mod rng;
#[path = "../shape.rs"]
pub mod shape;

mod attention;
mod distill;
mod dot_tile;
mod embed;
mod ffn;
mod fisher;
mod gates;
pub mod gemm;
mod hard_concrete;
mod int8;
mod int8_packed;
mod layout;
mod linear_loss;
mod matmul;
mod moe;
mod moe_gather;
mod moe_matmul;
mod norm;
mod optim;
mod quant;
mod quant_int4;
mod quant_int8;
mod quant_matmul;
mod random;
mod relation;
mod requantize;
mod rope;
mod scratch;
mod select;
pub mod simd;
mod softmax;
mod sparse24;
mod sparse24_matmul;
mod sparse_bitmap;
mod unary;

pub use attention::{MASKED, attention, attention_backward};
pub use distill::{cosine, cosine_backward, hidden_mse, hidden_mse_backward, kl, kl_backward};
pub use embed::{embed, embed_backward};
pub use ffn::{ffn, ffn_backward};
pub use fisher::rank_one_inverse;
pub use gates::{group_dots, scale_groups};
pub use hard_concrete::{clamp, hard_concrete, hard_concrete_backward};
pub use layout::{concat, fill, gather_rows, pad, permute, scatter_add_rows, slice};
pub use linear_loss::{
    linear_cross_entropy, linear_cross_entropy_backward, linear_kl, linear_kl_backward, linear_predict,
};
pub use matmul::matmul;
pub use moe::{moe_combine, moe_combine_backward, moe_dispatch, moe_gate, moe_gate_backward};
pub use moe_gather::{gathered_matmul, gathered_matmul_int8};
pub use moe_matmul::{grouped_backward_input, grouped_backward_weight, grouped_matmul, grouped_matmul_int8};
pub use norm::{CHUNK as NORM_CHUNK, add_layernorm, add_norm_backward, add_rmsnorm, layernorm, norm_backward, rmsnorm};
pub use quant::{dequantize, fake_quant, fake_quant_backward, observe, quantize, step_slope, track_step};
pub use random::{dropout, normal, uniform};
pub use relation::{relation, relation_backward};
pub use rope::rope;
mod binary;
mod cache;
mod ceiling;
mod reduce;
mod relative;
pub use binary::{accumulate_scaled, binary};
pub use cache::write_rows;
pub use ceiling::multiply_add_chain;
pub use optim::{adamw, sgd, update_factor};
pub use quant_int4::{matmul_int4, pack_int4, unpack_int4};
pub use quant_int8::matmul_int8_groups;
pub use quant_matmul::matmul_int8;
pub use reduce::{argmax, count_non_finite, reduce, reduce_backward};
pub use relative::{relative_bias, relative_bias_backward};
pub use requantize::matmul_int8_requantized;
pub use select::{above, keep_largest};
pub use softmax::{IGNORE, cross_entropy, cross_entropy_backward, softmax, softmax_backward};
pub use sparse_bitmap::{
    BLOCK as BITMAP_BLOCK, PADDING as BITMAP_PADDING, decompress_bitmap, matmul_bitmap, matmul_bitmap_int8,
};
pub use sparse24::{PAIRS, PATTERNS, compress24, decompress24, gather24, mask24_1d, mask24_2d};
pub use sparse24_matmul::{matmul_sparse24, matmul_sparse24_int8};
pub use unary::{cast, unary, unary_backward};

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::dtype::{DType, Element};

/// Best instruction set of this processor that kernels dispatch on at run time.
pub fn level() -> &'static str {
    match simd::level() {
        simd::Level::Avx512 => "AVX-512",
        simd::Level::Avx2 => "AVX2",
        simd::Level::Portable => "portable",
    }
}

struct Slot<'a> {
    base: *mut u8,
    state: Cell<State>,
    bytes: usize,
    _memory: PhantomData<&'a mut [u8]>,
}

/// A slot is either shared by readers or owned by one writer.
#[derive(Clone, Copy, PartialEq)]
enum State {
    Free,
    Read,
    Written,
}

/// What a CPU kernel is called with: arguments in order (inputs, outputs that alias no input, scratch), parameter
/// words, and the device's threads.
pub struct Args<'a> {
    slots: Vec<Slot<'a>>,
    params: &'a [u32],
    pub element: DType,
    threads: &'a rayon::ThreadPool,
}

impl<'a> Args<'a> {
    pub fn new(params: &'a [u32], element: DType, threads: &'a rayon::ThreadPool) -> Self {
        Self { slots: Vec::with_capacity(8), params, element, threads }
    }

    /// # Safety
    /// `base` starts `bytes` initialized bytes that live for `'a`, aligned to 4; where one of two overlapping
    /// arguments is taken with [`Args::write`], neither is otherwise used.
    pub unsafe fn push(&mut self, base: *mut u8, bytes: usize) {
        self.slots.push(Slot { base, state: Cell::new(State::Free), bytes, _memory: PhantomData });
    }

    /// Argument `index` as elements. Empty when the argument was already taken for writing.
    pub fn read<T: Element>(&self, index: usize) -> &'a [T] {
        let slot = &self.slots[index];
        if slot.state.get() == State::Written {
            return &[];
        }
        slot.state.set(State::Read);
        // SAFETY: `push` promised the range; T is plain old data of at most 4-byte alignment; no writer has it.
        unsafe { std::slice::from_raw_parts(slot.base as *const T, slot.bytes / size_of::<T>()) }
    }

    /// Argument `index` to be written; it can be taken once, and not after it was read.
    pub fn write<T: Element>(&self, index: usize) -> &'a mut [T] {
        let slot = &self.slots[index];
        if slot.state.replace(State::Written) != State::Free {
            return &mut [];
        }
        // SAFETY: as in `read`; the slot was free and is now owned by this slice.
        unsafe { std::slice::from_raw_parts_mut(slot.base as *mut T, slot.bytes / size_of::<T>()) }
    }

    /// Number of arguments.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Parameter word as an extent.
    pub fn u(&self, index: usize) -> usize {
        self.params[index] as usize
    }

    /// Parameter word as a float.
    pub fn f(&self, index: usize) -> f32 {
        f32::from_bits(self.params[index])
    }

    pub fn word(&self, index: usize) -> u32 {
        self.params[index]
    }

    /// How many threads the device has. For load balance only: results never depend on it.
    pub fn threads(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// Runs `work` inside the device's thread pool, for kernels that use rayon themselves.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.threads.install(work)
    }

    /// Calls `work(chunk)` for every chunk. Not generic, so that hundreds of kernels share one copy of the machinery.
    fn chunks(&self, chunks: usize, work: &(dyn Fn(usize) + Sync)) {
        if chunks <= 1 || self.threads() == 1 {
            (0..chunks).for_each(work);
        } else {
            self.threads.install(|| (0..chunks).into_par_iter().for_each(work));
        }
    }

    /// Calls `work` for fixed ranges of at most `grain` items covering `0..items`. The ranges depend on the problem
    /// alone, so results are the same bits for any number of threads.
    pub fn ranges(&self, items: usize, grain: usize, work: impl Fn(Range<usize>) + Sync + Send) {
        let grain = grain.max(1);
        self.chunks(items.div_ceil(grain), &|c| work(c * grain..((c + 1) * grain).min(items)));
    }

    /// Splits `out` into fixed chunks of `grain` rows of `row` elements and calls `work(first row, chunk)`.
    pub fn rows<T: Send>(&self, out: &mut [T], row: usize, grain: usize, work: impl Fn(usize, &mut [T]) + Sync + Send) {
        let grain = grain.max(1);
        let out = Chunks::new(out, row.max(1) * grain);
        self.chunks(out.count(), &|c| {
            // SAFETY: `chunks` calls once for each index.
            work(c * grain, unsafe { out.take(c) });
        });
    }

    /// As [`Args::rows`] over two outputs with the same number of rows of `rows_of.0` and `rows_of.1` elements.
    pub fn rows2<T: Send, U: Send>(
        &self,
        (a, b): (&mut [T], &mut [U]),
        rows_of: (usize, usize),
        grain: usize,
        work: impl Fn(usize, &mut [T], &mut [U]) + Sync + Send,
    ) {
        let grain = grain.max(1);
        let (a, b) = (Chunks::new(a, rows_of.0.max(1) * grain), Chunks::new(b, rows_of.1.max(1) * grain));
        self.chunks(a.count().min(b.count()), &|c| {
            // SAFETY: `chunks` calls once for each index.
            let (x, y) = unsafe { (a.take(c), b.take(c)) };
            work(c * grain, x, y);
        });
    }

    /// Calls `work(index, part)` for every part, for kernels that write more outputs than [`Args::rows2`] takes: zip
    /// the outputs' chunks. The parts depend on the problem alone, so results are the same for any number of threads.
    pub fn parts<P: Send>(&self, parts: impl ExactSizeIterator<Item = P>, work: impl Fn(usize, P) + Sync + Send) {
        let parts: Vec<Mutex<Option<P>>> = parts.map(|p| Mutex::new(Some(p))).collect();
        self.chunks(parts.len(), &|index| {
            let part = parts[index].lock().unwrap_or_else(PoisonError::into_inner).take();
            part.into_iter().for_each(|part| work(index, part));
        });
    }
}

/// A slice in chunks of `size` elements that threads take by index.
struct Chunks<'a, T> {
    base: *mut T,
    len: usize,
    size: usize,
    _memory: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out exclusive parts of a slice, each to one thread (see `take`), as `chunks_mut` over scoped threads.
unsafe impl<T: Send> Sync for Chunks<'_, T> {}

impl<'a, T> Chunks<'a, T> {
    fn new(slice: &'a mut [T], size: usize) -> Self {
        Self { base: slice.as_mut_ptr(), len: slice.len(), size, _memory: PhantomData }
    }

    fn count(&self) -> usize {
        self.len.div_ceil(self.size)
    }

    /// # Safety
    /// Each index below `count` is taken at most once.
    #[expect(clippy::mut_from_ref, reason = "every index gives other elements")]
    unsafe fn take(&self, index: usize) -> &mut [T] {
        let start = (index * self.size).min(self.len);
        // SAFETY: start..end lies within the slice, and the chunks of different indices do not overlap.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), self.size.min(self.len - start)) }
    }
}

/// Rows per chunk so that one chunk is about 16 Ki elements: large enough to pay for a thread, small enough to balance.
pub fn grain(row: usize) -> usize {
    (16_384 / row.max(1)).max(1)
}

/// Calls a function generic over the float storage type for the element type of `args`.
macro_rules! float_kernel {
    ($args:expr, $f:ident) => {
        match $args.element {
            $crate::dtype::DType::F16 => $f::<half::f16>($args),
            $crate::dtype::DType::Bf16 => $f::<half::bf16>($args),
            _ => $f::<f32>($args),
        }
    };
}
pub(crate) use float_kernel;
