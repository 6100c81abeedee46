// See library.h.
#include "library.h"

#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "dispatch.h"
#include "relaxations.h"

#ifndef EMULATOR_SOURCE_DIR
#error "the build must say where compile_shader.py lies"
#endif

namespace emulator {

namespace {

std::string environment(const char* name) {
  const char* value = getenv(name);
  if (!value) throw std::runtime_error(std::string("[emulator] ") + name + " is not set");
  return value;
}

std::string quoted(const std::string& text) {
  std::string result = "'";
  for (char c : text) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return result + "'";
}

std::string compile(const std::string& source, const std::vector<std::string>& include_dirs) {
  std::string cache = environment("FUSED_ADAM_EMULATOR_CACHE");
  std::string input = cache + "/source-XXXXXX";
  int descriptor = mkstemp(input.data());
  if (descriptor < 0) throw std::runtime_error("[emulator] cannot write to " + cache);
  close(descriptor);
  std::ofstream(input) << source;
  std::string command = "cd " EMULATOR_SOURCE_DIR "/.. && " + quoted(environment("FUSED_ADAM_EMULATOR_PYTHON")) +
                        " -m emulator.compile_shader " + quoted(input) + " --cache " + quoted(cache);
  for (auto& dir : include_dirs) command += " -I " + quoted(dir);
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (!pipe) throw std::runtime_error("[emulator] cannot run " + command);
  std::string output;
  char buffer[4096];
  while (size_t n = fread(buffer, 1, sizeof buffer, pipe)) output.append(buffer, n);
  int status = pclose(pipe);
  unlink(input.c_str());
  if (status != 0) throw std::runtime_error("[emulator] the shader does not compile:\n" + output);
  output.erase(output.find_last_not_of('\n') + 1);
  return output;
}

// Range of the loaded library that holds `symbol`.
void find_image(const void* symbol, Library& library) {
  struct Search {
    uintptr_t address;
    Library& library;
  } search{reinterpret_cast<uintptr_t>(symbol), library};
  auto visit = [](dl_phdr_info* info, size_t, void* data) {
    auto& search = *static_cast<Search*>(data);
    uintptr_t begin = UINTPTR_MAX, end = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      auto& header = info->dlpi_phdr[i];
      if (header.p_type != PT_LOAD) continue;
      begin = std::min<uintptr_t>(begin, info->dlpi_addr + header.p_vaddr);
      end = std::max<uintptr_t>(end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
    }
    if (search.address < begin || search.address >= end) return 0;
    search.library.image_begin = reinterpret_cast<const char*>(begin);
    search.library.image_end = reinterpret_cast<const char*>(end);
    return 1;
  };
  dl_iterate_phdr(visit, &search);
}

std::mutex names_mutex;
std::set<std::string> names;  // of libraries, see take_libraries

std::mutex replacement_mutex;
std::string replaced_text, replacement_text;

std::string with_replacement(std::string source) {
  std::lock_guard lock(replacement_mutex);
  if (replaced_text.empty()) return source;
  size_t at = source.find(replaced_text);
  if (at == std::string::npos) {
    throw std::runtime_error("[emulator] the shader does not hold the text to replace: " + replaced_text);
  }
  return source.replace(at, replaced_text.size(), replacement_text);
}

}  // namespace

void replace_in_shaders(const std::string& old_text, const std::string& new_text) {
  std::lock_guard lock(replacement_mutex);
  replaced_text = old_text;
  replacement_text = new_text;
}

void note_library(const std::string& name) {
  std::lock_guard lock(names_mutex);
  names.insert(name);
}

std::set<std::string> take_libraries() {
  std::lock_guard lock(names_mutex);
  return std::exchange(names, {});
}

std::string variant_key() {
  std::lock_guard lock(replacement_mutex);
  return "\n" + relaxations() + "\n" + replaced_text + "\n" + replacement_text;
}

std::shared_ptr<Library> load_library(const std::string& source, const std::vector<std::string>& include_dirs) {
  std::string path = compile(with_replacement(source), include_dirs);

  // The shader's undefined __tsan_* and emulator_* functions are this library's: make them visible to it.
  Dl_info self;
  dladdr(reinterpret_cast<void*>(&load_library), &self);
  dlopen(self.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
  auto lock = exclusive();
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(std::string("[emulator] ") + dlerror());
  auto table = static_cast<const KernelTable*>(dlsym(handle, "emulator_kernels"));
  if (!table) throw std::runtime_error("[emulator] no kernel table in " + path);

  auto library = std::make_shared<Library>();
  for (int i = 0; i < table->count; ++i) {
    library->kernels[table->kernels[i].name] = &table->kernels[i];
  }
  library->thread_local_anchor = table->thread_local_anchor;
  find_image(table, *library);

  constexpr size_t kRedZone = 64;  // behind every variable, see translate.py
  std::ifstream variables(path.substr(0, path.size() - 3) + ".vars");
  std::map<std::string, size_t> bytes_of_kernel;
  size_t offset, size;
  std::string name;
  while (variables >> offset >> size && std::getline(variables >> std::ws, name)) {
    library->threadgroup_size = std::max(library->threadgroup_size, offset + size);
    if (name.find("emulator_thread_local_anchor") != std::string::npos) {
      library->anchor_offset = offset;
    } else {
      // "kernel<..>(..)::tile_memory" -> "tile", and the sum for "kernel<..>(..)"
      size_t end_of_kernel = name.rfind("::");
      size_t total = bytes_of_kernel[name.substr(0, end_of_kernel)] += size - kRedZone;
      if (total > kMaxThreadgroupMemory) {
        throw std::runtime_error("[emulator] " + name.substr(0, end_of_kernel) + " has " + std::to_string(total) +
                                 " bytes of threadgroup memory; at most 32768 fit");
      }
      std::string variable = name.substr(end_of_kernel + 2);
      variable.resize(variable.size() - std::string("_memory").size());
      library->variables.push_back({offset, offset + size - kRedZone, variable});
    }
  }
  std::sort(library->variables.begin(), library->variables.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
  return library;
}

}  // namespace emulator
