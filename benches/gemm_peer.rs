//! The CPU matrix product beside the `gemm` crate (feature x86-v4), interleaved in one run: the ratio is what counts.
//! `cargo bench --bench gemm_peer [SIZE..]`; one line per size, form and thread count, best and median of the rounds.

use std::time::Instant;

use espalier::device;
use espalier::dispatch;
use espalier::ops::matmul::Matmul;
use espalier::rng::Stream;
use espalier::tensor::Tensor;

const ROUNDS: usize = 15;

fn main() {
    let asked: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let sizes = if asked.is_empty() { vec![256, 512, 1024] } else { asked };
    println!(
        "{:<6} {:<4} {:>8} {:>12} {:>12} {:>8} {:>8}",
        "size", "form", "threads", "ours GF/s", "gemm GF/s", "best", "median"
    );
    for threads in [1usize, 2] {
        for &n in &sizes {
            for (form, transpose_a, transpose_b) in [("NN", false, false), ("NT", false, true), ("TN", true, false)] {
                compare(n, form, (transpose_a, transpose_b), threads);
            }
        }
    }
}

fn compare(n: usize, form: &str, (transpose_a, transpose_b): (bool, bool), threads: usize) {
    let device = device::open(&format!("cpu:{threads}")).expect("a CPU device");
    let mut stream = Stream::new(1, n as u32);
    let mut draw = || -> Vec<f32> { (0..n * n).map(|_| stream.normal() as f32).collect() };
    let (a, b) = (draw(), draw());
    let upload = |v: &[f32]| Tensor::from_slice(&device, &[n, n], v).expect("memory");
    let (ta, tb) = (upload(&a), upload(&b));
    let op = Matmul { transpose_a, transpose_b, ..Matmul::default() };
    let mut peer = vec![0.0f32; n * n];
    let parallelism = if threads == 1 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads) };
    // Row and column steps of a row-major matrix, swapped where it is transposed.
    let steps = |transposed: bool| if transposed { (1, n as isize) } else { (n as isize, 1) };
    let ((a_row, a_column), (b_row, b_column)) = (steps(transpose_a), steps(transpose_b));
    let run_peer = |out: &mut [f32]| {
        // SAFETY: all three matrices hold n x n elements at the given steps, and `out` overlaps neither input.
        unsafe {
            gemm::gemm(
                n,
                n,
                n,
                out.as_mut_ptr(),
                1,
                n as isize,
                false,
                a.as_ptr(),
                a_column,
                a_row,
                b.as_ptr(),
                b_column,
                b_row,
                0.0f32,
                1.0f32,
                false,
                false,
                false,
                parallelism,
            );
        }
    };
    run_peer(&mut peer);
    let ours = dispatch::run_one(&op, &[&ta, &tb]).expect("a product").to_vec::<f32>().expect("a download");
    let worst = ours.iter().zip(&peer).fold(0.0f32, |m, (x, y)| m.max((x - y).abs()));
    assert!(worst < 1e-3 * (n as f32).sqrt(), "results differ by {worst}");
    let (mut mine, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let start = Instant::now();
        dispatch::run_one(&op, &[&ta, &tb]).expect("a product");
        mine.push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        run_peer(&mut peer);
        theirs.push(start.elapsed().as_secs_f64());
    }
    mine.sort_by(f64::total_cmp);
    theirs.sort_by(f64::total_cmp);
    let rate = |seconds: f64| 2.0 * (n as f64).powi(3) / seconds / 1e9;
    let median = ROUNDS / 2;
    println!(
        "{n:<6} {form:<4} {threads:>8} {:>12.1} {:>12.1} {:>8.2} {:>8.2}",
        rate(mine[0]),
        rate(theirs[0]),
        theirs[0] / mine[0],
        theirs[median] / mine[median]
    );
}
