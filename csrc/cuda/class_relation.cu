// Relations inside of classes on the GPU: cosines between the samples of one class, student against teacher.
//
// Bytes: student and teacher read, gradient written, 3 passes over matrices that the caches of a GPU mostly hold; the
// student is read once more for the gradient. Arithmetic: sum n_k (n_k + 1) / 2 products of rows a side and sum n_k²
// for the gradient, all in float32 at least. With many classes it is launches that take time; with few, arithmetic, for
// which 64 rows are read for 32 x 32 products, and one number for 8 multiplications in the gradient.
//
// Launches: two, of one block or two for a sample. The first finds the classes and multiplies rows; the second, which
// knows how many classes there are, makes cosines of the products, and loss and gradient of the cosines. There is one
// more where student and teacher differ in dtype or alignment, and one more to find the classes of over 512 samples.
// Between the two, at most as many products are kept a side as the student has numbers, or kKept a multiprocessor;
// batches one of whose classes could have more are gone through in stretches, after one launch for the norms.
//
// Any strides are read in place; dense and aligned rows 16 bytes at a time.

#include "cuda/class_relation_combine.cuh"
#include "cuda/class_relation_gram.cuh"

namespace debiaskd {
namespace {

constexpr int64_t kKept = 1 << 15;
constexpr int64_t kMostSamples = 1 << 29;  // two blocks for each, and no place beyond an int

// Parts of one allocation, each aligned to 16 bytes: asking for many would take longer than small batches do.
class Memory {
 public:
  Memory(Scratch& scratch, int64_t bytes) : next_(reinterpret_cast<unsigned char*>(scratch.doubles(bytes / 8))) {}

  static int64_t bytes(int64_t count, int64_t size) { return (count * size + 15) / 16 * 16; }

  template <typename A>
  A* take(int64_t count) {
    return static_cast<A*>(take(count, sizeof(A)));
  }
  void* take(int64_t count, int64_t size) {
    unsigned char* taken = next_;
    next_ += bytes(count, size);
    return taken;
  }

 private:
  unsigned char* next_;
};

int64_t accumulator_size(const Tensor& x) { return accumulator_type(x.scalar_type()) == ScalarType::Double ? 8 : 4; }

// Elements an access.
int access_width(const Tensor& x, int size) {
  const int widest = 16 / size;
  const bool dense = x.stride(1) == 1 && x.size(1) % widest == 0 && x.stride(0) % widest == 0;
  return dense && is_aligned(x.data_ptr()) ? widest : 1;
}

int access_width(const Tensor& x) {
  return dispatch_floating(x.scalar_type(), "features", [&](auto zero) { return access_width(x, sizeof(zero)); });
}

// Calls function(T{}, access width), the width as a constant.
template <typename Function>
void dispatch_access(const Tensor& x, const char* argument, Function&& function) {
  dispatch_floating(x.scalar_type(), argument, [&](auto zero) {
    constexpr int kWide = kWidest<decltype(zero)>;
    if (access_width(x, sizeof(zero)) == 1) return function(zero, std::integral_constant<int, 1>{});
    function(zero, std::integral_constant<int, kWide>{});
  });
}

// One call of the op.
class Call {
 public:
  Call(const Tensor& student, const Tensor& teacher, const Tensor& labels)
      : device_(student), scratch_(student), x_{student, teacher}, samples_(static_cast<int>(student.size(0))) {
    const int64_t samples = samples_, most = std::max(samples * student.size(1), kKept * device_.processors());
    rows_ = static_cast<int>(std::min(samples, std::max<int64_t>(kBand, most / samples)));
    labels_ = {static_cast<const int64_t*>(labels.data_ptr()), labels.stride(0), samples_};
    looks_ = samples_ <= kOwnLabels && rows_ == samples_;
    classes_.parts = looks_ ? samples_ : (samples_ + kGroupRows - 1) / kGroupRows;
    const int64_t products = samples * (rows_ == samples_ ? rows_ : rows_ + kBand - 1);
    const auto of = Memory::bytes;
    int64_t bytes = of(samples, sizeof(int)) + of(samples, sizeof(Group)) + of(classes_.parts, sizeof(int)) +
                    of(1, sizeof(unsigned)) + of(samples, sizeof(double));
    for (const Tensor& x : x_) bytes += of(samples, accumulator_size(x)) + of(products, accumulator_size(x));
    Memory memory(scratch_, bytes);
    classes_.order = memory.take<int>(samples);
    classes_.groups = memory.take<Group>(samples);
    classes_.counts = memory.take<int>(classes_.parts);
    classes_.finished = memory.take<unsigned>(1);
    partial_ = memory.take<double>(samples);
    for (int i = 0; i < 2; ++i) {
      inverse_[i] = memory.take(samples, accumulator_size(x_[i]));
      products_[i] = memory.take(products, accumulator_size(x_[i]));
    }
  }

  void run(Tensor& loss, Tensor* gradient) const {
    if (!looks_) device_.launch(Grid{classes_.parts, kGroupThreads}, group_kernel, labels_, classes_);
    const bool only = rows_ == samples_;
    if (!only) multiply({0, samples_, true}, true);
    for (int begin = 0; begin < samples_; begin += rows_) {
      const Stretch stretch = {begin, std::min(rows_, samples_ - begin), only};
      multiply(stretch, false);
      combine(stretch, begin + rows_ >= samples_ ? &loss : nullptr, gradient);
    }
  }

 private:
  int blocks(const Stretch& stretch) const {
    return std::min(samples_ - stretch.begin, stretch.rows + (stretch.only ? 0 : kBand - 1));
  }

  template <typename X>
  Side<X> side(int i, bool norms_alone) const {
    using A = typename accumulator<X>::type;
    const Tensor& x = x_[i];
    return {static_cast<const X*>(x.data_ptr()), x.stride(0), x.stride(1), x.size(1),
        norms_alone ? nullptr : static_cast<A*>(products_[i]), static_cast<A*>(inverse_[i])};
  }

  // Both sides by one launch, if they are read alike.
  void multiply(const Stretch& stretch, bool norms_alone) const {
    const bool alike = x_[0].scalar_type() == x_[1].scalar_type() && access_width(x_[0]) == access_width(x_[1]);
    Labels labels = labels_;
    if (!looks_) labels.data = nullptr;
    for (int i = 0; i < (alike ? 1 : 2); ++i) {
      dispatch_access(x_[i], i == 0 ? "student" : "teacher", [&](auto zero, auto width) {
        using X = decltype(zero);
        Sides<X> sides = {{side<X>(i, norms_alone), {}}};
        if (alike) sides.side[1] = side<X>(1, norms_alone);
        const int each = blocks(stretch);
        const Grid grid = {static_cast<int64_t>(each) * (alike ? 2 : 1), kGramThreads};
        device_.launch(grid, gram_kernel<X, decltype(width)::value>, labels, classes_, stretch, sides, each, i == 0);
      });
    }
  }

  void combine(const Stretch& stretch, Tensor* loss, Tensor* gradient) const {
    const Tensor& student = x_[0];
    const bool wide = accumulator_size(x_[1]) == 8;
    dispatch_access(student, "student", [&](auto zero, auto width) {
      using T = decltype(zero);
      using A = typename accumulator<T>::type;
      Combination<T> in = {static_cast<const T*>(student.data_ptr()), student.stride(0), student.stride(1),
          student.size(1), static_cast<const A*>(products_[0]), static_cast<const A*>(inverse_[0]),
          {products_[1], wide}, {inverse_[1], wide}, nullptr, partial_, nullptr};
      if (gradient) in.gradient = static_cast<A*>(gradient->data_ptr());
      if (loss) in.loss = static_cast<A*>(loss->data_ptr());
      const Grid grid = {blocks(stretch), kCombineThreads};
      device_.launch(grid, combine_kernel<T, decltype(width)::value>, classes_, stretch, samples_, in);
    });
  }

  Device device_;
  Scratch scratch_;
  Tensor x_[2];  // student, teacher
  int samples_, rows_;
  bool looks_;  // every block for classes, by itself
  Labels labels_;
  Classes classes_;
  double* partial_;
  void *inverse_[2], *products_[2];
};

std::tuple<Tensor, Tensor> class_relation(
    const Tensor& student, const Tensor& teacher, const Tensor& labels, bool with_gradient) {
  const ScalarType type = accumulator_type(student.scalar_type());
  const int64_t samples = student.size(0);
  STD_TORCH_CHECK(samples <= kMostSamples, "student must have at most ", kMostSamples, " rows, got ", samples);
  Tensor loss = new_empty(student, {}, type);
  Tensor gradient = new_empty(student, {with_gradient ? samples : 0, student.size(1)}, type);
  if (samples > 0) {
    Call(student, teacher, labels).run(loss, with_gradient ? &gradient : nullptr);
  } else {
    dispatch_floating(type, "student", [&](auto zero) {
      fold(Device(student), nullptr, 1, 0, static_cast<typename accumulator<decltype(zero)>::type*>(loss.data_ptr()));
    });
  }
  return {loss, gradient};
}

}  // namespace
}  // namespace debiaskd

DEBIASKD_CUDA_LIBRARY(m) { m.impl("class_relation", TORCH_BOX(&debiaskd::class_relation)); }
