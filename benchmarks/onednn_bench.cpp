// oneDNN's batch normalisation as a contender: a process that takes its turn when told to.
//
//   onednn_bench N,C,H,W [float32|bfloat16] [threads] [bytes to rotate over]
//
// Reads lines "OPERATION LAYOUT SECONDS" from stdin, for example
//
//   train nChw16c 0.02
//
// runs that operation for about so long on the next arrays in turn, and answers each line with one
// of JSON: {"median": seconds, "seconds": [of each run]}, or {"error": "why not"}. Operations:
// train, infer, backward, each also with _relu; layouts: nchw, nhwc, nChw16c. bncpu's measuring
// lets it alternate with the other contenders; it is built and driven by onednn.py.
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "oneapi/dnnl/dnnl.hpp"

namespace {

using dnnl::memory;
using Forward = dnnl::batch_normalization_forward;
using Backward = dnnl::batch_normalization_backward;
using Flags = dnnl::normalization_flags;

constexpr float kEps = 1e-5f;

// Memory as NumPy gets it for large arrays: huge pages asked for, and there before the clock runs.
void* allocate(size_t bytes) {
    constexpr size_t kHuge = size_t{1} << 21;
    const size_t unit = bytes < kHuge ? 64 : kHuge;
    const size_t rounded = (bytes + unit - 1) / unit * unit;
    void* found = std::aligned_alloc(unit, rounded);
    if (!found) throw std::bad_alloc();
#ifdef __linux__
    if (unit == kHuge) madvise(found, rounded, MADV_HUGEPAGE);
#endif
    std::memset(found, 0, rounded);
    return found;
}

struct Arrays {
    void *x, *dy, *out;
};

// The primitive of one operation in one layout, and everything but x, dy and out that it is given.
struct Primitive {
    dnnl::primitive primitive;
    std::unordered_map<int, memory> arguments;
    memory::desc data;
    bool backward;
};

class Bench {
   public:
    Bench(const memory::dims& shape, memory::data_type type, size_t rotate)
        : shape_(shape), type_(type), engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {
        // nChw16c rounds the channels up.
        size_t size = (shape[1] + 15) / 16 * 16;
        for (size_t axis : {0, 2, 3}) size *= shape[axis];
        const size_t bytes = size * memory::data_type_size(type);
        const size_t sets =
            std::max<size_t>(1, std::min<size_t>((rotate + bytes - 1) / bytes, 512));
        for (size_t i = 0; i < sets; ++i) {
            sets_.push_back({allocate(bytes), allocate(bytes), allocate(bytes)});
            fill(sets_.back().x, size);
            fill(sets_.back().dy, size);
        }
    }

    std::vector<double> turn(const std::string& operation, const std::string& layout,
                             double seconds) {
        Primitive& made = primitive(operation, layout);
        double now = run(made);  // warms up, and counts where it is all that fits the time
        if (now > seconds) return {now};
        std::vector<double> taken;
        const double end = clock() + seconds;
        do taken.push_back(run(made));
        while (clock() < end);
        return taken;
    }

   private:
    static double clock() {
        using namespace std::chrono;
        return duration<double>(steady_clock::now().time_since_epoch()).count();
    }

    void fill(void* to, size_t size) const {
        uint32_t state = 1;
        for (size_t i = 0; i < size; ++i) {
            state = state * 1664525u + 1013904223u;
            const float value = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-30f;
            if (type_ == memory::data_type::f32)
                static_cast<float*>(to)[i] = value;
            else {  // bfloat16, by truncation
                uint32_t bits;
                std::memcpy(&bits, &value, 4);
                static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(bits >> 16);
            }
        }
    }

    double run(Primitive& made) {
        const Arrays& set = sets_[++turn_ % sets_.size()];
        made.arguments[DNNL_ARG_SRC].set_data_handle(set.x);
        if (made.backward) {
            made.arguments[DNNL_ARG_DIFF_DST].set_data_handle(set.dy);
            made.arguments[DNNL_ARG_DIFF_SRC].set_data_handle(set.out);
        } else {
            made.arguments[DNNL_ARG_DST].set_data_handle(set.out);
        }
        const double begin = clock();
        made.primitive.execute(stream_, made.arguments);
        stream_.wait();
        return clock() - begin;
    }

    Primitive& primitive(const std::string& operation, const std::string& layout) {
        Primitive& made = made_[operation + " " + layout];
        if (!made.primitive) make(made, operation, layout);
        return made;
    }

    void make(Primitive& made, const std::string& operation, const std::string& layout) {
        static const std::map<std::string, memory::format_tag> tags = {
            {"nchw", memory::format_tag::nchw},
            {"nhwc", memory::format_tag::nhwc},
            {"nChw16c", memory::format_tag::nChw16c}};
        const std::string function = operation.substr(0, operation.find('_'));
        const bool relu = function != operation;
        if (relu && operation != function + "_relu") throw std::invalid_argument("no such form");
        if (function != "train" && function != "infer" && function != "backward")
            throw std::invalid_argument("no such operation");
        made.backward = function == "backward";
        made.data = memory::desc(shape_, type_, tags.at(layout));
        const memory::desc vector({shape_[1]}, memory::data_type::f32, memory::format_tag::a);
        Flags flags = Flags::use_scale | Flags::use_shift;
        if (relu) flags = flags | Flags::fuse_norm_relu;
        if (function == "infer") flags = flags | Flags::use_global_stats;
        const auto kind = function == "infer" ? dnnl::prop_kind::forward_inference
                                              : dnnl::prop_kind::forward_training;
#if DNNL_VERSION_MAJOR >= 3
        const Forward::primitive_desc forward(engine_, kind, made.data, made.data, kEps, flags);
#else
        const Forward::primitive_desc forward({kind, made.data, kEps, flags}, engine_);
#endif
        auto& arguments = made.arguments;
        for (int name : {DNNL_ARG_SCALE, DNNL_ARG_SHIFT, DNNL_ARG_MEAN, DNNL_ARG_VARIANCE})
            arguments[name] = ones(vector);
        for (int name : {DNNL_ARG_SRC, DNNL_ARG_DST})
            arguments[name] = memory(made.data, engine_, nullptr);
        if (relu && function != "infer") {
            memory signs(forward.workspace_desc(), engine_);
            // Pages that nobody has written are all the same one, in the cache.
            std::memset(signs.get_data_handle(), 1, signs.get_desc().get_size());
            arguments[DNNL_ARG_WORKSPACE] = signs;
        }
        if (!made.backward) {
            made.primitive = Forward(forward);
            return;
        }
        const auto both = dnnl::prop_kind::backward;
#if DNNL_VERSION_MAJOR >= 3
        const Backward::primitive_desc backward(engine_, both, made.data, made.data, made.data,
                                                kEps, flags, forward);
#else
        const Backward::primitive_desc backward({both, made.data, made.data, kEps, flags}, engine_,
                                                forward);
#endif
        arguments.erase(DNNL_ARG_DST);
        for (int name : {DNNL_ARG_DIFF_DST, DNNL_ARG_DIFF_SRC})
            arguments[name] = memory(made.data, engine_, nullptr);
        for (int name : {DNNL_ARG_DIFF_SCALE, DNNL_ARG_DIFF_SHIFT}) arguments[name] = ones(vector);
        made.primitive = Backward(backward);
    }

    memory ones(const memory::desc& vector) {
        memory made(vector, engine_);
        std::fill_n(static_cast<float*>(made.get_data_handle()), shape_[1], 1.0f);
        return made;
    }

    memory::dims shape_;
    memory::data_type type_;
    dnnl::engine engine_;
    dnnl::stream stream_;
    std::vector<Arrays> sets_;
    size_t turn_ = 0;
    std::map<std::string, Primitive> made_;
};

memory::dims read_shape(const std::string& text) {
    memory::dims shape;
    std::istringstream parts(text);
    for (std::string part; std::getline(parts, part, ',');) shape.push_back(std::stoll(part));
    if (shape.size() != 4 || *std::min_element(shape.begin(), shape.end()) < 1)
        throw std::invalid_argument("shape: expected N,C,H,W; got " + text);
    return shape;
}

void answer(Bench& bench, const std::string& line) {
    std::istringstream words(line);
    std::string operation, layout;
    double seconds = 0;
    try {
        if (!(words >> operation >> layout >> seconds))
            throw std::invalid_argument("expected OPERATION LAYOUT SECONDS");
        std::vector<double> taken = bench.turn(operation, layout, seconds);
        std::vector<double> sorted = taken;
        std::sort(sorted.begin(), sorted.end());
        std::printf("{\"median\": %.9g, \"seconds\": [", sorted[sorted.size() / 2]);
        for (size_t i = 0; i < taken.size(); ++i) std::printf("%s%.9g", i ? ", " : "", taken[i]);
        std::printf("]}\n");
    } catch (const std::exception& error) {
        std::printf("{\"error\": \"%s\"}\n", error.what());
    }
    std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) try {
    if (argc < 2) throw std::invalid_argument("which shape? N,C,H,W");
    const std::string type = argc > 2 ? argv[2] : "float32";
    if (type != "float32" && type != "bfloat16")
        throw std::invalid_argument("dtype: expected float32 or bfloat16; got " + type);
    if (argc > 3) omp_set_num_threads(std::stoi(argv[3]));
    Bench bench(read_shape(argv[1]),
                type == "float32" ? memory::data_type::f32 : memory::data_type::bf16,
                argc > 4 ? std::stoull(argv[4]) : 0);
    const dnnl_version_t* version = dnnl_version();
    std::printf("{\"version\": \"%d.%d.%d\", \"threads\": %d}\n", version->major, version->minor,
                version->patch, omp_get_max_threads());
    std::fflush(stdout);
    for (std::string line; std::getline(std::cin, line);) answer(bench, line);
} catch (const std::exception& error) {
    std::fprintf(stderr, "onednn_bench: %s\n", error.what());
    return 2;
}
