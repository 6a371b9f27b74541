// The kernels, compiled for the emulator: launched by name, and the layout of their parameters.
#include "emulator.hpp"
#include BNCPU_KERNELS

#include <cstddef>

namespace {

template <void (*entry)(Parameters)>
void call(const void* given) {
    entry(*(const Parameters*)given);
}

struct Entry {
    const char* name;
    void (*call)(const void*);
};
constexpr Entry kEntries[] = {
    {"sum_moments", call<sum_moments>},     {"merge_moments", call<merge_moments>},
    {"map_forward", call<map_forward>},     {"train_tile", call<train_tile>},
    {"sum_gradients", call<sum_gradients>}, {"merge_gradients", call<merge_gradients>},
    {"map_backward", call<map_backward>},   {"frozen_backward", call<frozen_backward>},
    {"backward_tile", call<backward_tile>}, {"pack_mask", call<pack_mask>},
};

}  // namespace

extern "C" const char* emulate(const char* name, const void* parameters, unsigned grid,
                               unsigned block, size_t shared, unsigned seed,
                               unsigned char* stacks) {
    for (const Entry& entry : kEntries)
        if (std::strcmp(entry.name, name) == 0)
            return emulator::launch(entry.call, parameters, grid, block, shared, seed, stacks);
    return "there is no such entry point";
}

// Bytes of memory that a launch wants for the stacks of its threads.
extern "C" size_t stack_bytes() {
    return (size_t)emulator::kResident * emulator::kMostThreads * emulator::kStackBytes;
}

// Offsets of the fields of Parameters, of Array and of Values, in order, and the sizes of the
// three.
extern "C" const long* layout() {
    static const long offsets[] = {
        offsetof(Parameters, x),
        offsetof(Parameters, residual),
        offsetof(Parameters, dy),
        offsetof(Parameters, out),
        offsetof(Parameters, dresidual),
        offsetof(Parameters, mean),
        offsetof(Parameters, var),
        offsetof(Parameters, invstd),
        offsetof(Parameters, m2),
        offsetof(Parameters, gamma),
        offsetof(Parameters, beta),
        offsetof(Parameters, dgamma),
        offsetof(Parameters, dbeta),
        offsetof(Parameters, running_mean),
        offsetof(Parameters, running_var),
        offsetof(Parameters, mask),
        offsetof(Parameters, partials),
        offsetof(Parameters, eps),
        offsetof(Parameters, momentum),
        offsetof(Parameters, rows),
        offsetof(Parameters, channels),
        offsetof(Parameters, run),
        offsetof(Parameters, tile_channels),
        offsetof(Parameters, tiles),
        offsetof(Parameters, row_parts),
        offsetof(Parameters, part_rows),
        offsetof(Parameters, column_parts),
        offsetof(Parameters, part_vectors),
        offsetof(Parameters, lanes),
        offsetof(Parameters, row_lanes),
        offsetof(Parameters, relu),
        offsetof(Parameters, mask_in_map),
        sizeof(Parameters),
        offsetof(Array, data),
        offsetof(Array, row),
        offsetof(Array, channel),
        sizeof(Array),
        offsetof(Values, data),
        offsetof(Values, step),
        offsetof(Values, wide),
        sizeof(Values),
        -1,
    };
    return offsets;
}
