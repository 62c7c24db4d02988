// What a draw is made of, to the bit the same on the host and on a device: random numbers and weights.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DIVE_HOST_DEVICE __host__ __device__
#else
#define DIVE_HOST_DEVICE
#endif

namespace dive::engine {

// A number in [0, 1) for a step of a stream: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2,
// 3", 2011), so a row needs no state and does not feel its neighbours.
DIVE_HOST_DEVICE inline double uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t step) {
  std::uint32_t c0 = static_cast<std::uint32_t>(step), c1 = static_cast<std::uint32_t>(step >> 32);
  std::uint32_t c2 = static_cast<std::uint32_t>(stream), c3 = static_cast<std::uint32_t>(stream >> 32);
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * c0, b = std::uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ key0;
    c1 = static_cast<std::uint32_t>(b);
    c2 = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ key1;
    c3 = static_cast<std::uint32_t>(a);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  const std::uint64_t bits = std::uint64_t{c0} << 32 | c1;
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

// e^x for x <= 0, within 2 units in the last place; 0 below -87 and for NaN. Without branches or calls, so that a loop
// over a vocabulary becomes vector instructions; constants and method are those of csrc/cpu/vec.h. Compilers must not
// contract its products and sums where host and device shall agree.
DIVE_HOST_DEVICE inline float exp_of_negative(float x) {
  const float in = x > -87.0f ? x : -87.0f;
  const float shifter = 12582912.0f;
  const float shifted = in * 1.44269504088896341f + shifter;
  const float n = shifted - shifter;
  const float f = (in - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  std::int32_t exponent, none;
  std::memcpy(&exponent, &shifted, sizeof shifted);
  std::memcpy(&none, &shifter, sizeof shifter);
  const std::int32_t bits = (exponent - none + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof bits);
  return x > -87.0f ? p * power : 0.0f;
}

// What logit - top is multiplied by. The smallest temperatures have no finite inverse, and 0 * infinity is not a
// number.
DIVE_HOST_DEVICE inline float inverse_of_temperature(float temperature) {
  const float inverse = 1.0f / temperature;
  return inverse < 3.402823466e38f ? inverse : 3.402823466e38f;
}

}  // namespace dive::engine
