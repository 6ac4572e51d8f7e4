// Tests of the plan reader, without a framework. Exit status 0: everything held.
//   test_parse FILE...               each must be read; prints a line per node. FILE.expect, when there is one, holds
//                                    those lines; FILE.values the weights as float32, in the order of their names.
//   test_parse --refuse FILE...      each must be refused with a message that contains the text of FILE.expect.
//   test_parse --fuzz N SEED FILE... N mutations of each file must be read, or refused with sec::Error.
//   test_parse --self                parts whose answers are known without a file.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <sstream>

#include "checks.hpp"
#include "json.hpp"
#include "weights.hpp"

namespace {

using Bytes = std::vector<uint8_t>;
constexpr int64_t kLimit = int64_t{1} << 24;
int failures = 0;

void check(bool holds, const std::string& what) {
    if (holds) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

bool load(const std::string& path, std::string& out) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return false;
    out.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    return true;
}

std::string summary(const sec::Graph& graph) {
    std::ostringstream out;
    const auto one = sec::infer(graph, 1, kLimit), three = sec::infer(graph, 3, kLimit);
    for (const sec::Node& node : graph.nodes) {
        out << node.name << ' ' << sec::op_name(node.op);
        for (int value : node.out) {
            const auto i = static_cast<size_t>(value);
            out << ' ' << graph.values[i].name << ' ' << sec::text_of(one[i]) << ' ' << sec::text_of(three[i]);
        }
        out << '\n';
    }
    return out.str();
}

void check_values(const sec::Graph& graph, const std::string& path) {
    std::string expected, got;
    if (!load(path + ".values", expected)) return;
    for (const sec::Weight& weight : graph.weights) {
        const std::vector<float> values = sec::dense_values(weight);
        const auto zeros = std::count(values.begin(), values.end(), 0.0f);
        const auto found = static_cast<int64_t>(values.size()) - static_cast<int64_t>(zeros);
        check(weight.store == sec::Store::bitmask ? weight.nnz >= found : weight.nnz == found,
              path + ": nnz of " + weight.name);
        got.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    }
    check(got == expected, path + ": the decoded weights differ");
}

void read_file(const std::string& path) {
    try {
        const sec::Mapping file(path);
        const sec::Graph graph = sec::parse_plan(file.data(), file.size());
        const std::string text = summary(graph);
        std::printf("%s\n%s", path.c_str(), text.c_str());
        std::string expected;
        if (load(path + ".expect", expected))
            check(text == expected, path + ": the shapes differ; expected\n" + expected);
        check_values(graph, path);
    } catch (const std::exception& error) {
        check(false, path + ": " + error.what());
    }
}

void refuse_file(const std::string& path) {
    std::string expected;
    check(load(path + ".expect", expected), path + " has no .expect");
    try {
        const sec::Mapping file(path);
        const sec::Graph graph = sec::parse_plan(file.data(), file.size());
        summary(graph);
        check(false, path + " was accepted; expected: " + expected);
    } catch (const sec::Error& error) {
        const std::string message = error.what();
        check(message.find(expected) != std::string::npos, path + ": " + message + "\n  expected: " + expected);
        check(message.find('\n') == std::string::npos, path + ": the message has several lines");
    }
}

class Mutator {
public:
    explicit Mutator(uint64_t seed) : random_(seed) {}

    Bytes mutate(const Bytes& from) {
        Bytes out = from;
        if (below(2) && out.size() >= 8) {
            for (size_t i = 0, n = 1 + below(3); i < n; ++i)
                set_header(out, nudge(std::string(out.begin() + 8, out.begin() + 8 +
                                                  static_cast<std::ptrdiff_t>(header_size(out)))));
            return out;
        }
        const size_t rounds = below(3) ? 1 : 1 + below(4);
        for (size_t i = 0; i < rounds && out.size() >= 8; ++i) once(out);
        return out;
    }

private:
    size_t below(size_t n) { return n ? static_cast<size_t>(random_() % n) : 0; }

    static size_t header_size(const Bytes& bytes) {
        uint64_t length = 0;
        for (size_t i = 0; i < 8; ++i) length |= static_cast<uint64_t>(bytes[i]) << (8 * i);
        return static_cast<size_t>(std::min<uint64_t>(length, bytes.size() - 8));
    }

    // Puts another header before the same data.
    static void set_header(Bytes& bytes, const std::string& header) {
        Bytes out(8);
        for (size_t i = 0; i < 8; ++i) out[i] = static_cast<uint8_t>(static_cast<uint64_t>(header.size()) >> (8 * i));
        out.insert(out.end(), header.begin(), header.end());
        const auto data = static_cast<std::ptrdiff_t>(8 + header_size(bytes));
        out.insert(out.end(), bytes.begin() + data, bytes.end());
        bytes = std::move(out);
    }

    static bool in_token(char c) {
        return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c == '.' ||
               c == '-' || c == '+';
    }

    // Start and length of a random word or number; length 0 when the header has none there. Half of them are of the
    // nodes, and a third of those numbers: what lies elsewhere is mostly offsets, where any change is refused at once.
    std::pair<size_t, size_t> token(const std::string& header) {
        const size_t nodes = header.find("nodes");
        const bool inside = nodes != std::string::npos && below(2);
        const size_t end_of = inside ? std::min(header.find("\"}", nodes), header.size()) : header.size();
        const bool number = inside && below(3) == 0;
        size_t at = inside ? nodes + below(end_of - nodes) : below(header.size());
        while (at < header.size() && !(number ? header[at] >= '0' && header[at] <= '9' : in_token(header[at]))) ++at;
        while (at > 0 && at < header.size() && in_token(header[at - 1])) --at;
        size_t end = at;
        while (end < header.size() && in_token(header[end])) ++end;
        return {at, end - at};
    }

    static bool is_number(const std::string& text) { return text.find_first_not_of("0123456789-.") == std::string::npos; }

    // Another word or number like this one, from elsewhere in the header: most such changes get past the reader of JSON.
    std::pair<size_t, size_t> alike(const std::string& header, std::pair<size_t, size_t> one) {
        const bool number = is_number(header.substr(one.first, one.second));
        auto other = token(header);
        for (int i = 0; i < 20 && is_number(header.substr(other.first, other.second)) != number; ++i)
            other = token(header);
        return other;
    }

    std::string swap_tokens(const std::string& header) {
        auto a = token(header), b = alike(header, a);
        if (a.first > b.first) std::swap(a, b);
        if (a.first + a.second > b.first) return header;
        return header.substr(0, a.first) + header.substr(b.first, b.second) +
               header.substr(a.first + a.second, b.first - a.first - a.second) + header.substr(a.first, a.second) +
               header.substr(b.first + b.second);
    }

    std::string copy_token(const std::string& header) {
        const auto to = token(header), from = alike(header, to);
        return header.substr(0, to.first) + header.substr(from.first, from.second) +
               header.substr(to.first + to.second);
    }

    std::string replace_token(const std::string& header) {
        static const char* const numbers[] = {"0", "1", "-1", "2", "3", "4", "8", "16777216", "2147483647", "2147483648",
            "4294967297", "9223372036854775807", "-9223372036854775808", "9223372036854775808", "1e308", "0.5", "-0"};
        static const char* const words[] = {"1e999", "01", "1.", "NaN", "null", "true", "false", "[]", "{}", "[[[[", "]",
            "}", "bitmask", "i8", "f16", "bf16", "f32", "i64", "conv", "reshape", "lstm", "gru", "slice", "expand", "pad",
            "matmul", "max", "relu", "\\u0000", "\\ud800"};
        const auto at = token(header);
        const std::string old = header.substr(at.first, at.second);
        std::string put = below(8) && is_number(old) ? numbers[below(std::size(numbers))] : words[below(std::size(words))];
        if (is_number(old) && old.size() < 10 && below(3) == 0)
            put = std::to_string(std::atol(old.c_str()) + static_cast<long>(below(5)) - 2);
        return header.substr(0, at.first) + put + header.substr(at.first + at.second);
    }

    // Another integer for one of the attributes' or inputs': sound JSON and often a sound attribute.
    std::string nudge(const std::string& header) {
        static const char* const numbers[] = {"0", "1", "2", "3", "4", "5", "8", "-1", "4096", "16777216", "2147483647"};
        size_t at = header.find(below(4) ? "nodes" : "inputs");
        if (at == std::string::npos) return header;
        at += below(header.size() - at);
        while (at + 1 < header.size() && !((header[at] == ' ' || header[at] == '[') && header[at + 1] >= '0' &&
                                           header[at + 1] <= '9'))
            ++at;
        size_t end = at + 1;
        while (end < header.size() && in_token(header[end])) ++end;
        return header.substr(0, at + 1) + numbers[below(std::size(numbers))] + header.substr(end);
    }

    std::string move_piece(const std::string& header) {
        const size_t from = below(header.size()), size = 1 + below(std::min<size_t>(64, header.size() - from));
        const size_t to = below(header.size());
        std::string out = header;
        if (below(2)) out.erase(from, size);
        return out.insert(std::min(to, out.size()), header, from, size);
    }

    void once(Bytes& bytes) {
        const size_t length = header_size(bytes);
        const std::string header(bytes.begin() + 8, bytes.begin() + static_cast<std::ptrdiff_t>(8 + length));
        static const char odd[] = "\"\\{}[]:,0-9.eE\t\n\x00\x7f\x80\xc0\xff uax";
        switch (below(header.empty() ? 3 : 10)) {
            case 0:
                for (size_t i = 0, n = 1 + below(8); i < n; ++i)
                    bytes[below(bytes.size())] ^= static_cast<uint8_t>(1u << below(8));
                return;
            case 1: bytes.resize(below(bytes.size())); return;
            case 2: bytes[below(8)] ^= static_cast<uint8_t>(1u << below(8)); return;
            case 3: bytes[8 + below(length)] = static_cast<uint8_t>(odd[below(sizeof odd - 1)]); return;
            case 4: return set_header(bytes, swap_tokens(header));
            case 5: case 6: return set_header(bytes, copy_token(header));
            case 7: case 8: return set_header(bytes, replace_token(header));
            default: return set_header(bytes, move_piece(header));
        }
    }

    std::mt19937_64 random_;
};

// What must hold of everything that is accepted.
void check_accepted(const sec::Graph& graph, int64_t batch) {
    for (const sec::Shape& shape : sec::infer(graph, batch, kLimit)) {
        const int64_t n = sec::bounded_count(shape, kLimit);
        check(n >= 1 && shape.size() <= SEC_MAX_DIMS, "an inferred shape " + sec::text_of(shape));
    }
    for (const sec::Weight& weight : graph.weights) {
        const auto values = sec::dense_values(weight);
        const auto zeros = std::count(values.begin(), values.end(), 0.0f);
        check(static_cast<int64_t>(values.size()) == weight.numel &&
                  weight.nnz >= weight.numel - static_cast<int64_t>(zeros) && weight.nnz <= weight.numel,
              "counts of weight " + weight.name);
    }
}

void fuzz(const std::string& path, int count, uint64_t seed) {
    std::string text;
    check(load(path, text), "cannot open " + path);
    const Bytes original(text.begin(), text.end());
    Mutator mutator(seed);
    int accepted = 0, unread = 0, unshaped = 0;
    for (int i = 0; i < count; ++i) {
        const Bytes mutated = mutator.mutate(original);
        // A block of exactly this size: the sanitizer sees a read one byte past it.
        const std::unique_ptr<uint8_t[]> bytes(new uint8_t[mutated.size()]);
        std::copy(mutated.begin(), mutated.end(), bytes.get());
        bool parsed = false;
        try {
            const sec::Graph graph = sec::parse_plan(bytes.get(), mutated.size());
            parsed = true;
            check_accepted(graph, 1);
            check_accepted(graph, 3);
            ++accepted;
        } catch (const sec::Error& error) {
            check(error.status != SEC_ERROR_INTERNAL && std::strlen(error.what()) > 0, error.what());
            ++(parsed ? unshaped : unread);
        } catch (const std::exception& error) {
            check(false, path + ": mutation " + std::to_string(i) + " threw " + error.what());
        }
    }
    std::printf("%s: %d mutations, %d accepted, %d refused by the parser, %d by shape inference\n", path.c_str(), count,
                accepted, unread, unshaped);
}

void check_number(const char* text, bool exact, int64_t integer, double number) {
    const sec::json::Value value = sec::json::parse(text, std::strlen(text), "a number");
    check(value.is(sec::json::Kind::number) && value.exact == exact && value.integer == integer &&
              value.number == number,
          std::string("number ") + text);
}

void check_not_json(const std::string& text) {
    try {
        sec::json::parse(text.data(), text.size(), "text");
        check(false, "accepted as JSON: " + sec::quoted(text));
    } catch (const sec::Error&) {
    }
}

void self() {
    check_number("0", true, 0, 0);
    check_number("-12", true, -12, -12);
    check_number("9223372036854775807", true, std::numeric_limits<int64_t>::max(), 9223372036854775807.0);
    check_number("-9223372036854775808", true, std::numeric_limits<int64_t>::min(), -9223372036854775808.0);
    check_number("9223372036854775808", false, 0, 9223372036854775808.0);
    check_number("-9223372036854775809", false, 0, -9223372036854775808.0);
    check_number("1.5e2", false, 0, 150);
    check_number("1E-5", false, 0, 1e-5);
    check_number(" 0.1\n", false, 0, 0.1);
    const std::string deep(33, '[');
    check_not_json(deep + "1" + std::string(33, ']'));
    for (const char* text : {"", " ", "01", "1.", ".5", "+1", "1e", "1e999", "-", "NaN", "nul", "truee", "[1,]", "[1 2]",
                             "{\"a\":1,}", "{\"a\":1,\"a\":2}", "{\"a\":1,\"\\u0061\":2}", "{a:1}", "\"", "\"\\x\"",
                             "\"\\ud800\"", "\"\\ud800\\u0041\"", "\"\\udc00\"", "\"\\u12g4\"", "\"\n\"", "1 2", "[", "{"})
        check_not_json(text);
    for (const char* bytes : {"\x80", "\xc0\xaf", "\xe0\x80\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xf5", "\xc3"})
        check_not_json(std::string("\"") + bytes + "\"");
    check_not_json(std::string(1000000, '['));
    const std::string escapes = "\"\\u00e9\\ud83d\\ude00\\n\\/\"";
    check(sec::json::parse(escapes.data(), escapes.size(), "text").text == "\xc3\xa9\xf0\x9f\x98\x80\n/", "escapes");
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
        const float got = sec::half_to_float(static_cast<uint16_t>(bits));
        const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                           : exponent ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                                      : std::ldexp(static_cast<float>(fraction), -24);
        check(std::isnan(size) ? std::isnan(got) : std::fabs(got) == size && std::signbit(got) == (bits >> 15 != 0),
              "half " + std::to_string(bits));
    }
    std::vector<uint8_t> ramp(259);
    int64_t bits = 0;
    for (size_t i = 0; i < ramp.size(); ++i) {
        ramp[i] = static_cast<uint8_t>(i * 37);
        for (unsigned b = 0; b < 8; ++b) bits += ramp[i] >> b & 1;
        check(sec::count_bits(ramp.data(), i + 1) == bits, "bits of " + std::to_string(i + 1) + " bytes");
    }
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<std::string> args(argv + 1, argv + argc);
    if (args.empty()) {
        std::fprintf(stderr, "usage: test_parse [--self | --refuse | --fuzz N SEED] FILE...\n");
        return 2;
    }
    const std::string& mode = args[0];
    if (mode == "--self") {
        self();
    } else if (mode == "--refuse") {
        for (size_t i = 1; i < args.size(); ++i) refuse_file(args[i]);
    } else if (mode == "--fuzz" && args.size() >= 4) {
        for (size_t i = 3; i < args.size(); ++i)
            fuzz(args[i], std::atoi(args[1].c_str()), std::strtoull(args[2].c_str(), nullptr, 10));
    } else {
        for (const std::string& path : args) read_file(path);
    }
    std::fprintf(stderr, "%d failures\n", failures);
    return failures ? 1 : 0;
}
