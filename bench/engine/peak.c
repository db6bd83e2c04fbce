/* What one core computes at most: multiply-adds that never leave the registers.
 *
 * Twelve accumulators, for a multiply-add takes four or five cycles and a core begins two in each. Each has a start
 * value of its own, read from memory: a compiler may compute equal chains once. All are written back: it must not drop
 * them. Built by bench/engine/peak.py, which checks the rate against the clock that `multiply_chain` tells.
 */
#include <immintrin.h>

#define TWELVE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

/* state: twelve vectors, then the two factors. Does `turns` times twelve multiply-adds. */
__attribute__((target("avx2,fma"))) void f32_256(long turns, float *state)
{
#define READ(i) __m256 s##i = _mm256_loadu_ps(state + 8 * i);
#define STEP(i) s##i = _mm256_fmadd_ps(s##i, a, b);
#define WRITE(i) _mm256_storeu_ps(state + 8 * i, s##i);
    TWELVE(READ)
    __m256 a = _mm256_loadu_ps(state + 96), b = _mm256_loadu_ps(state + 104);
    for (long turn = 0; turn < turns; turn++) { TWELVE(STEP) }
    TWELVE(WRITE)
#undef READ
#undef STEP
#undef WRITE
}

#define READ(i) __m512 s##i = _mm512_loadu_ps(state + 16 * i);
#define WRITE(i) _mm512_storeu_ps(state + 16 * i, s##i);
#define FACTORS __m512 a = _mm512_loadu_ps(state + 192), b = _mm512_loadu_ps(state + 208);

__attribute__((target("avx512f"))) void f32_512(long turns, float *state)
{
#define STEP(i) s##i = _mm512_fmadd_ps(s##i, a, b);
    TWELVE(READ) FACTORS
    for (long turn = 0; turn < turns; turn++) { TWELVE(STEP) }
    TWELVE(WRITE)
#undef STEP
}

__attribute__((target("avx512f,avx512bf16"))) void bf16_512(long turns, float *state)
{
#define STEP(i) s##i = _mm512_dpbf16_ps(s##i, (__m512bh)a, (__m512bh)b);
    TWELVE(READ) FACTORS
    for (long turn = 0; turn < turns; turn++) { TWELVE(STEP) }
    TWELVE(WRITE)
#undef STEP
}

__attribute__((target("avx512f,avx512vnni"))) void int8_512(long turns, float *state)
{
#define STEP(i) s##i = _mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(s##i), m, n));
    TWELVE(READ) FACTORS
    __m512i m = _mm512_castps_si512(a), n = _mm512_castps_si512(b);
    for (long turn = 0; turn < turns; turn++) { TWELVE(STEP) }
    TWELVE(WRITE)
#undef STEP
}

/* `turns` times ten integer products, each of which needs the one before it: three cycles each on these CPUs. */
void multiply_chain(long turns, float *state)
{
    long value = (long)state | 1;
    for (long turn = 0; turn < turns; turn++)
        __asm__ volatile(
            "imul %0, %0\n imul %0, %0\n imul %0, %0\n imul %0, %0\n imul %0, %0\n"
            "imul %0, %0\n imul %0, %0\n imul %0, %0\n imul %0, %0\n imul %0, %0\n"
            : "+r"(value));
}
