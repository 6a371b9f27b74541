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

// One value per channel each, in double; null where an operation has no use for it.
struct Channels {
    double *mean, *invstd, *scale, *shift;  // scale = gamma * invstd, shift = beta
    double *mean_dy, *mean_dy_xhat;
};

// What the loops need of a channel, in the precision of the loop. A mean is two values of T, so
// that x - mean keeps the digits of x when |mean| >> std.
enum Field { kMean, kMeanLow, kInvstd, kScale, kShift, kMeanDy, kMeanDyLow, kMinusDyXhat, kFields };

template <class T>
inline T low_part(double a) {
    const double low = a - (T)a;
    return std::isfinite(low) ? (T)low : (T)0;
}

// Calls put(field, value) for every coefficient that this operation has.
template <class T, class Put>
inline void coefficients(const Channels& channels, int64_t c, Put put) {
    put(kMean, (T)channels.mean[c]);
    put(kMeanLow, low_part<T>(channels.mean[c]));
    if (channels.invstd) put(kInvstd, (T)channels.invstd[c]);
    if (channels.scale) put(kScale, (T)channels.scale[c]);
    if (channels.shift) put(kShift, (T)channels.shift[c]);
    if (channels.mean_dy) {
        put(kMeanDy, (T)channels.mean_dy[c]);
        put(kMeanDyLow, low_part<T>(channels.mean_dy[c]));
        put(kMinusDyXhat, (T)-channels.mean_dy_xhat[c]);
    }
}

// Rows form: one channel, the same value in every lane.
template <class T>
struct ChannelCoefficients {
    Vec<T> value[kFields];

    ChannelCoefficients(const Channels& channels, int64_t c) {
        coefficients<T>(channels, c, [this](Field f, T v) { value[f] = Vec<T>::all(v); });
    }
    Vec<T> at(Field field, int64_t) const { return value[field]; }
};

// Columns form: a channel's value stands in each of its `run` columns.
template <class T>
struct ColumnCoefficients {
    alignas(64) T value[kFields][kColumns + Vec<T>::lanes];

    ColumnCoefficients(const Channels& channels, int64_t c0, int64_t c1, int64_t run) {
        for (int64_t c = c0; c < c1; ++c)
            coefficients<T>(channels, c,
                            [&](Field f, T v) { std::fill_n(value[f] + (c - c0) * run, run, v); });
    }
    Vec<T> at(Field field, int64_t i) const { return Vec<T>::load(value[field] + i); }
};

template <class T, class Coefficients>
inline Vec<T> centred(const Coefficients& k, int64_t i, Vec<T> x, Field mean, Field low) {
    const Vec<T> d = x - k.at(mean, i);
    if constexpr (sizeof(T) == 8)
        return d;  // the low part of a double is zero
    else
        return d - k.at(low, i);
}

template <class T, class Coefficients>
inline Vec<T> xhat(const Coefficients& k, int64_t i, Vec<T> x) {
    return centred(k, i, x, kMean, kMeanLow) * k.at(kInvstd, i);
}

// y = gamma * invstd * (x - mean) + beta; the difference first, never x * scale + (beta - ...).
struct Normalise {
    template <class T, class Coefficients>
    static Vec<T> value(const Coefficients& k, int64_t i, Vec<T> x) {
        return fma(centred(k, i, x, kMean, kMeanLow), k.at(kScale, i), k.at(kShift, i));
    }
};

// dx = gamma * invstd * (dy - mean(dy) - xhat * mean(dy * xhat)).
struct Gradient {
    template <class T, class Coefficients>
    static Vec<T> value(const Coefficients& k, int64_t i, Vec<T> dy, Vec<T> x) {
        return fma(xhat(k, i, x), k.at(kMinusDyXhat, i), centred(k, i, dy, kMeanDy, kMeanDyLow)) *
               k.at(kScale, i);
    }
};

// dx where mean and variance are constants: gamma * invstd * dy.
struct FixedGradient {
    template <class T, class Coefficients>
    static Vec<T> value(const Coefficients& k, int64_t i, Vec<T> dy) {
        return dy * k.at(kScale, i);
    }
};

}  // namespace
}  // namespace bncpu
