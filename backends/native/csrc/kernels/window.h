// The two products of attention over a window: a tile of neighboring queries, one in every lane.
//
// Keys lie in packed rows, channel outside and column inside, so that the keys which the lanes see at one place of
// their windows are one load. At borders windows slide: then the lanes' columns are a permutation of that load, the
// same for every place.
#pragma once

#include "vectors.h"

namespace attnrewrite::ISA {

// Two queries of one column, in neighboring rows, share every load of a key: most loads cross a cache line, and with
// one query to a load they would take longer than the arithmetic. `rows` has the rows of both windows, each from the
// column of the first place, and null for those off the map. The first query's are the first `count`, the second's
// begin `shift` later.
struct WindowRows {
  const float* const* rows;
  int64_t queries, count, shift;
  int64_t stride;  // between channels
  bool is_permuted;
  Ints from;  // of every lane, which column of a load is its own

  WindowRows part(int64_t first, int64_t number) const {
    return {rows + first, 1, number, 0, stride, is_permuted, from};
  }
};

// Of one or two queries what a product reads and writes: a tile `[channels, kLanes]`, and weights `[places, kLanes]`.
struct TwoTiles {
  float *tile[2], *weights[2];
};

template <int kPlaces, bool kPermuted, int kQueries>
static void products(const TwoTiles& of, int64_t channels, const WindowRows& window) {
  for (int64_t row = 0; row < window.count; ++row) {
    Floats sums[kQueries][kPlaces] = {};
    const float* source = window.rows[row];
    for (int64_t channel = 0; source != nullptr && channel < channels; ++channel, source += window.stride) {
      Floats query[kQueries];
#pragma GCC unroll 2
      for (int each = 0; each < kQueries; ++each) query[each] = load(of.tile[each] + channel * kLanes);
#pragma GCC unroll 16
      for (int place = 0; place < kPlaces; ++place) {
        const Floats loaded = kQueries == 1 ? load(source + place) : held(load(source + place));
        const Floats key = kPermuted ? permute(loaded, window.from) : loaded;
#pragma GCC unroll 2
        for (int each = 0; each < kQueries; ++each) sums[each][place] += query[each] * key;
      }
    }
#pragma GCC unroll 2
    for (int each = 0; each < kQueries; ++each) {
#pragma GCC unroll 16
      for (int place = 0; place < kPlaces; ++place) {
        store(of.weights[each] + (row * kPlaces + place) * kLanes, sums[each][place]);
      }
    }
  }
}

template <int kPlaces, bool kPermuted, int kQueries, int kChannels>
static void weighted_sum(const TwoTiles& of, int64_t channel, const WindowRows& window) {
  Floats sums[kQueries][kChannels];
#pragma GCC unroll 2
  for (int each = 0; each < kQueries; ++each) {
#pragma GCC unroll 8
    for (int own = 0; own < kChannels; ++own) sums[each][own] = load(of.tile[each] + (channel + own) * kLanes);
  }
  for (int64_t row = 0; row < window.count; ++row) {
    if (window.rows[row] == nullptr) continue;
    const float* source = window.rows[row] + channel * window.stride;
#pragma GCC unroll 16
    for (int place = 0; place < kPlaces; ++place) {
      Floats weight[kQueries];
#pragma GCC unroll 2
      for (int each = 0; each < kQueries; ++each) {
        weight[each] = load(of.weights[each] + (row * kPlaces + place) * kLanes);
      }
#pragma GCC unroll 8
      for (int own = 0; own < kChannels; ++own) {
        const float* from = source + own * window.stride + place;
        const Floats loaded = kQueries == 1 ? load(from) : held(load(from));
        const Floats value = kPermuted ? permute(loaded, window.from) : loaded;
#pragma GCC unroll 2
        for (int each = 0; each < kQueries; ++each) sums[each][own] += weight[each] * value;
      }
    }
  }
#pragma GCC unroll 2
  for (int each = 0; each < kQueries; ++each) {
#pragma GCC unroll 8
    for (int own = 0; own < kChannels; ++own) store(of.tile[each] + (channel + own) * kLanes, sums[each][own]);
  }
}

// Adds to the tiles: eight channels share every load of a weight.
template <int kPlaces, bool kPermuted, int kQueries>
static void weighted_sums(const TwoTiles& of, int64_t channels, const WindowRows& window) {
  int64_t channel = 0;
  for (; channel + 8 <= channels; channel += 8) weighted_sum<kPlaces, kPermuted, kQueries, 8>(of, channel, window);
  for (; channel < channels; ++channel) weighted_sum<kPlaces, kPermuted, kQueries, 1>(of, channel, window);
}

// What is compiled for every width of a window: by whether lanes are permuted, and for one query or two.
struct WindowKernels {
  using Kernel = void (*)(const TwoTiles&, int64_t, const WindowRows&);
  int64_t width;
  Kernel products[2][2], weighted_sums[2][2];
};

template <int kPlaces>
INLINE WindowKernels window_kernels() {
  return {kPlaces,
          {{products<kPlaces, false, 1>, products<kPlaces, false, 2>},
           {products<kPlaces, true, 1>, products<kPlaces, true, 2>}},
          {{weighted_sums<kPlaces, false, 1>, weighted_sums<kPlaces, false, 2>},
           {weighted_sums<kPlaces, true, 1>, weighted_sums<kPlaces, true, 2>}}};
}

INLINE WindowKernels window_kernels(int64_t width) {
  switch (width) {
    case 1: return window_kernels<1>();
    case 3: return window_kernels<3>();
    case 5: return window_kernels<5>();
    case 7: return window_kernels<7>();
    case 9: return window_kernels<9>();
    case 11: return window_kernels<11>();
    default: return window_kernels<13>();
  }
}

// Runs `kernels` over all rows: those of one query alone, then those of both, then those of the other alone.
INLINE void over_window(const WindowKernels::Kernel (&kernels)[2][2], int64_t width, const TwoTiles& of,
                        int64_t channels, const WindowRows& window) {
  const auto* by_count = kernels[window.is_permuted];
  if (window.queries == 1) {
    by_count[0](of, channels, window);
    return;
  }
  const int64_t both = window.count - window.shift, skipped = window.shift * width * kLanes;
  by_count[0](of, channels, window.part(0, window.shift));
  by_count[1]({{of.tile[0], of.tile[1]}, {of.weights[0] + skipped, of.weights[1]}}, channels,
              window.part(window.shift, both));
  by_count[0]({{of.tile[1], nullptr}, {of.weights[1] + both * width * kLanes, nullptr}}, channels,
              window.part(window.count, window.shift));
}

// The same for keys that all lanes share: `keys` is `[count, channels]`.
INLINE void shared_products(const float* tile, int64_t channels, const float* keys, int64_t count, float* result) {
  for (int64_t first = 0; first < count; first += 8) {
    const int64_t block = count - first < 8 ? count - first : 8;
    Floats sums[8] = {};
    for (int64_t channel = 0; channel < channels; ++channel) {
      const Floats query = load(tile + channel * kLanes);
      for (int64_t each = 0; each < block; ++each) sums[each] += query * keys[(first + each) * channels + channel];
    }
    for (int64_t each = 0; each < block; ++each) store(result + (first + each) * kLanes, sums[each]);
  }
}

INLINE void add_shared_sums(const float* weights, int64_t channels, const float* values, int64_t count, float* result) {
  for (int64_t first = 0; first < channels; first += 8) {
    const int64_t block = channels - first < 8 ? channels - first : 8;
    Floats sums[8];
    for (int64_t each = 0; each < block; ++each) sums[each] = load(result + (first + each) * kLanes);
    for (int64_t at = 0; at < count; ++at) {
      const Floats weight = load(weights + at * kLanes);
      for (int64_t each = 0; each < block; ++each) sums[each] += weight * values[at * channels + first + each];
    }
    for (int64_t each = 0; each < block; ++each) store(result + (first + each) * kLanes, sums[each]);
  }
}

// Logits `[count, kLanes]` to weights in place. Returns the log-sum-exp; -infinity alone gives NaN as weights.
INLINE Floats softmax(float* logits, int64_t count) {
  Floats highest = broadcast(-kInfinity), other = highest;
  int64_t at = 0;
  for (; at + 2 <= count; at += 2) {
    highest = larger(highest, load(logits + at * kLanes));
    other = larger(other, load(logits + (at + 1) * kLanes));
  }
  if (at < count) highest = larger(highest, load(logits + at * kLanes));
  highest = larger(highest, other);
  highest = choose((highest == kInfinity) | (highest == -kInfinity), broadcast(0.0f), highest);
  Floats sum = {};
  for (at = 0; at < count; ++at) {
    const Floats weight = exp(load(logits + at * kLanes) - highest);
    store(logits + at * kLanes, weight);
    sum += weight;
  }
  const Floats factor = choose(sum < kInfinity, 1.0f / sum, sum - sum);  // infinity among them leaves no weights
  for (at = 0; at < count; ++at) store(logits + at * kLanes, load(logits + at * kLanes) * factor);
  return highest + log(sum);
}

}  // namespace attnrewrite::ISA
