// A small kernel for Hopper with one fault at a time: what a GPU would not forgive has to show on the host.
// Prints the largest difference from the right product, or what was said, for each.
#include <cstdio>

#include "cuda/hopper.h"

namespace {

enum Fault {
  kNone,
  kNoWaitForCopy,
  kNoWaitForProduct,
  kNoFence,
  kNoProxyFence,
  kOverwritten,
  kNoArrival,
  kTooFewBytes,
  kLayout
};

float worst = 0;

// scores (64 x 64) = q k^T, each of 64 rows of 64 numbers in shared memory
void kernel(Fault fault, revit::TensorMap q, revit::TensorMap k, const float* expected) {
  REVIT_DYNAMIC_SHARED(shared);
  __shared__ revit::Barrier full;
  const auto rows = (revit::shared_address(shared) + 1023) & ~revit::SharedAddress{1023};
  if (threadIdx.x == 0) {
    revit::init_barrier(&full, 1);
    revit::fence_async();
  }
  __syncthreads();
  auto copy = [&](bool arrives) {
    if (arrives) revit::arrive_expecting(&full, 2 * 64 * 128 + (fault == kTooFewBytes ? 128 : 0));
    for (int i = 0; i < 4; ++i) {
      revit::copy_box(rows + i * 2048, &q, 0, 0, 16 * i, &full);
      revit::copy_box(rows + 8192 + i * 2048, &k, 0, 0, 16 * i, &full);
    }
  };
  if (threadIdx.x == 0) copy(fault != kNoArrival);
  if (fault != kNoWaitForCopy) revit::wait(&full, 0);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
  uint32_t left[4][4];
  for (int step = 0; step < 4; ++step)
    revit::load_matrices(left[step], rows + row * 128 + ((step * 2 + lane / 16) ^ row % 8) * 16);
  if (fault == kNoProxyFence) revit::store_zeros(rows + 2 * 8192);
  float sums[8][4];
  if (fault != kNoFence) revit::fence_products();
  for (int step = 0; step < 4; ++step) {
    uint64_t b = revit::operand<128>(rows + 8192 + step * 32, 16);
    if (fault == kLayout) b ^= uint64_t{3} << 62;  // a swizzle of 64 bytes
    revit::multiply_async<false>(sums, left[step], b, step > 0, revit::bfloat16());
  }
  revit::commit_products();
  if (fault == kOverwritten && threadIdx.x == 0) revit::store_zeros(rows + 8192);
  if (fault != kNoWaitForProduct) revit::wait_for_products<0>();
  for (int tile = 0; tile < 8; ++tile)
    for (int i = 0; i < 4; ++i) {
      const int y = threadIdx.x / 32 * 16 + lane / 4 + i / 2 * 8, x = tile * 8 + lane % 4 * 2 + i % 2;
      const float error = std::fabs(sums[tile][i] - expected[y * 64 + x]);
      worst = error <= worst ? worst : error;
    }
  if (fault == kNoWaitForProduct) revit::wait_for_products<0>();
  if (fault == kNoWaitForCopy) revit::wait(&full, 0);
}

}  // namespace

int main() {
  std::vector<uint16_t> q(64 * 64), k(64 * 64);
  std::vector<float> expected(64 * 64);
  for (int i = 0; i < 64 * 64; ++i) {
    q[i] = revit::to_bits(static_cast<float>(i * 7 % 11 - 5), revit::bfloat16());
    k[i] = revit::to_bits(static_cast<float>(i * 5 % 13 - 6), revit::bfloat16());
  }
  for (int y = 0; y < 64; ++y)
    for (int x = 0; x < 64; ++x)
      for (int i = 0; i < 64; ++i)
        expected[y * 64 + x] +=
            revit::to_float(q[y * 64 + i], revit::bfloat16()) * revit::to_float(k[x * 64 + i], revit::bfloat16());
  revit::TensorMap of_q, of_k;
  revit::encode(of_q, q.data(), 64, 1, 64, 64, 64, 16, 64);
  revit::encode(of_k, k.data(), 64, 1, 64, 64, 64, 16, 64);
  for (int fault = kNone; fault <= kLayout; ++fault) {
    worst = 0;
    try {
      blockDim = dim3(128);
      const auto run = [&] { kernel(static_cast<Fault>(fault), of_q, of_k, expected.data()); };
      cuda_on_host::run_block(run, dim3(0, 0, 0), 128, 4 * 8192);
      std::printf("%s\n", worst == 0 ? "right" : std::isnan(worst) ? "NaN" : "wrong");
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
    }
  }
}
