// Sixteen floats and their arithmetic, for AVX-512 or as two halves for AVX2: the same bits in both builds.
// Also memory for them, aligned to cache lines. Knows nothing of models.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

namespace {

using i32 = int32_t;
using i64 = int64_t;

constexpr i64 W = 16;  // floats in a V; also tokens in a KV block (kv.py: BLOCK)

inline i64 up(i64 n, i64 to) { return (n + to - 1) / to * to; }

#ifdef __AVX512F__
constexpr int MR = 6, NR = 4;  // register tile: MR rows by NR panels
struct V { __m512 v; };
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
inline V all(float x) { return {_mm512_set1_ps(x)}; }
inline V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V round(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline V pow2(V n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
inline __m256 low(V a) { return _mm512_castps512_ps256(a.v); }
inline __m256 high(V a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)); }
#else
constexpr int MR = 6, NR = 1;
struct V { __m256 a, b; };
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 load8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline V load(const int8_t* p) { return {load8(p), load8(p + 8)}; }
inline void store(float* p, V x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline V all(float x) { __m256 y = _mm256_set1_ps(x); return {y, y}; }
inline V operator+(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V operator-(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V operator*(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V operator/(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline V max(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline V min(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline __m256 round8(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V round(V x) { return {round8(x.a), round8(x.b)}; }
inline __m256 pow28(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline V pow2(V n) { return {pow28(n.a), pow28(n.b)}; }
inline __m256 low(V x) { return x.a; }
inline __m256 high(V x) { return x.b; }
#endif

// The same tree of additions (and of maxima) in both builds.
inline float sum(V x) {
  __m256 a = _mm256_add_ps(low(x), high(x));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
inline float largest(V x) {
  __m256 a = _mm256_max_ps(low(x), high(x));
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

// Cephes expf: about 1 ulp, exactly 1 at 0.
inline V exp(V x) {
  x = min(max(x, all(-87.3f)), all(88.0f));
  V n = round(x * all(1.44269504f));
  V r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  V p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, all(c));
  return fma(p, r * r, r + all(1.0f)) * pow2(n);
}

class Floats {  // zeroed, aligned to cache lines
 public:
  Floats() = default;
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  ~Floats() { std::free(p_); }
  float* reserve(i64 n) {
    if (n > size_) {
      std::free(p_);
      size_ = up(n, W);
      p_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
      if (!p_) std::abort();
      std::memset(p_, 0, size_ * sizeof(float));
    }
    return p_;
  }
  float* get() const { return p_; }

 private:
  float* p_ = nullptr;
  i64 size_ = 0;
};

}  // namespace
