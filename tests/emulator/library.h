// A shader compiled by translate.py and loaded: its kernels and its threadgroup variables.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "abi.h"
#include "checker.h"

namespace emulator {

constexpr size_t kMaxThreadgroupMemory = 32 << 10;

struct Library {
  std::map<std::string, const Kernel*> kernels;
  char* (*thread_local_anchor)();
  size_t anchor_offset = 0;
  size_t threadgroup_size = 0;  // all variables of all kernels, as they lie in thread-local storage
  std::vector<ThreadgroupVariable> variables;
  const char* image_begin = nullptr;
  const char* image_end = nullptr;
};

// Compiles (or takes from the cache folder) and loads; never unloaded. Throws std::runtime_error with the compiler's
// message. Python and the folder come from FUSED_ADAM_EMULATOR_PYTHON and FUSED_ADAM_EMULATOR_CACHE.
std::shared_ptr<Library> load_library(const std::string& source, const std::vector<std::string>& include_dirs = {});

// For tests that plant faults: from now on every shader is compiled with `old_text` replaced by `new_text`, or it is an
// error if it does not hold that text. An empty `old_text` ends it.
void replace_in_shaders(const std::string& old_text, const std::string& new_text);

// The host asks for a library by name: a GPU compiles it the first time. take_libraries() gives the names since the last
// call.
void note_library(const std::string& name);
std::set<std::string> take_libraries();

// Changes with each replacement and relaxation, for whoever keeps libraries by name or source.
std::string variant_key();

}  // namespace emulator
