# Included by the top-level CMakeLists.txt for FUSED_ADAM_GPU=emulated: libemulator, shared by _ext, which then runs
# csrc/metal/adam.cpp on it, and by _emulator, with which the tests run kernels of their own.
set(emulator_dir "${CMAKE_CURRENT_LIST_DIR}")

# nanobind tells types apart by name, and tests load this extension beside the installed one.
add_compile_definitions(fused_adam=fused_adam_emulated)

add_library(emulator SHARED
  "${emulator_dir}/checker.cpp"
  "${emulator_dir}/counter.cpp"
  "${emulator_dir}/dispatch.cpp"
  "${emulator_dir}/fibers.cpp"
  "${emulator_dir}/grid.cpp"
  "${emulator_dir}/inexact_scalars.cpp"
  "${emulator_dir}/late_handlers.cpp"
  "${emulator_dir}/library.cpp"
  "${emulator_dir}/mlx_metal.cpp"
  "${emulator_dir}/relaxations.cpp")
target_include_directories(emulator BEFORE PUBLIC "${emulator_dir}" "${emulator_dir}/include")
target_compile_definitions(emulator PRIVATE EMULATOR_SOURCE_DIR="${emulator_dir}")
target_link_libraries(emulator PUBLIC mlx ${CMAKE_DL_LIBS})

target_sources(_ext PRIVATE "${emulator_dir}/eval_cpu_emulated.cpp")
target_include_directories(_ext BEFORE PRIVATE "${emulator_dir}/include")
target_link_libraries(_ext PRIVATE emulator)
# Pieces of gradients that tests can fill: eight threadgroups. Strips of tiles wherever there are two tiles.
target_compile_definitions(_ext PRIVATE FUSED_ADAM_LARGEST_NORM_PIECE=131072 FUSED_ADAM_STRIPS=1)

nanobind_add_module(_emulator NB_STATIC NB_DOMAIN mlx "${emulator_dir}/bindings.cpp")
target_link_libraries(_emulator PRIVATE emulator)
