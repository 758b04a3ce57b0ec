// Memory, barriers and launches: see faults.h. Run with a name, prints what comes of the kernel as it should be, and of
// the kernel with that fault; run without, prints the names.
#include "faults.h"

#include <cstdio>

namespace {

using cuda_on_host::allow_shared;
using cuda_on_host::launch;

// y[i] = i, by `threads` threads of each of `blocks` blocks that call kernel(y, shared memory).
template <class Kernel>
std::string counts(int blocks, int threads, size_t shared, Kernel kernel) {
  const int count = blocks * threads;
  std::vector<float> y(count, -1.0f), expected(count);
  for (int i = 0; i < count; ++i) expected[i] = static_cast<float>(i);
  void (*run)(const Kernel*, float*) = [](const Kernel* kernel, float* y) {
    REVIT_DYNAMIC_SHARED(bytes);
    (*kernel)(y, reinterpret_cast<float*>(bytes));
  };
  launch(run, dim3(blocks), threads, shared, &kernel, y.data());
  return judged(y.data(), expected.data(), count);
}

int thread() { return static_cast<int>(threadIdx.x); }
int place() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

template <class T>
T& at(void* base, int64_t bytes) {
  return *reinterpret_cast<T*>(static_cast<char*>(base) + bytes);
}

const bool known = [] {
  auto& f = faults();

  // Barriers
  f["no __syncthreads"] = [](bool fault) {
    return counts(1, 64, 256, [=](float* y, float* shared) {
      shared[thread()] = 0;
      __syncthreads();
      shared[thread() ^ 32] = static_cast<float>(thread() ^ 32);
      if (!fault) __syncthreads();
      y[thread()] = shared[thread()];
    });
  };
  f["no __syncthreads before shared memory is used again"] = [](bool fault) {
    return counts(1, 64, 256, [=](float* y, float* shared) {
      shared[thread()] = static_cast<float>(thread() ^ 32);
      __syncthreads();
      const float mine = shared[thread() ^ 32];
      if (!fault) __syncthreads();
      shared[thread()] = 0;
      y[thread()] = mine;
    });
  };
  f["no __syncthreads between writes"] = [](bool fault) {
    return counts(1, 64, 256, [=](float* y, float* shared) {
      if (thread() == 40) shared[0] = 0;
      if (!fault) __syncthreads();
      if (thread() == 3) shared[0] = 1;
      __syncthreads();
      y[thread()] = shared[0] == 1 ? static_cast<float>(thread()) : -1;
    });
  };
  f["no __syncwarp"] = [](bool fault) {
    return counts(1, 32, 128, [=](float* y, float* shared) {
      shared[thread()] = 0;
      __syncthreads();
      shared[thread() ^ 1] = static_cast<float>(thread() ^ 1);
      if (!fault) __syncwarp();
      y[thread()] = shared[thread()];
    });
  };
  f["a shuffle as a barrier"] = [](bool fault) {
    return counts(1, 32, 128, [=](float* y, float* shared) {
      shared[thread()] = 0;
      __syncthreads();
      shared[thread() ^ 1] = static_cast<float>(thread() ^ 1);
      if (fault)
        __shfl_sync(~0u, 0, 0);
      else
        __syncwarp();
      y[thread()] = shared[thread()];
    });
  };
  f["__syncwarp across warps"] = [](bool fault) {
    return counts(1, 64, 256, [=](float* y, float* shared) {
      shared[thread()] = 0;
      __syncthreads();
      shared[thread() ^ 32] = static_cast<float>(thread() ^ 32);
      if (fault)
        __syncwarp();
      else
        __syncthreads();
      y[thread()] = shared[thread()];
    });
  };
  f["static shared memory without a barrier"] = [](bool fault) {
    return counts(1, 64, 0, [=](float* y, float*) {
      __shared__ float first;
      if (thread() == 0) first = 1;
      __syncthreads();
      if (thread() == 0) first = 0;
      if (!fault) __syncthreads();
      y[thread()] = first + static_cast<float>(thread());
    });
  };
  f["global memory without a barrier"] = [](bool fault) {
    return counts(1, 64, 0, [=](float* y, float*) {
      y[thread() ^ 32] = static_cast<float>(thread());
      if (!fault) __syncthreads();
      y[thread()] = static_cast<float>(static_cast<int>(y[thread()]) ^ 32);
    });
  };
  f["a barrier in divergent code"] = [](bool fault) {
    return counts(1, 64, 0, [=](float* y, float*) {
      if (!fault || thread() < 32) __syncthreads();
      __syncthreads();
      y[thread()] = static_cast<float>(thread());
    });
  };
  f["a barrier that some leave before"] = [](bool fault) {
    return counts(1, 64, 0, [=](float* y, float*) {
      y[thread()] = static_cast<float>(thread());
      if (fault && thread() >= 32) return;
      __syncthreads();
    });
  };
  f["a barrier in a loop of different lengths"] = [](bool fault) {
    return counts(1, 64, 0, [=](float* y, float*) {
      y[thread()] = static_cast<float>(thread());
      for (int i = 0; i < 2 + (fault && thread() < 32); ++i) __syncthreads();
    });
  };
  f["a shuffle that some lanes leave before"] = [](bool fault) {
    return counts(1, 32, 0, [=](float* y, float*) {
      y[thread()] = static_cast<float>(thread());
      if (fault && thread() >= 16) return;
      y[thread()] = __shfl_sync(~0u, y[thread()], thread());
    });
  };
  f["a ballot that some lanes do not come to"] = [](bool fault) {
    return counts(1, 32, 0, [=](float* y, float*) {
      unsigned votes = ~0u;
      if (!fault || thread() < 16)
        votes = __ballot_sync(~0u, 1);
      else
        __syncwarp();
      y[thread()] = votes == ~0u ? static_cast<float>(thread()) : -1;
    });
  };
  f["a mask of half a warp"] = [](bool fault) {
    return counts(1, 32, 0, [=](float* y, float*) {
      y[thread()] = __shfl_sync(fault ? 0xffffu : ~0u, static_cast<float>(thread()), thread());
    });
  };

  // Bounds
  f["a read past a tensor's end"] = [](bool fault) {
    std::vector<float> x(64);
    for (int i = 0; i < 64; ++i) x[i] = static_cast<float>(i);
    return counts(1, 64, 0, [=, &x](float* y, float*) { y[thread()] = x.data()[thread() + fault]; });
  };
  f["a read of a negative index"] = [](bool fault) {
    std::vector<float> x(64);
    for (int i = 0; i < 64; ++i) x[i] = static_cast<float>(i);
    return counts(1, 64, 0, [=, &x](float* y, float*) { y[thread()] = x.data()[thread() - fault]; });
  };
  f["a write past a tensor's end"] = [](bool fault) {
    return counts(1, 96, 0, [=](float* y, float*) {
      if (thread() == 95 && fault) y[96] = 0;
      y[thread()] = static_cast<float>(thread());
    });
  };
  f["a vector across a tensor's end"] = [](bool fault) {
    std::vector<float> x(6);
    return counts(1, 32, 0, [=, &x](float* y, float*) {
      const float last = thread() < 1 + fault ? at<float4>(x.data(), 16 * thread()).w : 0;
      y[thread()] = last + static_cast<float>(thread());
    });
  };
  f["cp.async past a tensor's end"] = [](bool fault) {
    std::vector<float> x(64);
    return counts(1, 32, 512, [=, &x](float* y, float* shared) {
      const bool there = thread() < 16 || fault;
      revit::copy_async(revit::shared_address(shared + 4 * thread()), x.data() + 4 * thread(), there);
      revit::commit_copies();
      revit::wait_for_copies<0>();
      y[thread()] = shared[4 * thread()] + static_cast<float>(thread());
    });
  };
  f["a write past the dynamic shared memory"] = [](bool fault) {
    return counts(1, 64, 252 + 4 * !fault, [=](float* y, float* shared) {
      shared[thread()] = static_cast<float>(thread());
      y[thread()] = shared[thread()];
    });
  };
  f["an index past a static shared array"] = [](bool fault) {
    return counts(1, 32, 0, [=](float* y, float*) {
      __shared__ float numbers[32];
      numbers[thread() + fault] = static_cast<float>(thread());
      y[thread()] = numbers[thread() + fault];
    });
  };

  // Addresses
  f["a vector off 16 bytes"] = [](bool fault) {
    std::vector<float> x(132);
    return counts(1, 32, 0, [=, &x](float* y, float*) {
      y[thread()] = at<float4>(x.data(), 16 * thread() + 4 * fault).w + static_cast<float>(thread());
    });
  };
  f["a vector off 8 bytes"] = [](bool fault) {
    std::vector<float> x(65);
    return counts(1, 32, 0, [=, &x](float* y, float*) {
      at<uint2>(x.data(), 8 * thread() + 4 * fault) = make_uint2(0, 0);
      y[thread()] = static_cast<float>(thread());
    });
  };
  f["cp.async from off 16 bytes"] = [](bool fault) {
    std::vector<float> x(132);
    return counts(1, 32, 512, [=, &x](float* y, float* shared) {
      revit::copy_async(revit::shared_address(shared + 4 * thread()), x.data() + 4 * thread() + 2 * fault, true);
      revit::commit_copies();
      revit::wait_for_copies<0>();
      y[thread()] = shared[4 * thread()] + static_cast<float>(thread());
    });
  };
  f["cp.async to off 16 bytes"] = [](bool fault) {
    std::vector<float> x(128);
    return counts(1, 32, 528, [=, &x](float* y, float* shared) {
      float* to = shared + 4 * thread() + 2 * fault;
      revit::copy_async(revit::shared_address(to), x.data() + 4 * thread(), true);
      revit::commit_copies();
      revit::wait_for_copies<0>();
      y[thread()] = *to + static_cast<float>(thread());
    });
  };
  f["ldmatrix from off 16 bytes"] = [](bool fault) {
    return counts(1, 32, 1024, [=](float* y, float* shared) {
      for (int i = 0; i < 8; ++i) shared[8 * thread() + i] = 0;
      __syncwarp();
      uint32_t matrices[4];
      revit::load_matrices(matrices, revit::shared_address(shared + 4 * thread() + 2 * fault));
      y[thread()] = static_cast<float>(matrices[0]) + static_cast<float>(thread());
    });
  };

  // Copies
  f["cp.async that is not waited for"] = [](bool fault) {
    std::vector<float> x(128);
    return counts(1, 32, 512, [=, &x](float* y, float* shared) {
      revit::copy_async(revit::shared_address(shared + 4 * thread()), x.data() + 4 * thread(), true);
      revit::commit_copies();
      if (!fault) revit::wait_for_copies<0>();
      y[thread()] = shared[4 * thread()] + static_cast<float>(thread());
      if (fault) revit::wait_for_copies<0>();
    });
  };
  f["cp.async waited for by another thread"] = [](bool fault) {
    std::vector<float> x(128);
    return counts(1, 32, 512, [=, &x](float* y, float* shared) {
      shared[4 * thread()] = 0;
      __syncthreads();
      revit::copy_async(revit::shared_address(shared + 4 * thread()), x.data() + 4 * thread(), true);
      revit::commit_copies();
      revit::wait_for_copies<0>();
      if (!fault) __syncthreads();
      y[thread()] = shared[4 * (thread() ^ 1)] + static_cast<float>(thread());
    });
  };
  f["cp.async over what is still read"] = [](bool fault) {
    std::vector<float> x(128);
    return counts(1, 32, 512, [=, &x](float* y, float* shared) {
      shared[thread()] = 0;
      __syncthreads();
      y[thread()] = shared[thread() ^ 16] + static_cast<float>(thread());
      if (!fault) __syncthreads();
      revit::copy_async(revit::shared_address(shared + 4 * thread()), x.data() + 4 * thread(), true);
      revit::commit_copies();
      revit::wait_for_copies<0>();
    });
  };
  f["cp.async that outlives its thread"] = [](bool fault) {
    std::vector<float> x(128);
    return counts(1, 32, 512, [=, &x](float* y, float* shared) {
      revit::copy_async(revit::shared_address(shared + 4 * thread()), x.data() + 4 * thread(), true);
      revit::commit_copies();
      if (!fault) revit::wait_for_copies<0>();
      y[thread()] = static_cast<float>(thread());
    });
  };
  f["shared memory that nobody has written"] = [](bool fault) {
    return counts(1, 32, 128, [=](float* y, float* shared) {
      if (!fault) shared[thread()] = 0;
      const bool never = shared[thread()] == 7;
      y[thread()] = never ? -1 : static_cast<float>(thread());
    });
  };
  f["shared memory that another block has written"] = [](bool fault) {
    return counts(2, 32, 0, [=](float* y, float*) {
      __shared__ float numbers[32];
      if (blockIdx.x == 0 || !fault) numbers[thread()] = 0;
      y[place()] = numbers[thread()] + static_cast<float>(place());
    });
  };

  // Blocks
  f["two blocks that write one address"] = [](bool fault) {
    return counts(2, 32, 0, [=](float* y, float*) {
      y[place()] = static_cast<float>(place());
      if (thread() == 0 && (blockIdx.x == 0 || fault)) y[0] = 0;
    });
  };
  f["a block that reads what another writes"] = [](bool fault) {
    return counts(2, 32, 0, [=](float* y, float*) {
      y[place()] = static_cast<float>(place());
      const float before = fault && blockIdx.x ? y[thread()] : static_cast<float>(thread());
      if (blockIdx.x) y[place()] = before + 32;
    });
  };

  // Launches
  auto nothing = [](float* y, float*) { y[thread()] = static_cast<float>(thread()); };
  f["more than 1024 threads"] = [=](bool fault) { return counts(1, fault ? 1056 : 1024, 0, nothing); };
  f["more than 48 KiB without the attribute"] = [=](bool fault) { return counts(1, 32, 48 * 1024 + fault, nothing); };
  auto sized = [](int most) {
    void (*run)() = [] {};
    allow_shared(reinterpret_cast<const void*>(run), most);
    launch(run, dim3(1), 32, most);
    return "right";
  };
  f["more shared memory than sm_80 has"] = [=](bool fault) { return sized(163 * 1024 + fault); };
  f["more shared memory than sm_86 has"] = [=](bool fault) {
    setenv("REVIT_CUDA_ON_HOST_SHARED", "99", 1);
    return sized(99 * 1024 + fault);
  };
  f["more shared memory than sm_90 has"] = [=](bool fault) {
    setenv("REVIT_CUDA_ON_HOST_HOPPER", "1", 1);
    return sized(227 * 1024 + fault);
  };
  f["a grid too large in y"] = [](bool fault) {
    void (*run)() = [] {};
    launch(run, dim3(0, fault ? 65536 : 65535), 32, 0);
    return "right";
  };
  return true;
}();

}  // namespace

int main(int count, char** names) {
  for (const auto& each : faults()) {
    if (count < 2) std::printf("%s\n", each.first.c_str());
    if (count < 2 || each.first != names[1]) continue;
    for (const bool fault : {false, true}) try {
        std::printf("%s\n", each.second(fault).c_str());
      } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
      }
  }
}
