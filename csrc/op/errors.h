// Errors of the operation, thrown where the graph is built: "[adam_update] what must be X but got Y".
#pragma once

#include <sstream>
#include <stdexcept>

namespace fused_adam {

template <typename... Parts>
[[noreturn]] void reject(const Parts&... parts) {
  std::ostringstream message;
  message << "[adam_update] ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace fused_adam
