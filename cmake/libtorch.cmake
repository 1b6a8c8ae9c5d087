# Defines fused_critic::libtorch from an installed torch, CPU or CUDA build, found through Torch_DIR or CMAKE_PREFIX_PATH
# (python -c "import torch; print(torch.utils.cmake_prefix_path)").
# torch's own TorchConfig.cmake is not run: for a CUDA build of torch it demands the whole CUDA toolkit, even without device code.
find_path(FUSED_CRITIC_TORCH_CONFIG_DIR TorchConfig.cmake HINTS ${Torch_DIR} ${Torch_ROOT} ${CMAKE_PREFIX_PATH}
          PATH_SUFFIXES Torch share/cmake/Torch NO_CACHE)
if(NOT FUSED_CRITIC_TORCH_CONFIG_DIR)
  message(FATAL_ERROR "fused_critic: torch not found; pass what python -c 'import torch; print(torch.utils.cmake_prefix_path)' prints "
                      "as -DCMAKE_PREFIX_PATH=")
endif()
get_filename_component(FUSED_CRITIC_TORCH_ROOT ${FUSED_CRITIC_TORCH_CONFIG_DIR}/../../.. REALPATH)

set(FUSED_CRITIC_TORCH_HAS_CUDA OFF)
set(libtorch_names torch torch_cpu c10)
if(EXISTS ${FUSED_CRITIC_TORCH_ROOT}/lib/libtorch_cuda.so)
  set(FUSED_CRITIC_TORCH_HAS_CUDA ON)
  list(APPEND libtorch_names torch_cuda c10_cuda)
endif()
set(libtorch_files "")
foreach(name IN LISTS libtorch_names)
  list(APPEND libtorch_files ${FUSED_CRITIC_TORCH_ROOT}/lib/${CMAKE_SHARED_LIBRARY_PREFIX}${name}${CMAKE_SHARED_LIBRARY_SUFFIX})
endforeach()

if(NOT TARGET fused_critic::libtorch)
  add_library(fused_critic::libtorch INTERFACE IMPORTED)
  target_include_directories(fused_critic::libtorch INTERFACE
    ${FUSED_CRITIC_TORCH_ROOT}/include ${FUSED_CRITIC_TORCH_ROOT}/include/torch/csrc/api/include)
  target_link_libraries(fused_critic::libtorch INTERFACE ${libtorch_files})
  target_compile_features(fused_critic::libtorch INTERFACE cxx_std_20)
endif()
