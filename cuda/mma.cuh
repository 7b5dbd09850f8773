// Joined in front of every kernel file, after lib.cuh: one warp's tensor instructions and asynchronous copies (sm_80 and newer).
// On the host each is emulated by tests/cuda_host/mma.hpp under the same name. Fragments are those of the PTX ISA: with lane
// = 4 g + t, element (row, column) pairs of two neighbouring 16-bit values share a register.
//
//   mma_16816      d[16,8] += a[16,16] b[16,8], f16 or bf16 by the element type, f32 sums
//                  a: (g, 2t) (g+8, 2t) (g, 2t+8) (g+8, 2t+8);  b: (2t, g) (2t+8, g);  d: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
//   mma_16832_s8   d[16,8] += a[16,32] b[32,8], signed bytes, i32 sums
//                  a: four bytes from (g, 4t) (g+8, 4t) (g, 4t+16) (g+8, 4t+16);  b: four bytes from (4t, g) (4t+16, g)
//   mma_sp_16832   d[16,8] += a[16,32] b[32,8] with two of four of a kept: a in the order of mma_16816 over kept columns,
//                  b: (2t, g) (2t+8, g) (2t+16, g) (2t+24, g);  metadata: 16 bits (16 columns) of row g low and of row
//                  g+8 high, lane t = 0 or 2 (selector 0 or 1) for the first 16 columns, t = 1 or 3 for the others
//   ldmatrix_x4    four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8
//   movmatrix      an 8x8 matrix of 16-bit values, row g in lanes 4g .. 4g + 3, turned over its diagonal
//   cp_async_16    16 bytes from global to shared memory, the bytes from `valid` on zero; commit closes a group, wait<N> leaves N open

#if defined(ESPALIER_HOST)
// Emulations come with host.hpp.
#elif ARCH >= 80

#if defined(ELEMENT_F16)
#define MMA_TYPE "f16"
#else
#define MMA_TYPE "bf16"
#endif

__device__ __forceinline__ void mma_16816(float d[4], const u32 a[4], const u32 b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16832_s8(int d[4], const u32 a[4], const u32 b[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <int SELECTOR>
__device__ __forceinline__ void mma_sp_16832(float d[4], const u32 a[4], const u32 b[4], u32 metadata) {
#if ARCH >= 90
#define MMA_SP "mma.sp::ordered_metadata"
#else
#define MMA_SP "mma.sp"
#endif
    asm volatile(MMA_SP ".sync.aligned.m16n8k32.row.col.f32." MMA_TYPE "." MMA_TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(SELECTOR));
}

__device__ __forceinline__ u32 shared_address(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }

__device__ __forceinline__ void ldmatrix_x4(u32 r[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(shared)));
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 r[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(shared)));
}

__device__ __forceinline__ u32 movmatrix(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(shared)), "l"(global), "r"(valid) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int OPEN>
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(OPEN) : "memory"); }

#endif
