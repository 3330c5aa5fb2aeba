// A transformer block for Python: arguments in, checks, one call with the interpreter released.
#include "python/bind.hpp"
#include "runtime/block.hpp"
#include "runtime/dispatch.hpp"

#include <stdlib.h>

namespace upcast {
namespace {

bool refuse(const char *message) {
    PyErr_SetString(error_class(), message);
    return false;
}

// The arguments of one call, taken in order.
class Arguments {
  public:
    explicit Arguments(PyObject *const *args) : next_(args) {}

    bool tensor(Tensor &tensor, bool optional = false) { return read_tensor(*next_++, tensor, optional); }
    bool integer(int64_t &value) { return read_integer(*next_++, value); }
    bool number(float &value) { return read_float(*next_++, value); }
    bool flag(bool &value) { return read_bool(*next_++, value); }
    bool threads(int &value) { return read_threads(*next_++, value); }

    // weight, bias | None. An absent weight, where allowed, gives a matrix without rows.
    bool matrix(Matrix &matrix, const char *name, bool optional = false) {
        Tensor weight(name), bias("bias");
        if (!tensor(weight, optional) || !tensor(bias, true)) return false;
        if (!weight.present) return true;
        if (!require_type(weight, Type::float16) || !require_dims(weight, 2) || !require_adjacent(weight)) return false;
        matrix = {weight.as<const uint16_t>(), weight.strides[0], bias.as<const float>(), weight.shape[0],
                  weight.shape[1]};
        return vector(bias, matrix.rows);
    }

    // weight | None, bias | None, kind, eps, offset.
    bool norm(BlockNorm &norm, int64_t width) {
        Tensor weight("norm weight"), bias("norm bias");
        int64_t kind;
        if (!tensor(weight, true) || !tensor(bias, true) || !integer(kind)) return false;
        if (!number(norm.eps) || !number(norm.offset)) return false;
        if (kind < 0 || kind > 2) return refuse("unknown norm; a block has none, RMSNorm or LayerNorm. Use one.");
        norm.kind = static_cast<NormKind>(kind);
        norm.weight = weight.as<const float>();
        norm.bias = bias.as<const float>();
        return vector(weight, width) && vector(bias, width);
    }

  private:
    static bool vector(const Tensor &vector, int64_t width) {
        if (!vector.present) return true;
        if (!require_type(vector, Type::float32) || !require_dims(vector, 1) || !require_contiguous(vector)) return false;
        return vector.shape[0] == width || refuse("a vector of the block has another length than its matrix or norm; "
                                                  "they must agree. Check the shapes.");
    }

    PyObject *const *next_;
};

bool check_activations(const Tensor &out, const Tensor &x, Block &block) {
    if (!require_type(x, Type::float32) || !require_dims(x, 3) || !require_contiguous(x)) return false;
    if (!require_type(out, Type::float32) || !require_dims(out, 3) || !require_contiguous(out)) return false;
    const bool some = out.shape[1] <= x.shape[1] && (out.shape[1] > 0 || x.shape[1] == 0);
    const bool fits = some && out.shape[0] == x.shape[0] && out.shape[2] == x.shape[2];
    if (!fits) return refuse("out does not fit x; it must be (B, T, C), or of the last positions. Check the shapes.");
    block.x = x.as<const float>();
    block.out = out.as<float>();
    block.batch = x.shape[0];
    block.time = x.shape[1];
    block.last = out.shape[1];
    block.width = x.shape[2];
    return true;
}

// Floats that lie between the operations, as `Workspace` has them, and rows of a matrix: products must not overflow.
bool check_room(const Block &b) {
    const double rows = static_cast<double>(b.batch) * static_cast<double>(b.time);
    const double heads = (static_cast<double>(b.heads) + 2 * static_cast<double>(b.groups)) * static_cast<double>(b.head_width);
    const double width = 5 * static_cast<double>(b.width) + 4 * heads + 2 * static_cast<double>(b.gate.rows);
    return (rows < MOST_ELEMENTS && heads < MOST_ELEMENTS && rows * width < MOST_ELEMENTS) ||
           refuse("the block is larger than any memory; B * T rows of all heads may have up to 2^46 numbers. Check the "
                  "shapes.");
}

bool check_matrices(const Block &b) {
    if (!check_room(b)) return false;
    const int64_t heads = b.heads * b.head_width, groups = b.groups * b.head_width;
    const bool known = b.heads > 0 && b.groups > 0 && b.head_width > 0 && b.heads % b.groups == 0;
    const bool apart = b.key.weight || b.value.weight;
    const bool others = !apart || (b.key.rows == groups && b.key.columns == b.width && b.value.rows == groups &&
                                   b.value.columns == b.width);
    const bool attention = known && others && b.qkv.rows == (apart ? heads : heads + 2 * groups) &&
                           b.qkv.columns == b.width && b.proj.rows == b.width && b.proj.columns == heads;
    const bool up = !b.up.weight || (b.up.rows == b.gate.rows && b.up.columns == b.width);
    const bool mlp = b.gate.columns == b.width && b.down.rows == b.width && b.down.columns == b.gate.rows;
    return (attention && up && mlp) || refuse("the matrices of the block do not fit its heads and one another. Check "
                                              "the shapes.");
}

// [time, turned], or [1 or batch, time, turned]; the elements of a row adjacent.
bool check_angle(const Tensor &angles, const Block &b, int64_t &turned, int64_t &batch_stride, int64_t &stride) {
    if (!require_type(angles, Type::float32)) return false;
    if (angles.ndim != 3 && !require_dims(angles, 2)) return false;
    const int64_t *shape = angles.shape + angles.ndim - 2, *strides = angles.strides + angles.ndim - 2;
    const bool all_rows = angles.ndim == 2 || angles.shape[0] == 1;
    turned = shape[1];
    stride = strides[0];
    batch_stride = all_rows ? 0 : angles.strides[0];
    const bool fits = shape[0] == b.time && (turned <= 1 || strides[1] == 1) && (all_rows || angles.shape[0] == b.batch);
    return fits || refuse("cos and sin do not fit x; they must be ([B,] T, n), rows contiguous. Check the shapes.");
}

bool check_angles(const Tensor &cosine, const Tensor &sine, Block &b) {
    int64_t turned;
    if (!check_angle(cosine, b, b.turned, b.cosine_batch, b.cosine_stride)) return false;
    if (!check_angle(sine, b, turned, b.sine_batch, b.sine_stride)) return false;
    if (turned != b.turned) return refuse("cos and sin turn different numbers of elements. Check the shapes.");
    if (b.turned % 2 != 0 || b.turned > b.head_width) {
        return refuse("cos turns an odd number of elements, or more than a head has; heads are turned in pairs. Check "
                      "the shapes.");
    }
    b.cosine = cosine.as<const float>();
    b.sine = sine.as<const float>();
    return true;
}

bool check_cache(const Tensor &cache, const Block &b) {
    if (cache.type != Type::float16 && !require_type(cache, Type::float32)) return false;
    if (!require_dims(cache, 4)) return false;
    const bool shape = cache.shape[0] == b.batch && cache.shape[1] == b.groups && cache.shape[3] == b.head_width &&
                       (b.head_width <= 1 || cache.strides[3] == 1);
    if (!shape) return refuse("the cache does not fit the block; it must be (B, Hkv, S, D). Check the shapes.");
    // Differences, since sums of what a caller passes may overflow.
    const bool inside = b.time <= cache.shape[2] && b.write >= 0 && b.write <= cache.shape[2] - b.time &&
                        b.start >= 0 && b.start <= cache.shape[2] - b.time;
    return inside || refuse("the positions do not lie in the cache; make the cache longer.");
}

bool check_caches(const Tensor &keys, const Tensor &values, Block &b) {
    if (keys.present != values.present) return refuse("one cache of two is missing; pass both or none.");
    if (!keys.present) return b.start == 0 || refuse("positions after the first need a cache; pass one.");
    if (!check_cache(keys, b) || !check_cache(values, b) || !require_type(values, keys.type)) return false;
    b.keys = keys.data;
    b.values = values.data;
    b.key_batch = keys.strides[0];
    b.key_head = keys.strides[1];
    b.key_stride = keys.strides[2];
    b.value_batch = values.strides[0];
    b.value_head = values.strides[1];
    b.value_stride = values.strides[2];
    b.wide = keys.type == Type::float32;
    return true;
}

bool read_sizes(Arguments &args, Block &b) {
    int64_t activation, part;
    if (!args.integer(part) || !args.integer(b.heads) || !args.integer(b.groups) || !args.integer(b.head_width)) return false;
    if (!args.flag(b.norm_heads) || !args.flag(b.parallel) || !args.flag(b.shared)) return false;
    if (!args.integer(activation) || !args.number(b.scale) || !args.number(b.softcap)) return false;
    if (!args.integer(b.window)) return false;
    if (part < 0 || part > 3) return refuse("unknown part; a block has 0 (all of it) to 3. Use one.");
    b.part = static_cast<BlockPart>(part);
    if (b.part == BlockPart::both && !b.parallel) return refuse("both branches at once, of a block whose MLP reads what "
                                                                "attention gave; take one after the other.");
    if (activation < 0 || activation > 2) return refuse("unknown activation; use silu, gelu or gelu_tanh.");
    if (b.window < 0 || b.softcap < 0) return refuse("window or softcap is negative; 0 stands for none.");
    b.activation = static_cast<Activation>(activation);
    return true;
}

bool read_matrices(Arguments &args, Block &b) {
    return args.matrix(b.qkv, "qkv") && args.matrix(b.key, "k", true) && args.matrix(b.value, "v", true) &&
           args.matrix(b.proj, "proj") && args.matrix(b.gate, "gate") && args.matrix(b.up, "up", true) &&
           args.matrix(b.down, "down") && check_matrices(b);
}

bool read_position(Arguments &args, Block &b) { return args.integer(b.start) && args.integer(b.write); }

bool check_part(const Block &b) {
    if (b.part != BlockPart::whole && b.last != b.time) return refuse("the last positions of a part of a block; a part "
                                                                      "gives all. Take the whole block.");
    const bool post = b.post_attention.kind != NormKind::none || b.post_mlp.kind != NormKind::none;
    return b.part == BlockPart::whole || !post || refuse("a norm after a part of a block; it follows the sum of the "
                                                         "parts. Leave it out.");
}

bool read_norms(Arguments &args, Block &b) {
    const int64_t query = b.norm_heads ? b.head_width : b.heads * b.head_width;
    const int64_t key = b.norm_heads ? b.head_width : b.groups * b.head_width;
    return args.norm(b.norm_1, b.width) && args.norm(b.norm_2, b.width) && args.norm(b.post_attention, b.width) &&
           args.norm(b.post_mlp, b.width) && args.norm(b.norm_q, query) && args.norm(b.norm_k, key) && check_part(b);
}

bool read_limits(Arguments &args, Block &b) { return args.number(b.key_limit) && args.number(b.value_limit); }

constexpr Py_ssize_t SIZES = 11, MATRICES = 14, NORMS = 30, LIMITS = 2; // items of a plan

// The items of a tuple of `count`; they live as long as it does.
bool read_items(PyObject *tuple, PyObject **items, Py_ssize_t count) {
    const bool fits = PyTuple_Check(tuple) && PyTuple_Size(tuple) == count;
    if (!fits) return refuse("a block or a place of another length than the call takes. Check the arguments.");
    for (Py_ssize_t i = 0; i < count; ++i) items[i] = PyTuple_GetItem(tuple, i);
    return true;
}

// A place: (start, write, cos, sin). A block: (index of its place, keys | None, values | None, plan without a position).
bool read_block(PyObject *places, PyObject *tuple, Block &block) {
    PyObject *items[3 + SIZES + MATRICES + NORMS + LIMITS], *place[4];
    if (!read_items(tuple, items, 3 + SIZES + MATRICES + NORMS + LIMITS)) return false;
    Arguments each(items);
    int64_t index;
    Tensor cosine("cos"), sine("sin"), keys("keys"), values("values");
    if (!each.integer(index) || !each.tensor(keys, true) || !each.tensor(values, true)) return false;
    if (index < 0 || index >= PyTuple_Size(places)) return refuse("a block at a place that is none. Check the arguments.");
    if (!read_items(PyTuple_GetItem(places, index), place, 4)) return false;
    Arguments at(place);
    if (!read_position(at, block) || !at.tensor(cosine) || !at.tensor(sine)) return false;
    return read_sizes(each, block) && read_matrices(each, block) && read_norms(each, block) &&
           read_limits(each, block) && check_angles(cosine, sine, block) && check_caches(keys, values, block);
}

class Blocks {
  public:
    explicit Blocks(size_t count) : data(static_cast<Block *>(calloc(count + 1, sizeof(Block)))) {}
    ~Blocks() { free(data); }
    Blocks(const Blocks &) = delete;
    Blocks &operator=(const Blocks &) = delete;
    Block *const data;
};

} // namespace

// block(out, x, cos, sin, keys | None, values | None, threads, part, heads, groups, head width, norm heads, parallel,
//       shared, activation, scale, softcap, window, start, write, 7 matrices (weight, bias), 6 norms (weight, bias, kind,
//       eps, offset), limits of keys and values) -> 0 done, 1 the float16 cache does not take them
PyObject *py_block(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!take_count("block", count, 9 + SIZES + MATRICES + NORMS + LIMITS)) return nullptr;
    Arguments each(args);
    Tensor out("out"), x("x"), cosine("cos"), sine("sin"), keys("keys"), values("values");
    Block block = {};
    int threads;
    if (!each.tensor(out) || !each.tensor(x) || !each.tensor(cosine) || !each.tensor(sine)) return nullptr;
    if (!each.tensor(keys, true) || !each.tensor(values, true) || !each.threads(threads)) return nullptr;
    if (!check_activations(out, x, block) || !read_sizes(each, block) || !read_position(each, block)) return nullptr;
    if (!read_matrices(each, block) || !read_norms(each, block) || !read_limits(each, block)) return nullptr;
    if (!check_angles(cosine, sine, block) || !check_caches(keys, values, block)) return nullptr;
    const Level &level = current_level();
    BlockOutcome outcome;
    {
        const Released released;
        outcome = launch_block(level, block, threads);
    }
    if (outcome == BlockOutcome::no_memory) return PyErr_NoMemory();
    return PyLong_FromLong(outcome == BlockOutcome::overflow);
}

// blocks(out, x, odd, even, threads, places, blocks) -> how many were done; the next one, if there is one, has keys or
// values that its float16 cache does not take. The blocks but the last one write to `odd` and `even` in turn.
PyObject *py_blocks(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!take_count("blocks", count, 7)) return nullptr;
    Arguments each(args);
    Tensor out("out"), x("x"), odd("odd"), even("even");
    int threads;
    if (!each.tensor(out) || !each.tensor(x) || !each.tensor(odd) || !each.tensor(even)) return nullptr;
    if (!each.threads(threads)) return nullptr;
    if (!PyTuple_Check(args[5]) || !PyTuple_Check(args[6])) {
        refuse("places and blocks must be tuples. Check the arguments.");
        return nullptr;
    }
    const Py_ssize_t all = PyTuple_Size(args[6]);
    const Blocks blocks(static_cast<size_t>(all));
    if (!blocks.data) return PyErr_NoMemory();
    const Tensor *from = &x;
    for (Py_ssize_t i = 0; i < all; ++i) {
        const Tensor *to = i + 1 == all ? &out : i % 2 == 0 ? &odd : &even;
        if (!check_activations(*to, *from, blocks.data[i])) return nullptr;
        if (!read_block(args[5], PyTuple_GetItem(args[6], i), blocks.data[i])) return nullptr;
        from = to;
    }
    const Level &level = current_level();
    BlockOutcome outcome;
    int64_t done;
    {
        const Released released;
        outcome = launch_blocks(level, blocks.data, all, threads, done);
    }
    if (outcome == BlockOutcome::no_memory) return PyErr_NoMemory();
    return PyLong_FromLongLong(done);
}

} // namespace upcast
