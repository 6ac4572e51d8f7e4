// Runs one plain operator on made-up arrays and compares it with numbers that the caller computed in double precision.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "../src/plain.hpp"

namespace test {

using sec::Act;
using sec::Dtype;
using sec::Fn;
using sec::Op;
using sec::Shape;
using Doubles = std::vector<double>;

extern const sec::Kernels* kernels;      // the table under test
extern int failures, checks;

const double kInf = std::numeric_limits<double>::infinity();
const double kNan = std::numeric_limits<double>::quiet_NaN();

class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 2654435761u + 88172645463325252ull) {}
    double next() {                      // in -1 .. 1
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return static_cast<double>(state_ >> 11) / 4503599627370496.0 - 1.0;
    }

private:
    uint64_t state_;
};

// Floats, held as doubles: the reference reads exactly what the operator reads.
inline Doubles random_values(int64_t n, uint64_t seed, double density = 1.0) {
    Random random(seed + 1);
    Doubles out(static_cast<size_t>(n));
    for (double& v : out) {
        v = static_cast<double>(static_cast<float>(random.next()));
        if (std::fabs(random.next()) >= density) v = 0;
    }
    return out;
}
inline Doubles random_values(const Shape& shape, uint64_t seed, double density = 1.0) {
    return random_values(sec::count(shape), seed, density);
}

struct Array {
    Shape shape;
    Doubles values;                      // token ids too
    Dtype dtype = Dtype::f32;
};
struct WeightArray {
    std::string role;
    Shape shape;
    Doubles values;
};

struct Case {
    std::string name;
    Op op;
    sec::Attrs attrs;
    std::vector<Array> in;
    std::vector<WeightArray> weights;
    Dtype out_dtype = Dtype::f32;
};

struct Ran {
    std::vector<Shape> shapes;
    std::vector<Doubles> out;
    int64_t parts = 0;
};

// Runs all parts on two threads, last first, each in a scratch of its own that is full of NaN; throws what the operator
// throws.
Ran run(const Case& c);
// Runs and compares. `want` holds one array for each output that is compared.
void check(const Case& c, const std::vector<Array>& want, double tolerance = 2e-5);
void expect(bool truth, const std::string& what);

// An independent definition of the activations and unary functions.
double apply(Fn fn, double x);
inline double apply(Act act, double x) { return apply(static_cast<Fn>(act), x); }

void windows();
void elements();
void rows();
void products();
void moves();
void recurrent();

}  // namespace test
