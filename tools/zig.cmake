# Cross-compiling with PyPI's ziglang, for tools/wheels.py: its clang, with every platform's C headers and libraries.
# UPCAST_ZIG is the folder of commands that tools/wheels.py writes (they add the target), UPCAST_SYSTEM and
# UPCAST_PROCESSOR what CMake calls the machine that the library is for. For this machine's own kind nothing is crossed.
set(there "$ENV{UPCAST_SYSTEM} $ENV{UPCAST_PROCESSOR}")
if(NOT there STREQUAL "${CMAKE_HOST_SYSTEM_NAME} ${CMAKE_HOST_SYSTEM_PROCESSOR}")
  set(CMAKE_SYSTEM_NAME $ENV{UPCAST_SYSTEM})
  set(CMAKE_SYSTEM_PROCESSOR $ENV{UPCAST_PROCESSOR})
endif()
set(CMAKE_CXX_COMPILER $ENV{UPCAST_ZIG}/c++)
set(CMAKE_AR $ENV{UPCAST_ZIG}/ar)
set(CMAKE_RANLIB $ENV{UPCAST_ZIG}/ranlib)
set(CMAKE_RC_COMPILER $ENV{UPCAST_ZIG}/rc) # CMake asks for one on Windows; there is nothing for it to do
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_INSTALL_NAME_TOOL true) # there are no names to change
