// What all tasks of a call share.
#pragma once

#include "projection.h"

namespace sasa {
namespace SASA_ISA {

// Channels that an embedding covers; 0 if there is no embedding.
inline int64_t channels_of(const sasa_embedding& embedding) {
  return embedding.data == nullptr ? 0 : embedding.channels;
}

// One call's constants.
template <class S, int P>
struct Call {
  const sasa_problem& problem;
  int64_t planes, groups, taps;
  int64_t together;                    // rows of queries in a block
  int64_t row_channels, col_channels;  // covered by the embeddings
  int64_t table_columns;               // 0 for no table
  int64_t lse_stride[2];
  const Weights<S, P>* weights = nullptr;  // if queries, keys and values are projected

  explicit Call(const sasa_problem& p)
      : problem(p),
        planes(p.batch * p.heads),
        groups(ceil_div(planes, P)),
        taps(p.rows.kernel * p.cols.kernel),
        together(p.pool > 1 ? p.pool : queries_together(p.rows)),
        row_channels(channels_of(p.row)),
        col_channels(channels_of(p.col)),
        table_columns(channels_of(p.table)),
        lse_stride{p.heads * p.rows.outputs * p.cols.outputs, p.rows.outputs * p.cols.outputs} {}
};

}  // namespace SASA_ISA
}  // namespace sasa
