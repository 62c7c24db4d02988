#include "engine/stop_strings.h"

#include <algorithm>

namespace dive::engine {

bool StopMatcher::add(std::int64_t token) {
  if (!stop_ || token >= static_cast<std::int64_t>(stop_->texts->of.size())) return false;
  tail_ += stop_->texts->of[token];
  std::size_t reach = 0;
  for (const std::string& string : stop_->strings) {
    if (tail_.find(string) != std::string::npos) return true;
    reach = std::max(reach, string.size() - 1);
  }
  if (tail_.size() > reach) tail_.erase(0, tail_.size() - reach);
  return false;
}

}  // namespace dive::engine
