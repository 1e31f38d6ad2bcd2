// Temporal attention's backward kernels on small odd shapes, against double precision on the CPU; without torch, for
// compute-sanitizer: as attention_check.cu.
//
// Prints a line for each shape; ends with status 1 if an error is larger than bfloat16's, a value was not written, or a
// second call gives other bits.

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "stdit/launch_check.h"
#include "stdit/temporal.h"

namespace {

constexpr int D = 72;
constexpr double kEpsilon = 1e-6;
constexpr double kTolerance = 2e-2;  // of the root mean square: some roundings to bfloat16
using Bf16 = __nv_bfloat16;

struct Shape {
  int batch, frames, positions, heads;
  bool rotate_first;
};

template <typename T>
T* on_device(const std::vector<T>& host) {
  T* data = nullptr;
  STDIT_CHECK(cudaMalloc(&data, host.size() * sizeof(T)));
  STDIT_CHECK(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return data;
}

template <typename T>
std::vector<T> on_host(const T* data, size_t count) {
  std::vector<T> host(count);
  STDIT_CHECK(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}

// Rows [T][D] of q or k as they enter the scores, and the way back.
struct Turned {
  std::vector<double> raw, rstd, out;
  const std::vector<double>& weight;
  const std::vector<float>& rotation;
  bool rotate_first;
  int frames;

  void turn(double* row, int t, double sign) const {
    for (int c = 0; c < D / 2; ++c) {
      const double cosine = rotation[t * D + c], sine = sign * rotation[t * D + D / 2 + c];
      const double even = row[2 * c], odd = row[2 * c + 1];
      row[2 * c] = even * cosine - odd * sine;
      row[2 * c + 1] = odd * cosine + even * sine;
    }
  }
  Turned(std::vector<double> values, const std::vector<double>& w, const std::vector<float>& angles, bool first, int T)
      : raw(std::move(values)), rstd(T), out(raw), weight(w), rotation(angles), rotate_first(first), frames(T) {
    for (int t = 0; t < T; ++t) {
      double square = 0, *row = &out[t * D];
      for (int c = 0; c < D; ++c) square += row[c] * row[c];
      rstd[t] = 1 / std::sqrt(square / D + kEpsilon);
      if (rotate_first) turn(row, t, 1);
      for (int c = 0; c < D; ++c) row[c] *= rstd[t] * weight[c];
      if (!rotate_first) turn(row, t, 1);
    }
  }
  // From the gradient of `out` to that of the rows, in place; adds the weight's.
  void back(std::vector<double>& g, double* d_weight) const {
    for (int t = 0; t < frames; ++t) {
      double* row = &g[t * D];
      std::vector<double> hat(&raw[t * D], &raw[t * D] + D);
      if (!rotate_first) turn(row, t, -1);
      if (rotate_first) turn(hat.data(), t, 1);
      for (int c = 0; c < D; ++c) {
        d_weight[c] += row[c] * hat[c] * rstd[t];
        row[c] *= weight[c];
      }
      if (rotate_first) turn(row, t, -1);
      double dot = 0;
      for (int c = 0; c < D; ++c) dot += row[c] * raw[t * D + c];
      for (int c = 0; c < D; ++c) row[c] = rstd[t] * (row[c] - raw[t * D + c] * dot * rstd[t] * rstd[t] / D);
    }
  }
};

double error_of(const std::vector<double>& got, const std::vector<double>& want) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  return std::sqrt(difference / size);  // NaN, as of what was not written, passes no comparison
}

bool check(const Shape& shape) {
  const int T = shape.frames, S = shape.positions, H = shape.heads;
  const size_t tokens = static_cast<size_t>(shape.batch) * T * S, row = static_cast<size_t>(H) * D;
  std::mt19937 generator(T * 100 + S);
  std::normal_distribution<float> normal;
  std::vector<Bf16> qkv(tokens * 3 * row), d_o(tokens * row);
  for (Bf16& v : qkv) v = __float2bfloat16(normal(generator));
  for (Bf16& v : d_o) v = __float2bfloat16(normal(generator));
  std::vector<float> weights[2], rotation(T * D);
  for (auto& w : weights) {
    for (int c = 0; c < D; ++c) w.push_back(1 + 0.3f * normal(generator));
  }
  for (int t = 0; t < T; ++t) {
    for (int c = 0; c < D / 2; ++c) {
      const double angle = t * std::pow(100.0, -2.0 * c / D);
      rotation[t * D + c] = static_cast<float>(std::cos(angle));
      rotation[t * D + D / 2 + c] = static_cast<float>(std::sin(angle));
    }
  }

  stdit_temporal call{};
  const auto d_qkv_size = qkv.size();
  call.qkv = on_device(qkv);
  call.d_o = on_device(d_o);
  call.batch_stride = static_cast<int64_t>(T) * S * 3 * row;
  call.frame_stride = static_cast<int64_t>(S) * 3 * row;
  call.position_stride = 3 * row;
  call.q_weight = on_device(weights[0]);
  call.k_weight = on_device(weights[1]);
  call.weight_dtype = STDIT_FLOAT32;
  call.rotation = on_device(rotation);
  call.batch = shape.batch;
  call.positions = S;
  call.frames = T;
  call.heads = H;
  call.head_dim = D;
  call.rotate_first = shape.rotate_first;
  call.epsilon = kEpsilon;
  const int parts = stdit::temporal_parts(call);
  std::vector<float> found_weights, found_sums;
  std::vector<Bf16> found;
  bool repeats = true;
  for (int i = 0; i < 2; ++i) {
    std::vector<Bf16> nan16(d_qkv_size, __float2bfloat16(NAN));
    Bf16* d_qkv = on_device(nan16);
    call.d_qkv = d_qkv;
    call.d_weights = on_device(std::vector<float>(parts * H * 2 * D, NAN));
    call.d_sums = on_device(std::vector<float>(parts * 3 * row, NAN));
    stdit::check_temporal(call);
    stdit::temporal_backward(call, nullptr);
    STDIT_CHECK(cudaDeviceSynchronize());
    auto now = on_host(d_qkv, d_qkv_size);
    auto now_weights = on_host(call.d_weights, static_cast<size_t>(parts) * H * 2 * D);
    auto now_sums = on_host(call.d_sums, parts * 3 * row);
    if (i == 1) {
      repeats = std::memcmp(now.data(), found.data(), now.size() * sizeof(Bf16)) == 0 &&
                std::memcmp(now_weights.data(), found_weights.data(), now_weights.size() * sizeof(float)) == 0 &&
                std::memcmp(now_sums.data(), found_sums.data(), now_sums.size() * sizeof(float)) == 0;
    }
    found.swap(now);
    found_weights.swap(now_weights);
    found_sums.swap(now_sums);
  }

  std::vector<double> want(d_qkv_size), want_weights(2 * D), wide[2];
  for (int i = 0; i < 2; ++i) wide[i].assign(weights[i].begin(), weights[i].end());
  const double scale = 1 / std::sqrt(static_cast<double>(D));
  for (int b = 0; b < shape.batch; ++b) {
    for (int s = 0; s < S; ++s) {
      for (int h = 0; h < H; ++h) {
        const auto at = [&](int t, int part, int parts_of) {
          return ((static_cast<size_t>(b) * T + t) * S + s) * parts_of * row + part * row + static_cast<size_t>(h) * D;
        };
        std::vector<double> in[4];
        for (int i = 0; i < 4; ++i) {
          for (int t = 0; t < T; ++t) {
            const Bf16* from = i < 3 ? &qkv[at(t, i, 3)] : &d_o[at(t, 0, 1)];
            for (int c = 0; c < D; ++c) in[i].push_back(__bfloat162float(from[c]));
          }
        }
        const Turned q(in[0], wide[0], rotation, shape.rotate_first, T);
        const Turned k(in[1], wide[1], rotation, shape.rotate_first, T);
        std::vector<double> d_q(T * D), d_k(T * D), d_v(T * D);
        for (int t = 0; t < T; ++t) {
          std::vector<double> p(T), dp(T);
          double total = 0, delta = 0;
          for (int u = 0; u < T; ++u) {
            double score = 0;
            for (int c = 0; c < D; ++c) {
              score += q.out[t * D + c] * k.out[u * D + c];
              dp[u] += in[3][t * D + c] * in[2][u * D + c];
            }
            total += p[u] = std::exp(score * scale);
          }
          for (int u = 0; u < T; ++u) delta += (p[u] /= total) * dp[u];
          for (int u = 0; u < T; ++u) {
            const double ds = p[u] * (dp[u] - delta) * scale;
            for (int c = 0; c < D; ++c) {
              d_v[u * D + c] += p[u] * in[3][t * D + c];
              d_q[t * D + c] += ds * k.out[u * D + c];
              d_k[u * D + c] += ds * q.out[t * D + c];
            }
          }
        }
        q.back(d_q, &want_weights[0]);
        k.back(d_k, &want_weights[D]);
        const std::vector<double>* outs[3] = {&d_q, &d_k, &d_v};
        for (int i = 0; i < 3; ++i) {
          for (int t = 0; t < T; ++t) std::copy_n(outs[i]->begin() + t * D, D, &want[at(t, i, 3)]);
        }
      }
    }
  }
  std::vector<double> got(d_qkv_size), got_weights(2 * D), got_sums(3 * row), want_sums(3 * row);
  for (size_t i = 0; i < d_qkv_size; ++i) {
    got[i] = __bfloat162float(found[i]);
    want_sums[i % (3 * row)] += want[i];
  }
  for (size_t i = 0; i < found_weights.size(); ++i) got_weights[i % (2 * D)] += found_weights[i];
  for (size_t i = 0; i < found_sums.size(); ++i) got_sums[i % (3 * row)] += found_sums[i];
  const double errors[3] = {error_of(got, want), error_of(got_weights, want_weights), error_of(got_sums, want_sums)};
  const bool good = repeats && errors[0] < kTolerance && errors[1] < kTolerance && errors[2] < kTolerance;
  std::printf("%d x %d frames, %d positions, %d heads%s: dqkv %.1e, weights %.1e, sums %.1e%s%s\n", shape.batch, T, S, H,
              shape.rotate_first ? ", rotated first" : "", errors[0], errors[1], errors[2],
              repeats ? "" : "; ANOTHER RESULT ON REPEAT", good ? "" : "  WRONG");
  for (const void* data : {call.qkv, call.d_o, call.q_weight, call.k_weight}) cudaFree(const_cast<void*>(data));
  return good;
}

}  // namespace

int main() {
  bool good = true;
  // Teams of one to four warps, their last rows full or nearly empty; more positions than teams, and one.
  const Shape shapes[] = {{1, 16, 3, 2, false}, {2, 5, 40, 3, true},   {1, 17, 5, 2, false},  {1, 32, 700, 1, true},
                          {2, 33, 3, 2, true},  {1, 48, 140, 4, false}, {1, 49, 4, 3, false}, {2, 64, 1, 2, true},
                          {1, 64, 130, 4, false}};
  for (const Shape& shape : shapes) good = check(shape) && good;
  std::puts(good ? "all right" : "WRONG");
  return good ? 0 : 1;
}
