// Local attention, forward.
#include "declarations.h"
#include "local_weights.h"

namespace attnrewrite::ISA {

namespace {

template <typename T>
void write(const LocalMap& map, const LocalResults& results, int64_t token, const Tile& tile, const float* output,
           Floats lse) {
  const LocalProblem& problem = map.problem;
  const int64_t step = problem.heads * problem.dilation[2];
  unpack(output, tile.count, problem.value_channels, static_cast<T*>(results.output) + token * problem.value_channels,
         step * problem.value_channels);
  for (int64_t lane = 0; lane < tile.count; ++lane) results.lse[token + lane * step] = lse[lane];
}

// Asks for the memory of a tile's output while there is work to do until it is written.
template <typename T>
void prefetch_output(const LocalMap& map, const LocalResults& results, int64_t row, int64_t line, const Tile& tile) {
  const int64_t channels = map.problem.value_channels, step = map.problem.heads * map.problem.dilation[2] * channels;
  const T* target = static_cast<const T*>(results.output) +
                    (map.token(row, line, tile.column) * map.problem.heads + map.head) * channels;
  for (int64_t token = 0; token < tile.count; ++token, target += step) {
    for (int64_t channel = 0; channel < channels; channel += kCacheLine / sizeof(T)) {
      __builtin_prefetch(target + channel, 1);
    }
  }
}

template <typename T>
void attend(const LocalProblem& problem, const LocalResults& results, int64_t piece) {
  const LocalMap map(problem, piece);
  if (map.first_row == map.last_row) return;
  const int64_t top = greater(0, map.start(0, map.first_row));
  LocalWeights own(map, top);
  const Buffer sums(2 * problem.value_channels * kLanes);
  float* const tiles[2] = {sums.data, sums.data + problem.value_channels * kLanes};
  for (int64_t row = map.first_row; row < map.last_row; row += 2) {
    const int64_t queries = lesser(2, map.last_row - row);
    own.reach(row, queries);
    for (int64_t column = 0; column < map.size[2]; column += kLanes) {
      const Tile tile(map, column);
      for (int64_t line = 0; line < map.size[1]; ++line) {
        for (int64_t which = 0; which < queries; ++which) {
          prefetch_output<T>(map, results, row + which, line, tile);
        }
        Floats lse[2];
        own.attend(row, queries, line, tile, lse);
        const WindowRows window = own.value.window(map, row, queries, line, tile, own.value_rows);
        for (int64_t which = 0; which < queries; ++which) own.add_post(row, which, line, tile, window);
        for (int64_t at = 0; at < 2 * problem.value_channels * kLanes; at += kLanes) store(sums.data + at, Floats{});
        over_window(own.kernels.weighted_sums, own.kernels.width,
                    {{tiles[0], tiles[1]}, {own.weights_of(0), own.weights_of(1)}}, problem.value_channels, window);
        for (int64_t which = 0; which < queries; ++which) {
          add_shared_sums(own.weights_of(which) + own.places * kLanes, problem.value_channels, own.extra_value.data,
                          problem.extras, tiles[which]);
          const int64_t token = map.token(row + which, line, column) * problem.heads + map.head;
          write<T>(map, results, token, tile, tiles[which], lse[which]);
        }
      }
    }
  }
}

}  // namespace

void local_forward(const LocalProblem& problem, const LocalResults& results, int64_t begin, int64_t end) {
  for (int64_t piece = begin; piece < end; ++piece) {
    if (problem.query.is_bfloat16) {
      attend<uint16_t>(problem, results, piece);
    } else {
      attend<float>(problem, results, piece);
    }
  }
}

}  // namespace attnrewrite::ISA
