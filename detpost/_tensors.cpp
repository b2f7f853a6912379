// Tensors in and out of C++ without PyTorch's headers: read and made through the table of functions that torch.Tensor gives
// to other libraries (DLPack's exchange interface, PyTorch 2.10), behind CPython's fast calls. A decode of one image takes
// ten microseconds; making its five results one by one in Python takes as long again.
//
// An extension of the limited interface of CPython 3.11, so one build serves all later ones. Optional: where it is not
// there, or does not take what came (`None` is the answer then), Python does the same through ctypes.

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if defined(_WIN32)
#include <windows.h>
#endif

#include "kernels/cpu/decode_call.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// DLPack 1.x, as its specification lays it out
// ---------------------------------------------------------------------------------------------------------------------

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, number;
};

struct ElementType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Strided {
  void* data;
  Device device;
  int32_t dimensions;
  ElementType type;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Managed {
  Version version;
  void* owner;
  void (*release)(Managed* self);
  uint64_t flags;
  Strided tensor;
};

struct Exchange {
  Version version;
  const Exchange* previous;
  void* allocate;
  void* from_python_managed;
  int (*to_python)(Managed* tensor, void** made);
  int (*from_python)(void* tensor, Strided* read);
  void* current_stream;
};

constexpr int32_t kCpu = 1;
constexpr ElementType kFloat32{2, 32, 1}, kFloat16{2, 16, 1}, kBFloat16{4, 16, 1}, kInt32{0, 32, 1}, kInt64{0, 64, 1}, kBool{6, 8, 1};

bool operator==(const ElementType& one, const ElementType& other) {
  return one.code == other.code && one.bits == other.bits && one.lanes == other.lanes;
}

// ---------------------------------------------------------------------------------------------------------------------
// What is bound once: the type of a tensor, the functions that read and make them, the decode of the kernels
// ---------------------------------------------------------------------------------------------------------------------

using Decode = int (*)(const char* record);

PyTypeObject* tensor_type;
const Exchange* exchange;
Decode decode_of_kernels;
PyObject *requires_grad_name, *is_grad_enabled;

// bind(tensor_type, exchange_table, is_grad_enabled): whether the table is one that is understood here.
PyObject* bind(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "bind takes 3 arguments; got %zd", count);
  const void* table = PyCapsule_GetPointer(arguments[1], "dlpack_exchange_api");
  if (!table) return nullptr;
  const Exchange* found = static_cast<const Exchange*>(table);
  while (found && found->version.major != 1) found = found->previous;
  if (!found || !found->from_python) Py_RETURN_FALSE;
  Py_INCREF(arguments[0]);
  Py_INCREF(arguments[2]);
  tensor_type = reinterpret_cast<PyTypeObject*>(arguments[0]);
  is_grad_enabled = arguments[2];
  exchange = found;
  Py_RETURN_TRUE;
}

// bind_decode(address): of detpost_decode in the library of kernels.
PyObject* bind_decode(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 1) return PyErr_Format(PyExc_TypeError, "bind_decode takes 1 argument; got %zd", count);
  void* at = PyLong_AsVoidPtr(arguments[0]);
  if (PyErr_Occurred()) return nullptr;
  decode_of_kernels = reinterpret_cast<Decode>(at);
  Py_RETURN_NONE;
}

// How reading went on: it is read, it is not for us, or Python has an error.
enum Taken { kTaken, kNotTaken, kError };

// Reads a plain tensor of the CPU, contiguous and without a gradient to follow.
Taken read(PyObject* value, Strided* read) {
  if (Py_TYPE(value) != tensor_type) return kNotTaken;
  PyObject* follows = PyObject_GetAttr(value, requires_grad_name);
  if (!follows) return kError;
  const bool may_follow = follows != Py_False;
  Py_DECREF(follows);
  if (may_follow) {
    PyObject* enabled = PyObject_CallNoArgs(is_grad_enabled);
    if (!enabled) return kError;
    const bool is_followed = enabled != Py_False;
    Py_DECREF(enabled);
    if (is_followed) return kNotTaken;
  }
  if (exchange->from_python(value, read) != 0) {  // a layout without strides, a tensor without memory
    PyErr_Clear();
    return kNotTaken;
  }
  if (read->device.type != kCpu || read->byte_offset != 0) return kNotTaken;
  int64_t expected = 1;
  for (int32_t i = read->dimensions; i-- > 0;) {
    if (read->shape[i] != 1 && read->strides[i] != expected) return kNotTaken;
    expected *= read->shape[i];
  }
  return kTaken;
}

// ---------------------------------------------------------------------------------------------------------------------
// One allocation cut into tensors, which lives as long as the last of them
// ---------------------------------------------------------------------------------------------------------------------

class Block {
 public:
  // `bytes` of data for at most `count` tensors; null where there is no memory.
  static Block* make(size_t bytes, size_t count) {
    const size_t before = (sizeof(Block) + count * sizeof(Entry) + 63) & ~size_t(63);
    void* memory = std::malloc(before + bytes + 64);
    if (!memory) return nullptr;
    Block* block = new (memory) Block;
    block->data_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + before + 63) & ~uintptr_t(63));
    return block;
  }

  template <typename T>
  T* at(size_t offset) {
    return reinterpret_cast<T*>(data_ + offset);
  }

  // Makes a contiguous tensor of what stands at `offset`; null with Python's error set.
  PyObject* tensor(size_t offset, ElementType type, int32_t dimensions, int64_t first, int64_t second, int64_t third) {
    Entry* entry = reinterpret_cast<Entry*>(this + 1) + entries_++;
    const int64_t shape[3] = {first, second, third};
    int64_t stride = 1;
    for (int32_t i = dimensions; i-- > 0;) {
      entry->shape[i] = shape[i];
      entry->strides[i] = stride;
      stride *= shape[i] > 1 ? shape[i] : 1;
    }
    entry->managed = Managed{{1, 0}, this, release, 0, {data_ + offset, {kCpu, 0}, dimensions, type, entry->shape, entry->strides, 0}};
    users_.fetch_add(1, std::memory_order_relaxed);
    void* made = nullptr;
    if (exchange->to_python(&entry->managed, &made) == 0) return static_cast<PyObject*>(made);
    drop();
    return nullptr;
  }

  // Whoever made the block is its first user.
  void drop() {
    if (users_.fetch_sub(1, std::memory_order_acq_rel) == 1) std::free(this);
  }

 private:
  struct Entry {
    Managed managed;
    int64_t shape[3], strides[3];
  };
  static void release(Managed* self) { static_cast<Block*>(self->owner)->drop(); }

  std::atomic<size_t> users_{1};
  size_t entries_ = 0;
  char* data_ = nullptr;
};

// ---------------------------------------------------------------------------------------------------------------------
// What is given out: tensors of an image, in a dict, in a tuple or as rows
// ---------------------------------------------------------------------------------------------------------------------

// A reference that is given back at the end, unless it is released to someone else.
class Reference {
 public:
  explicit Reference(PyObject* object) : object_(object) {}
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  ~Reference() { Py_XDECREF(object_); }
  explicit operator bool() const { return object_ != nullptr; }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

// A block that its maker lets go of at the end.
class Holder {
 public:
  explicit Holder(Block* block) : block_(block) {}
  Holder(const Holder&) = delete;
  Holder& operator=(const Holder&) = delete;
  ~Holder() {
    if (block_) block_->drop();
  }
  explicit operator bool() const { return block_ != nullptr; }
  Block* operator->() const { return block_; }

 private:
  Block* block_;
};

// A contiguous array of `count` rows, of `width` elements where there are two dimensions.
struct Array {
  size_t offset;
  ElementType type;
  int32_t dimensions;
  int64_t count, width;
};

PyObject* make(const Holder& block, const Array& of) {
  return block->tensor(of.offset, of.type, of.dimensions, of.count, of.width, 1);
}

// One image's arrays as a dict by `names`, or as a tuple where there are none.
PyObject* collection(const Holder& block, PyObject* names, const std::vector<Array>& arrays) {
  const Py_ssize_t count = static_cast<Py_ssize_t>(arrays.size());
  Reference all(names == Py_None ? PyTuple_New(count) : PyDict_New());
  for (Py_ssize_t i = 0; all && i < count; ++i) {
    Reference made(make(block, arrays[i]));
    if (!made) return nullptr;
    if (names == Py_None) {
      PyTuple_SetItem(all.get(), i, made.release());
    } else {
      PyObject* name = PyTuple_GetItem(names, i);
      if (!name || PyDict_SetItem(all.get(), name, made.get()) != 0) return nullptr;
    }
  }
  return all.release();
}

// ---------------------------------------------------------------------------------------------------------------------
// The decode
// ---------------------------------------------------------------------------------------------------------------------

// What a decode does, as kernels/cpu/decode.py packs it.
struct Plan {
  int64_t top_k, activation, per_query, background, box_format, clip, out_format, sizes, has_threshold;
  double threshold;
};
enum Background : int64_t { kNoBackground = 0, kFirst = 1, kLast = 2 };
enum Sizes : int64_t { kSwapped = 1, kPairs = 2, kNeeded = 4 };  // (width, height); a list of pairs will do; None will not

int64_t address(const void* at) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(at)); }

// Tells whether DETPOST_KERNEL asks for another form. Read at every call, as the dispatch does.
bool is_served() {
  const char* wanted = "native";
#if defined(_WIN32)
  char forced[16] = {};  // the system's own: a C library may keep a copy that Python does not write to
  const DWORD length = GetEnvironmentVariableA("DETPOST_KERNEL", forced, sizeof forced);
  return length == 0 || (length < sizeof forced && std::strcmp(forced, wanted) == 0);
#else
  const char* forced = std::getenv("DETPOST_KERNEL");
  return !forced || !*forced || std::strcmp(forced, wanted) == 0;
#endif
}

// A call of the decode, and the memory that it reads beside the caller's.
struct Prepared {
  DecodeCall call{};
  std::vector<float> sizes;
};

bool number_of(PyObject* value, double* number) {
  if (!PyFloat_CheckExact(value) && !PyLong_CheckExact(value)) return false;
  *number = PyFloat_AsDouble(value);
  if (*number == -1.0 && PyErr_Occurred()) return PyErr_Clear(), false;
  return true;
}

// A list or tuple of pairs of numbers, one for each image.
bool read_pairs(PyObject* pairs, int64_t batch, std::vector<float>* sizes) {
  if (!PyList_CheckExact(pairs) && !PyTuple_CheckExact(pairs)) return false;
  if (PySequence_Size(pairs) != batch) return false;
  for (int64_t image = 0; image < batch; ++image) {
    PyObject* pair = PyList_CheckExact(pairs) ? PyList_GetItem(pairs, image) : PyTuple_GetItem(pairs, image);
    const bool is_list = PyList_CheckExact(pair);
    if (!(is_list || PyTuple_Check(pair)) || PySequence_Size(pair) != 2) return false;
    for (int side = 0; side < 2; ++side) {
      double number;
      if (!number_of(is_list ? PyList_GetItem(pair, side) : PyTuple_GetItem(pair, side), &number)) return false;
      sizes->push_back(static_cast<float>(number));
    }
  }
  return true;
}

Taken read_sizes(PyObject* given, int64_t how, Prepared* into) {
  DecodeCall& call = into->call;
  if (given == Py_None) return how & kNeeded ? kNotTaken : kTaken;
  if ((how & kPairs) && read_pairs(given, call.batch, &into->sizes)) {
    call.size_type = kSizesFloat32;
  } else {
    into->sizes.clear();
    Strided sizes;
    const Taken taken = read(given, &sizes);
    if (taken != kTaken) return taken;
    const bool fits = sizes.dimensions == 2 && sizes.shape[0] == call.batch && sizes.shape[1] == 2;
    call.size_type = sizes.type == kFloat32 ? kSizesFloat32 : sizes.type == kInt32 ? kSizesInt32 : sizes.type == kInt64 ? kSizesInt64 : kNoSizes;
    if (!fits || call.size_type == kNoSizes) return kNotTaken;
    call.sizes = address(sizes.data);
    if (!(how & kSwapped)) return kTaken;
    for (int64_t i = 0; i < 2 * call.batch; ++i) {
      into->sizes.push_back(call.size_type == kSizesFloat32 ? static_cast<const float*>(sizes.data)[i]
                            : call.size_type == kSizesInt32 ? static_cast<float>(static_cast<const int32_t*>(sizes.data)[i])
                                                            : static_cast<float>(static_cast<const int64_t*>(sizes.data)[i]));
    }
    call.size_type = kSizesFloat32;
  }
  for (int64_t i = 0; (how & kSwapped) && i < 2 * call.batch; i += 2) std::swap(into->sizes[i], into->sizes[i + 1]);
  call.sizes = address(into->sizes.data());
  return kTaken;
}

// Of scores, the boxes are the first four columns, and what is given as such is None.
Taken read_outputs(PyObject* given_logits, PyObject* given_boxes, int64_t activation, Prepared* into) {
  DecodeCall& call = into->call;
  Strided logits, boxes;
  Taken taken = read(given_logits, &logits);
  if (taken != kTaken) return taken;
  if (logits.dimensions != 3) return kNotTaken;
  call.dtype = logits.type == kFloat32 ? 0 : logits.type == kFloat16 ? 1 : logits.type == kBFloat16 ? 2 : -1;
  call.batch = logits.shape[0], call.queries = logits.shape[1], call.classes = logits.shape[2];
  call.logits_stride = call.classes, call.boxes_stride = 4;
  call.logits = address(logits.data);
  if (activation == kScores) {
    call.classes -= 4, call.boxes_stride = call.logits_stride;
    call.boxes = call.logits, call.logits += 4 * static_cast<int64_t>(sizeof(float));
    return call.dtype == 0 && call.classes > 0 ? kTaken : kNotTaken;
  }
  taken = read(given_boxes, &boxes);
  if (taken != kTaken) return taken;
  call.boxes = address(boxes.data);
  const bool fits = boxes.dimensions == 3 && boxes.shape[0] == call.batch && boxes.shape[1] == call.queries && boxes.shape[2] == 4;
  return fits && boxes.type == kFloat32 && call.dtype >= 0 && call.classes > 0 ? kTaken : kNotTaken;
}

// Arguments: plan, threads, logits, boxes, image_sizes.
Taken prepare(PyObject* const* arguments, Prepared* into) {
  if (!decode_of_kernels || !is_served()) return kNotTaken;
  char* raw;
  Py_ssize_t length;
  Plan plan;
  if (PyBytes_AsStringAndSize(arguments[0], &raw, &length) != 0) return kError;
  if (length != sizeof plan) return PyErr_SetString(PyExc_ValueError, "a plan of another length"), kError;
  std::memcpy(&plan, raw, sizeof plan);
  DecodeCall& call = into->call;
  Taken taken = read_outputs(arguments[2], arguments[3], plan.activation, into);
  if (taken == kTaken) taken = read_sizes(arguments[4], plan.sizes, into);
  if (taken != kTaken) return taken;
  const int64_t candidates = plan.per_query ? call.queries : call.queries * call.classes;
  call.kept = std::min(plan.top_k ? plan.top_k : call.queries, candidates);  // 0: as many as there are queries
  if (call.batch == 0 || call.kept == 0) return kNotTaken;
  const long threads = PyLong_AsLong(arguments[1]);
  if (threads == -1 && PyErr_Occurred()) return kError;
  call.threads = threads;
  call.activation = plan.activation, call.selection = plan.per_query;
  call.background = plan.background == kNoBackground ? -1 : plan.background == kFirst ? 0 : call.classes - 1;
  call.box_format = plan.box_format, call.clip = plan.clip, call.out_format = plan.out_format;
  call.has_threshold = plan.has_threshold, call.threshold = plan.threshold;
  return kTaken;
}

// All slots of a batch: where each field stands in a block.
struct Slots {
  size_t labels, queries, boxes, scores, valid, bytes;
  explicit Slots(int64_t count) {
    const size_t n = static_cast<size_t>(count);
    labels = 0;
    queries = labels + 8 * n;
    boxes = queries + 8 * n;
    scores = boxes + 16 * n;
    valid = scores + 4 * n;
    bytes = valid + n;
  }
};

// Decodes into a new block; null with Python's error set.
Block* run(DecodeCall* call, const Slots& slots, size_t tensors) {
  Block* block = Block::make(slots.bytes, tensors);
  if (!block) return PyErr_NoMemory(), nullptr;
  call->out_labels = address(block->at<void>(slots.labels));
  call->out_queries = address(block->at<void>(slots.queries));
  call->out_boxes = address(block->at<void>(slots.boxes));
  call->out_scores = address(block->at<void>(slots.scores));
  call->out_valid = address(block->at<void>(slots.valid));
  int outcome;
  Py_BEGIN_ALLOW_THREADS;
  outcome = decode_of_kernels(reinterpret_cast<const char*>(call));
  Py_END_ALLOW_THREADS;
  if (outcome == 0) return block;
  block->drop();
  if (outcome == 1) {
    PyErr_SetString(PyExc_MemoryError,
                    "detpost's C++ kernels got no memory in detpost_decode: give fewer images at a time, or set DETPOST_KERNEL=aten");
  } else {
    PyErr_SetString(PyExc_RuntimeError,
                    "detpost_decode of detpost's C++ kernels failed: set DETPOST_KERNEL=aten and report it");
  }
  return nullptr;
}

// decode(plan, threads, logits, boxes, image_sizes): the five fields of Detections, or None.
PyObject* decode(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) return PyErr_Format(PyExc_TypeError, "decode takes 5 arguments; got %zd", count);
  Prepared prepared;
  const DecodeCall& call = prepared.call;
  const Taken taken = prepare(arguments, &prepared);
  if (taken == kNotTaken) Py_RETURN_NONE;
  if (taken == kError) return nullptr;
  const Slots slots(call.batch * call.kept);
  const Holder block(run(&prepared.call, slots, 5));
  if (!block) return nullptr;
  Reference fields(PyTuple_New(5));
  if (!fields) return nullptr;
  const size_t offsets[5] = {slots.scores, slots.labels, slots.boxes, slots.queries, slots.valid};
  const ElementType types[5] = {kFloat32, kInt64, kFloat32, kInt64, kBool};
  for (int i = 0; i < 5; ++i) {
    PyObject* made = block->tensor(offsets[i], types[i], i == 2 ? 3 : 2, call.batch, call.kept, 4);
    if (!made) return nullptr;
    PyTuple_SetItem(fields.get(), i, made);
  }
  return fields.release();
}

// What is made of an image's detections: a dict of tensors, kornia's rows or Ultralytics'.
enum Layout : long { kDict = 0, kLabelScoreBox = 1, kBoxScoreLabel = 2 };

// The slots of an image that are given out, in their order: all of them, or the first that are valid (no other slot is
// ahead of them), by query where that is asked.
void choose(const DecodeCall& call, int64_t image, bool all, bool by_query, std::vector<int64_t>* chosen) {
  const uint8_t* valid = reinterpret_cast<const uint8_t*>(call.out_valid);
  const int64_t* queries = reinterpret_cast<const int64_t*>(call.out_queries);
  const size_t before = chosen->size();
  for (int64_t slot = image * call.kept; slot < (image + 1) * call.kept; ++slot) {
    if (all || valid[slot]) chosen->push_back(slot);
  }
  if (!by_query) return;
  // Those that are not valid read query -1, and come last.
  std::stable_sort(chosen->begin() + before, chosen->end(), [queries](int64_t one, int64_t other) {
    return static_cast<uint64_t>(queries[one]) < static_cast<uint64_t>(queries[other]);
  });
}

template <typename T, int kWidth>
size_t gather(const int64_t from, const std::vector<int64_t>& chosen, const Holder& block, size_t offset) {
  const T* source = reinterpret_cast<const T*>(from);
  T* to = block->at<T>(offset);
  for (const int64_t slot : chosen) {
    std::memcpy(to, source + kWidth * slot, kWidth * sizeof(T));
    to += kWidth;
  }
  return offset + chosen.size() * kWidth * sizeof(T);
}

// Where the rows of all images stand in a block, and what they are; `row` in bytes.
struct Field {
  size_t offset, row;
  ElementType type;
  int32_t dimensions;
  int64_t width;
};

PyObject* dicts_of(const DecodeCall& call, const std::vector<int64_t>& chosen, const std::vector<int64_t>& ends, PyObject* names) {
  const size_t count = static_cast<size_t>(PyTuple_Size(names));
  const Holder block(Block::make(36 * chosen.size(), count * static_cast<size_t>(call.batch)));
  if (!block) return PyErr_NoMemory();
  const size_t labels = 0, queries = gather<int64_t, 1>(call.out_labels, chosen, block, labels);
  const size_t boxes = gather<int64_t, 1>(call.out_queries, chosen, block, queries);
  const size_t scores = gather<float, 4>(call.out_boxes, chosen, block, boxes);
  gather<float, 1>(call.out_scores, chosen, block, scores);
  std::vector<Field> fields;
  for (size_t i = 0; i < count; ++i) {
    Reference name(PyUnicode_AsUTF8String(PyTuple_GetItem(names, static_cast<Py_ssize_t>(i))));
    if (!name) return nullptr;
    switch (PyBytes_AsString(name.get())[0]) {
      case 's': fields.push_back({scores, 4, kFloat32, 1, 1}); break;
      case 'l': fields.push_back({labels, 8, kInt64, 1, 1}); break;
      case 'b': fields.push_back({boxes, 16, kFloat32, 2, 4}); break;
      default: fields.push_back({queries, 8, kInt64, 1, 1});
    }
  }
  std::vector<Array> arrays(count);
  Reference images(PyList_New(call.batch));
  for (int64_t image = 0; images && image < call.batch; ++image) {
    const size_t first = image ? static_cast<size_t>(ends[image - 1]) : 0;
    const int64_t rows = ends[image] - static_cast<int64_t>(first);
    for (size_t i = 0; i < count; ++i) {
      const Field& field = fields[i];
      arrays[i] = {field.offset + field.row * first, field.type, field.dimensions, rows, field.width};
    }
    PyObject* made = collection(block, names, arrays);
    if (!made) return nullptr;
    PyList_SetItem(images.get(), image, made);
  }
  return images.release();
}

// For each image its part of the rows of six columns at the beginning of a block.
PyObject* rows_by_image(const Holder& block, const std::vector<int64_t>& ends) {
  const int64_t batch = static_cast<int64_t>(ends.size());
  Reference images(PyList_New(batch));
  for (int64_t image = 0; images && image < batch; ++image) {
    const int64_t first = image ? ends[image - 1] : 0;
    PyObject* made = make(block, {24 * static_cast<size_t>(first), kFloat32, 2, ends[image] - first, 6});
    if (!made) return nullptr;
    PyList_SetItem(images.get(), image, made);
  }
  return images.release();
}

PyObject* rows_of(const DecodeCall& call, const std::vector<int64_t>& chosen, const std::vector<int64_t>& ends, long layout) {
  const Holder block(Block::make(24 * chosen.size(), static_cast<size_t>(call.batch)));
  if (!block) return PyErr_NoMemory();
  float* row = block->at<float>(0);
  for (const int64_t slot : chosen) {
    float* box = layout == kLabelScoreBox ? row + 2 : row;
    float* score = layout == kLabelScoreBox ? row + 1 : row + 4;
    float* label = layout == kLabelScoreBox ? row : row + 5;
    std::memcpy(box, reinterpret_cast<const float*>(call.out_boxes) + 4 * slot, 4 * sizeof(float));
    *score = reinterpret_cast<const float*>(call.out_scores)[slot];
    *label = static_cast<float>(reinterpret_cast<const int64_t*>(call.out_labels)[slot]);
    row += 6;
  }
  return rows_by_image(block, ends);
}

// Beyond these PyTorch's comparison raises an error.
bool threshold_of(PyObject* value, double* threshold) {
  return number_of(value, threshold) && *threshold > -1e30 && *threshold < 1e30;
}

// per_image(plan, threads, logits, boxes, image_sizes, layout, names, threshold, all, by_query): for each image what the
// layout says of its detections, exact in size; or None.
PyObject* per_image(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 10) return PyErr_Format(PyExc_TypeError, "per_image takes 10 arguments; got %zd", count);
  Prepared prepared;
  DecodeCall& call = prepared.call;
  const Taken taken = prepare(arguments, &prepared);
  if (taken == kNotTaken) Py_RETURN_NONE;
  if (taken == kError) return nullptr;
  const long layout = PyLong_AsLong(arguments[5]);
  if (arguments[7] != Py_None) {
    if (!threshold_of(arguments[7], &call.threshold)) Py_RETURN_NONE;
    call.has_threshold = 1;
  }
  const bool all = arguments[8] == Py_True, by_query = arguments[9] == Py_True;
  const Holder block(run(&call, Slots(call.batch * call.kept), 0));
  if (!block) return nullptr;
  std::vector<int64_t> chosen, ends;
  chosen.reserve(static_cast<size_t>(call.batch * call.kept));
  for (int64_t image = 0; image < call.batch; ++image) {
    choose(call, image, all, by_query, &chosen);
    ends.push_back(static_cast<int64_t>(chosen.size()));
  }
  return layout == kDict ? dicts_of(call, chosen, ends, arguments[6]) : rows_of(call, chosen, ends, layout);
}

// selected(rows, sizes, threshold, most): of each image's rows of box, score and class those above the threshold, at most so
// many, with their boxes' corners in pixels; or None.
PyObject* selected(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "selected takes 4 arguments; got %zd", count);
  Prepared prepared;
  Strided rows;
  double limit, most;
  if (!is_served() || !threshold_of(arguments[2], &limit) || !number_of(arguments[3], &most)) Py_RETURN_NONE;
  Taken taken = read(arguments[0], &rows);
  const bool fits = taken == kTaken && rows.dimensions == 3 && rows.shape[2] == 6 && rows.type == kFloat32;
  if (taken == kTaken && !fits) taken = kNotTaken;
  if (taken == kTaken) {
    prepared.call.batch = rows.shape[0];
    taken = read_sizes(arguments[1], kSwapped | kPairs | kNeeded, &prepared);
  }
  if (taken == kNotTaken) Py_RETURN_NONE;
  if (taken == kError) return nullptr;
  const float* from = static_cast<const float*>(rows.data);
  const float threshold = static_cast<float>(limit);
  std::vector<int64_t> chosen, ends;
  for (int64_t image = 0; image < rows.shape[0]; ++image) {
    const size_t before = chosen.size();
    for (int64_t row = image * rows.shape[1]; row < (image + 1) * rows.shape[1]; ++row) {
      if (static_cast<double>(chosen.size() - before) >= most) break;
      if (from[6 * row + 4] > threshold) chosen.push_back(row);
    }
    ends.push_back(static_cast<int64_t>(chosen.size()));
  }
  const Holder block(Block::make(24 * chosen.size(), ends.size()));
  if (!block) return PyErr_NoMemory();
  float* to = block->at<float>(0);
  size_t image = 0;
  for (size_t i = 0; i < chosen.size(); ++i, to += 6) {
    while (static_cast<int64_t>(i) >= ends[image]) ++image;
    const float* row = from + 6 * chosen[i];
    const float width = prepared.sizes[2 * image], height = prepared.sizes[2 * image + 1];
    const float half_width = 0.5f * row[2], half_height = 0.5f * row[3];
    to[0] = (row[0] - half_width) * width, to[1] = (row[1] - half_height) * height;
    to[2] = (row[0] + half_width) * width, to[3] = (row[1] + half_height) * height;
    to[4] = row[4], to[5] = row[5];
  }
  return rows_by_image(block, ends);
}

// ---------------------------------------------------------------------------------------------------------------------
// Padded tensors, split by image
// ---------------------------------------------------------------------------------------------------------------------

struct Padded {
  Strided read;
  size_t row, offset;  // bytes of a slot; where its copy begins
};

// split(names, valid, *values): for each image the rows of each value whose slot is valid, in a dict by `names` or a tuple;
// or None.
PyObject* split(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count < 3) return PyErr_Format(PyExc_TypeError, "split takes at least 3 arguments; got %zd", count);
  Strided mask;
  Taken taken = read(arguments[1], &mask);
  if (taken == kTaken && !(mask.dimensions == 2 && mask.type == kBool)) taken = kNotTaken;
  std::vector<Padded> values(static_cast<size_t>(count - 2));
  for (size_t i = 0; taken == kTaken && i < values.size(); ++i) {
    Strided& value = values[i].read;
    taken = read(arguments[i + 2], &value);
    if (taken != kTaken) break;
    const bool fits = (value.dimensions == 2 || value.dimensions == 3) && value.shape[0] == mask.shape[0] && value.shape[1] == mask.shape[1];
    if (!fits || value.type.bits % 8 != 0) taken = kNotTaken;
    values[i].row = value.type.bits / 8 * static_cast<size_t>(value.dimensions == 3 ? value.shape[2] : 1);
  }
  if (taken == kNotTaken) Py_RETURN_NONE;
  if (taken == kError) return nullptr;
  const int64_t batch = mask.shape[0], kept = mask.shape[1];
  const uint8_t* valid = static_cast<const uint8_t*>(mask.data);
  std::vector<int64_t> counts;
  int64_t total = 0;
  for (int64_t image = 0; image < batch; ++image) {
    const int64_t here = std::count_if(valid + image * kept, valid + (image + 1) * kept, [](uint8_t is) { return is != 0; });
    counts.push_back(here);
    total += here;
  }
  size_t bytes = 0;
  for (Padded& value : values) {
    value.offset = bytes;
    bytes += (value.row * static_cast<size_t>(total) + 63) & ~size_t(63);
  }
  const Holder block(Block::make(bytes, values.size() * static_cast<size_t>(batch)));
  if (!block) return PyErr_NoMemory();
  for (const Padded& value : values) {
    char* to = block->at<char>(value.offset);
    const char* from = static_cast<const char*>(value.read.data);
    for (int64_t slot = 0; slot < batch * kept;) {  // a run of valid slots at a time
      const int64_t first = slot;
      const bool is_valid = valid[slot] != 0;
      while (slot < batch * kept && (valid[slot] != 0) == is_valid) ++slot;
      if (!is_valid) continue;
      const size_t length = static_cast<size_t>(slot - first) * value.row;
      std::memcpy(to, from + static_cast<size_t>(first) * value.row, length);
      to += length;
    }
  }
  std::vector<Array> arrays(values.size());
  Reference images(PyList_New(batch));
  int64_t before = 0;
  for (int64_t image = 0; images && image < batch; ++image) {
    for (size_t i = 0; i < values.size(); ++i) {
      const Strided& read = values[i].read;
      const size_t offset = values[i].offset + static_cast<size_t>(before) * values[i].row;
      arrays[i] = {offset, read.type, read.dimensions - 1, counts[image], read.dimensions == 3 ? read.shape[2] : 1};
    }
    PyObject* made = collection(block, arguments[0], arrays);
    if (!made) return nullptr;
    PyList_SetItem(images.get(), image, made);
    before += counts[image];
  }
  return images.release();
}

// No exception leaves the library: CPython's frames stop none.
template <PyObject* (*kFunction)(PyObject*, PyObject* const*, Py_ssize_t)>
PyObject* guarded(PyObject* self, PyObject* const* arguments, Py_ssize_t count) noexcept {
  try {
    return kFunction(self, arguments, count);
  } catch (...) {  // of the standard library's vectors: no memory
    return PyErr_NoMemory();
  }
}

template <PyObject* (*kFunction)(PyObject*, PyObject* const*, Py_ssize_t)>
PyCFunction fast() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(guarded<kFunction>));
}

PyMethodDef kMethods[] = {
    {"bind", fast<bind>(), METH_FASTCALL, nullptr},
    {"bind_decode", fast<bind_decode>(), METH_FASTCALL, nullptr},
    {"decode", fast<decode>(), METH_FASTCALL, nullptr},
    {"per_image", fast<per_image>(), METH_FASTCALL, nullptr},
    {"selected", fast<selected>(), METH_FASTCALL, nullptr},
    {"split", fast<split>(), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

constexpr int kInterface = 2;  // raised with every change of what is above: tensors.py refuses another number

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_tensors", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__tensors() {
  requires_grad_name = PyUnicode_InternFromString("requires_grad");
  PyObject* module = requires_grad_name ? PyModule_Create(&kModule) : nullptr;
  if (module && PyModule_AddIntConstant(module, "INTERFACE", kInterface) != 0) return nullptr;
  return module;
}
