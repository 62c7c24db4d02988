// The CUDA devices of this machine and whether this build can run on them.
//
// device.cu implements this where nvcc was found, no_device.cpp everywhere else. Nothing here throws for a missing
// driver or device: the reason comes back as a Status.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace dive::cuda {

struct Status {
  bool ok = true;
  std::string message;  // empty when ok; else the CUDA error's name and text, or what else went wrong
};

// Whether this build holds CUDA code at all.
bool built();

// Architectures it was compiled for, as nvcc names them without "sm_": "80", "90a", "100a".
std::vector<std::string> built_archs();

struct Versions {
  Status status;
  int runtime = 0;  // 1000 * major + 10 * minor of the linked runtime; 0 where no CUDA was built
  int driver = 0;   // newest CUDA version the installed driver supports; 0 without a driver
};

Versions versions();

struct Device {
  int index = 0;
  std::string name;
  int major = 0;  // compute capability
  int minor = 0;
  std::size_t total_memory = 0;  // bytes
  int sm_count = 0;
  Status covered;  // ok when this build holds code that runs on the device
};

struct DeviceList {
  Status status;  // not ok without a driver, with one that is too old, or without a device
  std::vector<Device> devices;
};

// Asks the driver about every device. Creates a context on each.
DeviceList devices();

struct ProbeResult {
  Status status;
  std::int64_t elements = 0;  // values the kernel wrote and the host found right
};

// Runs a small kernel on the device, copies what it wrote back and compares it with the host's own computation.
ProbeResult probe(int device);

}  // namespace dive::cuda
