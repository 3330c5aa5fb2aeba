// A transformer block for Python: arguments in, checks, one call with the interpreter released.
#include "python/bind_layers.hpp"
#include "runtime/block.hpp"
#include "runtime/dispatch.hpp"

#include <stdlib.h>

namespace upcast {
namespace {

// In the order of the enumerations that they name.
constexpr const char *PARTS[] = {"whole", "attention", "mlp", "both"};

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
    const bool apart = b.key.present() || b.value.present();
    const bool others = !apart || (b.key.rows == groups && b.key.columns == b.width && b.value.rows == groups &&
                                   b.value.columns == b.width);
    const bool attention = known && others && b.qkv.rows == (apart ? heads : heads + 2 * groups) &&
                           b.qkv.columns == b.width && b.proj.rows == b.width && b.proj.columns == heads;
    const bool up = !b.up.present() || (b.up.rows == b.gate.rows && b.up.columns == b.width);
    const bool none = b.part == BlockPart::attention && !b.gate.present() && !b.up.present() && !b.down.present();
    const bool mlp = b.gate.columns == b.width && b.down.rows == b.width && b.down.columns == b.gate.rows;
    return (attention && (none || (up && mlp))) || refuse("the matrices of the block do not fit its heads and one another. Check "
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

// Which position each row of the batch sees first; the first query sees that one at least.
bool read_first(PyObject *object, Block &b) {
    Tensor first("first");
    if (!read_tensor(object, first, true)) return false;
    if (!first.present) return true;
    if (!require_type(first, Type::int64) || !require_dims(first, 1) || !require_contiguous(first)) return false;
    if (first.shape[0] != b.batch) return refuse("first does not fit x; it must be (B,). Check the shapes.");
    b.first = first.as<const int64_t>();
    for (int64_t row = 0; row < b.batch; ++row) {
        if (b.first[row] < 0 || b.first[row] > b.start) {
            return refuse("a row whose first position is none that its first query sees; they go from 0 to start. Check "
                          "the mask.");
        }
    }
    return true;
}

bool read_query_norm(PyObject *object, Block &b) {
    return read_norm(object, b.norm_q, b.norm_heads ? b.head_width : b.heads * b.head_width);
}

bool read_key_norm(PyObject *object, Block &b) {
    return read_norm(object, b.norm_k, b.norm_heads ? b.head_width : b.groups * b.head_width);
}

struct Field {
    const char *name;
    bool (*read)(PyObject *, Block &);
};

// What a block is, in the order of `BlockSpec` in kernels/block_spec.py, which a test holds against these names.
constexpr Field SPEC[] = {
    {"heads", [](PyObject *o, Block &b) { return read_integer(o, b.heads); }},
    {"groups", [](PyObject *o, Block &b) { return read_integer(o, b.groups); }},
    {"head_width", [](PyObject *o, Block &b) { return read_integer(o, b.head_width); }},
    {"norm_heads", [](PyObject *o, Block &b) { return read_bool(o, b.norm_heads); }},
    {"parallel", [](PyObject *o, Block &b) { return read_bool(o, b.parallel); }},
    {"shared", [](PyObject *o, Block &b) { return read_bool(o, b.shared); }},
    {"activation", [](PyObject *o, Block &b) { return read_activation(o, b.activation); }},
    {"scale", [](PyObject *o, Block &b) { return read_float(o, b.scale); }},
    {"softcap", [](PyObject *o, Block &b) { return read_float(o, b.softcap); }},
    {"window", [](PyObject *o, Block &b) { return read_integer(o, b.window); }},
    {"qkv", [](PyObject *o, Block &b) { return read_matrix(o, b.qkv, "qkv"); }},
    {"key", [](PyObject *o, Block &b) { return read_matrix(o, b.key, "k", true); }},
    {"value", [](PyObject *o, Block &b) { return read_matrix(o, b.value, "v", true); }},
    {"proj", [](PyObject *o, Block &b) { return read_matrix(o, b.proj, "proj"); }},
    {"gate", [](PyObject *o, Block &b) { return read_matrix(o, b.gate, "gate", b.part == BlockPart::attention); }},
    {"up", [](PyObject *o, Block &b) { return read_matrix(o, b.up, "up", true); }},
    {"down", [](PyObject *o, Block &b) { return read_matrix(o, b.down, "down", b.part == BlockPart::attention); }},
    {"norm_1", [](PyObject *o, Block &b) { return check_matrices(b) && read_norm(o, b.norm_1, b.width); }},
    {"norm_2", [](PyObject *o, Block &b) { return read_norm(o, b.norm_2, b.width); }},
    {"post_attention", [](PyObject *o, Block &b) { return read_norm(o, b.post_attention, b.width); }},
    {"post_mlp", [](PyObject *o, Block &b) { return read_norm(o, b.post_mlp, b.width); }},
    {"norm_q", read_query_norm},
    {"norm_k", read_key_norm},
    {"key_limit", [](PyObject *o, Block &b) { return read_float(o, b.key_limit); }},
    {"value_limit", [](PyObject *o, Block &b) { return read_float(o, b.value_limit); }},
};
constexpr Py_ssize_t FIELDS = sizeof SPEC / sizeof *SPEC;

bool read_part(PyObject *object, Block &b) {
    return read_kind(object, b.part, PARTS, "unknown part; a block has 0 (all of it) to 3. Use one.");
}

bool check_part(const Block &b) {
    if (b.part == BlockPart::both && !b.parallel) return refuse("both branches at once, of a block whose MLP reads what "
                                                                "attention gave; take one after the other.");
    if (b.part != BlockPart::whole && b.last != b.time) return refuse("the last positions of a part of a block; a part "
                                                                      "gives all. Take the whole block.");
    const bool post = b.post_attention.kind != NormKind::none || b.post_mlp.kind != NormKind::none;
    return b.part == BlockPart::whole || !post || refuse("a norm after a part of a block; it follows the sum of the "
                                                         "parts. Leave it out.");
}

bool read_spec(PyObject *spec, Block &block) {
    PyObject *items[FIELDS];
    if (!read_items(spec, items, FIELDS, "a BlockSpec")) return false;
    for (Py_ssize_t i = 0; i < FIELDS; ++i) {
        if (!SPEC[i].read(items[i], block)) return false;
    }
    if (block.window < 0 || block.softcap < 0) return refuse("window or softcap is negative; 0 stands for none.");
    return check_part(block);
}

// A place: (start, write, cos, sin, first | None). A block: (index of its place, keys | None, values | None, BlockSpec).
bool read_block(PyObject *places, PyObject *tuple, Block &block) {
    PyObject *items[4], *place[5];
    if (!read_items(tuple, items, 4, "a block")) return false;
    int64_t index;
    Tensor cosine("cos"), sine("sin"), keys("keys"), values("values");
    if (!read_integer(items[0], index) || !read_tensor(items[1], keys, true) || !read_tensor(items[2], values, true)) return false;
    if (index < 0 || index >= PyTuple_Size(places)) return refuse("a block at a place that is none. Check the arguments.");
    if (!read_items(PyTuple_GetItem(places, index), place, 5, "a place")) return false;
    if (!read_integer(place[0], block.start) || !read_integer(place[1], block.write)) return false;
    if (!read_tensor(place[2], cosine) || !read_tensor(place[3], sine) || !read_first(place[4], block)) return false;
    return read_spec(items[3], block) && check_angles(cosine, sine, block) && check_caches(keys, values, block);
}

// None, or (norm, matrix, logits): what follows the last block.
bool read_finish(PyObject *object, const Block *last, Finish &finish) {
    PyObject *items[3];
    Tensor logits("logits");
    if (!last) return refuse("a norm and a head after no block. Pass a block.");
    if (!read_items(object, items, 3, "what follows the blocks") || !read_norm(items[0], finish.norm, last->width)) return false;
    if (!read_matrix(items[1], finish.head, "head") || !read_tensor(items[2], logits)) return false;
    if (!require_type(logits, Type::float32) || !require_dims(logits, 3) || !require_contiguous(logits)) return false;
    finish.logits = logits.as<float>();
    const bool fits = finish.head.columns == last->width && logits.shape[0] == last->batch && logits.shape[1] == last->last &&
                      logits.shape[2] == finish.head.rows;
    return fits || refuse("the head does not fit the blocks, or its logits; they are (B, T, V). Check the shapes.");
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

// block(out, x, cos, sin, keys | None, values | None, threads, part, start, write, BlockSpec, first | None)
// -> 0 done, 1 the float16 cache does not take them
PyObject *py_block(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!take_count("block", count, 12)) return nullptr;
    Tensor out("out"), x("x"), cosine("cos"), sine("sin"), keys("keys"), values("values");
    Block block = {};
    int threads;
    if (!read_tensor(args[0], out) || !read_tensor(args[1], x) || !read_tensor(args[2], cosine)) return nullptr;
    if (!read_tensor(args[3], sine) || !read_tensor(args[4], keys, true) || !read_tensor(args[5], values, true)) return nullptr;
    if (!read_threads(args[6], threads) || !read_part(args[7], block)) return nullptr;
    if (!read_integer(args[8], block.start) || !read_integer(args[9], block.write)) return nullptr;
    if (!check_activations(out, x, block) || !read_first(args[11], block) || !read_spec(args[10], block)) return nullptr;
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

// blocks(out, x, odd, even, threads, places, blocks, finish | None) -> how many were done; the next one, if there is one, has keys or
// values that its float16 cache does not take. The blocks but the last one write to `odd` and `even` in turn.
PyObject *py_blocks(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!take_count("blocks", count, 8)) return nullptr;
    Tensor out("out"), x("x"), odd("odd"), even("even");
    int threads;
    if (!read_tensor(args[0], out) || !read_tensor(args[1], x) || !read_tensor(args[2], odd)) return nullptr;
    if (!read_tensor(args[3], even) || !read_threads(args[4], threads)) return nullptr;
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
    Finish finish = {};
    const bool finishes = args[7] != Py_None;
    if (finishes && !read_finish(args[7], all ? blocks.data + all - 1 : nullptr, finish)) return nullptr;
    const Level &level = current_level();
    BlockOutcome outcome;
    int64_t done;
    {
        const Released released;
        outcome = launch_blocks(level, blocks.data, all, finishes ? &finish : nullptr, threads, done);
    }
    if (outcome == BlockOutcome::no_memory) return PyErr_NoMemory();
    return PyLong_FromLongLong(done);
}

namespace {

template <size_t count> bool put_names(PyObject *layout, const char *key, const char *const (&names)[count]) {
    PyObject *tuple = PyTuple_New(count);
    for (size_t i = 0; tuple && i < count; ++i) {
        PyTuple_SetItem(tuple, static_cast<Py_ssize_t>(i), PyUnicode_FromString(names[i]));
    }
    const bool put = tuple && !PyErr_Occurred() && PyDict_SetItemString(layout, key, tuple) == 0;
    Py_XDECREF(tuple);
    return put;
}

} // namespace

// The names of what a block is made of, and of the values that its enumerations have.
PyObject *py_block_layout(PyObject *, PyObject *) {
    const char *fields[FIELDS];
    for (Py_ssize_t i = 0; i < FIELDS; ++i) fields[i] = SPEC[i].name;
    PyObject *layout = PyDict_New();
    const bool done = layout && put_names(layout, "BlockSpec", fields) && put_names(layout, "Matrix", MATRIX) &&
                      put_names(layout, "ExpertSpec", EXPERT) && put_names(layout, "Norm", NORM) && put_names(layout, "PARTS", PARTS) &&
                      put_names(layout, "ACTIVATIONS", ACTIVATIONS) && put_names(layout, "NORMS", NORMS) &&
                      put_names(layout, "STORAGES", STORAGES);
    if (!done) Py_CLEAR(layout);
    return layout;
}

} // namespace upcast
