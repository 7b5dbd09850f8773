//! `espalier doctor`: what this machine offers, how its drivers behave, and what is missing.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::{Global, say, say_json};
use crate::data::collect::languages;
use crate::device::cuda::compile::nvrtc;
use crate::device::{self, Adapter, CpuDevice, CudaDevice, Device, Info, Kind, WgpuDevice};
use crate::error::Result;
use crate::report::{Alignment, Table};

/// Where gettext catalogs are installed.
const LOCALE: &str = "/usr/share/locale";

#[derive(Serialize)]
struct Doctor {
    version: &'static str,
    devices: Vec<DeviceReport>,
    unavailable: Vec<Unavailable>,
    cuda: Option<Cuda>,
    /// Version of NVRTC, the compiler of the CUDA kernels, or why there is none.
    nvrtc: std::result::Result<String, String>,
    /// Languages with gettext catalogs, and how many.
    catalogs: BTreeMap<String, usize>,
    missing: Vec<Missing>,
}

#[derive(Serialize)]
struct DeviceReport {
    id: String,
    name: String,
    kind: &'static str,
    driver: String,
    /// Which WGSL kernels fit: `cpu`, `simt` or `coop`.
    class: &'static str,
    class_means: &'static str,
    software: bool,
    limits: BTreeMap<&'static str, Option<u64>>,
    features: BTreeMap<&'static str, bool>,
    probes: Vec<ProbeReport>,
}

#[derive(Serialize)]
struct ProbeReport {
    trap: &'static str,
    expected: String,
    measured: String,
    sound: bool,
}

#[derive(Serialize)]
struct Unavailable {
    device: String,
    reason: String,
}

#[derive(Serialize)]
struct Cuda {
    /// "12.4"; absent where the driver does not answer.
    version: Option<String>,
    devices: Vec<String>,
    reason: Option<String>,
}

#[derive(Serialize)]
struct Missing {
    what: &'static str,
    package: &'static str,
    needed_for: &'static str,
}

fn describe(info: &Info) -> DeviceReport {
    let l = &info.limits;
    // No limit is written as none, not as the largest integer.
    let bounded = |n: u64| (n != u64::MAX && n != u64::from(u32::MAX)).then_some(n);
    let some = |n: u32| (n > 0).then_some(u64::from(n));
    let f = &info.features;
    let limits = [
        ("binding_bytes", bounded(l.binding_bytes)),
        ("buffer_bytes", bounded(l.buffer_bytes)),
        ("workgroup_bytes", bounded(l.workgroup_bytes.into())),
        ("invocations", bounded(l.invocations.into())),
        ("groups_per_dimension", bounded(l.groups_per_dimension.into())),
        ("storage_buffers", bounded(l.storage_buffers.into())),
        ("loop_budget", l.loop_budget),
        ("largest_subgroup", some(f.largest_subgroup)),
        // Rows and columns.
        ("cooperative_matrix", some(f.cooperative_matrix)),
    ];
    let features = [
        ("f16", f.f16),
        ("i16", f.i16),
        ("i64", f.i64),
        ("subgroups", f.subgroups),
        ("timestamps", f.timestamps),
        ("cooperative_matrix", f.cooperative_matrix > 0),
    ];
    let probe = |p: &device::Probe| ProbeReport {
        trap: p.trap,
        expected: p.expected.clone(),
        measured: p.measured.clone(),
        sound: p.sound,
    };
    DeviceReport {
        id: info.id.clone(),
        name: info.name.clone(),
        kind: info.kind.name(),
        driver: info.driver.clone(),
        class: info.class.name(),
        class_means: if info.kind == Kind::Wgpu { info.class.meaning() } else { "" },
        software: info.software,
        limits: limits.into_iter().collect(),
        features: features.into_iter().collect(),
        probes: info.probes.iter().map(probe).collect(),
    }
}

fn examine() -> Doctor {
    let mut doctor = Doctor {
        version: env!("CARGO_PKG_VERSION"),
        devices: Vec::new(),
        unavailable: Vec::new(),
        cuda: None,
        nvrtc: nvrtc().map(|(major, minor)| format!("{major}.{minor}")).map_err(|e| e.to_string()),
        catalogs: languages(Path::new(LOCALE)),
        missing: Vec::new(),
    };
    match CpuDevice::new(None) {
        Ok(cpu) => doctor.devices.push(describe(cpu.info())),
        Err(e) => doctor.unavailable.push(Unavailable { device: "cpu".into(), reason: e.to_string() }),
    }
    let adapters = device::adapters();
    for Adapter { index, name, .. } in &adapters {
        match WgpuDevice::open(Some(&index.to_string())) {
            Ok(device) => doctor.devices.push(describe(device.info())),
            Err(e) => {
                doctor.unavailable.push(Unavailable { device: format!("wgpu:{index} {name}"), reason: e.to_string() });
            }
        }
    }
    if adapters.is_empty() {
        doctor.missing.push(Missing {
            what: "a Vulkan driver",
            package: "mesa-vulkan-drivers libvulkan1",
            needed_for: "--device wgpu, in software where there is no GPU",
        });
    }
    if device::cuda_driver().is_some() {
        match CudaDevice::new(0) {
            Ok(device) => doctor.devices.push(describe(device.info())),
            Err(e) => doctor.unavailable.push(Unavailable { device: "cuda".into(), reason: e.to_string() }),
        }
    }
    #[cfg(unix)]
    match device::CudaHostDevice::new(80) {
        Ok(device) => doctor.devices.push(describe(device.info())),
        Err(_) => doctor.missing.push(Missing {
            what: "a C++ compiler",
            package: "g++",
            needed_for: "--device cuda-host, which checks the CUDA kernels without a GPU",
        }),
    }
    if doctor.nvrtc.is_err() {
        doctor.missing.push(Missing {
            what: "NVRTC",
            package: "none; scripts/nvrtc.sh fetches it from the Python registry",
            needed_for: "--device cuda and `kernels cuda-check`",
        });
    }
    doctor.cuda = device::cuda_driver().map(|driver| match driver {
        Ok(d) => Cuda {
            version: Some(format!("{}.{}", d.version / 1000, d.version % 1000 / 10)),
            devices: d.devices,
            reason: None,
        },
        Err(reason) => Cuda { version: None, devices: Vec::new(), reason: Some(reason) },
    });
    if doctor.catalogs.is_empty() {
        doctor.missing.push(Missing {
            what: "gettext catalogs (/usr/share/locale/*/LC_MESSAGES/*.mo)",
            package: "coreutils, git and other programs with their locales kept; see `espalier data collect`",
            needed_for: "training on installed real text; the embedded set needs nothing",
        });
    }
    doctor
}

pub fn run(global: &Global) -> Result<()> {
    let doctor = examine();
    if global.json() {
        say_json(&doctor);
        return Ok(());
    }
    say(format!("espalier {}", doctor.version));
    for device in &doctor.devices {
        print_device(device);
    }
    for Unavailable { device, reason } in &doctor.unavailable {
        say(format!("\n{device}: not available: {reason}"));
    }
    say("");
    match &doctor.cuda {
        None => say("cuda: no NVIDIA driver"),
        Some(Cuda { version: Some(version), devices, .. }) => {
            say(format!("cuda: driver {version}, {} devices ({})", devices.len(), devices.join(", ")));
        }
        Some(Cuda { reason, .. }) => {
            say(format!("cuda: driver does not answer: {}", reason.as_deref().unwrap_or("no reason")))
        }
    }
    match &doctor.nvrtc {
        Ok(version) => say(format!("nvrtc: {version}")),
        Err(_) => say("nvrtc: not found"),
    }
    let total: usize = doctor.catalogs.values().sum();
    let mut most: Vec<_> = doctor.catalogs.iter().collect();
    most.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), name.as_str()));
    let named: Vec<String> = most.iter().take(8).map(|(name, count)| format!("{name} {count}")).collect();
    say(format!("data: {total} gettext catalogs in {} languages ({})", doctor.catalogs.len(), named.join(", ")));
    for Missing { what, package, needed_for } in &doctor.missing {
        say(format!("missing: {what}; Debian and Ubuntu: {package}; for {needed_for}"));
    }
    Ok(())
}

fn print_device(device: &DeviceReport) {
    say(format!("\n{}: {}", device.id, device.name));
    say(format!("  driver    {}", device.driver));
    let meaning = if device.class_means.is_empty() { String::new() } else { format!(" ({})", device.class_means) };
    let named = if device.software { ", used only when named" } else { "" };
    say(format!("  class     {}{meaning}{named}", device.class));
    let limit = |(name, value): (&&str, &Option<u64>)| value.map(|v| format!("{name} {v}"));
    let limits: Vec<String> = device.limits.iter().filter_map(limit).collect();
    say(format!("  limits    {}", if limits.is_empty() { "none".to_string() } else { limits.join(", ") }));
    let features: Vec<&str> = device.features.iter().filter(|(_, on)| **on).map(|(name, _)| *name).collect();
    say(format!("  features  {}", features.join(", ")));
    if device.probes.is_empty() {
        return;
    }
    let mut table = Table::new(&[
        ("  probe", Alignment::Left),
        ("expected", Alignment::Left),
        ("measured", Alignment::Left),
        ("", Alignment::Left),
    ]);
    for p in &device.probes {
        let verdict = if p.sound { "" } else { "TRAP: kernels avoid it" };
        table.row(vec![format!("  {}", p.trap), p.expected.clone(), p.measured.clone(), verdict.to_string()]);
    }
    say(table.terminal());
}
