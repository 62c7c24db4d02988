// Ends a row where its text contains one of some strings, across the borders of tokens.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dive::engine {

// The bytes that each token adds to a text; ids beyond the end add none.
struct TokenTexts {
  std::vector<std::string> of;
};

struct StopStrings {
  std::shared_ptr<const TokenTexts> texts;
  std::vector<std::string> strings;  // none of them empty
};

// One row's text as far as a string that is not yet complete can reach back.
class StopMatcher {
 public:
  explicit StopMatcher(const StopStrings* stop) : stop_(stop) {}

  // Whether the text, with this token behind it, contains one of the strings.
  bool add(std::int64_t token);

 private:
  const StopStrings* stop_;
  std::string tail_;
};

}  // namespace dive::engine
