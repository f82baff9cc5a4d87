// The functions of triton_kernels/adam_mini.py on CPU tensors, with its legend and formulas.
// native.py compiles this file, without torch's headers, and calls it.
//
// A call is cut into items of about ITEM entries, which threads take one after the other. What is
// summed in which order depends on shapes alone, so the number of threads changes no bit. T, fp32
// or fp64, is the dtype of the arithmetic; squares are summed in T over CHUNK entries of a row or
// STRIP of a column, and from there on in double.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <thread>
#include <vector>

namespace {

constexpr int64_t ITEM = 1 << 16;
constexpr int64_t SHARE = 1 << 18;  // entries for which a thread is worth its start, about 80 us
constexpr int64_t WAKE = 1 << 15;   // entries for which the threads of a pool are worth waking
constexpr int64_t LONG = 1 << 19;   // longer rows are cut: their gradient would not stay in a cache
constexpr int64_t CHUNK = 128;
constexpr int64_t STRIP = 256, WIDTH = 1024;  // rows and columns of an item of column sums

enum Op : int64_t { ONE_PASS, UNIT_SUMS, APPLY };
enum Kind : int64_t { ELEMENTWISE, ROW, COLUMN };
enum Types : int64_t { BF16_PARAM = 1, BF16_GRAD = 2, BF16_EXP_AVG = 4, ROUND_PARAM = 8 };

// GOMP_parallel, of the pool that PyTorch's own operations run on: its idle threads spin for a while
// and would slow others down. Calls its first argument with its second on so many threads.
typedef void Parallel(void (*)(void*), void*, unsigned, unsigned);

struct Piece {  // a row of native.py's table
    int64_t kind, batch, rows, cols;  // stored as [batch, rows, cols]; elementwise as [1, 1, n]
    int64_t unit, units;              // entries of a unit, units of the piece
    int64_t offset, first, index, stride, key, types;
    void *param, *grad, *exp_avg, *exp_avg_sq;
};

struct Item {
    const Piece* piece;
    const double* hyper;      // of the piece; null if only sums are wanted
    void* units;              // T, by unit: step sizes, or where they or the sums go
    double* parts = nullptr;  // part k of the sum of unit u is number u * unit_gap + k * part_gap
    int64_t n_parts = 0, unit_gap = 0, part_gap = 0;
    int64_t row = 0, row_end = 0, col = 0, col_end = 0;  // what of the piece it is about
    void (*run)(const Piece&, const Item&) = nullptr;
};

template <class To, class From>
inline To same_bits(From x) {
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// fp32 to bf16: adds `noise`, or what rounds to the nearest, even if tied, and drops 16 bits.
template <bool STOCHASTIC>
inline uint16_t bf16_of(float x, uint32_t noise) {
    const uint32_t bits = same_bits<uint32_t>(x);
    const bool finite = (bits & 0x7F800000) != 0x7F800000;
    const uint32_t up = STOCHASTIC ? noise : 0x7FFF + (bits >> 16 & 1);
    return uint16_t((finite ? bits + up : bits) >> 16);  // half of a computed NaN is one
}

inline uint32_t mix(uint32_t x) {  // lowbias32
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

// Entries [at, at + n) of a tensor as T: where they are, or converted into `scratch`.
template <class T>
inline T* loaded(void* tensor, int64_t at, int64_t n, bool bf16, T* scratch) {
    if (!bf16) return static_cast<T*>(tensor) + at;
    const uint16_t* const x = static_cast<uint16_t*>(tensor) + at;
    for (int64_t i = 0; i < n; i += 32) __builtin_prefetch(x + i + 512);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) scratch[i] = same_bits<float>(uint32_t(x[i]) << 16);
    return scratch;
}

template <bool STOCHASTIC, class T>
inline void store_bf16(void* tensor, int64_t at, int64_t n, const T* from, const uint32_t* noise,
                       int shift) {
    uint16_t* const x = static_cast<uint16_t*>(tensor) + at;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
        x[i] = bf16_of<STOCHASTIC>(float(from[i]), STOCHASTIC ? noise[i] >> shift & 0xFFFF : 0);
}

template <class T>
inline T lerp(T a, T b, T weight) {  // torch's: exact at weights 0 and 1
    const bool far = weight >= T(0.5);
    return (far ? b : a) + (far ? weight - 1 : weight) * (b - a);
}

template <class T>
inline T next_moment(T v, T mean, T weight) {  // one that has overflowed stays: no inf - inf
    const T next = lerp(v, mean, weight);
    return v == std::numeric_limits<T>::infinity() ? v : next;
}

template <class T>
struct Hyper {
    T step_size, decay, weight1, weight2, root, eps, grad_scale;
    explicit Hyper(const double* h)
        : step_size(T(h[0])), decay(T(h[1])), weight1(T(h[2])), weight2(T(h[3])), root(T(h[4])),
          eps(T(h[5])), grad_scale(T(h[6])) {}
    T step(T v) const { return step_size / (std::sqrt(v) * root + eps); }
};

// Updates exp_avg_sq of unit u of a row piece, and returns its step size.
template <class T>
inline T unit_step(const Piece& w, const double* hyper, int64_t u, double sum) {
    T& v = static_cast<T*>(w.exp_avg_sq)[w.first + u];
    v = next_moment(v, T(sum * hyper[6] * hyper[6] / w.unit), T(hyper[3]));
    return Hyper<T>(hyper).step(v);
}

enum class Steps { SAME, EACH, OWN };  // s[0], s[i], or from the entry's own second moment s[i]

// At most CHUNK entries of a row.
template <Steps STEPS, class T>
inline void update(const Piece& w, const Hyper<T> h, int64_t row, int64_t col, int64_t n,
                   T* __restrict s) {
    alignas(64) T scratch[3][CHUNK];
    const int64_t at = w.offset + row * w.cols + col;
    T* __restrict const p = loaded(w.param, at, n, w.types & BF16_PARAM, scratch[0]);
    const T* __restrict const g = loaded(w.grad, at, n, w.types & BF16_GRAD, scratch[1]);
    T* __restrict const m = loaded(w.exp_avg, at, n, w.types & BF16_EXP_AVG, scratch[2]);
    const T same = *s;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const T gradient = g[i] * h.grad_scale;
        T step = STEPS == Steps::EACH ? s[i] : same;
        if (STEPS == Steps::OWN) {
            s[i] = next_moment(s[i], gradient * gradient, h.weight2);
            step = h.step(s[i]);
        }
        m[i] = lerp(m[i], gradient, h.weight1);
        p[i] = p[i] * h.decay - m[i] * step;
    }
    if (!(w.types & (BF16_PARAM | BF16_EXP_AVG))) return;

    const uint64_t index = w.index + row * w.stride + col;
    const uint32_t low = uint32_t(index), high = uint32_t(index >> 32), key = uint32_t(w.key);
    alignas(64) uint32_t noise[CHUNK];
    if (w.types & (BF16_EXP_AVG | ROUND_PARAM))
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t here = low + uint32_t(i);
            noise[i] = mix(here ^ (high + (here < low)) * 0x9E3779B9u ^ key);
        }
    if (w.types & BF16_EXP_AVG) store_bf16<true>(w.exp_avg, at, n, m, noise, 0);
    if (w.types & ROUND_PARAM) store_bf16<true>(w.param, at, n, p, noise, 16);
    else if (w.types & BF16_PARAM) store_bf16<false>(w.param, at, n, p, noise, 16);
}

// The sum of g^2 over runs of entries.
template <class T>
class SquareSum {
    typedef T Lanes __attribute__((vector_size(16 * sizeof(T))));  // one to four registers
    typedef double Wide __attribute__((vector_size(16 * sizeof(double))));
    Wide wide_ = {};
    double rest_ = 0;

    void add_chunk(const T* g, int64_t n) {
        Lanes sums[4] = {}, x;  // one sum alone would wait for its last addition
        int64_t i = 0;
        for (; i + 64 <= n; i += 64)
            for (int k = 0; k < 4; ++k) {
                __builtin_prefetch(g + i + 16 * k + 1024);
                std::memcpy(&x, g + i + 16 * k, sizeof x);
                sums[k] += x * x;
            }
        wide_ += __builtin_convertvector((sums[0] + sums[1]) + (sums[2] + sums[3]), Wide);
        for (; i < n; ++i) rest_ += g[i] * g[i];
    }

  public:
    void add(const Piece& w, int64_t at, int64_t n) {
        alignas(64) T scratch[CHUNK];
        for (; n > 0; at += CHUNK, n -= CHUNK) {
            const int64_t width = std::min(n, CHUNK);
            add_chunk(loaded(w.grad, w.offset + at, width, w.types & BF16_GRAD, scratch), width);
        }
    }
    double total() const {
        double sums[16];
        std::memcpy(sums, &wide_, sizeof sums);
        for (int half = 8; half; half /= 2)
            for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
        return sums[0] + rest_;
    }
};

// Each row is updated chunk by chunk while the next one is summed: memory is read without a pause.
template <class T>
void rows_in_one_pass(const Piece& w, const Item& item) {
    const Hyper<T> h(item.hyper);
    SquareSum<T> sum;
    sum.add(w, item.row * w.cols, w.cols);
    for (int64_t row = item.row; row < item.row_end; ++row) {
        T step = unit_step<T>(w, item.hyper, row, sum.total());
        sum = {};
        for (int64_t col = 0; col < w.cols; col += CHUNK) {
            const int64_t n = std::min(CHUNK, w.cols - col);
            update<Steps::SAME>(w, h, row, col, n, &step);
            if (row + 1 < item.row_end) sum.add(w, (row + 1) * w.cols + col, n);
        }
    }
}

// m and p of rows and columns of a piece; v too if elementwise.
template <class T>
void tile(const Piece& w, const Item& item) {
    const Hyper<T> h(item.hyper);
    T* const steps = static_cast<T*>(item.units);
    T* const v = static_cast<T*>(w.exp_avg_sq) + w.first;
    for (int64_t row = item.row; row < item.row_end; ++row)
        for (int64_t col = item.col; col < item.col_end; col += CHUNK) {
            const int64_t n = std::min(CHUNK, item.col_end - col);
            if (w.kind == ELEMENTWISE) update<Steps::OWN>(w, h, row, col, n, v + col);
            else if (w.kind == ROW) update<Steps::SAME>(w, h, row, col, n, steps + row);
            else update<Steps::EACH>(w, h, row, col, n, steps + row / w.rows * w.cols + col);
        }
}

// Entries [col, col_end) of units [row, row_end), elementwise or row: a part each.
template <class T>
void parts_of_rows(const Piece& w, const Item& item) {
    for (int64_t u = item.row; u < item.row_end; ++u) {
        const int64_t at = u * w.unit, end = std::min(at + item.col_end, w.rows * w.cols);
        SquareSum<T> sum;
        sum.add(w, at + item.col, end - at - item.col);
        item.parts[u * item.unit_gap + item.col / ITEM] = sum.total();
    }
}

template <class T>
void parts_of_columns(const Piece& w, const Item& item) {
    T sums[WIDTH] = {}, scratch[4][WIDTH];
    const int64_t n = item.col_end - item.col;
    const auto from = [&](int64_t row, T* scratch) {
        const int64_t at = w.offset + row * w.cols + item.col;
        return loaded(w.grad, at, n, w.types & BF16_GRAD, scratch);
    };
    int64_t row = item.row;
    for (; row + 4 <= item.row_end; row += 4) {
        const T *a = from(row, scratch[0]), *b = from(row + 1, scratch[1]);
        const T *c = from(row + 2, scratch[2]), *d = from(row + 3, scratch[3]);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
            sums[i] += (a[i] * a[i] + b[i] * b[i]) + (c[i] * c[i] + d[i] * d[i]);
    }
    for (; row < item.row_end; ++row) {
        const T* const a = from(row, scratch[0]);
        for (int64_t i = 0; i < n; ++i) sums[i] += a[i] * a[i];
    }
    const int64_t part = item.row % w.rows / STRIP;
    std::copy(sums, sums + n, item.parts + part * item.part_gap + item.col);
}

// Sums of units [col, col_end) of matrix `row`; with hyper, their step sizes.
template <class T>
void totals(const Piece& w, const Item& item) {
    const int64_t first = item.row * (w.units / w.batch);
    double sums[WIDTH] = {};
    for (int64_t k = 0; k < item.n_parts; ++k)
        for (int64_t u = item.col; u < item.col_end; ++u)
            sums[u - item.col] += item.parts[u * item.unit_gap + k * item.part_gap];
    for (int64_t u = item.col; u < item.col_end; ++u) {
        const double sum = sums[u - item.col];
        T& number = static_cast<T*>(item.units)[first + u];
        number = item.hyper ? unit_step<T>(w, item.hyper, first + u, sum) : T(sum);
    }
}

// A call's items in three stages, each of which needs what the one before has written.
template <class T>
struct Plan {
    std::vector<Item> stages[3];
    std::vector<std::vector<double>> buffers;

    double* buffer(int64_t n) {
        buffers.emplace_back(n);
        return buffers.back().data();
    }
    static int64_t height(int64_t width) { return std::max<int64_t>(1, ITEM / width); }

    void cut(int stage, Item item, int64_t row, int64_t row_end, int64_t cols, int64_t height,
             int64_t width) {
        for (; row < row_end; row += height)
            for (int64_t col = 0; col < cols; col += width) {
                item.row = row, item.row_end = std::min(row + height, row_end);
                item.col = col, item.col_end = std::min(col + width, cols);
                stages[stage].push_back(item);
            }
    }
    void sums(const Piece& w, Item item) {
        const bool column = w.kind == COLUMN;
        const int64_t units = w.units / w.batch;
        const int64_t part = column ? STRIP : w.unit > LONG ? ITEM : w.unit;
        item.n_parts = (w.unit + part - 1) / part;
        item.unit_gap = column ? 1 : item.n_parts, item.part_gap = column ? units : 1;
        for (int64_t b = 0; b < w.batch; ++b) {
            item.parts = buffer(units * item.n_parts);
            item.run = column ? parts_of_columns<T> : parts_of_rows<T>;
            if (column) cut(0, item, b * w.rows, (b + 1) * w.rows, w.cols, STRIP, WIDTH);
            else cut(0, item, 0, units, w.unit, height(w.unit), part);
            item.run = totals<T>;
            cut(1, item, b, b + 1, units, 1, WIDTH);
        }
    }
    void apply(const Piece& w, Item item) {
        const int64_t width = std::min(ITEM, w.cols);
        item.run = tile<T>;
        cut(2, item, 0, w.batch * w.rows, w.cols, height(width), width);
    }
    void one_pass(const Piece& w, Item item) {
        if (w.kind == ROW && w.cols <= LONG) {
            item.run = rows_in_one_pass<T>;
            return cut(0, item, 0, w.rows, w.cols, height(w.cols), w.cols);
        }
        if (w.kind != ELEMENTWISE) {
            item.units = buffer(w.units);
            sums(w, item);
        }
        apply(w, item);
    }
    void run(int stage, int64_t threads, Parallel* parallel) const {
        const std::vector<Item>& items = stages[stage];
        int64_t entries = 0;
        for (const Item& x : items) entries += (x.row_end - x.row) * (x.col_end - x.col);
        std::atomic<size_t> taken{0};
        auto work = [&] {
            for (size_t i; (i = taken++) < items.size();) items[i].run(*items[i].piece, items[i]);
        };
        if (parallel && threads > 1 && entries > WAKE) {
            // All of them: GNU's pool ends threads that a smaller team leaves out.
            const auto call = [](void* work_) { (*static_cast<decltype(work)*>(work_))(); };
            return parallel(call, &work, unsigned(threads), 0);
        }
        std::vector<std::thread> others;
        try {
            for (threads = std::min(threads, entries / SHARE); threads > 1; --threads)
                others.emplace_back(work);
        } catch (...) {  // no more threads to be had: fewer do
        }
        work();
        for (std::thread& other : others) other.join();
    }
};

template <class T>
void step(int64_t op, const Piece* w, int64_t n, const double* hyper, T* units, int64_t threads,
          Parallel* parallel) {
    Plan<T> plan;
    for (int64_t i = 0; i < n; ++i, ++w) {
        const double* const h = op == UNIT_SUMS ? nullptr : hyper + 8 * i;
        if (w->batch && w->rows && w->cols && !(h && h[7] != 0)) {
            if (op == UNIT_SUMS) plan.sums(*w, {w, h, units});
            else if (op == APPLY) plan.apply(*w, {w, h, units});
            else plan.one_pass(*w, {w, h, units});
        }
        if (op != ONE_PASS) units += w->units;
    }
    for (int stage = 0; stage < 3; ++stage) plan.run(stage, threads, parallel);
}

}  // namespace

// units: fp64 if `wide`, else fp32, by unit: zeros for the sums, or the step sizes. parallel: null to
// start threads for the call.
// Returns 0; 1, with nothing written, for want of memory.
extern "C" int trimtab_adam_mini(int64_t op, const int64_t* table, int64_t n, const double* hyper,
                                 void* units, int64_t wide, int64_t threads,
                                 Parallel* parallel) {
    static_assert(sizeof(Piece) == 16 * sizeof(int64_t), "the columns of native.py's table");
    const Piece* const works = reinterpret_cast<const Piece*>(table);
    try {
        if (wide) step(op, works, n, hyper, static_cast<double*>(units), threads, parallel);
        else step(op, works, n, hyper, static_cast<float*>(units), threads, parallel);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
