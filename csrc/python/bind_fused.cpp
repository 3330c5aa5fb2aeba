// Normalisation, gated activation, rotary embedding, cache and attention for Python: arguments in, checks,
// kernels with the interpreter released.
#include "python/bind.hpp"
#include "runtime/dispatch.hpp"



namespace upcast {
namespace {

// A float32 vector of `width` elements, or absent.
bool check_vector(const Tensor &vector, int64_t width) {
    if (!vector.present) return true;
    if (!require_type(vector, Type::float32) || !require_dims(vector, 1) || !require_contiguous(vector)) return false;
    if (vector.shape[0] == width) return true;
    PyErr_Format(error_class(), "%s has %lld elements for rows of %lld; they must agree. Check the shapes.", vector.name,
                 static_cast<long long>(vector.shape[0]), static_cast<long long>(width));
    return false;
}

// Float32 of at least one dimension, with an `out` of the same shape.
bool check_like(const Tensor &out, const Tensor &x) {
    if (!require_type(x, Type::float32)) return false;
    if (x.ndim == 0) return require_dims(x, 1);
    return require_type(out, Type::float32) && require_shape(out, x, x.shape[x.ndim - 1]) && require_contiguous(out);
}

// Four dimensions, the elements of the last adjacent.
bool check_heads(const Tensor &tensor) {
    if (!require_dims(tensor, 4)) return false;
    if (tensor.shape[3] <= 1 || tensor.strides[3] == 1) return true;
    PyErr_Format(error_class(), "%s has heads whose elements are not adjacent; the kernels walk them in place. Call "
                 ".contiguous().", tensor.name);
    return false;
}

bool check_cache(const Tensor &cache) {
    if (cache.type != Type::float16 && !require_type(cache, Type::float32)) return false;
    return check_heads(cache);
}

bool fits(const Tensor &cache, int64_t start, int64_t time) {
    if (start >= 0 && time <= cache.shape[2] && start <= cache.shape[2] - time) return true;
    PyErr_Format(error_class(), "%lld positions from %lld on do not lie in %s, which holds %lld; make the cache longer.",
                 static_cast<long long>(time), static_cast<long long>(start), cache.name,
                 static_cast<long long>(cache.shape[2]));
    return false;
}

// [time, width] or [batch or 1, time, width], the elements of a row adjacent.
bool check_angles(const Tensor &angles, const Tensor &x, int64_t width) {
    if (!require_type(angles, Type::float32)) return false;
    if (angles.ndim != 2 && !require_dims(angles, 3)) return false;
    const int last = angles.ndim - 1;
    const bool rows = angles.shape[last - 1] == x.shape[2] && angles.shape[last] == width;
    const bool batch = last == 1 || angles.shape[0] == 1 || angles.shape[0] == x.shape[0];
    if (!rows || !batch) return refuse("cos and sin do not fit x; they must be (T, n) or (B, T, n). Check the shapes.");
    if (angles.strides[last] == 1 || width <= 1) return true;
    PyErr_Format(error_class(), "%s has rows whose elements are not adjacent. Call .contiguous().", angles.name);
    return false;
}

int64_t batch_stride(const Tensor &angles) {
    return angles.ndim == 2 || angles.shape[0] == 1 ? 0 : angles.strides[0];
}

bool read_activation(PyObject *object, Activation &activation) {
    int64_t value;
    if (!read_integer(object, value)) return false;
    if (value < 0 || value > 2) return refuse("unknown activation; the kernels have silu, gelu and gelu_tanh. Use one.");
    activation = static_cast<Activation>(value);
    return true;
}

bool check_attention(const Tensor &out, const Tensor &q, const Tensor &k, const Tensor &v) {
    if (!require_type(q, Type::float32) || !check_heads(q) || !check_cache(k) || !check_cache(v)) return false;
    if (!require_type(v, k.type) || !require_type(out, Type::float32) || !require_dims(out, 4)) return false;
    const bool caches = k.shape[0] == q.shape[0] && v.shape[0] == q.shape[0] && k.shape[1] == v.shape[1];
    if (!caches || k.shape[3] != q.shape[3]) {
        return refuse("q, k and v do not fit; they must be (B, Hq, T, D), (B, Hkv, S, D) and (B, Hkv, S, Dv). Check "
                      "the shapes.");
    }
    if (k.shape[1] == 0 ? q.shape[1] != 0 : q.shape[1] % k.shape[1] != 0) {
        return refuse("the query heads are not a multiple of the cache's; each head of the cache serves equally many. "
                      "Check the shapes.");
    }
    const bool shape = out.shape[0] == q.shape[0] && out.shape[1] == q.shape[2] && out.shape[2] == q.shape[1] &&
                       out.shape[3] == v.shape[3];
    if (!shape) return refuse("out does not fit q and v; it must be (B, T, Hq, Dv). Check the shapes.");
    return require_contiguous(out);
}

} // namespace

// norm(out, x, weight | None, bias | None, eps, offset, centred, threads)
PyObject *py_norm(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out"), x("x"), weight("weight"), bias("bias");
    Norm call = {};
    int threads;
    if (!take_count("norm", count, 8) || !read_tensor(args[0], out) || !read_tensor(args[1], x)) return nullptr;
    if (!read_tensor(args[2], weight, true) || !read_tensor(args[3], bias, true)) return nullptr;
    if (!read_float(args[4], call.eps) || !read_float(args[5], call.offset)) return nullptr;
    if (!read_bool(args[6], call.centred) || !read_threads(args[7], threads) || !check_like(out, x)) return nullptr;
    EvenRows rows;
    if (!as_rows(x, rows)) return PyLong_FromLong(COPY_FIRST);
    if (!check_vector(weight, rows.width) || !check_vector(bias, rows.width)) return nullptr;
    call.x = x.as<const float>();
    call.ld = rows.stride;
    call.weight = weight.as<const float>();
    call.bias = bias.as<const float>();
    call.out = out.as<float>();
    call.rows = rows.rows;
    call.width = rows.width;
    const Level &level = current_level();
    {
        const Released released;
        launch_norm(level, call, threads);
    }
    return finish(Outcome::done);
}

// gated(out, gate, up, activation, threads)
PyObject *py_gated(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out"), gate("gate"), up("up");
    Gated call = {};
    int threads;
    if (!take_count("gated", count, 5) || !read_tensor(args[0], out)) return nullptr;
    if (!read_tensor(args[1], gate) || !read_tensor(args[2], up)) return nullptr;
    if (!read_activation(args[3], call.activation) || !read_threads(args[4], threads)) return nullptr;
    if (!check_like(out, gate) || !check_like(out, up)) return nullptr;
    EvenRows gates, ups;
    long copies = as_rows(gate, gates) ? COPY_NOTHING : COPY_FIRST;
    if (!as_rows(up, ups)) copies |= COPY_SECOND;
    if (copies != COPY_NOTHING) return PyLong_FromLong(copies);
    call.gate = gate.as<const float>();
    call.up = up.as<const float>();
    call.ld_gate = gates.stride;
    call.ld_up = ups.stride;
    call.out = out.as<float>();
    call.rows = gates.rows;
    call.width = gates.width;
    const Level &level = current_level();
    {
        const Released released;
        launch_gated(level, call, threads);
    }
    return finish(Outcome::done);
}

// rope(out, x, cos, sin, interleaved, threads)
PyObject *py_rope(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out"), x("x"), cosine("cos"), sine("sin");
    Rope call = {};
    int threads;
    if (!take_count("rope", count, 6) || !read_tensor(args[0], out) || !read_tensor(args[1], x)) return nullptr;
    if (!read_tensor(args[2], cosine) || !read_tensor(args[3], sine)) return nullptr;
    if (!read_bool(args[4], call.interleaved) || !read_threads(args[5], threads)) return nullptr;
    if (!check_like(out, x) || !check_heads(x)) return nullptr;
    call.turned = cosine.ndim == 0 ? 0 : cosine.shape[cosine.ndim - 1];
    if (!check_angles(cosine, x, call.turned) || !check_angles(sine, x, call.turned)) return nullptr;
    if (call.turned % 2 != 0 || call.turned > x.shape[3]) {
        refuse("cos turns an odd number of elements, or more than x has; heads are turned in pairs. Check the shapes.");
        return nullptr;
    }
    call.x = x.as<const float>();
    call.batch_stride = x.strides[0];
    call.head_stride = x.strides[1];
    call.time_stride = x.strides[2];
    call.cosine = cosine.as<const float>();
    call.sine = sine.as<const float>();
    call.angle_batch = batch_stride(cosine);
    call.angle_time = cosine.strides[cosine.ndim - 2];
    call.sine_batch = batch_stride(sine);
    call.sine_time = sine.strides[sine.ndim - 2];
    call.out = out.as<float>();
    call.heads = x.shape[1];
    call.time = x.shape[2];
    call.width = x.shape[3];
    const int64_t rows = x.shape[0] * x.shape[1] * x.shape[2];
    const Level &level = current_level();
    {
        const Released released;
        launch_rope(level, call, rows, threads);
    }
    return finish(Outcome::done);
}

// kv_append(cache, new, start, limit, threads) -> bool; limit 0 for none
PyObject *py_kv_append(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor cache("cache"), added("new");
    Append call = {};
    int threads;
    if (!take_count("kv_append", count, 5) || !read_tensor(args[0], cache) || !read_tensor(args[1], added)) return nullptr;
    if (!read_integer(args[2], call.start) || !read_float(args[3], call.limit)) return nullptr;
    if (!read_threads(args[4], threads)) return nullptr;
    if (!require_type(added, Type::float32) || !check_heads(added) || !check_cache(cache)) return nullptr;
    if (cache.shape[0] != added.shape[0] || cache.shape[1] != added.shape[1] || cache.shape[3] != added.shape[3]) {
        refuse("new does not fit the cache; they must be (B, Hkv, T, D) and (B, Hkv, S, D). Check the shapes.");
        return nullptr;
    }
    if (!fits(cache, call.start, added.shape[2])) return nullptr;
    call.from = added.as<const float>();
    call.from_batch = added.strides[0];
    call.from_head = added.strides[1];
    call.from_time = added.strides[2];
    call.to = cache.data;
    call.to_batch = cache.strides[0];
    call.to_head = cache.strides[1];
    call.to_time = cache.strides[2];
    call.wide = cache.type == Type::float32;
    call.heads = added.shape[1];
    call.time = added.shape[2];
    call.width = added.shape[3];
    const int64_t rows = added.shape[0] * added.shape[1] * added.shape[2];
    const Level &level = current_level();
    bool written;
    {
        const Released released;
        written = launch_append(level, call, rows, threads);
    }
    return PyBool_FromLong(written);
}

// attention(out, q, k, v, start, scale, causal, window, softcap, threads); window and softcap 0 for none
PyObject *py_attention(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out"), q("q"), k("k"), v("v");
    Attention call = {};
    int threads;
    if (!take_count("attention", count, 10) || !read_tensor(args[0], out) || !read_tensor(args[1], q)) return nullptr;
    if (!read_tensor(args[2], k) || !read_tensor(args[3], v) || !read_integer(args[4], call.start)) return nullptr;
    if (!read_float(args[5], call.scale) || !read_bool(args[6], call.causal)) return nullptr;
    if (!read_integer(args[7], call.window) || !read_float(args[8], call.softcap)) return nullptr;
    if (!read_threads(args[9], threads) || !check_attention(out, q, k, v)) return nullptr;
    if (!fits(k, call.start, q.shape[2]) || !fits(v, call.start, q.shape[2])) return nullptr;
    if (call.window < 0 || call.softcap < 0) {
        refuse("window or softcap is negative; both must be positive, or None for none. Check the configuration.");
        return nullptr;
    }
    call.queries = q.as<const float>();
    call.query_batch = q.strides[0];
    call.query_head = q.strides[1];
    call.query_time = q.strides[2];
    call.keys = k.data;
    call.values = v.data;
    call.key_batch = k.strides[0];
    call.key_head = k.strides[1];
    call.key_stride = k.strides[2];
    call.value_batch = v.strides[0];
    call.value_head = v.strides[1];
    call.value_stride = v.strides[2];
    call.wide = k.type == Type::float32;
    call.out = out.as<float>();
    call.batch = q.shape[0];
    call.kv_heads = k.shape[1];
    call.group = k.shape[1] == 0 ? 0 : q.shape[1] / k.shape[1];
    call.time = q.shape[2];
    call.width = q.shape[3];
    call.value_width = v.shape[3];
    const Level &level = current_level();
    Outcome outcome;
    {
        const Released released;
        outcome = launch_attention(level, call, threads);
    }
    return finish(outcome);
}

} // namespace upcast
