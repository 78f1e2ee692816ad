// The walk of a pass over all elements of a bucket: cut into pieces, shared out over threads, one chunk at a time.
// There is no torch in here, so that csrc/sanitize/ runs the very same code under the sanitizers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "chunk.h"

namespace lookbehind_fused {

constexpr int64_t kChunk = 16384;  // elements of a piece at most: its sums are the same for any number of threads

// One tensor: what ``table`` says of it, and by address what PyTorch has of it, null where a pass has no use for that.
struct Row {
  int64_t row, start, size, group;
  void* param;
  const void* grad;
  int64_t numbers;  // which of the pass's constants are its own: neighbours share them where they are equal
};

// The tensors of a call and its flat buffers, by address; null or empty where a pass has no use for them.
struct Addresses {
  Row* rows = nullptr;
  int64_t count = 0;
  Dtype dtype = Dtype::f32;
  void* perturbed = nullptr;
  void* slow = nullptr;
  void* fast = nullptr;
  void* fast_from = nullptr;
  void* first = nullptr;
  int states = 0;
  void* state[kMaxStates] = {};
  void* state_from[kMaxStates] = {};
};

struct Piece {
  int64_t tensor, begin, size;  // elements [begin, begin + size) of a tensor
};

inline std::vector<Piece> pieces_of(const Row* rows, int64_t count) {
  std::vector<Piece> pieces;
  pieces.reserve(count);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t begin = 0; begin < rows[t].size; begin += kChunk)
      pieces.push_back({t, begin, std::min(kChunk, rows[t].size - begin)});
  return pieces;
}

// Call run(piece number) for all of them, in parallel if there are at least kShared elements. Each thread has a run of
// pieces with about as many elements as the others', and no fewer than kPerThread. ``Threads`` says how many there are,
// count(); share(n, f) calls f(begin, end) for parts of [0, n). From kStreamed elements on, results are streamed.
template <class Threads, class F>
void for_each_piece(const std::vector<Piece>& pieces, int64_t total, const F& run) {
  const int64_t threads =
      total < Threads::kShared ? 1 : std::min<int64_t>(Threads::count(), total / Threads::kPerThread);
  if (threads <= 1) {
    for (size_t i = 0; i < pieces.size(); ++i) run(i);
    return;
  }
  std::vector<int64_t> ends(pieces.size() + 1, 0);
  for (size_t i = 0; i < pieces.size(); ++i) ends[i + 1] = ends[i] + pieces[i].size;
  const auto bound = [&](int64_t share) {
    return std::lower_bound(ends.begin(), ends.end(), total * share / threads) - ends.begin();
  };
  Threads::share(threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = bound(begin); i < bound(end); ++i) run(i);
  });
}

inline int64_t width_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

inline void* offset(void* start, int64_t bytes) { return start ? static_cast<char*>(start) + bytes : nullptr; }
inline const void* offset(const void* start, int64_t bytes) {
  return start ? static_cast<const char*>(start) + bytes : nullptr;
}

// Run a pass over all pieces. What the pieces add to sums is returned in their order, ``terms`` numbers a piece.
template <class T, class Threads>
std::vector<double> walk(ChunkFunction chunk_function, const Addresses& work, const std::vector<Constants<T>>& numbers,
                         const std::vector<Piece>& pieces, int terms) {
  const int64_t width = width_of(work.dtype);
  std::vector<double> sums(pieces.size() * terms);
  int64_t total = 0;
  for (const Piece& piece : pieces) total += piece.size;
  const bool streams = total >= Threads::kStreamed;
  for_each_piece<Threads>(pieces, total, [&](int64_t i) {
    const Piece& piece = pieces[i];
    const Row& row = work.rows[piece.tensor];
    const int64_t in_tensor = piece.begin * width;
    const int64_t in_buffer = (row.start + piece.begin) * int64_t(sizeof(T));
    Chunk c{};
    c.size = piece.size;
    c.streams = streams;
    c.param = offset(row.param, in_tensor);
    c.grad = offset(row.grad, in_tensor);
    c.perturbed = offset(work.perturbed, in_buffer);
    c.slow = offset(work.slow, in_buffer);
    c.fast = offset(work.fast, in_buffer);
    c.fast_from = offset(work.fast_from, in_buffer);
    c.first = offset(work.first, in_buffer);
    for (int s = 0; s < work.states; ++s) {
      c.state[s] = offset(work.state[s], in_buffer);
      c.state_from[s] = offset(work.state_from[s], in_buffer);
    }
    c.constants = &numbers[row.numbers];
    c.sums = sums.data() + i * terms;
    chunk_function(c);
  });
  return sums;
}

}  // namespace lookbehind_fused
