//! WGSL without a device: every file under every prelude, headers true to the code, the geometry of every case's plan
//! within WebGPU's default limits.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use espalier::device::shader::{EntryPoint, Shader};
use espalier::device::{Class, Device, Kind, Limits, NullDevice};
use espalier::dispatch;
use espalier::kernel::{Entry, File, Kernel, Launch, Params, Plan, Problem, check_launch};
use espalier::op::Case;
use espalier::ops::FAMILIES;
use espalier::{DType, Meta};

fn cases() -> impl Iterator<Item = Case> {
    FAMILIES.iter().flat_map(|f| (f.cases)())
}

/// Kernel files by name, with the element types that records run them for.
fn files() -> BTreeMap<&'static str, (File, BTreeSet<DType>)> {
    let mut files: BTreeMap<&str, (File, BTreeSet<DType>)> = BTreeMap::new();
    let mut add = |kernel: &Kernel| {
        if let Some(Entry { file, .. }) = kernel.wgsl() {
            files.entry(file.name).or_insert((file, BTreeSet::new())).1.extend(kernel.dtypes);
        }
    };
    cases().for_each(|case| case.op.kernels().iter().for_each(&mut add));
    files
}

#[test]
fn every_shader_is_valid_under_every_prelude() {
    let mut entries = BTreeMap::new();
    for (file, (whole, types)) in files() {
        // The body with the f32 prelude is valid WGSL whatever the records say.
        for element in types.union(&[DType::F32].into()).copied() {
            let shader = Shader::parse(whole, element).unwrap_or_else(|e| panic!("{file} {element}: {e}"));
            let written: BTreeSet<&str> =
                shader.entries.iter().flat_map(|e| &e.slots).filter(|s| s.writes).map(|s| s.name.as_str()).collect();
            // Under a prelude that no record asks for, tiles may be larger than any that is launched.
            if types.contains(&element) {
                shader.entries.iter().for_each(|entry| check_entry(file, entry, &written));
            }
            entries.insert((file, element), shader);
        }
    }
    // Every record's entry point exists, and with its constants asks for what every WebGPU implementation grants.
    let mut seen = BTreeSet::new();
    for case in cases() {
        for kernel in case.op.kernels() {
            let Some(Entry { file, entry, constants }) = kernel.wgsl() else { continue };
            for element in kernel.dtypes {
                if !seen.insert((kernel.label(), file.name, *element)) {
                    continue;
                }
                let place = format!("{} of {element}", kernel.label());
                let shader = &entries[&(file.name, *element)];
                assert!(shader.entry(entry).is_some(), "{place}: {} has no entry {entry}", file.name);
                // Launches may name other entries of the file.
                for EntryPoint { name, .. } in &shader.entries {
                    let (invocations, bytes) =
                        shader.workgroup(name, constants).unwrap_or_else(|e| panic!("{place}: {name}: {e}"));
                    assert!(invocations <= 256, "{place}: {name}: {invocations} invocations");
                    assert!(bytes <= 16 << 10, "{place}: {name}: {bytes} bytes of workgroup memory");
                }
            }
        }
    }
}

/// Limits that every WebGPU implementation grants.
fn check_entry(file: &str, entry: &EntryPoint, written: &BTreeSet<&str>) {
    let name = format!("{file}: {}", entry.name);
    assert!(entry.slots.len() <= 8, "{name}: {} storage buffers", entry.slots.len());
    assert!(entry.parameter_bytes as usize <= Params::MAX * 4, "{name}: {} bytes of parameters", entry.parameter_bytes);
    assert!(entry.slots.iter().any(|s| s.writes), "{name}: writes nothing");
    for slot in &entry.slots {
        // Scratch that one entry writes and the next reads is declared once.
        let wanted = !slot.writable || written.contains(slot.name.as_str());
        assert!(wanted, "{name}: {} is read_write and never written", slot.name);
        assert_eq!(entry.slots.iter().filter(|s| s.binding == slot.binding).count(), 1, "{name}: two at one binding");
    }
}

const FIELDS: [&str; 10] = ["op", "math", "grad", "shapes", "layout", "launch", "cost", "numerics", "source", "rungs"];

/// The header's fields, each with its continuation lines.
fn header(text: &str) -> Vec<(String, String)> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().map_while(|l| l.strip_prefix("//")) {
        let named = line.split_once(':').filter(|(name, _)| FIELDS.contains(&name.trim()));
        match (named, fields.last_mut()) {
            (Some((name, rest)), _) => fields.push((name.trim().to_string(), rest.trim().to_string())),
            (None, Some((_, value))) => value.push_str(&format!(" {}", line.trim())),
            (None, None) => {}
        }
    }
    fields
}

#[test]
fn headers_have_their_fields_and_name_every_buffer() {
    let mut wrong = Vec::new();
    for (file, (whole, types)) in files() {
        let fields = header(whole.text);
        let names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
        if names != FIELDS {
            wrong.push(format!("{file}: header fields {names:?}, wanted {FIELDS:?}"));
            continue;
        }
        for (name, value) in &fields {
            if value.is_empty() {
                wrong.push(format!("{file}: {name} is empty"));
            }
        }
        let shapes = &fields[3].1;
        let Ok(shader) = Shader::parse(whole, *types.iter().next().unwrap_or(&DType::F32)) else { continue };
        let mut slots: Vec<&str> = shader.entries.iter().flat_map(|e| &e.slots).map(|s| s.name.as_str()).collect();
        slots.sort_unstable();
        slots.dedup();
        for slot in slots {
            if !named_in(shapes, slot) {
                wrong.push(format!("{file}: shapes does not name the buffer {slot}"));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Whether the shape list speaks of a buffer, whose WGSL name carries the family in front and may carry its type or its
/// role behind: `cast_y_f32` is `y`, `reduce_indices` is `index`.
fn named_in(shapes: &str, buffer: &str) -> bool {
    let words: Vec<&str> = shapes.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).collect();
    let parts: Vec<&str> = buffer.split('_').collect();
    let own = if parts.len() > 1 { &parts[1..] } else { &parts[..] };
    let alike = |a: &str, b: &str| a == b || (a.len() > 2 && b.len() > 2 && a[..3] == b[..3]);
    own.iter().any(|part| words.iter().any(|word| alike(part, word)))
}

#[test]
fn every_shader_file_belongs_to_a_record() {
    let known = files();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let bases = ["lib.wgsl", "reciprocal.wgsl", "wide.wgsl", "coop.wgsl", "matmul_coop.wgsl"];
        let base = name.starts_with("elem_") || bases.contains(&name.as_str());
        assert!(base || known.contains_key(name.as_str()), "no record runs shaders/{name}");
    }
}

#[test]
fn every_op_has_a_kernel_for_each_kind_of_device() {
    let mut lacking: BTreeMap<&str, BTreeSet<Kind>> = BTreeMap::new();
    for case in cases() {
        for kind in [Kind::Cpu, Kind::Wgpu, Kind::Cuda] {
            if !case.op.kernels().iter().any(|k| k.supports(kind)) {
                lacking.entry(case.op.name()).or_default().insert(kind);
            }
        }
    }
    assert!(lacking.is_empty(), "{lacking:?}");
}

#[test]
fn labels_are_unique_within_an_op() {
    let mut seen = BTreeSet::new();
    for case in cases() {
        let label = (case.op.name(), case.label());
        assert!(seen.insert(label.clone()), "two cases are {label:?}");
    }
}

#[test]
fn plans_stay_within_the_default_limits_of_webgpu() {
    let mut shaders: BTreeMap<(&str, DType), Arc<Shader>> = BTreeMap::new();
    let mut checked = 0;
    let plain = |class| NullDevice::new(Kind::Wgpu, class, Limits::webgpu());
    let units = UNITS.map(|(size, largest)| plain(Class::Coop).with_matrix_units(size, largest));
    for device in [plain(Class::Cpu), plain(Class::Simt)].into_iter().chain(units) {
        let class = device.info().class;
        for case in cases() {
            let inputs = case.metas();
            let outputs = case.op.infer(&inputs).unwrap_or_else(|e| panic!("{}: {e}", case.label()));
            let element = case.op.element(&inputs, &outputs);
            let info = device.info();
            let problem = Problem { op: case.op.as_ref(), inputs: &inputs, outputs: &outputs, element, info };
            for kernel in dispatch::candidates(&problem) {
                let Some(Entry { file, entry, .. }) = kernel.wgsl() else { continue };
                let shader = shaders.entry((file.name, element)).or_insert_with(|| {
                    Arc::new(Shader::parse(file, element).unwrap_or_else(|e| panic!("{}: {e}", file.name)))
                });
                let file = file.name;
                let plan = (kernel.plan)(&problem);
                let arguments = arguments(&case, &inputs, &outputs, &plan);
                for launch in &plan.launches {
                    let place = format!("{} [{}, {class:?}]", case.label(), kernel.name);
                    let name = launch.entry.unwrap_or(entry);
                    let point = shader.entry(name).unwrap_or_else(|| panic!("{place}: {file} has no entry {name}"));
                    check_launch(kernel, launch, info).unwrap_or_else(|e| panic!("{place}: {e}"));
                    check_bindings(&place, launch, point, &arguments);
                    checked += 1;
                }
            }
        }
    }
    assert!(checked > 500, "{checked} launches");
}

/// Rows and columns of matrices, and the largest subgroup, of adapters with matrix units: NVIDIA's, AMD's, software Vulkan's, Metal's.
const UNITS: [(u32, u32); 4] = [(16, 32), (16, 64), (8, 8), (8, 64)];

#[test]
fn matrix_units_have_a_rung_of_their_size_with_four_subgroups() {
    let product = |case: &Case| case.op.name() == "matmul" && case.inputs[0].meta.dtype == DType::F16;
    let case = cases().find(product).unwrap();
    let (inputs, limits) = (case.metas(), Limits::webgpu());
    let outputs = case.op.infer(&inputs).unwrap();
    for (size, largest) in UNITS {
        let device = NullDevice::new(Kind::Wgpu, Class::Coop, Limits::webgpu()).with_matrix_units(size, largest);
        let info = device.info();
        let problem = Problem { op: case.op.as_ref(), inputs: &inputs, outputs: &outputs, element: DType::F16, info };
        let fitting = dispatch::candidates(&problem);
        let rungs: Vec<&&Kernel> = fitting.iter().filter(|k| k.name.starts_with("matmul_coop")).collect();
        let [rung] = rungs[..] else { panic!("{size}, {largest}: {} rungs", rungs.len()) };
        assert_eq!(rung.name, format!("matmul_coop_{size}"));
        let constants = rung.wgsl().unwrap().constants;
        assert_eq!(constants, [("COOP_THREADS", f64::from(4 * largest))]);
        assert!(4 * largest <= limits.invocations);
    }
}

/// Bytes of each argument and whether the op may write it, in binding order.
fn arguments(case: &Case, inputs: &[Meta], outputs: &[Meta], plan: &Plan) -> Vec<(usize, bool)> {
    let aliases = case.op.aliases();
    let written = |index: usize| aliases.iter().any(|(_, input)| *input == index);
    let own = |index: usize| !aliases.iter().any(|(output, _)| *output == index);
    let mut list: Vec<(usize, bool)> = inputs.iter().enumerate().map(|(i, m)| (m.bytes(), written(i))).collect();
    list.extend(outputs.iter().enumerate().filter(|(i, _)| own(*i)).map(|(_, m)| (m.bytes(), true)));
    list.extend(plan.scratch.iter().map(|&bytes| (bytes, true)));
    list
}

fn check_bindings(place: &str, launch: &Launch, point: &EntryPoint, arguments: &[(usize, bool)]) {
    let limits = Limits::webgpu();
    let mut windowed = arguments.to_vec();
    for w in &launch.windows {
        let whole = arguments.get(w.argument).unwrap_or_else(|| panic!("{place}: a window of no argument")).0;
        assert!(w.offset % 256 == 0, "{place}: window at {}, not a multiple of 256", w.offset);
        assert!(w.offset + w.bytes <= whole, "{place}: a window past the end of argument {}", w.argument);
        windowed[w.argument].0 = w.bytes;
    }
    if !launch.slots.is_empty() {
        windowed = launch
            .slots
            .iter()
            .map(|&i| *windowed.get(i).unwrap_or_else(|| panic!("{place}: no argument {i}")))
            .collect();
    }
    for slot in &point.slots {
        let Some(&(bytes, written)) = windowed.get(slot.binding as usize) else {
            panic!("{place}: {} binds {} of {} arguments", point.name, slot.binding, windowed.len());
        };
        assert!(bytes as u64 <= limits.binding_bytes, "{place}: {} of {bytes} bytes is above one binding", slot.name);
        assert!(written || !slot.writes, "{place}: {} writes the input {}", point.name, slot.name);
    }
    let words = launch.params.words().len();
    assert!(
        words * 4 >= point.parameter_bytes as usize,
        "{place}: {} reads more than {words} parameter words",
        point.name
    );
}
