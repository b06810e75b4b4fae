// Dataset helpers: sample permutation, gathering of packed samples, MLM masking.
//
// Each has a NumPy twin in elle_mp/data that gives the same bits; the tests compare the two. All of
// them release the GIL while they work.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "hashing.h"

namespace py = pybind11;

namespace elle_mp {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

constexpr int kRounds = 8;
constexpr int kMinBits = 4;

// A keyed bijection of [0, n): a Feistel network on the next power of two, walked along its cycle
// until it falls below n (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
class Permutation {
  public:
    Permutation(uint64_t n, uint64_t key) : n_(n) {
        int bits = kMinBits;
        while (bits < 63 && (n - 1) >> bits != 0) ++bits;
        left_bits_ = bits / 2;
        right_bits_ = bits - left_bits_;
        for (int i = 0; i < kRounds; ++i) keys_[i] = Mix64(key + (i + 1) * kGolden);
    }

    uint64_t operator()(uint64_t x) const {
        const uint64_t right_mask = (uint64_t{1} << right_bits_) - 1;
        do {
            uint64_t left = x >> right_bits_;
            uint64_t right = x & right_mask;
            for (int i = 0; i < kRounds; i += 2) {
                left ^= Mix64(right + keys_[i]) >> (64 - left_bits_);
                right ^= Mix64(left + keys_[i + 1]) >> (64 - right_bits_);
            }
            x = left << right_bits_ | right;
        } while (x >= n_);
        return x;
    }

  private:
    uint64_t n_;
    int left_bits_;
    int right_bits_;
    uint64_t keys_[kRounds];
};

py::array_t<uint64_t> Permute(const Array<uint64_t>& indices, uint64_t n, uint64_t key) {
    if (n == 0 || n >> 62 != 0) throw std::invalid_argument("n must lie in [1, 2**62)");
    py::array_t<uint64_t> out(std::vector<py::ssize_t>(indices.shape(), indices.shape() + indices.ndim()));
    const uint64_t* source = indices.data();
    uint64_t* target = out.mutable_data();
    const py::ssize_t count = indices.size();
    bool inside = true;
    {
        py::gil_scoped_release release;
        const Permutation permutation(n, key);
        for (py::ssize_t i = 0; i < count; ++i) {
            if (source[i] >= n) {
                inside = false;
                break;
            }
            target[i] = permutation(source[i]);
        }
    }
    if (!inside) throw std::invalid_argument("an index to permute is not below n");
    return out;
}

template <typename T>
void Copy(const T* stream, const int64_t* starts, int64_t count, int64_t length, int64_t* out) {
    for (int64_t i = 0; i < count; ++i) {
        const T* from = stream + starts[i];
        int64_t* to = out + i * length;
        for (int64_t j = 0; j < length; ++j) to[j] = static_cast<int64_t>(from[j]);
    }
}

// stream [tokens] of an integer type, starts [n] -> [n, length]: the pieces that begin at starts.
py::array_t<int64_t> Gather(const py::array& stream, const Array<int64_t>& starts, int64_t length) {
    if (stream.ndim() != 1 || !(stream.flags() & py::array::c_style)) {
        throw std::invalid_argument("stream must be contiguous and of one dimension");
    }
    if (length < 1) throw std::invalid_argument("length must be positive");
    const int64_t total = stream.size();
    const int64_t count = starts.size();
    const int64_t* begin = starts.data();
    for (int64_t i = 0; i < count; ++i) {
        if (begin[i] < 0 || begin[i] > total - length) {
            throw std::out_of_range("a sample lies outside the stream");
        }
    }
    py::array_t<int64_t> out({count, length});
    int64_t* target = out.mutable_data();
    const void* data = stream.data();
    const char kind = stream.dtype().kind();
    const py::ssize_t size = stream.itemsize();
    if (kind != 'i' && kind != 'u') throw std::invalid_argument("stream must hold integers");
    py::gil_scoped_release release;
    if (kind == 'u' && size == 1) {
        Copy(static_cast<const uint8_t*>(data), begin, count, length, target);
    } else if (kind == 'u' && size == 2) {
        Copy(static_cast<const uint16_t*>(data), begin, count, length, target);
    } else if (kind == 'i' && size == 1) {
        Copy(static_cast<const int8_t*>(data), begin, count, length, target);
    } else if (kind == 'i' && size == 2) {
        Copy(static_cast<const int16_t*>(data), begin, count, length, target);
    } else if (kind == 'i' && size == 4) {
        Copy(static_cast<const int32_t*>(data), begin, count, length, target);
    } else if (kind == 'i' && size == 8) {
        Copy(static_cast<const int64_t*>(data), begin, count, length, target);
    } else {
        throw std::invalid_argument("stream must hold 8 or 16 bit words or signed 32 or 64 bit words");
    }
    return out;
}

struct MaskRule {
    uint64_t seed;
    uint32_t pick;     // of 2^24: the share of places that are predicted
    uint32_t masked;   // of 2^24: below it the place becomes the mask token
    uint32_t changed;  // of 2^24: below it (and not below `masked`) it becomes a random token
    int64_t mask_id;
    const uint8_t* special;
    int64_t vocab_size;
    const int64_t* ordinary;
    uint64_t ordinary_count;

    bool Eligible(int64_t token) const { return token < 0 || token >= vocab_size || special[token] == 0; }

    void Predict(int64_t token, uint64_t hash, int64_t* input, int64_t* target) const {
        const uint64_t second = Mix64(hash ^ kSecond);
        const uint32_t kind = static_cast<uint32_t>(second >> 40);
        *target = token;
        if (kind < masked) {
            *input = mask_id;
        } else if (kind < changed) {
            *input = ordinary[((second & 0xffffffffULL) * ordinary_count) >> 32];
        }
    }

    void Row(const int64_t* tokens, uint64_t key, int64_t length, int64_t* inputs, int64_t* targets) const {
        const uint64_t base = Mix64(seed ^ Mix64(key + kGolden));
        bool any = false;
        int64_t least = -1;
        uint64_t least_hash = 0;
        for (int64_t t = 0; t < length; ++t) {
            inputs[t] = tokens[t];
            targets[t] = -100;
            if (!Eligible(tokens[t])) continue;
            const uint64_t hash = Mix64(base + static_cast<uint64_t>(t + 1) * kGolden);
            if (least < 0 || hash < least_hash) {
                least = t;
                least_hash = hash;
            }
            if ((hash >> 40) < pick) {
                any = true;
                Predict(tokens[t], hash, inputs + t, targets + t);
            }
        }
        if (!any && least >= 0) Predict(tokens[least], least_hash, inputs + least, targets + least);
    }
};

// tokens [n, T], keys [n], special [V] of 0 and 1, ordinary [V - specials] -> (inputs, targets) [n, T].
py::tuple MlmMask(const Array<int64_t>& tokens, const Array<uint64_t>& keys, uint64_t seed, uint32_t pick,
                  uint32_t masked, uint32_t changed, int64_t mask_id, const Array<uint8_t>& special,
                  const Array<int64_t>& ordinary) {
    if (tokens.ndim() != 2 || keys.ndim() != 1 || keys.shape(0) != tokens.shape(0)) {
        throw std::invalid_argument("tokens must be [n, T] and keys [n]");
    }
    if (ordinary.size() == 0) throw std::invalid_argument("there is no ordinary token");
    const int64_t count = tokens.shape(0);
    const int64_t length = tokens.shape(1);
    py::array_t<int64_t> inputs({count, length});
    py::array_t<int64_t> targets({count, length});
    const MaskRule rule{seed,
                        pick,
                        masked,
                        changed,
                        mask_id,
                        special.data(),
                        special.size(),
                        ordinary.data(),
                        static_cast<uint64_t>(ordinary.size())};
    const int64_t* from = tokens.data();
    const uint64_t* key = keys.data();
    int64_t* in = inputs.mutable_data();
    int64_t* out = targets.mutable_data();
    {
        py::gil_scoped_release release;
        for (int64_t i = 0; i < count; ++i) {
            rule.Row(from + i * length, key[i], length, in + i * length, out + i * length);
        }
    }
    return py::make_tuple(inputs, targets);
}

}  // namespace

void register_data(py::module_& m) {
    m.def("permute", &Permute, py::arg("indices"), py::arg("n"), py::arg("key"));
    m.def("gather", &Gather, py::arg("stream"), py::arg("starts"), py::arg("length"));
    m.def("mlm_mask", &MlmMask, py::arg("tokens"), py::arg("keys"), py::arg("seed"), py::arg("pick"),
          py::arg("masked"), py::arg("changed"), py::arg("mask_id"), py::arg("special"), py::arg("ordinary"));
}

}  // namespace elle_mp
