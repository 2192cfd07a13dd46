// One weight of a stored row, plainly: the oracle of quantised.h, and the way to read the embedding of a token.

#pragma once

#include "quantised.h"

namespace {

inline float plain_half(const u8* p) { return _cvtsh_ss(uint16_t(short_at(p))); }
inline float plain_float(u32 bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline float plain_k(const u8* b, int k, bool five) {  // of Q4_K and Q5_K
  const u8 *s = b + 4, *q = b + (five ? 48 : 16);
  int g = k / 32;
  int scale = g < 4 ? s[g] & 63 : (s[g + 4] & 15) | (s[g - 4] >> 6) << 4;
  int least = g < 4 ? s[g + 4] & 63 : s[g + 4] >> 4 | (s[g] >> 6) << 4;
  int number = q[g / 2 * 32 + k % 32] >> g % 2 * 4 & 15;
  if (five) number |= (b[16 + k % 32] >> g & 1) << 4;
  return std::fma(float(number), plain_half(b) * float(scale), 0.0f - plain_half(b + 2) * float(least));
}

inline float plain_6k(const u8* b, int k) {
  int part = k / 128, quarter = k % 128 / 32, l = k % 32;
  int number = b[part * 64 + quarter % 2 * 32 + l] >> quarter / 2 * 4 & 15;
  number |= (b[128 + part * 32 + l] >> quarter * 2 & 3) << 4;
  float d = plain_half(b + 208) * float(int8_t(b[192 + k / 16]));
  return std::fma(float(number), d, d * -32.0f);
}

inline float plain_small(i32 kind, const u8* b, int k) {
  bool five = kind == Q5_0 || kind == Q5_1, two = kind == Q4_1 || kind == Q5_1;
  const u8* q = b + (two || kind == I4 ? 4 : 2) + 4 * five;
  int number = q[k % 16] >> k / 16 * 4 & 15;
  if (five) number |= int(word_at(q - 4) >> k & 1) << 4;
  float d = kind == I4 ? plain_float(word_at(b) & ~255u) : plain_half(b);
  float m = two ? plain_half(b + 2) : kind == I4 ? 0.0f - d * float(b[0]) : d * (five ? -16.0f : -8.0f);
  return std::fma(float(number), d, m);
}

inline float plain_e4m3(u8 b) {
  float size = b & 0x78 ? std::ldexp(float(8 + (b & 7)), (b >> 3 & 15) - 10) : std::ldexp(float(b & 7), -9);
  return b & 0x80 ? -size : size;
}

// Number k of a row.
inline float plain_value(i32 kind, const u8* row, i64 k) {
  const u8* b = with_reader(kind, [&](auto r) { return row + k / decltype(r)::VALUES * decltype(r)::BYTES; });
  switch (kind) {
    case F32: return plain_float(word_at(b + k % 8 * 4));
    case Q8_0: return float(int8_t(b[2 + k % 32])) * plain_half(b);
    case I8: return float(int8_t(b[4 + k % 32])) * plain_float(word_at(b));
    case F8: return plain_e4m3(b[4 + k % 32]) * plain_float(word_at(b));
    case Q4_K: case Q5_K: return plain_k(b, int(k % 256), kind == Q5_K);
    case Q6_K: return plain_6k(b, int(k % 256));
    default: return plain_small(kind, b, int(k % 32));
  }
}

}  // namespace
