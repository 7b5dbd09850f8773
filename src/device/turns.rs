//! Times of works that take turns on a device, so that none of them has the quieter moments: how ways to compute the same are
//! compared.

use std::sync::Arc;
use std::time::Instant;

use super::Device;
use crate::error::Result;

/// Shortest sample in seconds; shorter works run several times in it.
const SAMPLE: f64 = 2e-4;

/// Seconds of one run of each work, `[work][round]`, warm. All works run once in each round, in their order.
///
/// # Errors
/// What a work returns, or the device.
pub fn take_turns(device: &Arc<dyn Device>, works: &[&dyn Fn() -> Result<()>], rounds: usize) -> Result<Vec<Vec<f64>>> {
    let time = |work: &dyn Fn() -> Result<()>, runs: usize| -> Result<f64> {
        device.sync()?;
        let start = Instant::now();
        (0..runs).try_for_each(|_| work())?;
        device.sync()?;
        Ok(start.elapsed().as_secs_f64() / runs as f64)
    };
    let mut runs = Vec::new();
    for work in works {
        // The first compiles and fills the pool.
        time(work, 1)?;
        runs.push((SAMPLE / time(work, 1)?).ceil().clamp(1.0, 1000.0) as usize);
    }
    let mut times = vec![Vec::with_capacity(rounds); works.len()];
    for _ in 0..rounds {
        for ((work, runs), times) in works.iter().zip(&runs).zip(&mut times) {
            times.push(time(work, *runs)?);
        }
    }
    Ok(times)
}

/// The middle of times, the upper one of two.
pub fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}
