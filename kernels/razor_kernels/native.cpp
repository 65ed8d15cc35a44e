// Attention over per-head pages on a CPU: the native form of `razor_kernels.step`.
//
// It does not use PyTorch: it takes addresses and strides, so any C++ compiler builds it in
// seconds, and ctypes loads it. It is compiled once for each instruction set that `setup.py`
// lists; vectors are GCC's, as wide as that set's registers.
//
//   write      one task per (request, KV head): rows into pages; a full page gets its sums
//   attention  one task per (request, KV head, rows of queries, span of keys); spans of one
//              row are merged by log-sum-exp
//
// A task walks its keys in tiles. Scores are in base 2. A tile's rows of K and V are read
// in place; if many query rows share them they are widened to fp32 first.
//
// bf16 is widened in pairs, which takes one operation per vector: of 2 W numbers, those at
// even places come first, then the others. Output sums keep that order until they are stored.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t half_vec __attribute__((vector_size(2 * W)));
typedef uint8_t byte_vec __attribute__((vector_size(W)));

enum Kind : int32_t { F32 = 0, BF16 = 1, F16 = 2, F8 = 3 };

constexpr int kTileKeys = 64;
// Query rows that share a tile; each has a row in the score and output buffers.
constexpr int kTileRows = 64;
// From this many rows on, a tile is widened once instead of once per four rows.
constexpr int kWidenRows = 8;
constexpr int kMaxHeadDim = 512;
// Longest sum of products over a head's numbers.
constexpr int kSumDims = 128;
// Scores by transposed keys: up to so many rows, and so many numbers of a head a row.
constexpr int kTransposedRows = 7;
constexpr int kTransposedDims = 20;
constexpr int kCacheLine = 64;
// Bytes to prefetch ahead: a page's rows are consecutive.
constexpr int kAhead = 2048;
// Fewest keys of a span that gets its own partial result.
constexpr int64_t kMinSpan = 512;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kNone = -std::numeric_limits<float>::infinity();

}  // namespace

// One pool of one step. Strides in bytes; table_stride in entries.
struct Pool {
  char* cache;
  int64_t page_stride;
  int64_t slot_stride;
  const int32_t* table;
  int64_t table_stride;
  const int64_t* slot_mapping;
  int64_t window;
  int64_t ratio;  // in millionths
  int32_t sinks;
  int32_t block_size;
  int32_t local;
};

struct Step {
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  const int32_t* dense_until;
  int32_t num_requests;
  int32_t item_size;  // bytes of a stored number
  Pool pools[2];
};

struct Layer {
  const int32_t* pool_of;
  const int32_t* slot_of;
  const float* slopes;  // null without ALiBi
  const float* sinks;   // logits; null without learned sinks
  int32_t num_kv_heads;
  int32_t group;
  int32_t head_dim;
  int32_t cache_kind;
  int32_t query_kind;
  int32_t compensation;
  float scale;
  float soft_cap;  // 0 for none
  float k_scale;
  float v_scale;
};

namespace {

// Numbers, widened.

inline vec reinterpret_vec(uvec bits) {
  vec x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uvec bits_of(vec x) {
  uvec bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <Kind K>
inline vec load(const char* from);

template <>
inline vec load<F32>(const char* from) {
  vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// GCC 12 widens integers in two halves; the instruction does it in one step.
inline uvec load_halves(const char* from) {
#if defined(__AVX512F__)
  return (uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
  half_vec h;
  std::memcpy(&h, from, sizeof h);
  return __builtin_convertvector(h, uvec);
#endif
}

inline uvec load_bytes(const char* from) {
#if defined(__AVX512F__)
  return (uvec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (uvec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  byte_vec b;
  std::memcpy(&b, from, sizeof b);
  return __builtin_convertvector(b, uvec);
#endif
}

template <>
inline vec load<BF16>(const char* from) {
  return reinterpret_vec(load_halves(from) << 16);
}

// A narrow float's magnitude, shifted into an fp32, is off by a power of two, the difference
// of the biases; the product corrects it, exactly for subnormals too.
template <>
inline vec load<F16>(const char* from) {
  const uvec u = load_halves(from);
  const vec magnitude = reinterpret_vec((u & 0x7fffu) << 13) * 0x1p112f;
  return reinterpret_vec(bits_of(magnitude) | ((u & 0x8000u) << 16));
}

template <>
inline vec load<F8>(const char* from) {
  const uvec u = load_bytes(from);
  const vec magnitude = reinterpret_vec((u & 0x7fu) << 20) * 0x1p120f;
  return reinterpret_vec(bits_of(magnitude) | ((u & 0x80u) << 24));
}

constexpr int width(Kind kind) { return kind == F32 ? 4 : kind == F8 ? 1 : 2; }

// Calls with the number of rows, at most Most, as a constant.
template <int Most, typename Function>
inline void with_rows(int rows, Function&& function) {
  if constexpr (Most > 1)
    if (rows < Most) return with_rows<Most - 1>(rows, function);
  function(std::integral_constant<int, Most>());
}

template <typename Function>
inline void with_kind(int32_t kind, Function&& function) {
  switch (kind) {
    case F32: return function(std::integral_constant<Kind, F32>());
    case BF16: return function(std::integral_constant<Kind, BF16>());
    case F16: return function(std::integral_constant<Kind, F16>());
    default: return function(std::integral_constant<Kind, F8>());
  }
}

inline void widen(const char* from, int32_t kind, int count, float* to) {
  with_kind(kind, [&](auto k) {
    constexpr Kind K = decltype(k)::value;
    for (int i = 0; i < count; i += W) {
      const vec x = load<K>(from + i * width(K));
      std::memcpy(to + i, &x, sizeof x);
    }
  });
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

// To fp16, to nearest even: exact products do the rounding (no F16C on every CPU).
inline uint16_t to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves its bits at the low end
    float y;
    std::memcpy(&y, &magnitude, sizeof y);
    y += 0.5f;
    std::memcpy(&bits, &y, sizeof bits);
    return sign | (bits - 0x3f000000u);
  }
  return sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13);
}

inline void store(const float* from, int32_t kind, int count, float factor, char* to) {
  if (kind == F32) {
    for (int i = 0; i < count; ++i) reinterpret_cast<float*>(to)[i] = from[i] * factor;
  } else if (kind == BF16) {
    for (int i = 0; i < count; ++i) reinterpret_cast<uint16_t*>(to)[i] = to_bf16(from[i] * factor);
  } else {
    for (int i = 0; i < count; ++i) reinterpret_cast<uint16_t*>(to)[i] = to_f16(from[i] * factor);
  }
}

// 2^x for x <= 0 or so, below 2^-126 it is 0. Relative error 2e-7: Taylor's series of
// 2^f on [-1/2, 1/2] to the sixth power.
inline vec exp2_vec(vec x) {
  const vec low = vec{} - 126.0f;
  const ivec keep = x > low;
  x = keep ? x : low;
  const vec magic = vec{} + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x)
  const vec shifted = x + magic;
  const vec f = x - (shifted - magic);
  vec p = vec{} + 1.5403530393381609e-4f;
  p = p * f + 1.3333558146428443e-3f;
  p = p * f + 9.6181291076284772e-3f;
  p = p * f + 5.5504108664821580e-2f;
  p = p * f + 2.4022650695910071e-1f;
  p = p * f + 6.9314718055994531e-1f;
  p = p * f + 1.0f;
  const uvec exponent = (bits_of(shifted) - 0x4b400000u) << 23;
  const vec result = reinterpret_vec(bits_of(p) + exponent);
  return keep ? result : vec{};
}

inline float exp2_scalar(float x) { return exp2_vec(vec{} + x)[0]; }

template <int Half>
inline vec swapped(vec x) {
  ivec other;
  for (int i = 0; i < W; ++i) other[i] = i ^ Half;
  return __builtin_shuffle(x, other);
}

template <int Half = W / 2>
inline float sum(vec x) {
  x += swapped<Half>(x);
  if constexpr (Half > 1) return sum<Half / 2>(x);
  return x[0];
}

template <int Half = W / 2>
inline float largest(vec x) {
  const vec y = swapped<Half>(x);
  x = x > y ? x : y;
  if constexpr (Half > 1) return largest<Half / 2>(x);
  return x[0];
}

// Sums of W vectors at once: lane i of the result is the sum of the lanes of x[i]. At each
// level, lanes with the level's bit clear continue one vector, the others the other.
template <int Half>
inline void fold(vec* x) {
  ivec near, far;
  for (int i = 0; i < W; ++i) {
    near[i] = (i & Half) ? i + W : i;
    far[i] = (i & Half) ? (i ^ Half) + W : i ^ Half;
  }
  for (int i = 0; i < Half; ++i)
    x[i] = __builtin_shuffle(x[i], x[i + Half], near) + __builtin_shuffle(x[i], x[i + Half], far);
  if constexpr (Half > 1) fold<Half / 2>(x);
}

// x[i][j] becomes x[j][i]: at each level, blocks off the diagonal are swapped.
template <int Half>
inline void transpose(vec* x) {
  ivec upper, lower;
  for (int i = 0; i < W; ++i) {
    upper[i] = (i & Half) ? (i ^ Half) + W : i;
    lower[i] = (i & Half) ? i + W : i ^ Half;
  }
  for (int i = 0; i < W; ++i) {
    if (i & Half) continue;
    const vec first = x[i], second = x[i + Half];
    x[i] = __builtin_shuffle(first, second, upper);
    x[i + Half] = __builtin_shuffle(first, second, lower);
  }
  if constexpr (Half > 1) transpose<Half / 2>(x);
}

// 2 W bf16 numbers: those at even places, and those at odd ones.
struct Pair {
  vec even;
  vec odd;
};

inline Pair load_pair(const char* from) {
  uvec x;
  std::memcpy(&x, from, sizeof x);
  return {reinterpret_vec(x << 16), reinterpret_vec(x & 0xffff0000u)};
}

// From the order in memory to the order of pairs, and back.
template <bool Back>
inline void reorder(float* row, int count) {
  for (int d = 0; d < count; d += 2 * W) {
    float block[2 * W];
    std::memcpy(block, row + d, sizeof block);
    for (int i = 0; i < W; ++i) {
      if constexpr (Back) {
        row[d + 2 * i] = block[i];
        row[d + 2 * i + 1] = block[W + i];
      } else {
        row[d + i] = block[2 * i];
        row[d + W + i] = block[2 * i + 1];
      }
    }
  }
}

// Scores of Rows query rows (bf16) against W / Rows keys (bf16).
template <int Rows>
inline vec dots_bf16(const char* q, int head_dim, const char* const* key) {
  constexpr int Keys = W / Rows;
  vec acc[W];
  for (int i = 0; i < W; ++i) acc[i] = vec{};
  for (int d = 0; d < head_dim; d += 2 * W) {
#if defined(__AVX512BF16__)
    __m512bh k[Keys];
    for (int j = 0; j < Keys; ++j) k[j] = (__m512bh)_mm512_loadu_si512(key[j] + d * 2);
    for (int r = 0; r < Rows; ++r) {
      const __m512bh row = (__m512bh)_mm512_loadu_si512(q + (r * head_dim + d) * 2);
      for (int j = 0; j < Keys; ++j)
        acc[r * Keys + j] = (vec)_mm512_dpbf16_ps((__m512)acc[r * Keys + j], row, k[j]);
    }
#else
    Pair k[Keys];
    for (int j = 0; j < Keys; ++j) k[j] = load_pair(key[j] + d * 2);
    for (int r = 0; r < Rows; ++r) {
      const Pair row = load_pair(q + (r * head_dim + d) * 2);
      for (int j = 0; j < Keys; ++j)
        acc[r * Keys + j] += row.even * k[j].even + row.odd * k[j].odd;
    }
#endif
  }
  fold<W / 2>(acc);
  return acc[0];
}

// Scores of Rows query rows against W / Rows keys; out[row * (W / Rows) + key].
template <Kind K, int Rows>
inline vec dots(const float* q, int head_dim, const char* const* key) {
  constexpr int Keys = W / Rows;
  vec acc[W];
  for (int i = 0; i < W; ++i) acc[i] = vec{};
  for (int d = 0; d < head_dim; d += W) {
    vec k[Keys];
    for (int j = 0; j < Keys; ++j) k[j] = load<K>(key[j] + d * width(K));
    for (int r = 0; r < Rows; ++r) {
      const vec row = load<F32>(reinterpret_cast<const char*>(q + r * head_dim + d));
      for (int j = 0; j < Keys; ++j) acc[r * Keys + j] += row * k[j];
    }
  }
  fold<W / 2>(acc);
  return acc[0];
}

// Keys in a tile: addresses of their rows, and positions.
struct Tile {
  const char* key[kTileKeys + W];
  int32_t position[kTileKeys];
  int count = 0;
};

struct Scratch {
  alignas(64) uint16_t q_bf16[kTileRows * kMaxHeadDim];
  alignas(64) float q[kTileRows * kMaxHeadDim];
  alignas(64) float acc[kTileRows * kMaxHeadDim];
  alignas(64) float scores[kTileRows * kTileKeys];
  alignas(64) float keys[kTileKeys * kMaxHeadDim];
  alignas(64) float values[kTileKeys * kMaxHeadDim];
  float m[kTileRows];
  float l[kTileRows];
};

// How a tile's rows are read.
template <Kind Stored, bool InPairs>
struct Reading {
  static constexpr Kind kind = Stored;
  static constexpr bool pairs = InPairs;
};

// K and V of keys [j, j + Keys) are fetched kAhead bytes before they are read.
template <int Keys>
inline void prefetch(const Tile& tile, int j, int bytes) {
  for (int i = 0; i < Keys; ++i)
    for (int b = 0; b < bytes; b += kCacheLine)
      __builtin_prefetch(tile.key[j + i] + kAhead + b);
}

// Adds the product of a pair of bf16 numbers of q with those of W keys.
inline vec add_pair(vec sum, uint32_t q, uvec keys) {
#if defined(__AVX512BF16__)
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(q), (__m512bh)keys);
#else
  const Pair pair = {reinterpret_vec(keys << 16), reinterpret_vec(keys & 0xffff0000u)};
  const Pair row = {reinterpret_vec(uvec{} + (q << 16)), reinterpret_vec(uvec{} + (q & 0xffff0000u))};
  return sum + row.even * pair.even + row.odd * pair.odd;
#endif
}

// Scores of Rows rows (bf16) against W keys (bf16) at a time, transposed in registers: rows
// of few numbers, shared by several queries, cost less so than sums across vectors.
template <int Rows>
void score_transposed(
    const char* q, int head_dim, const Tile& tile, float factor, float* scores) {
  for (int j = 0; j < tile.count; j += W) {
    prefetch<W>(tile, j, 4 * head_dim);
    vec even[Rows], odd[Rows];  // two sums a row: an instruction waits for the last of its sum
    for (int r = 0; r < Rows; ++r) even[r] = odd[r] = vec{};
    for (int d = 0; d < head_dim; d += 2 * W) {
      vec x[W];
      for (int i = 0; i < W; ++i) std::memcpy(&x[i], tile.key[j + i] + d * 2, sizeof(vec));
      transpose<W / 2>(x);
      for (int i = 0; i < W; i += 2)
        for (int r = 0; r < Rows; ++r) {
          uint32_t pair[2];
          std::memcpy(pair, q + (r * head_dim + d + 2 * i) * 2, sizeof pair);
          even[r] = add_pair(even[r], pair[0], bits_of(x[i]));
          odd[r] = add_pair(odd[r], pair[1], bits_of(x[i + 1]));
        }
    }
    for (int r = 0; r < Rows; ++r) {
      const vec s = (even[r] + odd[r]) * factor;
      std::memcpy(scores + r * kTileKeys + j, &s, sizeof s);
    }
  }
}

template <typename Read, int Rows>
inline void score_rows(
    const char* q, int head_dim, const Tile& tile, float factor, float* scores, bool first) {
  constexpr int Keys = W / Rows;
  const int bytes = 2 * head_dim * width(Read::kind);
  for (int j = 0; j < tile.count; j += Keys) {
    if (first) prefetch<Keys>(tile, j, bytes);
    vec s;
    if constexpr (Read::pairs) {
      s = dots_bf16<Rows>(q, head_dim, tile.key + j);
    } else {
      s = dots<Read::kind, Rows>(reinterpret_cast<const float*>(q), head_dim, tile.key + j);
    }
    s *= factor;
    float lanes[W];
    std::memcpy(lanes, &s, sizeof lanes);
    for (int r = 0; r < Rows; ++r)
      std::memcpy(scores + r * kTileKeys + j, lanes + r * Keys, Keys * sizeof(float));
  }
}

// scores[row, key] = factor * q[row] . k[key]; q is bf16 where tiles are read in pairs.
template <typename Read>
void score(const char* q, int rows, int head_dim, const Tile& tile, float factor, float* scores) {
  if constexpr (Read::pairs) {
    if (rows <= kTransposedRows && head_dim <= kTransposedDims * rows)
      return with_rows<kTransposedRows>(rows, [&](auto n) {
        score_transposed<decltype(n)::value>(q, head_dim, tile, factor, scores);
      });
  }
  const int64_t row = head_dim * (Read::pairs ? 2 : 4);
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    score_rows<Read, 4>(q + r * row, head_dim, tile, factor, scores + r * kTileKeys, r == 0);
  for (; r + 2 <= rows; r += 2)
    score_rows<Read, 2>(q + r * row, head_dim, tile, factor, scores + r * kTileKeys, r == 0);
  for (; r < rows; ++r)
    score_rows<Read, 1>(q + r * row, head_dim, tile, factor, scores + r * kTileKeys, r == 0);
}

// Scores of Rows rows against Vectors * W keys, of a tile laid out `[head_dim, kTileKeys]`.
template <int Rows, int Vectors>
inline void score_block(
    const float* q, int head_dim, const float* columns, float factor, float* scores) {
  // Summed in parts: errors grow with the length of a sum.
  for (int from = 0; from < head_dim; from += kSumDims) {
    const int to = std::min(from + kSumDims, head_dim);
    vec acc[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
      for (int i = 0; i < Vectors; ++i) acc[r][i] = vec{};
    for (int d = from; d < to; ++d) {
      vec k[Vectors];
      for (int i = 0; i < Vectors; ++i)
        std::memcpy(&k[i], columns + d * kTileKeys + i * W, sizeof(vec));
      for (int r = 0; r < Rows; ++r)
        for (int i = 0; i < Vectors; ++i) acc[r][i] += k[i] * q[r * head_dim + d];
    }
    for (int r = 0; r < Rows; ++r)
      for (int i = 0; i < Vectors; ++i) {
        float* place = scores + r * kTileKeys + i * W;
        vec s = acc[r][i] * factor;
        if (from > 0) s += load<F32>(reinterpret_cast<const char*>(place));
        std::memcpy(place, &s, sizeof s);
      }
  }
}

template <int Rows>
inline void score_block_rows(
    const float* q, int head_dim, const float* columns, int keys, float factor, float* scores) {
  int j = 0;
  for (; j + 4 * W <= keys; j += 4 * W)
    score_block<Rows, 4>(q, head_dim, columns + j, factor, scores + j);
  for (; j < keys; j += W) score_block<Rows, 1>(q, head_dim, columns + j, factor, scores + j);
}

void score_columns(
    const float* q, int rows, int head_dim, const float* columns, int keys, float factor,
    float* scores) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    score_block_rows<4>(q + r * head_dim, head_dim, columns, keys, factor, scores + r * kTileKeys);
  for (; r < rows; ++r)
    score_block_rows<1>(q + r * head_dim, head_dim, columns, keys, factor, scores + r * kTileKeys);
}

// K of a tile to fp32, columns of keys: `[head_dim, kTileKeys]`.
template <Kind K>
void widen_columns(const Tile& tile, int head_dim, float* columns) {
  for (int j = 0; j < tile.count; j += W)
    for (int d = 0; d < head_dim; d += W) {
      vec x[W];
      for (int i = 0; i < W; ++i) x[i] = load<K>(tile.key[j + i] + d * width(K));
      transpose<W / 2>(x);
      for (int i = 0; i < W; ++i)
        std::memcpy(columns + (d + i) * kTileKeys + j, &x[i], sizeof(vec));
    }
}

template <typename Read, int Rows, int Vectors>
inline void add_values(const float* p, int64_t offset, const Tile& tile, float* acc, int head_dim) {
  vec sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int i = 0; i < Vectors; ++i) sums[r][i] = vec{};
  for (int j = 0; j < tile.count; ++j) {
    vec v[Vectors];
    const char* from = tile.key[j] + offset;
    if constexpr (Read::pairs) {
      for (int i = 0; i < Vectors; i += 2) {
        const Pair pair = load_pair(from + i * W * 2);
        v[i] = pair.even;
        v[i + 1] = pair.odd;
      }
    } else {
      constexpr Kind K = Read::kind;
      for (int i = 0; i < Vectors; ++i) v[i] = load<K>(from + i * W * width(K));
    }
    for (int r = 0; r < Rows; ++r)
      for (int i = 0; i < Vectors; ++i) sums[r][i] += v[i] * p[r * kTileKeys + j];
  }
  // A tile is summed on its own first: errors grow with the number of tiles, not of keys.
  for (int r = 0; r < Rows; ++r)
    for (int i = 0; i < Vectors; ++i) {
      float* to = acc + r * head_dim + i * W;
      const vec total = load<F32>(reinterpret_cast<const char*>(to)) + sums[r][i];
      std::memcpy(to, &total, sizeof total);
    }
}

template <typename Read, int Rows>
inline void add_value_rows(
    const float* p, int64_t offset, const Tile& tile, float* acc, int head_dim) {
  constexpr int Item = width(Read::kind);
  constexpr int Rest = Read::pairs ? 2 : 1;
  int d = 0;
  for (; d + 4 * W <= head_dim; d += 4 * W)
    add_values<Read, Rows, 4>(p, offset + d * Item, tile, acc + d, head_dim);
  for (; d < head_dim; d += Rest * W)
    add_values<Read, Rows, Rest>(p, offset + d * Item, tile, acc + d, head_dim);
}

// acc[row] += sum over keys of p[row, key] * v[key]; offset: bytes from a K row to its V.
template <typename Read>
void add_all_values(
    const float* p, int rows, int64_t offset, const Tile& tile, float* acc, int head_dim) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    add_value_rows<Read, 4>(p + r * kTileKeys, offset, tile, acc + r * head_dim, head_dim);
  if (r == rows) return;
  with_rows<3>(rows - r, [&](auto n) {
    constexpr int Rows = decltype(n)::value;
    add_value_rows<Read, Rows>(p + r * kTileKeys, offset, tile, acc + r * head_dim, head_dim);
  });
}

// Which keys a query sees: positions [0, sink_end) and [window_start, t], and a slot.
struct SeenKeys {
  int64_t sink_end;
  int64_t window_start;
  int64_t num_dropped;  // 0: no slot
  int64_t slot_page;    // of the request
};

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// `window.Window.first_window_page`.
inline int64_t first_window_page(const Pool& pool, int64_t page) {
  const int64_t last = (page + 1) * pool.block_size - 1;
  const int64_t window = std::max(ceil_div(last * pool.ratio, 1000000), pool.window);
  return std::max<int64_t>(page - ceil_div(window, pool.block_size), 0);
}

inline SeenKeys seen_keys(const Pool& pool, bool dense, int64_t t) {
  if (dense) return {0, 0, 0, 0};
  const int64_t first = first_window_page(pool, t / pool.block_size);
  const int64_t start = first * pool.block_size;
  const int64_t sinks = pool.sinks;
  return {std::min(sinks, start), start, std::max<int64_t>(start - sinks, 0), first - 1};
}

// A task: query rows of one request and KV head, and a span of the keys that they see,
// counted without the gap between sinks and window.
struct Task {
  int32_t request;
  int32_t head;
  int64_t first_query;  // position
  int32_t num_queries;
  int64_t first_row;  // of the batch
  SeenKeys seen;
  int64_t begin;
  int64_t end;
  bool with_slot;
  int64_t partial;  // index into the partial results; -1: the task writes the output itself
  int32_t num_partials;  // of the first of a row's partials, 0 otherwise
};

struct Batch {
  const Step& step;
  const Layer& layer;
  const char* query;
  int64_t query_stride;
  char* out;
  int64_t out_stride;
};

class Worker {
 public:
  Worker(const Batch& batch, Scratch& scratch)
      : batch_(batch), layer_(batch.layer), s_(scratch), head_dim_(batch.layer.head_dim) {}

  void run(const Task& task, float* partials) {
    begin(task);
    for (int64_t at = task.begin; at < task.end;) {
      at = fill(task, at);
      take_tile(task);
    }
    if (task.with_slot) take_slot(task);
    if (task.partial < 0) {
      finish(task);
    } else {
      keep(partials + task.partial * partial_size());
    }
  }

  // Merge a row's partial results (log-sum-exp) and write it out.
  void merge(const Task& first, const float* partials) {
    set_rows(first);
    const int64_t size = partial_size();
    const float* part = partials + first.partial * size;
    for (int r = 0; r < rows_; ++r) {
      float m = kNone, l = 0;
      for (int i = 0; i < first.num_partials; ++i) m = std::max(m, part[i * size + r]);
      float* acc = s_.acc + r * head_dim_;
      std::fill(acc, acc + head_dim_, 0.0f);
      for (int i = 0; i < first.num_partials; ++i) {
        const float* from = part + i * size;
        const float weight = from[r] == kNone ? 0.0f : exp2_scalar(from[r] - m);
        l += weight * from[kTileRows + r];
        for (int d = 0; d < head_dim_; ++d)
          acc[d] += weight * from[2 * kTileRows + r * head_dim_ + d];
      }
      s_.l[r] = l;
    }
    finish(first);
  }

  int64_t partial_size() const { return 2 * kTileRows + layer_.group * head_dim_; }

 private:
  const Pool& pool(const Task& task) const {
    return batch_.step.pools[layer_.pool_of[task.head]];
  }

  const char* page(const Task& task, int64_t index) const {
    const Pool& p = pool(task);
    const int64_t id = p.table[task.request * p.table_stride + index];
    return p.cache + id * p.page_stride + layer_.slot_of[task.head] * p.slot_stride;
  }

  void set_rows(const Task& task) {
    rows_ = task.num_queries * layer_.group;
    pairs_ = layer_.cache_kind == BF16 && layer_.query_kind == BF16 &&
             head_dim_ % (2 * W) == 0 && rows_ < kWidenRows;
  }

  // Rows of q in fp32, and unchanged where tiles are read in pairs.
  void begin(const Task& task) {
    set_rows(task);
    factor_ = layer_.scale * layer_.k_scale * (layer_.soft_cap > 0 ? 1.0f : kLog2E);
    const int item = width(static_cast<Kind>(layer_.query_kind));
    const int row_size = layer_.group * head_dim_;
    for (int i = 0; i < task.num_queries; ++i) {
      const char* from = batch_.query + (task.first_row + i) * batch_.query_stride +
                         int64_t{task.head} * row_size * item;
      widen(from, layer_.query_kind, row_size, s_.q + i * row_size);
      if (pairs_) std::memcpy(s_.q_bf16 + i * row_size, from, row_size * sizeof(uint16_t));
    }
    std::fill(s_.acc, s_.acc + rows_ * head_dim_, 0.0f);
    std::fill(s_.m, s_.m + rows_, kNone);
    std::fill(s_.l, s_.l + rows_, 0.0f);
    if (layer_.sinks && task.begin == 0) begin_with_sinks(task);
  }

  // A learned sink is a key of no value that comes first, so only in a row's first span.
  void begin_with_sinks(const Task& task) {
    for (int r = 0; r < rows_; ++r)
      s_.m[r] = layer_.sinks[task.head * layer_.group + r % layer_.group] * kLog2E;
    std::fill(s_.l, s_.l + rows_, 1.0f);
  }

  // The next tile's keys; returns where the one after it begins.
  int64_t fill(const Task& task, int64_t at) {
    const Pool& p = pool(task);
    const int64_t row = 2LL * head_dim_ * batch_.step.item_size;
    const int64_t gap = task.seen.window_start - task.seen.sink_end;
    tile_.count = 0;
    while (at < task.end && tile_.count < kTileKeys) {
      const bool sink = at < task.seen.sink_end;
      const int64_t position = sink ? at : at + gap;
      const int64_t offset = position % p.block_size;
      int64_t n = std::min<int64_t>(p.block_size - offset, kTileKeys - tile_.count);
      n = std::min(n, (sink ? std::min(task.seen.sink_end, task.end) : task.end) - at);
      const char* from = page(task, position / p.block_size) + offset * row;
      for (int64_t i = 0; i < n; ++i) {
        tile_.key[tile_.count + i] = from + i * row;
        tile_.position[tile_.count + i] = position + i;
      }
      tile_.count += n;
      at += n;
    }
    // Blocks of keys may overrun: they read the last key again, and the result is not used.
    for (int i = 0; i < W; ++i) tile_.key[tile_.count + i] = tile_.key[tile_.count - 1];
    return at;
  }

  void take_tile(const Task& task) {
    const int64_t value_offset = int64_t{head_dim_} * batch_.step.item_size;
    if (rows_ >= kWidenRows) return take_widened(task, value_offset);
    if (pairs_) return read_tile<Reading<BF16, true>>(task, value_offset);
    with_kind(layer_.cache_kind, [&](auto k) {
      read_tile<Reading<decltype(k)::value, false>>(task, value_offset);
    });
  }

  // A tile that many rows share: widened once, with K transposed, so that no sums across a
  // vector are needed.
  void take_widened(const Task& task, int64_t value_offset) {
    with_kind(layer_.cache_kind, [&](auto k) {
      widen_columns<decltype(k)::value>(tile_, head_dim_, s_.keys);
    });
    const int keys = (tile_.count + W - 1) / W * W;
    score_columns(s_.q, rows_, head_dim_, s_.keys, keys, factor_, s_.scores);
    for (int r = 0; r < rows_; ++r) take_row(task, r);
    for (int j = 0; j < tile_.count; ++j) {
      widen(tile_.key[j] + value_offset, layer_.cache_kind, head_dim_, s_.values + j * head_dim_);
      tile_.key[j] = reinterpret_cast<const char*>(s_.values + j * head_dim_);
    }
    add_all_values<Reading<F32, false>>(s_.scores, rows_, 0, tile_, s_.acc, head_dim_);
  }

  template <typename Read>
  void read_tile(const Task& task, int64_t value_offset) {
    const char* q = Read::pairs ? reinterpret_cast<const char*>(s_.q_bf16)
                                : reinterpret_cast<const char*>(s_.q);
    score<Read>(q, rows_, head_dim_, tile_, factor_, s_.scores);
    for (int r = 0; r < rows_; ++r) take_row(task, r);
    add_all_values<Read>(s_.scores, rows_, value_offset, tile_, s_.acc, head_dim_);
  }

  // A row's scores become weights; its sums are rescaled to a new maximum.
  void take_row(const Task& task, int r) {
    const int64_t t = task.first_query + r / layer_.group;
    float* scores = s_.scores + r * kTileKeys;
    const int64_t beyond = tile_.position[tile_.count - 1] - t;
    const int seen = tile_.count - std::max<int64_t>(std::min<int64_t>(beyond, tile_.count), 0);
    if (layer_.soft_cap > 0 || layer_.slopes) add_cap_and_alibi(task, r, t, seen);
    const int padded = (tile_.count + W - 1) / W * W;
    std::fill(scores + seen, scores + padded, kNone);
    vec high = vec{} + kNone;
    for (int j = 0; j < padded; j += W) {
      const vec x = load<F32>(reinterpret_cast<const char*>(scores + j));
      high = x > high ? x : high;
    }
    const float m = std::max(s_.m[r], largest(high));
    if (m == kNone) {
      std::fill(scores, scores + padded, 0.0f);
      return;
    }
    raise(r, m);
    vec total = vec{};
    for (int j = 0; j < padded; j += W) {
      const vec p = exp2_vec(load<F32>(reinterpret_cast<const char*>(scores + j)) - m);
      std::memcpy(scores + j, &p, sizeof p);
      total += p;
    }
    s_.l[r] += sum(total);
  }

  // Row r's maximum becomes m, which is not below it.
  void raise(int r, float m) {
    if (m > s_.m[r]) {
      const float alpha = s_.m[r] == kNone ? 0.0f : exp2_scalar(s_.m[r] - m);
      s_.l[r] *= alpha;
      float* acc = s_.acc + r * head_dim_;
      for (int d = 0; d < head_dim_; ++d) acc[d] *= alpha;
      s_.m[r] = m;
    }
  }

  float with_cap_and_alibi(float score, float slope, float distance) const {
    if (layer_.soft_cap > 0) score = layer_.soft_cap * std::tanh(score / layer_.soft_cap) * kLog2E;
    return score + slope * distance * kLog2E;
  }

  float slope_of(const Task& task, int r) const {
    return layer_.slopes ? layer_.slopes[task.head * layer_.group + r % layer_.group] : 0.0f;
  }

  void add_cap_and_alibi(const Task& task, int r, int64_t t, int seen) {
    float* scores = s_.scores + r * kTileKeys;
    const float slope = slope_of(task, r);
    for (int j = 0; j < seen; ++j)
      scores[j] = with_cap_and_alibi(scores[j], slope, static_cast<float>(tile_.position[j] - t));
  }

  // The compensation slot: one key of weight N, from the running sums of one page.
  void take_slot(const Task& task) {
    const Pool& p = pool(task);
    const SeenKeys& seen = task.seen;
    const int64_t rows = 2LL * head_dim_ * batch_.step.item_size * p.block_size;
    const float* sums = reinterpret_cast<const float*>(page(task, seen.slot_page) + rows);
    const float share = 1.0f / static_cast<float>(seen.num_dropped);
    float values[kMaxHeadDim];
    std::copy(sums + head_dim_, sums + 2 * head_dim_, values);
    if (pairs_) reorder<false>(values, head_dim_);
    const float count = std::log2(static_cast<float>(seen.num_dropped));
    const float middle = 0.5f * static_cast<float>(p.sinks + seen.window_start - 1);
    for (int r = 0; r < rows_; ++r) {
      const float t = static_cast<float>(task.first_query + r / layer_.group);
      vec dot = vec{};
      for (int d = 0; d < head_dim_; d += W)
        dot += load<F32>(reinterpret_cast<const char*>(s_.q + r * head_dim_ + d)) *
               load<F32>(reinterpret_cast<const char*>(sums + d));
      const float score = with_cap_and_alibi(sum(dot) * share * factor_, slope_of(task, r), middle - t) + count;
      raise(r, std::max(score, s_.m[r]));
      const float weight = exp2_scalar(score - s_.m[r]);
      s_.l[r] += weight;
      float* acc = s_.acc + r * head_dim_;
      for (int d = 0; d < head_dim_; ++d) acc[d] += weight * share * values[d];
    }
  }

  void finish(const Task& task) {
    const int item = width(static_cast<Kind>(layer_.query_kind));
    for (int r = 0; r < rows_; ++r) {
      const int64_t head = int64_t{task.head} * layer_.group + r % layer_.group;
      char* to = batch_.out + (task.first_row + r / layer_.group) * batch_.out_stride +
                 head * head_dim_ * item;
      if (pairs_) reorder<true>(s_.acc + r * head_dim_, head_dim_);
      store(s_.acc + r * head_dim_, layer_.query_kind, head_dim_, layer_.v_scale / s_.l[r], to);
    }
  }

  void keep(float* partial) {
    std::copy(s_.m, s_.m + rows_, partial);
    std::copy(s_.l, s_.l + rows_, partial + kTileRows);
    std::copy(s_.acc, s_.acc + rows_ * head_dim_, partial + 2 * kTileRows);
  }

  const Batch& batch_;
  const Layer& layer_;
  Scratch& s_;
  Tile tile_;
  const int head_dim_;
  int rows_ = 0;
  bool pairs_ = false;
  float factor_ = 1.0f;
};

// Tasks of one layer.
class Plan {
 public:
  Plan(const Step& step, const Layer& layer, int num_threads)
      : step_(step), layer_(layer), num_threads_(num_threads) {
    tasks.clear();
    num_partials = 0;
    for (int32_t i = 0; i < step.num_requests; ++i)
      for (int32_t head = 0; head < layer.num_kv_heads; ++head) add(i, head);
    if (num_threads > 1) split();
  }

  static thread_local std::vector<Task> tasks;
  int64_t num_partials;

 private:
  void add(int32_t request, int32_t head) {
    const Pool& pool = step_.pools[layer_.pool_of[head]];
    const int64_t row = step_.query_start_loc[request];
    const int64_t stop = step_.seq_lens[request];
    const int64_t start = stop - (step_.query_start_loc[request + 1] - row);
    const int64_t until = pool.local ? step_.dense_until[request] : stop;
    const int64_t most = std::max(kTileRows / layer_.group, 1);
    for (int64_t t = start; t < stop;) {
      const bool dense = t < until;
      int64_t end = std::min(t + most, dense ? std::min(until, stop) : stop);
      // Queries of one page share their window and their slot.
      if (!dense) end = std::min(end, (t / pool.block_size + 1) * pool.block_size);
      const SeenKeys seen = seen_keys(pool, dense, t);
      const int64_t keys = seen.sink_end + end - seen.window_start;
      const bool slot = seen.num_dropped > 0 && layer_.compensation;
      tasks.push_back({request, head, t, static_cast<int32_t>(end - t), row + t - start, seen, 0,
                       keys, slot, -1, 0});
      t = end;
    }
  }

  // Split long rows of single queries into spans, so that threads end at about the same time.
  void split() {
    int64_t total = 0;
    for (const Task& task : tasks) total += task.num_queries * task.end;
    const int64_t span = std::max(kMinSpan, total / (4 * num_threads_));
    const size_t count = tasks.size();
    for (size_t i = 0; i < count; ++i) {
      Task whole = tasks[i];
      const int64_t parts = ceil_div(whole.end, span);
      if (whole.num_queries > 1 || parts < 2) continue;
      const int64_t step = ceil_div(whole.end, parts);
      for (int64_t part = 0; part < parts; ++part) {
        Task cut = whole;
        cut.begin = part * step;
        cut.end = std::min(whole.end, cut.begin + step);
        cut.with_slot = whole.with_slot && part == 0;
        cut.partial = num_partials++;
        cut.num_partials = part == 0 ? parts : 0;
        if (part == 0) tasks[i] = cut; else tasks.push_back(cut);
      }
    }
  }

  const Step& step_;
  const Layer& layer_;
  const int num_threads_;
};

thread_local std::vector<Task> Plan::tasks;

// One request's and KV head's rows into its pages.
class Writer {
 public:
  Writer(const Step& step, const Layer& layer, int32_t request, int32_t head)
      : step_(step), layer_(layer), request_(request), head_(head),
        pool_(step.pools[layer.pool_of[head]]) {}

  void rows(const char* key, int64_t key_stride, const char* value, int64_t value_stride) const {
    const int64_t bytes = int64_t{layer_.head_dim} * step_.item_size;
    for (int64_t row = step_.query_start_loc[request_]; row < step_.query_start_loc[request_ + 1];
         ++row) {
      const int64_t slot = pool_.slot_mapping[row];
      if (slot < 0) continue;
      char* to = page(slot / pool_.block_size) + slot % pool_.block_size * 2 * bytes;
      std::memcpy(to, key + row * key_stride + head_ * bytes, bytes);
      std::memcpy(to + bytes, value + row * value_stride + head_ * bytes, bytes);
    }
  }

  // S(p) = S(p-1) + the sum of p's tokens, of each page that the step fills.
  void tails() const {
    const int64_t stop = step_.seq_lens[request_];
    const int64_t start =
        stop - (step_.query_start_loc[request_ + 1] - step_.query_start_loc[request_]);
    for (int64_t p = start / pool_.block_size; (p + 1) * pool_.block_size <= stop; ++p) tail(p);
  }

 private:
  char* page(int64_t id) const {
    return pool_.cache + id * pool_.page_stride + layer_.slot_of[head_] * pool_.slot_stride;
  }

  char* page_of(int64_t index) const {
    return page(pool_.table[request_ * pool_.table_stride + index]);
  }

  void tail(int64_t p) const {
    const int width = 2 * layer_.head_dim;
    const int64_t row = int64_t{width} * step_.item_size;
    const int64_t skipped = std::max<int64_t>(pool_.sinks - p * pool_.block_size, 0);
    alignas(64) float sums[2 * kMaxHeadDim];
    if (p > 0) {
      std::memcpy(sums, page_of(p - 1) + pool_.block_size * row, width * sizeof(float));
    } else {
      std::fill(sums, sums + width, 0.0f);
    }
    // Tokens are added one by one, so that S does not depend on how they were split into steps.
    char* from = page_of(p);
    with_kind(layer_.cache_kind, [&](auto k) {
      constexpr Kind K = decltype(k)::value;
      for (int64_t i = skipped; i < pool_.block_size; ++i)
        for (int d = 0; d < width; d += W) {
          vec x;
          std::memcpy(&x, sums + d, sizeof x);
          x += load<K>(from + i * row + d * razor_width(K));
          std::memcpy(sums + d, &x, sizeof x);
        }
    });
    std::memcpy(from + pool_.block_size * row, sums, width * sizeof(float));
  }

  static constexpr int razor_width(Kind kind) { return ::width(kind); }

  const Step& step_;
  const Layer& layer_;
  const int32_t request_;
  const int32_t head_;
  const Pool& pool_;
};

}  // namespace

// Whether this CPU has the instructions of this build.
extern "C" int32_t razor_runs_here() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
#if defined(__AVX512BF16__)
         && __builtin_cpu_supports("avx512bf16")
#endif
      ;
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

// Bytes of the structs that callers fill in: with another layout there, writes here go astray.
extern "C" void razor_struct_sizes(int32_t* sizes) {
  sizes[0] = sizeof(Pool);
  sizes[1] = sizeof(Step);
  sizes[2] = sizeof(Layer);
}

// Strides in bytes from row to row; within a row, heads follow one another.
extern "C" void razor_write(const Step* step, const Layer* layer, const char* key,
                            int64_t key_stride, const char* value, int64_t value_stride,
                            int num_threads) {
  const int64_t count = int64_t{step->num_requests} * layer->num_kv_heads;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (count > 1)
  for (int64_t i = 0; i < count; ++i) {
    const Writer writer(*step, *layer, i / layer->num_kv_heads, i % layer->num_kv_heads);
    writer.rows(key, key_stride, value, value_stride);
    if (step->pools[layer->pool_of[i % layer->num_kv_heads]].local) writer.tails();
  }
}

extern "C" void razor_attention(const Step* step, const Layer* layer, const char* query,
                                int64_t query_stride, char* out, int64_t out_stride,
                                int num_threads) {
  const Plan plan(*step, *layer, num_threads);
  const std::vector<Task>& tasks = Plan::tasks;
  const Batch batch{*step, *layer, query, query_stride, out, out_stride};
  static thread_local std::vector<float> partials;
  const int64_t size = 2 * kTileRows + layer->group * layer->head_dim;
  partials.resize(plan.num_partials * size);
  float* parts = partials.data();
#pragma omp parallel num_threads(num_threads) if (tasks.size() > 1)
  {
    static thread_local Scratch scratch;
    Worker worker(batch, scratch);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); ++i) worker.run(tasks[i], parts);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); ++i)
      if (tasks[i].num_partials) worker.merge(tasks[i], parts);
  }
}
