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

template <class T>
inline double low_part(double a) {
    const double low = a - (T)a;
    return std::isfinite(low) ? low : 0;
}

// Calls put(field, value) for the coefficients in a set.
template <class T, class Put>
inline void coefficients(const Channels& channels, int64_t c, unsigned fields, Put put) {
    const auto give = [&](Field field, auto value) {
        if (fields >> field & 1) put(field, (T)value());
    };
    give(kMean, [&] { return channels.mean[c]; });
    give(kMeanLow, [&] { return low_part<T>(channels.mean[c]); });
    give(kInvstd, [&] { return channels.invstd[c]; });
    give(kScale, [&] { return channels.scale[c]; });
    give(kShift, [&] { return channels.shift[c]; });
    give(kMeanDy, [&] { return channels.mean_dy[c]; });
    give(kMeanDyLow, [&] { return low_part<T>(channels.mean_dy[c]); });
    give(kSlope, [&] { return channels.slope[c]; });
}

// Rows form: one channel, the same value in every lane.
template <class T>
struct ChannelCoefficients {
    Vec<T> value[kFields];

    ChannelCoefficients(const Channels& channels, int64_t c, unsigned fields) {
        coefficients<T>(channels, c, fields, [this](Field f, T v) { value[f] = Vec<T>::all(v); });
    }
    BNCPU_INLINE Vec<T> at(Field field, int64_t) const { return value[field]; }
};

// Columns form: a channel's value stands in each of its `run` columns.
template <class T>
struct ColumnCoefficients {
    alignas(64) T value[kFields][kColumns + Vec<T>::lanes];

    ColumnCoefficients(const Channels& channels, int64_t c0, int64_t c1, int64_t run,
                       unsigned fields) {
        for (int64_t c = c0; c < c1; ++c)
            coefficients<T>(channels, c, fields,
                            [&](Field f, T v) { std::fill_n(value[f] + (c - c0) * run, run, v); });
    }
    BNCPU_INLINE Vec<T> at(Field field, int64_t i) const { return Vec<T>::load(value[field] + i); }
};

// The coefficients from a column on. In the rows form every column's are the same.
template <class T>
const ChannelCoefficients<T>& at_column(const ChannelCoefficients<T>& k, int64_t) {
    return k;
}
template <class T>
struct FromColumn {
    const ColumnCoefficients<T>& all;
    int64_t column;
    BNCPU_INLINE Vec<T> at(Field field, int64_t i) const { return all.at(field, column + i); }
};
template <class T>
FromColumn<T> at_column(const ColumnCoefficients<T>& k, int64_t column) {
    return {k, column};
}

template <class T, class Coefficients>
BNCPU_INLINE Vec<T> centred(const Coefficients& k, int64_t i, Vec<T> x, Field mean, Field low) {
    const Vec<T> d = x - k.at(mean, i);
    if constexpr (sizeof(T) == 8)
        return d;  // the low part of a double is zero
    else
        return d - k.at(low, i);
}

// xhat = (x - mean) * invstd, what the parameter gradients are summed with.
struct Xhat {
    static constexpr unsigned fields = set_of(kMean, kMeanLow, kInvstd);

    template <class T, class Coefficients>
    static BNCPU_INLINE Vec<T> value(const Coefficients& k, int64_t i, Vec<T> x) {
        return centred(k, i, x, kMean, kMeanLow) * k.at(kInvstd, i);
    }
};

// y = gamma * invstd * (x - mean) + beta; the difference first, never x * scale + (beta - ...).
struct Normalise {
    static constexpr unsigned fields = set_of(kMean, kMeanLow, kScale, kShift);

    template <class T, class Coefficients>
    static BNCPU_INLINE Vec<T> value(const Coefficients& k, int64_t i, Vec<T> x) {
        return fma(centred(k, i, x, kMean, kMeanLow), k.at(kScale, i), k.at(kShift, i));
    }
};

// dx = gamma * invstd * (dy - mean(dy) - xhat * mean(dy * xhat)), the last term being
// slope * (x - mean).
struct Gradient {
    static constexpr unsigned fields = set_of(kMean, kMeanLow, kScale, kMeanDy, kMeanDyLow, kSlope);

    template <class T, class Coefficients>
    static BNCPU_INLINE Vec<T> value(const Coefficients& k, int64_t i, Vec<T> dy, Vec<T> x) {
        return fma(centred(k, i, x, kMean, kMeanLow), k.at(kSlope, i),
                   centred(k, i, dy, kMeanDy, kMeanDyLow)) *
               k.at(kScale, i);
    }
};

// dx where mean and variance are constants: gamma * invstd * dy.
struct FixedGradient {
    static constexpr unsigned fields = set_of(kScale);

    template <class T, class Coefficients>
    static BNCPU_INLINE Vec<T> value(const Coefficients& k, int64_t i, Vec<T> dy) {
        return dy * k.at(kScale, i);
    }
};

}  // namespace
}  // namespace bncpu
