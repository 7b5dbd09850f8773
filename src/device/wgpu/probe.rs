//! Start-up probes: the traps of real drivers, each with what the rules say and what this driver did.

use super::WgpuDevice;
use crate::device::{Binding, Device, Probe};
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Source, always};

const SOURCE: Source = Source::wgsl("probe.wgsl", include_str!("probe.wgsl"));

static PROBE: Kernel = Kernel {
    name: "probe",
    code: Code::Wgsl { source: SOURCE, entry: "probe", constants: &[] },
    dtypes: &[DType::F32],
    fits: always,
    plan: Plan::once,
};

/// Iterations asked for; software Vulkan leaves loops after 65,535 in all, without a word.
const LOOP: u32 = 70_000;
const NAN: u32 = 0x7fc0_0001;
/// 1e-40, below the smallest normal f32.
const SUBNORMAL: u32 = 71_362;
const FAR: u32 = 1_000_000_000;
/// Output words, and what fills them and the guard behind them before the run.
const WORDS: usize = 11;
const SENTINEL: u32 = 0xdead_beef;
const GUARDED: usize = 64;

/// The probes' findings, and how many loop iterations one invocation may be planned with.
pub fn run(device: &WgpuDevice) -> Result<(Vec<Probe>, Option<u64>)> {
    let input = [NAN, SUBNORMAL, 0, LOOP, (-3.0f32).to_bits(), FAR, 1];
    let x = device.alloc(input.len() * 4)?;
    let y = device.alloc(GUARDED * 4)?;
    device.upload(&x, 0, bytemuck::cast_slice(&input))?;
    device.upload(&y, 0, bytemuck::cast_slice(&[SENTINEL; GUARDED]))?;
    let arguments = [
        Binding { buffer: &x, offset: 0, bytes: input.len() * 4, write: false },
        Binding { buffer: &y, offset: 0, bytes: WORDS * 4, write: true },
    ];
    device.launch(&PROBE, DType::F32, &Launch::new([1, 1, 1], Params::new()), &arguments)?;
    let mut words = [0u32; GUARDED];
    device.download(&y, 0, bytemuck::cast_slice_mut(&mut words))?;
    Ok(judge(device, &words))
}

fn judge(device: &WgpuDevice, words: &[u32; GUARDED]) -> (Vec<Probe>, Option<u64>) {
    let mut probes = Vec::new();
    let mut add =
        |trap, expected: String, measured: String, sound| probes.push(Probe { trap, expected, measured, sound });
    let yes = |word: u32| if word == 1 { "true".to_string() } else { "false".to_string() };

    let state = (0..LOOP).fold(1u32, |s, _| s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    let whole = words[0] == LOOP && words[1] == state;
    add("T1 loop of 70,000 iterations", LOOP.to_string(), words[0].to_string(), whole);
    // A margin below the cut: loops that set up others spend the same budget.
    let loop_budget = (!whole).then(|| u64::from(words[0]).min(65_535) * 11 / 12);

    add("T2 NaN != NaN", yes(1), yes(words[2]), words[2] == 1);
    add("T2 NaN by its bits", yes(1), yes(words[3]), words[3] == 1);
    let kept = if words[4] == SUBNORMAL { "kept" } else { "flushed" };
    add("T3 subnormal times one", "kept".into(), kept.into(), words[4] == SUBNORMAL);
    add("T4 load out of bounds", "0".into(), words[9].to_string(), words[9] == 0);
    let untouched = words[WORDS..].iter().all(|&w| w == SENTINEL);
    add(
        "T4 memory behind the binding",
        "unchanged".into(),
        if untouched { "unchanged" } else { "changed" }.into(),
        untouched,
    );
    add("T4 load after a store out of bounds", "0".into(), words[10].to_string(), words[10] == 0);
    let limits = &device.info.limits;
    let megabytes = limits.binding_bytes >> 20;
    add("T7 storage binding", "at least 128 MiB".into(), format!("{megabytes} MiB"), megabytes >= 128);
    add("T9 0.0 / 0.0 is NaN", yes(1), yes(words[5]), words[5] == 1);
    add("T9 1.0 / 0.0", "inf".into(), f32::from_bits(words[6]).to_string(), words[6] == f32::INFINITY.to_bits());
    add("T9 1u / 0u", "1".into(), words[7].to_string(), words[7] == 1);
    add("T9 u32(-3.0)", "0".into(), words[8].to_string(), words[8] == 0);
    (probes, loop_budget)
}
