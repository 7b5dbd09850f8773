//! What a WGSL file says about itself: its entry points, what each binds, and errors in the file's own lines.

use naga::valid::ModuleInfo;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Constants, File, Part, assemble};

/// One storage binding of an entry point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Position among a kernel's arguments.
    pub binding: u32,
    pub name: String,
    /// Declared `read_write`.
    pub writable: bool,
    /// Some statement reachable from the entry writes it.
    pub writes: bool,
}

#[derive(Clone, Debug)]
pub struct EntryPoint {
    pub name: String,
    /// By binding index; only what the entry uses.
    pub slots: Vec<Slot>,
    /// Bytes of the parameter block up to the last word it reads; 0 when it reads none.
    pub parameter_bytes: u32,
}

/// A kernel file, joined with the prelude of one element type, parsed and validated without a device.
pub struct Shader {
    pub source: String,
    pub entries: Vec<EntryPoint>,
    pub parts: Vec<Part>,
}

impl Shader {
    pub fn parse(file: File, element: DType) -> Result<Self> {
        Self::parse_module(file, element).map(|(shader, ..)| shader)
    }

    /// With what the text became.
    pub(super) fn parse_module(file: File, element: DType) -> Result<(Self, naga::Module, ModuleInfo)> {
        let (source, parts) = assemble(file, element)?;
        let refused = |location: Option<naga::SourceLocation>, log| {
            let (at, line) = place(&parts, location.map_or(0, |l| l.line_number));
            Error::Compile { kernel: file.name.into(), file: at, line, log }
        };
        let module = naga::front::wgsl::parse_str(&source)
            .map_err(|e| refused(e.location(&source), e.emit_to_string(&source)))?;
        let info =
            validator().validate(&module).map_err(|e| refused(e.location(&source), e.emit_to_string(&source)))?;
        let entries = (0..module.entry_points.len()).map(|i| entry(&module, &info, i)).collect();
        Ok((Self { source, entries, parts }, module, info))
    }

    /// Invocations of a group, and bytes of the memory that they share, once `constants` are put in.
    pub fn workgroup(&self, name: &str, constants: Constants) -> Result<(u32, u32)> {
        let refused = |log: String| Error::Compile { kernel: name.into(), file: String::new(), line: 0, log };
        let module = naga::front::wgsl::parse_str(&self.source).map_err(|e| refused(e.to_string()))?;
        let info = validator().validate(&module).map_err(|e| refused(e.to_string()))?;
        let constants = constants.iter().map(|(name, value)| (name.to_string(), *value)).collect();
        let entry = Some((naga::ShaderStage::Compute, name));
        let (module, _) = naga::back::pipeline_constants::process_overrides(&module, &info, entry, &constants)
            .map_err(|e| refused(e.to_string()))?;
        // What the entry does not reach is gone.
        let shared = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
        let bytes = shared.map(|(_, v)| module.types[v.ty].inner.size(module.to_ctx())).sum();
        Ok((module.entry_points.iter().map(|p| p.workgroup_size.iter().product::<u32>()).sum(), bytes))
    }

    pub fn entry(&self, name: &str) -> Option<&EntryPoint> {
        self.entries.iter().find(|e| e.name == name)
    }
}

fn validator() -> naga::valid::Validator {
    naga::valid::Validator::new(naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all())
}

/// The file and its line that a line of the joined source is; 0 is of no line in particular.
pub(super) fn place(parts: &[Part], line: u32) -> (String, u32) {
    let part = parts.iter().rfind(|part| part.lines_before < line).or(parts.last());
    part.map_or_else(Default::default, |part| (part.file.into(), line.saturating_sub(part.lines_before)))
}

/// An error of a file that has no line.
pub(super) fn compile_error(file: &str, log: String) -> Error {
    Error::Compile { kernel: file.into(), file: file.into(), line: 0, log }
}

fn entry(module: &naga::Module, info: &ModuleInfo, index: usize) -> EntryPoint {
    let point = &module.entry_points[index];
    let uses = info.get_entry_point(index);
    let mut found = EntryPoint { name: point.name.clone(), slots: Vec::new(), parameter_bytes: 0 };
    for (handle, variable) in module.global_variables.iter() {
        if uses[handle].is_empty() {
            continue;
        }
        match (&variable.space, &variable.binding) {
            (naga::AddressSpace::Storage { access }, Some(binding)) => found.slots.push(Slot {
                binding: binding.binding,
                name: variable.name.clone().unwrap_or_default(),
                writable: access.contains(naga::StorageAccess::STORE),
                writes: uses[handle].contains(naga::valid::GlobalUse::WRITE),
            }),
            (naga::AddressSpace::Immediate, _) => {
                let reads = |slot: &u32| {
                    uses.immediate_slots_used.contains(naga::valid::ImmediateSlots::from_range(4 * slot, 4))
                };
                found.parameter_bytes = (0..64).rfind(reads).map_or(0, |slot| 4 * (slot + 1));
            }
            _ => {}
        }
    }
    found.slots.sort_by_key(|s| s.binding);
    found
}
