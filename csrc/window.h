// Which keys the queries see: geometry in pixels, and the rings that hold rows of keys in lanes while queries move down
// the image.
#pragma once

#include "lanes.h"
#include "products.h"

namespace sasa {
namespace SASA_ISA {

// Taps first <= t < last; none when first >= last.
struct Range {
  int64_t first, last;
};

// Pixel under the first tap of window `output`; if windows are moved inside, in the query's phase of the dilation.
SASA_INLINE int64_t window_start(const sasa_axis& axis, int64_t output) {
  const int64_t start = output * axis.stride - axis.before;
  if (!axis.shifted) return start;
  const int64_t phase = output * axis.stride % axis.dilation;
  const int64_t last = (axis.size - 1 - phase) / axis.dilation - (axis.kernel - 1);  // in steps of the dilation
  return start < 0 ? phase : lesser(start, phase + last * axis.dilation);
}

// Entries of an embedding.
SASA_INLINE int64_t offsets(const sasa_axis& axis) { return axis.shifted ? 2 * axis.kernel - 1 : axis.kernel; }

// The entry of the first tap of window `output`.
SASA_INLINE int64_t first_offset(const sasa_axis& axis, int64_t output) {
  if (!axis.shifted) return 0;
  return axis.kernel - 1 - (output * axis.stride - window_start(axis, output)) / axis.dilation;
}

// The taps of window `output` that fall inside the image.
SASA_INLINE Range taps_inside(const sasa_axis& axis, int64_t output) {
  const int64_t start = window_start(axis, output);  // of the first tap
  const int64_t first = start >= 0 ? 0 : ceil_div(-start, axis.dilation);
  const int64_t left = axis.size - 1 - start;
  return {first, left < 0 ? 0 : lesser(axis.kernel, left / axis.dilation + 1)};
}

// Pixel under the centre of window 0.
SASA_INLINE int64_t centre(const sasa_axis& axis) { return (axis.kernel - 1) / 2 * axis.dilation - axis.before; }

// Maximum number of the image's pixels under `windows` neighbouring windows: never more than the image has, however far
// the windows reach out of it. With moved windows, a later one may begin before an earlier one, in another phase of the
// dilation, but no pixel is seen again once a pixel that many further on has been.
SASA_INLINE int64_t pixels_under(const sasa_axis& axis, int64_t windows) {
  const int64_t window = axis.shifted ? axis.kernel * axis.dilation : (axis.kernel - 1) * axis.dilation + 1;
  return lesser(axis.size, (windows - 1) * axis.stride + window);
}

// Rows of queries computed together: they share keys only if the stride is a whole number of taps.
SASA_INLINE int64_t queries_together(const sasa_axis& rows) { return rows.stride % rows.dilation == 0 ? kQueries : 1; }

// Row of keys y for the queries `first` <= r < `last` of a block, of which it is tap `tap` - (r - first) * `step`.
struct KeyRowIndex {
  int64_t y;
  int first, last;
  int64_t tap;
  int64_t place;  // in the rings, once they hold it
};

// A block of vertically adjacent queries, and the rows of keys that any of them sees.
struct Block {
  int64_t y;
  int queries;
  int64_t step;  // taps between the windows of neighbouring queries
  KeyRowIndex* rows;
  int count;
  Range inside[kQueries];  // each query's rows of taps inside the image

  // `storage` holds pixels_under() rows.
  Block(const sasa_axis& axis, int64_t y_, int queries_, KeyRowIndex* storage)
      : y(y_), queries(queries_), step(axis.stride / axis.dilation), rows(storage), count(0) {
    for (int r = 0; r < queries; ++r) inside[r] = taps_inside(axis, y + r);
    const int64_t start = window_start(axis, y);
    if (axis.shifted && queries > 1) step = (window_start(axis, y + 1) - start) / axis.dilation;
    const int64_t taps = queries > 1 ? (queries - 1) * step + axis.kernel : axis.kernel;
    const int64_t skipped = start >= 0 ? 0 : ceil_div(-start, axis.dilation);
    for (int64_t tap = skipped; tap < taps; ++tap) {  // counted from the first tap of the first query
      const int64_t row = start + tap * axis.dilation;
      if (row >= axis.size) break;
      int first = 0, last = 0;
      while (first < queries && tap - first * step >= axis.kernel) ++first;
      for (last = first; last < queries && tap - last * step >= 0;) ++last;
      if (first < last) rows[count++] = {row, first, last, tap - first * step, 0};
    }
  }
};

// Rows of keys (or values, or their gradients) in lanes. Row y has the place y % span: the rows under a block of
// queries never collide, and a row is packed only once while blocks move down.
template <class V>
struct Ring {
  V* rows;
  int64_t span, row_size;  // rows; vectors per row

  SASA_INLINE V* row(int64_t y) const { return rows + y % span * row_size; }
};

// Query rows of a segment, cut into blocks of nearly equal height, whose windows are evenly spaced.
template <class F>
SASA_INLINE void in_blocks(const sasa_axis& axis, int64_t first, int64_t last, int64_t together, F block) {
  static_assert(kQueries == 3, "two windows are always equally far apart");
  for (int64_t y = first; y < last;) {
    const int64_t blocks = ceil_div(last - y, together);
    int64_t queries = ceil_div(last - y, blocks);
    if (axis.shifted && queries == 3 &&
        window_start(axis, y + 2) - window_start(axis, y + 1) != window_start(axis, y + 1) - window_start(axis, y))
      queries = 2;
    block(y, int(queries));
    y += queries;
  }
}

// Allocates parts of a workspace; without memory, computes how much is needed. A size that does not fit in size_t is
// clamped to the largest one, which allocate() rejects.
struct Workspace {
  char* memory;
  size_t used = 0;

  // Space for the product of `counts` objects.
  template <class U, class... N>
  U* take(N... counts) {
    U* part = memory == nullptr ? nullptr : reinterpret_cast<U*>(memory + used);
    size_t bytes = sizeof(U);
    const bool fits = (... && !__builtin_mul_overflow(bytes, counts, &bytes)) &&
                      !__builtin_add_overflow(bytes, size_t(63), &bytes) &&
                      !__builtin_add_overflow(used, bytes / 64 * 64, &used);
    if (!fits) used = SIZE_MAX;
    return part;
  }
};

}  // namespace SASA_ISA
}  // namespace sasa
