// Which relaxations of a hostile GPU are on: what each means, and the variable that names them, stand in hostile.py.
#pragma once

#include <string>

namespace emulator {

bool is_relaxed(const std::string& name);

// The variable's value, for whoever keeps compiled libraries.
std::string relaxations();

}  // namespace emulator
