//! Compiled pipelines, kept by file, entry point, element type and constants.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::adapter::PARAMETER_BYTES;
use super::bounds::{self, Site};
use super::shader::{Shader, compile_error, place};
use super::{Checks, Gpu, scoped};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Constants, File};

#[derive(Clone, Copy)]
struct Key {
    file: &'static str,
    /// Address of the kernel's text: two texts under one file name are two kernels.
    text: usize,
    entry: &'static str,
    element: DType,
    constants: Constants,
}

impl Key {
    fn bits(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.constants.iter().map(|(name, value)| (*name, value.to_bits()))
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        (self.file, self.text, self.entry, self.element) == (other.file, other.text, other.entry, other.element)
            && self.bits().eq(other.bits())
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.file, self.text, self.entry, self.element).hash(state);
        self.bits().for_each(|b| b.hash(state));
    }
}

/// What a bind group shows: memory, offset and size per binding.
pub type Shown = Vec<(u64, usize, usize)>;

pub struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
    /// Argument indices that the entry binds.
    pub bindings: Vec<u32>,
    pub parameter_bytes: u32,
    module: Arc<Module>,
    /// Bind groups by what they show. A training step takes the same memory from the pool as the step before, so
    /// nearly all of its launches find theirs.
    groups: Mutex<HashMap<Shown, wgpu::BindGroup>>,
}

/// Bind groups kept per pipeline; they keep their memory alive, so the number is bounded.
const GROUPS: usize = 1024;

impl Pipeline {
    pub fn group(&self, shown: Shown, make: impl FnOnce() -> Result<wgpu::BindGroup>) -> Result<wgpu::BindGroup> {
        if let Some(found) = lock(&self.groups).get(&shown) {
            return Ok(found.clone());
        }
        let group = make()?;
        let mut groups = lock(&self.groups);
        if groups.len() >= GROUPS {
            groups.clear();
        }
        groups.insert(shown, group.clone());
        Ok(group)
    }

    /// What a watched launch noted, as an error of the first place that went past an end.
    pub fn judge(&self, kernel: &str, notes: &[u32]) -> Result<()> {
        let Some((site, &past)) = self.module.sites.iter().zip(notes).find(|(_, past)| **past > 0) else {
            return Ok(());
        };
        let (file, line) = place(&self.module.shader.parts, site.line);
        Err(Error::Bounds { kernel: kernel.into(), file, line, array: site.array.clone(), past })
    }
}

struct Module {
    shader: Shader,
    compiled: wgpu::ShaderModule,
    /// What is watched where [`Checks::Report`] is on.
    sites: Vec<Site>,
}

/// File name, address of its text, element type.
type ModuleKey = (&'static str, usize, DType);

#[derive(Default)]
pub struct Pipelines {
    modules: Mutex<HashMap<ModuleKey, Arc<Module>>>,
    pipelines: Mutex<HashMap<Key, Arc<Pipeline>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pipelines {
    /// The pipeline of `entry` in a kernel file, compiled at its first use.
    pub fn get(
        &self,
        gpu: &Gpu,
        file: File,
        entry: &'static str,
        element: DType,
        constants: Constants,
    ) -> Result<Arc<Pipeline>> {
        let key = Key { file: file.name, text: file.text.as_ptr() as usize, entry, element, constants };
        if let Some(found) = lock(&self.pipelines).get(&key) {
            return Ok(found.clone());
        }
        let module = self.module(gpu, file, element)?;
        let pipeline = Arc::new(build(gpu, module, file.name, entry, constants)?);
        lock(&self.pipelines).insert(key, pipeline.clone());
        Ok(pipeline)
    }

    fn module(&self, gpu: &Gpu, file: File, element: DType) -> Result<Arc<Module>> {
        let key = (file.name, file.text.as_ptr() as usize, element);
        if let Some(found) = lock(&self.modules).get(&key) {
            return Ok(found.clone());
        }
        let (shader, mut parsed, info) = Shader::parse_module(file, element)?;
        let mut sites = Vec::new();
        let source = match gpu.checks {
            Checks::Report => {
                sites = bounds::watch(file.name, &shader.source, &mut parsed, &info)?;
                wgpu::ShaderSource::Naga(std::borrow::Cow::Owned(parsed))
            }
            _ => wgpu::ShaderSource::Wgsl(shader.source.as_str().into()),
        };
        let descriptor = wgpu::ShaderModuleDescriptor { label: Some(file.name), source };
        let compiled = scoped(&gpu.device, || match gpu.checks {
            // What divides stays checked: a zero is cheap to look for, and extents may be 0.
            Checks::Trust if file.own => {
                let checks =
                    wgpu::ShaderRuntimeChecks { int_div_checks: true, ..wgpu::ShaderRuntimeChecks::unchecked() };
                // SAFETY: these shaders reach past the end of no array: `Checks::Report` finds nothing in any case of the table,
                // on all rungs, also in windows and without a bound on loops (tests/table.rs), and indices that are data are
                // clamped. Matrix units that no adapter of the tests has index as their emulation does, or as newer software Vulkan
                // does, where both are watched. Loops count to an extent.
                unsafe { gpu.device.create_shader_module_trusted(descriptor, checks) }
            }
            _ => gpu.device.create_shader_module(descriptor),
        })
        .map_err(|e| gpu.compile_failure(e, file.name))?;
        let module = Arc::new(Module { shader, compiled, sites });
        lock(&self.modules).insert(key, module.clone());
        Ok(module)
    }
}

fn build(gpu: &Gpu, module: Arc<Module>, file: &str, entry: &'static str, constants: Constants) -> Result<Pipeline> {
    let Some(point) = module.shader.entry(entry) else {
        return Err(compile_error(file, format!("no entry point {entry}")));
    };
    if point.parameter_bytes > PARAMETER_BYTES {
        return Err(Error::Launch {
            kernel: entry.into(),
            what: "bytes of the parameter block",
            got: point.parameter_bytes.into(),
            limit: PARAMETER_BYTES.into(),
        });
    }
    let entries: Vec<wgpu::BindGroupLayoutEntry> = point
        .slots
        .iter()
        .map(|slot| wgpu::BindGroupLayoutEntry {
            binding: slot.binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Storage { read_only: !slot.writable },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        })
        .collect();
    let built = scoped(&gpu.device, || {
        let label = Some(entry);
        let layout = gpu.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
        let notes = gpu.notes.as_ref().map(|notes| &notes.layout);
        let layouts = [Some(&layout), notes];
        let pipeline_layout = gpu.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &layouts[..1 + usize::from(notes.is_some())],
            // One size for all, so that changing pipelines keeps layouts compatible.
            immediate_size: PARAMETER_BYTES,
        });
        let pipeline = gpu.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module.compiled,
            entry_point: Some(entry),
            compilation_options: wgpu::PipelineCompilationOptions { constants, ..Default::default() },
            cache: gpu.kept.as_ref().map(super::kept::Kept::cache),
        });
        (layout, pipeline)
    });
    let (layout, pipeline) = built.map_err(|e| gpu.compile_failure(e, file))?;
    let bindings = point.slots.iter().map(|s| s.binding).collect();
    let parameter_bytes = point.parameter_bytes;
    Ok(Pipeline { pipeline, layout, bindings, parameter_bytes, module, groups: Mutex::default() })
}
