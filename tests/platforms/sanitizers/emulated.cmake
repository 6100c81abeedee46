# Included after project() in a build for the emulated GPU (build.py). The emulator itself stays as it is: it defines the
# functions of ThreadSanitizer, which a sanitizer's compiler declares, and runs shaders on stacks that no sanitizer knows. So do
# the CPU kernels, which the other build instruments and which take minutes to compile.
foreach(target emulator cpu_kernels_baseline cpu_kernels_x86_64_v3 cpu_kernels_x86_64_v4)
  cmake_language(EVAL CODE "cmake_language(DEFER CALL leave_as_it_is ${target})")
endforeach()

function(leave_as_it_is target)
  if(TARGET ${target})
    target_compile_options(${target} PRIVATE -fno-sanitize=all)
  endif()
endfunction()
