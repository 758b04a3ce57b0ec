// What newer versions of glibc and libstdc++ have and those of manylinux_2_28 do not, defined here: a library built on a
// newer system then runs on the older one too. csrc/portable.map keeps the definitions inside the library.
#include <new>
#include <sstream>

// Read by libstdc++'s shared_ptr: false makes its counters atomic always. glibc has it from 2.32 on.
extern "C" {
char __libc_single_threaded = 0;  // NOLINT
}

namespace std {

// From GCC 11 on.
void __throw_bad_array_new_length() {  // NOLINT
    throw bad_array_new_length();
}

// Default constructors: exported from GCC 9 on.
template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();

}  // namespace std
