//! Timing one kernel record on one case: checked before and after, cold inputs, poisoned outputs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::device::{Device, Kind};
use crate::dispatch;
use crate::error::Result;
use crate::kernel::Kernel;
use crate::op::{Case, Input};
use crate::report::bench::{BenchRecord, TimingSource, quantile};
use crate::tensor::Tensor;
use crate::verify::draw;

/// Bytes of inputs and outputs at most that are kept to be cold.
const RING_BYTES: usize = 512 << 20;
/// The same on a GPU, whose caches hold up to a quarter of this.
const GPU_RING_BYTES: usize = 256 << 20;
/// Shortest sample; shorter kernels run several times in it. A GPU's own clock and its launches want a longer one.
const SAMPLE: Duration = Duration::from_micros(200);
const GPU_SAMPLE: Duration = Duration::from_millis(1);
/// A GPU is kept busy for this long before it is timed: clocks rise at first, and fall when the power limit is met.
const HEAT: Duration = Duration::from_millis(200);
/// Samples that drift by more than this between first and last third say more about the machine than about the kernel.
const DRIFT: f64 = 0.2;
/// Longest time two clocks may differ by, as a share, in samples long enough to tell.
const CLOCKS: f64 = 0.2;

/// When to stop sampling.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Wanted; a slow case ends earlier, at `time`, with at least `MINIMUM_SAMPLES`.
    pub samples: usize,
    pub time: Duration,
}

const MINIMUM_SAMPLES: usize = 5;

/// One set of arguments: inputs of its own, outputs filled with poison.
pub(super) struct Slot {
    inputs: Vec<Tensor>,
    pub(super) outputs: Vec<Tensor>,
}

/// A GPU that is no program on the CPU.
pub(super) fn hardware(device: &Arc<dyn Device>) -> bool {
    let info = device.info();
    matches!(info.kind, Kind::Cuda | Kind::Wgpu) && !info.software
}

/// Arguments that together do not fit the last-level cache, so that every run finds its own cold.
pub(super) struct Ring {
    slots: Vec<Slot>,
    next: usize,
}

pub(super) fn slot(case: &Case, device: &Arc<dyn Device>, encoded: &[Vec<u8>]) -> Result<Slot> {
    let upload = |(i, bytes): (usize, &Vec<u8>)| Tensor::from_bytes(device, case.inputs[i].meta, bytes);
    let inputs: Vec<Tensor> = encoded.iter().enumerate().map(upload).collect::<Result<_>>()?;
    let aliases = case.op.aliases();
    let make = |(index, meta): (usize, _)| match aliases.iter().find(|(output, _)| *output == index) {
        Some(&(_, input)) => Ok(inputs[input].clone()),
        None => poisoned(device, meta),
    };
    let outputs = case.op.infer(&case.metas())?.into_iter().enumerate().map(make).collect::<Result<_>>()?;
    Ok(Slot { inputs, outputs })
}

fn poisoned(device: &Arc<dyn Device>, meta: crate::shape::Meta) -> Result<Tensor> {
    Tensor::from_bytes(device, meta, &vec![0xFF; meta.bytes()])
}

impl Slot {
    pub(super) fn run(&self, kernel: &Kernel, case: &Case) -> Result<()> {
        dispatch::run_with(kernel, case.op.as_ref(), &self.inputs.iter().collect::<Vec<_>>(), &self.outputs)
    }

    /// Other inputs in the same memory, and poison in the outputs.
    pub(super) fn refill(&self, encoded: &[Vec<u8>]) -> Result<()> {
        for (tensor, bytes) in self.inputs.iter().zip(encoded) {
            tensor.assign(&Tensor::from_bytes(tensor.device(), tensor.meta(), bytes)?)?;
        }
        for output in &self.outputs {
            // Of an op in place, outputs are inputs.
            if !self.inputs.iter().any(|input| input.buffer().same(output.buffer())) {
                output.assign(&poisoned(output.device(), output.meta())?)?;
            }
        }
        Ok(())
    }

    /// Hash of the outputs, in order.
    fn hash(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for output in &self.outputs {
            hasher.update(&output.to_bytes()?);
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

impl Ring {
    pub(super) fn new(case: &Case, device: &Arc<dyn Device>, encoded: &[Vec<u8>]) -> Result<Self> {
        let out: usize = case.op.infer(&case.metas())?.iter().map(|m| m.bytes()).sum();
        let bytes = encoded.iter().map(Vec::len).sum::<usize>() + out;
        let floor = if hardware(device) { GPU_RING_BYTES } else { 0 };
        let wanted = (2 * last_level_cache()).max(floor).min(RING_BYTES);
        let count = wanted.div_ceil(bytes.max(1)).clamp(2, 64);
        Ok(Self { slots: (0..count).map(|_| slot(case, device, encoded)).collect::<Result<_>>()?, next: 0 })
    }

    pub(super) fn run(&mut self, kernel: &Kernel, case: &Case, runs: usize) -> Result<()> {
        for _ in 0..runs {
            self.slots[self.next].run(kernel, case)?;
            self.next = (self.next + 1) % self.slots.len();
        }
        Ok(())
    }
}

/// Size of the processor's largest cache, which stands in for a GPU's as well.
fn last_level_cache() -> usize {
    let read = |index: usize| {
        let text = std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size")).ok()?;
        let text = text.trim();
        let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let scale = match unit {
            "K" => 1 << 10,
            "M" => 1 << 20,
            _ => 1,
        };
        Some(digits.parse::<usize>().ok()? * scale)
    };
    (0..8).filter_map(read).max().unwrap_or(32 << 20)
}

/// The best rates this device reached in this run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ceiling {
    pub gflops: f64,
    pub bandwidth_gb: f64,
}

/// Inputs of a case of the table as bytes.
pub fn inputs(case: &Case, seed: u64) -> Vec<Vec<u8>> {
    case.inputs.iter().enumerate().map(|(i, input)| encoded(input, seed, i)).collect()
}

/// Input `index` of a case as bytes.
pub fn encoded(input: &Input, seed: u64, index: usize) -> Vec<u8> {
    input.meta.dtype.encode(&draw(input, seed, index))
}

/// Times `kernel` on `case` over the given inputs and fills the record's measured fields. The result must have been
/// verified against the reference already; here the timed memory must give the same bits before and after.
pub fn measure(
    record: &mut BenchRecord,
    case: &Case,
    encoded: &[Vec<u8>],
    kernel: &Kernel,
    device: &Arc<dyn Device>,
    effort: Effort,
) -> Result<()> {
    let mut hasher = blake3::Hasher::new();
    encoded.iter().for_each(|bytes| {
        hasher.update(bytes);
    });
    record.input_hash = hasher.finalize().to_hex().to_string();

    let first = slot(case, device, encoded)?;
    first.run(kernel, case)?;
    record.output_hash = first.hash()?;
    drop(first);

    let mut ring = Ring::new(case, device, encoded)?;
    record.memory = device.stats().bytes_live;
    let mut once = || {
        let start = Instant::now();
        ring.run(kernel, case, 1)?;
        device.sync()?;
        Ok(start.elapsed())
    };
    let gpu = hardware(device);
    let mut warm = (0..2).map(|_| once()).collect::<Result<Vec<_>>>()?;
    let begin = Instant::now();
    while gpu && begin.elapsed() < HEAT {
        warm.push(once()?);
    }
    record.warmups = warm.len() as u32;
    let sample = if gpu { GPU_SAMPLE } else { SAMPLE };
    let single = warm.into_iter().min().unwrap_or(sample).max(Duration::from_nanos(100));
    let runs = (sample.as_nanos() / single.as_nanos()).clamp(1, 1000) as usize;
    record.runs = runs as u32;
    record.timing_source = match device.info().kind {
        Kind::Cuda if gpu => TimingSource::Event,
        _ if device.info().features.timestamps => TimingSource::GpuTimestamp,
        _ => TimingSource::Wall,
    };

    let begin = Instant::now();
    let (mut timer, mut wall) = (0.0, 0.0);
    while record.samples_us.len() < effort.samples
        && (record.samples_us.len() < MINIMUM_SAMPLES || begin.elapsed() < effort.time)
    {
        let start = Instant::now();
        let seconds = device.elapsed(&mut || ring.run(kernel, case, runs))?;
        wall += start.elapsed().as_secs_f64();
        timer += seconds;
        record.samples_us.push(seconds * 1e6 / runs as f64);
    }
    record.error = doubts(&record.samples_us, timer, wall);
    record.voided = record.error.is_some();

    let last = slot(case, device, encoded)?;
    last.run(kernel, case)?;
    if last.hash()? != record.output_hash {
        record.passed = false;
        record.error = Some("the result after timing is not the one before".into());
    }
    // What was timed must be a result, too; in-place ops went on from it.
    if case.op.aliases().is_empty() {
        let timed = (ring.next + ring.slots.len() - 1) % ring.slots.len();
        if ring.slots[timed].hash()? != record.output_hash {
            record.passed = false;
            record.error = Some("the timed runs did not give the verified result".into());
        }
    }
    Ok(())
}

/// Why these samples should not be believed.
fn doubts(samples: &[f64], timer: f64, wall: f64) -> Option<String> {
    // Short samples differ by what handing over costs; long ones must agree.
    if wall / samples.len().max(1) as f64 > 0.02 && (timer - wall).abs() > CLOCKS * wall {
        return Some(format!("the device's timer counts {timer:.3} s where the wall clock counts {wall:.3} s"));
    }
    let third = samples.len() / 3;
    if third < 3 {
        return None;
    }
    let middle = |part: &[f64]| {
        let mut sorted = part.to_vec();
        sorted.sort_by(f64::total_cmp);
        quantile(&sorted, 0.5).unwrap_or(0.0)
    };
    let (early, late) = (middle(&samples[..third]), middle(&samples[samples.len() - third..]));
    let drift = (late / early.max(1e-12) - 1.0).abs();
    (drift > DRIFT).then(|| format!("times drifted by {:.0} % while sampling", drift * 100.0))
}

/// Bytes per second of the device's own copy, in GB/s: read and written bytes both count.
pub fn copy_rate(device: &Arc<dyn Device>) -> Result<f64> {
    // Several times what a GPU's caches hold, but no more than every adapter can bind.
    let bytes: usize = if device.info().kind == Kind::Cuda && hardware(device) { 1 << 30 } else { 64 << 20 };
    let (source, target) = (device.alloc(bytes)?, device.alloc(bytes)?);
    device.upload(&source, 0, &vec![1; bytes])?;
    device.upload(&target, 0, &vec![2; bytes])?;
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        best = best.min(device.elapsed(&mut || device.copy(&source, 0, &target, 0, bytes))?);
    }
    Ok(2.0 * bytes as f64 / best / 1e9)
}

/// Processor time of the calling thread, in seconds since any moment: what a device's own threads take from it, on software adapters
/// as many as there are cores, is not its. Where there is no such clock, the time on the wall.
fn own_time(began: Instant) -> f64 {
    #[cfg(unix)]
    if let Ok(spent) = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID) {
        return std::time::Duration::from(spent).as_secs_f64();
    }
    began.elapsed().as_secs_f64()
}

/// Host seconds per dispatched op, of its thread's own work: the median over blocks of a tiny op's calls; and the time on the wall
/// with the device's work waited for at the end of each block.
pub fn overhead(device: &Arc<dyn Device>, case: &Case) -> Result<(f64, f64)> {
    const BLOCK: usize = 500;
    const BLOCKS: usize = 41;
    let encoded: Vec<Vec<u8>> =
        case.inputs.iter().enumerate().map(|(i, input)| input.meta.dtype.encode(&draw(input, 1, i))).collect();
    let slot = slot(case, device, &encoded)?;
    let inputs: Vec<&Tensor> = slot.inputs.iter().collect();
    let (mut host, mut whole) = (Vec::new(), Vec::new());
    // The first block compiles and fills the pool.
    for block in 0..=BLOCKS {
        let start = Instant::now();
        let before = own_time(start);
        for _ in 0..BLOCK {
            dispatch::run(case.op.as_ref(), &inputs)?;
        }
        let queued = (own_time(start) - before) / BLOCK as f64;
        device.sync()?;
        if block > 0 {
            host.push(queued);
            whole.push(start.elapsed().as_secs_f64() / BLOCK as f64);
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        quantile(&times, 0.5).unwrap_or(0.0)
    };
    Ok((median(host), median(whole)))
}

/// Where the record's limits come from, for the file.
pub fn limits(device: &dyn Device) -> std::collections::BTreeMap<String, u64> {
    let l = &device.info().limits;
    if device.info().kind == Kind::Cpu {
        return Default::default();
    }
    [
        ("binding_bytes", l.binding_bytes),
        ("buffer_bytes", l.buffer_bytes),
        ("workgroup_bytes", l.workgroup_bytes.into()),
        ("invocations", l.invocations.into()),
        ("groups_per_dimension", l.groups_per_dimension.into()),
        ("loop_budget", l.loop_budget.unwrap_or(u64::MAX)),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_string(), value))
    .collect()
}
