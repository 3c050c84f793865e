# Decides whether the CUDA kernels are built and for which GPUs.
# Sets FASTDIFF_CUDA_ENABLED, FASTDIFF_CUDA_ARCHS_USED, cuda_objects.
set(cuda_kernels
    csrc/cuda/adaln.cu
    csrc/cuda/adaln_backward.cu
    csrc/cuda/attention.cu
    csrc/cuda/attention_backward.cu
    csrc/cuda/attention_short_sm90.cu
    csrc/cuda/attention_sm90.cu
    csrc/cuda/blend.cu
    csrc/cuda/conv1d.cu
    csrc/cuda/gaussian.cu
    csrc/cuda/gelu.cu
    csrc/cuda/scan.cu
    csrc/cuda/scan_backward.cu
    csrc/cuda/spectrum.cu
    csrc/cuda/spectrum_backward.cu
    csrc/cuda/update.cu)
# Which head dims attention multiplies exactly (csrc/cuda/attention.cuh); others are padded to the next of them.
string(TOUPPER "${FASTDIFF_HEAD_DIMS}" head_dims)
if(NOT head_dims MATCHES "^(|FEW|DEFAULT|ALL)$")
  message(FATAL_ERROR "FASTDIFF_HEAD_DIMS: expected few, default or all, got '${FASTDIFF_HEAD_DIMS}'")
elseif(head_dims)
  set(head_dims FASTDIFF_${head_dims}_HEAD_DIMS)
endif()
set(FASTDIFF_CUDA_ENABLED OFF)
set(FASTDIFF_CUDA_ARCHS_USED "")
set(cuda_objects)

string(TOUPPER "${FASTDIFF_CUDA}" wanted)
if(NOT wanted MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FASTDIFF_CUDA: expected AUTO, ON or OFF, got '${FASTDIFF_CUDA}'")
endif()
if(wanted STREQUAL "OFF")
  message(STATUS "fastdiff: CUDA kernels off (FASTDIFF_CUDA=OFF)")
  return()
endif()

include(CheckLanguage)
find_program(nvcc_program nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
find_program(nvidia_smi nvidia-smi)
set(gpu_capability "")
if(nvidia_smi)
  execute_process(COMMAND ${nvidia_smi} --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE gpu_capability ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE smi_failed)
  if(smi_failed)
    set(gpu_capability "")
  endif()
endif()

if(wanted STREQUAL "AUTO")
  if(NOT nvcc_program)
    message(STATUS "fastdiff: CUDA kernels off (no nvcc found; FASTDIFF_CUDA=ON insists)")
    return()
  endif()
  if(NOT gpu_capability)
    message(STATUS "fastdiff: CUDA kernels off (nvcc found, but no GPU; FASTDIFF_CUDA=ON builds them all the same)")
    return()
  endif()
  if(gpu_capability VERSION_LESS 8.0 AND NOT FASTDIFF_CUDA_ARCHS)
    message(STATUS "fastdiff: CUDA kernels off (they need sm_80 or newer, and this GPU is of capability ${gpu_capability})")
    return()
  endif()
elseif(NOT nvcc_program)
  message(FATAL_ERROR "FASTDIFF_CUDA=ON, but no nvcc was found: put it on PATH or set CUDA_HOME")
endif()

set(archs "${FASTDIFF_CUDA_ARCHS}")
if(NOT archs)
  if(gpu_capability AND gpu_capability VERSION_GREATER_EQUAL 8.0)
    string(REGEX MATCH "[0-9]+\\.[0-9]+" first "${gpu_capability}")
    string(REPLACE "." "" archs "${first}")
    if(archs STREQUAL "90")
      set(archs "90a")
    endif()
    set(archs "${archs}-real")
  else()
    set(archs "80-real;86-real;89-real;90a-real;100")  # a bare number adds PTX for what comes after
  endif()
endif()
if(NOT DEFINED CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER ${nvcc_program})
endif()
set(CMAKE_CUDA_ARCHITECTURES "${archs}")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

add_library(fastdiff_cuda OBJECT ${cuda_kernels})
target_compile_definitions(fastdiff_cuda PRIVATE FASTDIFF_CUDA ${head_dims})
target_include_directories(fastdiff_cuda PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
# The register and spill report stays in the build's log; a warning is an error.
target_compile_options(fastdiff_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v --Werror=all-warnings -Xcompiler=-Wall,-Wextra -lineinfo --extended-lambda>)
set(cuda_objects $<TARGET_OBJECTS:fastdiff_cuda>)
set(FASTDIFF_CUDA_ENABLED ON)
string(REPLACE ";" "," FASTDIFF_CUDA_ARCHS_USED "${archs}")
message(STATUS "fastdiff: CUDA kernels on for ${FASTDIFF_CUDA_ARCHS_USED}")
