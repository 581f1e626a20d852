// Gradients of keys and values: every key pulls from the queries that see it, so that no two threads write one sum.
//
// Weights are kept by distance. Where windows slide, several queries of a row have the same key at different places,
// and a key's queries are no run of lanes; at a fixed distance they are. A row of weights has a vector of queries for
// every distance that occurs, zero where the key at this distance is not seen.
#pragma once

#include "local_map.h"

namespace attnrewrite::ISA {

constexpr int kMostDistances = 2 * 13 - 1;

SHARED int64_t distances_of(const LocalProblem& problem) {
  return problem.slides ? 2 * problem.kernel[2] - 1 : problem.kernel[2];
}

// The weights of one row of the windows of a tile, `[width, kLanes]`, by distance into `spread`; zero without a query.
INLINE void spread_by_distance(const LocalProblem& problem, const Tile& tile, const float* weights, float* spread) {
  const int64_t width = problem.kernel[2], distances = distances_of(problem);
  const bool is_mixed = problem.slides && tile.is_border;
  for (int64_t at = 0; at < distances; ++at) store(spread + at * kLanes, Floats{});
  for (int32_t shift = 0; shift + width <= distances; ++shift) {
    const Ints own = (tile.shift == shift) & tile.is_query;
    if (!is_mixed && shift != tile.shift[0]) continue;
    if (is_mixed && !any(own)) continue;
    for (int64_t place = 0; place < width; ++place) {
      float* target = spread + (place + shift) * kLanes;
      store(target, choose(own, load(weights + place * kLanes), load(target)));
    }
  }
}

// Which distances a tile of neighboring keys is seen at, and by which lanes.
struct PullTile {
  int64_t column, count;
  int64_t first, last;  // distances
  int64_t zero;         // the distance of a query to the key at its own column
  bool is_masked;       // some lanes' queries do not see them: what these hold may be NaN
  Ints seen[kMostDistances];

  PullTile(const LocalMap& map, int64_t at) : column(at), count(lesser(kLanes, map.size[2] - at)), is_masked(false) {
    const LocalProblem& problem = map.problem;
    const int64_t distances = distances_of(problem);
    zero = problem.slides ? problem.kernel[2] - 1 : problem.kernel[2] / 2;
    first = distances, last = -1;
    for (int64_t distance = 0; distance < distances; ++distance) {
      seen[distance] = Ints{};
      bool is_hidden = false;
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t query = column + lane - (distance - zero);
        if (query < 0 || query >= map.size[2]) continue;
        const bool is_seen = map.sees(2, query, column + lane);
        seen[distance][lane] = is_seen ? -1 : 0;
        if (!is_seen) is_hidden = true;
        if (is_seen) first = lesser(first, distance), last = greater(last, distance);
      }
      if (is_hidden) hidden_[distance] = true;
    }
    for (int64_t distance = first; distance <= last; ++distance) is_masked = is_masked || hidden_[distance];
  }

 private:
  bool hidden_[kMostDistances] = {};
};

// Queries that see a row of keys, the weights that they give it by distance, and what is summed by these.
struct PullRow {
  const float* weights;  // of distance 0 and column 0
  const float* source;   // of channel 0 and column 0
};

template <bool kMasked, int kChannels>
static void pull(const PullRow* rows, int64_t count, int64_t weight_stride, int64_t source_stride, const PullTile& tile,
                 int64_t channel, float* target) {
  Floats sums[kChannels] = {};
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t distance = tile.first; distance <= tile.last; ++distance) {
      const int64_t column = tile.column - (distance - tile.zero);
      const Floats weight = load(rows[row].weights + distance * weight_stride + column);
      const float* source = rows[row].source + channel * source_stride + column;
#pragma GCC unroll 8
      for (int each = 0; each < kChannels; ++each) {
        const Floats product = weight * load(source + each * source_stride);
        sums[each] += kMasked ? choose(tile.seen[distance], product, Floats{}) : product;
      }
    }
  }
#pragma GCC unroll 8
  for (int each = 0; each < kChannels; ++each) store(target + (channel + each) * kLanes, sums[each]);
}

template <bool kMasked>
static void pull_channels(const PullRow* rows, int64_t count, int64_t weight_stride, int64_t source_stride,
                          const PullTile& tile, int64_t channels, float* target) {
  int64_t channel = 0;
  for (; channel + 8 <= channels; channel += 8) {
    pull<kMasked, 8>(rows, count, weight_stride, source_stride, tile, channel, target);
  }
  for (; channel < channels; ++channel) {
    pull<kMasked, 1>(rows, count, weight_stride, source_stride, tile, channel, target);
  }
}

}  // namespace attnrewrite::ISA
