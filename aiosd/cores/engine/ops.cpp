// The forward pass of the Llama family and its relatives (family.py) on the CPU, float32, over paged KV: one
// call for each step, no framework.
//
// Every output element is one chain of fused multiply-adds in a fixed order (k = 0, 1, 2, …; keys in the
// order of their positions). So a row's bits do not depend on the other rows, the cuts of prefill, the number
// of threads, or the instruction set (AVX2 or AVX-512). Blocking and tiling only choose which chains run side
// by side. The interface is plain C and needs no header of Python or torch. One thread at a time may call it.
// Knows no requests and no sampling.

#include <cmath>
#include <vector>

#include "plain.h"
#include "quantised.h"
#include "simd.h"
#include "team.h"

namespace {

constexpr i64 GROUP = 4;     // weight panels of one task: 64 outputs
constexpr i64 ROWS = 96;     // rows of one task in a large batch, at least,
constexpr i64 MOST = 258;    // and at most: for more rows the weights are turned into floats less often
constexpr i64 DEEP = 256;    // steps of k at a time in a large batch
constexpr i64 TASKS = 8;     // of each thread, if there are rows enough
constexpr i64 KEYS = 256;    // keys between two rescalings in attention; at absolute positions
constexpr i64 QUERIES = 24;  // query vectors of one attention task

// --- products -----------------------------------------------------------------------------------------

// y[m][n] += sum over k of x[m][k] * w[n][k], for M rows and N panels of 16 outputs each; k runs upward.
// `first`: start from zero. A panel stores the 16 outputs of one k together; k + 1 follows `step` numbers
// later. The numbers are floats, or bytes, which become floats when they are loaded.
template <typename T, int M, int N>
inline void tile(const float* x, i64 ldx, const T* const* w, i64 step, i64 depth, float* const* y, i64 ldy, bool first) {
  V acc[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] = first ? all(0.0f) : load(y[n] + m * ldy);
  const T* p[N];
  for (int n = 0; n < N; n++) p[n] = w[n];
  for (i64 k = 0; k < depth; k++) {
    V b[N];
    for (int n = 0; n < N; n++) b[n] = load(p[n] + k * step);
    for (int m = 0; m < M; m++) {
      V a = all(x[m * ldx + k]);
      for (int n = 0; n < N; n++) acc[m][n] = fma(a, b[n], acc[m][n]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(y[n] + m * ldy, acc[m][n]);
}

template <typename T> using Tile = void (*)(const float*, i64, const T* const*, i64, i64, float* const*, i64, bool);
template <typename T, int N>
constexpr Tile<T> TILES[] = {nullptr,       tile<T, 1, N>, tile<T, 2, N>, tile<T, 3, N>,
                             tile<T, 4, N>, tile<T, 5, N>, tile<T, 6, N>};

// How many panels run side by side. Few rows leave registers for more panels. A single chain of additions
// would wait for its own results.
inline int width(i64 rows, i64 panels) {
  int n = NR == 4 ? 4 : rows == 1 ? 4 : rows <= 3 ? 2 : 1;
  while (n > panels) n /= 2;
  return n;
}

template <typename T>
inline void product(const float* x, i64 ldx, i64 rows, const T* const* w, i64 step, i64 panels, i64 depth,
                    float* const* y, i64 ldy, bool first) {
  for (i64 m = 0; m < rows; m += MR) {
    i64 count = rows - m < MR ? rows - m : MR;
    for (i64 p = 0; p < panels;) {
      int n = width(count, panels - p);
      float* out[4];
      for (int i = 0; i < n; i++) out[i] = y[p + i] + m * ldy;
      Tile<T> f = n == 4 ? TILES<T, 4>[count] : n == 2 ? TILES<T, 2>[count] : TILES<T, 1>[count];
      f(x + m * ldx, ldx, w + p, step, depth, out, ldy, first);
      p += n;
    }
  }
}

// --- the model ----------------------------------------------------------------------------------------

struct Linear {
  i64 inputs = 0, panels = 0;
  std::vector<Panel> stored;       // empty: float or int8 weights
  std::vector<u8> last;            // a last panel of fewer than 16 rows, filled up with zeros
  Floats weight, bias, scale;      // scale: one for each output, if the weights are bytes
  std::vector<int8_t> bytes;
  bool has_bias = false;

  // weight: [outputs][inputs]. `gated`: the first half of the outputs gates the second; their panels
  // alternate. `int8`: weights are the nearest of 255 multiples of their output's scale; activations stay
  // float.
  void pack(const float* w, const float* b, i64 outputs, i64 in, bool gated, bool int8) {
    inputs = in;
    i64 half = gated ? outputs / 2 : outputs, each = up(half, W) / W;
    panels = gated ? 2 * each : each;
    float* to = int8 ? nullptr : weight.reserve(panels * W * in);
    float* scales = int8 ? scale.reserve(panels * W) : nullptr;
    if (int8) bytes.assign(panels * W * in, 0);
    float* tob = b ? bias.reserve(panels * W) : nullptr;
    has_bias = b;
    for (i64 p = 0; p < panels; p++)
      for (i64 j = 0; j < W; j++) {
        i64 at = (gated ? p / 2 : p) * W + j, row = at + (gated && p % 2 ? half : 0);
        if (at >= half) continue;
        if (int8) {
          float most = 0.0f;
          for (i64 k = 0; k < in; k++) most = std::fmax(most, std::fabs(w[row * in + k]));
          scales[p * W + j] = most / 127.0f;
          float inverse = most > 0.0f ? 127.0f / most : 0.0f;
          for (i64 k = 0; k < in; k++)
            bytes[(p * in + k) * W + j] = int8_t(std::nearbyint(w[row * in + k] * inverse));
        } else {
          for (i64 k = 0; k < in; k++) to[(p * in + k) * W + j] = w[row * in + k];
        }
        if (b) tob[p * W + j] = b[row];
      }
  }

  // `count` rows of one kind, which are the outputs from `first` on and which the caller keeps. Both are multiples
  // of 16, where a part of the outputs ends too.
  void add_stored(i32 kind, const u8* rows, i64 stride, i64 first, i64 count, i64 outputs, i64 in, bool gated) {
    inputs = in;
    i64 half = gated ? outputs / 2 : outputs, each = up(half, W) / W;
    panels = gated ? 2 * each : each;
    stored.resize(panels);
    for (i64 r = 0; r < count; r += W) {
      i64 output = first + r, p = output / W;
      if (gated) p = output < half ? 2 * (output / W) : 2 * ((output - half) / W) + 1;
      stored[p] = {kind, rows + r * stride, stride};
      if (count - r >= W) continue;
      i64 bytes = row_bytes(kind, in);
      last.assign(W * bytes, 0);
      for (i64 i = 0; i < count - r; i++) std::memcpy(last.data() + i * bytes, rows + (r + i) * stride, bytes);
      stored[p] = {kind, last.data(), bytes};
    }
  }

  void add_bias(const float* b, i64 outputs, bool gated) {
    i64 half = gated ? outputs / 2 : outputs;
    float* to = bias.reserve(panels * W);
    has_bias = true;
    for (i64 i = 0; i < outputs; i++) {
      i64 at = i % half, p = gated ? 2 * (at / W) + (i >= half) : at / W;
      to[p * W + at % W] = b[i];
    }
  }
};

// Of a layer; then, for each expert, another GATE_UP and DOWN.
enum { QKV, OUT, GATE_UP, DOWN, ROUTER, SHARED, LINEARS };
enum { NORM1, NORM2, Q_NORM, K_NORM, AFTER1, AFTER2, NORMS };  // AFTER: of what attention or MLP add

inline bool is_gated(i64 which) { return which == GATE_UP || (which >= LINEARS && (which - LINEARS) % 2 == 0); }

struct Layer {
  std::vector<Linear> linear;
  Floats norm[NORMS];
  i64 window = 0;  // keys that a row sees, its own included; 0: all before it
  i64 rope = 0;    // which frequencies; -1: positions do not matter
};

enum { EPS, EMBEDDING, RESIDUAL, ATTENTION, ATTENTION_CAP, LOGITS, LOGITS_CAP, REALS };  // scales; a cap of 0: none

struct Task { i32 segment, first, rows, start; };  // attention: rows of the batch, position of the first
struct Part { i32 expert, first, rows; };  // rows of one expert, in the order of the experts

struct Model {
  i64 layers, hidden, heads, kv_heads, dim, vocab, turned, ropes, experts, chosen, threads;
  bool renormalise, gelu, whole;  // whole: the norms of queries and keys are over all heads
  float real[REALS];
  std::vector<float> inv_freq, rope_scale;  // [ropes][turned / 2] radians for each position, [ropes] factors
  std::vector<Layer> layer;
  Floats embedding, final_norm;
  const u8* stored_embedding = nullptr;  // rows of a file, which the caller keeps
  i32 embedding_kind = F32;
  Linear head;
  bool int8 = false;
  float* kv = nullptr;  // [blocks][layers][kv_heads]: keys [dim][16], then values [16][dim padded]
  Floats x, h, qkv, att, add, gate_up, act, cos, sin;
  Floats scores, gathered, expert_gate_up, expert_act, expert_add, shared;
  std::vector<i32> choice, place;  // [rows][chosen]: expert, and its row in `gathered`
  std::vector<float> share;
  std::vector<Part> parts;

  // the step at hand
  i64 rows, segments, wanted, scored;
  const i32 *tokens, *starts, *lengths, *outputs;
  const i64* tables;
  float *logits, *states;
  std::vector<i32> segment, position;
  std::vector<Task> tasks;
  Team team;  // the last member: its threads end before the members that they use

  Model(const i64* d, int threads) : layers(d[0]), hidden(d[1]), heads(d[2]), kv_heads(d[3]), dim(d[4]),
      vocab(d[5]), turned(d[6]), ropes(d[7]), experts(d[8]), chosen(d[9]), threads(threads), renormalise(d[10]),
      gelu(d[11]), whole(d[12]), layer(d[0]), team(threads, 4 + (d[8] ? 16 : 8) * d[0]) {
    for (Layer& l : layer) l.linear = std::vector<Linear>(LINEARS + 2 * experts);
  }

  i64 dim_padded() const { return up(dim, W); }
  i64 head_floats() const { return W * (dim + dim_padded()); }
  i64 hidden_stride() const { return up(hidden, W); }
  i64 qkv_stride() const { return up((heads + 2 * kv_heads) * dim, W); }
  i64 att_stride() const { return up(heads * dim, W); }
  const i32* table(i64 s) const { return reinterpret_cast<const i32*>(tables[s]); }
  float* block(i64 l, i64 s, i64 at, i64 head) const {
    return kv + ((table(s)[at / W] * layers + l) * kv_heads + head) * head_floats();
  }

  void prepare();
  void forward();
  void embed(i64 t);
  void normalise(i64 from, i64 to, bool residual, const float* after, const float* weight);
  void rotate_and_store(i64 l, i64 t);
  void attend(i64 l, const Task& task, i64 head);
  void multiply(const Linear& lin, const float* in, i64 ldx, i64 count, float* out, i64 ldy, float* gated);
  void multiply_task(const Linear& lin, i64 p0, i64 m0, i64 m1, const float* in, i64 ldx, float* out, i64 ldy, float* gated);
  void multiply_experts(const Layer& w, i64 which, const float* in, i64 ldx, float* out, i64 ldy, float* gated);
  void choose(i64 t);
  void arrange();
  void join(i64 t, bool dense);
  void cap_logits(i64 i);
};

// y = x * w for the panels p0 … p0 + panels of stored weights, which may be of different kinds.
void stored_product(const Linear& lin, i64 p0, i64 panels, const float* x, i64 ldx, i64 rows, float* const* y, i64 ldy) {
  const Panel* w = lin.stored.data() + p0;
  for (i64 p = 0, end; p < panels; p = end) {
    for (end = p; end < panels && w[end].kind == w[p].kind;) end++;
    with_reader(w[p].kind, [&](auto reader) {
      using R = decltype(reader);
      if (rows <= MR) return stored_rows<R>(x, ldx, rows, w + p, end - p, lin.inputs, y + p, ldy);
      thread_local Floats buffer;  // arithmetic, not memory, limits a large batch: read once for all rows
      float* to = buffer.reserve(GROUP * DEEP * W);
      for (i64 k = 0; k < lin.inputs; k += DEEP) {
        i64 depth = lin.inputs - k < DEEP ? lin.inputs - k : DEEP;
        const float* floats[GROUP];
        for (i64 i = p; i < end; i++) {
          floats[i - p] = to + (i - p) * DEEP * W;
          stored_floats<R>(w[i], k, depth, to + (i - p) * DEEP * W);
        }
        product(x + k, ldx, rows, floats, W, end - p, depth, y + p, ldy, k == 0);
      }
    });
  }
}

// Turns bytes into floats once for all rows of a task. Arithmetic, not memory, limits a large batch.
void w_from_bytes(const int8_t* const* bytes, const float** w, i64 panels, i64 depth) {
  thread_local Floats buffer;
  float* to = buffer.reserve(GROUP * DEEP * W);
  for (i64 p = 0; p < panels; p++) {
    w[p] = to + p * DEEP * W;
    for (i64 k = 0; k < depth; k++) store(to + (p * DEEP + k) * W, load(bytes[p] + k * W));
  }
}

// silu, or gelu in its tanh form: g * sigmoid(g), or of 2 * sqrt(2 / pi) * (g + 0.044715 g^3).
inline V activate(V g, bool gelu) {
  V u = gelu ? all(1.5957691216f) * fma(all(0.044715f) * g, g * g, g) : g;
  return g / (all(1.0f) + exp(all(0.0f) - u));
}

inline V capped(V x, float cap) {  // cap * tanh(x / cap)
  return all(cap) - all(2.0f * cap) / (exp(x * all(2.0f / cap)) + all(1.0f));
}

// out = in * weights + bias; with `gated`, out = silu(gate) * up of that result.
void Model::multiply(const Linear& lin, const float* in, i64 ldx, i64 count, float* out, i64 ldy, float* gated) {
  i64 groups = (lin.panels + GROUP - 1) / GROUP, parts = (count + MOST - 1) / MOST;
  while (groups * parts < TASKS * threads && count / (parts + 1) >= ROWS) parts++;
  i64 each = up((count + parts - 1) / std::max<i64>(parts, 1), MR);
  team.each(groups * parts, [&](i64 task) {
    i64 m0 = std::min(task % parts * each, count), m1 = std::min(m0 + each, count);
    multiply_task(lin, task / parts * GROUP, m0, m1, in, ldx, out, ldy, gated);
  });
}

// The rows m0 … m1 and the panels from p0 on.
void Model::multiply_task(const Linear& lin, i64 p0, i64 m0, i64 m1, const float* in, i64 ldx, float* out, i64 ldy, float* gated) {
  i64 inner_stride = lin.panels / 2 * W;
  i64 panels = lin.panels - p0 < GROUP ? lin.panels - p0 : GROUP;
  i64 depth = m1 - m0 <= MR ? lin.inputs : DEEP;
  float* y[GROUP];
  for (i64 p = 0; p < panels; p++) y[p] = out + m0 * ldy + (p0 + p) * W;
  if (!lin.stored.empty()) stored_product(lin, p0, panels, in + m0 * ldx, ldx, m1 - m0, y, ldy);
  for (i64 k = lin.stored.empty() ? 0 : lin.inputs; k < lin.inputs; k += depth) {
    i64 d = lin.inputs - k < depth ? lin.inputs - k : depth;
    const float* w[GROUP];
    const int8_t* b[GROUP];
    for (i64 p = 0; p < panels; p++) {
      i64 at = ((p0 + p) * lin.inputs + k) * W;
      w[p] = lin.weight.get() + at;
      b[p] = lin.bytes.data() + at;
    }
    if (!lin.bytes.empty() && m1 - m0 > MR) w_from_bytes(b, w, panels, d);
    if (lin.bytes.empty() || m1 - m0 > MR)
      product(in + m0 * ldx + k, ldx, m1 - m0, w, W, panels, d, y, ldy, k == 0);
    else
      product(in + m0 * ldx + k, ldx, m1 - m0, b, W, panels, d, y, ldy, k == 0);
  }
  if (lin.scale.get())
    for (i64 p = 0; p < panels; p++) {
      V s = load(lin.scale.get() + (p0 + p) * W);
      for (i64 m = 0; m < m1 - m0; m++) store(y[p] + m * ldy, load(y[p] + m * ldy) * s);
    }
  if (lin.has_bias)
    for (i64 p = 0; p < panels; p++) {
      V b = load(lin.bias.get() + (p0 + p) * W);
      for (i64 m = 0; m < m1 - m0; m++) store(y[p] + m * ldy, load(y[p] + m * ldy) + b);
    }
  if (gated)
    for (i64 p = 0; p < panels; p += 2)
      for (i64 m = 0; m < m1 - m0; m++) {
        V g = load(y[p] + m * ldy), u = load(y[p + 1] + m * ldy);
        store(gated + (m0 + m) * inner_stride + (p0 + p) / 2 * W, activate(g, gelu) * u);
      }
}


void Model::embed(i64 t) {
  i64 hs = hidden_stride(), half = turned / 2;
  float* row = x.get() + t * hs;
  if (stored_embedding)
    for (i64 k = 0, bytes = row_bytes(embedding_kind, up(hidden, 8)); k < hidden; k++)
      row[k] = plain_value(embedding_kind, stored_embedding + tokens[t] * bytes, k);
  else
    std::memcpy(row, embedding.get() + i64(tokens[t]) * hs, hs * sizeof(float));
  if (real[EMBEDDING] != 1.0f)
    for (i64 i = 0; i < hidden; i++) row[i] *= real[EMBEDDING];
  for (i64 r = 0; r < ropes; r++)
    for (i64 i = 0; i < half; i++) {
      float angle = float(position[t]) * inv_freq[r * half + i];
      cos.get()[(t * ropes + r) * half + i] = cosf(angle) * rope_scale[r];
      sin.get()[(t * ropes + r) * half + i] = sinf(angle) * rope_scale[r];
    }
}

// x[from] += scale * add[from] where there is a residual, which `after` normalises first; h[to] = the RMS norm of
// x[from], or x[from] itself.
void Model::normalise(i64 from, i64 to, bool residual, const float* after, const float* weight) {
  i64 hs = hidden_stride();
  float *a = x.get() + from * hs, *o = h.get() + to * hs, *r = add.get() + from * hs;
  auto scale = [&](V squares) { return all(1.0f / std::sqrt(sum(squares) / float(hidden) + real[EPS])); };
  if (residual && after) {
    V squares = all(0.0f);
    for (i64 i = 0; i < hs; i += W) squares = fma(load(r + i), load(r + i), squares);
    V by = scale(squares);
    for (i64 i = 0; i < hs; i += W) store(r + i, load(r + i) * by * load(after + i));
  }
  V squares = all(0.0f), times = all(real[RESIDUAL]);
  for (i64 i = 0; i < hs; i += W) {
    V v = load(a + i);
    if (residual) store(a + i, v = v + load(r + i) * times);
    squares = fma(v, v, squares);
  }
  V by = scale(squares);
  for (i64 i = 0; i < hs; i += W) store(o + i, weight ? load(a + i) * by * load(weight + i) : load(a + i));
}

void head_norm(float* v, const float* weight, i64 dim, float eps) {
  float squares = 0.0f;
  for (i64 i = 0; i < dim; i++) squares = std::fma(v[i], v[i], squares);
  float scale = 1.0f / std::sqrt(squares / float(dim) + eps);
  for (i64 i = 0; i < dim; i++) v[i] = v[i] * scale * weight[i];
}

void Model::rotate_and_store(i64 l, i64 t) {
  i64 half = turned / 2, at = position[t], rope = layer[l].rope;
  float* row = qkv.get() + t * qkv_stride();
  const Floats* norms = layer[l].norm;
  if (norms[Q_NORM].get()) {
    i64 q = whole ? heads * dim : dim, k = whole ? kv_heads * dim : dim;
    for (i64 j = 0; j < heads * dim; j += q) head_norm(row + j, norms[Q_NORM].get(), q, real[EPS]);
    for (i64 j = 0; j < kv_heads * dim; j += k) head_norm(row + heads * dim + j, norms[K_NORM].get(), k, real[EPS]);
  }
  const float *c = cos.get() + (t * ropes + rope) * half, *s = sin.get() + (t * ropes + rope) * half;
  for (i64 j = 0; j < heads + kv_heads && rope >= 0; j++) {
    float* v = row + j * dim;
    for (i64 i = 0; i < half; i++) {
      float a = v[i], b = v[half + i];
      v[i] = a * c[i] - b * s[i];
      v[half + i] = b * c[i] + a * s[i];
    }
  }
  for (i64 j = 0; j < kv_heads; j++) {
    float* to = block(l, segment[t], at, j);
    const float *k = row + (heads + j) * dim, *v = row + (heads + kv_heads + j) * dim;
    for (i64 i = 0; i < dim; i++) to[i * W + at % W] = k[i];
    std::memcpy(to + W * dim + at % W * dim_padded(), v, dim * sizeof(float));
  }
}

// Softmax of the scores of one query against the keys of one stretch. Of them `hidden` … `valid` are visible.
// Rescales the earlier sums (Milakov and Gimelshein, arXiv 1805.02867).
void soften(float* s, i64 hidden, i64 valid, i64 keys, float& peak, float& total, float* out, i64 width) {
  if (valid <= hidden) valid = 0;
  for (i64 i = 0; i < hidden && valid > 0; i++) s[i] = -3.0e38f;
  if (valid > 0) {
    float highest = peak;
    alignas(64) float last[W];
    i64 whole = valid / W * W;
    V m = all(peak);
    for (i64 i = 0; i < whole; i += W) m = max(m, load(s + i));
    highest = largest(m);
    for (i64 i = whole; i < valid; i++) highest = s[i] > highest ? s[i] : highest;
    V e = all(highest), t = all(0.0f);
    for (i64 i = 0; i < whole; i += W) {
      V p = exp(load(s + i) - e);
      store(s + i, p);
      t = t + p;
    }
    if (whole < valid) {
      for (i64 i = 0; i < W; i++) last[i] = whole + i < valid ? s[whole + i] : highest;
      store(last, exp(load(last) - e));
      for (i64 i = valid - whole; i < W; i++) last[i] = 0.0f;
      store(s + whole, load(last));
      t = t + load(last);
    }
    if (highest > peak) {
      V down = exp(all(peak) - e);
      alignas(64) float d[W];
      store(d, down);
      total *= d[0];
      for (i64 i = 0; i < width; i += W) store(out + i, load(out + i) * down);
      peak = highest;
    }
    total += sum(t);
  }
  for (i64 i = 0; i < hidden && valid > 0; i++) s[i] = 0.0f;
  for (i64 i = up(valid > 0 ? valid : 0, W); i < keys; i++) s[i] = 0.0f;
}

// Causal attention for some rows of one segment and the query heads that share one key-value head.
void Model::attend(i64 l, const Task& task, i64 head) {
  i64 group = heads / kv_heads, n = task.rows * group, dp = dim_padded();
  thread_local Floats buffers;
  float* q = buffers.reserve(up(n * dim, W) + n * (dp + KEYS + 2));
  float *out = q + up(n * dim, W), *s = out + n * dp, *peak = s + n * KEYS, *total = peak + n;
  float scale = real[ATTENTION], cap = real[ATTENTION_CAP];
  for (i64 i = 0; i < n; i++) {
    peak[i] = -3.0e38f, total[i] = 0.0f;
    const float* from = qkv.get() + (task.first + i / group) * qkv_stride() + (head * group + i % group) * dim;
    for (i64 d = 0; d < dim; d++) q[i * dim + d] = from[d] * scale;
    std::memset(out + i * dp, 0, dp * sizeof(float));
  }
  i64 end = task.start + task.rows;  // keys that the last row sees
  i64 window = layer[l].window ? layer[l].window : end, begin = task.start + 1 - window;
  for (i64 k0 = begin > 0 ? begin / KEYS * KEYS : 0; k0 < end; k0 += KEYS) {
    i64 keys = end - k0 < KEYS ? end - k0 : KEYS, panels = up(keys, W) / W;
    const float* block_at[KEYS / W];
    float* y[KEYS / W];
    for (i64 p = 0; p < panels; p++) {
      block_at[p] = block(l, task.segment, k0 + p * W, head);
      y[p] = s + p * W;
    }
    product(q, dim, n, block_at, W, panels, dim, y, KEYS, true);
    for (i64 i = 0; i < n; i++) {
      i64 sees = task.start + i / group + 1 - k0;
      float* row = s + i * KEYS;
      if (cap > 0.0f)
        for (i64 k = 0; k < panels * W; k += W) store(row + k, capped(load(row + k), cap));
      i64 before = sees > window ? sees - window : 0;
      soften(row, before < keys ? before : keys, sees < keys ? sees : keys, panels * W, peak[i], total[i], out + i * dp, dp);
    }
    for (i64 p = 0; p < panels; p++) {
      i64 depth = keys - p * W < W ? keys - p * W : W;
      for (i64 d = 0; d < dp; d += GROUP * W) {
        const float* w[GROUP];
        float* o[GROUP];
        i64 parts = (dp - d) / W < GROUP ? (dp - d) / W : GROUP;
        for (i64 j = 0; j < parts; j++) {
          w[j] = block_at[p] + W * dim + d + j * W;
          o[j] = out + d + j * W;
        }
        product(s + p * W, KEYS, n, w, dp, parts, depth, o, dp, false);
      }
    }
  }
  for (i64 i = 0; i < n; i++) {
    float* to = att.get() + (task.first + i / group) * att_stride() + (head * group + i % group) * dim;
    float inverse = 1.0f / total[i];
    for (i64 d = 0; d < dim; d++) to[d] = out[i * dp + d] * inverse;
  }
}

void Model::prepare() {
  segment.clear();
  position.clear();
  tasks.clear();
  i32 step = i32(QUERIES / (heads / kv_heads));
  step = step > 0 ? step : 1;
  for (i32 s = 0; s < segments; s++) {
    for (i32 r = 0; r < lengths[s]; r += step)
      tasks.push_back({s, i32(position.size()) + r, lengths[s] - r < step ? lengths[s] - r : step, starts[s] + r});
    for (i32 i = 0; i < lengths[s]; i++) {
      segment.push_back(s);
      position.push_back(starts[s] + i);
    }
  }
  x.reserve(rows * hidden_stride());
  h.reserve(rows * hidden_stride());
  add.reserve(rows * hidden_stride());
  qkv.reserve(rows * qkv_stride());
  att.reserve(rows * att_stride());
  i64 wide = 0, expert_wide = 0;
  for (const Layer& l : layer) {
    if (l.linear[GATE_UP].panels > wide) wide = l.linear[GATE_UP].panels;
    if (experts && l.linear[LINEARS].panels > expert_wide) expert_wide = l.linear[LINEARS].panels;
  }
  gate_up.reserve(rows * wide * W);
  act.reserve(rows * wide / 2 * W);
  cos.reserve(rows * ropes * turned / 2);
  sin.reserve(rows * ropes * turned / 2);
  if (!experts) return;
  i64 all = rows * chosen;
  choice.resize(all), place.resize(all), share.resize(all), parts.reserve(all);
  scores.reserve(rows * up(experts, W));
  shared.reserve(rows * W);
  gathered.reserve(all * hidden_stride());
  expert_gate_up.reserve(all * expert_wide * W);
  expert_act.reserve(all * expert_wide / 2 * W);
  expert_add.reserve(all * hidden_stride());
}

// The experts of a row, the most likely ones in the order of their numbers, and the share of each.
void Model::choose(i64 t) {
  float* p = scores.get() + t * up(experts, W);
  i32* mine = choice.data() + t * chosen;
  float *part = share.data() + t * chosen, highest = p[0], total = 0.0f, kept = 0.0f;
  for (i64 e = 1; e < experts; e++) highest = p[e] > highest ? p[e] : highest;
  for (i64 e = 0; e < experts; e++) total += p[e] = std::exp(p[e] - highest);
  for (i64 j = 0; j < chosen; j++) {
    i32 best = -1;
    for (i32 e = 0; e < experts; e++) {
      bool taken = false;
      for (i64 i = 0; i < j; i++) taken = taken || mine[i] == e;
      if (!taken && (best < 0 || p[e] > p[best])) best = e;
    }
    mine[j] = best;
  }
  for (i64 j = 1; j < chosen; j++)
    for (i64 i = j; i > 0 && mine[i] < mine[i - 1]; i--) std::swap(mine[i], mine[i - 1]);
  for (i64 j = 0; j < chosen; j++) kept += p[mine[j]];
  for (i64 j = 0; j < chosen; j++) part[j] = p[mine[j]] / (renormalise ? kept : total);
}

// Give each choice a row of `gathered`, so that the rows of an expert follow each other.
void Model::arrange() {
  i32 at = 0;
  parts.clear();
  for (i32 e = 0; e < experts; e++) {
    i32 first = at;
    for (i64 i = 0; i < rows * chosen; i++)
      if (choice[i] == e) place[i] = at++;
    for (; first < at; first += ROWS) parts.push_back({e, first, at - first < ROWS ? at - first : i32(ROWS)});
  }
}

void Model::multiply_experts(const Layer& w, i64 which, const float* in, i64 ldx, float* out, i64 ldy, float* gated) {
  i64 groups = (w.linear[which].panels + GROUP - 1) / GROUP, all = rows * chosen;
  // A late thread must find the same number of tasks, also when the parts are those of a later layer: the most.
  i64 most = (all < experts ? all : experts) + all / ROWS;
  team.each(groups * most, [&](i64 task) {
    if (task / groups >= i64(parts.size())) return;
    const Part& part = parts[task / groups];
    multiply_task(w.linear[which + 2 * part.expert], task % groups * GROUP, part.first, part.first + part.rows, in, ldx, out, ldy, gated);
  });
}

// add[t] = the outputs of the row's experts by their shares, and that of the expert of all rows, if there is one.
void Model::join(i64 t, bool dense) {
  i64 hs = hidden_stride();
  float *to = add.get() + t * hs, gate = 1.0f / (1.0f + std::exp(-shared.get()[t * W]));
  for (i64 i = 0; i < hs; i += W) {
    V y = all(0.0f);
    for (i64 j = 0; j < chosen; j++)
      y = fma(all(share[t * chosen + j]), load(expert_add.get() + place[t * chosen + j] * hs + i), y);
    store(to + i, dense ? fma(all(gate), load(to + i), y) : y);
  }
}

void Model::cap_logits(i64 i) {
  i64 vs = up(vocab, W);
  float *row = logits + i * vs, cap = real[LOGITS_CAP];
  for (i64 k = 0; k < vs; k += W) {
    V v = load(row + k) * all(real[LOGITS]);
    store(row + k, cap > 0.0f ? capped(v, cap) : v);
  }
}

// Run by every thread of the team at once.
void Model::forward() {
  constexpr i64 SOME = 8;  // rows of a task in the phases that take little time
  auto each_row = [&](i64 n, auto f) {
    team.each((n + SOME - 1) / SOME, [&](i64 i) {
      for (i64 t = i * SOME; t < n && t < (i + 1) * SOME; t++) f(t);
    });
  };
  i64 hs = hidden_stride();
  each_row(rows, [&](i64 t) { embed(t); });
  for (i64 l = 0; l < layers; l++) {
    const Layer& w = layer[l];
    each_row(rows, [&](i64 t) { normalise(t, t, l > 0, l ? layer[l - 1].norm[AFTER2].get() : nullptr, w.norm[NORM1].get()); });
    multiply(w.linear[QKV], h.get(), hs, rows, qkv.get(), qkv_stride(), nullptr);
    each_row(rows, [&](i64 t) { rotate_and_store(l, t); });
    team.each(i64(tasks.size()) * kv_heads, [&](i64 i) { attend(l, tasks[i / kv_heads], i % kv_heads); });
    multiply(w.linear[OUT], att.get(), att_stride(), rows, add.get(), hs, nullptr);
    each_row(rows, [&](i64 t) { normalise(t, t, true, w.norm[AFTER1].get(), w.norm[NORM2].get()); });
    i64 dense = w.linear[GATE_UP].panels;
    if (dense) {
      multiply(w.linear[GATE_UP], h.get(), hs, rows, gate_up.get(), dense * W, act.get());
      multiply(w.linear[DOWN], act.get(), dense / 2 * W, rows, add.get(), hs, nullptr);
    }
    if (!w.linear[ROUTER].panels) continue;
    multiply(w.linear[ROUTER], h.get(), hs, rows, scores.get(), up(experts, W), nullptr);
    if (dense) multiply(w.linear[SHARED], h.get(), hs, rows, shared.get(), W, nullptr);
    each_row(rows, [&](i64 t) { choose(t); });
    team.each(1, [&](i64) { arrange(); });
    each_row(rows, [&](i64 t) {
      for (i64 j = 0; j < chosen; j++)
        std::memcpy(gathered.get() + place[t * chosen + j] * hs, h.get() + t * hs, hs * sizeof(float));
    });
    i64 wide = w.linear[LINEARS].panels * W;
    multiply_experts(w, LINEARS, gathered.get(), hs, expert_gate_up.get(), wide, expert_act.get());
    multiply_experts(w, LINEARS + 1, expert_act.get(), wide / 2, expert_add.get(), hs, nullptr);
    each_row(rows, [&](i64 t) { join(t, dense); });
  }
  each_row(wanted, [&](i64 i) {
    normalise(outputs[i], i, true, layer[layers - 1].norm[AFTER2].get(), final_norm.get());
    if (i >= scored) std::memcpy(states + (i - scored) * hidden, h.get() + i * hs, hidden * sizeof(float));
  });
  multiply(head, h.get(), hs, scored, logits, up(vocab, W), nullptr);
  if (real[LOGITS] != 1.0f || real[LOGITS_CAP] > 0.0f) each_row(scored, [&](i64 i) { cap_logits(i); });
}

void copy_padded(Floats& to, const float* from, i64 rows, i64 width) {
  i64 stride = up(width, W);
  float* p = to.reserve(rows * stride);
  for (i64 r = 0; r < rows; r++) std::memcpy(p + r * stride, from + r * width, width * sizeof(float));
}

}  // namespace

extern "C" {

int aiosd_abi() { return 6; }

// dims: as in the constructor of Model; reals: as in its enum.
void* aiosd_new(const i64* dims, const float* reals, const float* inv_freq, const float* rope_scale, const float* embedding,
                const float* final_norm, const float* head, int threads, int int8) {
  auto* m = new Model(dims, threads);
  std::memcpy(m->real, reals, sizeof m->real);
  m->inv_freq.assign(inv_freq, inv_freq + m->ropes * m->turned / 2);
  m->rope_scale.assign(rope_scale, rope_scale + m->ropes);
  if (embedding) copy_padded(m->embedding, embedding, m->vocab, m->hidden);
  copy_padded(m->final_norm, final_norm, 1, m->hidden);
  m->int8 = int8;
  if (head) m->head.pack(head, nullptr, m->vocab, m->hidden, false, int8);
  return m;
}

void aiosd_layer(void* model, int layer, i64 window, i64 rope) {
  Layer& to = static_cast<Model*>(model)->layer[layer];
  to.window = window, to.rope = rope;
}

// The rows of a file, which the caller keeps until aiosd_free.
void aiosd_stored_embedding(void* model, int kind, const u8* rows) {
  auto* m = static_cast<Model*>(model);
  m->embedding_kind = kind;
  m->stored_embedding = rows;
}

// Rows of a linear as they are stored, `stride` bytes apart, which the caller keeps until aiosd_free; layer -1:
// the head. Call it for all parts of the linear.
void aiosd_stored(void* model, int layer, int which, int kind, const u8* rows, i64 stride, i64 first, i64 count, i64 outputs, i64 inputs) {
  auto* m = static_cast<Model*>(model);
  Linear& to = layer < 0 ? m->head : m->layer[layer].linear[which];
  to.add_stored(kind, rows, stride, first, count, outputs, inputs, layer >= 0 && is_gated(which));
}

void aiosd_bias(void* model, int layer, int which, const float* bias, i64 outputs) {
  static_cast<Model*>(model)->layer[layer].linear[which].add_bias(bias, outputs, is_gated(which));
}

void aiosd_free(void* model) { delete static_cast<Model*>(model); }

void aiosd_linear(void* model, int layer, int which, const float* weight, const float* bias, i64 outputs, i64 inputs) {
  auto* m = static_cast<Model*>(model);
  m->layer[layer].linear[which].pack(weight, bias, outputs, inputs, is_gated(which), m->int8);
}

void aiosd_norm(void* model, int layer, int which, const float* weight, i64 width) {
  copy_padded(static_cast<Model*>(model)->layer[layer].norm[which], weight, 1, width);
}

i64 aiosd_kv_floats(void* model) {  // floats in one block
  auto* m = static_cast<Model*>(model);
  return m->layers * m->kv_heads * m->head_floats();
}

// kv: the caller owns it and zeroes it before the first use. The first `scored` of the `wanted` outputs get
// logits, [scored][vocabulary padded to 16]. The others get final hidden states, [wanted - scored][hidden].
void aiosd_forward(void* model, float* kv, i64 rows, const i32* tokens, i64 segments, const i64* tables, const i32* starts,
                   const i32* lengths, i64 wanted, const i32* outputs, i64 scored, float* logits, float* states) {
  auto* m = static_cast<Model*>(model);
  m->kv = kv;
  m->rows = rows, m->segments = segments, m->wanted = wanted;
  m->tokens = tokens, m->tables = tables, m->starts = starts, m->lengths = lengths;
  m->outputs = outputs, m->scored = scored, m->logits = logits, m->states = states;
  m->prepare();
  m->team.run([](void* p) { static_cast<Model*>(p)->forward(); }, m);
}
}
