// CUDA on the host itself: that right kernels give right results whatever the order, and that wrong ones do not.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda_on_host/formats.h"
#include "tests/cuda_on_host_check.h"
#include "tests/cuda_on_host_sample.h"

namespace cuda_on_host_test {
namespace {

constexpr int kSeeds = 20;

// Whole numbers, so that no order of the sum changes it.
int wrong_row_sums(bool with_barrier) {
  constexpr int kRows = 7, kColumns = 333;
  std::vector<float> x(kRows * kColumns);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 97);
  const Device<float> device(x), sums(kRows);
  int wrong = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    dive_host_cuda_seed(seed);
    check(sample::sum_rows(device.get(), sums.get(), kRows, kColumns, with_barrier, nullptr));
    const std::vector<float> found = sums.values();
    for (int row = 0; row < kRows; ++row) {
      float sum = 0;
      for (int c = 0; c < kColumns; ++c) sum += x[row * kColumns + c];
      wrong += found[row] != sum;
    }
  }
  return wrong;
}

// What a child process says on stderr.
template <class Function>
std::string last_words(Function function) {
  int ends[2];
  expect(pipe(ends) == 0, "a pipe");
  std::fflush(stdout);
  const pid_t child = fork();
  expect(child >= 0, "a child process");
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    function();
    _exit(0);
  }
  close(ends[1]);
  std::string words;
  char part[4096];
  for (ssize_t size; (size = read(ends[0], part, sizeof part)) > 0;) words.append(part, size);
  close(ends[0]);
  waitpid(child, nullptr, 0);
  return words;
}

void expect_words(const std::string& words, const std::string& part) {
  expect(words.find(part) != std::string::npos, "'" + part + "' in: " + words);
}

void sum_over_blocks(bool with_fences) {
  constexpr int kCount = 1000, kBlocks = 5;
  std::vector<int> x(kCount);
  for (int i = 0; i < kCount; ++i) x[i] = i * i;
  const Device<int> device(x), partial(kBlocks), sum(1);
  const Device<unsigned> ticket(std::vector<unsigned>{0});
  for (int seed = 0; seed < kSeeds; ++seed) {
    dive_host_cuda_seed(seed);
    check(sample::sum_all(device.get(), partial.get(), ticket.get(), sum.get(), kCount, kBlocks, nullptr, with_fences));
    expect(sum.values()[0] == 332833500, "the sum of i^2 for i < 1000");
    expect(ticket.values()[0] == 0, "the ticket is taken back");
  }
}

// Twice one kernel behind another that may begin early, which here it does not.
void read_what_the_kernel_before_wrote(bool waits) {
  constexpr int kThreads = 64;
  const Device<int> x(kThreads), out(kThreads);
  const Stream stream;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  check(sample::write_early(x.get(), kThreads, stream));
  check(sample::read_early(x.get(), out.get(), kThreads, waits, stream));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&exec, graph));
  for (int i = 0; i < 2; ++i) check(cudaGraphLaunch(exec, stream));
  check(cudaGraphExecDestroy(exec));
  check(cudaGraphDestroy(graph));
  expect(out.values()[0] == kThreads - 1, "what the kernel before has written");
}

void exchange(bool with_syncwarp) {
  const Device<int> out(32);
  check(sample::exchange(out.get(), with_syncwarp, nullptr));
  const std::vector<int> found = out.values();
  for (int i = 0; i < 32; ++i) expect(found[i] == (i ^ 1), "the neighbour's number");
}

// How often blocks ran in another order than that of their numbers.
int wrong_counts() {
  constexpr int kBlocks = 6;
  std::vector<int> expected(kBlocks);
  std::iota(expected.begin(), expected.end(), 0);
  int wrong = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    dive_host_cuda_seed(seed);
    const Device<int> out(kBlocks);
    check(sample::count_blocks(out.get(), kBlocks, nullptr));
    wrong += out.values() != expected;
  }
  return wrong;
}

// By the thread sanitizer, in processes that begin before this one has fibers: one that is made of a program with
// several threads knows of no order any more.
void races_are_seen() {
  const auto expect_race = [](auto function) { expect_words(last_words(function), "data race"); };
  const auto expect_none = [](auto function) {
    const std::string words = last_words(function);
    expect(words.empty(), words);
  };
  expect_race([] { wrong_row_sums(false); });
  expect_none([] { wrong_row_sums(true); });
  expect_race([] { exchange(false); });
  expect_none([] { exchange(true); });
  expect_race([] { sum_over_blocks(false); });
  expect_none([] { sum_over_blocks(true); });
  expect_race([] { read_what_the_kernel_before_wrote(false); });
  expect_none([] { read_what_the_kernel_before_wrote(true); });
  expect_race([] { wrong_counts(); });
}

void reductions_do_not_depend_on_the_order() {
  expect(wrong_row_sums(true) == 0, "row sums");
  sum_over_blocks(true);
  read_what_the_kernel_before_wrote(true);
  exchange(true);
}

void a_missing_barrier_is_seen() {
  const int wrong = wrong_row_sums(false);
  expect(wrong > kSeeds, "a missing barrier gives wrong sums, and not " + std::to_string(wrong));
}

void a_dependence_on_the_order_of_blocks_is_seen() { expect(wrong_counts() > kSeeds / 2, "blocks in any order"); }

void blocks_of_a_cluster_read_from_each_other() {
  constexpr int kBlocks = 6, kCluster = 3, kClusterThreads = 40;
  const Device<float> out(kBlocks * kClusterThreads);
  for (int seed = 0; seed < kSeeds; ++seed) {
    dive_host_cuda_seed(seed);
    check(sample::sum_of_cluster(out.get(), kBlocks, kCluster, kClusterThreads, true, nullptr));
    const std::vector<float> found = out.values();
    for (int i = 0; i < kBlocks * kClusterThreads; ++i) {
      const int block = i / kClusterThreads, first = block / kCluster * kCluster, t = i % kClusterThreads;
      const int sum = 100 * (3 * first + 3) + kCluster * ((t + 1) % kClusterThreads) + 10000 * (block % kCluster);
      expect(found[i] == static_cast<float>(sum), "the sum over a cluster");
    }
  }
  std::string words = kThreadSanitizer ? "the block has ended" : "";
  for (int seed = 0; seed < kSeeds && !kThreadSanitizer; ++seed) {
    words += last_words([&] {
      dive_host_cuda_seed(seed);
      static_cast<void>(sample::sum_of_cluster(out.get(), kBlocks, kCluster, kClusterThreads, false, nullptr));
    });
  }
  expect_words(words, "the block has ended");
  const auto fails = [&](int blocks, int cluster) {
    check(sample::sum_of_cluster(out.get(), blocks, cluster, 8, true, nullptr), cudaErrorInvalidClusterSize);
  };
  fails(6, 4);
  fails(9, 9);
}

void warp_operations_are_those_of_the_device() {
  const Device<int> out(32 * sample::kOperations);
  check(sample::warp_operations(out.get(), nullptr));
  const std::vector<int> found = out.values();
  for (int lane = 0; lane < 32; ++lane) {
    const std::array<int, sample::kOperations> expected = {5,
                                                           lane / 8 * 8 + 3,
                                                           lane ^ 6,
                                                           lane + 3 > 31 ? lane : lane + 3,
                                                           lane % 16 < 3 ? lane : lane - 3,
                                                           0x49249249,
                                                           1,
                                                           0,
                                                           lane ^ 1,
                                                           lane ^ 1,
                                                           496,
                                                           std::max(__builtin_popcount(lane), __builtin_ffs(lane))};
    for (int i = 0; i < sample::kOperations; ++i) {
      const std::string what = "operation " + std::to_string(i) + " of lane " + std::to_string(lane);
      expect(found[32 * i + lane] == expected[i], what);
    }
  }
}

// Against float64; the error of a sum of 17 numbers in float32 is at most 17 u times the sum of their sizes.
void mma_is_a_matrix_product() {
  std::mt19937 random(3);
  for (const bool bf16 : {true, false}) {
    const auto to_float = bf16 ? dive_host_cuda::bf16_to_float : dive_host_cuda::f16_to_float;
    std::vector<std::uint16_t> a(16 * 16), b(16 * 8);
    std::vector<float> d(16 * 8);
    std::normal_distribution<float> normal;
    for (auto* matrix : {&a, &b}) {
      for (auto& x : *matrix) x = (bf16 ? dive_host_cuda::float_to_bf16 : dive_host_cuda::float_to_f16)(normal(random));
    }
    for (float& x : d) x = normal(random);
    const Device<std::uint16_t> a_device(a), b_device(b);
    const Device<float> d_device(d);
    check(sample::product(a_device.get(), b_device.get(), d_device.get(), bf16, nullptr));
    const std::vector<float> found = d_device.values();
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        double sum = d[8 * i + j], size = std::abs(sum);
        for (int k = 0; k < 16; ++k) {
          const double term = double{to_float(a[16 * i + k])} * to_float(b[8 * k + j]);
          sum += term, size += std::abs(term);
        }
        expect(std::abs(found[8 * i + j] - sum) <= 17 * 0x1p-24 * size, "an element of the product");
      }
    }
  }
}

float power(int exponent) { return std::ldexp(1.0f, exponent); }

void numbers_are_rounded_as_on_the_device() {
  const float infinity = std::numeric_limits<float>::infinity();
  struct Case {
    float x;
    std::uint16_t bf16, f16;
  };
  const Case cases[] = {
      {0, 0, 0},
      {-0.0f, 0x8000, 0x8000},
      {1, 0x3f80, 0x3c00},
      {-2.5f, 0xc020, 0xc100},
      {1 + power(-8), 0x3f80, 0x3c04},      // a tie for bf16, to even below
      {1 + 3 * power(-8), 0x3f82, 0x3c0c},  // and above
      {1 + power(-11), 0x3f80, 0x3c00},     // a tie for f16
      {1 + 3 * power(-11), 0x3f80, 0x3c02},
      {65504, 0x4780, 0x7bff},  // the largest f16
      {65519.996f, 0x4780, 0x7bff},
      {65520, 0x4780, 0x7c00},
      {power(-24), 0x3380, 0x0001},  // the smallest f16
      {power(-25), 0x3300, 0x0000},
      {power(-25) * 1.0001f, 0x3300, 0x0001},
      {power(-14) - power(-25), 0x3880, 0x0400},  // rounds up to the smallest normal f16
      {std::numeric_limits<float>::max(), 0x7f80, 0x7c00},
      {infinity, 0x7f80, 0x7c00},
      {-infinity, 0xff80, 0xfc00},
      {std::numeric_limits<float>::quiet_NaN(), 0x7fff, 0x7fff},
      {-std::numeric_limits<float>::quiet_NaN(), 0x7fff, 0x7fff},
  };
  std::vector<float> x;
  for (const Case& c : cases) x.push_back(c.x);
  const Device<float> device(x);
  const Device<std::uint32_t> out(x.size());
  check(sample::convert(device.get(), out.get(), static_cast<int>(x.size()), nullptr));
  const std::vector<std::uint32_t> found = out.values();
  for (std::size_t i = 0; i < x.size(); ++i) {
    expect(found[i] == (cases[i].bf16 | static_cast<std::uint32_t>(cases[i].f16) << 16), "case " + std::to_string(i));
  }
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const float f16 = dive_host_cuda::f16_to_float(bits), bf16 = dive_host_cuda::bf16_to_float(bits);
    expect(std::isnan(f16) || dive_host_cuda::float_to_f16(f16) == bits, "f16 and back");
    expect(std::isnan(bf16) || dive_host_cuda::float_to_bf16(bf16) == bits, "bf16 and back");
  }
}

void threads_that_do_not_meet_are_named() {
  using sample::Mistake;
  const std::pair<Mistake, const char*> cases[] = {
      {Mistake::kEarlyReturn, "barrier of the block"}, {Mistake::kBarrierInBranch, "another barrier"},
      {Mistake::kWarpInBranch, "every thread waits"},  {Mistake::kOtherBarrier, "another barrier"},
      {Mistake::kHalfMask, "only whole warps"},        {Mistake::kReturnBeforeShuffle, "lanes of "},
  };
  for (const auto& [mistake, part] : cases) {
    for (int seed = 0; seed < 3; ++seed) {
      const std::string words = last_words([=, mistake = mistake] {
        dive_host_cuda_seed(seed);
        const Device<int> out(64);
        static_cast<void>(sample::diverge(mistake, out.get(), nullptr));
      });
      expect_words(words, part);
      expect_words(words, "block (0, 0, 0), thread (");
      expect_words(words, "cuda_on_host_sample.cu:");
    }
  }
}

void fresh_memory_is_not_a_number() {
  const Device<std::uint32_t> out(8);
  for (const std::uint32_t bits : out.values()) expect(bits == 0xffffffff, "device memory");
  check(sample::read_shared(out.get(), 8, 32, nullptr));
  for (const std::uint32_t bits : out.values()) expect(bits == 0xffffffff, "shared memory");
#if defined(__SANITIZE_ADDRESS__)
  const auto overrun = [&] { static_cast<void>(sample::read_shared(out.get(), 8, 28, nullptr)); };
  expect_words(last_words(overrun), "heap-buffer-overflow");
#endif
}

}  // namespace
}  // namespace cuda_on_host_test

int main() {
  using namespace cuda_on_host_test;
  std::vector<Test> tests = {
      {"reductions do not depend on the order", reductions_do_not_depend_on_the_order},
      {"blocks of a cluster read from each other", blocks_of_a_cluster_read_from_each_other},
      {"warp operations are those of the device", warp_operations_are_those_of_the_device},
      {"mma is a matrix product", mma_is_a_matrix_product},
      {"numbers are rounded as on the device", numbers_are_rounded_as_on_the_device},
      {"fresh memory is not a number", fresh_memory_is_not_a_number},
  };
  if (kThreadSanitizer) {
    tests.insert(tests.begin(), {"races are seen", races_are_seen});
  } else {
    tests.push_back({"a missing barrier is seen", a_missing_barrier_is_seen});
    tests.push_back({"a dependence on the order of blocks is seen", a_dependence_on_the_order_of_blocks_is_seen});
    tests.push_back({"threads that do not meet are named", threads_that_do_not_meet_are_named});
  }
  for (const Test& test : runtime_tests()) tests.push_back(test);
  for (const Test& test : tests) {
    test.run();
    std::printf("ok  %s\n", test.name);
    std::fflush(stdout);
  }
}
