// See relaxations.h.
#include "relaxations.h"

#include <stdlib.h>

namespace emulator {

std::string relaxations() {
  const char* value = getenv("FUSED_ADAM_EMULATOR_HOSTILE");
  return value ? value : "";
}

bool is_relaxed(const std::string& name) {
  std::string names = relaxations();
  if (names == "1") return name != "no_bfloat";
  return ("," + names + ",").find("," + name + ",") != std::string::npos;
}

}  // namespace emulator
