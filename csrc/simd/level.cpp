// One instruction set's kernels: this file is compiled once per level, with that level's flags.
#include "simd/attention.hpp"
#include "runtime/kernels.hpp"
#include "simd/limits.hpp"
#include "simd/linear.hpp"
#include "simd/packing.hpp"
#include "simd/rowwise.hpp"
#include "simd/simd.hpp"
#include "simd/survey.hpp"

namespace upcast {
namespace UPCAST_NS {

static const Level LEVEL = {
    static_cast<Isa>(UPCAST_LEVEL), UPCAST_LEVEL_NAME, plan_linear, linear, embedding, norm,      gated,
    rope,              refuses,   append, plan_attention, attention, attention_join, survey,
    examine,           pack,      unpack,
    multiply_adds,     read_memory,
};

} // namespace UPCAST_NS

#if UPCAST_LEVEL == 6
const Level &kernels_x86_64_v4_amx_fp16() { return UPCAST_NS::LEVEL; }
bool amx_fp16_works() { return UPCAST_NS::multiplies_halves(); }
#elif UPCAST_LEVEL == 5
const Level &kernels_x86_64_v4_amx() { return UPCAST_NS::LEVEL; }
#elif UPCAST_LEVEL == 4
const Level &kernels_x86_64_v4() { return UPCAST_NS::LEVEL; }
#elif UPCAST_LEVEL == 3
const Level &kernels_x86_64_v3() { return UPCAST_NS::LEVEL; }
#elif UPCAST_LEVEL == 1
const Level &kernels_x86_64() { return UPCAST_NS::LEVEL; }
#else
const Level &kernels_aarch64() { return UPCAST_NS::LEVEL; }
#endif

} // namespace upcast
