// Local attention, backward. The softmax is computed again: that is as cheap as to read it, and exact.
#include "declarations.h"
#include "local_pull.h"
#include "local_weights.h"

namespace attnrewrite::ISA {

namespace {

constexpr int64_t kMostSeeing = (2 * 13 - 1) * (2 * 13 - 1);  // rows of queries that see a row of keys

// Gradients of one piece of work: those of the keys in its band of rows, and of the queries in it. The queries around
// the band, which see its keys too, are attended again.
class Backward {
 public:
  Backward(const LocalProblem& problem, const LocalGradients& gradients, const LocalMap& map, int64_t piece)
      : problem_(problem),
        wanted_(gradients),
        map_(map),
        piece_(piece),
        first_(map.first_seeing(0, map.first_row)),
        last_(map.last_seeing(0, map.last_row - 1) + 1),
        depth_(map.most_seeing(0, map.first_row, map.last_row) + 1),
        own_(map, greater(0, map.start(0, first_))),
        queries_(map, problem.channels, depth_),
        outputs_(map, problem.value_channels, depth_),
        by_distance_(map, 2 * own_.places / problem.kernel[2] * distances_of(problem), depth_),
        tiles_(2 * (problem.value_channels + problem.channels) * kLanes),
        logits_(2 * own_.keys * kLanes),
        bias_(product(problem.bias_sizes) * kLanes),
        extra_key_(problem.extras * problem.channels * kLanes),
        extra_value_(problem.extras * problem.value_channels * kLanes) {}

  void run() {
    by_distance_.clear();
    clear(bias_, product(problem_.bias_sizes));
    clear(extra_key_, problem_.extras * problem_.channels);
    clear(extra_value_, problem_.extras * problem_.value_channels);
    int64_t key_row = map_.first_row;
    for (int64_t row = first_; row < last_; row += 2) {
      const int64_t queries = lesser(2, last_ - row);
      own_.reach(row, queries);
      queries_.pack(map_, problem_.query, row, row + queries, problem_.scale);
      outputs_.pack(map_, wanted_.output, row, row + queries, 1.0f);
      for (int64_t line = 0; line < map_.size[1]; ++line) {
        for (int64_t column = 0; column < map_.size[2]; column += kLanes) {
          differentiate(row, queries, line, Tile(map_, column));
        }
      }
      while (key_row < map_.last_row && map_.last_seeing(0, key_row) < row + queries) pull_row(key_row++);
    }
    reduce(bias_, product(problem_.bias_sizes), wanted_.bias);
    reduce(extra_key_, problem_.extras * problem_.channels, wanted_.extra_key);
    reduce(extra_value_, problem_.extras * problem_.value_channels, wanted_.extra_value);
  }

 private:
  float* output_tile(int64_t which) const { return tiles_.data + which * problem_.value_channels * kLanes; }
  float* query_tile(int64_t which) const {
    return tiles_.data + (2 * problem_.value_channels + which * problem_.channels) * kLanes;
  }
  float* logits_of(int64_t which) const { return logits_.data + which * own_.keys * kLanes; }

  static void clear(const Buffer& sums, int64_t count) { std::memset(sums.data, 0, sizeof(float) * count * kLanes); }

  void reduce(const Buffer& sums, int64_t count, float* target) const {
    for (int64_t at = 0; target != nullptr && at < count; ++at) {
      target[piece_ * count + at] = sum_of_lanes(load(sums.data + at * kLanes));
    }
  }

  // The queries of a tile, in one or two rows: gradients of logits, and what follows from them for the queries.
  void differentiate(int64_t row, int64_t queries, int64_t line, const Tile& tile) {
    Floats lse[2];
    own_.attend(row, queries, line, tile, lse);
    const WindowRows values = own_.value.window(map_, row, queries, line, tile, own_.value_rows);
    for (int64_t which = 0; which < queries; ++which) {
      own_.pack_tile(wanted_.output, row + which, line, tile, problem_.value_channels, 1.0f, output_tile(which));
    }
    over_window(own_.kernels.products, own_.kernels.width,
                {{output_tile(0), output_tile(1)}, {logits_of(0), logits_of(1)}}, problem_.value_channels, values);
    for (int64_t which = 0; which < queries; ++which) {
      const bool is_own = map_.first_row <= row + which && row + which < map_.last_row;
      float* logits = logits_of(which);
      shared_products(output_tile(which), problem_.value_channels, own_.extra_value.data, problem_.extras,
                      logits + own_.places * kLanes);
      const WindowRows of_which = values.part(which * values.shift, values.count);
      if (!problem_.slides) own_.fill_absent(of_which, tile, logits, 0.0f);
      if (is_own) write(wanted_.post, row + which, line, tile, logits, own_.places);
      to_logits(row + which, line, tile, own_.weights_of(which), logits);
      if (!problem_.slides) own_.fill_absent(of_which, tile, logits, 0.0f);
      if (is_own) write_by_head(wanted_.place_bias, row + which, line, tile, logits, own_.places);
      if (is_own) sum_extras(row + which, line, tile, which);
      own_.add_post(row, which, line, tile, values);
      keep(row + which, line, tile, which, is_own);
    }
    differentiate_queries(row, queries, line, tile);
  }

  // Gradients of weights to those of logits, in place.
  void to_logits(int64_t row, int64_t line, const Tile& tile, const float* weights, float* gradients) const {
    Floats mean = {};
    for (int64_t at = 0; at < own_.keys * kLanes; at += kLanes) mean += load(weights + at) * load(gradients + at);
    float grad_lse[kLanes] = {};
    for (int64_t lane = 0; lane < tile.count; ++lane) {
      grad_lse[lane] = element(wanted_.lse, map_.offset(wanted_.lse, row, line, tile.column + lane));
    }
    mean -= load(grad_lse);
    for (int64_t at = 0; at < own_.keys * kLanes; at += kLanes) {
      const Floats gradient = load(weights + at) * (load(gradients + at) - mean);
      store(gradients + at, choose(tile.is_query, gradient, Floats{}));
    }
  }

  void sum_extras(int64_t row, int64_t line, const Tile& tile, int64_t which) {
    if (problem_.extras == 0) return;
    const float* logits = logits_of(which) + own_.places * kLanes;
    const float* weights = own_.weights_of(which) + own_.places * kLanes;
    write_by_head(wanted_.extra_bias, row, line, tile, logits, problem_.extras);
    const float* query = own_.query.data + which * problem_.channels * kLanes;
    for (int64_t at = 0; at < problem_.extras; ++at) {
      add_outer(load(logits + at * kLanes), query, problem_.channels,
                extra_key_.data + at * problem_.channels * kLanes);
      const Floats weight = choose(tile.is_query, load(weights + at * kLanes), Floats{});
      add_outer(weight, output_tile(which), problem_.value_channels,
                extra_value_.data + at * problem_.value_channels * kLanes);
    }
  }

  // A tile's part of a contiguous gradient `[B, heads, *grid, channels]`.
  void write_by_head(float* gradient, int64_t row, int64_t line, const Tile& tile, const float* source,
                     int64_t channels) const {
    if (gradient == nullptr) return;
    const int64_t token = map_.token(row, line, tile.column), tokens = product(problem_.grid), image = token / tokens;
    float* target = gradient + ((image * problem_.heads + map_.head) * tokens + token % tokens) * channels;
    unpack(source, tile.count, channels, target, problem_.dilation[2] * channels);
  }

  static void add_outer(Floats weight, const float* tile, int64_t channels, float* sums) {
    for (int64_t at = 0; at < channels * kLanes; at += kLanes) {
      store(sums + at, load(sums + at) + weight * load(tile + at));
    }
  }

  // Keeps what the keys pull, by distance: gradients of logits, then weights of values.
  void keep(int64_t row, int64_t line, const Tile& tile, int64_t which, bool is_own) {
    const int64_t width = problem_.kernel[2], distances = distances_of(problem_), rows = own_.places / width;
    const bool is_mixed = problem_.slides && tile.is_border;
    const int64_t first = is_mixed ? 0 : tile.shift[0], last = is_mixed ? distances : first + width;
    float spread[kMostDistances * kLanes];
    for (int64_t number = 0; number < 2 * rows; ++number) {
      const float* source = number < rows ? logits_of(which) : own_.weights_of(which);
      spread_by_distance(problem_, tile, source + number % rows * width * kLanes, spread);
      float* target = kept(row, line, number, tile.column);
      for (int64_t at = first; at < last; ++at) store(target + at * by_distance_.stride, load(spread + at * kLanes));
      if (!is_own || number >= rows || problem_.bias == nullptr) continue;
      float* sums = bias_.data + own_.bias_row(row, line, number) * kLanes;
      add_vectors(sums + first * kLanes, spread + first * kLanes, last - first);
    }
  }

  float* kept(int64_t row, int64_t line, int64_t number, int64_t column) const {
    return by_distance_.at(row, line, column) + number * distances_of(problem_) * by_distance_.stride;
  }

  void differentiate_queries(int64_t row, int64_t queries, int64_t line, const Tile& tile) {
    std::memset(query_tile(0), 0, sizeof(float) * 2 * problem_.channels * kLanes);
    const WindowRows keys = own_.key.window(map_, row, queries, line, tile, own_.key_rows);
    over_window(own_.kernels.weighted_sums, own_.kernels.width,
                {{query_tile(0), query_tile(1)}, {logits_of(0), logits_of(1)}}, problem_.channels, keys);
    for (int64_t which = 0; which < queries; ++which) {
      if (row + which < map_.first_row || row + which >= map_.last_row) continue;
      add_shared_sums(logits_of(which) + own_.places * kLanes, problem_.channels, own_.extra_key.data, problem_.extras,
                      query_tile(which));
      for (int64_t at = 0; at < problem_.channels * kLanes; at += kLanes) {
        store(query_tile(which) + at, load(query_tile(which) + at) * problem_.scale);
      }
      write(wanted_.query, row + which, line, tile, query_tile(which), problem_.channels);
    }
  }

  // A tile's part of a contiguous gradient, heads last.
  template <typename AnyTile>
  void write(float* gradient, int64_t row, int64_t line, const AnyTile& tile, const float* source,
             int64_t channels) const {
    if (gradient == nullptr) return;
    const int64_t token = map_.token(row, line, tile.column) * problem_.heads + map_.head;
    unpack(source, tile.count, channels, gradient + token * channels, problem_.dilation[2] * problem_.heads * channels);
  }

  // Gradients of the keys and values of a row, all of whose queries have been here.
  void pull_row(int64_t key_row) {
    for (int64_t line = 0; line < map_.size[1]; ++line) {
      const int64_t rows = own_.places / problem_.kernel[2];
      PullRow for_key[kMostSeeing], for_value[kMostSeeing];
      int64_t count = 0;
      for (int64_t row = map_.first_seeing(0, key_row); row <= map_.last_seeing(0, key_row); ++row) {
        for (int64_t other = map_.first_seeing(1, line); other <= map_.last_seeing(1, line); ++other) {
          const int64_t number = (key_row - map_.start(0, row)) * problem_.kernel[1] + line - map_.start(1, other);
          for_key[count] = {kept(row, other, number, 0), queries_.at(row, other, 0)};
          for_value[count++] = {kept(row, other, rows + number, 0), outputs_.at(row, other, 0)};
        }
      }
      for (int64_t column = 0; column < map_.size[2]; column += kLanes) {
        const PullTile tile(map_, column);
        pull_tile(for_key, count, queries_.stride, tile, problem_.channels, wanted_.key, key_row, line);
        pull_tile(for_value, count, outputs_.stride, tile, problem_.value_channels, wanted_.value, key_row, line);
      }
    }
  }

  void pull_tile(const PullRow* rows, int64_t count, int64_t stride, const PullTile& tile, int64_t channels,
                 float* gradient, int64_t key_row, int64_t line) const {
    const auto function = tile.is_masked ? pull_channels<true> : pull_channels<false>;
    function(rows, count, by_distance_.stride, stride, tile, channels, tiles_.data);
    write(gradient, key_row, line, tile, tiles_.data, channels);
  }

  const LocalProblem& problem_;
  const LocalGradients& wanted_;
  const LocalMap& map_;
  const int64_t piece_;
  const int64_t first_, last_;  // rows of queries
  const int64_t depth_;         // of them that are kept at a time: two are attended before a key pulls from the first
  LocalWeights own_;
  PackedRows queries_, outputs_;
  PackedRows by_distance_;  // channels: gradients of logits, then weights, of every row of a window, by distance
  Buffer tiles_, logits_;
  Buffer bias_, extra_key_, extra_value_;  // sums of every lane
};

}  // namespace

void local_backward(const LocalProblem& problem, const LocalGradients& gradients, int64_t begin, int64_t end) {
  for (int64_t piece = begin; piece < end; ++piece) {
    const LocalMap map(problem, piece);
    if (map.first_row < map.last_row) Backward(problem, gradients, map, piece).run();
  }
}

}  // namespace attnrewrite::ISA
