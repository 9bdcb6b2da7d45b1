// What every function of the C ABI shares: errors as malloc'ed strings (null: no error), freed by corral_free.
#pragma once
#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <string>

namespace corral {

// libtorch appends a backtrace from the second line on; users get the first line.
inline char* error_string(const char* what) {
  const char* end = std::strchr(what, '\n');
  std::string line(what, end ? static_cast<size_t>(end - what) : std::strlen(what));
  return strdup(line.empty() ? "unknown C++ error" : line.c_str());
}

template <class F>
char* guarded(F&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& e) {
    return error_string(e.what_without_backtrace());
  } catch (const std::exception& e) {
    return error_string(e.what());
  } catch (...) {
    return error_string("unknown C++ exception");
  }
}

} // namespace corral
