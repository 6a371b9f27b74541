// What the loops need of each channel, and what they do with it: the formulas of batch
// normalisation (Ioffe & Szegedy 2015, Algorithm 1 and the gradients below it) on one vector of
// values.
#pragma once

#include <algorithm>
#include <cmath>

#include "rows.hpp"
#include "tiling.hpp"

namespace bncpu {
namespace {

// One value per channel each, in double.
struct Channels {
    double *mean, *invstd, *scale, *shift;  // scale = gamma * invstd, shift = beta
    double *mean_dy, *slope;                // slope = -invstd * mean(dy * xhat)
};

// What the loops need of a channel, in the precision of the loop. A mean is two values of T, so
// that x - mean keeps the digits of x when |mean| >> std.
enum Field { kMean, kMeanLow, kInvstd, kScale, kShift, kMeanDy, kMeanDyLow, kSlope, kFields };

template <class... Fields>
constexpr unsigned set_of(Fields... fields) {
    return ((1u << fields) | ...);
}

// The fields of all channels, field by field. A vector of channels may reach beyond the last one.
template <class T>
class ChannelTable {
   public:
    ChannelTable() = default;
    ChannelTable(void* memory, int64_t channels)
        : values(static_cast<T*>(memory)), width(channels + Vec<T>::lanes) {}
    static int64_t bytes(int64_t channels) {
        return kFields * (channels + Vec<T>::lanes) * (int64_t)sizeof(T);
    }
    BNCPU_INLINE T* field(Field f) const { return values + f * width; }
    BNCPU_INLINE T& at(Field f, int64_t c) const { return field(f)[c]; }

   private:
    T* values = nullptr;
    int64_t width = 0;
};

template <class T>
inline T low_part(double a) {
    const double low = a - (T)a;
    return std::isfinite(low) ? (T)low : 0;
}

// What is known of a channel before its gradients are summed, and after.
template <class T>
inline void set_forward(const ChannelTable<T>& k, const Channels& channels, int64_t c) {
    k.at(kMean, c) = (T)channels.mean[c];
    k.at(kMeanLow, c) = low_part<T>(channels.mean[c]);
    k.at(kInvstd, c) = (T)channels.invstd[c];
    k.at(kScale, c) = (T)channels.scale[c];
    k.at(kShift, c) = (T)channels.shift[c];
}
template <class T>
inline void set_backward(const ChannelTable<T>& k, const Channels& channels, int64_t c) {
    k.at(kMeanDy, c) = (T)channels.mean_dy[c];
    k.at(kMeanDyLow, c) = low_part<T>(channels.mean_dy[c]);
    k.at(kSlope, c) = (T)channels.slope[c];
}

// A set of fields, each of them a vector.
template <class T, unsigned fields>
struct Coefficients {
    Vec<T> value[kFields];

    BNCPU_INLINE Vec<T> at(Field field) const { return value[field]; }

    // f(field) for every field of the set.
    template <class F, unsigned field = 0>
    static BNCPU_INLINE void each(F f) {
        if constexpr ((fields >> field & 1) != 0) f((Field)field);
        if constexpr (field + 1 < kFields) each<F, field + 1>(f);
    }
};

// Those of one channel in every lane.
template <unsigned fields, class T>
BNCPU_INLINE Coefficients<T, fields> of_channel(const ChannelTable<T>& table, int64_t c) {
    Coefficients<T, fields> k;
    k.each([&](Field f) { k.value[f] = Vec<T>::all(table.at(f, c)); });
    return k;
}

// Rows form: the coefficients along the runs of neighbouring channels, from left to right. A vector
// that reaches into the next channel gets those of both, each in its lanes; where there is a next
// one, a run is no shorter than a vector.
template <class T, unsigned fields>
class StripCoefficients {
   public:
    StripCoefficients(const ChannelTable<T>& table, int64_t c0, int64_t c1, int64_t run)
        : table(table),
          next(c0 + 1),
          last(c1 - 1),
          run(run),
          end(c1 - c0 == 1 ? kNever : run),
          current(of_channel<fields>(table, c0)) {}

    // Whether all vectors up to value i have the same, which these are.
    BNCPU_INLINE bool same_until(int64_t i) const { return i <= end; }
    BNCPU_INLINE const Coefficients<T, fields>& same() const { return current; }

    // Of the vector from value i on; i grows from call to call, by a vector at most.
    BNCPU_INLINE const Coefficients<T, fields>& here(int64_t i) {
        return i + Vec<T>::lanes <= end ? current : across(i);
    }

   private:
    static constexpr int64_t kNever = INT64_MAX;
    ChannelTable<T> table;
    int64_t next, last, run, end;  // the current channel's run ends before value `end`
    Coefficients<T, fields> current, both;

    BNCPU_INLINE const Coefficients<T, fields>& across(int64_t i) {
        const int64_t left = end - i;
        both = current;
        current = of_channel<fields>(table, next);
        end = next == last ? kNever : end + run;
        ++next;
        if (left <= 0) return current;
        both.each([&](Field f) { both.value[f] = both.value[f].first(left, current.value[f]); });
        return both;
    }
};

// Columns form: a channel's value stands in each of its columns.
template <class T>
struct ColumnCoefficients {
    T* values;
    int64_t width;  // from one field to the next

    BNCPU_INLINE T* plane(Field field) const { return values + field * width; }

    template <unsigned fields>
    BNCPU_INLINE Coefficients<T, fields> here(int64_t i) const {
        Coefficients<T, fields> k;
        k.each([&](Field f) { k.value[f] = Vec<T>::load(plane(f) + i); });
        return k;
    }

    template <unsigned fields, class F>
    static void each(F f) {
        Coefficients<T, fields>::each(f);
    }
};

// Those of one row, the same for all rows of a strip of columns.
template <class T, unsigned fields>
struct ColumnsOf {
    ColumnCoefficients<T> all;
    int64_t column;  // of the row's first value
    static constexpr bool same_until(int64_t) { return false; }
    BNCPU_INLINE Coefficients<T, fields> same() const { return here(0); }
    BNCPU_INLINE Coefficients<T, fields> here(int64_t i) const {
        return all.template here<fields>(column + i);
    }
};

template <class T, class K>
BNCPU_INLINE Vec<T> centred(const K& k, Vec<T> x, Field mean, Field low) {
    const Vec<T> d = x - k.at(mean);
    if constexpr (sizeof(T) == 8)
        return d;  // the low part of a double is zero
    else
        return d - k.at(low);
}

// xhat = (x - mean) * invstd, what the parameter gradients are summed with.
struct Xhat {
    static constexpr unsigned fields = set_of(kMean, kMeanLow, kInvstd);

    template <class T, class K>
    static BNCPU_INLINE Vec<T> value(const K& k, Vec<T> x) {
        return centred(k, x, kMean, kMeanLow) * k.at(kInvstd);
    }
};

// y = gamma * invstd * (x - mean) + beta; the difference first, never x * scale + (beta - ...).
struct Normalise {
    static constexpr unsigned fields = set_of(kMean, kMeanLow, kScale, kShift);

    template <class T, class K>
    static BNCPU_INLINE Vec<T> value(const K& k, Vec<T> x) {
        return fma(centred(k, x, kMean, kMeanLow), k.at(kScale), k.at(kShift));
    }
};

// dx = gamma * invstd * (dy - mean(dy) - xhat * mean(dy * xhat)), the last term being
// slope * (x - mean).
struct Gradient {
    static constexpr unsigned fields = set_of(kMean, kMeanLow, kScale, kMeanDy, kMeanDyLow, kSlope);

    template <class T, class K>
    static BNCPU_INLINE Vec<T> value(const K& k, Vec<T> dy, Vec<T> x) {
        return fma(centred(k, x, kMean, kMeanLow), k.at(kSlope),
                   centred(k, dy, kMeanDy, kMeanDyLow)) *
               k.at(kScale);
    }
};

// dx where mean and variance are constants: gamma * invstd * dy.
struct FixedGradient {
    static constexpr unsigned fields = set_of(kScale);

    template <class T, class K>
    static BNCPU_INLINE Vec<T> value(const K& k, Vec<T> dy) {
        return dy * k.at(kScale);
    }
};

}  // namespace
}  // namespace bncpu
