//! Finds accesses outside of arrays while kernels run. Drivers and shader checks hide them: a load past the end gives the last
//! element or 0, a store is dropped, and all looks right until a driver without checks reads what is not ours. Here every
//! indexing of a shader is followed by a comparison with the array's length, which notes in a buffer of ours how far past the end
//! it went.

use std::num::NonZeroU32;
use std::sync::Mutex;

use naga::valid::{FunctionInfo, ModuleInfo};
use naga::{
    AddressSpace, ArraySize, AtomicFunction, BinaryOperator, Block, Expression, Handle, Literal, MathFunction, Range,
    Scalar, ScalarKind, Span, Statement, StorageAccess, Type, TypeInner,
};

use super::memory::Memory;
use super::{Gpu, scoped};
use crate::error::{Error, Result};

/// Places of one shader at most.
const SITES: u32 = 4096;
/// The bind group of the buffer that notes what was found; kernels use group 0.
pub const GROUP: u32 = 1;

/// Where an array is indexed.
pub struct Site {
    pub array: String,
    /// In the joined source.
    pub line: u32,
}

/// Adds the comparisons to a validated module.
pub fn watch(file: &str, source: &str, module: &mut naga::Module, info: &ModuleInfo) -> Result<Vec<Site>> {
    let span = Span::UNDEFINED;
    let word = module.types.insert(Type { name: None, inner: TypeInner::Atomic(Scalar::U32) }, span);
    let words = TypeInner::Array {
        base: word,
        size: ArraySize::Constant(NonZeroU32::MIN.saturating_add(SITES - 1)),
        stride: 4,
    };
    let ty = module.types.insert(Type { name: None, inner: words }, span);
    let notes = naga::GlobalVariable {
        name: Some("notes".into()),
        space: AddressSpace::Storage { access: StorageAccess::LOAD | StorageAccess::STORE },
        binding: Some(naga::ResourceBinding { group: GROUP, binding: 0 }),
        ty,
        init: None,
        memory_decorations: naga::MemoryDecorations::empty(),
    };
    let notes = module.global_variables.append(notes, span);
    let mut sites = Vec::new();
    let names = Names {
        source,
        globals: module.global_variables.iter().map(|(_, v)| v.name.clone().unwrap_or_default()).collect(),
        signed: module
            .overrides
            .iter()
            .map(|(_, o)| module.types[o.ty].inner.scalar_kind() == Some(ScalarKind::Sint))
            .collect(),
    };
    let functions = module.functions.iter_mut().map(|(handle, function)| (&info[handle], function));
    let entries = module.entry_points.iter_mut().enumerate().map(|(i, p)| (info.get_entry_point(i), &mut p.function));
    for (info, function) in functions.chain(entries) {
        let body = std::mem::take(&mut function.body);
        let notes = function.expressions.append(Expression::GlobalVariable(notes), span);
        let mut watch = Watch { names: &names, types: &module.types, info, function, notes, sites: &mut sites };
        let body = watch.block(body);
        function.body = body;
    }
    match sites.len() as u64 {
        got if got > SITES.into() => {
            let what = "places where arrays are indexed, all to be watched";
            Err(Error::Launch { kernel: file.into(), what, got, limit: SITES.into() })
        }
        _ => Ok(sites),
    }
}

enum Index {
    Computed(Handle<Expression>),
    Known(u32),
}

struct Names<'a> {
    source: &'a str,
    globals: Vec<String>,
    /// Whether an overridable constant is an `i32`.
    signed: Vec<bool>,
}

struct Watch<'a> {
    names: &'a Names<'a>,
    types: &'a naga::UniqueArena<Type>,
    info: &'a FunctionInfo,
    function: &'a mut naga::Function,
    notes: Handle<Expression>,
    sites: &'a mut Vec<Site>,
}

impl Watch<'_> {
    fn block(&mut self, block: Block) -> Block {
        let mut watched = Block::new();
        for (mut statement, span) in block.span_into_iter() {
            match &mut statement {
                Statement::Emit(range) => {
                    let range = range.clone();
                    watched.push(statement, span);
                    range.for_each(|access| self.access(access, &mut watched));
                    continue;
                }
                Statement::CooperativeStore { target, data } => self.fragment(*target, *data, &mut watched),
                Statement::Block(inner) => self.inner(inner),
                Statement::If { accept, reject, .. } => {
                    self.inner(accept);
                    self.inner(reject);
                }
                Statement::Switch { cases, .. } => cases.iter_mut().for_each(|case| self.inner(&mut case.body)),
                Statement::Loop { body, continuing, .. } => {
                    self.inner(body);
                    self.inner(continuing);
                }
                _ => {}
            }
            watched.push(statement, span);
        }
        watched
    }

    fn inner(&mut self, block: &mut Block) {
        let body = std::mem::take(block);
        *block = self.block(body);
    }

    /// Watches what an expression indexes, where the index or the length is known only when the kernel runs.
    fn access(&mut self, access: Handle<Expression>, block: &mut Block) {
        let (base, index) = match self.function.expressions[access] {
            Expression::Access { base, index } => (base, Index::Computed(index)),
            Expression::AccessIndex { base, index } => (base, Index::Known(index)),
            Expression::CooperativeLoad { data, .. } => return self.fragment(access, data, block),
            _ => return,
        };
        let Some(size) = self.size(self.info[base].ty.inner_with(self.types)) else { return };
        let (index, signed) = match (index, size) {
            (Index::Computed(index), _) => (index, self.signed(index)),
            // Of other arrays the front end knows both.
            (Index::Known(index), ArraySize::Dynamic | ArraySize::Pending(_)) => {
                (self.add(Expression::Literal(Literal::U32(index))), false)
            }
            (Index::Known(_), ArraySize::Constant(_)) => return,
        };
        self.compare(access, (base, size), (index, signed), block);
    }

    /// Watches the last element that a fragment of matrix units reaches; its first is indexed in plain sight.
    fn fragment(&mut self, matrix: Handle<Expression>, data: naga::CooperativeData, block: &mut Block) {
        let (base, index) = match self.function.expressions[data.pointer] {
            Expression::Access { base, index } => (base, index),
            Expression::AccessIndex { base, index } => (base, self.add(Expression::Literal(Literal::U32(index)))),
            _ => return,
        };
        let Some(size) = self.size(self.info[base].ty.inner_with(self.types)) else { return };
        let TypeInner::CooperativeMatrix { columns, rows, .. } = *self.info[matrix].ty.inner_with(self.types) else {
            return;
        };
        let (steps, along) = if data.row_major { (rows, columns) } else { (columns, rows) };
        let [steps, along] = [steps, along].map(|n| self.add(Expression::Literal(Literal::U32(n as u32 - 1))));
        let binary = |op, left, right| Expression::Binary { op, left, right };
        let first = self.add(Expression::As { expr: index, kind: ScalarKind::Uint, convert: None });
        let down = self.add(binary(BinaryOperator::Multiply, data.stride, steps));
        let row = self.add(binary(BinaryOperator::Add, first, down));
        let last = self.add(binary(BinaryOperator::Add, row, along));
        block.push(Statement::Emit(Range::new_from_bounds(first, last)), Span::UNDEFINED);
        self.compare(data.pointer, (base, size), (last, false), block);
    }

    fn add(&mut self, e: Expression) -> Handle<Expression> {
        self.function.expressions.append(e, Span::UNDEFINED)
    }

    fn signed(&self, index: Handle<Expression>) -> bool {
        self.info[index].ty.inner_with(self.types).scalar_kind() == Some(ScalarKind::Sint)
    }

    /// `if index >= length { atomicMax(&notes[site], max(index - length + 1, 1)) }` for the array that `place` indexes; an index and whether it
    /// has a sign.
    fn compare(
        &mut self,
        place: Handle<Expression>,
        (base, size): (Handle<Expression>, ArraySize),
        (index, signed): (Handle<Expression>, bool),
        block: &mut Block,
    ) {
        let site = self.sites.len() as u32;
        let add = |function: &mut naga::Function, e| function.expressions.append(e, Span::UNDEFINED);
        let unsigned = |expr| Expression::As { expr, kind: ScalarKind::Uint, convert: None };

        let one = add(self.function, Expression::Literal(Literal::U32(1)));
        let mut length = match size {
            ArraySize::Constant(n) => add(self.function, Expression::Literal(Literal::U32(n.get()))),
            ArraySize::Pending(constant) => add(self.function, Expression::Override(constant)),
            ArraySize::Dynamic => base,
        };
        // What follows is computed where it stands. A negative index is a huge one by its bits.
        let mut computed = Vec::new();
        let mut compute = |function: &mut naga::Function, e| {
            let handle = add(function, e);
            computed.push(handle);
            handle
        };
        match size {
            ArraySize::Dynamic => length = compute(self.function, Expression::ArrayLength(base)),
            ArraySize::Pending(c) if self.names.signed[c.index()] => length = compute(self.function, unsigned(length)),
            _ => {}
        }
        let index = if signed { compute(self.function, unsigned(index)) } else { index };
        let binary = |op, left, right| Expression::Binary { op, left, right };
        let past = compute(self.function, binary(BinaryOperator::GreaterEqual, index, length));
        let over = compute(self.function, binary(BinaryOperator::Subtract, index, length));
        let over = compute(self.function, binary(BinaryOperator::Add, over, one));
        // An index of -1 into nothing would come back as 0.
        let most = Expression::Math { fun: MathFunction::Max, arg: over, arg1: Some(one), arg2: None, arg3: None };
        let over = compute(self.function, most);
        let note = compute(self.function, Expression::AccessIndex { base: self.notes, index: site.min(SITES - 1) });
        block.push(Statement::Emit(Range::new_from_bounds(computed[0], note)), Span::UNDEFINED);
        let max = Statement::Atomic { pointer: note, fun: AtomicFunction::Max, value: over, result: None };
        let then = Block::from_vec(vec![max]);
        block.push(Statement::If { condition: past, accept: then, reject: Block::new() }, Span::UNDEFINED);

        let location = self.function.expressions.get_span(place).location(self.names.source);
        self.sites.push(Site { array: self.name(base), line: location.line_number });
    }

    /// Elements of what an expression indexes.
    fn size(&self, inner: &TypeInner) -> Option<ArraySize> {
        let vector = |size: naga::VectorSize| ArraySize::Constant(NonZeroU32::MIN.saturating_add(size as u32 - 1));
        match *inner {
            TypeInner::Pointer { base, .. } => self.size(&self.types[base].inner),
            TypeInner::Array { size, .. } => Some(size),
            TypeInner::Vector { size, .. } | TypeInner::ValuePointer { size: Some(size), .. } => Some(vector(size)),
            TypeInner::Matrix { columns, .. } => Some(vector(columns)),
            _ => None,
        }
    }

    /// The variable that an expression reaches into.
    fn name(&self, base: Handle<Expression>) -> String {
        match self.function.expressions[base] {
            Expression::GlobalVariable(v) => self.names.globals[v.index()].clone(),
            Expression::LocalVariable(v) => self.function.local_variables[v].name.clone().unwrap_or_default(),
            Expression::FunctionArgument(i) => self.function.arguments[i as usize].name.clone().unwrap_or_default(),
            Expression::Access { base, .. } | Expression::AccessIndex { base, .. } => self.name(base),
            Expression::Load { pointer } => self.name(pointer),
            _ => self.function.named_expressions.get(&base).cloned().unwrap_or_else(|| "a value".into()),
        }
    }
}

/// Where the comparisons note what they find.
pub struct Notes {
    pub memory: Memory,
    pub layout: wgpu::BindGroupLayout,
    pub group: wgpu::BindGroup,
    /// One launch at a time: what is noted is its own.
    pub turn: Mutex<()>,
}

impl Notes {
    pub const BYTES: usize = 4 * SITES as usize;

    pub fn new(gpu: &Gpu) -> Result<Self> {
        let memory = Memory::new(gpu, Self::BYTES)?;
        let (layout, group) = scoped(&gpu.device, || {
            let entry = wgpu::BindGroupLayoutEntry {
                binding: 0,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only: false },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            };
            let descriptor = wgpu::BindGroupLayoutDescriptor { label: Some("notes"), entries: &[entry] };
            let layout = gpu.device.create_bind_group_layout(&descriptor);
            let entries = [wgpu::BindGroupEntry { binding: 0, resource: memory.buffer().as_entire_binding() }];
            let descriptor = wgpu::BindGroupDescriptor { label: Some("notes"), layout: &layout, entries: &entries };
            let group = gpu.device.create_bind_group(&descriptor);
            (layout, group)
        })
        .map_err(|e| gpu.failure(e, "allocate", Self::BYTES as u64))?;
        Ok(Self { memory, layout, group, turn: Mutex::new(()) })
    }
}

#[cfg(test)]
mod tests {
    use super::super::shader::{Shader, place};
    use super::*;
    use crate::dtype::DType;
    use crate::kernel::File;

    #[test]
    fn every_kind_of_array_is_watched() {
        let text = "@group(0) @binding(0) var<storage, read_write> out: array<u32>;
override width = 4;
var<workgroup> shared_words: array<u32, width>;
fn pick(words: ptr<function, array<u32, 3>>, at: i32) -> u32 { return (*words)[at]; }
@compute @workgroup_size(1)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    var own = array<u32, 3>();
    let many = mat2x2<f32>();
    for (var i = 0u; i < out[0]; i++) {
        shared_words[i] = own[id.x];
        switch i { case 1u { out[i] = bitcast<u32>(many[i][id.y]); } default {} }
    }
    out[1] = pick(&own, i32(id.z));
}";
        let file = File::new("indexed.wgsl", text);
        let (shader, mut module, info) = Shader::parse_module(file, DType::F32).unwrap();
        let sites = watch(file.name, &shader.source, &mut module, &info).unwrap();
        let line = |site: &Site| place(&shader.parts, site.line);
        assert!(sites.iter().all(|site| line(site).0 == "indexed.wgsl"));
        let found: Vec<_> = sites.iter().map(|site| (site.array.as_str(), line(site).1)).collect();
        let expected = [
            ("words", 4),
            ("out", 9),
            ("shared_words", 10),
            ("own", 10),
            ("out", 11),
            ("many", 11),
            ("many", 11),
            ("out", 13),
        ];
        let mut sorted = (found.clone(), expected.to_vec());
        sorted.0.sort_unstable();
        sorted.1.sort_unstable();
        assert_eq!(sorted.0, sorted.1);
        let mut validator = naga::valid::Validator::new(Default::default(), naga::valid::Capabilities::all());
        validator.validate(&module).unwrap();
    }

    /// What an expression of known numbers comes to, function arguments being 1000.
    fn value(e: &naga::Arena<Expression>, at: Handle<Expression>) -> u32 {
        match e[at] {
            Expression::Literal(Literal::U32(x)) => x,
            Expression::FunctionArgument(_) => 1000,
            Expression::As { expr, .. } => value(e, expr),
            Expression::Binary { op: BinaryOperator::Add, left, right } => value(e, left) + value(e, right),
            Expression::Binary { op: BinaryOperator::Multiply, left, right } => value(e, left) * value(e, right),
            ref other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_fragment_is_watched_from_its_first_element_to_its_last() {
        let text = "enable wgpu_cooperative_matrix;
var<workgroup> tile: array<f32, 4000>;
fn load(at: u32) -> coop_mat8x8<f32, A> { return coopLoadT<coop_mat8x8<f32, A>>(&tile[at], 20u); }
fn store(c: coop_mat8x8<f32, C>) { coopStoreT(c, &tile[300], 30u); }";
        let mut module = naga::front::wgsl::parse_str(text).unwrap();
        let mut validator =
            naga::valid::Validator::new(naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all());
        let info = validator.validate(&module).unwrap();
        let sites = watch("fragments.wgsl", text, &mut module, &info).unwrap();
        assert!(sites.iter().all(|site| site.array == "tile"));
        let mut compared = Vec::new();
        for (_, function) in module.functions.iter() {
            for (_, e) in function.expressions.iter() {
                if let Expression::Binary { op: BinaryOperator::GreaterEqual, left, .. } = *e {
                    compared.push(value(&function.expressions, left));
                }
            }
        }
        assert_eq!(compared, [1000, 1000 + 7 * 20 + 7, 300 + 7 * 30 + 7]);
        let mut validator = naga::valid::Validator::new(Default::default(), naga::valid::Capabilities::all());
        validator.validate(&module).unwrap();
    }
}
