// op:       write_rows
// math:     table[ids[i], :] = rows[i, :]
// grad:     none
// shapes:   table[N, D] (in place), rows[M, D], ids[M]
// layout:   row-major
// launch:   linear over M D elements, 64 threads a block
// cost:     2 M D elements moved
// numerics: a copy; ids outside the table write nothing; ids are distinct
// source:   -
// rungs:    v1 one thread per element

struct CacheParams { u32 count, width, height; };

extern "C" __global__ void __launch_bounds__(64) write_rows(E* table, const E* rows, const u32* ids, CacheParams p) {
    u32 i = linear_id();
    if (i >= p.count) return;
    u32 id = ids[i / p.width];
    if (id < p.height) table[(u64)id * p.width + i % p.width] = rows[i];
}
