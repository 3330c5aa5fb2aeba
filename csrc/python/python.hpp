// Python.h restricted to the stable ABI: one library serves every CPython from 3.10 on. Free-threaded ones have none.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <pyconfig.h>
#if !defined(Py_LIMITED_API) && !defined(Py_GIL_DISABLED)
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>
