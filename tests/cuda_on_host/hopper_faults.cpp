// A small kernel for Hopper with one fault at a time, and maps of tensors that the driver refuses: see faults.h.
#include "cuda/hopper.h"
#include "faults.h"

namespace {

constexpr int kRows = 64, kDim = 64, kBytes = kRows * kDim * 2, kThreads = 128;
constexpr size_t kShared = 1024 + 2 * kBytes;

// Which fault, by its name: the kernel asks for it where it would go wrong.
struct Asked {
  const char* name;
  bool operator()(const char* fault) const { return name && std::string(name) == fault; }
};

const char* const kFaults[] = {
    "a barrier that nobody initialised",
    "a barrier not fenced as it begins",
    "a barrier used at once",
    "a phase that never completes",
    "a phase that is complete too early",
    "no arrival at a barrier",
    "more bytes expected than come",
    "fewer bytes expected than come",
    "no wait for a copy",
    "a copy that outlives its block",
    "a box off 128 bytes",
    "a box off its swizzled rows",
    "a box outside of shared memory",
    "a box from outside of the tensor",
    "a box over what is still read",
    "no proxy fence after zeros",
    "no proxy fence after a plain store",
    "no warpgroup barrier after zeros",
    "no warpgroup barrier in one warp",
    "no wgmma.fence",
    "registers written after wgmma.fence",
    "an operand's registers written while it runs",
    "sums read before the wait",
    "sums of a group that was not committed",
    "an operand overwritten while it runs",
    "a product that outlives its thread",
    "a product of three warps",
    "a descriptor of each warp's own",
    "a descriptor off its swizzled rows",
    "a descriptor of another swizzle",
    "a descriptor past the end of shared memory",
};

// scores (64 x 64) = q k^T, each of 64 rows of 64 numbers in shared memory; the last 16 rows of k are made zeros there.
void kernel(Asked fault, const revit::TensorMap* q, const revit::TensorMap* k, float* scores) {
  REVIT_DYNAMIC_SHARED(shared);
  __shared__ revit::Barrier full, again;
  const auto rows = (revit::shared_address(shared) + 1023) & ~revit::SharedAddress{1023}, keys = rows + kBytes;
  if (threadIdx.x == 0) {
    if (!fault("a barrier that nobody initialised")) revit::init_barrier(&full, 1);
    revit::init_barrier(&again, 1);
    if (!fault("a barrier not fenced as it begins")) revit::fence_async();
  }
  if (!fault("a barrier used at once")) __syncthreads();
  if (threadIdx.x == 0) {
    const int wrong = fault("more bytes expected than come") ? 128 : fault("fewer bytes expected than come") ? -128 : 0;
    if (!fault("no arrival at a barrier")) revit::arrive_expecting(&full, 2 * kBytes + wrong);
    const int off = fault("a box off 128 bytes")              ? 64
                    : fault("a box off its swizzled rows")    ? 128
                    : fault("a box outside of shared memory") ? kBytes
                                                              : 0;
    for (int i = 0; i < 4; ++i) {
      revit::copy_box(rows + i * 2048, q, 0, 0, 16 * i, &full);
      revit::copy_box(keys + i * 2048 + off, k, 0, 0, 16 * i, &full);
    }
  }
  const bool waits = !fault("no wait for a copy") && !fault("a copy that outlives its block");
  if (waits) revit::wait(&full, fault("a phase that is complete too early"));
  if (fault("a phase that never completes")) revit::wait(&full, 1);
  if (fault("a copy that outlives its block")) return;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp * 16 + lane % 16;
  uint32_t left[4][4];
  for (int step = 0; step < 4; ++step)
    revit::load_matrices(left[step], rows + row * 128 + ((step * 2 + lane / 16) ^ row % 8) * 16);
  if (fault("a box over what is still read") && threadIdx.x == 0) {
    revit::arrive_expecting(&again, 2048);
    revit::copy_box(rows + 2048, q, 0, 0, 16, &again);
    revit::wait(&again, 0);
  }

  revit::store_zeros(keys + 48 * 128 + threadIdx.x * 16);
  if (!fault("no proxy fence after zeros")) revit::fence_async();
  if (fault("no proxy fence after a plain store")) *reinterpret_cast<float*>(keys + 48 * 128 + threadIdx.x * 16) = 0;
  if (!fault("no warpgroup barrier after zeros") && !(fault("no warpgroup barrier in one warp") && warp == 3))
    revit::sync_warpgroup(0);

  float sums[8][4] = {};
  if (!fault("no wgmma.fence")) revit::fence_products();
  if (fault("registers written after wgmma.fence"))
    for (auto& tile : sums)
      for (float& sum : tile) sum *= 2;
  const bool takes_part = !fault("a product of three warps") || warp < 3;
  for (int step = 0; takes_part && step < 4; ++step) {
    const int off = fault("a descriptor of each warp's own")              ? warp / 2 * 16
                    : fault("a descriptor off its swizzled rows")         ? 128
                    : fault("a descriptor past the end of shared memory") ? 2 * kBytes
                                                                          : 0;
    uint64_t b = revit::operand<128>(keys + off + step * 32, 16);
    if (fault("a descriptor of another swizzle")) b ^= uint64_t{3} << 62;  // of 64 bytes
    revit::multiply_async<false>(sums, left[step], b, step > 0, revit::bfloat16());
  }
  if (!fault("sums of a group that was not committed")) revit::commit_products();
  if (fault("an operand overwritten while it runs") && threadIdx.x == 0) revit::store_zeros(keys);
  if (fault("an operand's registers written while it runs")) left[0][threadIdx.x % 4] = 0;
  if (fault("a product that outlives its thread")) return;
  if (!fault("sums read before the wait")) revit::wait_for_products<0>();
  for (int tile = 0; tile < 8; ++tile)
    for (int i = 0; i < 4; ++i) {
      const int y = warp * 16 + lane / 4 + i / 2 * 8, x = tile * 8 + lane % 4 * 2 + i % 2;
      scores[y * 64 + x] = sums[tile][i];
    }
  if (fault("sums read before the wait")) revit::wait_for_products<0>();
}

std::string scores(const char* fault) {
  std::vector<uint16_t> q(kRows * kDim), k(kRows * kDim);
  std::vector<float> found(kRows * kRows), expected(kRows * kRows);
  for (int i = 0; i < kRows * kDim; ++i) {
    q[i] = revit::to_bits(static_cast<float>(i * 7 % 11 - 5), revit::bfloat16());
    k[i] = revit::to_bits(static_cast<float>(i * 5 % 13 - 6), revit::bfloat16());
  }
  for (int y = 0; y < kRows; ++y)
    for (int x = 0; x < 48; ++x)
      for (int i = 0; i < kDim; ++i)
        expected[y * 64 + x] +=
            revit::to_float(q[y * 64 + i], revit::bfloat16()) * revit::to_float(k[x * 64 + i], revit::bfloat16());
  revit::TensorMap of_q, of_k;
  const bool outside = fault && std::string(fault) == "a box from outside of the tensor";
  revit::encode(of_q, q.data() + 8 * 64 * outside, kRows, 1, kDim, kDim, kDim, 16, 64);
  revit::encode(of_k, k.data(), kRows, 1, kDim, kDim, kDim, 16, 64);
  setenv("REVIT_CUDA_ON_HOST_HOPPER", "1", 1);
  cuda_on_host::launch(kernel, dim3(1), kThreads, kShared, Asked{fault}, &of_q, &of_k, found.data());
  return judged(found.data(), expected.data(), kRows * kRows);
}

// A map of boxes of `rows` tokens and `columns` numbers from the byte `first` of a tensor on.
std::string mapped(int first, int stride, int rows, int columns) {
  alignas(16) static char data[1 << 16];
  revit::TensorMap map;
  return revit::encode(map, data + first, 64, 2, 256, stride, 256, rows, columns) ? "right" : revit::refused;
}

const bool known = [] {
  for (const char* name : kFaults) faults()[name] = [=](bool fault) { return scores(fault ? name : nullptr); };
  auto& f = faults();
  f["a map from off 16 bytes"] = [](bool fault) { return mapped(fault ? 8 : 16, 512, 16, 64); };
  f["a map with a stride off 16 bytes"] = [](bool fault) { return mapped(0, fault ? 516 : 520, 16, 64); };
  f["a map with rows longer than their swizzle"] = [](bool fault) { return mapped(0, 512, 16, fault ? 72 : 64); };
  f["a map with 128 columns"] = [](bool fault) { return mapped(0, 512, 16, fault ? 128 : 64); };
  f["a map with 257 rows"] = [](bool fault) { return mapped(0, 512, fault ? 257 : 256, 64); };
  f["a map with rows off 16 bytes"] = [](bool fault) { return mapped(0, 512, 16, fault ? 12 : 16); };
  return true;
}();

}  // namespace
