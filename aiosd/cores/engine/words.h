// Words: 32 bits of each of 16 rows, and the small numbers in them as floats, for AVX-512 or as two halves for AVX2.
// Knows no format of weights.

#pragma once

#include "simd.h"

namespace {

using u8 = uint8_t;
using u32 = uint32_t;

inline u32 word_at(const u8* p) {
  u32 w;
  std::memcpy(&w, p, 4);
  return w;
}
inline u32 short_at(const u8* p) {
  uint16_t w;
  std::memcpy(&w, p, 2);
  return w;
}

#ifdef __AVX512F__
struct Words { __m512i v; };
inline Words words(const u32* p) { return {_mm512_loadu_si512(p)}; }
inline Words right(Words a, int by) { return {_mm512_srli_epi32(a.v, by)}; }
inline Words left(Words a, int by) { return {_mm512_slli_epi32(a.v, by)}; }
inline Words low(Words a, int mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(mask))}; }
inline Words mixed(Words a, Words b, int mask) {  // a where the mask has ones, else b
  return {_mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), a.v, b.v, 0xca)};
}
inline Words times(Words a, int by) { return {_mm512_mullo_epi32(a.v, _mm512_set1_epi32(by))}; }
inline Words flipped(Words a) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8(-128))}; }  // of each byte the sign
inline V number(Words a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline V as_float(Words a) { return {_mm512_castsi512_ps(a.v)}; }
inline V half(Words a) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(a.v))}; }  // of the lower 16 bits
inline V signed_byte(Words a, int i) {
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(left(a, 24 - 8 * i).v, 24))};
}
inline __m512i four_rows(const u8* p, i64 stride) {  // rows 0, 4, 8 and 12; a load to some lanes needs no shuffle
  auto row = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + r * stride)); };
  __m512i v = _mm512_castsi128_si512(row(0));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, row(4));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, row(8));
  return _mm512_mask_broadcast_i32x4(v, 0xf000, row(12));
}
inline void transpose(const u8* p, i64 stride, u32* to) {  // 16 bytes of 16 rows, as four words
  __m512i a = four_rows(p, stride), b = four_rows(p + stride, stride);
  __m512i c = four_rows(p + 2 * stride, stride), d = four_rows(p + 3 * stride, stride);
  __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
  __m512i AB = _mm512_unpackhi_epi32(a, b), CD = _mm512_unpackhi_epi32(c, d);
  _mm512_storeu_si512(to, _mm512_unpacklo_epi64(ab, cd));
  _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi64(ab, cd));
  _mm512_storeu_si512(to + 32, _mm512_unpacklo_epi64(AB, CD));
  _mm512_storeu_si512(to + 48, _mm512_unpackhi_epi64(AB, CD));
}
#else
struct Words { __m256i a, b; };
inline __m256i words8(const u32* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Words words(const u32* p) { return {words8(p), words8(p + 8)}; }
inline Words right(Words x, int by) { return {_mm256_srli_epi32(x.a, by), _mm256_srli_epi32(x.b, by)}; }
inline Words left(Words x, int by) { return {_mm256_slli_epi32(x.a, by), _mm256_slli_epi32(x.b, by)}; }
inline Words low(Words x, int mask) {
  __m256i m = _mm256_set1_epi32(mask);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline __m256i mixed8(__m256i a, __m256i b, __m256i m) {
  return _mm256_or_si256(_mm256_and_si256(m, a), _mm256_andnot_si256(m, b));
}
inline Words mixed(Words x, Words y, int mask) {
  __m256i m = _mm256_set1_epi32(mask);
  return {mixed8(x.a, y.a, m), mixed8(x.b, y.b, m)};
}
inline Words times(Words x, int by) {
  __m256i n = _mm256_set1_epi32(by);
  return {_mm256_mullo_epi32(x.a, n), _mm256_mullo_epi32(x.b, n)};
}
inline Words flipped(Words x) {
  __m256i m = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(x.a, m), _mm256_xor_si256(x.b, m)};
}
inline V number(Words x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline V as_float(Words x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline V half(Words x) {
  Words y = low(x, 0xffff);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(y.a, y.b), 0xd8);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(packed)), _mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1))};
}
inline V signed_byte(Words x, int i) {
  Words y = left(x, 24 - 8 * i);
  return number({_mm256_srai_epi32(y.a, 24), _mm256_srai_epi32(y.b, 24)});
}
inline __m256i two_rows(const u8* p, i64 stride) {  // rows 0 and 4
  auto row = [&](int r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + r * stride)); };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(4), 1);
}
inline void transpose(const u8* p, i64 stride, u32* to) {
  for (int h = 0; h < 2; h++, p += 8 * stride, to += 8) {
    __m256i a = two_rows(p, stride), b = two_rows(p + stride, stride);
    __m256i c = two_rows(p + 2 * stride, stride), d = two_rows(p + 3 * stride, stride);
    __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
    __m256i AB = _mm256_unpackhi_epi32(a, b), CD = _mm256_unpackhi_epi32(c, d);
    auto put = [&](int w, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * w), v); };
    put(0, _mm256_unpacklo_epi64(ab, cd));
    put(1, _mm256_unpackhi_epi64(ab, cd));
    put(2, _mm256_unpacklo_epi64(AB, CD));
    put(3, _mm256_unpackhi_epi64(AB, CD));
  }
}
#endif

}  // namespace
