// Logits and weights of a tile of queries: what forward and backward have in common.
#pragma once

#include "local_map.h"

namespace attnrewrite::ISA {

constexpr int64_t kMostRows = 14 * 13;  // of the windows of two queries

// One piece of work, its keys and values packed, and a tile of its queries at a time, in one or two rows.
struct LocalWeights {
  const LocalProblem& problem;
  const LocalMap& map;
  const WindowKernels kernels;
  const int64_t places, keys;  // places of the window; with the extra keys behind them
  PackedRows key, value;
  Buffer extra_key, extra_value;  // `[extras, channels]`
  Buffer query;                   // of two tiles, times the scale, `[2, channels, kLanes]`
  Buffer weights;                 // `[2, keys, kLanes]`
  Buffer terms;                   // what is added by token, packed: `[extras or places, kLanes]`
  const float* bias;              // of this head; null: none
  const float* key_rows[kMostRows];
  const float* value_rows[kMostRows];

  int64_t next;                   // the first row of keys that is not packed yet

  LocalWeights(const LocalMap& of, int64_t first_row)
      : problem(of.problem),
        map(of),
        kernels(window_kernels(problem.kernel[2])),
        places(product(problem.kernel)),
        keys(places + problem.extras),
        key(map, problem.channels, problem.kernel[0] + 1),
        value(map, problem.value_channels, problem.kernel[0] + 1),
        extra_key(problem.extras * problem.channels),
        extra_value(problem.extras * problem.value_channels),
        query(2 * problem.channels * kLanes),
        weights(2 * keys * kLanes),
        terms(greater(problem.extras, places) * kLanes),
        bias(problem.bias == nullptr ? nullptr : problem.bias + map.head * product(problem.bias_sizes)),
        next(first_row) {
    gather(problem.extra_key, problem.channels, extra_key.data);
    gather(problem.extra_value, problem.value_channels, extra_value.data);
  }

  float* weights_of(int64_t which) const { return weights.data + which * keys * kLanes; }

  // Packs the keys and values that the queries of `queries` rows see, from `row` on. Rows only grow: what is packed
  // takes the place of what no window reaches any more, so that it stays in the cache.
  void reach(int64_t row, int64_t queries) {
    const int64_t last = lesser(map.size[0], map.start(0, row + queries - 1) + problem.kernel[0]);
    if (last <= next) return;
    key.pack(map, problem.key, next, last, 1.0f);
    value.pack(map, problem.value, next, last, 1.0f);
    next = last;
  }

  // Fills `weights` with the softmax of the queries in `queries` rows, and `lse` with the log-sum-exp.
  void attend(int64_t row, int64_t queries, int64_t line, const Tile& tile, Floats (&lse)[2]) {
    float* tiles[2] = {query.data, query.data + problem.channels * kLanes};
    for (int64_t which = 0; which < queries; ++which) {
      pack_tile(problem.query, row + which, line, tile, problem.channels, problem.scale, tiles[which]);
    }
    const WindowRows window = key.window(map, row, queries, line, tile, key_rows);
    over_window(kernels.products, kernels.width, {{tiles[0], tiles[1]}, {weights_of(0), weights_of(1)}},
                problem.channels, window);
    for (int64_t which = 0; which < queries; ++which) {
      if (bias != nullptr) add_bias(row + which, line, tile, weights_of(which));
      add_terms(problem.place_bias, row + which, line, tile, places, weights_of(which));
      if (!problem.slides) remove_absent(window.part(which * window.shift, window.count), tile, weights_of(which));
      if (problem.extras > 0) attend_extras(row + which, line, tile, tiles[which], weights_of(which) + places * kLanes);
      lse[which] = softmax(weights_of(which), keys);
    }
  }

  // Adds the operand `post` to the weights of the window of the query number `which`, in `row`.
  void add_post(int64_t row, int64_t which, int64_t line, const Tile& tile, const WindowRows& window) {
    if (problem.post.data == nullptr) return;
    pack_tile(problem.post, row + which, line, tile, places, 1.0f, terms.data);
    if (!problem.slides) fill_absent(window.part(which * window.shift, window.count), tile, terms.data, 0.0f);
    add_vectors(weights_of(which), terms.data, places);
  }

  // What an operand holds for the queries of a tile, `[channels, kLanes]`; lanes without a query are 0.
  void pack_tile(const Operand& operand, int64_t row, int64_t line, const Tile& tile, int64_t channels, float factor,
                 float* target) const {
    const int64_t offset = map.offset(operand, row, line, tile.column);
    if (row + 2 < map.last_row) {
      prefetch(operand, map.offset(operand, row + 2, line, tile.column), map.step(operand), tile.count, channels);
    }
    if (tile.count < kLanes) {
      for (int64_t at = 0; at < channels * kLanes; at += kLanes) store(target + at, Floats{});
    }
    pack(operand, offset, map.step(operand), tile.count, channels, factor, target, kLanes);
  }

  // `target` at the places that are off the map becomes `filling`.
  void fill_absent(const WindowRows& window, const Tile& tile, float* target, float filling) const {
    const int64_t width = problem.kernel[2];
    for (int64_t row = 0; row < window.count; ++row, target += width * kLanes) {
      const bool is_absent = window.rows[row] == nullptr;
      for (int64_t place = 0; (is_absent || tile.is_border) && place < width; ++place) {
        float* at = target + place * kLanes;
        const Ints column = lane_numbers() + static_cast<int32_t>(tile.first + place);
        const Ints is_on_map = (column >= 0) & (column < static_cast<int32_t>(map.size[2]));
        store(at, is_absent ? broadcast(filling) : choose(is_on_map, load(at), broadcast(filling)));
      }
    }
  }

  // The row of the bias table that the window's `number`-th row reads.
  int64_t bias_row(int64_t row, int64_t line, int64_t number) const {
    const int64_t* kernel = problem.kernel;
    int64_t first = number / kernel[1], second = number % kernel[1];
    if (problem.slides) {  // a table of distances
      first += map.start(0, row) - row + kernel[0] - 1;
      second += map.start(1, line) - line + kernel[1] - 1;
    }
    return (first * problem.bias_sizes[1] + second) * problem.bias_sizes[2];
  }

 private:
  void attend_extras(int64_t row, int64_t line, const Tile& tile, const float* own, float* target) {
    shared_products(own, problem.channels, extra_key.data, problem.extras, target);
    add_terms(problem.extra_bias, row, line, tile, problem.extras, target);
  }

  void add_terms(const Operand& operand, int64_t row, int64_t line, const Tile& tile, int64_t count, float* target) {
    if (operand.data == nullptr) return;
    pack_tile(operand, row, line, tile, count, 1.0f, terms.data);
    add_vectors(target, terms.data, count);
  }

  void remove_absent(const WindowRows& window, const Tile& tile, float* target) const {
    fill_absent(window, tile, target, -kInfinity);
    // Lanes without a query may have no key on the map at all.
    for (int64_t at = 0; tile.count < kLanes && at < places * kLanes; at += kLanes) {
      store(target + at, choose(tile.is_query, load(target + at), Floats{}));
    }
  }

  void add_bias(int64_t row, int64_t line, const Tile& tile, float* target) const {
    const int64_t width = problem.kernel[2];
    for (int64_t number = 0; number < places / width; ++number) {
      const float* table = bias + bias_row(row, line, number);
      for (int64_t place = 0; place < width; ++place, target += kLanes) {
        Floats term = broadcast(table[place + tile.shift[0]]);
        if (problem.slides && tile.is_border) {
          for (int64_t lane = 0; lane < tile.count; ++lane) term[lane] = table[place + tile.shift[lane]];
        }
        store(target, load(target) + term);
      }
    }
  }

  void gather(const Operand& operand, int64_t channels, float* target) const {
    for (int64_t at = 0; at < problem.extras; ++at) {
      const int64_t offset = map.batch * operand.batch_stride + map.head * operand.head_stride +
                             at * operand.axis_strides[2];
      for (int64_t channel = 0; channel < channels; ++channel) {
        target[at * channels + channel] = element(operand, offset + channel * operand.channel_stride);
      }
    }
  }
};

}  // namespace attnrewrite::ISA
