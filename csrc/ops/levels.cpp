#include "levels.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

namespace elle_mp {
namespace {

struct Choice {
    const char* name;
    LevelKernels (*kernels)();
    bool here;
};

// From the least to the best.
template <typename F>
auto WithChoices(const F& use) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    const Choice choices[] = {{"plain", PlainKernels, true},
                              {"avx2", Avx2Kernels, avx2},
                              {"avx512", Avx512Kernels, avx512},
                              {"avx512_bf16", Avx512Bf16Kernels, bf16}};
#else
    const Choice choices[] = {{"plain", PlainKernels, true}};
#endif
    const char* wanted = std::getenv("ELLE_MP_INSTRUCTIONS");
    const Choice* best = nullptr;
    bool known = wanted == nullptr || *wanted == '\0';
    for (const Choice& choice : choices) {
        if (choice.here) best = &choice;
        if (!known && std::strcmp(choice.name, wanted) == 0) {
            known = true;
            break;
        }
        if (known && wanted != nullptr && *wanted != '\0') break;
    }
    STD_TORCH_CHECK(known, "ELLE_MP_INSTRUCTIONS=", wanted ? wanted : "",
                    " is none of plain, avx2, avx512, avx512_bf16");
    return use(*best);
}

}  // namespace

const char* LevelName() {
    return WithChoices([](const Choice& choice) { return choice.name; });
}

LevelKernels Level() {
    return WithChoices([](const Choice& choice) { return choice.kernels(); });
}

}  // namespace elle_mp
