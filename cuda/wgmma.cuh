// Joined in front of every kernel file, after gemm.cuh: warp-group tensor instructions, bulk copies by tensor map and barriers
// of sm_90a. On the host each is emulated by tests/cuda_host/wgmma.hpp under the same name. A warp group is 128 threads whose
// first is a multiple of 128; everything named wgmma_* and registers_* is called by all of them together.
//
//   mbarrier_*     a barrier in 8 aligned bytes of shared memory: a phase ends when `count` arrivals and all bytes that were
//                  expected have come. `mbarrier_wait(b, parity)` waits for the end of the current phase of that parity: on a
//                  new barrier parity 0 waits for the first phase, parity 1 passes at once.
//   tma_load       a box of a tensor map to shared memory, innermost coordinate first; what lies outside of the tensor is zero,
//                  and the bytes of the whole box are counted by the barrier. One thread calls it.
//   wgmma_*        d[64, N] = a[64, 16] b[16, N] (+ d): d is f32 in registers, element (16 w + g + 8 (i / 2), 8 j + 2 t + i % 2)
//                  of warp w and lane 4 g + t in d[4 j + i]; a and b lie in shared memory as a descriptor says.
//                  fence before the first use of registers, commit closes a group, wait<N> leaves N groups open; after it
//                  `wgmma_hold` keeps the compiler from reading d too early.
//   wgmma_registers  the same with a in registers, each warp's 16 rows in the order of mma_16816: fragments of d rounded in pairs
//                  are fragments of a. They are written before the fence and left alone until the product was waited for.
//   wgmma_s8       signed bytes and i32 sums, 32 of k, both operands along k, which lie in tiles as 16-bit elements do
//   wgmma_sparse   a[64, 32] with two of four kept, the kept ones in registers as above: as mma_sp_16832, metadata and SELECTOR too;
//                  b is read 32 of k (64 bytes) at a time, along k
//   wgmma_sparse_s8  a[64, 64] of signed bytes, the kept ones in registers in the order of mma_16832_s8; every lane gives metadata,
//                  32 bits (32 columns) of rows g and g + 8 by t = 0 and 1 for the first 32 columns, by t = 2 and 3 for the others
//   bulk_load      `bytes` (a multiple of 16) from global to shared memory, both at multiples of 16, counted by the barrier.
//   named_*        barriers of threads by number, 1 to 15: named_barrier waits for `count` threads (whole warps), those that only
//                  named_arrive among them.
//   cluster_*      blocks that run together: cluster_rank is this block's number among them, cluster_barrier waits for all threads of all.
//                  tma_load_cluster brings a box to the same place in every block of the bits `blocks`, counted by each one's own
//                  barrier in that place; mbarrier_arrive_at arrives at the barrier in this place of another block.
//   Tiles          of 16-bit elements, turned in 128 bytes as tensor maps write them: rows of 128 bytes whose chunk of 16 bytes c
//                  lies at c ^ row % 8, from a multiple of 1,024 bytes. Along k: a row per m or n, 64 of k. Along m or n: a row
//                  per k, blocks of 64 of m or n, `WGMMA_BLOCK` bytes (64 rows) apart. So no product needs a transposed copy.
//
// From the manual's text and not yet seen on a GPU, so to be probed there first, each against f64:
//   1. the leading byte offset of operands along m or n is the distance of their blocks of 64, the stride byte offset that of
//      8 of k (for operands along k: of 8 rows, with the leading one ignored);
//   2. steps of 16 of k inside a turned row add 32 bytes to the start address, with base offset 0;
//   3. boxes partly and wholly outside of a tensor count all their bytes;
//   4. setmaxnreg to 40 and 232 from 168 registers, which needs 384 threads in the launch bounds and one block;
//   5. a warp's wgmma.wait_group speaks for its own quarter of an operand only: every warp arrives for itself;
//   6. a map whose planes overlap (plane stride below the row stride, as for the heads of [B, T, H, D]) is taken by the driver, and
//      fragments of sums, rounded in pairs, are what wgmma_registers takes for a;
//   7. bytes lie in turned tiles as 16-bit elements do, with the same descriptors: 32 of k are 32 bytes;
//   8. metadata of 2:4 operands lies in the lanes as said above (one non-zero group at a time against the dense product; CUTLASS's
//      tables agree), and such an instruction reads 64 bytes of k of b;
//   9. a block of a cluster may be sent bytes of a phase before it has said how many it expects;
//  10. setmaxnreg to 56 and 224, where threads copy;
//  11. registers as left operand have no fence for the compiler behind them, as sums have in `wgmma_hold`: that it leaves them alone
//      until the product was waited for is seen in its code alone;
//  12. `sigmoid<true>` (lib.cuh), by the fast exponential and quotient, is near enough for results of 16 bits over all of f32.

// A tensor map: a kernel takes it as `const __grid_constant__ TensorMap`, after the buffers and before the parameter block.
struct __align__(64) TensorMap { u64 opaque[16]; };

#if ARCH == 90

// Bytes of 64 rows of a tile: the distance of blocks of 64 of m or n.
#define WGMMA_BLOCK 8192u
#define WARP_GROUP 128u

#ifndef ESPALIER_HOST

__device__ __forceinline__ void mbarrier_init(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(count) : "memory");
}

// Makes new barriers known to the copy engine; the block's own threads need __syncthreads besides.
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}

// Expects `bytes` more in this phase, and arrives.
__device__ __forceinline__ void mbarrier_arrive_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(u64* barrier, u32 parity) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra PASSED;\nbra AGAIN;\nPASSED:\n}"
                 :: "r"(shared_address(barrier)), "r"(parity) : "memory");
}

__device__ __forceinline__ void tma_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory"); }

__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, u64* barrier, u32 x, u32 y, u32 z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 :: "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z) : "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void cluster_barrier() {
    // Threads of a warp come to it together.
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive_at(u64* barrier, u32 block) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}"
                 :: "r"(shared_address(barrier)), "r"(block) : "memory");
}

__device__ __forceinline__ void tma_load_cluster(void* shared, const TensorMap* map, u64* barrier, u32 x, u32 y, u32 z, u32 blocks) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;"
                 :: "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "h"((u16)blocks) : "memory");
}

// A thread's own write to what tensor instructions read: a plain one, but on the host they then miss a fence.
template <class T> __device__ __forceinline__ void operand_store(T* operand, T value) { *operand = value; }
// Between this thread's own writes to shared memory and the copy engine or tensor instructions that use them.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void bulk_load(void* shared, const void* global, u64* barrier, u32 bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// A barrier of `count` threads (a multiple of 32) with a number from 1 to 15; 0 is that of __syncthreads. Those of a warp come to it
// together, also from where one lane has worked alone.
__device__ __forceinline__ void named_barrier(u32 number, u32 count) {
    __syncwarp();
    asm volatile("bar.sync %0, %1;" :: "r"(number), "r"(count) : "memory");
}
// Counts as one of them, and goes on.
__device__ __forceinline__ void named_arrive(u32 number, u32 count) {
    __syncwarp();
    asm volatile("bar.arrive %0, %1;" :: "r"(number), "r"(count) : "memory");
}

template <u32 COUNT> __device__ __forceinline__ void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT)); }
template <u32 COUNT> __device__ __forceinline__ void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT)); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int OPEN> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(OPEN) : "memory"); }

__device__ __forceinline__ void wgmma_hold(float& d) { asm volatile("" : "+f"(d) :: "memory"); }
__device__ __forceinline__ void wgmma_hold(int& d) { asm volatile("" : "+r"(d) :: "memory"); }
template <class T, u32 COUNT> __device__ __forceinline__ void wgmma_hold(T (&d)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) wgmma_hold(d[i]);
}

// Operands of sums ("+f" or "+r"), and their places in the text.
#define WGMMA_4(type, d, i) type((d)[i]), type((d)[i + 1]), type((d)[i + 2]), type((d)[i + 3])
#define WGMMA_16(type, d, i) WGMMA_4(type, d, i), WGMMA_4(type, d, i + 4), WGMMA_4(type, d, i + 8), WGMMA_4(type, d, i + 12)
#define WGMMA_32(type, d, i) WGMMA_16(type, d, i), WGMMA_16(type, d, i + 16)
#define WGMMA_64(type, d, i) WGMMA_32(type, d, i), WGMMA_32(type, d, i + 32)
#define WGMMA_128(type, d) WGMMA_64(type, d, 0), WGMMA_64(type, d, 64)
#define WGMMA_R0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_R1 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_R2 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define WGMMA_R3 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define WGMMA_N64 " {" WGMMA_R0 "}, "
#define WGMMA_N128 " {" WGMMA_R0 "," WGMMA_R1 "}, "
#define WGMMA_N256 " {" WGMMA_R0 "," WGMMA_R1 "," WGMMA_R2 "," WGMMA_R3 "}, "
// An instruction whose predicate `sum` is operand number `add`, other than 0.
#define WGMMA_TEXT(add, instruction, n, operands) \
    "{\n.reg .pred sum;\nsetp.ne.u32 sum, %" #add ", 0;\nwgmma.mma_async" instruction WGMMA_N##n operands ";\n}"
#define WGMMA_TYPES "f32." MMA_TYPE "." MMA_TYPE

// d = a b (+ d where `add` is not 0). A_BLOCKS, B_BLOCKS: the operand is contiguous along m, along n.
template <u32 N, bool A_BLOCKS, bool B_BLOCKS>
__device__ __forceinline__ void wgmma(float (&d)[N / 2u], u64 a, u64 b, u32 add) {
    static_assert(N == 64u || N == 128u || N == 256u, "one of the widths below");
    if constexpr (N == 64u) {
        asm volatile(WGMMA_TEXT(34, ".sync.aligned.m64n64k16." WGMMA_TYPES, 64, "%32, %33, sum, 1, 1, %35, %36")
                     : WGMMA_32("+f", d, 0) : "l"(a), "l"(b), "r"(add), "n"(A_BLOCKS ? 1 : 0), "n"(B_BLOCKS ? 1 : 0));
    } else if constexpr (N == 128u) {
        asm volatile(WGMMA_TEXT(66, ".sync.aligned.m64n128k16." WGMMA_TYPES, 128, "%64, %65, sum, 1, 1, %67, %68")
                     : WGMMA_64("+f", d, 0) : "l"(a), "l"(b), "r"(add), "n"(A_BLOCKS ? 1 : 0), "n"(B_BLOCKS ? 1 : 0));
    } else {
        asm volatile(WGMMA_TEXT(130, ".sync.aligned.m64n256k16." WGMMA_TYPES, 256, "%128, %129, sum, 1, 1, %131, %132")
                     : WGMMA_128("+f", d) : "l"(a), "l"(b), "r"(add), "n"(A_BLOCKS ? 1 : 0), "n"(B_BLOCKS ? 1 : 0));
    }
}

template <u32 N, bool B_BLOCKS>
__device__ __forceinline__ void wgmma_registers(float (&d)[N / 2u], const u32 (&a)[4], u64 b, u32 add) {
    static_assert(N == 64u || N == 128u, "one of the widths below");
    if constexpr (N == 64u) {
        asm volatile(WGMMA_TEXT(37, ".sync.aligned.m64n64k16." WGMMA_TYPES, 64, "{%32,%33,%34,%35}, %36, sum, 1, 1, %38")
                     : WGMMA_32("+f", d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(B_BLOCKS ? 1 : 0));
    } else {
        asm volatile(WGMMA_TEXT(69, ".sync.aligned.m64n128k16." WGMMA_TYPES, 128, "{%64,%65,%66,%67}, %68, sum, 1, 1, %70")
                     : WGMMA_64("+f", d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(B_BLOCKS ? 1 : 0));
    }
}

template <u32 N>
__device__ __forceinline__ void wgmma_s8(int (&d)[N / 2u], u64 a, u64 b, u32 add) {
    static_assert(N == 128u || N == 256u, "one of the widths below");
    if constexpr (N == 128u) {
        asm volatile(WGMMA_TEXT(66, ".sync.aligned.m64n128k32.s32.s8.s8", 128, "%64, %65, sum")
                     : WGMMA_64("+r", d, 0) : "l"(a), "l"(b), "r"(add));
    } else {
        asm volatile(WGMMA_TEXT(130, ".sync.aligned.m64n256k32.s32.s8.s8", 256, "%128, %129, sum")
                     : WGMMA_128("+r", d) : "l"(a), "l"(b), "r"(add));
    }
}

template <u32 N, u32 SELECTOR>
__device__ __forceinline__ void wgmma_sparse(float (&d)[N / 2u], const u32 (&a)[4], u64 b, u32 metadata, u32 add) {
    static_assert(N == 128u || N == 256u, "one of the widths below");
    if constexpr (N == 128u) {
        asm volatile(WGMMA_TEXT(70, ".sp.sync.aligned.m64n128k32." WGMMA_TYPES, 128, "{%64,%65,%66,%67}, %68, %69, %71, sum, 1, 1, 0")
                     : WGMMA_64("+f", d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "r"(add), "n"(SELECTOR));
    } else {
        asm volatile(WGMMA_TEXT(134, ".sp.sync.aligned.m64n256k32." WGMMA_TYPES, 256, "{%128,%129,%130,%131}, %132, %133, %135, sum, 1, 1, 0")
                     : WGMMA_128("+f", d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "r"(add), "n"(SELECTOR));
    }
}

template <u32 N>
__device__ __forceinline__ void wgmma_sparse_s8(int (&d)[N / 2u], const u32 (&a)[4], u64 b, u32 metadata, u32 add) {
    static_assert(N == 128u || N == 256u, "one of the widths below");
    if constexpr (N == 128u) {
        asm volatile(WGMMA_TEXT(70, ".sp.sync.aligned.m64n128k64.s32.s8.s8", 128, "{%64,%65,%66,%67}, %68, %69, 0, sum")
                     : WGMMA_64("+r", d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "r"(add));
    } else {
        asm volatile(WGMMA_TEXT(134, ".sp.sync.aligned.m64n256k64.s32.s8.s8", 256, "{%128,%129,%130,%131}, %132, %133, 0, sum")
                     : WGMMA_128("+r", d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "r"(add));
    }
}

#endif

// The descriptor of an operand's 16 of k that start at `at` bytes of a tile: start address, distance of blocks of 64 of m or n,
// distance of 8 rows, all in 16 bytes, and the turn by 128 bytes. BLOCKS: contiguous along m or n.
template <bool BLOCKS>
__device__ __forceinline__ u64 wgmma_operand(const u8* tile, u32 at) {
    u32 address = shared_address(tile) + at;
    u64 leading = BLOCKS ? WGMMA_BLOCK >> 4 : 1u, stride = 1024u >> 4;
    return (u64)((address & 0x3ffffu) >> 4) | leading << 16 | stride << 32 | (u64)1u << 62;
}

// Bytes from one 16 of k to the next within a tile of 64 of k.
template <bool BLOCKS> __device__ __forceinline__ u32 wgmma_step(u32 step) { return step * (BLOCKS ? 2048u : 32u); }

#endif
