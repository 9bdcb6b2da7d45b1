// Forward declarations in place of gloo's headers, which the libtorch wheel leaves out. c10d's header only holds pointers
// to these types; every object of them is made and destroyed inside libtorch.
#pragma once
