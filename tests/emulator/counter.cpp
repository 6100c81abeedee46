// See counter.h.
#include "counter.h"

#include <algorithm>
#include <set>
#include <tuple>
#include <unordered_map>

#include "abi.h"
#include "checker.h"
#include "dispatch.h"

namespace emulator {

namespace {

constexpr size_t kBanks = 32, kWordBytes = 4;
constexpr size_t kThreadgroup = SIZE_MAX;  // in the place of a region

// The accesses of a simdgroup's lanes that the hardware sees as one.
using Key = std::tuple<const void*, uint32_t, uint32_t>;  // instruction, simdgroup, execution
struct Access {
  size_t region;
  bool is_write;
  std::vector<size_t> units;  // lines, or words of threadgroup memory
};

struct Counter {
  bool is_asked = false, is_running = false;
  std::map<std::string, Counts> by_kernel;

  // Of the dispatch that runs.
  Counts* counts = nullptr;
  std::vector<int> buffer_of_region;
  using Lines = std::set<std::tuple<size_t, bool, size_t>>;  // region, is written, line
  Lines own_lines;

  // Of its threadgroup that runs, which begins with another first epoch.
  uint32_t first_epoch = 0;
  std::map<Key, Access> accesses;
  std::vector<std::unordered_map<const void*, uint32_t>> executions;  // of each thread

  void note(size_t region, bool is_write, size_t first_unit, size_t last_unit, const void* instruction) {
    if (checker.first_epoch != first_epoch) end_threadgroup();
    uint32_t thread = checker.thread_in_threadgroup;
    if (executions.size() <= thread) executions.resize(thread + 1);
    Key key{instruction, thread / kSimdWidth, executions[thread][instruction]++};
    auto& access = accesses.try_emplace(key, Access{region, is_write, {}}).first->second;
    for (size_t unit = first_unit; unit <= last_unit; ++unit) access.units.push_back(unit);
  }

  Traffic& traffic(size_t region, bool is_write) {
    return (is_write ? counts->writes : counts->reads)[buffer_of_region[region]];
  }

  void end_threadgroup() {
    Lines group_lines;
    for (auto& [key, access] : accesses) {
      auto& units = access.units;
      std::sort(units.begin(), units.end());
      units.erase(std::unique(units.begin(), units.end()), units.end());
      if (access.region == kThreadgroup) {
        size_t in_bank[kBanks] = {};
        for (size_t word : units) ++in_bank[word % kBanks];
        counts->cycles += *std::max_element(in_bank, in_bank + kBanks);
        counts->fewest_cycles += (units.size() + kBanks - 1) / kBanks;
      } else {
        traffic(access.region, access.is_write).lines += units.size();
        for (size_t line : units) group_lines.insert({access.region, access.is_write, line});
      }
    }
    for (auto& [region, is_write, line] : group_lines) ++traffic(region, is_write).group_lines;
    own_lines.merge(group_lines);
    accesses.clear();
    executions.clear();
    first_epoch = checker.first_epoch;
  }
};

Counter counter;

}  // namespace

void start_counting() {
  auto lock = exclusive();
  counter.is_asked = true;
  counter.by_kernel.clear();
}

std::map<std::string, Counts> stop_counting() {
  auto lock = exclusive();
  counter.is_asked = false;
  return std::move(counter.by_kernel);
}

bool is_counting() { return counter.is_running; }

void begin_count(const std::string& kernel, const std::vector<int>& buffer_of_region) {
  counter.is_running = counter.is_asked;
  if (!counter.is_asked) return;
  counter.counts = &counter.by_kernel[kernel];
  counter.buffer_of_region = buffer_of_region;
  counter.accesses.clear();
  counter.executions.clear();
  counter.own_lines.clear();
}

void end_count() {
  if (!counter.is_running) return;
  counter.end_threadgroup();
  for (auto& [region, is_write, line] : counter.own_lines) ++counter.traffic(region, is_write).own_lines;
  counter.is_running = false;
}

void count_device_access(size_t region, const char* address, size_t size, bool is_write, const void* instruction) {
  if (counter.buffer_of_region[region] < 0) return;
  auto at = reinterpret_cast<uintptr_t>(address);
  counter.note(region, is_write, at / kLineBytes, (at + size - 1) / kLineBytes, instruction);
}

void count_threadgroup_access(size_t offset, size_t size, const void* instruction) {
  counter.note(kThreadgroup, false, offset / kWordBytes, (offset + size - 1) / kWordBytes, instruction);
}

}  // namespace emulator
