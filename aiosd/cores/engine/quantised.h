// Weights that stay quantised in memory, in the formats of ggml: how a row of the file is packed into panels of
// 16 outputs, and how a panel is read as floats.
//
// Each weight becomes fma(q, d, m), one rounding, whatever the number of rows: q its small number, d and m the
// scale and the offset of its group. So packed weights give the same bits as the same floats would.

#pragma once

#include <cmath>

#include "simd.h"

namespace {

enum Kind : i32 { F32 = 0, Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, Q4_K = 12, Q6_K = 14 };  // ggml's numbers

inline float half(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return _cvtsh_ss(h);
}

#ifdef __AVX512F__
struct Words { __m512i v; };
inline Words words(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Words shift(Words a, int by) { return {_mm512_srli_epi32(a.v, by)}; }
inline Words both(Words a, Words b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Words up4(Words a) { return {_mm512_slli_epi32(a.v, 4)}; }
inline Words low(Words a, int mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(mask))}; }
inline V number(Words a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline V nibble(Words a, int by) {  // the table reads the four lowest bits of each lane only
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(a.v, by), table)};
}
inline V halves(const uint8_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline V unsigned8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
#else
struct Words { __m256i a, b; };
inline __m256i words8(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Words words(const uint8_t* p) { return {words8(p), words8(p + 32)}; }
inline Words shift(Words x, int by) { return {_mm256_srli_epi32(x.a, by), _mm256_srli_epi32(x.b, by)}; }
inline Words both(Words x, Words y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Words up4(Words x) { return {_mm256_slli_epi32(x.a, 4), _mm256_slli_epi32(x.b, 4)}; }
inline Words low(Words x, int mask) {
  __m256i m = _mm256_set1_epi32(mask);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline V number(Words x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline V nibble(Words x, int by) { return number(low(shift(x, by), 15)); }
inline __m256 halves8(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline V halves(const uint8_t* p) { return {halves8(p), halves8(p + 16)}; }
inline __m256 unsigned4(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline V unsigned8(const uint8_t* p) { return {unsigned4(p), unsigned4(p + 8)}; }
#endif

// --- panels as floats ---------------------------------------------------------------------------------
//
// A reader opens group g of a panel, then steps through it, eight k at a time. at(i) gives the weights of the
// i-th of them for the 16 outputs. A word of 32 bits in a lane holds eight nibbles of one output.

struct ReadF32 {
  static constexpr int GROUP = 8, BYTES = 8 * 64;
  const float *q, *now;
  void open(const uint8_t* panel, i64 g) { q = reinterpret_cast<const float*>(panel + g * BYTES); }
  void step(int) { now = q; }
  V at(int i) const { return load(now + i * W); }
};

template <bool OFFSET> struct ReadQ4 {  // d, m where there is an offset, then four words
  static constexpr int GROUP = 32, BYTES = 32 + 32 * OFFSET + 256;
  V d, m;
  const uint8_t* q;
  Words now;
  void open(const uint8_t* panel, i64 g) {
    const uint8_t* p = panel + g * BYTES;
    d = halves(p);
    m = OFFSET ? halves(p + 32) : d * all(-8.0f);
    q = p + 32 + 32 * OFFSET;
  }
  void step(int j) { now = words(q + j * 64); }
  V at(int i) const { return fma(nibble(now, 4 * i), d, m); }
};

struct ReadQ8 {  // d, then 32 times 16 bytes
  static constexpr int GROUP = 32, BYTES = 32 + 512;
  V d;
  const int8_t *q, *now;
  void open(const uint8_t* panel, i64 g) {
    d = halves(panel + g * BYTES);
    q = reinterpret_cast<const int8_t*>(panel + g * BYTES + 32);
  }
  void step(int j) { now = q + j * 128; }
  V at(int i) const { return load(now + i * W) * d; }
};

struct ReadQ4K {  // 256 k: d and dmin, then eight times scale, minimum and four words
  static constexpr int GROUP = 32, SUPER = 64 + 8 * 288;
  V d, m;
  const uint8_t* q;
  Words now;
  void open(const uint8_t* panel, i64 g) {
    const uint8_t *p = panel + g / 8 * SUPER, *s = p + 64 + g % 8 * 288;
    d = halves(p) * unsigned8(s);
    m = all(0.0f) - halves(p + 32) * unsigned8(s + 16);
    q = s + 32;
  }
  void step(int j) { now = words(q + j * 64); }
  V at(int i) const { return fma(nibble(now, 4 * i), d, m); }
};

struct ReadQ6K {  // 256 k: d, then 16 times scale, two words of low bits and one of high bits
  static constexpr int GROUP = 16, SUPER = 32 + 16 * 208;
  V d, m;
  const uint8_t* q;
  Words now, high;
  void open(const uint8_t* panel, i64 g) {
    const uint8_t *p = panel + g / 16 * SUPER, *s = p + 32 + g % 16 * 208;
    d = halves(p) * load(reinterpret_cast<const int8_t*>(s));
    m = d * all(-32.0f);
    q = s + 16;
  }
  void step(int j) {
    now = words(q + j * 64);
    high = shift(words(q + 128), 16 * j);
  }
  V at(int i) const {
    return fma(number(both(low(shift(now, 4 * i), 15), up4(low(shift(high, 2 * i), 3)))), d, m);
  }
};

// y[m][n] = sum over k of x[m][k] * w[n][k], in the order of k, for M rows and N panels of one kind.
template <class R, int M, int N>
inline void packed_tile(const float* x, i64 ldx, const uint8_t* const* w, i64 depth, float* const* y, i64 ldy) {
  V acc[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] = all(0.0f);
  R r[N];
  for (i64 g = 0; g < depth / R::GROUP; g++) {
    for (int n = 0; n < N; n++) r[n].open(w[n], g);
    for (int j = 0; j < R::GROUP / 8; j++) {
      const float* at = x + g * R::GROUP + j * 8;
      for (int n = 0; n < N; n++) r[n].step(j);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        V b[N];
        for (int n = 0; n < N; n++) b[n] = r[n].at(i);
        for (int m = 0; m < M; m++) {
          V a = all(at[m * ldx + i]);
          for (int n = 0; n < N; n++) acc[m][n] = fma(a, b[n], acc[m][n]);
        }
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(y[n] + m * ldy, acc[m][n]);
}

template <class R> void packed_rows(const float* x, i64 ldx, i64 rows, const uint8_t* const* w, i64 panels, i64 depth,
                                    float* const* y, i64 ldy) {
  using Tile = void (*)(const float*, i64, const uint8_t* const*, i64, float* const*, i64);
  constexpr int WIDE = NR == 4 ? 4 : 1, PAIR = NR == 4 ? 2 : 1;
  static constexpr Tile SINGLE[] = {nullptr,                packed_tile<R, 1, 1>, packed_tile<R, 2, 1>, packed_tile<R, 3, 1>,
                                    packed_tile<R, 4, 1>, packed_tile<R, 5, 1>, packed_tile<R, 6, 1>};
  static constexpr Tile PAIRS[] = {nullptr,                   packed_tile<R, 1, PAIR>, packed_tile<R, 2, PAIR>, packed_tile<R, 3, PAIR>,
                                   packed_tile<R, 4, PAIR>, packed_tile<R, 5, PAIR>, packed_tile<R, 6, PAIR>};
  for (i64 p = 0; p < panels;) {
    i64 left = panels - p;
    if (rows == 1 && left >= WIDE) {
      packed_tile<R, 1, WIDE>(x, ldx, w + p, depth, y + p, ldy);
      p += WIDE;
    } else if (left >= PAIR) {
      PAIRS[rows](x, ldx, w + p, depth, y + p, ldy);
      p += PAIR;
    } else {
      SINGLE[rows](x, ldx, w + p, depth, y + p, ldy);
      p++;
    }
  }
}

// The floats of k0 … k0 + depth of a panel; k0 and depth are multiples of the group.
template <class R> void packed_floats(const uint8_t* panel, i64 k0, i64 depth, float* to) {
  R r;
  for (i64 g = k0 / R::GROUP; g < (k0 + depth) / R::GROUP; g++) {
    r.open(panel, g);
    for (int j = 0; j < R::GROUP / 8; j++, to += 8 * W) {
      r.step(j);
      for (int i = 0; i < 8; i++) store(to + i * W, r.at(i));
    }
  }
}

// Calls f with a reader of the kind.
template <class F> auto with_reader(i32 kind, F&& f) {
  switch (kind) {
    case Q4_0: return f(ReadQ4<false>{});
    case Q4_1: return f(ReadQ4<true>{});
    case Q8_0: return f(ReadQ8{});
    case Q4_K: return f(ReadQ4K{});
    case Q6_K: return f(ReadQ6K{});
    default: return f(ReadF32{});
  }
}

inline i64 panel_bytes(i32 kind, i64 inputs) {
  switch (kind) {
    case Q4_0: return inputs / 32 * ReadQ4<false>::BYTES;
    case Q4_1: return inputs / 32 * ReadQ4<true>::BYTES;
    case Q8_0: return inputs / 32 * ReadQ8::BYTES;
    case Q4_K: return inputs / 256 * ReadQ4K::SUPER;
    case Q6_K: return inputs / 256 * ReadQ6K::SUPER;
    default: return inputs * 64;
  }
}

inline i64 row_bytes(i32 kind, i64 inputs) {  // of the file
  switch (kind) {
    case Q4_0: return inputs / 32 * 18;
    case Q4_1: return inputs / 32 * 20;
    case Q8_0: return inputs / 32 * 34;
    case Q4_K: return inputs / 256 * 144;
    case Q6_K: return inputs / 256 * 210;
    default: return inputs * 4;
  }
}

// --- packing ------------------------------------------------------------------------------------------

inline void put(uint8_t* words, i64 lane, int k, uint32_t bits, int each) {  // number k of a lane's word
  uint32_t* word = reinterpret_cast<uint32_t*>(words) + lane;
  *word |= bits << (k * each);
}

inline void scale_and_minimum(const uint8_t* s, int g, uint8_t& scale, uint8_t& minimum) {  // of Q4_K
  scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
  minimum = g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | (s[g] >> 6) << 4;
}

inline int six_bits(const uint8_t* block, int k) {  // of Q6_K: 128 low halves, 64 high quarters
  int part = k / 128, at = k % 128, quarter = at / 32, l = at % 32;
  int low = block[part * 64 + quarter % 2 * 32 + l] >> quarter / 2 * 4 & 15;
  return low | (block[128 + part * 32 + l] >> quarter * 2 & 3) << 4;
}

// Puts one row of the file into its lane of a zeroed panel.
inline void pack_row(i32 kind, const uint8_t* row, i64 inputs, uint8_t* panel, i64 lane) {
  if (kind == Q4_0 || kind == Q4_1) {
    i64 size = kind == Q4_0 ? 18 : 20, head = kind == Q4_0 ? 2 : 4, bytes = 16 * head + 256;
    for (i64 g = 0; g < inputs / 32; g++) {
      const uint8_t* from = row + g * size;
      uint8_t* to = panel + g * bytes;
      std::memcpy(to + lane * 2, from, 2);
      if (kind == Q4_1) std::memcpy(to + 32 + lane * 2, from + 2, 2);
      for (int k = 0; k < 32; k++)
        put(to + 16 * head + k / 8 * 64, lane, k % 8, from[head + k % 16] >> k / 16 * 4 & 15, 4);
    }
  } else if (kind == Q8_0) {
    for (i64 g = 0; g < inputs / 32; g++) {
      const uint8_t* from = row + g * 34;
      uint8_t* to = panel + g * ReadQ8::BYTES;
      std::memcpy(to + lane * 2, from, 2);
      for (int k = 0; k < 32; k++) to[32 + k * W + lane] = from[2 + k];
    }
  } else if (kind == Q4_K) {
    for (i64 b = 0; b < inputs / 256; b++) {
      const uint8_t* from = row + b * 144;
      uint8_t* to = panel + b * ReadQ4K::SUPER;
      std::memcpy(to + lane * 2, from, 2);
      std::memcpy(to + 32 + lane * 2, from + 2, 2);
      for (int g = 0; g < 8; g++) {
        uint8_t* group = to + 64 + g * 288;
        scale_and_minimum(from + 4, g, group[lane], group[16 + lane]);
        for (int k = 0; k < 32; k++)
          put(group + 32 + k / 8 * 64, lane, k % 8, from[16 + g / 2 * 32 + k] >> g % 2 * 4 & 15, 4);
      }
    }
  } else if (kind == Q6_K) {
    for (i64 b = 0; b < inputs / 256; b++) {
      const uint8_t* from = row + b * 210;
      uint8_t* to = panel + b * ReadQ6K::SUPER;
      std::memcpy(to + lane * 2, from + 208, 2);
      for (int g = 0; g < 16; g++) {
        uint8_t* group = to + 32 + g * 208;
        group[lane] = from[192 + g];
        for (int k = 0; k < 16; k++) {
          int q = six_bits(from, g * 16 + k);
          put(group + 16 + k / 8 * 64, lane, k % 8, q & 15, 4);
          put(group + 144, lane, k, q >> 4, 2);
        }
      }
    }
  } else {
    const float* from = reinterpret_cast<const float*>(row);
    for (i64 k = 0; k < inputs; k++) reinterpret_cast<float*>(panel)[k * W + lane] = from[k];
  }
}

// A row of the file as floats, for the embedding of one token: the same numbers as from a panel.
inline void row_floats(i32 kind, const uint8_t* row, i64 inputs, float* to) {
  for (i64 k = 0; k < inputs; k++) {
    if (kind == Q4_0 || kind == Q4_1) {
      const uint8_t* b = row + k / 32 * (kind == Q4_0 ? 18 : 20);
      float d = half(b), m = kind == Q4_0 ? d * -8.0f : half(b + 2);
      int q = b[(kind == Q4_0 ? 2 : 4) + k % 16] >> k % 32 / 16 * 4 & 15;
      to[k] = std::fma(float(q), d, m);
    } else if (kind == Q8_0) {
      const uint8_t* b = row + k / 32 * 34;
      to[k] = float(int8_t(b[2 + k % 32])) * half(b);
    } else if (kind == Q4_K) {
      const uint8_t* b = row + k / 256 * 144;
      int g = k % 256 / 32;
      uint8_t scale, minimum;
      scale_and_minimum(b + 4, g, scale, minimum);
      int q = b[16 + g / 2 * 32 + k % 32] >> g % 2 * 4 & 15;
      to[k] = std::fma(float(q), half(b) * float(scale), 0.0f - half(b + 2) * float(minimum));
    } else if (kind == Q6_K) {
      const uint8_t* b = row + k / 256 * 210;
      float d = half(b + 208) * float(int8_t(b[192 + k % 256 / 16]));
      to[k] = std::fma(float(six_bits(b, k % 256)), d, d * -32.0f);
    } else {
      to[k] = reinterpret_cast<const float*>(row)[k];
    }
  }
}

}  // namespace
