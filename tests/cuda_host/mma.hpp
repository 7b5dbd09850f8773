// The tensor instructions of cuda/mma.cuh on the host: operands of all lanes are laid out as the PTX ISA says, multiplied,
// and handed back. Sums of one instruction are exact (f64) and rounded once, as tensor units keep more digits than f32.
#pragma once

namespace host {

#if defined(ELEMENT_F16)
static float element_value(unsigned short x) { return f16_to_float(x); }
#else
static float element_value(unsigned short x) { return __uint_as_float((unsigned)x << 16); }
#endif

static float low(unsigned pair) { return element_value((unsigned short)pair); }
static float high(unsigned pair) { return element_value((unsigned short)(pair >> 16)); }

struct Mma { float* d; const unsigned* a; const unsigned* b; unsigned metadata; };
struct MmaInteger { int* d; const unsigned* a; const unsigned* b; };
struct Matrices { unsigned* r; const unsigned char* row; };

static void add_product(void** lanes, const float* a, const float* b, unsigned k) {
    for (unsigned lane = 0; lane < LANES; lane++) {
        float* d = ((Mma*)lanes[lane])->d;
        for (unsigned i = 0; i < 4; i++) {
            unsigned row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
            double sum = d[i];
            for (unsigned q = 0; q < k; q++) sum += (double)a[row * k + q] * b[q * 8 + column];
            d[i] = (float)sum;
        }
    }
}

static void whole_warp(unsigned count) {
    if (count != LANES) fail("a tensor instruction in a warp of %u threads", count);
}

static void complete_16816(void** lanes, unsigned count) {
    whole_warp(count);
    float a[16 * 16], b[16 * 8];
    for (unsigned lane = 0; lane < LANES; lane++) {
        auto m = (const Mma*)lanes[lane];
        unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < 4; i++) {
            unsigned row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
            a[row * 16 + column] = low(m->a[i]);
            a[row * 16 + column + 1] = high(m->a[i]);
        }
        for (unsigned i = 0; i < 2; i++) {
            b[(2 * t + 8 * i) * 8 + g] = low(m->b[i]);
            b[(2 * t + 8 * i + 1) * 8 + g] = high(m->b[i]);
        }
    }
    add_product(lanes, a, b, 16);
}

static void complete_16832_s8(void** lanes, unsigned count) {
    whole_warp(count);
    int a[16][32], b[32][8];
    for (unsigned lane = 0; lane < LANES; lane++) {
        auto m = (const MmaInteger*)lanes[lane];
        unsigned g = lane / 4, t = lane % 4;
        for (unsigned byte = 0; byte < 4; byte++) {
            for (unsigned i = 0; i < 4; i++) a[g + i % 2 * 8][4 * t + byte + i / 2 * 16] = (signed char)(m->a[i] >> (8 * byte));
            for (unsigned i = 0; i < 2; i++) b[4 * t + byte + 16 * i][g] = (signed char)(m->b[i] >> (8 * byte));
        }
    }
    for (unsigned lane = 0; lane < LANES; lane++) {
        int* d = ((MmaInteger*)lanes[lane])->d;
        for (unsigned i = 0; i < 4; i++)
            for (unsigned q = 0; q < 32; q++) d[i] += a[lane / 4 + i / 2 * 8][q] * b[q][lane % 4 * 2 + i % 2];
    }
}

// Sparse m16n8k32: a row keeps 16 of 32 values in groups of two of four. The metadata of rows g and g + 8 comes from lane
// 4 g + t of t = 2 SELECTOR and 2 SELECTOR + 1: 16 bits (8 kept values) per row and half of k, the low half row g.
template <int SELECTOR>
static void complete_sp_16832(void** lanes, unsigned count) {
    whole_warp(count);
    float a[16 * 32] = {}, b[32 * 8];
    float kept[16][16];
    for (unsigned lane = 0; lane < LANES; lane++) {
        auto m = (const Mma*)lanes[lane];
        unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < 4; i++) {
            kept[g + i % 2 * 8][2 * t + i / 2 * 8] = low(m->a[i]);
            kept[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = high(m->a[i]);
            b[(2 * t + 8 * i) * 8 + g] = low(m->b[i]);
            b[(2 * t + 8 * i + 1) * 8 + g] = high(m->b[i]);
        }
    }
    for (unsigned g = 0; g < 8; g++) {
        for (unsigned half = 0; half < 2; half++) {
            unsigned metadata = ((const Mma*)lanes[4 * g + 2 * SELECTOR + half])->metadata;
            for (unsigned which = 0; which < 2; which++) {
                unsigned bits = metadata >> (16 * which) & 0xffffu, row = g + 8 * which;
                for (unsigned j = 0; j < 8; j++) {
                    unsigned place = bits >> (2 * j) & 3u;
                    if (j % 2 && place <= (bits >> (2 * j - 2) & 3u)) fail("metadata of a row of 2:4 values does not ascend");
                    a[row * 32 + half * 16 + j / 2 * 4 + place] = kept[row][half * 8 + j];
                }
            }
        }
    }
    add_product(lanes, a, b, 32);
}

template <bool TRANSPOSED>
static void complete_ldmatrix(void** lanes, unsigned count) {
    whole_warp(count);
    unsigned short values[4][8][8];
    for (unsigned lane = 0; lane < LANES; lane++) memcpy(values[lane / 8][lane % 8], ((const Matrices*)lanes[lane])->row, 16);
    for (unsigned lane = 0; lane < LANES; lane++) {
        unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < 4; i++) {
            unsigned short first = TRANSPOSED ? values[i][2 * t][g] : values[i][g][2 * t];
            unsigned short second = TRANSPOSED ? values[i][2 * t + 1][g] : values[i][g][2 * t + 1];
            ((Matrices*)lanes[lane])->r[i] = first | (unsigned)second << 16;
        }
    }
}

struct Turned { unsigned value; };

static void complete_movmatrix(void** lanes, unsigned count) {
    whole_warp(count);
    unsigned short values[8][8];
    for (unsigned lane = 0; lane < LANES; lane++) memcpy(values[lane / 4] + lane % 4 * 2, &((const Turned*)lanes[lane])->value, 4);
    for (unsigned lane = 0; lane < LANES; lane++)
        ((Turned*)lanes[lane])->value = values[lane % 4 * 2][lane / 4] | (unsigned)values[lane % 4 * 2 + 1][lane / 4] << 16;
}

}  // namespace host

static inline void mma_16816(float d[4], const unsigned a[4], const unsigned b[2]) {
    host::Mma m{d, a, b, 0};
    host::collective(1, host::complete_16816, &m);
}
static inline void mma_16832_s8(int d[4], const unsigned a[4], const unsigned b[2]) {
    host::MmaInteger m{d, a, b};
    host::collective(2, host::complete_16832_s8, &m);
}
template <int SELECTOR>
static inline void mma_sp_16832(float d[4], const unsigned a[4], const unsigned b[4], unsigned metadata) {
    host::Mma m{d, a, b, metadata};
    host::collective(3, host::complete_sp_16832<SELECTOR>, &m);
}
static inline void ldmatrix_x4(unsigned r[4], const void* shared) {
    host::check_aligned(shared, 16);
    host::Matrices m{r, (const unsigned char*)shared};
    host::collective(4, host::complete_ldmatrix<false>, &m);
}
static inline void ldmatrix_x4_trans(unsigned r[4], const void* shared) {
    host::check_aligned(shared, 16);
    host::Matrices m{r, (const unsigned char*)shared};
    host::collective(5, host::complete_ldmatrix<true>, &m);
}
static inline unsigned movmatrix(unsigned x) {
    host::Turned m{x};
    host::collective(6, host::complete_movmatrix, &m);
    return m.value;
}
static inline void cp_async_16(void* shared, const void* global, int valid) { host::copy_async(shared, global, valid); }
static inline void cp_async_commit() { host::copy_commit(); }
template <int OPEN>
static inline void cp_async_wait() { host::copy_wait(OPEN); }
