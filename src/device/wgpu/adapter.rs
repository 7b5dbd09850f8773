//! Finding an adapter, and what it says about itself.

use crate::device::{Class, Features, Info, Kind, Limits};
use crate::error::{Error, Result};

/// Bytes of the parameter block every kernel may use.
pub const PARAMETER_BYTES: u32 = 64;

/// One adapter the system offers, opened or not.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// Position in `wgpu:INDEX`.
    pub index: usize,
    pub name: String,
    pub driver: String,
    /// "Vulkan", "Metal", "Dx12".
    pub backend: String,
    /// "discrete GPU", "integrated GPU", "virtual GPU", "software", "other".
    pub kind: &'static str,
    pub software: bool,
}

/// Every adapter, in the order that `wgpu:INDEX` counts.
pub fn adapters() -> Vec<Adapter> {
    enumerate().iter().enumerate().map(|(index, a)| describe(index, &a.get_info())).collect()
}

/// Without `XDG_RUNTIME_DIR` (containers, services) Mesa's device selection layer looks for a compositor and complains on
/// standard error each time adapters are listed. Nothing is shown on a screen here: the layer is told to stay away.
/// Does nothing once the process has a second thread.
pub fn quiet_loader() {
    let single = std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1);
    if single && std::env::var_os("XDG_RUNTIME_DIR").is_none() && std::env::var_os("NODEVICE_SELECT").is_none() {
        // SAFETY: no other thread exists that could read the environment meanwhile.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
}

fn enumerate() -> Vec<wgpu::Adapter> {
    let backends = wgpu::Backends::PRIMARY;
    let descriptor = wgpu::InstanceDescriptor {
        backends,
        // No validation layers: they are not installed where this runs, and wgpu checks every call itself.
        flags: wgpu::InstanceFlags::empty(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    };
    pollster::block_on(wgpu::Instance::new(descriptor).enumerate_adapters(backends))
}

fn describe(index: usize, info: &wgpu::AdapterInfo) -> Adapter {
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => "discrete GPU",
        wgpu::DeviceType::IntegratedGpu => "integrated GPU",
        wgpu::DeviceType::VirtualGpu => "virtual GPU",
        wgpu::DeviceType::Cpu => "software",
        wgpu::DeviceType::Other => "other",
    };
    Adapter {
        index,
        name: info.name.clone(),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_string(),
        backend: format!("{:?}", info.backend),
        kind,
        software: info.device_type == wgpu::DeviceType::Cpu,
    }
}

/// What the person asked for.
#[derive(Clone, Copy, Debug)]
pub enum Wanted<'a> {
    /// A hardware adapter, else a software one.
    Any,
    Hardware,
    /// An index, or part of a name, ignoring case.
    Named(&'a str),
}

/// The adapter that answers to `wanted`, with its index.
pub fn select(wanted: Wanted) -> Result<(usize, wgpu::Adapter)> {
    let mut found = enumerate();
    let known: Vec<Adapter> = found.iter().enumerate().map(|(i, a)| describe(i, &a.get_info())).collect();
    let hardware = known.iter().position(|a| !a.software);
    let index = match wanted {
        Wanted::Any => hardware.or(if known.is_empty() { None } else { Some(0) }),
        Wanted::Hardware => hardware,
        Wanted::Named(name) => match name.parse::<usize>() {
            Ok(index) => (index < known.len()).then_some(index),
            Err(_) => known.iter().position(|a| a.name.to_lowercase().contains(&name.to_lowercase())),
        },
    };
    match index {
        Some(index) => Ok((index, found.swap_remove(index))),
        None => Err(unavailable(wanted, &known)),
    }
}

fn unavailable(wanted: Wanted, known: &[Adapter]) -> Error {
    let device = match wanted {
        Wanted::Named(name) => format!("wgpu:{name}"),
        _ => "wgpu".to_string(),
    };
    let list =
        || known.iter().map(|a| format!("wgpu:{} {} ({})", a.index, a.name, a.kind)).collect::<Vec<_>>().join(", ");
    let reason = match (known.is_empty(), wanted) {
        (true, _) => {
            "no graphics driver answered; on Debian and Ubuntu the packages libvulkan1 and mesa-vulkan-drivers bring a \
             software Vulkan driver"
                .to_string()
        }
        (false, Wanted::Named(_)) => format!("no such adapter; there are: {}", list()),
        (false, _) => format!("no hardware adapter; a software one is used only when named: {}", list()),
    };
    Error::NotAvailable { device, reason }
}

/// An opened adapter: the handles, and the description the rest of the program plans with.
pub struct Opened {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub info: Info,
    /// Binding offsets must be multiples of this.
    pub alignment: u32,
}

/// Requests a device with all the adapter's limits and the features that kernels know how to use.
pub fn open(index: usize, adapter: &wgpu::Adapter) -> Result<Opened> {
    let description = describe(index, &adapter.get_info());
    let id = format!("wgpu:{index}");
    let unavailable = |reason: String| Error::NotAvailable { device: id.clone(), reason };
    let (offered, limits) = (adapter.features(), adapter.limits());
    if !offered.contains(wgpu::Features::IMMEDIATES) || limits.max_immediate_size < PARAMETER_BYTES {
        return Err(unavailable(format!(
            "{} takes {} bytes of immediate data, kernels need {PARAMETER_BYTES}",
            description.name, limits.max_immediate_size
        )));
    }
    let wanted = wgpu::Features::IMMEDIATES
        | wgpu::Features::SHADER_F16
        | wgpu::Features::SHADER_I16
        | wgpu::Features::SHADER_INT64
        | wgpu::Features::SUBGROUP
        | wgpu::Features::PIPELINE_CACHE
        | wgpu::Features::TIMESTAMP_QUERY
        | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS
        | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
    let mut required = offered & wanted;
    let cooperative_matrix = cooperative_matrix(adapter);
    if cooperative_matrix == 0 {
        required.remove(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
    }
    let experimental_features = if cooperative_matrix > 0 {
        // SAFETY: cooperative matrices are used only by shaders of ours (`shaders/coop.wgsl`), which are tested on software Vulkan.
        unsafe { wgpu::ExperimentalFeatures::enabled() }
    } else {
        wgpu::ExperimentalFeatures::disabled()
    };
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("espalier"),
        required_features: required,
        required_limits: limits.clone(),
        experimental_features,
        memory_hints: wgpu::MemoryHints::Performance,
        trace: wgpu::Trace::Off,
    };
    let (device, queue) =
        pollster::block_on(adapter.request_device(&descriptor)).map_err(|e| unavailable(e.to_string()))?;
    let class = match (description.software, cooperative_matrix > 0) {
        (true, _) => Class::Cpu,
        (false, true) => Class::Coop,
        (false, false) => Class::Simt,
    };
    let (least, most) = (adapter.get_info().subgroup_min_size, adapter.get_info().subgroup_max_size);
    let subgroup_size = if required.contains(wgpu::Features::SUBGROUP) && least == most { least } else { 0 };
    let timestamps = wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS;
    let info = Info {
        threads: 1,
        kind: Kind::Wgpu,
        id,
        name: description.name,
        driver: format!("{}, {}", description.driver, description.backend),
        class,
        software: description.software,
        limits: Limits {
            binding_bytes: limits.max_storage_buffer_binding_size,
            buffer_bytes: limits.max_buffer_size,
            workgroup_bytes: limits.max_compute_workgroup_storage_size,
            invocations: limits.max_compute_invocations_per_workgroup,
            groups_per_dimension: limits.max_compute_workgroups_per_dimension,
            storage_buffers: limits.max_storage_buffers_per_shader_stage,
            // Until the probes have counted.
            loop_budget: Some(60_000),
        },
        features: Features {
            f16: required.contains(wgpu::Features::SHADER_F16),
            i16: required.contains(wgpu::Features::SHADER_I16),
            i64: required.contains(wgpu::Features::SHADER_INT64),
            subgroups: required.contains(wgpu::Features::SUBGROUP),
            subgroup_size,
            largest_subgroup: most,
            timestamps: required.contains(timestamps),
            cooperative_matrix,
            arch: 0,
        },
        probes: Vec::new(),
    };
    Ok(Opened { device, queue, info, alignment: limits.min_storage_buffer_offset_alignment })
}

/// Rows and columns of the largest square matrices of f16 that are multiplied into f32; 0 where there are none.
fn cooperative_matrix(adapter: &wgpu::Adapter) -> u32 {
    use wgpu::CooperativeScalarType::{F16, F32};
    if !adapter.features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SUBGROUP) {
        return 0;
    }
    let offered = adapter.cooperative_matrix_properties();
    let has = |size: &u32| {
        let one = |p: &wgpu::CooperativeMatrixProperties| {
            (p.m_size, p.n_size, p.k_size) == (*size, *size, *size) && p.ab_type == F16 && p.cr_type == F32
        };
        offered.iter().any(one)
    };
    [16, 8].into_iter().find(has).unwrap_or(0)
}
