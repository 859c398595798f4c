// Mean squared error of C students against one teacher, with its gradient in the same pass over memory.
//
// The teacher is split into tiles that stay in the cache while all students are compared with them. Tiles depend only
// on the shape, and their sums are added in order, so results do not depend on the number of threads.

#include <tuple>
#include <vector>

#include "support.h"

namespace dcvit::cpu {
namespace {

constexpr int64_t kTile = 8192;  // the teacher's numbers in a tile, 32 KB in float32
constexpr int64_t kGrain = 4;    // the fewest tiles of a thread
constexpr int kLanes = 32;

// For one token of one student, adds weight * (s - t)^2 to the lanes and writes unit = factor * (s - t).
template <bool kUnit, typename T>
DCVIT_HD void compare(const T* __restrict s, const T* __restrict t, T* __restrict unit, int64_t width, Wide<T> weight,
                      Wide<T> factor, double* __restrict totals) {
  Wide<T> sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const Wide<T> difference = Wide<T>(s[i + lane]) - Wide<T>(t[i + lane]);
      sums[lane] += difference * difference;
      if constexpr (kUnit) unit[i + lane] = T(factor * difference);
    }
  }
  for (int lane = 0; i < width; ++i, ++lane) {
    const Wide<T> difference = Wide<T>(s[i]) - Wide<T>(t[i]);
    sums[lane] += difference * difference;
    if constexpr (kUnit) unit[i] = T(factor * difference);
  }
  for (int lane = 0; lane < kLanes; ++lane) totals[lane] += double(weight) * double(sums[lane]);
}

template <typename T>
struct Problem {
  const T* student;
  const T* teacher;
  T* unit;                // or null
  const Wide<T>* weight;  // or null
  int64_t candidates, rows, tokens, width;
  double scale;  // 1 / (B D sum weight)
};

// The weighted sum of squares of rows [begin, end) of student c.
template <bool kUnit, typename T>
DCVIT_HD double compare_rows(const Problem<T>& p, int64_t c, int64_t begin, int64_t end) {
  double totals[kLanes] = {};
  const int64_t start = c * p.rows * p.width;
  for (int64_t row = begin; row < end; ++row) {
    const Wide<T> weight = p.weight ? p.weight[row % p.tokens] : Wide<T>(1);
    const int64_t at = start + row * p.width;
    compare<kUnit>(p.student + at, p.teacher + row * p.width, kUnit ? p.unit + at : nullptr, p.width, weight,
                   Wide<T>(2 * double(weight) * p.scale), totals);
  }
  double total = 0;
  for (double lane : totals) total += lane;
  return total;
}

#define DCVIT_DEFINE(T)                                                                                      \
  DCVIT_CLONES double squares(const Problem<T>& p, int64_t c, int64_t begin, int64_t end) {                  \
    return p.unit ? compare_rows<true>(p, c, begin, end) : compare_rows<false>(p, c, begin, end);            \
  }                                                                                                          \
  /* Writes factor * (s - t) for one token. */                                                               \
  DCVIT_CLONES void gradient(const T* __restrict s, const T* __restrict t, T* __restrict out, int64_t width, \
                             Wide<T> factor) {                                                               \
    for (int64_t i = 0; i < width; ++i) out[i] = T(factor * (Wide<T>(s[i]) - Wide<T>(t[i])));                \
  }                                                                                                          \
  DCVIT_CLONES void multiply(T* values, int64_t count, Wide<T> factor) {                                     \
    for (int64_t i = 0; i < count; ++i) values[i] = T(Wide<T>(values[i]) * factor);                          \
  }
DCVIT_DEFINE(float)
DCVIT_DEFINE(double)
DCVIT_DEFINE(Half)
DCVIT_DEFINE(BFloat16)
#undef DCVIT_DEFINE

void check(const char* op, const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight) {
  STD_TORCH_CHECK(student.dim() == 4 && teacher.dim() == 3, op,
                  ": expected student [C, B, N, D] and teacher [B, N, D], got ", student.dim(), " and ", teacher.dim(),
                  " dimensions");
  for (int64_t i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(student.size(i + 1) == teacher.size(i), op, ": expected size ", student.size(i + 1),
                    " in dimension ", i, " of teacher, as in student, got ", teacher.size(i));
  }
  STD_TORCH_CHECK(student.scalar_type() == teacher.scalar_type(), op, ": expected one dtype, got student ",
                  static_cast<int>(student.scalar_type()), " and teacher ", static_cast<int>(teacher.scalar_type()));
  if (weight) {
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == teacher.size(1), op, ": expected weight [",
                    teacher.size(1), "], got ", weight->numel(), " numbers");
    STD_TORCH_CHECK(weight->scalar_type() == wide_type(student.scalar_type()), op,
                    ": expected weight in float32, or float64 for a float64 student, got ",
                    static_cast<int>(weight->scalar_type()));
  }
}

// 1 / (B D sum weight)
template <typename T>
double scale_of(const Tensor& teacher, const Wide<T>* weight) {
  double sum = weight ? 0 : static_cast<double>(teacher.size(1));
  for (int64_t n = 0; weight && n < teacher.size(1); ++n) sum += static_cast<double>(weight[n]);
  return 1 / (sum * static_cast<double>(teacher.size(0)) * static_cast<double>(teacher.size(2)));
}

std::tuple<Tensor, Tensor> distillation_loss(const Tensor& student_in, const Tensor& teacher_in,
                                             const std::optional<Tensor>& weight_in, bool with_unit) {
  check("distillation_loss", student_in, teacher_in, weight_in);
  const Tensor student = dense(student_in), teacher = dense(teacher_in);
  const std::optional<Tensor> weight = dense(weight_in);
  const int64_t candidates = student.size(0), batch = student.size(1), tokens = student.size(2),
                width = student.size(3);
  Tensor losses = make(student, {candidates}, wide_type(student.scalar_type()));
  Tensor unit = with_unit ? make_huge(student, {candidates, batch, tokens, width}) : make(student, {0});

  dispatch_all("distillation_loss", student.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Wide<T>* weights = weight ? data<Wide<T>>(*weight) : nullptr;
    const Problem<T> p{data<T>(student),
                       data<T>(teacher),
                       with_unit ? data<T>(unit) : nullptr,
                       weights,
                       candidates,
                       batch * tokens,
                       tokens,
                       width,
                       scale_of<T>(teacher, weights)};
    const int64_t rows = std::max<int64_t>(1, kTile / std::max<int64_t>(1, width));
    const int64_t tiles = ceil_div(p.rows, rows);
    std::vector<double> partial(tiles * candidates);
    parallel(tiles, ceil_div(kGrain, std::max<int64_t>(1, candidates)), [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        for (int64_t c = 0; c < candidates; ++c) {
          partial[tile * candidates + c] = squares(p, c, tile * rows, std::min(p.rows, (tile + 1) * rows));
        }
      }
    });
    for (int64_t c = 0; c < candidates; ++c) {
      double total = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) total += partial[tile * candidates + c];
      data<Wide<T>>(losses)[c] = Wide<T>(total * p.scale);  // 0 * inf is NaN where there are no tokens
    }
  });
  return {losses, unit};
}

Tensor distillation_loss_backward(const Tensor& grad_in, const Tensor& student_in, const Tensor& teacher_in,
                                  const std::optional<Tensor>& weight_in) {
  check("distillation_loss_backward", student_in, teacher_in, weight_in);
  const Tensor grad = dense(grad_in), student = dense(student_in), teacher = dense(teacher_in);
  const std::optional<Tensor> weight = dense(weight_in);
  const int64_t candidates = student.size(0), batch = student.size(1), tokens = student.size(2),
                width = student.size(3);
  STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == candidates, "distillation_loss_backward: expected grad [",
                  candidates, "], got ", grad.numel(), " numbers");
  STD_TORCH_CHECK(grad.scalar_type() == wide_type(student.scalar_type()),
                  "distillation_loss_backward: expected grad in the dtype of the losses, got ",
                  static_cast<int>(grad.scalar_type()));
  Tensor out = make_huge(student, {candidates, batch, tokens, width});
  dispatch_all("distillation_loss_backward", student.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Wide<T>* weights = weight ? data<Wide<T>>(*weight) : nullptr;
    const double scale = 2 * scale_of<T>(teacher, weights);
    const int64_t rows = batch * tokens, row_grain = ceil_div(kGrain * kTile, std::max<int64_t>(1, width * candidates));
    parallel(rows, row_grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t c = 0; c < candidates; ++c) {
          const double token = weights ? static_cast<double>(weights[row % tokens]) : 1.0;
          const double factor = scale * token * static_cast<double>(data<Wide<T>>(grad)[c]);
          const int64_t at = (c * rows + row) * width;
          gradient(data<T>(student) + at, data<T>(teacher) + row * width, data<T>(out) + at, width, Wide<T>(factor));
        }
      }
    });
  });
  return out;
}

void distillation_loss_rescale(Tensor unit, const Tensor& grad_in) {
  const Tensor grad = dense(grad_in);
  STD_TORCH_CHECK(unit.dim() == 4 && unit.is_contiguous(),
                  "distillation_loss_rescale: expected a contiguous unit [C, B, N, D], got ", unit.dim(),
                  " dimensions");
  STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == unit.size(0), "distillation_loss_rescale: expected grad [",
                  unit.size(0), "], got ", grad.numel(), " numbers");
  STD_TORCH_CHECK(grad.scalar_type() == wide_type(unit.scalar_type()),
                  "distillation_loss_rescale: expected grad in the dtype of the losses, got ",
                  static_cast<int>(grad.scalar_type()));
  dispatch_all("distillation_loss_rescale", unit.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t size = unit.size(1) * unit.size(2) * unit.size(3);
    for (int64_t c = 0; c < unit.size(0); ++c) {
      const Wide<T> factor = data<Wide<T>>(grad)[c];
      if (factor == Wide<T>(1)) continue;
      T* values = data<T>(unit) + c * size;
      parallel(size, kGrain * kTile,
               [&](int64_t begin, int64_t end) { multiply(values + begin, end - begin, factor); });
    }
  });
}

}  // namespace

DCVIT_LIBRARY_IMPL(dcvit, CPU, m) {
  m.impl("distillation_loss", DCVIT_KERNEL(&distillation_loss));
  m.impl("distillation_loss_backward", DCVIT_KERNEL(&distillation_loss_backward));
  m.impl("distillation_loss_rescale", DCVIT_KERNEL(&distillation_loss_rescale));
}

}  // namespace dcvit::cpu
