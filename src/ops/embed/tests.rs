use std::sync::Arc;

use super::{Embed, EmbedBackward};
use crate::device::{self, Class, Device, Kind, Limits, NullDevice};
use crate::dispatch;
use crate::dtype::DType;
use crate::shape::Meta;
use crate::tensor::Tensor;

fn null(binding_bytes: u64) -> Arc<NullDevice> {
    Arc::new(NullDevice::new(Kind::Wgpu, Class::Cpu, Limits { binding_bytes, ..Limits::webgpu() }))
}

/// Windows of one argument cover every row once, start aligned, and stay within the limit.
#[test]
fn tables_larger_than_a_binding_are_covered_by_aligned_windows() {
    /// Elements that a binding holds here.
    const LIMIT: usize = 16_384;
    for dtype in DType::FLOATS {
        for (rows, dim) in [(1000, 64), (1000, 33), (4099, 7), (50_000, 1)] {
            let null = null((LIMIT * dtype.size()) as u64);
            let device: Arc<dyn Device> = null.clone();
            let table = Tensor::empty(&device, Meta::new(&[rows, dim], *dtype).unwrap()).unwrap();
            let ids = Tensor::empty(&device, Meta::new(&[9], DType::U32).unwrap()).unwrap();
            let dy = Tensor::empty(&device, Meta::new(&[9, dim], *dtype).unwrap()).unwrap();
            dispatch::run(&Embed, &[&table, &ids]).unwrap();
            dispatch::run(&EmbedBackward { rows }, &[&dy, &ids]).unwrap();
            let launches = null.take();
            for (argument, entry) in [(0, None), (2, None), (2, Some("embed_bwd_sum"))] {
                let mut next = 0;
                for (_, launch) in launches.iter().filter(|(_, l)| l.entry == entry) {
                    for w in launch.windows.iter().filter(|w| w.argument == argument) {
                        assert_eq!((w.offset, w.offset % 256), (next, 0));
                        assert!(w.bytes <= LIMIT * dtype.size());
                        next += w.bytes;
                    }
                }
                assert_eq!(next, rows * dim * dtype.size(), "argument {argument} of {entry:?}");
            }
        }
    }
}

#[test]
fn many_tokens_are_split_within_the_loop_budget() {
    let null = null(128 << 20);
    let device: Arc<dyn Device> = null.clone();
    let ids = Tensor::empty(&device, Meta::new(&[150_000], DType::U32).unwrap()).unwrap();
    let dy = Tensor::empty(&device, Meta::new(&[150_000, 2], DType::F32).unwrap()).unwrap();
    dispatch::run(&EmbedBackward { rows: 3 }, &[&dy, &ids]).unwrap();
    let launches = null.take();
    assert_eq!(launches.iter().filter(|(_, l)| l.entry == Some("embed_bwd_links")).count(), 3);
    assert!(launches.iter().all(|(_, l)| l.trips <= 60_000));
}

/// 33.6 million f32 are just above 128 MiB: the software driver's largest binding.
#[test]
fn a_table_above_one_binding_gives_the_same_rows() {
    const DIM: usize = 64;
    const ROWS: usize = 525_000;
    let open = |name: &str| match device::open(name) {
        Ok(device) => Some(device),
        Err(e) => {
            let required = std::env::var("ESPALIER_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|r| r == name), "{name} is required: {e}");
            eprintln!("skipped: {e}");
            None
        }
    };
    let ids = [0, 7, 524_287, 524_288, 524_289, 524_999, 525_000, 7];
    let pattern = |row: usize, d: usize| (row % 8191) as f32 + d as f32 / 128.0;
    for device in ["cpu", "wgpu"].into_iter().filter_map(open) {
        let values: Vec<f32> = (0..ROWS * DIM).map(|i| pattern(i / DIM, i % DIM)).collect();
        let table = Tensor::from_slice(&device, &[ROWS, DIM], &values).unwrap();
        drop(values);
        let tokens = Tensor::from_slice(&device, &[ids.len()], &ids.map(|id| id as u32)).unwrap();
        let y = dispatch::run_one(&Embed, &[&table, &tokens]).unwrap();
        drop(table);
        let rows = y.to_vec::<f32>().unwrap();
        for (row, &id) in rows.chunks(DIM).zip(&ids) {
            for (d, &x) in row.iter().enumerate() {
                assert_eq!(x, if id < ROWS { pattern(id, d) } else { 0.0 }, "id {id} column {d}");
            }
        }
        let dtable = dispatch::run_one(&EmbedBackward { rows: ROWS }, &[&y, &tokens]).unwrap().to_vec::<f32>().unwrap();
        for (row, sums) in dtable.chunks(DIM).enumerate() {
            let count = ids.iter().filter(|&&id| id == row).count() as f32;
            for (d, &sum) in sums.iter().enumerate() {
                assert!(sum == if count > 0.0 { count * pattern(row, d) } else { 0.0 }, "row {row} column {d}: {sum}");
            }
        }
    }
}
