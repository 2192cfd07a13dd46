// Weights that stay as they are stored: in the formats of ggml, in float32, and in three formats of our own.
//
// The rows are read where they lie, in the mapped file, so all processes share them. A panel is 16 rows. stage()
// turns some blocks of a panel into words: word w of lane r holds bytes 4w … 4w + 3 of row r. A reader then gives
// the weights of one k for the 16 rows. Each weight becomes fma(q, d, m), one rounding, whatever the number of
// rows of the batch: q its small number, d and m the scale and the offset of its group. So stored weights give the
// same bits as the same floats would. plain_value() says the same once more, plainly.

#pragma once

#include <algorithm>
#include <cmath>

#include "words.h"

namespace {

// ggml's numbers, and ours from 1000 on. Ours have blocks of 32: a word, then 4-bit numbers as in Q4_0, or bytes.
// The word of I4 is a float whose 8 lowest bits are the zero point instead; that of I8 and F8 (E4M3) is the scale.
enum Kind : i32 { F32 = 0, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14,
                  I4 = 1004, I8 = 1008, F8 = 1009 };

inline Words byte(Words a, int i, int mask) { return low(right(a, 8 * i), mask); }

// --- readers ------------------------------------------------------------------------------------------
//
// A block of VALUES numbers has BYTES bytes in the file. Staged, it is these bytes as words. Where a scale of 16 bits
// would shift them, a word with the scale, which is at byte SCALE, stands before them instead. A reader opens group g
// of a block, then steps through it, eight k at a time. at(i) gives the weights of the i-th of them. AT_ONCE blocks
// are staged together: 9 to 18 KB for four panels.

struct ReadF32 {
  static constexpr int VALUES = 8, BYTES = 32, SCALE = 0, GROUP = 8, AT_ONCE = 8;
  const u32* s;
  void open(const u32* block, int) { s = block; }
  void step(int) {}
  V at(int i) const { return as_float(words(s + i * W)); }
};

// Eight numbers of up to 7 bits, one in each byte of two words. Each is taken where it stands in its word, without a
// shift: as q * 256^i, with d / 256^i. Both are exact, so the rounding stays the same.
struct Eight {
  V d[4], m;
  Words a, b;
  void scale(V s) {
    d[0] = s;
    for (int i = 1; i < 4; i++) d[i] = d[i - 1] * all(0x1p-8f);
  }
  V number_at(int i, int mask) const {
    return fma(number(low(i < 4 ? a : b, mask << i % 4 * 8)), d[i % 4], m);
  }
};

template <Kind K> struct ReadSmall : Eight {  // blocks of 32: scales, then numbers of 4 or 5 bits
  static constexpr bool FIVE = K == Q5_0 || K == Q5_1, TWO = K == Q4_1 || K == Q5_1;
  static constexpr int VALUES = 32, BYTES = (TWO || K == I4 ? 4 : 2) + 4 * FIVE + 16, SCALE = 0, GROUP = 32, AT_ONCE = 8;
  const u32* s;
  void open(const u32* block, int) {
    Words scales = words(block);
    scale(K == I4 ? as_float(low(scales, ~255)) : half(scales));
    if constexpr (K == I4) m = all(0.0f) - d[0] * number(low(scales, 255));
    else m = TWO ? half(right(scales, 16)) : d[0] * all(FIVE ? -16.0f : -8.0f);
    s = block + W;
  }
  void step(int j) {
    const u32* q = s + (FIVE + j % 2 * 2) * W;
    a = right(words(q), j / 2 * 4), b = right(words(q + W), j / 2 * 4);
    if constexpr (FIVE) {
      Words high = right(words(s), 8 * j);
      a = mixed(a, spread(high), 0x0f0f0f0f), b = mixed(b, spread(right(high, 4)), 0x0f0f0f0f);
    }
  }
  V at(int i) const { return number_at(i, FIVE ? 31 : 15); }
  static Words spread(Words x) { return times(low(x, 15), 1 << 4 | 1 << 11 | 1 << 18 | 1 << 25); }  // bit i to 8 i + 4
};

template <Kind K> struct ReadBytes : Eight {  // blocks of 32: a scale, then bytes with a sign
  static constexpr int VALUES = 32, BYTES = 32 + (K == Q8_0 ? 2 : 4), SCALE = 0, GROUP = 32, AT_ONCE = 8;
  const u32* s;
  void open(const u32* block, int) {
    scale(K == Q8_0 ? half(words(block)) : as_float(words(block)));
    m = d[0] * all(-128.0f);
    s = block + W;
  }
  void step(int j) { a = flipped(words(s + j * 2 * W)), b = flipped(words(s + (j * 2 + 1) * W)); }
  V at(int i) const {  // 128 is added to each number, so that a multiple of it is no negative word
    if (i % 4 < 3) return number_at(i, 255);
    return fma(number(right(i < 4 ? a : b, 24)), d[0], m);
  }
};

struct ReadF8 {  // blocks of 32: a scale, then bytes that are floats of 4 bits of exponent and 3 of fraction
  static constexpr int VALUES = 32, BYTES = 36, SCALE = 0, GROUP = 32, AT_ONCE = 8;
  const u32* s;
  V d;
  Words a, b;
  void open(const u32* block, int) {
    d = as_float(words(block));
    s = block + W;
  }
  void step(int j) { a = words(s + j * 2 * W), b = words(s + (j * 2 + 1) * W); }
  V at(int i) const {  // sign, exponent and fraction to their places in a float, then 2^120 for the other bias
    Words top = left(i < 4 ? a : b, 24 - i % 4 * 8);
    return as_float(mixed(top, right(low(top, 0x7f000000), 4), 1 << 31)) * all(0x1p120f) * d;
  }
};

template <Kind K> struct ReadK : Eight {  // Q4_K and Q5_K: 256 numbers in 8 groups
  static constexpr bool FIVE = K == Q5_K;
  static constexpr int VALUES = 256, BYTES = FIVE ? 176 : 144, SCALE = 0, GROUP = 32, AT_ONCE = 1;
  const u32 *q, *h;
  int g;
  void open(const u32* block, int group) {
    g = group;
    Words one = words(block + W), two = words(block + 2 * W), three = words(block + 3 * W), most, least;
    if (g < 4) {
      most = byte(one, g, 63), least = byte(two, g, 63);
    } else {
      most = mixed(byte(three, g - 4, 15), right(byte(one, g - 4, 0xc0), 2), 15);
      least = mixed(right(byte(three, g - 4, 0xf0), 4), right(byte(two, g - 4, 0xc0), 2), 15);
    }
    scale(half(words(block)) * number(most));
    m = all(0.0f) - half(right(words(block), 16)) * number(least);
    h = block + 4 * W;
    q = h + (FIVE * 8 + g / 2 * 8) * W;
  }
  void step(int j) {
    a = right(words(q + 2 * j * W), g % 2 * 4), b = right(words(q + (2 * j + 1) * W), g % 2 * 4);
    if constexpr (FIVE) {
      a = mixed(a, left(right(words(h + 2 * j * W), g), 4), 0x0f0f0f0f);
      b = mixed(b, left(right(words(h + (2 * j + 1) * W), g), 4), 0x0f0f0f0f);
    }
  }
  V at(int i) const { return number_at(i, FIVE ? 31 : 15); }
};

struct ReadQ6K : Eight {  // 256 numbers in 16 groups: 128 low halves, 64 high quarters, 16 scales, d
  static constexpr int VALUES = 256, BYTES = 210, SCALE = 208, GROUP = 16, AT_ONCE = 1;
  const u32 *q, *h;
  int quarter;
  void open(const u32* block, int g) {
    int part = g / 8, half_of_it = g % 2 * 4;
    quarter = g % 8 / 2;
    scale(half(words(block)) * signed_byte(words(block + (1 + 48 + g / 4) * W), g % 4));
    m = d[0] * all(-32.0f);
    q = block + (1 + part * 16 + quarter % 2 * 8 + half_of_it) * W;
    h = block + (1 + 32 + part * 8 + half_of_it) * W;
  }
  void step(int j) {
    a = right(words(q + 2 * j * W), quarter / 2 * 4), b = right(words(q + (2 * j + 1) * W), quarter / 2 * 4);
    a = mixed(a, left(right(words(h + 2 * j * W), quarter * 2), 4), 0x0f0f0f0f);
    b = mixed(b, left(right(words(h + (2 * j + 1) * W), quarter * 2), 4), 0x0f0f0f0f);
  }
  V at(int i) const { return number_at(i, 63); }
};

template <class R> constexpr int STAGED = (R::BYTES + 3) / 4 * int(W);  // numbers of a staged block

// Bytes of 16 rows, a multiple of 4, as words; the last 16 may overlap those before. Fetches a quarter of the rows'
// lines that lie `ahead` in each turn, because many fetches at once would stop the loads.
inline void to_words(const u8* p, i64 stride, int bytes, i64 ahead, int& turn, u32* to) {
  for (int at = 0; at < bytes; at += 16) {
    int from = std::min(at, bytes - 16);
    for (int r = turn++ % 4; r < W; r += 4)
      _mm_prefetch(reinterpret_cast<const char*>(p + r * stride + ahead + at), _MM_HINT_T0);
    transpose(p + from, stride, to + from / 4 * W);
  }
}

// Blocks `first` … `first + count` of a panel as words.
template <class R> inline void stage(const u8* rows, i64 stride, i64 first, int count, u32* to) {
  const u8* p = rows + first * R::BYTES;
  i64 ahead = count * R::BYTES;
  int turn = 0;
  if constexpr (R::BYTES % 4 == 0) return to_words(p, stride, int(ahead), ahead, turn, to);
  for (int b = 0; b < count; b++, p += R::BYTES, to += STAGED<R>) {
    for (int r = 0; r < W; r++) to[r] = short_at(p + r * stride + R::SCALE);
    to_words(p + (R::SCALE ? 0 : 2), stride, R::BYTES - 2, ahead, turn, to + W);
  }
}

struct Panel { i32 kind; const u8* rows; i64 stride; };  // 16 rows of a file, or of memory

// y[m][n] = sum over k of x[m][k] * w[n][k], in the order of k, for M rows and N panels of one kind.
template <class R, int M, int N>
inline void stored_tile(const float* x, i64 ldx, const Panel* w, i64 depth, float* const* y, i64 ldy) {
  alignas(64) u32 staged[N][R::AT_ONCE * STAGED<R>];
  V acc[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] = all(0.0f);
  R r[N];
  i64 blocks = depth / R::VALUES;
  for (i64 first = 0; first < blocks; first += R::AT_ONCE) {
    int count = int(std::min<i64>(R::AT_ONCE, blocks - first));
    for (int n = 0; n < N; n++) stage<R>(w[n].rows, w[n].stride, first, count, staged[n]);
    for (int g = 0; g < count * (R::VALUES / R::GROUP); g++) {
      constexpr int EACH = R::VALUES / R::GROUP;
      for (int n = 0; n < N; n++) r[n].open(staged[n] + g / EACH * STAGED<R>, g % EACH);
      for (int j = 0; j < R::GROUP / 8; j++) {
        const float* at = x + first * R::VALUES + g * R::GROUP + j * 8;
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
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(y[n] + m * ldy, acc[m][n]);
}

template <class R> void stored_rows(const float* x, i64 ldx, i64 rows, const Panel* w, i64 panels, i64 depth, float* const* y, i64 ldy) {
  using Tile = void (*)(const float*, i64, const Panel*, i64, float* const*, i64);
  constexpr int WIDE = NR == 4 ? 4 : 1, PAIR = NR == 4 ? 2 : 1;
  static constexpr Tile SINGLE[] = {nullptr,                stored_tile<R, 1, 1>, stored_tile<R, 2, 1>, stored_tile<R, 3, 1>,
                                    stored_tile<R, 4, 1>, stored_tile<R, 5, 1>, stored_tile<R, 6, 1>};
  static constexpr Tile PAIRS[] = {nullptr,                   stored_tile<R, 1, PAIR>, stored_tile<R, 2, PAIR>, stored_tile<R, 3, PAIR>,
                                   stored_tile<R, 4, PAIR>, stored_tile<R, 5, PAIR>, stored_tile<R, 6, PAIR>};
  for (i64 p = 0; p < panels;) {
    i64 left = panels - p, n = rows == 1 && left >= WIDE ? WIDE : left >= PAIR ? PAIR : 1;
    Tile f = n == 1 ? SINGLE[rows] : n == PAIR ? PAIRS[rows] : stored_tile<R, 1, WIDE>;
    f(x, ldx, w + p, depth, y + p, ldy);
    p += n;
  }
}

// The floats of k0 … k0 + depth of a panel; k0 and depth are multiples of the group.
template <class R> void stored_floats(const Panel& w, i64 k0, i64 depth, float* to) {
  alignas(64) u32 staged[R::AT_ONCE * STAGED<R>];
  constexpr i64 EACH = R::VALUES / R::GROUP;
  R r;
  for (i64 g = k0 / R::GROUP, end = (k0 + depth) / R::GROUP, first = 0, until = 0; g < end; g++) {
    if (g >= until) {
      first = g / EACH;
      i64 count = std::min<i64>(R::AT_ONCE, (end + EACH - 1) / EACH - first);
      stage<R>(w.rows, w.stride, first, int(count), staged);
      until = (first + count) * EACH;
    }
    r.open(staged + (g / EACH - first) * STAGED<R>, int(g % EACH));
    for (int j = 0; j < R::GROUP / 8; j++, to += 8 * W) {
      r.step(j);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) store(to + i * W, r.at(i));
    }
  }
}

// Calls f with a reader of the kind.
template <class F> auto with_reader(i32 kind, F&& f) {
  switch (kind) {
    case Q4_0: return f(ReadSmall<Q4_0>{});
    case Q4_1: return f(ReadSmall<Q4_1>{});
    case Q5_0: return f(ReadSmall<Q5_0>{});
    case Q5_1: return f(ReadSmall<Q5_1>{});
    case I4: return f(ReadSmall<I4>{});
    case Q8_0: return f(ReadBytes<Q8_0>{});
    case I8: return f(ReadBytes<I8>{});
    case F8: return f(ReadF8{});
    case Q4_K: return f(ReadK<Q4_K>{});
    case Q5_K: return f(ReadK<Q5_K>{});
    case Q6_K: return f(ReadQ6K{});
    default: return f(ReadF32{});
  }
}

inline i64 row_bytes(i32 kind, i64 inputs) {
  return with_reader(kind, [&](auto r) { return inputs / decltype(r)::VALUES * decltype(r)::BYTES; });
}

}  // namespace
