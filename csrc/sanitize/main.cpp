// Every pass, rule, dtype and instruction set over tensors of awkward sizes, to be run under the sanitizers (make
// sanitize).
//
// No torch: this drives walk.h, the very code that the ops drive, with its own threads. Each tensor and each flat
// buffer is a heap block of exactly its size, and everything that a pass has no use for is null, so that a wrong
// address is found. Apart from what the sanitizers find, the results of 1, 2 and 7 threads must be the same to the last
// bit.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "../cpu/walk.h"

using namespace lookbehind_fused;

namespace {

using Find = ChunkFunction (*)(const Variant&);

struct Threads {
  static constexpr int64_t kShared = 8192, kPerThread = 4096;
  static constexpr int64_t kStreamed = 3000;
  static int64_t limit;
  static int64_t count() { return limit; }
  template <class F>
  static void share(int64_t n, const F& f) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < n; ++i) threads.emplace_back([&f, i] { f(i, i + 1); });
    for (std::thread& thread : threads) thread.join();
  }
};
int64_t Threads::limit = 1;

// A heap block that ends after exactly ``bytes``, ``skipped`` bytes after a boundary of 64: no room to run over.
struct Block {
  std::unique_ptr<void, void (*)(void*)> memory;
  int64_t skipped, bytes;
  Block(int64_t bytes, int64_t skipped = 0) : memory(nullptr, std::free), skipped(skipped), bytes(bytes) {
    void* block = nullptr;
    if (posix_memalign(&block, 64, skipped + bytes) != 0) std::abort();
    memory.reset(block);
  }
  void* data() const { return static_cast<char*>(memory.get()) + skipped; }
};

// The same numbers after every start(): what differs then is not the input.
struct Random {
  uint64_t state = 1;
  void start() { state = 1; }
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 33);
  }
} random_numbers;

// Any bits at all for 16-bit floats, numbers of every size and sign otherwise.
void fill(const Block& block, int width) {
  char* to = static_cast<char*>(block.data());
  for (int64_t at = 0; at < block.bytes; at += width) {
    const double number = (int64_t(random_numbers.bits() & 0xffff) - 0x8000) / 32768.0;
    const float single = float(number);
    const uint16_t half = uint16_t(random_numbers.bits());
    std::memcpy(to + at,
                width == 8   ? static_cast<const void*>(&number)
                : width == 4 ? static_cast<const void*>(&single)
                             : &half,
                width);
  }
}

struct Counts {
  int64_t runs = 0, elements = 0, differences = 0;
};

const int64_t kSizes[][12] = {
    {0},                                           // an empty tensor
    {1, 0, 1, 0, 0, 1},                            // more of them than others
    {1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 63, 65},   // tails
    {511, 512, 513, 16383, 16384, 16385, 1, 129},  // blocks and pieces
    {20001, 0, 3, 17001, 1, 77},                   // several pieces, shared by several threads
};

template <class T>
std::vector<char> pass(Find find, Variant variant, const std::vector<int64_t>& sizes, bool apart, int64_t threads,
                       Counts& counts) {
  random_numbers.start();
  const int width = int(width_of(variant.dtype));
  const bool rounds = width < int(sizeof(T)),
             descends = variant.pass >= Pass::descend && variant.pass != Pass::interpolate;
  const Pass p = variant.pass;
  std::vector<Block> blocks;
  blocks.reserve(2 * sizes.size() + 16);
  const auto block = [&](int64_t count, int size, int64_t skipped = 0) {
    blocks.emplace_back(count * size, skipped * size);
    fill(blocks.back(), size);
    return blocks.back().data();
  };

  std::vector<Row> rows;
  Addresses work;
  int64_t end = 0;
  for (size_t t = 0; t < sizes.size(); ++t) {
    rows.push_back({int64_t(t), end, sizes[t], 0, nullptr, nullptr, 0});
    const bool is_last = t + 1 == sizes.size();
    end += is_last ? sizes[t] : (sizes[t] + 15) / 16 * 16;
    if (p != Pass::descend) rows.back().param = block(sizes[t], width, t % 5);
    if (p != Pass::interpolate && p != Pass::keep) rows.back().grad = block(sizes[t], width, t % 3);
    counts.elements += sizes[t];
  }
  const auto buffer = [&] { return block(end, sizeof(T)); };
  work.rows = rows.data(), work.count = int64_t(rows.size()), work.dtype = variant.dtype;
  if (rounds && p != Pass::descend && p != Pass::descend_interpolate) work.perturbed = buffer();
  if (p == Pass::reduce_sq_norm && !apart) work.perturbed = nullptr;  // evaluation 0
  if (p == Pass::keep || (p == Pass::ascend && apart) || p >= Pass::descend_interpolate) work.slow = buffer();
  const bool keeps = p == Pass::descend || p == Pass::descend_ascend;
  if (keeps && !(variant.derives && apart)) work.fast = buffer();
  if (descends) work.fast_from = work.fast && !apart ? work.fast : buffer();
  if (p == Pass::descend_align && !variant.derives) work.first = apart ? buffer() : work.fast_from;
  const int states = descends ? extent_of(variant.rule).buffers : 0;
  work.states = states;
  for (int s = 0; s < states; ++s) work.state[s] = buffer();
  for (int s = 0; s < states; ++s) work.state_from[s] = apart ? buffer() : work.state[s];

  std::vector<Constants<T>> numbers(2);  // every other tensor has the second of them
  for (Row& row : rows) row.numbers = row.row % 2;
  for (int n = 0; n < 2; ++n) {
    Constants<T>& c = numbers[n];
    for (int i = 0; i < 10; ++i) c.rule[i] = T(0.1 + 0.1 * i + 0.05 * n);
    c.scale = T(0.5 + n), c.factor = T(0.25 + n), c.eta = T(0.01), c.alpha = T(apart ? 0.3 : 0.7);
  }
  const int terms = p == Pass::reduce_sq_norm ? 2 : p == Pass::descend_align ? 3 : 0;
  Threads::limit = threads;
  const auto sums = walk<T, Threads>(find(variant), work, numbers, pieces_of(work.rows, work.count), terms);

  ++counts.runs;
  std::vector<char> result;
  for (const Block& b : blocks)
    result.insert(result.end(), static_cast<char*>(b.data()), static_cast<char*>(b.data()) + b.bytes);
  const char* s = reinterpret_cast<const char*>(sums.data());
  if (!sums.empty()) result.insert(result.end(), s, s + sums.size() * sizeof(double));
  return result;
}

template <class T>
void all_sizes(Find find, const Variant& variant, Counts& counts) {
  for (const auto& row : kSizes) {
    std::vector<int64_t> sizes(std::begin(row), std::end(row));
    while (sizes.size() > 1 && sizes.back() == 0) sizes.pop_back();
    for (bool apart : {false, true}) {
      const auto alone = pass<T>(find, variant, sizes, apart, 1, counts);
      if (*std::max_element(sizes.begin(), sizes.end()) <= kChunk) continue;
      for (int64_t threads : {2, 7})
        counts.differences += pass<T>(find, variant, sizes, apart, threads, counts) != alone;
    }
  }
}

void all_variants(Find find, Counts& counts) {
  using R = Rule;
  const R descents[] = {R::none, R::sgd, R::momentum, R::adam, R::amsgrad}, no_descent[] = {R::none};
  for (Pass pass : {Pass::reduce_sq_norm, Pass::keep, Pass::ascend, Pass::descend, Pass::descend_ascend,
                    Pass::descend_interpolate, Pass::descend_align, Pass::interpolate}) {
    const bool descends = pass >= Pass::descend && pass != Pass::interpolate;
    for (const R* rule = descends ? std::begin(descents) : std::begin(no_descent);
         rule != (descends ? std::end(descents) : std::end(no_descent)); ++rule)
      for (Dtype dtype : {Dtype::f64, Dtype::f32, Dtype::bf16, Dtype::f16})
        for (bool adapts : {false, true}) {
          if (adapts && (pass == Pass::keep || (pass > Pass::ascend && pass != Pass::descend_ascend))) continue;
          for (bool derives : {false, true}) {
            if (derives && (!descends || *rule == R::none || *rule == R::sgd)) continue;
            const Variant variant{pass, dtype, *rule, adapts, derives};
            dtype == Dtype::f64 ? all_sizes<double>(find, variant, counts) : all_sizes<float>(find, variant, counts);
          }
        }
  }
}

bool report(const char* isa, Find find) {
  Counts counts;
  all_variants(find, counts);
  std::printf("%s: %lld passes over %lld elements, %lld differ with the number of threads\n", isa,
              (long long)counts.runs, (long long)counts.elements, (long long)counts.differences);
  return counts.runs > 0 && counts.differences == 0;
}

}  // namespace

int main() {
  bool good = report("baseline", baseline::find);
#ifdef LOOKBEHIND_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    good &= report("avx2", avx2::find);
  else
    std::printf("avx2: not run, this machine has none\n");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    good &= report("avx512", avx512::find);
  else
    std::printf("avx512: not run, this machine has none\n");
#endif
  return good ? 0 : 1;
}
