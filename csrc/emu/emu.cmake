# _C_emu: the bindings over the CUDA kernels, which are compiled as C++ and run by csrc/emu. For tests; never installed.
# Each .cu is included in a generated .cpp, so that the same tree can also give it to nvcc.
set(emu_sources csrc/emu/emu.cpp csrc/emu/control.cpp)
foreach(kernel ${cuda_kernels} tests/emu/probes.cu)
  get_filename_component(name ${kernel} NAME_WE)
  set(wrapper ${CMAKE_CURRENT_BINARY_DIR}/emu/${name}.cpp)
  file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"${CMAKE_CURRENT_SOURCE_DIR}/${kernel}\"\n" @ONLY)
  list(APPEND emu_sources ${wrapper})
endforeach()

fastdiff_module(_C_emu ${emu_sources})
target_compile_definitions(_C_emu PRIVATE FASTDIFF_CUDA FASTDIFF_EMU)
# Kernels read one buffer as words and as floats, which nvcc allows; -O1 halves the build and the tests run as long.
target_compile_options(_C_emu PRIVATE -fno-strict-aliasing -O1 -Wno-unused-function)
