//! What a WGSL file says about itself: its entry points, what each binds, and errors in the file's own lines.

use naga::valid::ModuleInfo;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{File, Part, assemble};

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
    pub workgroup: [u32; 3],
    /// By binding index; only what the entry uses.
    pub slots: Vec<Slot>,
    /// Bytes of the parameter block up to the last word it reads; 0 when it reads none.
    pub parameter_bytes: u32,
    /// Shared memory of one group.
    pub workgroup_bytes: u32,
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
        let mut validator =
            naga::valid::Validator::new(naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all());
        let info = validator.validate(&module).map_err(|e| refused(e.location(&source), e.emit_to_string(&source)))?;
        let entries = (0..module.entry_points.len()).map(|i| entry(&module, &info, i)).collect();
        Ok((Self { source, entries, parts }, module, info))
    }

    pub fn entry(&self, name: &str) -> Option<&EntryPoint> {
        self.entries.iter().find(|e| e.name == name)
    }
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
    let mut found = EntryPoint {
        name: point.name.clone(),
        workgroup: point.workgroup_size,
        slots: Vec::new(),
        parameter_bytes: 0,
        workgroup_bytes: 0,
    };
    for (handle, variable) in module.global_variables.iter() {
        if uses[handle].is_empty() {
            continue;
        }
        let bytes = || module.types[variable.ty].inner.try_size(module.to_ctx()).unwrap_or(0);
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
            (naga::AddressSpace::WorkGroup, _) => found.workgroup_bytes += bytes(),
            _ => {}
        }
    }
    found.slots.sort_by_key(|s| s.binding);
    found
}
