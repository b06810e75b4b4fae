// Philox4x32-10 (Salmon et al., SC'11); elle_mp/ops/philox.py is the NumPy twin, equal bit for bit.
#pragma once

#include "device.cuh"

namespace elle_mp {

struct Words {
    uint32_t x[4];
};

// The words of counter (counter, row mod 2^32, row / 2^32, 0).
ELLE_DEVICE Words PhiloxWords(uint64_t key, uint32_t counter, uint64_t row) {
    uint32_t x0 = counter, x1 = static_cast<uint32_t>(row), x2 = static_cast<uint32_t>(row >> 32), x3 = 0;
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    ELLE_UNROLL
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = HighProduct(x0, 0xd2511f53u), high1 = HighProduct(x2, 0xcd9e8d57u);
        const uint32_t low0 = x0 * 0xd2511f53u, low1 = x2 * 0xcd9e8d57u;
        x0 = high1 ^ x1 ^ key0;
        x1 = low1;
        x2 = high0 ^ x3 ^ key1;
        x3 = low0;
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    return {{x0, x1, x2, x3}};
}

}  // namespace elle_mp
