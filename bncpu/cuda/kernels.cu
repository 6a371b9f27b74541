// Batch normalisation on CUDA: sums of every channel, and the results that are made with them. The
// launches are bncpu/cuda/plan.py's; the arrays are checked before they come here. Compiled once
// for every type of value, length of vector and kind of tile; includes nothing, and makes no use of
// atomics, so that the same launch gives the same bits.
//
// Mathematics: Ioffe & Szegedy 2015 (Algorithms 1 and 2, and the gradients below Algorithm 1);
// Welford 1962 for the moments of a few values; Chan, Golub & LeVeque 1983 for their merging.
//
// BNCPU_STORAGE: float32, float64, float16 or bfloat16, how values stand in memory.
// BNCPU_VECTOR: values that a thread loads at a time.
// BNCPU_TILED: 1 where a tile has several channels side by side, 0 where it is one channel.

#define BNCPU_DEVICE __device__ __forceinline__

typedef long long int64;

// ---- Values in memory and in arithmetic ---------------------------------------------------------

typedef float float32;
typedef double float64;
struct float16 {  // IEEE 754 binary16
    unsigned short bits;
};
struct bfloat16 {  // the upper half of a float
    unsigned short bits;
};
typedef BNCPU_STORAGE Storage;

// What values are computed in, and the largest positive value that is stored as zero.
template <class S>
struct Traits {
    typedef float Arithmetic;
    static constexpr float stored_as_zero = 0;
};
template <>
struct Traits<float64> {
    typedef double Arithmetic;
    static constexpr double stored_as_zero = 0;
};
template <>
struct Traits<float16> {
    typedef float Arithmetic;
    static constexpr float stored_as_zero = 0x1p-25f;
};
template <>
struct Traits<bfloat16> {
    typedef float Arithmetic;
    static constexpr float stored_as_zero = 0x1p-134f;
};
typedef Traits<Storage>::Arithmetic T;

template <class To, class From>
BNCPU_DEVICE To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

BNCPU_DEVICE float widen(float value) { return value; }
BNCPU_DEVICE double widen(double value) { return value; }
BNCPU_DEVICE float widen(bfloat16 value) { return bits_of<float>((unsigned)value.bits << 16); }
BNCPU_DEVICE float widen(float16 value) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    const unsigned sign = (value.bits & 0x8000u) << 16, magnitude = (value.bits & 0x7fffu) << 13;
    const unsigned rebias = (127u - 15u) << 23, smallest = 113u << 23;  // 2^-14
    if (magnitude >= 0x7c00u << 13) return bits_of<float>(sign | (magnitude + 2 * rebias));
    if (magnitude >= 0x0400u << 13) return bits_of<float>(sign | (magnitude + rebias));
    const float subnormal = bits_of<float>(magnitude + smallest) - bits_of<float>(smallest);
    return bits_of<float>(sign | bits_of<unsigned>(subnormal));
#endif
}

// To the nearest value, ties to even.
BNCPU_DEVICE void narrow(float value, float& to) { to = value; }
BNCPU_DEVICE void narrow(double value, double& to) { to = value; }
BNCPU_DEVICE void narrow(float value, bfloat16& to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
    const unsigned all = bits_of<unsigned>(value);
    const bool is_nan = (all & 0x7fffffffu) > 0x7f800000u;
    to.bits =
        (unsigned short)(is_nan ? all >> 16 | 0x40u : (all + 0x7fffu + (all >> 16 & 1u)) >> 16);
#endif
}
BNCPU_DEVICE void narrow(float value, float16& to) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
#else
    const unsigned all = bits_of<unsigned>(value);
    const unsigned sign = all >> 16 & 0x8000u, magnitude = all & 0x7fffffffu;
    unsigned rounded;
    if (magnitude > 0x7f800000u) {
        rounded = 0x7e00u;
    } else if (magnitude >= 0x47800000u) {  // 2^16 and more
        rounded = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {  // 2^-14, the least normal value, and more
        rounded = (magnitude - ((127u - 15u) << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    } else {  // next to 1/2 the last bits count multiples of 2^-24
        rounded = bits_of<unsigned>(bits_of<float>(magnitude) + 0.5f) - (126u << 23);
    }
    to.bits = (unsigned short)(rounded | sign);
#endif
}

BNCPU_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
BNCPU_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }
template <class N>
BNCPU_DEVICE N least(N a, N b) {
    return b < a ? b : a;
}
BNCPU_DEVICE int64 ceil_div(int64 a, int64 b) { return (a + b - 1) / b; }

// ---- Vectors ------------------------------------------------------------------------------------

constexpr int V = BNCPU_VECTOR;
constexpr bool kTiled = BNCPU_TILED;
constexpr int kSums = kTiled ? V : 1;  // that a thread keeps: its lanes' channels may differ

template <int bytes>
struct Words;
template <>
struct Words<16> {
    typedef uint4 Type;
};
template <>
struct Words<8> {
    typedef uint2 Type;
};
template <>
struct Words<4> {
    typedef unsigned Type;
};
template <>
struct Words<2> {
    typedef unsigned short Type;
};

struct Packed {
    Storage value[V];
};
struct Vector {
    T value[V];
};
typedef Words<sizeof(Packed)>::Type Word;

BNCPU_DEVICE Packed load(const Storage* from) {
    return bits_of<Packed>(*(const Word*)__builtin_assume_aligned(from, sizeof(Word)));
}
// As one word: an assignment the compiler would split into stores of single values.
BNCPU_DEVICE void store(Storage* to, Packed packed) {
    __stwb((Word*)__builtin_assume_aligned(to, sizeof(Word)), bits_of<Word>(packed));
}
BNCPU_DEVICE Vector widen(Packed packed) {
    Vector wide;
#pragma unroll
    for (int i = 0; i < V; ++i) wide.value[i] = widen(packed.value[i]);
    return wide;
}

// ---- What a call takes --------------------------------------------------------------------------

// An array of x's shape: element (k, c, s) stands at k * row + c * channel + s.
struct Array {
    Storage* data;  // null: not given, as below
    int64 row, channel;

    BNCPU_DEVICE Storage* at(int64 k, int64 c) const { return data + (k * row + c * channel); }
};

// One value per channel, in float64 (wide) or float32.
struct Values {
    void* data;
    int64 step, wide;

    BNCPU_DEVICE double get(int64 c, double missing) const {
        if (data == nullptr) return missing;
        return wide ? ((const double*)data)[c * step] : (double)((const float*)data)[c * step];
    }
    BNCPU_DEVICE void set(int64 c, double value) const {
        if (data == nullptr) return;
        if (wide)
            ((double*)data)[c * step] = value;
        else
            ((float*)data)[c * step] = (float)value;
    }
};

// Some of a channel's values: how many, and their mean and sum of squared deviations (m2), or
// sum dz and sum dz * xhat.
struct Sums {
    double count, first, second;
};

// The mirror of PARAMETERS in plan.py.
struct Parameters {
    Array x, residual, dy, out, dresidual;
    Values mean, var, invstd, m2, gamma, beta, dgamma, dbeta, running_mean, running_var;
    unsigned char* mask;
    Sums* partials;  // of every part of every channel; then of every channel
    double eps, momentum;
    int64 rows, channels, run;
    int64 tile_channels, tiles, row_parts, part_rows, column_parts, part_vectors;
    int lanes, row_lanes, relu, mask_in_map;

    BNCPU_DEVICE int64 parts() const { return row_parts * column_parts; }
    BNCPU_DEVICE double values() const { return (double)rows * (double)run; }
    BNCPU_DEVICE Sums* totals() const { return partials + channels * parts(); }
};

extern __shared__ uint4 shared_memory[];

// ---- Who computes what --------------------------------------------------------------------------

// A part of a tile, as a block has it: rows [k0, k1) of vectors [v0, v1) of its channels' columns.
struct Part {
    int64 c0, channels, index, k0, k1, v0, v1;

    // Items are the parts of one tile after the other.
    BNCPU_DEVICE Part(const Parameters& p, int64 item) {
        const int64 tile = item / p.parts();
        index = item % p.parts();
        c0 = tile * p.tile_channels;
        channels = least(p.tile_channels, p.channels - c0);
        const int64 row_part = index / p.column_parts, column_part = index % p.column_parts;
        k0 = row_part * p.part_rows;
        k1 = least(k0 + p.part_rows, p.rows);
        v0 = column_part * p.part_vectors;
        v1 = least(v0 + p.part_vectors, channels * p.run / V);
    }
};

// A thread's way through a part: vectors v0 + lane, + lanes, ... of row k0 + row_lane, + row_lanes,
// ... All threads of a block take as many steps; some of them lead to no vector.
struct Walk {
    int64 k, v, first, end_k, end_v, c0;
    int lane, lanes, row_lanes;

    BNCPU_DEVICE Walk(const Parameters& p, const Part& part)
        : c0(part.c0), lanes(p.lanes), row_lanes(p.row_lanes) {
        const int row_lane = (int)threadIdx.x / lanes;
        lane = (int)threadIdx.x % lanes;
        k = part.k0 + row_lane;
        end_k = row_lane < row_lanes ? part.k1 : part.k0;
        v = first = part.v0 + lane;
        end_v = part.v1;
    }
    static BNCPU_DEVICE int64 steps(const Parameters& p, const Part& part) {
        return ceil_div(part.k1 - part.k0, p.row_lanes) * ceil_div(part.v1 - part.v0, p.lanes);
    }
    BNCPU_DEVICE bool valid() const { return k < end_k && v < end_v; }
    BNCPU_DEVICE Storage* at(const Array& array) const { return array.at(k, c0) + v * V; }
    // The first of the vector's bits of the mask.
    BNCPU_DEVICE int64 bit(const Parameters& p) const {
        return (k * p.channels + c0) * p.run + v * V;
    }
    BNCPU_DEVICE void next() {
        v += lanes;
        if (v - lane >= end_v) {  // all lanes are past the end
            v = first;
            k += row_lanes;
        }
    }
};

// Where a thread of a whole tile keeps the vector of a step; nobody else looks there.
struct Stash {
    Word* words;

    BNCPU_DEVICE Word& at(int64 step) const { return words[step * blockDim.x + threadIdx.x]; }
};
struct Stashes {
    Stash x, dy;
};

// Steps whose vectors are loaded before the first is used, and steps after which sums in T are
// added to those in double. The chain of additions in T is that long, whatever the shape.
constexpr int kAhead = sizeof(Packed) == 16 || kTiled ? 4 : 8;
constexpr int kAheadOfTwo = kAhead / 2;  // of x and of dy
constexpr int kChunk = 32;

__constant__ float kReciprocal[kChunk + 1] = {
    0.f,      1.f / 1,  1.f / 2,  1.f / 3,  1.f / 4,  1.f / 5,  1.f / 6,  1.f / 7,  1.f / 8,
    1.f / 9,  1.f / 10, 1.f / 11, 1.f / 12, 1.f / 13, 1.f / 14, 1.f / 15, 1.f / 16, 1.f / 17,
    1.f / 18, 1.f / 19, 1.f / 20, 1.f / 21, 1.f / 22, 1.f / 23, 1.f / 24, 1.f / 25, 1.f / 26,
    1.f / 27, 1.f / 28, 1.f / 29, 1.f / 30, 1.f / 31, 1.f / 32};
BNCPU_DEVICE float reciprocal(int n, float) { return kReciprocal[n]; }
BNCPU_DEVICE double reciprocal(int n, double) { return 1.0 / n; }

// ---- Merging ------------------------------------------------------------------------------------

// How much two parts of so many values count.
struct Weights {
    double a, b;     // their shares of all values
    double product;  // a * b / (a + b) of the counts

    BNCPU_DEVICE Weights(double count_a, double count_b)
        : a(count_a / (count_a + count_b)),
          b(count_b / (count_a + count_b)),
          product(count_a * b) {}
};

// Mean and m2 of a and b together. The weighted mean is the way out for infinite means, which IEEE
// arithmetic keeps infinite and the update formula would turn into NaN.
BNCPU_DEVICE Sums merge_moments(Weights weights, Sums a, Sums b) {
    const double delta = b.first - a.first, count = a.count + b.count;
    const double second = a.second + b.second + delta * delta * weights.product;
    if (!isfinite(delta)) return {count, a.first * weights.a + b.first * weights.b, second};
    return {count, a.first + delta * weights.b, second};
}

struct MergeMoments {
    static BNCPU_DEVICE Sums of(Sums a, Sums b) {
        if (a.count == 0) return b;
        if (b.count == 0) return a;
        return merge_moments(Weights(a.count, b.count), a, b);
    }
};
struct AddGradients {
    static BNCPU_DEVICE Sums of(Sums a, Sums b) {
        return {a.count + b.count, a.first + b.first, a.second + b.second};
    }
};

// Merges sums in shared memory, as many for every channel, two by two and in the same order at
// every run; a channel's stand at places place(c, 0), place(c, 1), ... and end at the first of
// these, where thread c % blockDim.x has brought them.
template <class Merge, class Place>
BNCPU_DEVICE void merge_in_block(Sums* sums, int64 channels, int per_channel, Place place) {
    int half = 1;
    while (2 * half < per_channel) half *= 2;
    for (; half > 0; half /= 2) {
        __syncthreads();
        for (int64 i = threadIdx.x; i < channels * half; i += blockDim.x) {
            const int64 c = i / half;
            const int q = (int)(i % half);
            if (q + half < per_channel)
                sums[place(c, q)] = Merge::of(sums[place(c, q)], sums[place(c, q + half)]);
        }
    }
}

// Where the sums of a part's channels stand: a channel has every thread's, or, where every column
// has its own, those of its columns in every row of lanes.
struct PlaceInTile {
    int run, width;

    BNCPU_DEVICE PlaceInTile(const Parameters& p) : run((int)p.run), width(p.lanes * V) {}
    BNCPU_DEVICE int64 operator()(int64 c, int q) const {
        return kTiled ? (int64)(q / run) * width + c * run + q % run : q;
    }
    BNCPU_DEVICE int per_channel(const Parameters& p) const {
        return kTiled ? p.row_lanes * run : blockDim.x;
    }
};

// ---- What is known of a channel -----------------------------------------------------------------

BNCPU_DEVICE double invstd_of(const Parameters& p, int64 c) {
    return p.var.data == nullptr || p.invstd.data != nullptr ? p.invstd.get(c, 0)
                                                             : 1 / sqrt(p.var.get(c, 0) + p.eps);
}

// From the moments of all values of a channel: Algorithm 1, lines 1 and 2, and its moving averages.
struct FinishMoments {
    static BNCPU_DEVICE void of(const Parameters& p, int64 c, Sums sums) {
        const double m = p.values(), var = sums.second / m;
        p.mean.set(c, sums.first);
        p.m2.set(c, sums.second);
        p.var.set(c, var);
        p.invstd.set(c, 1 / sqrt(var + p.eps));
        if (p.running_mean.data == nullptr) return;
        const double keep = 1 - p.momentum;
        p.running_mean.set(c, p.running_mean.get(c, 0) * keep + p.momentum * sums.first);
        p.running_var.set(c, p.running_var.get(c, 0) * keep + p.momentum * (var * (m / (m - 1))));
    }
};

struct FinishGradients {
    static BNCPU_DEVICE void of(const Parameters& p, int64 c, Sums sums) {
        p.dbeta.set(c, sums.first);
        p.dgamma.set(c, sums.second);
        p.totals()[c] = sums;
    }
};

// What the loops need of a channel, in T. A mean is two values of T, so that x - mean keeps the
// digits of x when |mean| >> std.
enum Field { kMean, kMeanLow, kInvstd, kScale, kShift, kMeanDy, kMeanDyLow, kSlope, kFields };

BNCPU_DEVICE T low_part(double a) {
    const double low = a - (T)a;
    return isfinite(low) ? (T)low : (T)0;
}

// Fills a table in shared memory, field by field, for the channels of a part. All threads must have
// read what stood there.
BNCPU_DEVICE void fill_table(const Parameters& p, const Part& part, T* table, bool has_totals) {
    for (int64 i = threadIdx.x; i < part.channels; i += blockDim.x) {
        const int64 c = part.c0 + i;
        const double mean = p.mean.get(c, 0), invstd = invstd_of(p, c);
        T* at = table + i;
        at[kMean * part.channels] = (T)mean;
        at[kMeanLow * part.channels] = low_part(mean);
        at[kInvstd * part.channels] = (T)invstd;
        at[kScale * part.channels] = (T)(p.gamma.get(c, 1) * invstd);
        at[kShift * part.channels] = (T)p.beta.get(c, 0);
        if (has_totals) {
            const Sums sums = p.totals()[c];
            const double mean_dy = sums.first / p.values();
            at[kMeanDy * part.channels] = (T)mean_dy;
            at[kMeanDyLow * part.channels] = low_part(mean_dy);
            at[kSlope * part.channels] = (T)(-invstd * (sums.second / p.values()));
        }
    }
    __syncthreads();
}

// The channel of lane i of a thread's vectors, within the tile. Where a tile has several channels a
// thread keeps to one vector of columns; lanes past the last column look at the last channel.
BNCPU_DEVICE int64 channel_of(const Parameters& p, const Part& part, const Walk& walk, int i) {
    if (!kTiled) return 0;
    return least((walk.first * V + i) / p.run, part.channels - 1);
}

struct Coefficients {
    T value[kFields][kSums];

    BNCPU_DEVICE Coefficients(const Parameters& p, const Part& part, const Walk& walk,
                              const T* table) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            const int64 c = channel_of(p, part, walk, i);
#pragma unroll
            for (int f = 0; f < kFields; ++f) value[f][i] = table[f * part.channels + c];
        }
    }
    BNCPU_DEVICE T at(Field f, int i) const { return value[f][kTiled ? i : 0]; }
    BNCPU_DEVICE T centred(T x, Field mean, Field low, int i) const {
        const T d = x - at(mean, i);
        return sizeof(T) == 8 ? d : d - at(low, i);  // the low part of a double is zero
    }

    // xhat = (x - mean) * invstd, what the parameter gradients are summed with.
    BNCPU_DEVICE T xhat(T x, int i) const {
        return centred(x, kMean, kMeanLow, i) * at(kInvstd, i);
    }

    // gamma * invstd * (x - mean) + beta; the difference first, never x * scale + (beta - ...).
    BNCPU_DEVICE T normalised(T x, int i) const {
        return fused(centred(x, kMean, kMeanLow, i), at(kScale, i), at(kShift, i));
    }

    // gamma * invstd * (dz - mean(dz) - xhat * mean(dz * xhat)), the last term being
    // slope * (x - mean); of constant statistics gamma * invstd * dz.
    BNCPU_DEVICE T gradient(T dz, T x, int i) const {
        return fused(centred(x, kMean, kMeanLow, i), at(kSlope, i),
                     centred(dz, kMeanDy, kMeanDyLow, i)) *
               at(kScale, i);
    }
    BNCPU_DEVICE T frozen_gradient(T dz, int i) const { return dz * at(kScale, i); }
};

// ---- Bits of the mask ---------------------------------------------------------------------------

// Whether z is not stored as zero behind ReLU; NaN is not.
BNCPU_DEVICE bool passes(T z) { return !(z <= Traits<Storage>::stored_as_zero); }

// The bits of a vector, lowest first, put together with those of the lanes beside it: a byte has
// those of 8 / V lanes, the first of which writes it. All threads of a warp come here.
BNCPU_DEVICE void write_bits(const Parameters& p, const Walk& walk, unsigned bits) {
    constexpr int kLanesOfByte = 8 / V;
#pragma unroll
    for (int lanes = 1; lanes < kLanesOfByte; lanes *= 2)
        bits |= __shfl_xor_sync(0xffffffffu, bits, lanes) << V * lanes;
    if (walk.valid() && walk.lane % kLanesOfByte == 0)
        p.mask[walk.bit(p) / 8] = (unsigned char)bits;
}

// The bits of a vector, whichever byte they begin in; what is above them is undefined.
BNCPU_DEVICE unsigned read_bits(const Parameters& p, const Walk& walk) {
    const int64 bit = walk.bit(p);
    const unsigned char* byte = p.mask + bit / 8;
    const int shift = (int)(bit % 8);
    unsigned bits = byte[0] >> shift;
    if (shift + V > 8) bits |= (unsigned)byte[1] << (8 - shift);
    return bits;
}

// Which values of a vector the activation let through forward, as bits. Without a mask the sign is
// computed again as the forward computed it.
BNCPU_DEVICE unsigned gate(const Parameters& p, const Walk& walk, const Coefficients& k, Packed x) {
    if (!p.relu) return ~0u;
    if (p.mask != nullptr) return read_bits(p, walk);
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) bits |= (unsigned)passes(k.normalised(widen(x.value[i]), i)) << i;
    return bits;
}

// dz: dy where it passes, to the bit, and 0 elsewhere.
BNCPU_DEVICE Packed gated(unsigned bits, Packed dy) {
#pragma unroll
    for (int i = 0; i < V; ++i)
        if ((bits >> i & 1) == 0) dy.value[i] = Storage{};
    return dy;
}

// ---- Moments ------------------------------------------------------------------------------------

// Sums in T will not do: squares of float that have overflowed, or lost digits below the normal
// range, or there is a NaN or Inf. Double must decide. About a pivot of ordinary size x - pivot is
// 0 or large enough to be squared.
BNCPU_DEVICE bool out_of_range(float pivot, float m2, float n) {
    return !(m2 <= 1e36f) || (m2 < n * 1e-28f && fabsf(pivot) < 1e-9f);
}
BNCPU_DEVICE bool out_of_range(double, double m2, double) { return !isfinite(m2); }

// Adds the moments of some lanes (bits) of n vectors, from a step on, by two passes in double, one
// lane after the other.
BNCPU_DEVICE void add_careful_moments(const Parameters& p, const Walk& from, int n, unsigned lanes,
                                      Sums* sums) {
#pragma unroll 1
    for (int i = 0; i < V; ++i) {
        if ((lanes >> i & 1) == 0) continue;
        double mean = 0, sum = 0;
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass) {
            Walk walk = from;
            sum = 0;
#pragma unroll 1
            for (int step = 0; step < kChunk; ++step, walk.next()) {
                if (!walk.valid()) continue;
                const double d = (double)widen(walk.at(p.x)[i]) - mean;
                sum += pass == 0 ? d : d * d;
            }
            if (pass == 0) mean = sum / n;
        }
        Sums& to = sums[kTiled ? i : 0];
        to = MergeMoments::of(to, {(double)n, mean, sum});
    }
}

// The moments of a thread's vectors: Welford's recurrence about a pivot in T, no more than kChunk
// steps of it, then merged in double. A pivot is a value, so that a constant channel has exactly
// its mean; and the recurrence subtracts nothing that an outlier as a pivot could cancel.
template <bool whole>
BNCPU_DEVICE void thread_moments(const Parameters& p, const Part& part, Stash stash, Sums* sums) {
    for (int i = 0; i < kSums; ++i) sums[i] = {0, 0, 0};
    Walk walk(p, part);
    const int64 steps = Walk::steps(p, part);
    for (int64 done = 0; done < steps; done += kChunk) {
        const Walk from = walk;
        T pivot[kSums] = {}, mean[V] = {}, m2[V] = {};
        int n = 0;
        for (int step = 0; step < kChunk && done + step < steps; step += kAhead) {
            Packed x[kAhead] = {};
            bool valid[kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u, walk.next()) {
                valid[u] = walk.valid();
                if (!valid[u]) continue;
                x[u] = load(walk.at(p.x));
                if (whole) stash.at(done + step + u) = bits_of<Word>(x[u]);
            }
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
                if (!valid[u]) continue;
                const Vector value = widen(x[u]);
                if (n == 0) {
#pragma unroll
                    for (int i = 0; i < kSums; ++i) pivot[i] = value.value[i];
                }
                const T share = reciprocal(++n, T());
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    const T about = value.value[i] - pivot[kTiled ? i : 0], d = about - mean[i];
                    mean[i] = fused(d, share, mean[i]);
                    m2[i] = fused(d, about - mean[i], m2[i]);
                }
            }
        }
        if (n == 0) continue;

        if (!kTiled) {  // one channel: its lanes have the same pivot and as many values
            T middle = 0, squares = 0;
#pragma unroll
            for (int i = 0; i < V; ++i) middle = fused(mean[i], (T)1 / V, middle);
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const T d = mean[i] - middle;
                squares += fused(d * d, (T)n, m2[i]);
            }
            mean[0] = middle;
            m2[0] = squares;
        }
        const int count = kTiled ? n : n * V;
        const double before = sums[0].count;
        const Weights weights(before, count);
        unsigned lost = 0;  // lanes; in one channel all of them or none
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            if (out_of_range(pivot[i], m2[i], (T)count)) {
                lost |= kTiled ? 1u << i : ~0u;
                continue;
            }
            const Sums chunk = {(double)count, (double)pivot[i] + (double)mean[i], (double)m2[i]};
            sums[i] = before == 0 ? chunk : merge_moments(weights, sums[i], chunk);
        }
        if (lost != 0) add_careful_moments(p, from, n, lost, sums);
    }
}

// ---- Parameter gradients ------------------------------------------------------------------------

BNCPU_DEVICE bool is_lost(float sum) { return !isfinite(sum); }
BNCPU_DEVICE bool is_lost(double) { return false; }

// Adds the sums of some lanes (bits) of a chunk in double, where they are beyond float (or where
// there is a NaN or Inf).
BNCPU_DEVICE void add_careful_gradients(const Parameters& p, const Part& part, const Walk& from,
                                        const Coefficients& k, unsigned lanes, Sums* sums) {
    Walk walk = from;
#pragma unroll 1
    for (int step = 0; step < kChunk; ++step, walk.next()) {
        if (!walk.valid()) continue;
        const unsigned bits = gate(p, walk, k, load(walk.at(p.x)));
#pragma unroll 1
        for (int i = 0; i < V; ++i) {
            if ((lanes >> i & 1) == 0) continue;
            const int64 c = part.c0 + channel_of(p, part, walk, i);
            const double x = widen(walk.at(p.x)[i]);
            const double dz = (bits >> i & 1) != 0 ? (double)widen(walk.at(p.dy)[i]) : 0;
            Sums& to = sums[kTiled ? i : 0];
            to.first += dz;
            to.second += dz * ((x - p.mean.get(c, 0)) * invstd_of(p, c));
        }
    }
}

// dx of some steps of a thread, and dresidual = dz where it is asked for.
template <bool whole, bool frozen>
BNCPU_DEVICE void thread_results(const Parameters& p, const Coefficients& k, Walk walk, int64 first,
                                 int64 steps, Stashes stashes) {
    for (int64 step = 0; step < steps; step += kAheadOfTwo) {
        Packed x[kAheadOfTwo] = {}, dy[kAheadOfTwo] = {};
        Walk behind = walk;
#pragma unroll
        for (int u = 0; u < kAheadOfTwo; ++u, walk.next()) {
            if (!walk.valid()) continue;
            if (whole) {
                x[u] = bits_of<Packed>(stashes.x.at(first + step + u));
                dy[u] = bits_of<Packed>(stashes.dy.at(first + step + u));
            } else {
                x[u] = load(walk.at(p.x));
                dy[u] = load(walk.at(p.dy));
            }
        }
#pragma unroll
        for (int u = 0; u < kAheadOfTwo; ++u, behind.next()) {
            if (!behind.valid()) continue;
            const Packed dz = gated(gate(p, behind, k, x[u]), dy[u]);
            if (p.dresidual.data != nullptr) store(behind.at(p.dresidual), dz);
            Packed dx;
#pragma unroll
            for (int i = 0; i < V; ++i) {
                const T value = widen(dz.value[i]);
                narrow(frozen ? k.frozen_gradient(value, i)
                              : k.gradient(value, widen(x[u].value[i]), i),
                       dx.value[i]);
            }
            store(behind.at(p.out), dx);
        }
    }
}

// sum dz and sum dz * xhat of a thread's vectors: no more than kChunk steps in T, then in double.
// Of constant statistics a chunk's results follow its sums: they may take the place of dy.
template <bool whole, bool frozen>
BNCPU_DEVICE void thread_gradients(const Parameters& p, const Part& part, const T* table,
                                   Stashes stashes, Sums* sums) {
    for (int i = 0; i < kSums; ++i) sums[i] = {0, 0, 0};
    Walk walk(p, part);
    const Coefficients k(p, part, walk, table);
    const int64 steps = Walk::steps(p, part);
    for (int64 done = 0; done < steps; done += kChunk) {
        const Walk from = walk;
        const int64 length = least((int64)kChunk, steps - done);
        T first[V] = {}, second[V] = {};
        for (int64 step = 0; step < length; step += kAheadOfTwo) {
            Packed x[kAheadOfTwo] = {}, dy[kAheadOfTwo] = {};
            Walk behind = walk;
#pragma unroll
            for (int u = 0; u < kAheadOfTwo; ++u, walk.next()) {
                if (!walk.valid()) continue;
                x[u] = load(walk.at(p.x));
                dy[u] = load(walk.at(p.dy));
                if (whole) {
                    stashes.x.at(done + step + u) = bits_of<Word>(x[u]);
                    stashes.dy.at(done + step + u) = bits_of<Word>(dy[u]);
                }
            }
#pragma unroll
            for (int u = 0; u < kAheadOfTwo; ++u, behind.next()) {
                if (!behind.valid()) continue;
                const Vector dz = widen(gated(gate(p, behind, k, x[u]), dy[u]));
                const Vector value = widen(x[u]);
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    first[i] += dz.value[i];
                    second[i] = fused(dz.value[i], k.xhat(value.value[i], i), second[i]);
                }
            }
        }
        if (!kTiled) {
#pragma unroll
            for (int i = 1; i < V; ++i) {
                first[0] += first[i];
                second[0] += second[i];
            }
        }
        unsigned lost = 0;  // lanes; in one channel all of them or none
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            if (is_lost(first[i]) || is_lost(second[i])) {
                lost |= kTiled ? 1u << i : ~0u;
                continue;
            }
            sums[i].first += (double)first[i];
            sums[i].second += (double)second[i];
        }
        if (lost != 0) add_careful_gradients(p, part, from, k, lost, sums);
        if (frozen) thread_results<false, true>(p, k, from, 0, length, stashes);
    }
}

// ---- Steps of a block ---------------------------------------------------------------------------

// Shared memory: the sums of every thread, the table of the tile's channels, and the stashes.
BNCPU_DEVICE Sums* shared_sums() { return (Sums*)shared_memory; }
BNCPU_DEVICE Sums* own_sums() { return shared_sums() + (int)threadIdx.x * kSums; }
BNCPU_DEVICE T* shared_table() { return (T*)(shared_sums() + (int)blockDim.x * kSums); }
BNCPU_DEVICE Stashes shared_stashes(const Parameters& p, const Part& part) {
    Word* words = (Word*)(shared_table() + (p.tile_channels * kFields + 3) / 4 * 4);
    return {{words}, {words + Walk::steps(p, part) * blockDim.x}};
}

// What threads have summed becomes the part's sums, or, where a tile has one part, is the end.
template <class Merge, class Finish>
BNCPU_DEVICE void leave_sums(const Parameters& p, const Part& part) {
    Sums* sums = shared_sums();
    const PlaceInTile place(p);
    merge_in_block<Merge>(sums, part.channels, place.per_channel(p), place);
    for (int64 i = threadIdx.x; i < part.channels; i += blockDim.x) {
        const int64 c = part.c0 + i;
        if (p.parts() == 1)
            Finish::of(p, c, sums[place(i, 0)]);
        else
            p.partials[c * p.parts() + part.index] = sums[place(i, 0)];
    }
    __syncthreads();  // they may go
}

// y = act(xhat * gamma + beta + residual) of a part, and its bits of the mask.
template <bool whole>
BNCPU_DEVICE void part_forward(const Parameters& p, const Part& part, Stash stash) {
    fill_table(p, part, shared_table(), false);
    Walk walk(p, part);
    const Coefficients k(p, part, walk, shared_table());
    const T floor = p.relu ? (T)0 : (T)bits_of<float>(0xff800000u);
    const bool has_residual = p.residual.data != nullptr;
    const bool writes_bits = p.mask != nullptr && p.mask_in_map;
    const int64 steps = Walk::steps(p, part);
    for (int64 step = 0; step < steps; step += kAhead) {
        Packed x[kAhead] = {}, residual[kAhead] = {};
        Walk behind = walk;
#pragma unroll
        for (int u = 0; u < kAhead; ++u, walk.next()) {
            if (!walk.valid()) continue;
            x[u] = whole ? bits_of<Packed>(stash.at(step + u)) : load(walk.at(p.x));
            if (has_residual) residual[u] = load(walk.at(p.residual));
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u, behind.next()) {
            Packed y;
            unsigned bits = 0;
#pragma unroll
            for (int i = 0; i < V; ++i) {
                T z = k.normalised(widen(x[u].value[i]), i);
                if (has_residual) z += widen(residual[u].value[i]);
                bits |= (unsigned)passes(z) << i;
                narrow(floor > z ? floor : z, y.value[i]);
            }
            if (behind.valid()) store(behind.at(p.out), y);
            if (writes_bits) write_bits(p, behind, bits);
        }
    }
    __syncthreads();  // the table may go
}

template <bool whole>
BNCPU_DEVICE void part_backward(const Parameters& p, const Part& part, Stashes stashes) {
    fill_table(p, part, shared_table(), true);
    const Walk walk(p, part);
    const Coefficients k(p, part, walk, shared_table());
    thread_results<whole, false>(p, k, walk, 0, Walk::steps(p, part), stashes);
    __syncthreads();  // the table may go
}

template <bool whole, bool frozen>
BNCPU_DEVICE void part_sums(const Parameters& p, const Part& part, Stashes stashes) {
    fill_table(p, part, shared_table(), false);
    thread_gradients<whole, frozen>(p, part, shared_table(), stashes, own_sums());
    leave_sums<AddGradients, FinishGradients>(p, part);
}

// ---- Entry points -------------------------------------------------------------------------------

// step(part) for the parts of a block. Results are made from the last part to the first: what was
// summed last is what the L2 cache still has.
template <class Step>
BNCPU_DEVICE void for_parts(const Parameters& p, bool backwards, Step step) {
    const int64 items = p.tiles * p.parts();
    for (int64 i = blockIdx.x; i < items; i += gridDim.x)
        step(Part(p, backwards ? items - 1 - i : i));
}

// One channel at a time, from the sums of its parts.
template <class Merge, class Finish>
BNCPU_DEVICE void merge_parts(const Parameters& p) {
    Sums* shared = shared_sums();
    for (int64 c = blockIdx.x; c < p.channels; c += gridDim.x) {
        Sums sums = {0, 0, 0};
        for (int64 i = threadIdx.x; i < p.parts(); i += blockDim.x)
            sums = Merge::of(sums, p.partials[c * p.parts() + i]);
        shared[threadIdx.x] = sums;
        merge_in_block<Merge>(shared, 1, blockDim.x, [](int64, int q) { return q; });
        if (threadIdx.x == 0) Finish::of(p, c, shared[0]);
        __syncthreads();
    }
}

#define BNCPU_KERNEL extern "C" __global__ void __launch_bounds__(256, 2)

BNCPU_KERNEL sum_moments(const Parameters p) {
    for_parts(p, false, [&](const Part& part) {
        thread_moments<false>(p, part, Stash{}, own_sums());
        leave_sums<MergeMoments, FinishMoments>(p, part);
    });
}

BNCPU_KERNEL merge_moments(const Parameters p) { merge_parts<MergeMoments, FinishMoments>(p); }

BNCPU_KERNEL map_forward(const Parameters p) {
    for_parts(p, true, [&](const Part& part) { part_forward<false>(p, part, Stash{}); });
}

BNCPU_KERNEL train_tile(const Parameters p) {
    for_parts(p, false, [&](const Part& part) {
        const Stash stash = shared_stashes(p, part).x;
        thread_moments<true>(p, part, stash, own_sums());
        leave_sums<MergeMoments, FinishMoments>(p, part);
        part_forward<true>(p, part, stash);
    });
}

BNCPU_KERNEL sum_gradients(const Parameters p) {
    for_parts(p, false, [&](const Part& part) { part_sums<false, false>(p, part, Stashes{}); });
}

BNCPU_KERNEL merge_gradients(const Parameters p) { merge_parts<AddGradients, FinishGradients>(p); }

BNCPU_KERNEL map_backward(const Parameters p) {
    for_parts(p, true, [&](const Part& part) { part_backward<false>(p, part, Stashes{}); });
}

BNCPU_KERNEL frozen_backward(const Parameters p) {
    for_parts(p, false, [&](const Part& part) { part_sums<false, true>(p, part, Stashes{}); });
}

BNCPU_KERNEL backward_tile(const Parameters p) {
    for_parts(p, false, [&](const Part& part) {
        const Stashes stashes = shared_stashes(p, part);
        part_sums<true, false>(p, part, stashes);
        part_backward<true>(p, part, stashes);
    });
}

// The mask of a y whose bytes no thread had whole: a thread reads the eight values of a byte.
BNCPU_KERNEL pack_mask(const Parameters p) {
    const int64 values = p.rows * p.channels * p.run;
    const int64 stride = (int64)gridDim.x * blockDim.x;
    for (int64 byte = (int64)blockIdx.x * blockDim.x + threadIdx.x; byte * 8 < values;
         byte += stride) {
        const int64 first = byte * 8, row = first / p.run;
        int64 s = first % p.run, c = row % p.channels, k = row / p.channels;
        unsigned bits = 0;
        for (int i = 0; i < 8 && first + i < values; ++i) {
            bits |= (unsigned)(widen(p.out.at(k, c)[s]) != 0) << i;
            if (++s < p.run) continue;
            s = 0;
            if (++c < p.channels) continue;
            c = 0;
            ++k;
        }
        p.mask[byte] = (unsigned char)bits;
    }
}
