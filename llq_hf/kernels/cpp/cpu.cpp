// The C interface of the CPU kernels. kernels/native.py repeats its declarations.
//
// Legend: O rows of the weight, I columns, T tokens.
#include <algorithm>

#include "levels.h"
#include "salient.h"
#include "table.h"
#include "turn.h"
#include "uniform.h"

namespace {

// CHUNK: rows whose scales stay in the cache; AT_ONCE: tokens that share a pass over a row; FOR_A_THREAD: weights times
// tokens that take as long as waking a thread (30 us).
constexpr int CHUNK = 64, AT_ONCE = 4, FOR_A_THREAD = 1 << 21;

// Calls work(first row, last row) for chunks of rows.
template <typename Work>
void over_rows(int rows, int threads, Work work) {
  pool().run((rows + CHUNK - 1) / CHUNK, threads,
             [&](int chunk) { work(chunk * CHUNK, std::min(rows, (chunk + 1) * CHUNK)); });
}

// The arguments that all products share: x [T, I] and y [T, O] of `dtype`, an fp32 bias [O] or null.
struct Call {
  const void* x;
  int dtype, columns, tokens;
  const float* bias;
  void* y;
  int threads;

  // Threads that are worth being woken for the products with so many rows.
  int workers(int rows) const { return (int)std::min<int64_t>(threads, 1 + (int64_t)rows * columns * tokens / FOR_A_THREAD); }

  // x in fp32, with as much room behind it.
  float* floats(std::vector<float>& buffer) const {
    buffer.resize(2 * (int64_t)tokens * columns);
    to_floats(x, (Dtype)dtype, (int64_t)tokens * columns, buffer.data());
    return buffer.data();
  }

  // Adds the bias to sums [T, rows of a chunk] and stores them as rows `first` on of y.
  void store(std::vector<float>& sums, int first, int last, int rows) const {
    const int size = last - first;
    for (int t = 0; t < tokens; t++) {
      float* from = sums.data() + (int64_t)t * size;
      if (bias)
        for (int i = 0; i < size; i++) from[i] += bias[first + i];
      from_floats(from, size, (Dtype)dtype, (uint8_t*)y + ((int64_t)t * rows + first) * size_of((Dtype)dtype));
    }
  }
};

// Products in fp32; the weight is decoded row by row.
template <typename Weight>
void multiply_floats(const Weight& weight, const Call& call) {
  static thread_local std::vector<float> floats;
  const float* x_TI = call.floats(floats);
  over_rows(weight.rows(), call.workers(weight.rows()), [&](int first, int last) {
    static thread_local std::vector<float> sums, row;
    static thread_local typename Weight::State state;
    const int size = last - first;
    sums.resize((int64_t)call.tokens * size);
    row.resize((int64_t)Blocks(call.columns).all() * BLOCK);
    weight.read(state, first, last);
    for (int r = first; r < last; r++) {
      weight.decode_row(state, r, first, row.data());
      for (int t = 0; t < call.tokens; t++)
        sums[(int64_t)t * size + r - first] = dot(row.data(), x_TI + (int64_t)t * call.columns, call.columns);
    }
    call.store(sums, first, last, weight.rows());
  });
}

// Decodes rows from..to as `dtype`.
template <typename Weight>
void decode(const Weight& weight, int from, int to, Dtype dtype, void* out, int threads) {
  const bool halves = dtype != F32 && weight.has_halves();
  over_rows(to - from, threads, [&](int first, int last) {
    static thread_local std::vector<float> row;
    static thread_local typename Weight::State state;
    row.resize((int64_t)Blocks(weight.columns()).all() * BLOCK);
    weight.read(state, from + first, from + last);
    for (int r = first; r < last; r++) {
      uint8_t* to_row = (uint8_t*)out + (int64_t)r * weight.columns() * size_of(dtype);
      if (halves) {
        weight.decode_halves(state, from + r, from + first, dtype, (uint16_t*)to_row);
        continue;
      }
      weight.decode_row(state, from + r, from + first, row.data());
      from_floats(row.data(), weight.columns(), dtype, to_row);
    }
  });
}

// Calls work(number of tokens as a constant, first token), with as many tokens as the registers hold sums of.
template <typename Work>
void over_tokens(int tokens, Work work) {
  int t = 0;
  for (; t + AT_ONCE <= tokens; t += AT_ONCE) work(std::integral_constant<int, AT_ONCE>{}, t);
  for (; t + 2 <= tokens; t += 2) work(std::integral_constant<int, 2>{}, t);
  for (; t < tokens; t++) work(std::integral_constant<int, 1>{}, t);
}

// The digits of the activations, for blocks in order with one group each. The calling thread owns the result until its
// next product.
template <typename Weight>
const Digits& digits_of(const Call& call, const Weight& weight) {
  static thread_local std::vector<float> floats;
  static thread_local Digits digits;
  const auto source = [](int k) { return k; };
  split(call.floats(floats), call.columns, call.tokens, 0, weight.blocks, weight.w.groups, weight.group_of, source, digits);
  return digits;
}

// Which dot_digits serves this many pieces of a block.
template <int BITS, int TOKENS>
auto dot_of(int pieces) {
  return pieces == 1   ? dot_digits<BITS, TOKENS, 1>
         : pieces == 2 ? dot_digits<BITS, TOKENS, 2>
         : pieces == 4 ? dot_digits<BITS, TOKENS, 4>
                       : dot_digits<BITS, TOKENS, 8>;
}

}  // namespace

// y [T, O] = x [T, I] W^T + bias.
// _digits: activations in two int8 digits, of fp32 in four; groups are whole blocks of 128 columns, or of uniform codes
// whole slots of 16.
// _floats: all in fp32; any groups.
// _decode: rows from..to of W, [to - from, I] of `dtype`.
extern "C" {

void llq_uniform_digits(const Uniform* parts, int count, const void* x, int dtype, int columns, int tokens, const float* bias,
                        void* y, int threads) {
  static thread_local std::vector<float> floats;
  static thread_local std::vector<Digits> digits;
  const UniformWeight weight(parts, count, columns);
  const Call call{x, dtype, columns, tokens, bias, y, threads};
  float* x_TI = call.floats(floats);
  if ((int)digits.size() < count) digits.resize(count);
  const int rests = dtype == F32 ? tokens : 0;
  bool left = false;
  for (int i = 0; i < count; i++) {
    const Part& part = weight.parts[i];
    const auto source = [&](int k) { return part.source(k); };
    left |= split(x_TI, columns, tokens, rests, part.blocks.all(), part.places, part.place_of, source, digits[i]);
  }
  const int all = left ? 2 * tokens : tokens;
  const Digits* d = digits.data();  // the calling thread's: workers have their own
  over_rows(weight.rows(), call.workers(weight.rows()), [&](int first, int last) {
    static thread_local std::vector<float> sums;
    static thread_local UniformWeight::State state;
    const int size = last - first;
    sums.assign((int64_t)all * size, 0);
    state.read_tiles(weight.parts[0], first, last);
    for (int i = 0; i < count; i++) {
      const Part& part = weight.parts[i];
      with_bits(part.w.bits, [&](auto bits) {
        over_tokens(all, [&](auto count, int t) {
          dot_of<bits, count>(part.pieces)(part, state, d[i], t, first, last, sums.data() + (int64_t)t * size);
        });
      });
    }
    if (left)
      for (int64_t i = 0; i < (int64_t)tokens * size; i++) sums[i] += sums[i + (int64_t)tokens * size];
    call.store(sums, first, last, weight.rows());
  });
}

void llq_uniform_floats(const Uniform* parts, int count, const void* x, int dtype, int columns, int tokens, const float* bias,
                        void* y, int threads) {
  multiply_floats(UniformWeight(parts, count, columns), Call{x, dtype, columns, tokens, bias, y, threads});
}

void llq_uniform_decode(const Uniform* parts, int count, int columns, int from, int to, int dtype, void* out, int threads) {
  decode(UniformWeight(parts, count, columns), from, to, (Dtype)dtype, out, threads);
}

// Rows from..to as int8: codes minus `centre`.
void llq_uniform_centred(const Uniform* weight, int from, int to, int centre, uint8_t* out, int threads) {
  const Part part(*weight);
  over_rows(to - from, threads, [&](int first, int last) {
    for (int r = first; r < last; r++) centred_row(part, from + r, centre, out + (int64_t)r * weight->columns);
  });
}

// Columns must be whole blocks.
void llq_levels_digits(const Levels* levels, int, const void* x, int dtype, int columns, int tokens, const float* bias, void* y,
                       int threads) {
  const LevelWeight weight(*levels);
  const Call call{x, dtype, columns, tokens, bias, y, threads};
  const Digits& d = digits_of(call, weight);
  over_rows(weight.rows(), call.workers(weight.rows()), [&](int first, int last) {
    static thread_local std::vector<float> sums;
    static thread_local LevelWeight::State state;
    sums.assign((int64_t)tokens * (last - first), 0);
    const bool planes = !levels->mean && (tokens == 1 || WIDTH == 32);
    planes ? weight.read_planes(state, first, last) : weight.read_digits(state, first, last);
    over_tokens(tokens, [&](auto count, int t) {
      const auto dot = planes ? dot_planes<count> : levels->salient ? dot_levels<count, true> : dot_levels<count, false>;
      dot(weight, state, d, t, first, last, sums.data() + (int64_t)t * (last - first));
    });
    call.store(sums, first, last, weight.rows());
  });
}

void llq_levels_floats(const Levels* levels, int, const void* x, int dtype, int columns, int tokens, const float* bias, void* y,
                       int threads) {
  multiply_floats(LevelWeight(*levels), Call{x, dtype, columns, tokens, bias, y, threads});
}

void llq_levels_decode(const Levels* levels, int, int, int from, int to, int dtype, void* out, int threads) {
  decode(LevelWeight(*levels), from, to, (Dtype)dtype, out, threads);
}

// Columns must be whole blocks.
void llq_salient_digits(const Salient* salient, int, const void* x, int dtype, int columns, int tokens, const float* bias,
                        void* y, int threads) {
  const SalientWeight weight(*salient);
  const Call call{x, dtype, columns, tokens, bias, y, threads};
  const Digits& d = digits_of(call, weight);
  over_rows(weight.rows(), call.workers(weight.rows()), [&](int first, int last) {
    static thread_local std::vector<float> sums;
    static thread_local SalientWeight::State state;
    sums.assign((int64_t)tokens * (last - first), 0);
    weight.read(state, first, last);
    weight.read_factors(state, first, last);
    over_tokens(tokens, [&](auto count, int t) {
      dot_salient<count>(weight, state, d, t, first, last, sums.data() + (int64_t)t * (last - first));
    });
    call.store(sums, first, last, weight.rows());
  });
}

void llq_salient_floats(const Salient* salient, int, const void* x, int dtype, int columns, int tokens, const float* bias,
                        void* y, int threads) {
  multiply_floats(SalientWeight(*salient), Call{x, dtype, columns, tokens, bias, y, threads});
}

void llq_salient_decode(const Salient* salient, int, int, int from, int to, int dtype, void* out, int threads) {
  decode(SalientWeight(*salient), from, to, (Dtype)dtype, out, threads);
}

// Columns must be whole blocks, codes have 4 bits, groups at least half a block.
void llq_table_digits(const Table* table, int, const void* x, int dtype, int columns, int tokens, const float* bias, void* y,
                      int threads) {
  static thread_local std::vector<float> floats, halved;
  static thread_local Digits digits;
  const TableWeight weight(*table);
  const Call call{x, dtype, columns, tokens, bias, y, threads};
  halve(call.floats(floats), (int64_t)columns * tokens, halved);
  const auto source = [](int k) { return k; };
  split(halved.data(), columns, tokens, 0, weight.blocks, table->groups, weight.group_of, source, digits);
  const Digits& d = digits;  // the calling thread's
  over_rows(weight.rows(), call.workers(weight.rows()), [&](int first, int last) {
    static thread_local std::vector<float> sums;
    static thread_local TableWeight::State state;
    sums.assign((int64_t)tokens * (last - first), 0);
    weight.read_tiles(state, first, last);
    over_tokens(tokens, [&](auto count, int t) {
      dot_table<count>(weight, state, d, t, first, last, sums.data() + (int64_t)t * (last - first));
    });
    call.store(sums, first, last, weight.rows());
  });
}

// Groups must divide the columns and be whole units of 32.
void llq_table_floats(const Table* table, int, const void* x, int dtype, int columns, int tokens, const float* bias, void* y,
                      int threads) {
  multiply_floats(TableWeight(*table), Call{x, dtype, columns, tokens, bias, y, threads});
}

void llq_table_decode(const Table* table, int, int, int from, int to, int dtype, void* out, int threads) {
  decode(TableWeight(*table), from, to, (Dtype)dtype, out, threads);
}

// y [T, I] = factor * (the transform of x [T, I] / divisor), in the dtype of x. divisor: fp16 [I] or null; factor: fp32
// or null.
void llq_turn(const Turn* given, const void* x, int dtype, int tokens, const void* divisor, const float* factor, void* y,
              int threads) {
  const int n = given->a * given->b;
  const int64_t bytes = n * size_of((Dtype)dtype);
  static thread_local std::vector<float> divisors;
  divisors.resize(n);
  if (divisor) to_floats(divisor, F16, n, divisors.data());
  const float *by = divisors.data(), times = factor ? *factor : 1;
  pool().run(tokens, threads, [&](int t) {
    static thread_local std::vector<float> row;
    row.resize(n);
    to_floats((const uint8_t*)x + t * bytes, (Dtype)dtype, n, row.data());
    for (int i = 0; divisor && i < n; i++) row[i] /= by[i];
    turn(*given, times, row.data());
    from_floats(row.data(), n, (Dtype)dtype, (uint8_t*)y + t * bytes);
  });
}
}
