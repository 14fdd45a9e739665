// What is asked of modules of torch at every call, over their Python objects. The definitions are
// in spkfast/nn/_watch.py.
#pragma once

#include <pybind11/pybind11.h>

namespace spkfast {

// Adds the functions to the module.
void add_module_functions(pybind11::module_& m);

}  // namespace spkfast
