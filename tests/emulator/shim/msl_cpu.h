// Metal's standard library for the emulator: what a shader translated by translate.py includes first.
// Barriers and simdgroup functions call the runtime (grid.cpp); kernels are put into a table for it.
#pragma once

#include <tuple>
#include <utility>

#include "abi.h"

using half = _Float16;

#include "msl_math.h"

namespace metal {

struct mem_flags {
  int value;
  constexpr mem_flags(int v) : value(v) {}
  static constexpr int mem_none = emulator::mem_none;
  static constexpr int mem_device = emulator::mem_device;
  static constexpr int mem_threadgroup = emulator::mem_threadgroup;
  static constexpr int mem_texture = emulator::mem_texture;
};

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  emulator_threadgroup_barrier(flags.value, line);
}
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  emulator_simdgroup_barrier(flags.value, line);
}

// The values of a simdgroup's 32 lanes and which of them took part.
template <typename T>
struct Lanes {
  T value[emulator::kSimdWidth];
  uint32_t mask;
  uint32_t self = emulator_simd_lane();

  Lanes(const T& mine, int line) : mask(emulator_simd_exchange(&mine, sizeof(T), value, line)) {}
  bool active(uint32_t lane) const { return lane < emulator::kSimdWidth && mask >> lane & 1; }
  // Beyond the simdgroup, the caller's own value. What an inactive lane would give is undefined on Metal; here, nothing
  // that a kernel could have use for.
  T at(uint32_t lane) const {
    if (lane >= emulator::kSimdWidth) return value[self];
    if (active(lane)) return value[lane];
    T undefined;
    __builtin_memset(&undefined, 0xA5, sizeof(T));
    return undefined;
  }
  template <typename Op>
  T reduce(uint32_t first, uint32_t last, T start, Op op) const {
    for (uint32_t i = first; i < last; ++i) {
      if (active(i)) start = op(start, value[i]);
    }
    return start;
  }
};

#define MSL_SIMD_REDUCTION(name, expression)                                  \
  template <typename T>                                                       \
  T name(T x, int line = __builtin_LINE()) {                                  \
    Lanes<T> lanes(x, line);                                                  \
    uint32_t first = __builtin_ctz(lanes.mask);                               \
    return lanes.reduce(first + 1, emulator::kSimdWidth, lanes.value[first],  \
                        [](T a, T b) { return static_cast<T>(expression); }); \
  }
MSL_SIMD_REDUCTION(simd_sum, a + b)
MSL_SIMD_REDUCTION(simd_product, a* b)
MSL_SIMD_REDUCTION(simd_max, metal::max(a, b))
MSL_SIMD_REDUCTION(simd_min, metal::min(a, b))
MSL_SIMD_REDUCTION(simd_and, a& b)
MSL_SIMD_REDUCTION(simd_or, a | b)
MSL_SIMD_REDUCTION(simd_xor, a ^ b)
#undef MSL_SIMD_REDUCTION

#define MSL_SIMD_SCAN(name, last, start, expression)                                             \
  template <typename T>                                                                          \
  T name(T x, int line = __builtin_LINE()) {                                                     \
    Lanes<T> lanes(x, line);                                                                     \
    return lanes.reduce(0, last, T(start), [](T a, T b) { return static_cast<T>(expression); }); \
  }
MSL_SIMD_SCAN(simd_prefix_inclusive_sum, lanes.self + 1, 0, a + b)
MSL_SIMD_SCAN(simd_prefix_exclusive_sum, lanes.self, 0, a + b)
MSL_SIMD_SCAN(simd_prefix_inclusive_product, lanes.self + 1, 1, a* b)
MSL_SIMD_SCAN(simd_prefix_exclusive_product, lanes.self, 1, a* b)
#undef MSL_SIMD_SCAN

#define MSL_SIMD_SHUFFLE(name, source)                   \
  template <typename T>                                  \
  T name(T x, uint16_t n, int line = __builtin_LINE()) { \
    Lanes<T> lanes(x, line);                             \
    return lanes.at(source);                             \
  }
MSL_SIMD_SHUFFLE(simd_shuffle, n)
MSL_SIMD_SHUFFLE(simd_broadcast, n)
MSL_SIMD_SHUFFLE(simd_shuffle_xor, lanes.self ^ n)
MSL_SIMD_SHUFFLE(simd_shuffle_up, lanes.self - n)
MSL_SIMD_SHUFFLE(simd_shuffle_down, lanes.self + n)
#undef MSL_SIMD_SHUFFLE

template <typename T>
T simd_shuffle_and_fill_up(T x, T filling, uint16_t n, int line = __builtin_LINE()) {
  Lanes<T> lanes(x, line);
  Lanes<T> fillings(filling, line);
  return lanes.self >= n ? lanes.at(lanes.self - n) : fillings.at(emulator::kSimdWidth + lanes.self - n);
}
template <typename T>
T simd_broadcast_first(T x, int line = __builtin_LINE()) {
  Lanes<T> lanes(x, line);
  return lanes.value[__builtin_ctz(lanes.mask)];
}
inline bool simd_any(bool x, int line = __builtin_LINE()) { return simd_or<int>(x, line); }
inline bool simd_all(bool x, int line = __builtin_LINE()) { return simd_and<int>(x, line); }
inline bool simd_is_first(int line = __builtin_LINE()) {
  Lanes<int> lanes(0, line);
  return lanes.self == static_cast<uint32_t>(__builtin_ctz(lanes.mask));
}

enum memory_order { memory_order_relaxed };

template <typename T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<unsigned>;
using atomic_float = atomic<float>;
using atomic_bool = atomic<bool>;

#define MSL_UNCHECKED __attribute__((no_sanitize("thread")))
template <typename T, typename Op>
MSL_UNCHECKED T atomic_update(volatile atomic<T>* object, Op op) {
  emulator_atomic_access(object, sizeof(T));
  T old = object->value;
  object->value = op(old);
  return old;
}
#define MSL_ATOMIC(name, expression)                                                             \
  template <typename T, typename U>                                                              \
  T atomic_##name##_explicit(volatile atomic<T>* object, U operand, memory_order) {              \
    T b = static_cast<T>(operand);                                                               \
    return atomic_update(object, [b](T a) MSL_UNCHECKED { return static_cast<T>(expression); }); \
  }
MSL_ATOMIC(exchange, b)
MSL_ATOMIC(fetch_add, a + b)
MSL_ATOMIC(fetch_sub, a - b)
MSL_ATOMIC(fetch_max, a < b ? b : a)
MSL_ATOMIC(fetch_min, b < a ? b : a)
MSL_ATOMIC(fetch_and, a& b)
MSL_ATOMIC(fetch_or, a | b)
MSL_ATOMIC(fetch_xor, a ^ b)
#undef MSL_ATOMIC
template <typename T>
T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  return atomic_update(const_cast<volatile atomic<T>*>(object), [](T a) MSL_UNCHECKED { return a; });
}
template <typename T, typename U>
void atomic_store_explicit(volatile atomic<T>* object, U value, memory_order order) {
  atomic_exchange_explicit(object, value, order);
}

}  // namespace metal

// The kernel table: translate.py writes the roles, the types come from the functions.
namespace emulator {

constexpr int encode(Role role, int index) { return static_cast<int>(role) << 16 | (index + 1); }
constexpr int buffer(int index) { return encode(Role::buffer, index); }
constexpr int threadgroup_memory(int index) { return encode(Role::threadgroup, index); }
constexpr int builtin(Role role) { return encode(role, -1); }

template <typename T>
struct Argument {  // by value: an attribute of the thread, as a scalar or a vector of one to three
  template <int Code>
  MSL_UNCHECKED static T get(const Thread& thread, void*) {
    constexpr Role role = static_cast<Role>(Code >> 16);
    if constexpr (role == Role::thread_position_in_grid) return of(thread.thread_position_in_grid);
    if constexpr (role == Role::thread_position_in_threadgroup) return of(thread.thread_position_in_threadgroup);
    if constexpr (role == Role::threadgroup_position_in_grid) return of(thread.threadgroup_position_in_grid);
    if constexpr (role == Role::threadgroups_per_grid) return of(thread.threadgroups_per_grid);
    if constexpr (role == Role::threads_per_grid) return of(thread.threads_per_grid);
    if constexpr (role == Role::threads_per_threadgroup) return of(thread.threads_per_threadgroup);
    if constexpr (role == Role::dispatch_threads_per_threadgroup) return of(thread.dispatch_threads_per_threadgroup);
    if constexpr (role == Role::thread_index_in_threadgroup) return of({thread.thread_index_in_threadgroup, 0, 0});
    if constexpr (role == Role::thread_index_in_simdgroup) return of({thread.thread_index_in_simdgroup, 0, 0});
    if constexpr (role == Role::simdgroup_index_in_threadgroup)
      return of({thread.simdgroup_index_in_threadgroup, 0, 0});
    if constexpr (role == Role::simdgroups_per_threadgroup) return of({thread.simdgroups_per_threadgroup, 0, 0});
    if constexpr (role == Role::threads_per_simdgroup) return of({thread.threads_per_simdgroup, 0, 0});
    static_assert(role != Role::buffer && role != Role::threadgroup,
                  "a kernel parameter is neither memory nor has a known attribute");
  }
  template <typename U>
  struct make {
    MSL_UNCHECKED static U from(Position p) { return static_cast<U>(p.x); }
  };
  template <typename U>
  struct make<metal::vec<U, 2>> {
    MSL_UNCHECKED static metal::vec<U, 2> from(Position p) { return {U(p.x), U(p.y)}; }
  };
  template <typename U>
  struct make<metal::vec<U, 3>> {
    MSL_UNCHECKED static metal::vec<U, 3> from(Position p) { return {U(p.x), U(p.y), U(p.z)}; }
  };
  MSL_UNCHECKED static T of(Position p) { return make<T>::from(p); }
  static constexpr size_t size = 0, align = 1;
};
template <typename T>
struct Argument<T*> {
  template <int>
  MSL_UNCHECKED static T* get(const Thread&, void* address) {
    return static_cast<T*>(address);
  }
  static constexpr size_t size = 0, align = alignof(T);
};
template <typename T>
struct Argument<T&> {
  template <int>
  MSL_UNCHECKED static T& get(const Thread&, void* address) {
    return *static_cast<std::remove_cv_t<T>*>(address);
  }
  static constexpr size_t size = sizeof(T), align = alignof(T);
};

template <auto Function, typename Type, typename Sequence, int... Roles>
struct Entry;
template <auto Function, typename... P, size_t... I, int... Roles>
struct Entry<Function, void (*)(P...), std::index_sequence<I...>, Roles...> {
  MSL_UNCHECKED static void run(const Thread& thread, void* const* arguments) {
    Function(Argument<P>::template get<Roles>(thread, arguments[I])...);
  }
  static constexpr Parameter parameters[] = {
      {static_cast<Role>(Roles >> 16), (Roles & 0xffff) - 1, Argument<P>::size, Argument<P>::align}...};
};

template <auto Function, int... Roles>
constexpr Kernel entry(const char* name) {
  using E = Entry<Function, decltype(Function), std::make_index_sequence<sizeof...(Roles)>, Roles...>;
  return {name, &E::run, E::parameters, sizeof...(Roles)};
}

}  // namespace emulator

#define EMULATOR_EXPORT(table, count)                                              \
  static thread_local char emulator_thread_local_anchor;                           \
  static char* emulator_anchor_address() { return &emulator_thread_local_anchor; } \
  extern "C" __attribute__((visibility("default")))                                \
  const emulator::KernelTable emulator_kernels = {table, count, &emulator_anchor_address};

#include "msl_names.h"

constexpr half operator""h(long double value) { return half(float(value)); }
constexpr half operator""h(unsigned long long value) { return half(float(value)); }
using metal::uchar;
using metal::uint;
using metal::ushort;
