#include "expand.h"
#include "philox.cuh"
#include "rows.cuh"

namespace elle_mp {
namespace {

constexpr int kThreads = 256;

// The noise's random bytes of a row, from the first column of its first counter on; and their sums over
// groups.
ELLE_DEVICE void Draw(const Expand& work, int64_t row, uint8_t* drawn) {
    const uint32_t first = static_cast<uint32_t>(work.first_col / 16);
    for (int64_t i = ThreadIndex(); i < work.Counters(); i += BlockSize()) {
        const Words words = PhiloxWords(work.noise_key, first + static_cast<uint32_t>(i),
                                        static_cast<uint64_t>(work.first_row + row));
        memcpy(drawn + 16 * i, &words, sizeof words);
    }
}
ELLE_DEVICE void SumGroups(const Expand& work, const uint8_t* drawn, int32_t* sums) {
    for (int g = ThreadIndex(); g < work.groups; g += BlockSize()) {
        int32_t sum = 0;
        for (int i = work.begin[g]; i < work.begin[g + 1]; ++i) sum += drawn[work.members[i]];
        sums[g] = sum;
    }
}

template <typename T>
ELLE_DEVICE T FreshValue(const Expand& work, int64_t row, int column, bool whole) {
    const int64_t place = whole ? work.first_col + column : work.first_asked + work.ranks[column];
    const Words words = PhiloxWords(work.fresh_key, static_cast<uint32_t>(place / 8),
                                    static_cast<uint64_t>(work.first_row + row));
    const int part = static_cast<int>(place % 8);
    const uint32_t word = words.x[part / 2];
    const int32_t bits = static_cast<int32_t>(part % 2 ? word >> 16 : word & 0xffffu);
    return Product(static_cast<T>(2 * bits - 65535), static_cast<T>(work.fresh_factor));
}

template <typename T>
ELLE_DEVICE T Scale(const Expand& work, int64_t row, int column) {
    const double by_row = work.row_scale ? work.row_scale[row] : 1.0;
    return static_cast<T>(work.col_scale ? Product(by_row, work.col_scale[column]) : by_row);
}

// A block makes a few rows, so that what it must know of a column is read once for them.
template <typename T>
ELLE_KERNEL(kThreads)
Grow(Expand work) {
    const int64_t first = static_cast<int64_t>(BlockX()) * work.rows_in_block;
    const int rows = static_cast<int>(first + work.rows_in_block <= work.height ? work.rows_in_block
                                                                                : work.height - first);
    const int64_t each = work.RowShared();
    uint8_t* shared = reinterpret_cast<uint8_t*>(SharedMemory());
    // Bytes are numbered by column, sums lie behind them.
    const int64_t shift = work.first_col % 16, sums_at = work.Counters() * 16;
    if (work.group) {
        for (int r = 0; r < rows; ++r) Draw(work, first + r, shared + r * each);
        SyncThreads();
        for (int r = 0; r < rows; ++r)
            SumGroups(work, shared + r * each + shift,
                      reinterpret_cast<int32_t*>(shared + r * each + sums_at));
        SyncThreads();
    }
    for (int column = ThreadIndex(); column < work.width; column += BlockSize()) {
        const int32_t from = work.cols[column];
        const int group = work.group ? work.group[column] : 0;
        const int32_t copies = work.group ? work.begin[group + 1] - work.begin[group] : 1;
        const T factor = work.group ? static_cast<T>(work.factor[group]) : T(0);
        const int column_code = work.fresh_rows ? work.fresh_cols[column] : 0;
        for (int r = 0; r < rows; ++r) {
            const int64_t row = first + r;
            T value = static_cast<const T*>(work.source)[work.rows[row] * work.source_stride + from];
            if (work.row_scale || work.col_scale) value = Product(value, Scale<T>(work, row, column));
            if (work.group && work.silent[row]) {
                if (work.alone) value = T(0);
            } else if (work.group) {
                const uint8_t* drawn = shared + r * each;
                const int32_t sum = reinterpret_cast<const int32_t*>(drawn + sums_at)[group];
                const T centred = static_cast<T>(copies * static_cast<int32_t>(drawn[shift + column]) - sum);
                const T added = Product(value, Product(centred, factor));
                value = work.alone ? added : Total(value, added);
            }
            if (work.fresh_rows) {
                const int row_code = work.fresh_rows[row];
                if (Bigger(row_code, column_code) == 1)
                    value = FreshValue<T>(work, row, column, row_code == 1);
            }
            static_cast<T*>(work.out)[row * work.out_stride + column] = value;
        }
    }
}

}  // namespace

const char* RunExpand(const Expand& work, Element type, void* stream) {
    const Grid grid{(work.height + work.rows_in_block - 1) / work.rows_in_block, 1, 1};
    const int64_t shared = work.RowShared() * work.rows_in_block;
    if (type == Element::kFloat) return Launch(Grow<float>, grid, kThreads, shared, stream, work);
    return Launch(Grow<double>, grid, kThreads, shared, stream, work);
}

}  // namespace elle_mp
