// The names of addresses are not looked up. c10d describes every socket that it connects by its peer's name, which it asks
// getnameinfo for: where the name server does not answer, each connection of a start takes 10 s more. Here everybody in this process
// gets numbers.
#include "abi.h"

#include <dlfcn.h>
#include <netdb.h>
#include <sys/socket.h>

extern "C" {

// In the place of libc's, also for the libraries: a program's own symbols come first.
__attribute__((visibility("default"))) int getnameinfo(const struct sockaddr* address, socklen_t size, char* host,
                                                       socklen_t host_size, char* service, socklen_t service_size,
                                                       int flags) {
  using Function = decltype(&getnameinfo);
  static const auto libc = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "getnameinfo"));
  if (!libc) return EAI_SYSTEM;
  return libc(address, size, host, host_size, service, service_size, flags | NI_NUMERICHOST | NI_NUMERICSERV);
}

// Whether libraries that ask for the names of addresses get numbers.
int corral_names_are_numbers() {
  return dlsym(RTLD_DEFAULT, "getnameinfo") == reinterpret_cast<void*>(&getnameinfo);
}

} // extern "C"
