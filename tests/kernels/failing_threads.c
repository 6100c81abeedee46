// LD_PRELOAD library for test_threads.py: pthread_create fails as at a container's limit, once allow_threads(n) has
// been called and n more threads have been made. Build: cc -shared -fPIC -o failing_threads.so failing_threads.c
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>

typedef int (*Create)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);

static atomic_int allowed = INT_MAX;
static atomic_int rejected;

void allow_threads(int count) { allowed = count; }
int threads_rejected(void) { return rejected; }

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
  int left = allowed;
  while (left > 0 && left < INT_MAX && !atomic_compare_exchange_weak(&allowed, &left, left - 1)) {
  }
  if (left <= 0) {
    ++rejected;
    return EAGAIN;
  }
  Create create = (Create)dlsym(RTLD_NEXT, "pthread_create");
  return create(thread, attributes, start, argument);
}
