// The emulator's knobs, as a second Python module inside the shared library that holds the emulated kernels.
#include <pybind11/pybind11.h>

#include "../cuda/mutate.cuh"
#include "emu.h"

namespace py = pybind11;
using namespace fastdiff;

PYBIND11_MODULE(_C_emu_control, m) {
  m.def("emu_seed", &emu::seed, "Seeds the order in which threads and blocks run.");
  m.def("emu_lockstep", &emu::set_lockstep, "Threads in index order instead.");
  m.def("emu_switches", &emu::switches, "How often a thread was resumed so far.");
  m.def("emu_grid_limit", [](int64_t blocks) { emu::grid_limit = blocks; }, "Largest grid that kernels ask for.");
  m.def("emu_mutate", [](int mutation) { emu::mutation = mutation; }, "Puts a deliberate mistake in force; 0: none.");
  py::dict mutations;
#define FD_X(name) mutations[#name] = static_cast<int>(name);
  FD_MUTATIONS(FD_X)
#undef FD_X
  m.attr("mutations") = mutations;
}
