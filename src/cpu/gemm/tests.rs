use super::*;
use crate::rng::Stream;

fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut stream = Stream::new(seed, 1);
    (0..n).map(|_| stream.normal() as f32).collect()
}

fn pairs(n: usize, seed: u64) -> Vec<half::bf16> {
    normal(n, seed).into_iter().map(half::bf16::from_f32).collect()
}

/// Stored (rows, columns, whether it is the transpose that is meant).
fn view<T: Float>(data: &[T], rows: usize, columns: usize, transposed: bool) -> View<'_, T> {
    if transposed { View::transposed(data, rows) } else { View::rows(data, columns) }
}

fn truth<T: Float>(p: &Product<T, T>, c: &[T], row: usize) -> Vec<f64> {
    let at = |v: View<T>, i: usize, j: usize| f64::from(v.data[i * v.row + j * v.column].load());
    let mut out: Vec<f64> = c.iter().map(|&x| f64::from(x.load())).collect();
    for i in 0..p.m {
        for j in 0..p.n {
            let start = if p.accumulate { out[i * row + j] } else { 0.0 };
            let sum: f64 = (0..p.k).map(|q| at(p.a, i, q) * at(p.b, q, j)).sum();
            let x = start + sum + p.bias.map_or(0.0, |b| f64::from(b[j]));
            out[i * row + j] = match p.activation {
                Activation::None => x,
                Activation::Relu => x.max(0.0),
                Activation::Gelu => 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044715 * x * x * x)).tanh()),
            };
        }
    }
    out
}

fn check(p: &Product<f32, f32>, set: &Tiles) {
    // A gap of 3 between rows of C must stay as it was.
    let row = p.n + 3;
    let start = normal(p.m * row, 9);
    let want = truth(p, &start, row);
    let mut c = start.clone();
    let base = c.as_mut_ptr();
    blocked(None, set, p, Target::new(base, row, Some((base, row))));
    for (i, (&got, &want)) in c.iter().zip(&want).enumerate() {
        if i % row >= p.n {
            assert_eq!(got, start[i], "wrote between rows");
        }
        let bound = 2.0 * p.k.max(8) as f64 * 6e-8 * (want.abs() + (p.k as f64).sqrt() + 4.0);
        assert!((f64::from(got) - want).abs() <= bound, "[{}, {}, {}] element {i}: {got}, truth {want}", p.m, p.n, p.k);
    }
}

#[test]
fn every_instruction_set_layout_and_edge() {
    for set in tile::every_set() {
        for [m, n, k] in [[1, 1, 1], [3, 5, 0], [7, 33, 17], [14, 32, 64], [15, 31, 257], [29, 65, 300], [40, 7, 513]] {
            let (a, b, bias) = (normal(m * k, 1), normal(k * n, 2), normal(n, 3));
            for layout in 0..4 {
                let (a, b) = (view(&a, m, k, layout & 1 == 1), view(&b, k, n, layout & 2 == 2));
                let plain = Product::new([m, n, k], a, b);
                check(&plain, set);
                check(&plain.accumulate(), set);
                check(&Product { bias: Some(&bias), activation: Activation::Gelu, ..plain }, set);
                check(&Product { bias: Some(&bias), activation: Activation::Relu, ..plain.accumulate() }, set);
            }
        }
    }
}

#[test]
fn same_bits_for_any_thread_count() {
    let [m, n, k] = [301, 190, 1400];
    threads_change_nothing([m, n, k], &normal(m * k, 1), &normal(n * k, 2));
    threads_change_nothing([m, n, k], &pairs(m * k, 1), &pairs(n * k, 2));
}

fn threads_change_nothing<T: Float>([m, n, k]: [usize; 3], a: &[T], b: &[T]) {
    let bias = normal(n, 3);
    let plain = Product::new([m, n, k], View::rows(a, k), View::transposed(b, k));
    let product = Product { bias: Some(&bias), activation: Activation::Gelu, ..plain };
    let mut one = vec![0.0f32; m * n];
    gemm(&product, &mut one, n);
    for threads in [2, 3, 5, 40] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let args = Args::new(&[], DType::F32, &pool);
        let mut many = vec![f32::NAN; m * n];
        gemm_threaded(&args, &product, &mut many, n);
        assert!(one.iter().zip(&many).all(|(x, y)| x.to_bits() == y.to_bits()), "{threads} threads");
    }
    // A product of some of the rows is the same bits too.
    let mut some = vec![0.0f32; 10 * n];
    gemm(&Product { m: 10, a: View::rows(&a[200 * k..], k), ..product }, &mut some, n);
    assert_eq!(some, one[200 * n..210 * n]);
}

/// bf16 that stays bf16: whole and half pairs at the end of one and of two blocks of k, the latter with sums
/// that are kept beside C.
#[test]
fn pairs_of_bf16_in_every_layout_and_edge() {
    for [m, n, k] in [[1, 1, 1], [3, 5, 0], [7, 33, 17], [15, 31, 64], [29, 300, 131], [5, 40, 1025], [16, 7, 2047]] {
        let (a, b, bias, start) = (pairs(m * k, 1), pairs(k * n, 2), normal(n, 3), pairs(m * (n + 3), 9));
        for layout in 0..4 {
            let plain = Product::new([m, n, k], view(&a, m, k, layout & 1 == 1), view(&b, k, n, layout & 2 == 2));
            let finished = Product { bias: Some(&bias), activation: Activation::Gelu, ..plain };
            for p in [plain, plain.accumulate(), finished, finished.accumulate()] {
                let want = truth(&p, &start, n + 3);
                let mut c = start.clone();
                gemm(&p, &mut c, n + 3);
                for (i, (got, want)) in c.iter().zip(&want).enumerate() {
                    if i % (n + 3) >= n {
                        assert_eq!(got.to_bits(), start[i].to_bits(), "wrote between rows");
                    }
                    // The sum in f32, and half a unit of the last of eight bits.
                    let bound = 2.0 * k.max(8) as f64 * 6e-8 * ((k as f64).sqrt() + 4.0) + want.abs() / 250.0;
                    let error = (f64::from(got.to_f32()) - want).abs();
                    assert!(error <= bound, "[{m}, {n}, {k}] element {i}: {got}, truth {want}");
                }
            }
        }
    }
}

#[test]
fn sixteen_bit_storage_rounds_once() {
    let [m, n, k] = [520, 40, 530];
    let a: Vec<half::bf16> = normal(m * k, 1).into_iter().map(half::bf16::from_f32).collect();
    let b = normal(k * n, 2);
    let product = Product::new([m, n, k], View::rows(&a, k), View::rows(&b, n));
    let mut exact = vec![0.0f32; m * n];
    gemm(&product, &mut exact, n);
    let mut c = vec![half::f16::NAN; m * n];
    gemm(&product, &mut c, n);
    assert!(c.iter().zip(&exact).all(|(c, x)| c.to_bits() == half::f16::from_f32(*x).to_bits()));
}
