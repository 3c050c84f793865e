# _C_emu: the bindings over the CUDA kernels, which are compiled as C++ and run by csrc/emu. For tests; never installed.
# Each .cu is included in a generated .cpp, so that the same tree can also give it to nvcc.
set(emu_sources csrc/emu/emu.cpp)
foreach(kernel ${cuda_kernels} tests/emu/probes.cu)
  get_filename_component(name ${kernel} NAME_WE)
  set(wrapper ${CMAKE_CURRENT_BINARY_DIR}/emu/${name}.cpp)
  file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"${CMAKE_CURRENT_SOURCE_DIR}/${kernel}\"\n" @ONLY)
  list(APPEND emu_sources ${wrapper})
endforeach()

# -O1: the build is what takes time. Kernels read one buffer as words and as floats, which nvcc allows.
add_library(fastdiff_emu OBJECT ${emu_sources})
target_compile_definitions(fastdiff_emu PRIVATE FASTDIFF_CUDA FASTDIFF_EMU ${head_dims})
target_compile_options(fastdiff_emu PRIVATE -O1 -fno-strict-aliasing ${warnings} -Wno-unused-function ${sanitize})

# What the bindings need besides, in its cheapest form: it is not under test here.
add_library(fastdiff_emu_cpu OBJECT ${cpu_kernels})
target_compile_definitions(fastdiff_emu_cpu PRIVATE FASTDIFF_ISA=base)
target_compile_options(fastdiff_emu_cpu PRIVATE -O0 ${warnings})

# Instruction sets whose bf16 kernels run on a body of the dot product that any machine has (csrc/cpu/bf16_dot.h):
# soft_bf16 on plain vectors of four, soft_bf16_wide on those of AVX-512, with all else as it ships.
set(soft_objects)
set(soft_definitions)
function(fastdiff_soft isa)
  string(TOUPPER ${isa} name)
  add_library(fastdiff_emu_${isa} OBJECT ${bf16_kernels})
  target_compile_definitions(fastdiff_emu_${isa} PRIVATE FASTDIFF_ISA=${isa} FASTDIFF_FALLBACK=base FASTDIFF_SOFT_DOT)
  target_compile_options(fastdiff_emu_${isa} PRIVATE ${ARGN} -O2 -fno-exceptions ${numerics} ${warnings} ${sanitize})
  if(OpenMP_CXX_FOUND)
    target_compile_options(fastdiff_emu_${isa} PRIVATE ${OpenMP_CXX_FLAGS})
  endif()
  set(soft_objects ${soft_objects} $<TARGET_OBJECTS:fastdiff_emu_${isa}> PARENT_SCOPE)
  set(soft_definitions ${soft_definitions} FASTDIFF_${name} PARENT_SCOPE)
endfunction()
fastdiff_soft(soft_bf16)
if(flags_avx512)
  fastdiff_soft(soft_bf16_wide ${flags_avx512})
endif()

function(fastdiff_emulator)
  set(isas base)
  set(kernel_objects $<TARGET_OBJECTS:fastdiff_emu_cpu> ${soft_objects})
  set(sanitized ${sanitize})
  set(sanitize)
  fastdiff_module(_C_emu $<TARGET_OBJECTS:fastdiff_emu>)
  target_compile_definitions(_C_emu PRIVATE FASTDIFF_CUDA ${soft_definitions})
  target_compile_options(_C_emu PRIVATE -O0)
  target_link_options(_C_emu PRIVATE ${sanitized})
endfunction()
fastdiff_emulator()
