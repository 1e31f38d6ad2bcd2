// Every attention kernel on small odd shapes, against double precision on the CPU; without torch, for
// compute-sanitizer:
//
//   cmake -S . -B build/cuda -DSTDIT_CHECKS=ON && cmake --build build/cuda --target attention_check
//   compute-sanitizer --tool memcheck build/cuda/attention_check      # racecheck, synccheck likewise
//
// It is built with STDIT_RACECHECK (stdit/barrier.h). Head dimensions as arguments: only shapes of those.
//
// Prints a line for each shape; ends with status 1 if an error is larger than bfloat16's, or a value was not written.

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "stdit/attention.h"
#include "stdit/launch_check.h"

namespace {

constexpr double kEpsilon = 1e-6;
constexpr double kTolerance = 2e-2;  // of the root mean square: some roundings to bfloat16

using Bf16 = __nv_bfloat16;

template <typename T>
struct OnDevice {
  T* data = nullptr;
  size_t size;

  explicit OnDevice(const std::vector<T>& host) : size(host.size()) {
    STDIT_CHECK(cudaMalloc(&data, std::max<size_t>(1, size) * sizeof(T)));
    STDIT_CHECK(cudaMemcpy(data, host.data(), size * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~OnDevice() { cudaFree(data); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  std::vector<T> host() const {
    std::vector<T> copy(size);
    STDIT_CHECK(cudaMemcpy(copy.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost));
    return copy;
  }
};

struct Shape {
  int sequences, rows, heads;
  bool normalise;
  int head_dim = 72;
};

std::vector<Bf16> random_values(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<Bf16> values(count);
  for (Bf16& v : values) v = __float2bfloat16(normal(generator));
  return values;
}

// One head of one sequence, in double precision.
struct Reference {
  std::vector<double> o, lse, d_q, d_k, d_v;  // [rows, D], lse [rows]

  // part(i, row, column): q, k, v for i = 0, 1, 2, and the gradient of o for 3. The weights' gradients are added.
  template <class Part>
  Reference(int queries, int keys, int D, bool normalise, const std::vector<float>& w_q, const std::vector<float>& w_k,
            Part part, std::vector<double>& d_weights)
      : o(queries * D), lse(queries), d_q(queries * D), d_k(keys * D), d_v(keys * D) {
    const double scale = 1.0 / std::sqrt(static_cast<double>(D));
    const int rows[2] = {queries, keys};
    std::vector<double> hat[2], factor[2], d_hat[2];
    for (int i = 0; i < 2; ++i) {
      hat[i].resize(rows[i] * D);
      d_hat[i].resize(rows[i] * D);
      factor[i].assign(rows[i], 1.0);
      for (int r = 0; r < rows[i]; ++r) {
        double sum = 0;
        for (int c = 0; c < D; ++c) sum += part(i, r, c) * part(i, r, c);
        if (normalise) factor[i][r] = 1.0 / std::sqrt(sum / D + kEpsilon);
        for (int c = 0; c < D; ++c) hat[i][r * D + c] = part(i, r, c) * factor[i][r];
      }
    }
    const auto weight = [&](int i, int c) { return normalise ? (i == 0 ? w_q[c] : w_k[c]) : 1.0; };
    std::vector<double> p(keys);
    for (int r = 0; r < queries; ++r) {
      double high = -INFINITY, sum = 0, delta = 0;
      for (int k = 0; k < keys; ++k) {
        double score = 0;
        for (int c = 0; c < D; ++c) score += hat[0][r * D + c] * weight(0, c) * hat[1][k * D + c] * weight(1, c);
        p[k] = score * scale;
        high = std::max(high, p[k]);
      }
      for (int k = 0; k < keys; ++k) sum += p[k] = std::exp(p[k] - high);
      lse[r] = high + std::log(sum);
      for (int k = 0; k < keys; ++k) {
        p[k] /= sum;
        for (int c = 0; c < D; ++c) o[r * D + c] += p[k] * part(2, k, c);
      }
      for (int c = 0; c < D; ++c) delta += o[r * D + c] * part(3, r, c);
      for (int k = 0; k < keys; ++k) {
        double d_p = 0;
        for (int c = 0; c < D; ++c) d_p += part(3, r, c) * part(2, k, c);
        const double d_s = p[k] * (d_p - delta) * scale;
        for (int c = 0; c < D; ++c) {
          d_v[k * D + c] += p[k] * part(3, r, c);
          d_hat[0][r * D + c] += d_s * hat[1][k * D + c] * weight(1, c);  // of q normalised and weighted
          d_hat[1][k * D + c] += d_s * hat[0][r * D + c] * weight(0, c);
        }
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < rows[i]; ++r) {
        double dot = 0;
        for (int c = 0; c < D; ++c) {
          d_weights[i * D + c] += d_hat[i][r * D + c] * hat[i][r * D + c];
          d_hat[i][r * D + c] *= weight(i, c);
          dot += d_hat[i][r * D + c] * hat[i][r * D + c] / D;
        }
        for (int c = 0; c < D; ++c) {
          (i == 0 ? d_q : d_k)[r * D + c] =
              factor[i][r] * (d_hat[i][r * D + c] - (normalise ? dot * hat[i][r * D + c] : 0.0));
        }
      }
    }
  }
};

// Root mean square of the differences over that of the values (at least `floor`); infinite where something is not
// finite.
struct Error {
  double difference = 0, value = 0;
  bool finite = true;

  void add(double got, double want) {
    finite = finite && std::isfinite(got);
    difference += (got - want) * (got - want);
    value += want * want;
  }
  double relative() const { return finite ? std::sqrt(difference / std::max(value, 1e-12)) : INFINITY; }
};

// Prints the errors of o, lse, d_q, d_k, d_v, d_weights. One key: no gradient reaches q and k, and what there is of it
// is rounding.
bool judge(const Error (&errors)[6], bool one) {
  bool good = true;
  const char* const names[] = {"o", "lse", "dq", "dk", "dv", "dw"};
  for (int i = 0; i < 6; ++i) {
    const bool tiny = one && (i == 2 || i == 3 || i == 5);
    const double error = tiny ? std::sqrt(errors[i].difference) : errors[i].relative();
    std::printf(" %s %.1e", names[i], error);
    good = good && errors[i].finite && error < kTolerance;
  }
  std::printf(good ? "\n" : "  TOO LARGE\n");
  std::fflush(stdout);
  return good;
}

bool check(const Shape& shape, unsigned seed) {
  const int N = shape.sequences, S = shape.rows, H = shape.heads, D = shape.head_dim;
  const size_t size = static_cast<size_t>(N) * S * H * D;
  const std::vector<Bf16> qkv = random_values(3 * size, seed), d_o = random_values(size, seed + 1);
  std::vector<float> w_q(D), w_k(D);
  for (int c = 0; c < D; ++c) {
    w_q[c] = 1.0f + 0.3f * std::sin(c + seed);
    w_k[c] = 1.0f + 0.3f * std::cos(2 * c + seed);
  }
  const Bf16 nan = __float2bfloat16(NAN);
  OnDevice<Bf16> qkv_there(qkv), do_there(d_o), o_there(std::vector<Bf16>(size, nan));
  OnDevice<Bf16> dqkv_there(std::vector<Bf16>(3 * size, nan));
  OnDevice<float> lse_there(std::vector<float>(static_cast<size_t>(N) * H * S, NAN)), w_q_there(w_q), w_k_there(w_k);
  OnDevice<float> d_weights_there(std::vector<float>(2 * D, NAN));

  const int64_t row = 3 * H * D;
  const auto packed = [&](Bf16* data, int part) { return stdit_heads{data + part * H * D, S * row, row, D}; };
  const auto plain = [&](Bf16* data) { return stdit_heads{data, int64_t{S} * H * D, H * D, D}; };
  stdit_attention call{};
  call.q = packed(qkv_there.data, 0);
  call.k = packed(qkv_there.data, 1);
  call.v = packed(qkv_there.data, 2);
  call.o = plain(o_there.data);
  call.lse = lse_there.data;
  call.weight_dtype = STDIT_FLOAT32;
  if (shape.normalise) {
    call.q_weight = w_q_there.data;
    call.k_weight = w_k_there.data;
  }
  call.normalise_q = call.normalise_k = shape.normalise;
  call.sequences = N;
  call.queries = call.keys = S;
  call.heads = H;
  call.head_dim = D;
  call.scale = 1.0f / std::sqrt(static_cast<float>(D));
  call.epsilon = kEpsilon;
  stdit::check_attention(call);
  OnDevice<char> forward_scratch(std::vector<char>(stdit::attention_forward_scratch(call), -1));
  stdit::attention_forward(call, forward_scratch.data, nullptr);
  OnDevice<char> scratch(std::vector<char>(stdit::attention_backward_scratch(call), -1));
  stdit_attention_gradients gradients{};
  gradients.d_o = plain(do_there.data);
  gradients.d_q = packed(dqkv_there.data, 0);
  gradients.d_k = packed(dqkv_there.data, 1);
  gradients.d_v = packed(dqkv_there.data, 2);
  gradients.d_weights = shape.normalise ? d_weights_there.data : nullptr;
  gradients.scratch = scratch.data;
  stdit::check_attention(call, gradients);
  stdit::attention_backward(call, gradients, nullptr);
  STDIT_CHECK(cudaDeviceSynchronize());

  const std::vector<Bf16> o = o_there.host(), dqkv = dqkv_there.host();
  const std::vector<float> lse = lse_there.host(), d_weights = d_weights_there.host();
  std::vector<double> d_weights_want(2 * D, 0.0);
  Error errors[6];  // o, lse, d_q, d_k, d_v, d_weights
  for (int n = 0; n < N; ++n) {
    for (int h = 0; h < H; ++h) {
      const auto at = [&](int part, int r, int c) {
        return ((static_cast<size_t>(n) * S + r) * 3 + part) * H * D + h * D + c;
      };
      const auto at_o = [&](int r, int c) { return ((static_cast<size_t>(n) * S + r) * H + h) * D + c; };
      const Reference want(
          S, S, D, shape.normalise, w_q, w_k,
          [&](int part, int r, int c) -> double {
            return __bfloat162float(part < 3 ? qkv[at(part, r, c)] : d_o[at_o(r, c)]);
          },
          d_weights_want);
      for (int r = 0; r < S; ++r) {
        errors[1].add(lse[(static_cast<size_t>(n) * H + h) * S + r], want.lse[r]);
        for (int c = 0; c < D; ++c) {
          errors[0].add(__bfloat162float(o[at_o(r, c)]), want.o[r * D + c]);
          errors[2].add(__bfloat162float(dqkv[at(0, r, c)]), want.d_q[r * D + c]);
          errors[3].add(__bfloat162float(dqkv[at(1, r, c)]), want.d_k[r * D + c]);
          errors[4].add(__bfloat162float(dqkv[at(2, r, c)]), want.d_v[r * D + c]);
        }
      }
    }
  }
  if (shape.normalise) {
    for (int i = 0; i < 2 * D; ++i) errors[5].add(d_weights[i], d_weights_want[i]);
  }
  std::printf("%d x %d x %d of %d%s:", N, S, H, D, shape.normalise ? "" : ", no norm");
  return judge(errors, S == 1);
}

// Packed keys: `lengths` of them for each sequence.
struct PackedShape {
  std::vector<int> lengths;
  int queries, heads;
  int head_dim = 72;
};

bool check_packed(const PackedShape& shape, unsigned seed) {
  const int B = static_cast<int>(shape.lengths.size()), N = shape.queries, H = shape.heads, D = shape.head_dim;
  std::vector<int> starts{0};
  for (const int length : shape.lengths) starts.push_back(starts.back() + length);
  const int M = starts.back();
  const size_t size = static_cast<size_t>(B) * N * H * D;
  const std::vector<Bf16> q = random_values(size, seed), d_o = random_values(size, seed + 1);
  const std::vector<Bf16> kv = random_values(static_cast<size_t>(M) * 2 * H * D, seed + 2);
  const Bf16 nan = __float2bfloat16(NAN);
  OnDevice<Bf16> q_there(q), do_there(d_o), kv_there(kv), o_there(std::vector<Bf16>(size, nan));
  OnDevice<Bf16> dq_there(std::vector<Bf16>(size, nan)), dkv_there(std::vector<Bf16>(kv.size(), nan));
  OnDevice<float> lse_there(std::vector<float>(static_cast<size_t>(B) * H * N, NAN));
  OnDevice<int> starts_there(starts);

  const auto plain = [&](Bf16* data) { return stdit_heads{data, int64_t{N} * H * D, H * D, D}; };
  const auto text = [&](Bf16* data, int part) { return stdit_heads{data + part * H * D, 8, 2 * H * D, D}; };
  stdit_attention call{};
  call.q = plain(q_there.data);
  call.k = text(kv_there.data, 0);
  call.v = text(kv_there.data, 1);
  call.o = plain(o_there.data);
  call.lse = lse_there.data;
  call.weight_dtype = STDIT_FLOAT32;
  call.sequences = B;
  call.queries = N;
  call.keys = *std::max_element(shape.lengths.begin(), shape.lengths.end());
  call.key_starts = starts_there.data;
  call.packed_keys = M;
  call.heads = H;
  call.head_dim = D;
  call.scale = 1.0f / std::sqrt(static_cast<float>(D));
  stdit::check_attention(call);
  OnDevice<char> forward_scratch(std::vector<char>(stdit::attention_forward_scratch(call), -1));
  stdit::attention_forward(call, forward_scratch.data, nullptr);
  OnDevice<char> scratch(std::vector<char>(stdit::attention_backward_scratch(call), -1));
  stdit_attention_gradients gradients{};
  gradients.d_o = plain(do_there.data);
  gradients.d_q = plain(dq_there.data);
  gradients.d_k = text(dkv_there.data, 0);
  gradients.d_v = text(dkv_there.data, 1);
  gradients.scratch = scratch.data;
  stdit::check_attention(call, gradients);
  stdit::attention_backward(call, gradients, nullptr);
  STDIT_CHECK(cudaDeviceSynchronize());

  const std::vector<Bf16> o = o_there.host(), dq = dq_there.host(), dkv = dkv_there.host();
  const std::vector<float> lse = lse_there.host();
  std::vector<double> unused(2 * D, 0.0);
  Error errors[6];
  for (int n = 0; n < B; ++n) {
    for (int h = 0; h < H; ++h) {
      const auto at = [&](int r, int c) { return ((static_cast<size_t>(n) * N + r) * H + h) * D + c; };
      const auto at_kv = [&](int part, int r, int c) {
        return ((static_cast<size_t>(starts[n] + r)) * 2 + part) * H * D + h * D + c;
      };
      const std::vector<float> none;
      const Reference want(
          N, shape.lengths[n], D, false, none, none,
          [&](int part, int r, int c) -> double {
            if (part == 0 || part == 3) return __bfloat162float(part == 0 ? q[at(r, c)] : d_o[at(r, c)]);
            return __bfloat162float(kv[at_kv(part - 1, r, c)]);
          },
          unused);
      for (int r = 0; r < N; ++r) {
        errors[1].add(lse[(static_cast<size_t>(n) * H + h) * N + r], want.lse[r]);
        for (int c = 0; c < D; ++c) {
          errors[0].add(__bfloat162float(o[at(r, c)]), want.o[r * D + c]);
          errors[2].add(__bfloat162float(dq[at(r, c)]), want.d_q[r * D + c]);
        }
      }
      for (int r = 0; r < shape.lengths[n]; ++r) {
        for (int c = 0; c < D; ++c) {
          errors[3].add(__bfloat162float(dkv[at_kv(0, r, c)]), want.d_k[r * D + c]);
          errors[4].add(__bfloat162float(dkv[at_kv(1, r, c)]), want.d_v[r * D + c]);
        }
      }
    }
  }
  std::printf("packed, %d to", N);
  for (const int length : shape.lengths) std::printf(" %d", length);
  std::printf(" x %d of %d:", H, D);
  return judge(errors, call.keys == 1);
}

}  // namespace

int main(int count, char** arguments) {
  const Shape shapes[] = {{1, 1, 1, true},   {2, 7, 3, true},   {3, 64, 1, true},   {1, 65, 2, true},
                          {2, 129, 1, true}, {1, 144, 3, true}, {1, 144, 2, false}, {1, 161, 1, true},
                          {1, 192, 1, true}, {1, 193, 2, true}, {5, 300, 30, true}, {1, 321, 2, true},
                          {1, 385, 1, true}, {5, 390, 30, true}, {1, 700, 1, true}, {1, 300, 1, false},
                          {1, 449, 1, false}, {3, 65, 130, true}, {2, 200, 70, true}, {1, 257, 2, true},
                          {1, 256, 1, false}, {1, 1110, 1, true}, {230, 3, 16, true}, {66, 81, 20, true}};
  std::vector<int> wanted;
  for (int i = 1; i < count; ++i) wanted.push_back(std::atoi(arguments[i]));
  bool good = true;
  unsigned seed = 1;
  const auto is_wanted = [&](int head_dim) {
    return wanted.empty() || std::find(wanted.begin(), wanted.end(), head_dim) != wanted.end();
  };
  const auto run = [&](const Shape& shape) {
    if (is_wanted(shape.head_dim)) good = check(shape, seed) && good;
    ++seed;
  };
  const auto run_packed = [&](const PackedShape& shape) {
    if (is_wanted(shape.head_dim)) good = check_packed(shape, seed) && good;
    ++seed;
  };
  for (const Shape& shape : shapes) run(shape);
  for (const int head_dim : {64, 80, 96}) {
    for (const int rows : {7, 144, 300, 390}) run({1, rows, 2, true, head_dim});
    for (const int rows : {161, 449}) run({1, rows, 1, false, head_dim});
  }
  const PackedShape packed[] = {{{1}, 1, 1},
                                {{5, 1}, 7, 2},
                                {{80, 64, 65}, 65, 2},
                                {{129, 3, 200}, 130, 3},
                                {{320, 1, 128}, 300, 2},
                                {{13, 77, 160, 161, 20}, 640, 4},
                                {std::vector<int>(40, 33), 20, 2}};
  for (const PackedShape& shape : packed) run_packed(shape);
  for (const int head_dim : {64, 80, 96}) {
    run_packed({{80, 3, 200}, 130, 2, head_dim});
    run_packed({{13, 77, 320, 161}, 400, 2, head_dim});
  }
  std::printf(good ? "all right\n" : "FAILED\n");
  return good ? 0 : 1;
}
