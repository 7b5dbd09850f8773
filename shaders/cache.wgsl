// op:       write_rows
// math:     table[ids[i], :] = rows[i, :]
// grad:     none
// shapes:   table[N, D] (in place), rows[M, D], ids[M]
// layout:   row-major
// launch:   linear over M D elements, 64 invocations a group
// cost:     2 M D elements moved
// numerics: a copy; ids outside the table write nothing; ids are distinct
// source:   -
// rungs:    v1 one invocation per element

struct CacheParams { count: u32, width: u32, height: u32 }
var<immediate> cache: CacheParams;

@group(0) @binding(0) var<storage, read_write> cache_table: array<E>;
@group(0) @binding(1) var<storage, read> cache_rows: array<E>;
@group(0) @binding(2) var<storage, read> cache_ids: array<u32>;

@compute @workgroup_size(64)
fn write_rows(@builtin(global_invocation_id) gid: vec3<u32>) {
    let i = linear_id(gid, 64u);
    if i >= cache.count { return; }
    let id = cache_ids[i / cache.width];
    if id < cache.height { cache_table[id * cache.width + i % cache.width] = cache_rows[i]; }
}
