#pragma once
#include <chrono>
#include <string>
#include <vector>

namespace gloo::rendezvous {
// Never derive from this or construct c10d's GlooStore here: the vtable must come from libtorch.
class Store {
 public:
  virtual ~Store() = default;
  virtual void set(const std::string& key, const std::vector<char>& data) = 0;
  virtual std::vector<char> get(const std::string& key) = 0;
  virtual void wait(const std::vector<std::string>& keys) = 0;
  virtual void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds& timeout) = 0;
};
} // namespace gloo::rendezvous
