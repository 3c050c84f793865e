// The only file that knows Python. Operands arrive as tuples made in fastdiff/ops, or as tensors (the fast way in);
// device < 0 is the CPU, and the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/spectrum.h"
#include "dlpack.h"
#include "fastdiff.h"

namespace py = pybind11;
using namespace fastdiff;

namespace {

int64_t integer(PyObject* tuple, Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)); }
void* pointer(PyObject* tuple, Py_ssize_t i) { return PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, i)); }

bool absent(const py::handle& h, Py_ssize_t size, const char* what) {
  if (h.is_none()) return true;
  if (!PyTuple_Check(h.ptr()) || PyTuple_GET_SIZE(h.ptr()) != size)
    throw py::type_error(std::string(what) + ": expected None or a tuple of " + std::to_string(size));
  return false;
}

// (pointer, dtype, stride_b, stride_n, stride_d)
View view(const py::handle& h) {
  View v;
  if (absent(h, 5, "operand")) return v;
  v.data = pointer(h.ptr(), 0);
  v.dtype = static_cast<int32_t>(integer(h.ptr(), 1));
  v.sb = integer(h.ptr(), 2), v.sn = integer(h.ptr(), 3), v.sd = integer(h.ptr(), 4);
  return v;
}

// (pointer, dtype, reduce, workspace pointer)
ParamGrad param_grad(const py::handle& h) {
  ParamGrad g;
  if (absent(h, 4, "gradient")) return g;
  g.data = pointer(h.ptr(), 0);
  g.dtype = static_cast<int32_t>(integer(h.ptr(), 1));
  g.reduce = static_cast<int32_t>(integer(h.ptr(), 2));
  g.partial = static_cast<float*>(pointer(h.ptr(), 3));
  return g;
}

// A float, or (pointer, dtype, row stride, sample stride) of a tensor [rows, B].
Coefficient coefficient(const py::handle& h) {
  Coefficient c;
  if (PyTuple_Check(h.ptr())) {
    if (PyTuple_GET_SIZE(h.ptr()) != 4) throw py::type_error("coefficient: expected a float or a tuple of 4");
    c.data = pointer(h.ptr(), 0);
    c.dtype = static_cast<int32_t>(integer(h.ptr(), 1));
    c.row_stride = integer(h.ptr(), 2), c.sample_stride = integer(h.ptr(), 3);
  } else {
    c.value = PyFloat_AsDouble(h.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
  }
  return c;
}

template <typename Args>
using OnCuda = std::common_type_t<void (*)(const Args&, int, void*)>;  // not deduced, so nullptr may stand for it

template <typename Args>
void launch(const Args& args, int device, uintptr_t stream, void (*on_cpu)(const Args&), OnCuda<Args> on_cuda) {
  const py::gil_scoped_release release;
  if (device < 0) {
    on_cpu(args);
  } else if (on_cuda != nullptr) {
    on_cuda(args, device, reinterpret_cast<void*>(stream));
  } else {
    throw std::runtime_error("this build of fastdiff has no CUDA kernels");
  }
}

#ifdef FASTDIFF_CUDA
#define FD_CUDA(name) &cuda::name
#else
#define FD_CUDA(name) nullptr
#endif

// Fields of an argument struct from the values of a tuple, in order; what C++ type a field has decides how it is read.
void* address(const py::handle& h) {
  void* p = PyLong_AsVoidPtr(h.ptr());
  if (p == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return p;
}
// (pointer, dtype, stride, stride, ...), up to six strides
void assign(Strided& field, const py::handle& h) {
  if (h.is_none()) return;
  const Py_ssize_t size = PyTuple_Check(h.ptr()) ? PyTuple_GET_SIZE(h.ptr()) : 0;
  if (size < 2 || size > 8) throw py::type_error("operand: expected None or (pointer, dtype, strides...)");
  field.data = pointer(h.ptr(), 0);
  field.dtype = static_cast<int32_t>(integer(h.ptr(), 1));
  for (Py_ssize_t i = 2; i < size; ++i) field.s[i - 2] = integer(h.ptr(), i);
}
template <typename T>
std::enable_if_t<std::is_arithmetic_v<T>> assign(T& field, const py::handle& h) {
  field = h.cast<T>();
}
template <typename T>
void assign(T*& field, const py::handle& h) {
  field = static_cast<T*>(address(h));
}

// Bind a kernel as name(device, stream, (value, value, ...)), the values being those of `fields` in order.
template <typename Args, typename... Fields>
void kernel(py::module_& m, const char* name, void (*on_cpu)(const Args&), OnCuda<Args> on_cuda, Fields... fields) {
  m.def(name, [=](int device, uintptr_t stream, const py::tuple& values) {
    if (values.size() != sizeof...(fields))
      throw py::type_error(std::string(name) + ": expected " + std::to_string(sizeof...(fields)) + " values, got " +
                           std::to_string(values.size()));
    Args a;
    size_t i = 0;
    (assign(a.*fields, values[i++]), ...);
    launch(a, device, stream, on_cpu, on_cuda);
  });
}

void adaln_forward(int device, uintptr_t stream, int64_t B, int64_t N, int64_t D, bool rms, float eps, py::handle x,
                   py::handle branch, py::handle gate, py::handle shift, py::handle scale, py::handle weight,
                   py::handle bias, py::handle residual, py::handle y, uintptr_t mean, uintptr_t rstd) {
  AdalnForward a;
  a.B = B, a.N = N, a.D = D, a.rms = rms, a.eps = eps;
  a.x = view(x), a.branch = view(branch), a.gate = view(gate), a.shift = view(shift), a.scale = view(scale);
  a.weight = view(weight), a.bias = view(bias), a.residual = view(residual), a.y = view(y);
  a.mean = reinterpret_cast<float*>(mean), a.rstd = reinterpret_cast<float*>(rstd);
  launch(a, device, stream, &cpu::adaln_forward, FD_CUDA(adaln_forward));
}

void adaln_backward(int device, uintptr_t stream, int64_t B, int64_t N, int64_t D, bool rms, py::handle r,
                    py::handle branch, py::handle gate, py::handle scale, py::handle weight, py::handle bias,
                    py::handle grad_y, py::handle grad_residual, uintptr_t mean, uintptr_t rstd, py::handle dx,
                    py::handle dbranch, py::handle dgate, py::handle dshift, py::handle dscale, py::handle dweight,
                    py::handle dbias) {
  AdalnBackward a;
  a.B = B, a.N = N, a.D = D, a.rms = rms;
  a.r = view(r), a.branch = view(branch), a.gate = view(gate), a.scale = view(scale), a.weight = view(weight);
  a.bias = view(bias), a.grad_y = view(grad_y), a.grad_residual = view(grad_residual);
  a.mean = reinterpret_cast<const float*>(mean), a.rstd = reinterpret_cast<const float*>(rstd);
  a.dx = view(dx), a.dbranch = view(dbranch);
  a.dgate = param_grad(dgate), a.dshift = param_grad(dshift), a.dscale = param_grad(dscale);
  a.dweight = param_grad(dweight), a.dbias = param_grad(dbias);
  launch(a, device, stream, &cpu::adaln_backward, FD_CUDA(adaln_backward));
}

// terms: tuple of (pointer, dtype); rule: tuple of coefficients, that of drawn noise last, or a DDIM rule
// (alpha_bar, alpha_bar_next, prediction, eta, guidance, has_uncond, has_noise, clip); source: None, or (row pointer,
// rows, draws, seed, seed pointer, has_offset, per_sample).
Update make_update(int64_t B, int64_t M, const py::tuple& terms, const py::tuple& rule, const py::handle& source,
                   bool ddim, uintptr_t out, int out_dtype) {
  Update u;
  u.B = B, u.M = M, u.kind = ddim ? kDdim : kLinear;
  u.count = static_cast<int32_t>(terms.size());
  if (u.count < 1 || u.count > kMaxTerms) throw py::value_error("update: 1 to 8 terms, got " + std::to_string(u.count));
  for (int i = 0; i < u.count; ++i) {
    const py::handle t = terms[i];
    if (absent(t, 2, "term")) throw py::type_error("update: a term is None");
    u.term[i] = pointer(t.ptr(), 0);
    u.term_dtype[i] = static_cast<int32_t>(integer(t.ptr(), 1));
  }
  u.out = reinterpret_cast<void*>(out), u.out_dtype = out_dtype;
  if (!absent(source, 7, "source")) {
    u.row = static_cast<const int64_t*>(pointer(source.ptr(), 0)), u.rows = integer(source.ptr(), 1);
    u.draws = static_cast<int32_t>(integer(source.ptr(), 2)), u.seed.value = integer(source.ptr(), 3);
    u.seed.data = static_cast<const int64_t*>(pointer(source.ptr(), 4));
    u.seed.has_offset = static_cast<int32_t>(integer(source.ptr(), 5));
    u.seed.per_sample = static_cast<int32_t>(integer(source.ptr(), 6));
  }
  if (!ddim) {
    if (static_cast<int32_t>(rule.size()) != u.count + (u.draws ? 1 : 0))
      throw py::value_error("update: one coefficient per term, and one for noise that is drawn");
    for (int i = 0; i < u.count; ++i) u.c[i] = coefficient(rule[i]);
    if (u.draws) u.noise_scale = coefficient(rule[u.count]);
  } else {
    u.alpha_bar = coefficient(rule[0]), u.alpha_bar_next = coefficient(rule[1]);
    u.prediction = rule[2].cast<int32_t>(), u.eta = rule[3].cast<double>(), u.guidance = rule[4].cast<double>();
    u.has_uncond = rule[5].cast<bool>(), u.has_noise = rule[6].cast<bool>(), u.clip = rule[7].cast<double>();
    if (u.count != 2 + u.has_uncond + u.has_noise) throw py::value_error("update: terms do not match the DDIM rule");
  }
  return u;
}

void update(int device, uintptr_t stream, int64_t B, int64_t M, const py::tuple& terms, const py::tuple& rule,
            const py::object& source, bool ddim, uintptr_t out, int out_dtype) {
  launch(make_update(B, M, terms, rule, source, ddim, out, out_dtype), device, stream, &cpu::update, FD_CUDA(update));
}

// grads: tuple of pointers (0: not wanted), one per term.
void update_backward(int device, uintptr_t stream, int64_t B, int64_t M, const py::tuple& terms, const py::tuple& rule,
                     const py::object& source, bool ddim, uintptr_t grad, int grad_dtype, const py::tuple& grads) {
  UpdateBackward u;
  u.forward = make_update(B, M, terms, rule, source, ddim, 0, kF32);
  if (static_cast<int32_t>(grads.size()) != u.forward.count)
    throw py::value_error("update_backward: one grad per term");
  u.grad = reinterpret_cast<const void*>(grad), u.grad_dtype = grad_dtype;
  for (int i = 0; i < u.forward.count; ++i) u.grad_term[i] = pointer(grads.ptr(), i);
  launch(u, device, stream, &cpu::update_backward, FD_CUDA(update_backward));
}

// ---------------------------------------------------------------------------------------------- the fast way in
// Takes tensors themselves and serves the calls that need no thought: everything of the expected shape, one device,
// native types, outputs contiguous. For anything else it returns false, having touched nothing, and fastdiff/ops goes
// the ordinary way, which validates and names what is wrong.

const dlpack::ExchangeTable* exchange = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;  // torch's; modules outlive us
PyObject *requires_grad = nullptr, *is_neg = nullptr;            // interned names

bool connect(const py::object& tensor, const py::object& parameter) {
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) return false;
  auto* table = static_cast<const dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (table == nullptr) {
    PyErr_Clear();  // a table of another name is a table we cannot read
    return false;
  }
  if (table->major != 1 || table->describe == nullptr || table->current_stream == nullptr) return false;
  exchange = table;
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.ptr());
  requires_grad = PyUnicode_InternFromString("requires_grad");
  is_neg = PyUnicode_InternFromString("is_neg");
  return true;
}

// Exactly a tensor or parameter (a subclass may mean something else by its memory), not lazily negated, and, where
// gradients are recorded, in no need of one.
bool plain(const py::handle& h, bool grad) {
  if (Py_TYPE(h.ptr()) != tensor_type && Py_TYPE(h.ptr()) != parameter_type) return false;
  PyObject* answer = nullptr;
  if (grad) {
    answer = PyObject_GetAttr(h.ptr(), requires_grad);
    Py_XDECREF(answer);  // True and False live on
    if (answer != Py_False) return PyErr_Clear(), false;
  }
  answer = PyObject_CallMethodNoArgs(h.ptr(), is_neg);
  Py_XDECREF(answer);
  return answer == Py_False || (PyErr_Clear(), false);
}

bool describe(const py::handle& h, bool grad, dlpack::Tensor* t, bool fresh = false) {
  if (!fresh && !plain(h, grad)) return false;
  if (exchange->describe(h.ptr(), t) == 0) return t->data != nullptr || t->numel() == 0;  // null: no real storage
  PyErr_Clear();  // the ordinary way reports what is wrong with it
  return false;
}

// Device index and stream for the kernels; false where they do not run.
bool place(const dlpack::Tensor& t, int* device, void** stream) {
  *device = -1, *stream = nullptr;
  if (t.device.type == 1) return true;
#ifdef FASTDIFF_CUDA
  if (t.device.type == 2) {
    *device = t.device.id;
    if (exchange->current_stream(2, t.device.id, stream) == 0) return true;
    PyErr_Clear();
  }
#endif
  return false;
}

// `t` seen as [B, N, D] next to x: of its very shape, or (broadcast) a modulation; [D] alone for a parameter.
enum Role { kWhole, kModulation, kParameter };
bool fast_view(const dlpack::Tensor& t, Role role, const dlpack::Tensor& x, View* v) {
  if (!t.same_device(x) || (v->dtype = t.code()) < 0) return false;
  const int64_t B = x.shape[0], N = x.shape[1], D = x.shape[2];
  if (t.ndim < 1 || t.shape[t.ndim - 1] != D) return false;
  v->data = t.pointer();
  v->sd = t.strides[t.ndim - 1];
  if (t.ndim == 1) return role != kWhole;
  if (role == kParameter) return false;
  if (t.ndim == 2) {
    if (role == kWhole || (t.shape[0] != B && t.shape[0] != 1)) return false;
    v->sb = t.shape[0] == B ? t.strides[0] : 0;  // also of a single sample: its batch would go the same way
    return true;
  }
  if (t.ndim != 3 || (role == kWhole && !t.same_shape(x))) return false;
  if ((t.shape[0] != B && t.shape[0] != 1) || (t.shape[1] != N && t.shape[1] != 1)) return false;
  v->sb = t.shape[0] == B ? t.strides[0] : 0, v->sn = t.shape[1] == N ? t.strides[1] : 0;
  return true;
}

// Operands in the order of the arguments; the last two are outputs.
enum Slot { kX, kBranch, kGate, kShift, kScale, kWeight, kBias, kResidual, kY, kSlots };

// grad: gradients are being recorded. fresh: the outputs were made for this call, by torch.empty_like.
bool fast_adaln(bool grad, bool fresh, bool rms, py::handle epsilon, py::handle x, py::handle branch, py::handle gate,
                py::handle shift, py::handle scale, py::handle weight, py::handle bias, py::handle residual,
                py::handle y) {
  if (!PyFloat_CheckExact(epsilon.ptr())) return false;
  const double eps = PyFloat_AS_DOUBLE(epsilon.ptr());
  if (!(eps >= 0 && eps < 1e30)) return false;
  const py::handle given[kSlots] = {x, branch, gate, shift, scale, weight, bias, residual, y};
  const Role role[kSlots] = {kWhole,     kWhole,     kModulation, kModulation, kModulation,
                             kParameter, kParameter, kWhole,      kWhole};
  // Complete: a gate has its branch and residual, a scale its shift and y, and there is something to do.
  const bool gated = !gate.is_none(), normed = !scale.is_none();
  if (gated == branch.is_none() || gated == residual.is_none()) return false;
  if (normed == shift.is_none() || normed == y.is_none() || !(gated || normed)) return false;
  AdalnForward a;
  View* const view[kSlots] = {&a.x, &a.branch, &a.gate, &a.shift, &a.scale, &a.weight, &a.bias, &a.residual, &a.y};
  dlpack::Tensor t[kSlots];
  int device;
  void* stream;
  if (!describe(x, grad, &t[kX]) || t[kX].ndim != 3 || !t[kX].contiguous() || t[kX].numel() == 0 ||
      !place(t[kX], &device, &stream))
    return false;
  for (int i = 0; i < kSlots; ++i) {
    if (given[i].is_none()) continue;
    if (i != kX && !describe(given[i], grad, &t[i], fresh && i >= kResidual)) return false;
    if (!fast_view(t[i], role[i], t[kX], view[i])) return false;
  }
  // Outputs are contiguous, of the type of x, and apart from all else, except that the residual may be x or branch
  // itself, and y, where there is no residual, x.
  for (int out = kResidual; out <= kY; ++out) {
    if (given[out].is_none()) continue;
    if (t[out].code() != t[kX].code() || !t[out].contiguous()) return false;
    for (int i = 0; i < out; ++i) {
      if (given[i].is_none() || !t[out].overlaps(t[i])) continue;
      const bool may_replace = out == kResidual ? i == kX || i == kBranch : i == kX && given[kResidual].is_none();
      if (!may_replace || !t[out].same_memory(t[i])) return false;
    }
  }
  a.B = t[kX].shape[0], a.N = t[kX].shape[1], a.D = t[kX].shape[2], a.rms = rms, a.eps = static_cast<float>(eps);
  launch(a, device, reinterpret_cast<uintptr_t>(stream), &cpu::adaln_forward, FD_CUDA(adaln_forward));
  return true;
}

// An int, or int64 [1], [2] or [B, 2] next to the output.
bool fast_seed(const py::handle& h, bool grad, const dlpack::Tensor& out, int64_t B, Seed* s) {
  if (PyLong_CheckExact(h.ptr())) {
    int overflow;
    s->value = PyLong_AsLongLongAndOverflow(h.ptr(), &overflow);
    return overflow == 0;
  }
  dlpack::Tensor t;
  if (!describe(h, grad, &t) || t.dtype.code != 0 || t.dtype.bits != 64 || t.dtype.lanes != 1) return false;
  if (!t.same_device(out) || !t.contiguous() || out.overlaps(t)) return false;
  s->data = static_cast<const int64_t*>(t.pointer());
  if (t.ndim == 1) return (s->has_offset = t.shape[0] == 2) || t.shape[0] == 1;
  return t.ndim == 2 && t.shape[0] == B && (s->has_offset = s->per_sample = t.shape[1] == 2);
}

// rule: None for a linear update, else (prediction, eta, guidance, has_uncond, has_noise, clip); coefficients are
// floats, that of drawn noise last; seed: None for a step that draws none.
bool fast_update(bool grad, bool fresh, const py::list& terms, const py::list& coefficients, const py::object& rule,
                 py::handle seed, py::handle out) {
  dlpack::Tensor to, t;
  Update u;
  int device;
  void* stream;
  u.count = static_cast<int32_t>(terms.size());
  if (u.count < 1 || u.count > kMaxTerms || !describe(out, grad, &to, fresh) || !to.contiguous() ||
      !place(to, &device, &stream))
    return false;
  for (int i = 0; i < u.count; ++i) {
    if (!describe(terms[i], grad, &t) || !t.same_device(to) || !t.same_shape(to) || !t.contiguous()) return false;
    u.term[i] = t.pointer();
    if ((u.term_dtype[i] = t.code()) < 0) return false;
    if (i == 0 && to.code() != t.code()) return false;
    if (to.overlaps(t) && !to.same_memory(t)) return false;
  }
  double c[kMaxTerms + 1];
  const int numbers = static_cast<int>(coefficients.size());
  if (numbers > kMaxTerms + 1) return false;
  for (int i = 0; i < numbers; ++i) {
    const py::handle h = coefficients[i];
    if (!PyFloat_CheckExact(h.ptr())) return false;
    c[i] = PyFloat_AS_DOUBLE(h.ptr());
    if (!(c[i] > -1e300 && c[i] < 1e300)) return false;
  }
  u.B = 1, u.M = to.numel(), u.out = to.pointer(), u.out_dtype = to.code();
  if (u.M == 0) return false;
  if (!seed.is_none()) {
    u.draws = 1, u.B = to.ndim ? to.shape[0] : 1, u.M /= u.B;
    if (u.M > int64_t{1} << 34 || !fast_seed(seed, grad, to, u.B, &u.seed)) return false;
  }
  if (rule.is_none()) {
    if (numbers != u.count + u.draws) return false;
    for (int i = 0; i < u.count; ++i) u.c[i].value = c[i];
    if (u.draws) u.noise_scale.value = c[u.count];
  } else {
    if (numbers != 2) return false;
    const py::tuple r = rule;
    u.kind = kDdim, u.alpha_bar.value = c[0], u.alpha_bar_next.value = c[1];
    u.prediction = r[0].cast<int32_t>(), u.eta = r[1].cast<double>(), u.guidance = r[2].cast<double>();
    u.has_uncond = r[3].cast<bool>(), u.has_noise = r[4].cast<bool>(), u.clip = r[5].cast<double>();
    if (u.count != 2 + u.has_uncond + u.has_noise || (u.draws && !(u.eta > 0))) return false;
  }
  launch(u, device, reinterpret_cast<uintptr_t>(stream), &cpu::update, FD_CUDA(update));
  return true;
}

}  // namespace

#ifndef FASTDIFF_MODULE
#define FASTDIFF_MODULE _C
#endif

PYBIND11_MODULE(FASTDIFF_MODULE, m) {
  m.doc() = "fastdiff's native kernels; called through fastdiff.ops, which validates every argument";
  m.def("adaln_forward", &adaln_forward);
  m.def("adaln_backward", &adaln_backward);
  m.def("update", &update);
  m.def("update_backward", &update_backward);

  // gelu
  kernel(m, "gelu_forward", &cpu::gelu_forward, FD_CUDA(gelu_forward), &Gelu::M, &Gelu::x, &Gelu::out, &Gelu::dtype);
  kernel(m, "gelu_backward", &cpu::gelu_backward, FD_CUDA(gelu_backward), &Gelu::M, &Gelu::x, &Gelu::grad, &Gelu::out,
         &Gelu::dtype);

  // attention
  {
    using A = AttentionForward;
    kernel(m, "attention_forward", &cpu::attention_forward, FD_CUDA(attention_forward), &A::B, &A::H, &A::N, &A::M,
           &A::d, &A::scale, &A::eps, &A::interleaved, &A::q, &A::k, &A::v, &A::out, &A::q_weight, &A::k_weight,
           &A::cos, &A::sin, &A::stats, &A::workspace, &A::slots, &A::per_slot);
    using G = AttentionBackward;
    kernel(m, "attention_backward", &cpu::attention_backward, FD_CUDA(attention_backward), &G::B, &G::H, &G::N, &G::M,
           &G::d, &G::scale, &G::eps, &G::interleaved, &G::q, &G::k, &G::v, &G::out, &G::q_weight, &G::k_weight,
           &G::cos, &G::sin, &G::stats, &G::workspace, &G::slots, &G::per_slot, &G::grad, &G::dq, &G::dk, &G::dv,
           &G::dq_weight, &G::dk_weight, &G::partial);
  }
  m.def("attention_workspace", [](int64_t N, int64_t M, int64_t d) { return attention_workspace(N, M, d); });
  m.def("attention_backward_workspace",
        [](int64_t N, int64_t M, int64_t d) { return attention_backward_workspace(N, M, d); });
  m.def("attention_parts", [](int64_t N) { return attention_parts(N); });
  m.attr("attention_head_dim") = kAttentionHeadDim;

  // selective scan
  kernel(m, "selective_scan", &cpu::selective_scan, FD_CUDA(selective_scan), &Scan::B, &Scan::K, &Scan::G, &Scan::L,
         &Scan::D, &Scan::N, &Scan::complex, &Scan::softplus, &Scan::reverse, &Scan::constant_b, &Scan::constant_c,
         &Scan::threads, &Scan::scratch_size, &Scan::scratch, &Scan::u, &Scan::delta, &Scan::A, &Scan::Bm, &Scan::C,
         &Scan::skip, &Scan::delta_bias, &Scan::z, &Scan::initial, &Scan::order, &Scan::resets, &Scan::out, &Scan::last,
         &Scan::states, &Scan::partial_out, &Scan::carries);
  kernel(m, "selective_scan_backward", &cpu::selective_scan_backward, FD_CUDA(selective_scan_backward), &Scan::B,
         &Scan::K, &Scan::G, &Scan::L, &Scan::D, &Scan::N, &Scan::complex, &Scan::softplus, &Scan::reverse,
         &Scan::constant_b, &Scan::constant_c, &Scan::threads, &Scan::scratch_size, &Scan::scratch, &Scan::u,
         &Scan::delta, &Scan::A, &Scan::Bm, &Scan::C, &Scan::skip, &Scan::delta_bias, &Scan::z, &Scan::initial,
         &Scan::order, &Scan::resets, &Scan::states, &ScanBackward::grad_out, &ScanBackward::grad_last,
         &ScanBackward::du, &ScanBackward::ddelta, &ScanBackward::dz, &ScanBackward::dA, &ScanBackward::dB,
         &ScanBackward::dC, &ScanBackward::dskip, &ScanBackward::dbias, &ScanBackward::dinitial,
         &ScanBackward::partial_rows, &ScanBackward::partial_b, &ScanBackward::partial_c, &ScanBackward::partial_du);
  m.attr("scan_steps") = kScanSteps;
  m.attr("scan_channels") = kScanChannels;
  m.attr("scan_states") = kScanStates;
  m.attr("scan_cuda_states") = kScanCudaStates;
  m.def("scan_cuda_channels", [](int64_t rows) { return scan_cuda_channels(rows); });
  m.def("scan_cuda_segments", [](int64_t L, int64_t tasks) { return scan_cuda_segments(L, tasks); });
  m.def("scan_scratch", [](int64_t rows) { return scan_scratch(rows); });
  m.def("scan_backward_scratch", [](int64_t rows) { return scan_backward_scratch(rows); });

  // causal conv1d
  using C = CausalConv1d;
  kernel(m, "causal_conv1d", &cpu::causal_conv1d, FD_CUDA(causal_conv1d), &C::B, &C::D, &C::L, &C::K, &C::silu,
         &C::threads, &C::scratch_size, &C::x, &C::weight, &C::bias, &C::state, &C::out, &C::taps, &C::scratch);
  using CB = CausalConv1dBackward;
  kernel(m, "causal_conv1d_backward", &cpu::causal_conv1d_backward, FD_CUDA(causal_conv1d_backward), &CB::B, &CB::D,
         &CB::L, &CB::K, &CB::silu, &CB::threads, &CB::scratch_size, &CB::x, &CB::weight, &CB::bias, &CB::state,
         &CB::grad, &CB::taps, &CB::scratch, &CB::dx, &CB::dstate, &CB::dweight, &CB::dbias, &CB::partial);
  m.attr("conv_cuda_taps") = kConvCudaTaps;
  m.attr("conv_cuda_steps") = kConvCudaSteps;

  // gaussian
  using Blur = GaussianBlur;
  using BlurBack = GaussianBlurBackward;
  kernel(m, "gaussian_blur", &cpu::gaussian_blur, FD_CUDA(gaussian_blur), &Blur::B, &Blur::C, &Blur::H, &Blur::W,
         &Blur::border, &Blur::x, &Blur::plan, &Blur::plan_stride, &Blur::table, &Blur::table_stride, &Blur::workspace,
         &Blur::slots, &Blur::workspace_stride, &Blur::out, &Sigma::sigma, &Sigma::sigma_dtype, &Sigma::sigma_stride,
         &Sigma::sigma_y, &Sigma::sigma_x, &Sigma::size_y, &Sigma::size_x, &Sigma::sums);
  kernel(m, "gaussian_blur_backward", &cpu::gaussian_blur_backward, FD_CUDA(gaussian_blur_backward), &Blur::B, &Blur::C,
         &Blur::H, &Blur::W, &Blur::border, &Blur::x, &Blur::plan, &Blur::plan_stride, &Blur::table,
         &Blur::table_stride, &Blur::workspace, &Blur::slots, &Blur::workspace_stride, &BlurBack::grad, &BlurBack::dx,
         &BlurBack::partial, &BlurBack::dsigma, &Sigma::sigma, &Sigma::sigma_dtype, &Sigma::sigma_stride,
         &Sigma::sigma_y, &Sigma::sigma_x, &Sigma::size_y, &Sigma::size_x, &Sigma::sums);
  kernel(m, "box_mask", &cpu::box_mask, FD_CUDA(box_mask), &BoxMask::K, &BoxMask::H, &BoxMask::W, &Boxes::boxes,
         &Boxes::radius, &Boxes::radius_stride, &Boxes::prefix, &Boxes::prefix_stride, &BoxMask::profiles,
         &BoxMask::out, &Sigma::sigma, &Sigma::sigma_dtype, &Sigma::sigma_stride, &Sigma::sigma_y, &Sigma::sigma_x,
         &Sigma::size_y, &Sigma::size_x, &Sigma::sums);
  using BoxBack = BoxMaskBackward;
  kernel(m, "box_mask_backward", &cpu::box_mask_backward, FD_CUDA(box_mask_backward), &BoxBack::K, &BoxBack::H,
         &BoxBack::W, &Boxes::boxes, &Boxes::radius, &Boxes::radius_stride, &Boxes::prefix, &Boxes::prefix_stride,
         &BoxBack::profiles, &BoxBack::grad, &BoxBack::dsigma, &BoxBack::partial, &Sigma::sigma, &Sigma::sigma_dtype,
         &Sigma::sigma_stride, &Sigma::sigma_y, &Sigma::sigma_x, &Sigma::size_y, &Sigma::size_x, &Sigma::sums);
  using Blend = GaussianBlend;
  using BlendBack = GaussianBlendBackward;
  kernel(m, "gaussian_blend", &cpu::gaussian_blend, FD_CUDA(gaussian_blend), &Blend::K, &Blend::B, &Blend::C, &Blend::H,
         &Blend::W, &Blend::background, &Blend::objects, &Blend::masks, &Boxes::boxes, &Boxes::radius,
         &Boxes::radius_stride, &Boxes::prefix, &Boxes::prefix_stride, &Blend::profiles, &Blend::ranges, &Blend::out,
         &Sigma::sigma, &Sigma::sigma_dtype, &Sigma::sigma_stride, &Sigma::sigma_y, &Sigma::sigma_x, &Sigma::size_y,
         &Sigma::size_x, &Sigma::sums);
  kernel(m, "gaussian_blend_backward", &cpu::gaussian_blend_backward, FD_CUDA(gaussian_blend_backward), &Blend::K,
         &Blend::B, &Blend::C, &Blend::H, &Blend::W, &Blend::background, &Blend::objects, &Blend::masks, &Boxes::boxes,
         &Boxes::radius, &Boxes::radius_stride, &Boxes::prefix, &Boxes::prefix_stride, &Blend::profiles, &Blend::ranges,
         &BlendBack::grad, &BlendBack::dbackground, &BlendBack::dobjects, &BlendBack::dmasks, &BlendBack::workspace,
         &BlendBack::slots, &BlendBack::workspace_stride, &Sigma::sigma, &Sigma::sigma_dtype, &Sigma::sigma_stride,
         &Sigma::sigma_y, &Sigma::sigma_x, &Sigma::size_y, &Sigma::size_x, &Sigma::sums);
  m.def("fold_reach", [](int64_t radius, int64_t n, int32_t border) { return fold_reach(radius, n, border); });
  m.def("fold_entries", [](int64_t H, int64_t W) { return fold_entries(H, W); });
  // Doubles per sigma of the sliding path's tables on CUDA, 0 where it serves nothing. unknown: sigma is on the device.
  m.def("slide_doubles", [](int64_t H, int64_t W, int64_t size_y, int64_t size_x, bool unknown, double sy, double sx) {
    Sigma s;
    s.sigma = unknown ? &s : nullptr, s.size_y = size_y, s.size_x = size_x, s.sigma_y = sy, s.sigma_x = sx;
    return may_slide(s, H, W) ? slide_floats(H, W) : int64_t{0};
  });
  m.def("blur_tiles", [](int64_t H, int64_t W) { return blur_tiles(H, W); });
  m.def("mask_chunks", [](int64_t H) { return mask_chunks(H); });

  // spectrum
  using S = Spectrum;
  kernel(m, "spectrum", &cpu::spectrum, FD_CUDA(spectrum), &S::B, &S::C, &S::H, &S::W, &S::R, &S::half_size,
         &S::scratch_size, &S::threads, &S::keep, &S::log, &S::shift, &S::normalize, &S::images, &S::out, &S::plan_w,
         &S::table_w, &S::plan_h, &S::table_h, &S::bins, &S::ring_size, &S::half, &S::scratch, &S::partial, &S::profile,
         &S::pos_w, &S::pos_h, &S::wave, &S::ranks);
  using SB = SpectrumBackward;
  kernel(m, "spectrum_backward", &cpu::spectrum_backward, FD_CUDA(spectrum_backward), &SB::B, &SB::C, &SB::H, &SB::W,
         &SB::R, &SB::half_size, &SB::scratch_size, &SB::threads, &SB::log, &SB::shift, &SB::normalize, &SB::grad,
         &SB::dimages, &SB::plan_w, &SB::table_w, &SB::plan_h, &SB::table_h, &SB::bins, &SB::ring_size, &SB::half,
         &SB::profile, &SB::work, &SB::scratch, &SB::pos_w, &SB::pos_h, &SB::wave, &SB::ranks, &SB::ring_grad);
  m.attr("ring_rows") = kRingRows;
  // Addresses of the two plans -> (parts of a ring, floats of scratch per block, blocks, whether one block can do an
  // image, blocks of the cluster that can).
  m.def("spectrum_layout", [](uintptr_t plan_w, uintptr_t plan_h) {
    const SpectrumLayout l(reinterpret_cast<const int32_t*>(plan_w), reinterpret_cast<const int32_t*>(plan_h));
    return py::make_tuple(l.ring_parts(), l.scratch(), SpectrumLayout::kBlocks, l.fused, l.cluster());
  });
#ifdef FASTDIFF_CUDA
  m.def("spectrum_clusters", &cuda::spectrum_clusters);
#endif

  m.def("connect", &connect);
  m.def("fast_adaln", &fast_adaln);
  m.def("fast_update", &fast_update);
  m.attr("chunk") = kChunk;
  m.def("isas", [] {
    py::list names;
    for (int i = 0; i < cpu::isa_count(); ++i) names.append(cpu::isa_name(i));
    return names;
  });
  m.def("isa", [] { return cpu::isa_current(); });
  m.def("select_isa", &cpu::isa_select);
  m.def("build_info", [] {
    py::dict d;
    d["compiler"] = FASTDIFF_COMPILER;
    d["cuda_archs"] = FASTDIFF_CUDA_ARCHS;
#ifdef FASTDIFF_CUDA
    d["cuda"] = true;
#else
    d["cuda"] = false;
#endif
#ifdef _OPENMP
    d["openmp"] = true;
#else
    d["openmp"] = false;
#endif
    return d;
  });
}
