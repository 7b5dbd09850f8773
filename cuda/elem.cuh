// Joined in front of every kernel file: words, and the storage type E with its load `ld` and store `st` in f32.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ float f16_to_float(u16 x) {
#ifdef ESPALIER_HOST
    return host::f16_to_float(x);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#endif
}

__device__ __forceinline__ u16 float_to_f16(float x) {
#ifdef ESPALIER_HOST
    return host::float_to_f16(x);
#else
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#endif
}

__device__ __forceinline__ float bf16_to_float(u16 x) { return __uint_as_float((u32)x << 16); }

// Round to nearest even. NaN keeps its sign and top payload bits and gains a quiet bit: rounding could carry it into infinity.
__device__ __forceinline__ u16 float_to_bf16(float x) {
    u32 b = __float_as_uint(x);
    if ((b & 0x7fffffffu) > 0x7f800000u) return (u16)((b >> 16) | 0x40u);
    return (u16)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

#if defined(ELEMENT_F16)
typedef u16 E;
__device__ __forceinline__ float ld(E x) { return f16_to_float(x); }
__device__ __forceinline__ E st(float x) { return float_to_f16(x); }
#elif defined(ELEMENT_BF16)
typedef u16 E;
__device__ __forceinline__ float ld(E x) { return bf16_to_float(x); }
__device__ __forceinline__ E st(float x) { return float_to_bf16(x); }
#elif defined(ELEMENT_U32)
// 4-byte words, for ops that move elements and compute nothing: any bit pattern survives.
typedef u32 E;
__device__ __forceinline__ float ld(E x) { return __uint_as_float(x); }
__device__ __forceinline__ E st(float x) { return __float_as_uint(x); }
#else
typedef float E;
__device__ __forceinline__ float ld(E x) { return x; }
__device__ __forceinline__ E st(float x) { return x; }
#endif
