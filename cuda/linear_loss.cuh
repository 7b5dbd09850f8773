// Joined in front of every kernel file, after gemm_wgmma.cuh: what the files of the losses with a linear head share.

// dz of a word of a divergence, over the loss's factor; P: direction, inverse (of the temperature), factor (beta).
template <class P>
__device__ __forceinline__ float kl_slope(float zs, float zt, float lse_s, float lse_t, float expectation, const P& p) {
    float log_q = zs * p.inverse - lse_s, log_p = zt * p.inverse - lse_t, slope = expf(log_q);
    if (p.direction == 0u) slope -= expf(log_p);
    if (p.direction == 1u) slope *= log_q - log_p - expectation;
    if (p.direction == 2u) slope *= (p.factor - 1.0f) * log_mixture(p.factor, log_p - log_q).y - expectation;
    return slope;
}

#if ARCH == 90

struct LinearWgmmaParams {
    // Tokens, words, the width, that of the teacher. Products: rows, columns and the summed axis; bit 0 of `teacher`: add to the sums, bit
    // 1: these are the last.
    u32 rows, words, width, teacher;
    // First token of the chunk (products: row of the outputs), first word of the tile, words in all. Products: a is contiguous along m
    // if `direction` is not 0.
    u32 row, word, vocabulary, direction;
    // Smoothing or beta, 1 / temperature, the loss's factor.
    float factor, inverse, squared;
    // Tiles of outputs.
    u32 down, across;
};

#define LINEAR_A (WGMMA_ROWS * 128u)

// Both models' logits of one tile: the student's stages, then the teacher's. Clusters of two blocks have the words in common.
struct LinearMaps { const TensorMap *hidden_s, *weight_s, *hidden_t, *weight_t; };

struct LinearPairLoad {
    static const u32 THREADS = WARP, ARRIVALS = 1u;
    LinearMaps maps;
    u32 student;
    __device__ __forceinline__ void begin() const {}
    __device__ __forceinline__ void start(const WgmmaTiles::Tile&) const {}
    __device__ __forceinline__ void end() const {}
    template <class Stages>
    __device__ __forceinline__ void stage(const Stages& place, const WgmmaTiles::Tile& t, u32 step) const {
        if (threadIdx.x != 0u) return;
        bool first = step < student;
        u32 k0 = (first ? step : step - student) * 64u;
        mbarrier_arrive_expect(place.full(), Stages::BYTES);
        tma_load(place.tile(), first ? maps.hidden_s : maps.hidden_t, place.full(), k0, t.row * WGMMA_ROWS, 0u);
        u32 rank = cluster_rank();
        tma_load_cluster(place.tile() + LINEAR_A + rank * WGMMA_BLOCK, first ? maps.weight_s : maps.weight_t, place.full(), k0, t.column * 128u + rank * 64u,
                         0u, 3u);
    }
};

struct LinearPairProduct {
    typedef float Sums[2][64];
    u32 student;
    template <class Stages, class Tile>
    __device__ __forceinline__ void sum(Stages& place, const Tile&, u32 steps, u32 group, Sums& sums) const {
        WgmmaProduct<128u, LINEAR_A, false, false> one;
        wgmma_sums(place, one, student, group, sums[0]);
        wgmma_sums(place, one, steps - student, group, sums[1]);
    }
};

template <class Finish>
__device__ __forceinline__ void linear_pair_tiles(const LinearMaps& maps, const Finish& finish, const LinearWgmmaParams& p) {
    DYNAMIC_SHARED(shared);
    u32 student = div_up(p.width, 64u);
    WgmmaTilePairs tiles = {p.down, p.across, 1u, student + div_up(p.teacher, 64u)};
    wgmma_gemm<WgmmaStages<6u, LINEAR_A + 16384u, 2u>>(shared, tiles, LinearPairLoad{maps, student}, LinearPairProduct{student}, finish);
}

// The kernels' last arguments but one: hidden states and head of the student, and of the teacher.
#define LINEAR_MAP const __grid_constant__ TensorMap
#define LINEAR_MAPS LINEAR_MAP hs, LINEAR_MAP ws, LINEAR_MAP ht, LINEAR_MAP wt

#endif
