// How the backward pass cuts an image into segments of query rows, each with its own key gradients.
#pragma once

#include "window.h"

namespace sasa {
namespace SASA_ISA {

// Segments of query rows, and the rows of keys that they share.
struct Cut {
  int64_t count, rows;  // segments; rows of queries in each
  int32_t* seen_by;     // [row of keys]: number of segments that see it
  int32_t* place;       // [segment][row of keys]: among the rows the segment shares with others; -1 for none
  int64_t most_shared;  // maximum number of rows that a segment shares

  // `tables` holds (segments + 1) times axis.size numbers.
  Cut(const sasa_axis& axis, int64_t segment_rows, int32_t* tables)
      : count(ceil_div(axis.outputs, segment_rows)),
        rows(segment_rows),
        seen_by(tables),
        place(tables + axis.size),
        most_shared(0) {
    for (int64_t i = 0; i < axis.size; ++i) seen_by[i] = 0;
    for (int64_t i = 0; i < axis.size * count; ++i) place[i] = -1;
    for (int64_t y = 0; y < axis.outputs; ++y) {
      const Range taps = taps_inside(axis, y);
      for (int64_t t = taps.first; t < taps.last; ++t) {
        const int64_t key = window_start(axis, y) + t * axis.dilation;
        int32_t& mark = place[y / rows * axis.size + key];
        if (mark < 0) ++seen_by[key];
        mark = 0;
      }
    }
    for (int64_t segment = 0; segment < count; ++segment) {
      int32_t places = 0;
      for (int64_t y = 0; y < axis.size; ++y) {
        int32_t& mark = place[segment * axis.size + y];
        if (mark == 0) mark = seen_by[y] > 1 ? places++ : -1;
      }
      most_shared = greater(most_shared, places);
    }
  }
};

}  // namespace SASA_ISA
}  // namespace sasa
