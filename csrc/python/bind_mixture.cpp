// A mixture of experts for Python: arguments in, choices sorted by expert, one call with the interpreter released.
#include "python/bind_layers.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/mixture.hpp"

namespace upcast {
namespace {

bool check_choices(const Tensor &out, const Tensor &x, const Tensor &indices, const Tensor &weights) {
    if (!require_type(x, Type::float32) || !require_dims(x, 2) || !require_contiguous(x)) return false;
    if (!require_type(out, Type::float32) || !require_shape(out, x, x.shape[1]) || !require_contiguous(out)) return false;
    if (!require_type(indices, Type::int64) || !require_dims(indices, 2) || !require_contiguous(indices)) return false;
    if (!require_type(weights, Type::float32) || !require_dims(weights, 2) || !require_contiguous(weights)) return false;
    const bool fits = indices.shape[0] == x.shape[0] && weights.shape[0] == x.shape[0] && weights.shape[1] == indices.shape[1];
    return fits || refuse("the choices do not fit x; indices and weights must be (T, k) for x (T, C). Check the shapes.");
}

bool check_residual(const Tensor &residual, const Tensor &x) {
    if (!residual.present) return true;
    return require_type(residual, Type::float32) && require_shape(residual, x, x.shape[1]) && require_contiguous(residual);
}

// What is sorted by expert, in one allocation; without memory `data` is null.
class Choices {
  public:
    Choices(int64_t experts, int64_t choices)
        : data(malloc(static_cast<size_t>(experts) * (sizeof(int64_t) + sizeof(Expert)) +
                      static_cast<size_t>(choices) * (sizeof(int64_t) + sizeof(float)) + sizeof(int64_t))) {
        if (!data) return;
        chosen = static_cast<Expert *>(data);
        ends = reinterpret_cast<int64_t *>(chosen + experts);
        rows = ends + experts + 1;
        weights = reinterpret_cast<float *>(rows + choices);
    }
    ~Choices() { free(data); }
    Choices(const Choices &) = delete;
    Choices &operator=(const Choices &) = delete;

    // Sorts `count` choices, `each` of them for a row; afterwards expert e has those from ends[e - 1] (0) to ends[e].
    void sort(const int64_t *indices, const float *given, int64_t count, int64_t each, int64_t experts) {
        for (int64_t e = 0; e <= experts; ++e) ends[e] = 0;
        for (int64_t i = 0; i < count; ++i) ++ends[indices[i] + 1];
        for (int64_t e = 1; e <= experts; ++e) ends[e] += ends[e - 1];
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = ends[indices[i]]++;
            rows[at] = i / each, weights[at] = given[i];
        }
    }

    void *const data;
    Expert *chosen = nullptr;
    int64_t *ends = nullptr, *rows = nullptr;
    float *weights = nullptr;
};

bool check_indices(const int64_t *indices, int64_t count, int64_t experts) {
    for (int64_t i = 0; i < count; ++i) {
        if (indices[i] >= 0 && indices[i] < experts) continue;
        PyErr_Format(error_class(), "expert %lld was chosen among %lld; they are counted from 0. Check the routing.",
                     static_cast<long long>(indices[i]), static_cast<long long>(experts));
        return false;
    }
    return true;
}

bool read_expert(PyObject *object, Expert &expert, int64_t width) {
    PyObject *items[3];
    if (!read_items(object, items, 3, "an expert") || !read_matrix(items[0], expert.gate, EXPERT[0])) return false;
    if (!read_matrix(items[1], expert.up, EXPERT[1]) || !read_matrix(items[2], expert.down, EXPERT[2])) return false;
    const Matrix &gate = expert.gate, &up = expert.up, &down = expert.down;
    const bool fits = gate.columns == width && up.columns == width && up.rows == gate.rows && down.rows == width &&
                      down.columns == gate.rows;
    return fits || refuse("an expert's matrices do not fit x or one another; gate and up are (I, C), down is (C, I). Check "
                          "the shapes.");
}

// The experts that have choices, after `choices` was sorted; how many, or -1.
int64_t read_chosen(PyObject *experts, int64_t all, int64_t width, Choices &choices) {
    int64_t count = 0;
    for (int64_t e = 0, begin = 0; e < all; begin = choices.ends[e++]) {
        if (choices.ends[e] == begin) continue;
        Expert &expert = choices.chosen[count++] = Expert{};
        expert.begin = begin, expert.end = choices.ends[e];
        if (!read_expert(PyTuple_GetItem(experts, static_cast<Py_ssize_t>(e)), expert, width)) return -1;
        if (expert.gate.rows == choices.chosen->gate.rows) continue;
        refuse("experts of several widths; all have the same. Use the layers one by one.");
        return -1;
    }
    return count;
}

} // namespace

// mixture(out, x, indices, weights, threads, activation, experts, residual | None)
PyObject *py_mixture(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!take_count("mixture", count, 8)) return nullptr;
    Tensor out("out"), x("x"), indices("indices"), weights("weights"), residual("residual");
    int threads;
    Mixture call = {};
    if (!read_tensor(args[0], out) || !read_tensor(args[1], x) || !read_tensor(args[2], indices)) return nullptr;
    if (!read_tensor(args[3], weights) || !read_threads(args[4], threads)) return nullptr;
    if (!read_activation(args[5], call.activation) || !read_tensor(args[7], residual, true)) return nullptr;
    if (!check_choices(out, x, indices, weights) || !check_residual(residual, x)) return nullptr;
    const int64_t all = PyTuple_Check(args[6]) ? PyTuple_Size(args[6]) : -1;
    if (all < 0 && !refuse("experts must be a tuple. Check the arguments.")) return nullptr;
    const Integers given(indices);
    Choices choices(all, indices.count());
    if (!given.data || !choices.data) return PyErr_NoMemory();
    if (!check_indices(given.data, indices.count(), all)) return nullptr;
    choices.sort(given.data, weights.as<const float>(), indices.count(), indices.shape[1], all);
    call.count = read_chosen(args[6], all, x.shape[1], choices);
    if (call.count < 0) return nullptr;
    call.x = x.as<const float>();
    call.residual = residual.as<const float>();
    call.out = out.as<float>();
    call.rows = x.shape[0];
    call.width = x.shape[1];
    call.hidden = call.count ? choices.chosen->gate.rows : 0;
    call.experts = choices.chosen;
    call.chosen_by = choices.rows;
    call.weights = choices.weights;
    const Level &level = current_level();
    Outcome outcome;
    {
        const Released released;
        outcome = launch_mixture(level, call, threads);
    }
    return finish(outcome);
}

namespace {

bool check_route(const Tensor &normed, const Tensor &indices, const Tensor &weights, const Tensor &x, const Route &route) {
    if (!check_choices(normed, x, indices, weights)) return false;
    const bool fits = route.gate.columns == route.width && route.chosen > 0 && route.chosen <= route.gate.rows;
    return fits || refuse("the gate does not fit x or the choices; it is (E, C), for 1 to E of E experts. Check the shapes.");
}

} // namespace

// route(normed, indices, weights, x, threads, norm, gate)
PyObject *py_route(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!take_count("route", count, 7)) return nullptr;
    Tensor normed("normed"), indices("indices"), weights("weights"), x("x");
    int threads;
    Route call = {};
    if (!read_tensor(args[0], normed) || !read_tensor(args[1], indices) || !read_tensor(args[2], weights)) return nullptr;
    if (!read_tensor(args[3], x) || !read_threads(args[4], threads) || !require_dims(x, 2)) return nullptr;
    call.width = x.shape[1];
    if (!read_norm(args[5], call.norm, call.width) || !read_matrix(args[6], call.gate, "gate")) return nullptr;
    if (!require_dims(indices, 2)) return nullptr;
    call.chosen = indices.shape[1];
    if (!check_route(normed, indices, weights, x, call)) return nullptr;
    call.x = x.as<const float>();
    call.rows = x.shape[0];
    call.normed = normed.as<float>();
    call.indices = indices.as<int64_t>();
    call.weights = weights.as<float>();
    const Level &level = current_level();
    Outcome outcome;
    {
        const Released released;
        outcome = launch_route(level, call, threads);
    }
    return finish(outcome);
}

} // namespace upcast
