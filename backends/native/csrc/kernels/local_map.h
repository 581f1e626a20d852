// Where the tokens of a piece of work lie: one dilation group of one head of one image, or a band of its rows.
//
// Tokens whose positions have the same remainders by the dilation attend among themselves alone, as on a map of their
// own without dilation. So a position here is one within the group.
#pragma once

#include "buffer.h"
#include "packing.h"
#include "window.h"

namespace attnrewrite::ISA {

INLINE int64_t lesser(int64_t one, int64_t other) { return one < other ? one : other; }
INLINE int64_t greater(int64_t one, int64_t other) { return one < other ? other : one; }
INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct LocalMap {
  const LocalProblem& problem;
  int64_t batch, head;
  int64_t origin[3], size[3];
  int64_t first_row, last_row;  // the band, on the first axis

  // Every piece is one number: image, head, group, band, from the outermost.
  LocalMap(const LocalProblem& of, int64_t piece) : problem(of) {
    const int64_t bands = bands_of(of), band = piece % bands;
    piece /= bands;
    for (int axis = 2; axis >= 0; --axis) {
      origin[axis] = piece % of.dilation[axis];
      piece /= of.dilation[axis];
      size[axis] = ceil_div(of.grid[axis] - origin[axis], of.dilation[axis]);
    }
    head = piece % of.heads;
    batch = piece / of.heads;
    first_row = lesser(band * of.band, size[0]);
    last_row = lesser(first_row + of.band, size[0]);
  }

  // The first position of the window of the query at `position`.
  int64_t start(int axis, int64_t position) const {
    const int64_t centered = position - problem.kernel[axis] / 2;
    if (!problem.slides) return centered;
    return greater(0, lesser(centered, size[axis] - problem.kernel[axis]));
  }

  // Whether the query at `position` sees the key at `at`, both on the axis.
  bool sees(int axis, int64_t position, int64_t at) const {
    const int64_t first = start(axis, position);
    return first <= at && at < first + problem.kernel[axis];
  }

  // The first and the last query of an axis that sees the key at `at`; both grow with it.
  int64_t first_seeing(int axis, int64_t at) const {
    int64_t position = greater(0, at - problem.kernel[axis] - problem.kernel[axis] / 2);
    while (!sees(axis, position, at)) ++position;
    return position;
  }

  int64_t last_seeing(int axis, int64_t at) const {
    int64_t position = lesser(size[axis] - 1, at + problem.kernel[axis] + problem.kernel[axis] / 2);
    while (!sees(axis, position, at)) --position;
    return position;
  }

  // The most queries of an axis that see one of the keys in `[from, to)`: on a map of less than two windows a key can be
  // in all the windows that both borders stop.
  int64_t most_seeing(int axis, int64_t from, int64_t to) const {
    int64_t most = 0;
    for (int64_t at = from; at < to; ++at) most = greater(most, last_seeing(axis, at) - first_seeing(axis, at) + 1);
    return most;
  }

  int64_t offset(const Operand& operand, int64_t row, int64_t line, int64_t column) const {
    const int64_t position[3] = {row, line, column};
    int64_t result = batch * operand.batch_stride + head * operand.head_stride;
    for (int axis = 0; axis < 3; ++axis) {
      result += (origin[axis] + position[axis] * problem.dilation[axis]) * operand.axis_strides[axis];
    }
    return result;
  }

  int64_t step(const Operand& operand) const { return problem.dilation[2] * operand.axis_strides[2]; }

  // The number of a token in the order of contiguous results, without heads.
  int64_t token(int64_t row, int64_t line, int64_t column) const {
    const int64_t position[3] = {row, line, column};
    int64_t result = batch;
    for (int axis = 0; axis < 3; ++axis) {
      result = result * problem.grid[axis] + origin[axis] + position[axis] * problem.dilation[axis];
    }
    return result;
  }
};

// Neighboring queries of a row, one a lane.
struct Tile {
  int64_t column, count;  // of the first query; queries in it
  int64_t first;          // column that the first query's window starts at
  bool is_border;         // windows do not start one after the other, or reach over the border
  Ints from;              // where a lane's window starts, from `first` on
  Ints shift;             // which entry of a row of the bias a lane's first place has
  Ints is_query;          // lanes that hold one

  Tile(const LocalMap& map, int64_t at) : column(at), count(lesser(kLanes, map.size[2] - at)), first(map.start(2, at)) {
    const auto kernel = static_cast<int32_t>(map.problem.kernel[2]), size = static_cast<int32_t>(map.size[2]);
    const Ints lanes = lane_numbers(), position = lanes + static_cast<int32_t>(column);
    const Ints centered = position - kernel / 2;
    Ints start = centered;
    if (map.problem.slides) {
      start = start > size - kernel ? Ints{} + (size - kernel) : start;
      start = start < 0 ? Ints{} : start;
    }
    from = start - static_cast<int32_t>(first);
    shift = map.problem.slides ? start - position + (kernel - 1) : Ints{};
    is_query = lanes < static_cast<int32_t>(count);
    is_border = map.problem.slides ? any((from != lanes) | (start != centered))
                                   : first < 0 || column + count - 1 + kernel - kernel / 2 > map.size[2];
  }
};

// Rows of a map, packed `[row, line, channel, column]` with room for what loads reach beyond the map. It holds the
// `rows` that were packed last, one after the other, so that a walk down the map needs few.
class PackedRows {
 public:
  int64_t margin, stride, lines, channels;

  PackedRows(const LocalMap& map, int64_t channel_count, int64_t rows)
      : margin(map.problem.kernel[2] - 1),
        stride(margin + round_up(map.size[2], kLanes) + greater(kLanes, margin)),
        lines(map.size[1]),
        channels(channel_count),
        rows_(rows),
        data_(rows * lines * channels * stride) {}

  void clear() { std::memset(data_.data, 0, sizeof(float) * rows_ * lines * channels * stride); }

  void pack(const LocalMap& map, const Operand& operand, int64_t from, int64_t to, float factor) {
    for (int64_t row = from; row < to; ++row) {
      for (int64_t line = 0; line < lines; ++line) {
        float* target = at(row, line, -margin);
        if (row + 1 < to) {
          prefetch(operand, map.offset(operand, row + 1, line, 0), map.step(operand), map.size[2], channels);
        }
        for (int64_t channel = 0; channel < channels; ++channel) {
          float* channel_row = target + channel * stride;
          for (int64_t each = 0; each < margin; ++each) channel_row[each] = 0;
          for (int64_t each = margin + map.size[2]; each < stride; ++each) channel_row[each] = 0;
        }
        ISA::pack(operand, map.offset(operand, row, line, 0), map.step(operand), map.size[2], channels, factor,
                  target + margin, stride);
      }
    }
  }

  float* at(int64_t row, int64_t line, int64_t column) const {
    return data_.data + (row % rows_ * lines + line) * channels * stride + margin + column;
  }

  // Rows of the windows of a tile's queries, in `queries` rows from `row` on; `rows` is room for them.
  WindowRows window(const LocalMap& map, int64_t row, int64_t queries, int64_t line, const Tile& tile,
                    const float** rows) const {
    const int64_t* kernel = map.problem.kernel;
    const int64_t top = map.start(0, row), last_top = map.start(0, row + queries - 1), left = map.start(1, line);
    int64_t count = 0;
    for (int64_t r = top; r < last_top + kernel[0]; ++r) {
      for (int64_t l = left; l < left + kernel[1]; ++l) {
        const bool is_on_map = r >= 0 && r < map.size[0] && l >= 0 && l < map.size[1];
        rows[count++] = is_on_map ? at(r, l, tile.first) : nullptr;
      }
    }
    return {rows, queries, kernel[0] * kernel[1], (last_top - top) * kernel[1], stride,
            map.problem.slides && tile.is_border, tile.from};
  }

 private:
  int64_t rows_;
  Buffer data_;
};

}  // namespace attnrewrite::ISA
