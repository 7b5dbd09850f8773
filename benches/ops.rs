//! Criterion over the table's real-model sizes on the CPU device: `cargo bench -- matmul`.
//! `espalier kernels bench` is the instrument (checked results, cold inputs, ceilings, every device); this one gives
//! criterion's statistics and its comparison with the run before.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use espalier::ops::FAMILIES;
use espalier::verify::draw;
use espalier::{Tensor, device, dispatch};

fn main() -> espalier::Result<()> {
    let device = device::open("cpu")?;
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    for case in FAMILIES.iter().flat_map(|f| (f.cases)()).filter(|c| c.bench) {
        let inputs: Vec<Tensor> = case
            .inputs
            .iter()
            .enumerate()
            .map(|(i, input)| Tensor::from_f64(&device, input.meta.dims(), input.meta.dtype, &draw(input, 1, i)))
            .collect::<espalier::Result<_>>()?;
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        let metas = case.metas();
        let cost = case.op.cost(&metas, &case.op.infer(&metas)?);
        let mut group = criterion.benchmark_group(case.op.name());
        group.throughput(Throughput::Bytes(cost.bytes as u64));
        group.bench_with_input(BenchmarkId::from_parameter(case.label()), &case, |b, case| {
            // A case that cannot run is a bug that `kernels verify` names; here it would only spoil the others.
            b.iter(|| black_box(dispatch::run(case.op.as_ref(), black_box(&inputs)).is_ok()));
        });
        group.finish();
    }
    criterion.final_summary();
    Ok(())
}
